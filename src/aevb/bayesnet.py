r"""Bayesian networks: :math:`p(x_1, \dots, x_M) = \prod_j p(x_j | Pa(x_j))` (notes, *Directed graphical models*).

A key names a node and its parents in the order in which its conditional receives them: `"x | y, z"`. p and q are the
same noun; `VAE` closes the pair.
"""

from __future__ import annotations

import graphlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import final

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb._shapes import Values, rows_of
from aevb.conditionals import Deterministic
from aevb.config import InputError, ModelConfig
from aevb.distributions import Noise, draw, log_prob

__all__ = ["VAE", "BayesNet", "call_stopped"]


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
    classes: dict[str, int]
    """Nodes that hold one of C classes, and C: codes 0..C-1 outside the networks, one-hot vectors inside."""

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
        self.nodes = _sorted(self.parents)
        self._computed = frozenset(node for node in self.nodes if isinstance(self.conditional(node), Deterministic))
        counts = {node: getattr(self.conditional(node), "classes", None) for node in self.nodes}
        self.classes = {node: count for node, count in counts.items() if isinstance(count, int)}
        named = [parent for parents in self.parents.values() for parent in parents]
        self.inputs = tuple(dict.fromkeys(parent for parent in named if parent not in self.parents))

    @property
    def keys(self) -> tuple[str, ...]:
        """The factors in the notation of the notes, in topological order."""
        return tuple(f"{n} | {', '.join(self.parents[n])}" if self.parents[n] else n for n in self.nodes)

    def computes(self, node: str) -> bool:
        """Whether `node` has a value and no density."""
        return node in self._computed

    def to_states(self, values: Values) -> dict[str, Tensor]:
        """Codes `(N,)` of class nodes as one-hot vectors `(N, C)`, a missing one (NaN, or -1 in integers) as NaN."""
        inside = dict(values)
        for node, count in self.classes.items():
            if node in values and values[node].ndim < 2:
                codes = values[node].unsqueeze(-1)
                missing = codes.isnan() if codes.is_floating_point() else codes == -1
                kind = codes.dtype if codes.is_floating_point() else torch.get_default_dtype()
                one_hot = (codes == torch.arange(count, device=codes.device)).to(kind)
                inside[node] = one_hot.masked_fill(missing, math.nan)
        return inside

    def check_codes(self, values: Values) -> None:
        """Raise unless the values of class nodes are codes 0..C-1, or one-hot vectors; missing ones pass."""
        for node, count in self.classes.items():
            if node not in values:
                continue
            value = values[node].double()
            if value.ndim == 1:
                missing = value.isnan() if values[node].is_floating_point() else value == -1
                bad = ~(missing | ((value >= 0) & (value < count) & (value == value.floor())))
                rule = f"codes 0 to {count - 1} as (N,), NaN (in integers -1) for missing"
            else:
                fits = value.shape[1:] == (count,)
                one = fits & (((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == 1)) if fits else None
                bad = ~(one | value.isnan().all(-1)) if one is not None else torch.ones(len(value), dtype=torch.bool)
                rule = f"one-hot (N, {count}), or codes 0 to {count - 1} as (N,)"
            if bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                raise InputError(
                    f"`{node}` is one of {count} classes: its values must be {rule}; row {row} is "
                    f"{values[node][row].tolist()} and the shape {tuple(value.shape)}. Recode them."
                )

    def conditional(self, node: str) -> nn.Module:
        """The module that is the factor of `node`."""
        module = self._modules[f"node_{node}"]
        assert module is not None
        return module

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
            All nodes by name, each `(N, *event)`; classes as codes `(N,)`.

        Raises:
            InputError: If an input is not given, a name is unknown, or `values` have another number of rows.
        """
        known = dict(values or {})
        _require(self.inputs, known, "An input of the network")
        self._check_names(known)
        self.check_codes(known)
        known = self.to_states(known)
        if gaps := [name for name, value in known.items() if bool(value.isnan().any())]:
            raise InputError(f"{_names(gaps)} has missing entries (NaN), and held values must be known. Fill them.")
        if odd := [name for name, value in known.items() if value.shape[:1] != (rows,)]:
            raise InputError(f"{_names(odd)} must have {rows} rows, as many as are drawn. Repeat or cut the values.")
        for node in self.nodes:
            if node not in known:
                d = self.distribution(node, known)
                shape = torch.Size([rows])
                known[node] = draw(d, shape, noise) if d.has_rsample else d.expand(shape).sample()
        drawn = {node: known[node].argmax(-1) for node in self.classes if node not in (values or {})}
        return known | drawn | dict(values or {})

    def log_prob(self, values: Values) -> dict[str, Tensor]:
        """Log-density of each node at `values`, which give all of them, in nats over the leading axes of its parents.

        Example:
            >>> from aevb import StandardNormal
            >>> BayesNet({"z": StandardNormal(1)}).log_prob({"z": torch.zeros(2, 1)})["z"]
            tensor([-0.9189, -0.9189])
        """
        drawn = [node for node in self.nodes if not self.computes(node)]
        _require((*self.inputs, *drawn), values, "A node of the network")
        self._check_names(values)
        self.check_codes(values)
        known, result = self.to_states(values), {}
        for node in self.nodes:
            d = self.distribution(node, known)
            if self.computes(node):
                known[node] = d.mean
                continue
            value = known[node]
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
        given: Context that p or q conditions on and neither defines; every input of p is one, so that a misspelt parent
            is an error. What a `Deterministic` of q computes of observed nodes alone, such as the sum of a row's
            counts, p may take as a parent, too: its densities are then those given that value.
        shared: Latent nodes with one value for the whole data set, weights of a net say; their parents are shared, too.

    Raises:
        InputError: If `given` is not what p and q need, q has nodes or inputs that p does not, or both networks
            together form a cycle.

    Example:
        >>> from aevb import Bernoulli, DiagonalNormal, MLP, StandardNormal
        >>> vae = VAE(
        ...     BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [8], 5))}),
        ...     BayesNet({"z | x": DiagonalNormal(MLP(5, [8], 4))}),
        ... )
        >>> vae.posterior({"x": torch.zeros(3, 5)})["z"].mean.shape
        torch.Size([3, 2])
    """

    def __init__(self, p: BayesNet, q: BayesNet, *, given: Iterable[str] = (), shared: Iterable[str] = ()) -> None:
        super().__init__()
        self.config: ModelConfig | None = None
        """What `aevb.build_vae` made the model from; None for one composed by hand."""
        self.p, self.q = p, q
        self.given = (given,) if isinstance(given, str) else tuple(given)
        self.shared = (shared,) if isinstance(shared, str) else tuple(shared)
        self.context = self._computed_context()
        """Inputs of p that q computes of observed nodes."""
        self._check_wiring()
        needs = {node: q.parents[node] for node in q.nodes}
        needs |= {node: p.parents[node] for node in p.nodes if p.computes(node)}
        self._order = _sorted(needs)
        # A node's KL may replace its log-ratio only if no parent of it in p is drawn from it in q.
        self._exact, self._below = {}, {}
        self._orders: dict[tuple[str, ...], tuple[str, ...]] = {}
        for node in p.nodes:
            descendants = {node}
            for other in self._order:
                if descendants & set(needs[other]):
                    descendants.add(other)
            self._exact[node] = not descendants & set(p.parents[node])
            self._below[node] = frozenset(descendants - {node})

    def _computed_context(self) -> tuple[str, ...]:
        inferred = [node for node in self.q.nodes if not self.q.computes(node)]
        found: list[str] = []
        for node in self.q.nodes:
            ancestors = [*self.q.parents[node]]
            for parent in ancestors:
                ancestors += [each for each in self.q.parents.get(parent, ()) if each not in ancestors]
            if node in self.p.inputs and self.q.computes(node) and not set(ancestors) & set(inferred):
                found.append(node)
        return tuple(found)

    def _check_wiring(self) -> None:
        p, q = self.p, self.q
        needed = set(p.inputs) - set(self.context)
        if not needed <= set(self.given) or (unused := set(self.given) - {*p.inputs, *q.inputs}):
            odd = needed - set(self.given) or unused
            raise InputError(
                f"p conditions on {_names(p.inputs)}, but `given` names {_names(self.given)}: {_names(sorted(odd))} is "
                "in one of them only. Name every input of p as context in `given`, or define the node in p."
            )
        if both := [node for node in q.nodes if node in p.nodes and (p.computes(node) or q.computes(node))]:
            raise InputError(f"{_names(both)} is Deterministic and stands in both p and q. Keep it in one of them.")
        if strangers := [node for node in q.nodes if node not in p.nodes and not q.computes(node)]:
            raise InputError(f"q infers {_names(strangers)}, which p does not define. Give p a factor for each.")
        if strangers := [node for node in q.inputs if node not in (*p.nodes, *self.given)]:
            raise InputError(f"q depends on {_names(strangers)}, unknown to p. Use nodes of p or names in `given`.")
        if clash := [node for node in self.given if node in (*p.nodes, *q.nodes)]:
            raise InputError(f"`given` names {_names(clash)}, which a factor defines. Drop the factor, or the name.")
        for node in self.shared:
            for net in (p, q):
                if node not in net.nodes or not set(net.parents[node]) <= set(self.shared):
                    raise InputError(
                        f"`shared` names `{node}`, which must have factors in p and in q whose parents are shared: it "
                        "has one value for all rows. Drop its parents, or the name."
                    )

    def latents(self, values: Values) -> tuple[str, ...]:
        """Nodes of p that `values` leaves latent in every row, in the order in which q draws them.

        Raises:
            InputError: If `values` has names unknown to p, or lacks what q or the context needs.
        """
        if strangers := [name for name in values if name not in (*self.p.nodes, *self.given)]:
            raise InputError(
                f"`values` gives {_names(strangers)}, but p has the nodes {_names(self.p.nodes)}"
                + (f" and the context {_names(self.given)}" if self.given else "")
                + ". Rename them, or leave them out."
            )
        if computed := [name for name in values if name in self.p.nodes and self.p.computes(name)]:
            raise InputError(f"`values` gives {_names(computed)}, which is computed from its parents. Leave it out.")
        _require(self.given, values, "Context")
        hidden = [node for node in self.p.nodes if node not in values and not self.p.computes(node)]
        if lost := [node for node in hidden if node not in self.q.nodes]:
            raise InputError(
                f"{_names(lost)} of p is neither in `values` nor inferred by q. Give its values, or q a factor for it."
            )
        return tuple(node for node in self._order if node in hidden)

    def latent_rows(self, values: Values, holes: Collection[str] = ()) -> dict[str, Tensor | None]:
        """Latent nodes in drawing order, and the rows `(N,)` that leave them latent; None where all do.

        Args:
            values: Observed nodes by name.
            holes: Names whose values hold NaN: a row missing throughout leaves its node latent, if q infers it.
        """
        everywhere = set(self.latents(values))
        found: dict[str, Tensor | None] = {}
        for node in self._order:
            if node in everywhere:
                found[node] = None
            elif node in holes and node in self.q.nodes:
                missing = values[node].isnan()
                found[node] = missing.flatten(1).all(-1) if missing.ndim > 1 else missing
        return found

    def drawing_order(self, latent: Collection[str]) -> tuple[str, ...]:
        """Latent nodes, and the computed ones that they or p need, parents first."""
        key = tuple(latent)
        if key not in self._orders:
            needed = {*latent, *self.context, *(node for node in self.p.nodes if self.p.computes(node))}
            for node in reversed(self._order):
                if node in needed:
                    needed |= {parent for parent in self.home(node).parents[node] if self.computes(parent)}
            self._orders[key] = tuple(node for node in self._order if node in needed)
        return self._orders[key]

    def home(self, node: str) -> BayesNet:
        """The network that tells how a node is drawn or computed: q, but for what p computes."""
        return self.q if node in self.q.nodes else self.p

    def below(self, node: str) -> frozenset[str]:
        """Nodes that are drawn or computed from `node` on the way of q."""
        return self._below[node]

    def computes(self, node: str) -> bool:
        """Whether `node` of either network has a value and no density."""
        return node in (*self.q.nodes, *self.p.nodes) and self.home(node).computes(node)

    def computed(self, values: Values, latent: Collection[str], *, stop: bool = False) -> dict[str, Tensor]:
        """Values of the Deterministic nodes, anew from `values`; with `stop` their nets' weights get no gradient."""
        known, found = dict(values), {}
        for node in self.drawing_order(latent):
            if node not in latent:
                net = self.home(node)
                d = call_stopped(net, node, known) if stop else net.distribution(node, known)
                found[node] = known[node] = d.mean
        return found

    def closed_form_is_exact(self, node: str) -> bool:
        """Whether the KL of a node may replace its log-ratio: no parent in p may descend from it in q."""
        return self._exact[node]

    @torch.no_grad()
    def posterior(self, values: Values) -> dict[str, td.Distribution]:
        """Q of each node that is latent in every row, at its parents' means or values: `(N, *event)` each."""
        known, found = self.p.to_states(values), {}
        holes = [name for name, value in known.items() if bool(value.isnan().any())]
        self.require_sight(holes)
        latent = self.latent_rows(known, holes)
        for node in self.drawing_order(latent):
            d, rows = self.home(node).distribution(node, known), latent.get(node)
            mean = d.mean
            if rows is not None:  # observed in some rows
                mean = torch.where(rows.reshape(-1, *(1,) * len(d.event_shape)), mean, known[node])
            elif node in latent:
                found[node] = d if d.batch_shape else d.expand(torch.Size([rows_of(values)]))
            known[node] = mean
        return found

    def require_sight(self, holes: Iterable[str]) -> None:
        """Raise if a factor takes one of `holes`, names whose values hold NaN, as parent without `Holes` to see it."""
        for node, parents, factor in _factors(self):
            blind = set(parents) & set(holes) - set(self.q.nodes)  # q fills in what it infers
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


def call_stopped(net: BayesNet, node: str, values: Values) -> td.Distribution:
    """As `net.distribution`, with no gradient in the conditional's own weights."""
    conditional = net.conditional(node)
    fixed = {name: weight.detach() for name, weight in conditional.named_parameters()}
    # Copies, so that a second pass in training does not move batch-norm's running statistics twice.
    fixed |= {name: buffer.clone() for name, buffer in conditional.named_buffers()}
    d = torch.func.functional_call(conditional, fixed, tuple(values[parent] for parent in net.parents[node]))
    assert isinstance(d, td.Distribution)
    return d


def _sorted(needs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Nodes with their parents first; those that nothing in `needs` defines are left out."""
    try:
        order = tuple(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise InputError(f"The factors form a cycle, {cycle}; a Bayesian network has none. Drop one parent.") from None
    return tuple(node for node in order if node in needs)


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
