r"""Bayesian networks: :math:`p(x_1, \dots, x_M) = \prod_j p(x_j | Pa(x_j))` (notes, *Directed graphical models*).

A key names a node and its parents in the order in which its conditional receives them: `"x | y, z"`. p and q are the
same noun; `VAE` closes the pair.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping
from typing import final

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb._shapes import Values, rows_of
from aevb.config import InputError, ModelConfig
from aevb.distributions import Noise, draw, log_prob

__all__ = ["VAE", "BayesNet"]


@final
class BayesNet(nn.Module):
    r"""An acyclic network of conditionals, one factor a key.

    Args:
        factors: `"node | parent, parent"` to the conditional p(node | parents). Parents that no key defines are
            `inputs`.

    Raises:
        InputError: For a key that is not of this form, a node given twice, or a cycle.

    Example:
        >>> from aevb import Bernoulli, MLP, StandardNormal
        >>> p = BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [8], 5))})
        >>> p.nodes, p.parents["x"], p.inputs
        (('z', 'x'), ('z',), ())
        >>> p.sample(3)["x"].shape
        torch.Size([3, 5])
    """

    nodes: tuple[str, ...]
    parents: dict[str, tuple[str, ...]]
    inputs: tuple[str, ...]

    def __init__(self, factors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parents = {}
        for key, conditional in factors.items():
            node, parents = _parse(key)
            if node in self.parents:
                raise InputError(
                    f"Node `{node}` is given twice, the second time by the key {key!r}. Keep one factor a node."
                )
            if not isinstance(conditional, nn.Module):
                raise InputError(
                    f"The factor {key!r} must be an nn.Module that returns a distribution; got "
                    f"{type(conditional).__name__}. Wrap a net in a conditional, e.g. aevb.Bernoulli(net)."
                )
            self.parents[node] = parents
            # Prefixed, so that a column may be called `type` or `values`.
            self.add_module(f"node_{node}", conditional)
        try:
            order = tuple(graphlib.TopologicalSorter(self.parents).static_order())
        except graphlib.CycleError as error:
            cycle = " -> ".join(error.args[1])
            raise InputError(
                f"The factors form a cycle, {cycle}; a Bayesian network has none. Drop one parent."
            ) from None
        self.nodes = tuple(node for node in order if node in self.parents)
        self.inputs = tuple(node for node in order if node not in self.parents)

    @property
    def keys(self) -> tuple[str, ...]:
        """The factors in the notation of the notes, in topological order."""
        return tuple(f"{n} | {', '.join(self.parents[n])}" if self.parents[n] else n for n in self.nodes)

    def conditional(self, node: str) -> nn.Module:
        """The module that is the factor of `node`."""
        return self.get_submodule(f"node_{node}")

    def distribution(self, node: str, values: Values) -> td.Distribution:
        """p(node | parents) at the parents' `values`, each `(*batch, *event)`."""
        d = self.conditional(node)(*(values[parent] for parent in self.parents[node]))
        if not isinstance(d, td.Distribution):
            raise InputError(
                f"The conditional of `{node}` returned {type(d).__name__}; a conditional returns a torch Distribution. "
                "Wrap the net in one, e.g. aevb.Bernoulli(net)."
            )
        return d

    @torch.no_grad()
    def sample(self, rows: int, values: Values | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Ancestral draws of every node that `values` does not give.

        Args:
            rows: Draws N.
            values: Inputs and nodes held fixed, each `(N, *event)`.
            noise: Source of randomness; torch's current generator if None.

        Returns:
            All nodes by name, each `(N, *event)`.

        Raises:
            InputError: If an input is not given, a name is unknown, or `values` have another number of rows.
        """
        known = dict(values or {})
        _require(self.inputs, known, "An input of the network")
        self._check_names(known)
        if odd := [name for name, value in known.items() if value.shape[:1] != (rows,)]:
            raise InputError(f"{_names(odd)} must have {rows} rows, as many as are drawn. Repeat or cut the values.")
        for node in self.nodes:
            if node not in known:
                d = self.distribution(node, known)
                shape = torch.Size([rows])
                known[node] = draw(d, shape, noise) if d.has_rsample else d.expand(shape).sample()
        return known

    def log_prob(self, values: Values) -> dict[str, Tensor]:
        """Log-density of each node at `values`, which give all of them, in nats over the leading axes of its parents.

        Example:
            >>> from aevb import StandardNormal
            >>> BayesNet({"z": StandardNormal(1)}).log_prob({"z": torch.zeros(2, 1)})["z"]
            tensor([-0.9189, -0.9189])
        """
        _require((*self.inputs, *self.nodes), values, "A node of the network")
        self._check_names(values)
        result = {}
        for node in self.nodes:
            d, value = self.distribution(node, values), values[node]
            if value.shape[value.ndim - len(d.event_shape) :] != d.event_shape:
                raise InputError(
                    f"`{node}` must end in {tuple(d.event_shape)}; got shape {tuple(value.shape)}. "
                    "Flatten images with `x.flatten(1)`, or build the model with that event shape."
                )
            result[node] = log_prob(d, value)
        return result

    def _check_names(self, values: Values) -> None:
        if strangers := [name for name in values if name not in (*self.nodes, *self.inputs)]:
            raise InputError(
                f"`values` gives {_names(strangers)}, but the network has {_names((*self.inputs, *self.nodes))}. "
                "Rename them, or leave them out."
            )


@final
class VAE(nn.Module):
    r"""A generative network p(x, z) with its inference network q(z | x), either of any acyclic wiring.

    What is latent is decided by each call: nodes of p that the values do not give.

    Args:
        p: Generative network.
        q: Inference network; may be empty where nothing is latent.
        given: Context, the inputs that p conditions on: exactly `p.inputs`, so that a misspelt parent is an error.

    Raises:
        InputError: If `given` is not what p needs, or q has nodes or inputs that p does not.

    Example:
        >>> from aevb import Bernoulli, DiagonalNormal, MLP, StandardNormal
        >>> vae = VAE(
        ...     BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [8], 5))}),
        ...     BayesNet({"z | x": DiagonalNormal(MLP(5, [8], 4))}),
        ... )
        >>> vae.posterior({"x": torch.zeros(3, 5)})["z"].mean.shape
        torch.Size([3, 2])
    """

    def __init__(self, p: BayesNet, q: BayesNet, *, given: Iterable[str] = ()) -> None:
        super().__init__()
        self.config: ModelConfig | None = None
        """What `aevb.build_vae` made the model from; None for one composed by hand."""
        self.p, self.q = p, q
        self.given = (given,) if isinstance(given, str) else tuple(given)
        if set(self.given) != set(p.inputs):
            raise InputError(
                f"p conditions on {_names(p.inputs)}, but `given` names {_names(self.given)}. "
                "Name every input of p as context in `given`, or define the node in p."
            )
        if strangers := [node for node in q.nodes if node not in p.nodes]:
            raise InputError(f"q infers {_names(strangers)}, which p does not define. Give p a factor for each.")
        if strangers := [node for node in q.inputs if node not in (*p.nodes, *self.given)]:
            raise InputError(f"q depends on {_names(strangers)}, unknown to p. Use nodes of p or names in `given`.")

    def latents(self, values: Values) -> tuple[str, ...]:
        """Nodes of p that `values` leaves latent, in the order in which q draws them.

        Raises:
            InputError: If `values` has names unknown to p, or lacks what q or the context needs.
        """
        if strangers := [name for name in values if name not in (*self.p.nodes, *self.given)]:
            raise InputError(
                f"`values` gives {_names(strangers)}, but p has the nodes {_names(self.p.nodes)}"
                + (f" and the context {_names(self.given)}" if self.given else "")
                + ". Rename them, or leave them out."
            )
        _require(self.given, values, "Context")
        hidden = [node for node in self.p.nodes if node not in values]
        if lost := [node for node in hidden if node not in self.q.nodes]:
            raise InputError(
                f"{_names(lost)} of p is neither in `values` nor inferred by q. Give its values, or q a factor for it."
            )
        return tuple(node for node in self.q.nodes if node in hidden)

    @torch.no_grad()
    def posterior(self, values: Values) -> dict[str, td.Distribution]:
        """Q of each latent node at its parents' means: a deterministic embedding, `(N, *event)` each."""
        self.require_sight([name for name, value in values.items() if bool(value.isnan().any())])
        known, found = dict(values), {}
        for node in self.latents(values):
            d = self.q.distribution(node, known)
            found[node] = d if d.batch_shape else d.expand(torch.Size([rows_of(values)]))
            known[node] = found[node].mean
        return found

    def require_sight(self, holes: Iterable[str]) -> None:
        """Raise if a factor takes one of `holes`, names whose values hold NaN, as parent without `Holes` to see it."""
        for node, parents, factor in _factors(self):
            blind = set(parents) & set(holes)
            if blind and not any(getattr(module, "sees_holes", False) for module in factor.modules()):
                raise InputError(
                    f"{_names(sorted(blind))} has missing entries (NaN), but the factor "
                    f"'{node} | {', '.join(parents)}' cannot see what is missing. Wrap its net as Holes(net), with "
                    "inputs for the values and the mask (on the command line: train with --holes), or fill the entries."
                )


def _factors(vae: VAE) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    for net in (vae.p, vae.q):
        for node in net.nodes:
            yield node, net.parents[node], net.conditional(node)


def _parse(key: str) -> tuple[str, tuple[str, ...]]:
    node, bar, rest = (part.strip() for part in key.partition("|"))
    parents = tuple(part.strip() for part in rest.split(",")) if bar else ()
    if not all(name.isidentifier() for name in (node, *parents)) or len(set(parents)) < len(parents):
        raise InputError(
            f"The key {key!r} must be a name, or a name and its distinct parents: 'z', 'x | z', 'x | y, z'. "
            "Names are Python identifiers."
        )
    return node, parents


def _require(names: Iterable[str], values: Values, what: str) -> None:
    if missing := [name for name in names if name not in values]:
        raise InputError(f"{what} has no value: {_names(missing)}. Give it in `values`, `(N, *event)`.")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
