r"""Where annealing and refining move: all latents of some rows side by side on the reals, with the densities there.

:math:`\log f_b(u) = \log \pi_0(z) + b\, [\log p(x, z) - \log \pi_0(z)] + \log |\det \partial z / \partial u|`, where
z is u mapped onto the latents' supports, and :math:`\pi_0` p's prior or q. Noise comes from a generator for each row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE, BayesNet
from aevb.bounds import draw_latents, evaluating, holes_in
from aevb.config import InputError
from aevb.distributions import base_of, draw, log_prob
from aevb.evaluate.stream import digest_of

__all__ = ["NotNormal", "Path", "Point", "RowNoise", "Start", "latents_of", "row_keys", "seed_of"]

Start = Literal["prior", "posterior"]


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without torch's checks of values and parameters: a trajectory that went astray is a rejected move, no error."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        td.Distribution.set_default_validate_args(before)


class Point(NamedTuple):
    """Where the chains are, on the reals, with the densities there in two parts."""

    u: Tensor  # (K, N, D)
    anchor: Tensor  # (K, N) log pi_0
    rest: Tensor  # (K, N) log p(x | z) where pi_0 is the prior, log p(x, z) where it is q
    anchor_slope: Tensor  # (K, N, D) gradient of `anchor`
    rest_slope: Tensor  # (K, N, D) gradient of `rest`


class Path:
    """The path between pi_0 and p(x, z) for some rows; what does not depend on the latents is computed once."""

    def __init__(self, vae: VAE, observed: Values, latents: dict[str, torch.Size], start: Start) -> None:
        self.vae, self.observed, self.latents, self.start = vae, observed, latents, start
        self.rows, self.holes = rows_of(observed), holes_in(observed)
        self.values = dict(observed)  # and what is computed from them alone
        self.fixed: dict[tuple[BayesNet, str], td.Distribution] = {}
        self._fix(vae.q, [node for node in vae.drawing_order(()) if node in vae.q.nodes])  # the context that q computes
        self.p_nodes, self.constant = self._fix(vae.p, vae.p.nodes)
        above = [n for n in vae.drawing_order(latents) if n in vae.q.nodes] if start == "posterior" else []
        self.q_nodes, _ = self._fix(vae.q, above)

    def _fix(self, net: BayesNet, nodes: Sequence[str]) -> tuple[list[str], Tensor]:
        """Nodes to be looked at for each value of the latents, and log p `(N,)` of those that are not."""
        moving, constant = [], next(self.vae.parameters(), torch.empty(0)).new_zeros(self.rows)
        for node in nodes:
            steady = set(net.parents[node]) <= set(self.values)
            if steady:
                d = self.fixed[net, node] = net.distribution(node, self.values)
            if steady and net.computes(node):
                self.values[node] = d.mean
            elif steady and node not in self.latents:
                constant = constant + self._log_likelihood(node, d)
            else:
                moving.append(node)
        return moving, constant

    def _log_likelihood(self, node: str, d: td.Distribution) -> Tensor:
        value = self.values[node]
        return log_prob(d, value, ~value.isnan() if node in self.holes else None)

    def at(self, u: Tensor) -> Point:
        """One pass through the networks and back."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            anchor, rest = self._densities(u)
            # Two passes back, through parts that hardly overlap: at another b they are recombined without a new one.
            slopes = _slope(anchor, u), _slope(rest, u)
        return Point(u.detach(), anchor.detach(), rest.detach(), *slopes)

    def log_joint(self, u: Tensor) -> Tensor:
        """Log p(x, z) on the reals, `(K, N)`, at `u` `(K, N, D)`; only of a path from the prior."""
        assert self.start == "prior"
        prior, likelihood = self._densities(u)
        return prior + likelihood

    def ratio(self, point: Point) -> Tensor:
        """Log p(x, z) - log pi_0, what each step of b counts; float64."""
        rest = point.rest.double()
        return rest if self.start == "prior" else rest - point.anchor.double()

    def height(self, point: Point, b: float) -> Tensor:
        """Log f_b; float64."""
        return self._share(b) * point.anchor.double() + b * point.rest.double()

    def slope(self, point: Point, b: float) -> Tensor:
        """Gradient of log f_b."""
        return self._share(b) * point.anchor_slope + b * point.rest_slope

    def _share(self, b: float) -> float:
        return 1.0 if self.start == "prior" else 1.0 - b

    def begin(self, chains: int, keys: list[bytes], stage: str) -> Tensor:
        """Draws from pi_0, on the reals, `(K, N, D)`."""
        noise = RowNoise(keys, stage)
        try:
            return self.to_reals(self._draw(chains, noise))
        except NotNormal:  # then noise is a row's own only if the row is drawn alone
            rows = []
            for i in range(self.rows):
                alone = {name: value[i : i + 1] for name, value in self.observed.items()}
                path = Path(self.vae, alone, self.latents, self.start)
                rows.append(path.begin(chains, keys[i : i + 1], stage))
            return torch.cat(rows, 1)

    def _draw(self, chains: int, noise: RowNoise) -> dict[str, Tensor]:
        """Latents from pi_0, `(K, N, *event)`."""
        if self.start == "posterior":
            return draw_latents(self.vae, self.observed, chains, self.holes, lambda _: noise).drawn
        known, shape = dict(self.values), torch.Size([chains, self.rows])
        for node, d in self._walk(known):
            if node in self.latents:
                known[node] = draw(d, shape, noise) if d.has_rsample else noise.rsample(d.expand(shape), shape)
        return known

    def to_reals(self, drawn: Values) -> Tensor:
        """Latents `(K, N, *event)` side by side where HMC moves them, `(K, N, D)`."""
        parts = []
        for node, d in self._walk(self.values | dict(drawn)):
            if node in self.latents:
                value, onto = drawn[node], _onto(node, d)
                if (came := value.shape[2:]) != d.event_shape:
                    raise InputError(
                        f"`{node}` has event shape {tuple(came)} in q and {tuple(d.event_shape)} in p; they must "
                        "agree. Give both conditionals the same dimensions."
                    )
                parts.append((value if onto is None else onto.inv(value)).reshape(*value.shape[:2], -1))
        return torch.cat(parts, -1)

    def _walk(self, known: dict[str, Tensor]) -> Iterator[tuple[str, td.Distribution]]:
        """Nodes of p with their distributions; the caller puts each latent's value into `known` before the next."""
        for node in self.p_nodes:
            d = self.fixed.get((self.vae.p, node)) or self.vae.p.distribution(node, known)
            if self.vae.p.computes(node):
                known[node] = d.mean
            else:
                yield node, d

    @_unchecked()
    def _densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`anchor` and `rest` of a point."""
        known, lead = dict(self.values), u.shape[:2]
        pieces = dict(zip(self.latents, u.split([event.numel() for event in self.latents.values()], -1), strict=True))
        prior, volume, likelihood = u.new_zeros(lead), u.new_zeros(lead), self.constant.expand(lead)
        for node, d in self._walk(known):
            if node not in self.latents:
                likelihood = likelihood + self._log_likelihood(node, d)
                continue
            own, onto = pieces[node].reshape(lead + self.latents[node]), _onto(node, d)
            known[node] = own if onto is None else onto(own)
            if onto is not None:
                volume = volume + onto.log_abs_det_jacobian(own, known[node]).reshape(*lead, -1).sum(-1)
            prior = prior + d.log_prob(known[node])
        if self.start == "prior":
            return prior + volume, likelihood
        return self._log_q(known) + volume, prior + likelihood + volume

    def _log_q(self, known: dict[str, Tensor]) -> Tensor:
        parts = []
        for node in self.q_nodes:
            d = self.fixed.get((self.vae.q, node)) or self.vae.q.distribution(node, known)
            if self.vae.q.computes(node):
                known[node] = d.mean
                continue
            try:
                parts.append(d.log_prob(known[node]))
            except InputError as error:
                raise InputError(
                    f'`start` "posterior" needs the density of q at any `{node}`. {error} Or use start="prior".'
                ) from None
        return functools.reduce(torch.add, parts)


def _slope(height: Tensor, u: Tensor) -> Tensor:
    if not height.requires_grad:
        return torch.zeros_like(u)
    (slope,) = torch.autograd.grad(height.sum(), u, retain_graph=True, materialize_grads=True)
    return slope


def latents_of(vae: VAE, observed: Values) -> dict[str, torch.Size]:
    """The latent nodes in p's order, with their event shapes on the reals, once a row has shown them continuous."""
    hidden = vae.latents(observed)
    if partly := [n for n, rows in vae.latent_rows(observed, holes_in(observed)).items() if rows is not None]:
        raise InputError(
            f"`{partly[0]}` is missing (NaN) in some rows, and latent there only. Evaluate those rows without it in "
            "`values`, and the others in a second call."
        )
    if not hidden:
        raise InputError(
            "`values` gives every node of p: nothing is latent, and log p needs no annealing. Use log_marginal, which "
            "is exact here."
        )
    found = {}
    known = {name: value[:1] for name, value in observed.items()}
    with evaluating(vae), torch.random.fork_rng():
        for node in vae.p.nodes:
            if node in known:
                continue
            d = vae.p.distribution(node, known)
            known[node] = d.mean if vae.p.computes(node) else d.expand(torch.Size([1])).sample()
            if node in hidden:
                onto = _onto(node, d)
                found[node] = d.event_shape if onto is None else torch.Size(onto.inverse_shape(d.event_shape))
    return found


