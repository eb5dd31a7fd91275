"""Any acyclic wiring: p(x_1, ..., x_M) = prod_j p(x_j | Pa(x_j)) (notes, *Directed graphical models*; N5).

The sprinkler: rain and a sprinkler are independent causes, wet grass is their child, a collider.

    p(rain) p(sprinkler) p(wet | rain, sprinkler)

Known to be wet, the grass makes the two dependent: hearing of the sprinkler, one believes less in rain ("explaining
away"). The network draws from its parents down, tells each node's log-density, and refuses wirings that are no network.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import aevb
from aevb import MLP, BayesNet


def categorical(logits: list[float]) -> aevb.Categorical:
    """A root with given probabilities."""
    root = aevb.Categorical(len(logits), learned=True)
    root.logits.data.copy_(torch.tensor(logits))
    return root


def sprinkler() -> BayesNet:
    """Classes are codes outside, 0 no and 1 yes, and one-hot vectors inside, side by side in the order of the key."""
    net = MLP(4, [], 2)  # of (rain no, rain yes, sprinkler no, sprinkler yes) to the logits of (dry, wet)
    net.last.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 4.0]]))
    net.last.bias.data.copy_(torch.tensor([0.0, -3.0]))
    return BayesNet({
        "wet | rain, sprinkler": aevb.Categorical(2, net),  # parents first or not, the order of the keys is free
        "rain": categorical([0.0, -1.0]),
        "sprinkler": categorical([0.0, -0.5]),
    })  # fmt: skip


def joint(p: BayesNet) -> Tensor:
    """p(rain, sprinkler, wet) of all eight states, from the sum of the nodes' log-densities."""
    states = torch.tensor(list(itertools.product(range(2), repeat=3)))
    by_node = p.log_prob(dict(zip(("rain", "sprinkler", "wet"), states.unbind(1), strict=True)))
    return sum(part for part in by_node.values()).exp().reshape(2, 2, 2)


def refused(factors: dict[str, torch.nn.Module]) -> str:
    """What `BayesNet` answers to a wiring that is none."""
    try:
        BayesNet(factors)
    except aevb.InputError as error:
        return str(error)
    raise AssertionError("this wiring is a network")


@torch.no_grad()
def main(rows: int = 20_000) -> dict[str, Tensor | float | str]:
    torch.manual_seed(0)
    p = sprinkler()
    print("Factors, parents first:", "; ".join(p.keys))
    table = joint(p)
    draws = p.sample(rows)
    code = 4 * draws["rain"] + 2 * draws["sprinkler"] + draws["wet"]
    counts = torch.bincount(code, minlength=8).reshape(2, 2, 2) / rows
    error = (table * (1 - table) / rows).sqrt()
    print(f"rain sprinkler wet   probability   share of {rows} draws, with its standard error")
    for r, s, w in itertools.product(range(2), repeat=3):
        print(f"{r:4d} {s:9d} {w:3d}   {table[r, s, w]:11.4f}   {counts[r, s, w]:.4f} +- {error[r, s, w]:.4f}")
    rain = float(table[1].sum())
    wet = float(table[1, :, 1].sum() / table[:, :, 1].sum())
    both = float(table[1, 1, 1] / table[:, 1, 1].sum())
    print(f"p(rain) = {rain:.3f}, given wet grass {wet:.3f}, and a sprinkler that was on {both:.3f}")

    one = {name: value[:1] for name, value in draws.items()}
    parts = ", ".join(f"log p({node}) = {float(part):.3f}" for node, part in p.log_prob(one).items())
    print(f"One draw, {', '.join(f'{name} = {int(value)}' for name, value in one.items())}: {parts}")
    fixed = p.sample(rows, {"rain": torch.ones(rows, dtype=torch.long)})["wet"].double().mean()
    print(f"Drawn with rain held fixed: wet in {fixed:.3f} of the rows, by the table {table[1, :, 1].sum() / rain:.3f}")

    normal = aevb.DiagonalNormal(MLP(1, [], 2))
    cycle = refused({"a | b": normal, "b | c": normal, "c | a": normal})
    twice = refused({"a": aevb.StandardNormal(1), "a | b": normal})
    for message in (cycle, twice):
        print("Refused:", message)
    return {"joint": table, "counts": counts, "error": error, "rain": rain, "wet": wet, "both": both, "cycle": cycle}


if __name__ == "__main__":
    main()