def _onto(node: str, d: td.Distribution) -> td.Transform | None:
    """The map from the reals onto the support of a latent; None where that is the reals themselves."""
    support = d.support
    if support is None or support.is_discrete:
        raise InputError(
            f"`{node}` is latent and discrete ({type(base_of(d)).__name__}), and HMC moves through real numbers only. "
            "Use log_marginal, which sums over classes and binary vectors, or give its values."
        )
    while isinstance(support, td.constraints.independent):
        support = support.base_constraint
    try:
        if isinstance(base_of(d), td.VonMises):  # torch has reals for the circle, on which the density repeats
            raise NotImplementedError
        if isinstance(support, type(td.constraints.real)):
            return None
        bijection: td.Transform = td.biject_to(d.support)
    except NotImplementedError:
        raise InputError(
            f"`{node}` is latent with a {type(base_of(d)).__name__} prior, onto whose support "
            "torch.distributions.biject_to knows no map from the reals. Use log_marginal."
        ) from None
    return bijection


def row_keys(observed: Values, seed: int) -> list[bytes]:
    """What a row's noise depends on: the seed, the row's content, and how many rows like it came before."""
    seen: Counter[bytes] = Counter()
    keys = []
    for row in range(rows_of(observed)):
        digest = digest_of(observed, row)
        keys.append(f"{seed} {seen[digest]} ".encode() + digest)
        seen[digest] += 1
    return keys


def seed_of(stage: str, key: bytes) -> int:
    """Seed of a row's noise in one stage of the work."""
    return int.from_bytes(hashlib.blake2b(stage.encode() + b" " + key, digest_size=8).digest(), "little") >> 1


class NotNormal(Exception):
    """A draw's noise is not known to be normal, so that it can be keyed only for one row alone."""


class RowNoise:
    """Noise from a generator for each row."""

    def __init__(self, keys: list[bytes], stage: str) -> None:
        self.generators = [torch.Generator().manual_seed(seed_of(stage, key)) for key in keys]

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normals `(K, N, *event)`."""
        own = (shape[0], *shape[2:])
        return torch.stack([torch.randn(own, generator=g, dtype=like.dtype) for g in self.generators], 1).to(like)

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Uniforms of [0, 1) in float64, `(K, N, *event)`."""
        own = (shape[0], *shape[2:])
        drawn = [torch.rand(own, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn, 1).to(like.device)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """A draw of any other kind: torch's generator, seeded for this row, and put back."""
        if len(self.generators) > 1:
            raise NotNormal
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generators[0])))
            return d.rsample() if d.has_rsample else d.sample()
