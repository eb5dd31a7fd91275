"""Laws of every flow, looped over one table; a new flow joins by one line in `CASES`.

Jacobians come from autograd, integrals from grids. Monte Carlo comparisons allow four standard errors.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb import MLP, VAE, BayesNet, InputError, Normal, elbo
from aevb._compiler import can_compile
from aevb.distributions import draw, rsample_and_log_prob
from aevb.flows import (
    FlowPrior,
    InverseAutoregressiveFlow,
    PlanarFlow,
    SplineFlow,
    SylvesterFlow,
    TransformedNormal,
)

pytestmark = pytest.mark.usefixtures("double")

ROWS, CONTEXT, LAYERS, INPUTS = 3, 4, 3, 3
ROUNDING = 1e-9
"""Some hundreds of roundings in float64, divided by slopes as small as 1e-2 here."""

Nets = Callable[[int], nn.Module]


class Case(NamedTuple):
    make: Callable[[Nets, int], nn.Module]  # from what makes a net of some output width, and D
    width: Callable[[int], int] | None = None  # of the net's output, from D; None for a root
    pointwise: bool = True  # knows the density at any point


CASES = {
    "PlanarFlow": Case(
        lambda net, d: PlanarFlow(net(PlanarFlow.width(d, LAYERS)), d, LAYERS),
        lambda d: PlanarFlow.width(d, LAYERS),
        False,
    ),
    "SylvesterFlow": Case(
        lambda net, d: SylvesterFlow(net(SylvesterFlow.width(d, LAYERS)), d, LAYERS),
        lambda d: SylvesterFlow.width(d, LAYERS),
        False,
    ),
    "InverseAutoregressiveFlow": Case(
        lambda net, d: InverseAutoregressiveFlow(net(2 * d + CONTEXT), d, CONTEXT, hidden=[8]),
        lambda d: InverseAutoregressiveFlow.width(d, CONTEXT),
    ),
    "InverseAutoregressiveFlow, no context": Case(
        lambda net, d: InverseAutoregressiveFlow(net(2 * d), d, 0, 3, [8, 7]),
        lambda d: InverseAutoregressiveFlow.width(d, 0),
    ),
    "SplineFlow": Case(
        lambda net, d: SplineFlow(net(2 * d + CONTEXT), d, CONTEXT, bins=4, hidden=[8]),
        lambda d: SplineFlow.width(d, CONTEXT),
    ),
    "SplineFlow, no context": Case(
        lambda net, d: SplineFlow(net(2 * d), d, 0, 3, 4, [8, 7]),
        lambda d: SplineFlow.width(d, 0),
    ),
    "FlowPrior, spline": Case(lambda net, d: FlowPrior(d, hidden=[8], bins=4)),
    "FlowPrior, affine": Case(lambda net, d: FlowPrior(d, hidden=[8], kind="affine")),
    "FlowPrior, units": Case(lambda net, d: FlowPrior(d, hidden=[8], bins=4, loc=-40.0, scale=20.0)),
}
POSTERIORS = [name for name, case in CASES.items() if case.width]
POINTWISE = [name for name, case in CASES.items() if case.pointwise]
OWN_DRAWS = [name for name, case in CASES.items() if not case.pointwise]


def mlp(width: int) -> MLP:
    return MLP(INPUTS, [5], width, "tanh")


def randomize(module: nn.Module, scale: float = 0.6) -> nn.Module:
    """All parameters away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return module


class Built(NamedTuple):
    module: nn.Module
    parents: list[Tensor]  # one (ROWS, INPUTS), or none

    @property
    def d(self) -> td.Distribution:
        return self.module(*self.parents)

    def row(self, n: int) -> td.Distribution:
        return self.module(*(parent[n] for parent in self.parents))


def build(name: str, dims: int = 3, seed: int = 0, scale: float = 0.6) -> Built:
    torch.manual_seed(seed)
    case = CASES[name]
    module = randomize(case.make(mlp, dims), scale)
    return Built(module, [torch.randn(ROWS, INPUTS)] if case.width else [])


class Given:
    """Noise that was drawn beforehand."""

    def __init__(self, eps: Tensor) -> None:
        self.eps = eps

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        eps = self.eps[(0,) * max(0, self.eps.ndim - 3)]  # states in front of (K, N) share it
        assert shape == eps.shape
        assert like.dtype == eps.dtype
        return eps

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        raise AssertionError("a flow's noise is normal")


def pair(d: td.Distribution, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The draw that `eps` `(*, D)` makes, with its log-density."""
    return rsample_and_log_prob(d, eps.shape[:-1], Given(eps))


def log_normal(eps: Tensor) -> Tensor:
    return td.Normal(0.0, 1.0).log_prob(eps).sum(-1)


def close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def grid(centre: Sequence[float], reach: Sequence[float], points: int) -> tuple[Tensor, float]:
    """Points `(points^2, 2)` that far either side of the centre, and the area each stands for."""
    axes = [torch.linspace(c - r, c + r, points) for c, r in zip(centre, reach, strict=True)]
    area = float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    return torch.cartesian_prod(*axes), area


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dims", "seed"), [(3, 0), (3, 1), (3, 2), (2, 3), (1, 4), (4, 5)])
def test_change_of_variables(name, dims, seed):
    """Log q(z) = log N(eps) - log |det dz/deps|, with the Jacobian from autograd; and f keeps orientation."""
    built = build(name, dims, seed)
    for n in range(ROWS):
        d = built.row(n)
        eps = torch.randn(dims)
        _, log_q = pair(d, eps)
        jacobian = torch.autograd.functional.jacobian(lambda e, d=d: pair(d, e)[0], eps)
        sign, log_det = torch.linalg.slogdet(jacobian)
        assert sign == 1
        close(log_q, log_normal(eps) - log_det)


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize(("dims", "seed"), [(3, 0), (3, 1), (1, 2), (4, 3)])
def test_density_of_the_draw(name, dims, seed):
    built = build(name, dims, seed)
    z, log_q = rsample_and_log_prob(built.d, torch.Size([50, ROWS]))
    assert z.shape == (50, ROWS, dims)
    close(log_q, built.d.log_prob(z))


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_no_density_at_a_given_point(name):
    d = build(name).d
    for value in (torch.zeros(ROWS, 3), d.sample()):
        with pytest.raises(InputError, match=r"no inverse .* InverseAutoregressiveFlow or SplineFlow"):
            d.log_prob(value)


def quadrature_error(name: str) -> float:
    """On grids of smooth functions that vanish at their ends, rounding; the slopes of splines have kinks.

    A kink costs the square of the grid's step, some 3e-3 of the flow's reach, times how far the slope changes.
    """
    return 1e-3 if "SplineFlow" in name or name in ("FlowPrior, spline", "FlowPrior, units") else 1e-8


@pytest.mark.parametrize("name", CASES)
def test_maps_are_one_to_one(name):
    """The integral of p(f(eps)) |det f'(eps)| d eps is that of p(z) dz, 1, if f takes each z of p just once.

    p is a Gaussian in the middle of the flow, whose mass comes from within the grid of the noise. Masked nets with
    weights as large as elsewhere stretch so unevenly that no even grid resolves them.
    """
    masked = CASES[name].pointwise
    built = build(name, 2, scale=0.3 if masked else 0.6)
    points, area = grid([0.0, 0.0], [12.0, 12.0], 400) if masked else grid([0.0, 0.0], [40.0, 40.0], 800)
    d = built.row(0)
    with torch.no_grad():
        draws, _ = pair(d, torch.randn(2000, 2))
        p = td.Normal(draws.median(0).values, 0.5 * draws.std(0))
        z, log_q = pair(d, points)
        total = float((p.log_prob(z).sum(-1) + log_normal(points) - log_q).exp().sum()) * area
    assert total == pytest.approx(1.0, abs=quadrature_error(name))


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_densities_of_own_draws_are_normalised(name):
    """E_q[p(z) / q(z)] = 1 within 4 standard errors, p a Gaussian narrower than q."""
    built = build(name, 2, seed=1)
    draws = 100_000
    for n in range(ROWS):
        with torch.no_grad():
            z, log_q = rsample_and_log_prob(built.row(n), torch.Size([draws]))
        p = td.Normal(z.mean(0), 0.5 * z.std(0))
        ratio = (p.log_prob(z).sum(-1) - log_q).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / draws**0.5
        assert float(ratio.max()) < 0.01 * draws  # no draw carries the mean


@pytest.mark.parametrize("name", POINTWISE)
def test_densities_integrate_to_one(name):
    """The grid reaches as far as the noise to ten standard deviations."""
    d = build(name, 2, scale=0.3).row(0)
    circle = torch.linspace(0, 2 * torch.pi, 400)
    with torch.no_grad():
        ends, _ = pair(d, 10 * torch.stack([circle.sin(), circle.cos()], -1))
        low, high = ends.amin(0), ends.amax(0)
        points, area = grid(((low + high) / 2).tolist(), ((high - low) / 2).tolist(), 600)
        total = float(d.log_prob(points).exp().sum()) * area
    assert total == pytest.approx(1.0, abs=quadrature_error(name))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_pair(name):
    """With respect to the parents and every weight, against finite differences at the same noise."""
    built = build(name, 2)
    eps = torch.randn(2, ROWS, 2)
    names, weights = zip(*built.module.named_parameters(), strict=True)

    def run(parents: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        d = torch.func.functional_call(built.module, dict(zip(names, given, strict=True)), tuple(parents))
        return pair(d, eps)

    parents = [parent.clone().requires_grad_() for parent in built.parents]
    count = len(parents)
    assert torch.autograd.gradcheck(
        lambda *all_: run(all_[:count], all_[count:]), (*parents, *weights), fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("name", POINTWISE)
def test_gradients_of_the_density(name):
    """With respect to the point, the parents and every weight, against finite differences."""
    built = build(name, 2)
    names, weights = zip(*built.module.named_parameters(), strict=True)
    z = (pair(built.d, torch.randn(2, ROWS, 2))[0].detach()).requires_grad_()

    def run(z: Tensor, *rest: Tensor) -> Tensor:
        parents, given = rest[: len(built.parents)], rest[len(built.parents) :]
        return torch.func.functional_call(built.module, dict(zip(names, given, strict=True)), parents).log_prob(z)

    parents = [parent.clone().requires_grad_() for parent in built.parents]
    assert torch.autograd.gradcheck(run, (z, *parents, *weights), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in POSTERIORS if name in POINTWISE])
def test_gradients_of_draws_match_the_score_function(name):
    """d/dphi E f(z), pathwise and by the score of the same draws: their mean difference is within 4 standard errors."""
    torch.manual_seed(4)
    draws, width = 40_000, CASES[name].width(2)
    module = randomize(CASES[name].make(lambda width: nn.Identity(), 2), 0.5)
    phi = (0.5 * torch.randn(width)).expand(draws, width).clone().requires_grad_()
    d = module(phi)

    def f(z: Tensor) -> Tensor:
        return z[:, 0].sin() + (z[:, 0] - z[:, 1]).cos() + z[:, 1].tanh()

    z = draw(d, torch.Size([draws]))
    (pathwise,) = torch.autograd.grad(f(z).sum(), phi, retain_graph=True)
    fixed = z.detach()
    baseline = float(f(fixed).mean())
    (score,) = torch.autograd.grad(((f(fixed) - baseline) * d.log_prob(fixed)).sum(), phi)
    difference = pathwise - score
    assert bool((difference.mean(0).abs() <= 4 * difference.std(0) / draws**0.5).all())
    assert int((pathwise.abs().amax(0) > 0).sum()) == width


@pytest.mark.parametrize("name", CASES)
def test_leading_axes(name):
    """Parents (E, 1, N, .) and (K, N, .), and two that broadcast, give the numbers of one row at a time."""
    built = build(name)
    states, count = 2, 4
    wide = torch.randn(states, 1, ROWS, INPUTS)
    many = torch.randn(count, ROWS, INPUTS)
    eps = torch.randn(count, ROWS, 3).expand(states, -1, -1, -1)
    inputs = {
        "enumerated": [wide],
        "drawn": [many],
        "both": [wide[..., :1], many[..., 1:]],
    }
    for parents in inputs.values() if built.parents else [[]]:
        d = built.module(*parents)
        z, log_q = pair(d, eps)
        assert z.shape == eps.shape
        assert log_q.shape == eps.shape[:-1]
        full = [parent.expand(states, count, ROWS, -1) for parent in parents]
        for at in [(0, 0, 0), (1, 3, 2), (0, 2, 1), (1, 0, 1)]:
            alone = built.module(*(parent[at] for parent in full))
            one, log_one = pair(alone, eps[at])
            close(z[at], one)
            close(log_q[at], log_one)
            if CASES[name].pointwise:
                close(d.log_prob(z)[at], alone.log_prob(one))


@pytest.mark.parametrize("name", CASES)
def test_shapes_of_the_distribution(name):
    built = build(name)
    d = built.d
    batch = (ROWS,) if built.parents else ()
    assert isinstance(d, TransformedNormal)
    assert d.has_rsample
    assert (d.batch_shape, d.event_shape) == (batch, (3,))
    assert d.mean.shape == (*batch, 3)
    assert d.rsample().shape == (*batch, 3)
    assert d.sample(torch.Size([5])).shape == (5, *batch, 3)
    assert d.rsample(torch.Size([5])).requires_grad
    assert not d.sample().requires_grad
    assert bool(d.support.check(d.sample()).all())
    wider = d.expand(torch.Size([4, ROWS]))
    assert (wider.batch_shape, wider.event_shape) == ((4, ROWS), (3,))
    assert wider.rsample().shape == wider.mean.shape == (4, ROWS, 3)
    close(wider.mean, d.mean.expand(4, ROWS, 3))
    if CASES[name].pointwise:
        value = torch.randn(3)
        close(wider.log_prob(value), d.log_prob(value).expand(4, ROWS))


@pytest.mark.parametrize("name", CASES)
def test_every_draw_of_every_datum_is_its_own(name):
    z = draw(build(name).d, torch.Size([11, ROWS])).detach()
    for entry in range(3):
        assert z[..., entry].unique().numel() == 11 * ROWS


@pytest.mark.parametrize("name", CASES)
def test_single_precision_agrees_with_double(name):
    """Some 200 roundings of 6e-8 each, divided by slopes of the maps, which are above 0.1 at most points here."""
    built = build(name)
    eps = torch.randn(4, ROWS, 3)
    wide = pair(built.d, eps)
    narrow = pair(built.module.float()(*(parent.float() for parent in built.parents)), eps.float())
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == torch.float32
        close(one.double(), other, 200 * 6e-8 / 0.1)


@pytest.mark.parametrize("name", CASES)
def test_fresh_flows_are_gaussian(name):
    """Before any step, the draw is that of the Gaussian that is transformed, with its density."""
    torch.manual_seed(0)
    case, eps = CASES[name], torch.randn(4, ROWS, 3)
    if case.width:
        phi = torch.randn(ROWS, case.width(3))
        d = case.make(lambda width: nn.Identity(), 3)(phi)
        base = td.Normal(phi[:, :3], nn.functional.softplus(phi[:, 3:6]))
    else:
        module = case.make(mlp, 3)
        d, base = module(), td.Normal(module.loc, module.scale)
    z, log_q = pair(d, eps)
    close(z, base.loc + base.scale * eps)
    close(log_q, base.log_prob(z).sum(-1))
    close(d.mean, base.mean)


@pytest.mark.parametrize("name", CASES)
def test_the_centre_is_the_median_of_one_dimension(name):
    """Half of the draws lie below `mean`, within 4 standard errors; so it is not the mean, and says so."""
    built = build(name, 1, seed=7)
    draws = 10_000
    d = built.row(0)
    with torch.no_grad():
        below = (d.sample(torch.Size([draws])) < d.mean).double().mean()
    assert abs(float(below) - 0.5) < 4 * 0.5 / draws**0.5
    assert "not E z" in TransformedNormal.mean.__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flow", [PlanarFlow, SylvesterFlow])
def test_invertible_at_any_size_of_the_parameters(flow, dtype):
    """Determinants stay above zero where the maps fold most: at the middle of tanh, against the diagonal or w."""
    torch.manual_seed(0)
    dims = 3
    module = flow(nn.Identity(), dims, 1).to(dtype)
    nn.init.ones_(module.gain)
    for size in (0.0, 1e-30, 1.0, 10.0, 1e3):
        phi = size * torch.randn(500, flow.width(dims, 1), dtype=dtype)
        phi[:, : 2 * dims] = 0
        if flow is PlanarFlow:
            phi[:250, 3 * dims : 4 * dims] = -phi[:250, 2 * dims : 3 * dims]  # u = -w
        else:
            phi[:250, -2 * dims : -dims] = -phi[:250, 2 * dims : -2 * dims : dims + 1]  # against R's diagonal
        phi[..., -dims if flow is SylvesterFlow else -1 :] = 0  # b
        d = module(phi)
        for eps in (torch.zeros(500, dims, dtype=dtype), torch.randn(500, dims, dtype=dtype)):
            z, log_q = pair(d, eps)
            assert bool(z.isfinite().all())
            log_det = log_normal(eps) - log_q - dims * torch.log(torch.log(torch.tensor(2.0, dtype=dtype)))
            assert bool((log_det >= (dims * torch.log(torch.tensor(1e-3)) - 1e-3)).all())  # not -inf, nor NaN


def test_planar_direction_is_that_of_the_paper():
    """w'u-hat = m(w'u), m(0) = 0, above -1, and u is changed along w only."""
    torch.manual_seed(0)
    dims, (w, u) = 3, torch.randn(2, 200, 3)
    module = PlanarFlow(nn.Identity(), dims, 1)
    nn.init.ones_(module.gain)
    phi = torch.cat([torch.zeros(200, 2 * dims), w, u, torch.zeros(200, 1)], -1)
    far = 50 * w / w.norm(dim=-1, keepdim=True).square()  # w'z = 50: tanh is 1
    unit = torch.log(torch.tensor(2.0))  # softplus(0), the scale
    found = pair(module(phi), far / unit)[0] - far
    inner = (w * u).sum(-1)
    stretch = (w * found).sum(-1)
    assert bool((stretch > -1).all())
    expected = -1 + 1e-3 + nn.functional.softplus(inner + torch.log(torch.expm1(torch.tensor(1 - 1e-3))))
    close(stretch, expected)
    along = w / w.norm(dim=-1, keepdim=True)
    close(found - (found * along).sum(-1, keepdim=True) * along, u - (u * along).sum(-1, keepdim=True) * along)


def jacobian(module: nn.Module, width: int, dims: int) -> Tensor:
    """Of the draw in the noise, for random weights and net output."""
    d = randomize(module)(torch.randn(width)) if width else randomize(module)()
    return torch.autograd.functional.jacobian(lambda eps: pair(d, eps)[0], torch.randn(dims))


def test_which_entries_depend_on_which():
    """One step is triangular, by the order it takes; a coupling has no dependence within its halves; two steps mix."""
    torch.manual_seed(0)
    d, none = 4, nn.Identity()
    halves = torch.eye(d).bool()
    halves[2:, :2] = True
    patterns = [
        (lambda n: SylvesterFlow(none, d, n), lambda n: SylvesterFlow.width(d, n), torch.ones(d, d).triu().bool()),
        (lambda n: InverseAutoregressiveFlow(none, d, 0, n), lambda n: 2 * d, torch.ones(d, d).tril().bool()),
        (lambda n: SplineFlow(none, d, 0, n), lambda n: 2 * d, halves),
        (lambda n: FlowPrior(d, n), lambda n: 0, torch.ones(d, d).tril().bool()),
        (lambda n: PlanarFlow(none, d, n), lambda n: PlanarFlow.width(d, n), torch.ones(d, d).bool()),
    ]
    for make, width, pattern in patterns:
        assert bool(((jacobian(make(1), width(1), d) != 0) == pattern).all())
        assert bool((jacobian(make(3), width(3), d) != 0).all())


@pytest.mark.parametrize("name", ["SplineFlow", "FlowPrior, spline"])
def test_splines_are_those_of_zuko(name):
    """Whose knots ours replaces by the same ones, for the compiler's sake."""
    import zuko

    built = build(name)
    step, raw = built.module.transforms[0], 3 * torch.randn(11, 20)
    widths, heights, slopes = raw.split([7, 7, 6], dim=-1)
    x = 3 * torch.randn(11)
    theirs = zuko.transforms.MonotonicRQSTransform(widths, heights, slopes)
    for one, other in zip(
        step.univariate(widths, heights, slopes).call_and_ladj(x), theirs.call_and_ladj(x), strict=True
    ):
        close(one, other)


def test_compiled_gradients_of_splines():
    """Inductor gets the gradient of zuko's own knots wrong by as much as its size; of ours it must not."""
    torch.manual_seed(0)
    flow = FlowPrior(4, 1, hidden=[8], bins=8)
    d = flow.transforms[0].univariate
    raw, x = torch.randn(20, 4, 23, dtype=torch.float32), torch.randn(20, 4, dtype=torch.float32)

    def loss(raw: Tensor) -> Tensor:
        y, log_det = d(*raw.split([8, 8, 7], dim=-1)).call_and_ladj(x)
        return (y.sin() + log_det).sum()

    grads = []
    backend = "inductor" if can_compile() is None else "aot_eager"  # the same graph where there is no compiler
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        own = raw.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(own), own)[0])
    close(grads[1], grads[0], 200 * 6e-8)


@pytest.mark.parametrize("name", CASES)
def test_draws_are_traced_whole(name):
    """By torch's compiler, into one graph without breaks."""
    torch._dynamo.reset()
    built = build(name)
    eps = torch.randn(2, ROWS, 3)

    def both(*parents: Tensor) -> tuple[Tensor, ...]:
        d = built.module(*parents)
        z, log_q = d.rsample_and_log_prob(torch.Size([2, ROWS]), Given(eps))
        return (z, log_q, d.log_prob(eps)) if CASES[name].pointwise else (z, log_q)

    traced = torch.compile(both, fullgraph=True, backend="eager")(*built.parents)
    for one, other in zip(traced, both(*built.parents), strict=True):
        close(one, other)


def test_affine_autoregressive_flow_is_the_full_gaussian():
    """One transform without hidden layers holds every covariance: z_2 = m_2 + l_21 z_1 + l_22 eps_2."""
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(nn.Identity(), 2, 0, transforms=1, hidden=[])
    with torch.no_grad():
        flow.transforms[0].hyper[-1].weight[2, 0] = -1.7  # of the shift of entry 1, from entry 0
    phi = torch.randn(4)
    d = flow(phi)
    scale = nn.functional.softplus(phi[2:])
    tril = torch.tensor([[1.0, 0.0], [-1.7, 1.0]]) @ torch.diag(scale)
    shift = torch.stack([phi[0], phi[1] - 1.7 * phi[0]])
    oracle = td.MultivariateNormal(shift, scale_tril=tril)
    values = torch.randn(20, 2)
    close(d.log_prob(values), oracle.log_prob(values))
    close(d.mean, oracle.mean)
    z, log_q = rsample_and_log_prob(d, torch.Size([20]))
    close(log_q, oracle.log_prob(z))


@pytest.mark.parametrize("name", [name for name in CASES if name not in POSTERIORS])
@pytest.mark.parametrize("posterior", ["PlanarFlow", "SylvesterFlow", "InverseAutoregressiveFlow", "SplineFlow"])
def test_in_a_model(name, posterior):
    """Prior and posterior give a bound whose gradient reaches every weight."""
    torch.manual_seed(0)
    prior = randomize(CASES[name].make(mlp, 2), 0.3)
    q = randomize(CASES[posterior].make(mlp, 2), 0.3)
    vae = VAE(BayesNet({"z": prior, "x | z": Normal(MLP(2, [4], 3), 3)}), BayesNet({"z | x": q}))
    bound = elbo(vae, {"x": torch.randn(6, 3)}, samples=5)
    assert bound.shape == (6,)
    bound.sum().backward()
    for key, parameter in vae.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
    assert vae.posterior({"x": torch.randn(6, 3)})["z"].mean.shape == (6, 2)


def test_of_the_data_themselves():
    """A root that is observed: the bound is the log-density, and ancestral draws are its own."""
    torch.manual_seed(0)
    flow = randomize(FlowPrior(2, hidden=[8]))
    vae = VAE(BayesNet({"x": flow}), BayesNet({}))
    x = torch.randn(5, 2)
    close(elbo(vae, {"x": x}), flow().log_prob(x))
    assert vae.p.sample(7)["x"].shape == (7, 2)


WRONG = {
    "planar, net": (lambda: PlanarFlow(mlp(10), 2, 3), "19 = PlanarFlow.width"),
    "planar, dims": (lambda: PlanarFlow(mlp(10), 0, 3), "`dims`"),
    "planar, layers": (lambda: PlanarFlow(mlp(10), 2, 0), "`layers`"),
    "sylvester, net": (lambda: SylvesterFlow(mlp(10), 2, 3), "28 = SylvesterFlow.width"),
    "iaf, net": (lambda: InverseAutoregressiveFlow(mlp(10), 2, 4), "8 = InverseAutoregressiveFlow.width"),
    "iaf, context": (lambda: InverseAutoregressiveFlow(mlp(3), 2, -1), "`context`"),
    "iaf, hidden": (lambda: InverseAutoregressiveFlow(mlp(14), 5, 4, hidden=[8, 4]), "`hidden`"),
    "iaf, transforms": (lambda: InverseAutoregressiveFlow(mlp(8), 2, 4, 0), "`transforms`"),
    "spline, net": (lambda: SplineFlow(mlp(10), 2, 4), "8 = SplineFlow.width"),
    "spline, bins": (lambda: SplineFlow(mlp(8), 2, 4, bins=1), "`bins`"),
    "spline, hidden": (lambda: SplineFlow(mlp(8), 2, 4, hidden=[1]), "`hidden`"),
    "prior, dims": (lambda: FlowPrior(0), "`dims`"),
    "prior, kind": (lambda: FlowPrior(2, kind="cubic"), "`kind`"),
    "prior, scale": (lambda: FlowPrior(2, scale=torch.tensor([1.0, 0.0])), "`scale`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    make, told = WRONG[name]
    with pytest.raises(InputError, match=told):
        make()


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_net_that_hides_its_width_is_refused_at_the_call(name, off):
    module = CASES[name].make(lambda width: nn.Identity(), 2)
    with pytest.raises(InputError, match="output width"):
        module(torch.zeros(ROWS, CASES[name].width(2) + off))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_building_a_flow_changes_nothing_in_torch():
    """Nor does a distribution of zuko's own then warn; importing the module alone does not bring zuko in."""
    code = """
import sys, warnings, torch, torch.distributions as td
import aevb, aevb.flows
from torch import nn
assert "zuko" not in sys.modules
aevb.flows.PlanarFlow(nn.Identity(), 2, 1)
assert "zuko" not in sys.modules
before = dict(vars(td.Distribution))
warnings.simplefilter("error")
aevb.flows.FlowPrior(2)().log_prob(torch.zeros(2))
import zuko
assert {name: value for name, value in vars(td.Distribution).items()} == before
assert td.Distribution._validate_args is True
try:
    td.Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise AssertionError("validation is off")
zuko.flows.MAF(2)().log_prob(torch.zeros(2))
zuko.distributions.Mixture(td.Normal(torch.zeros(2), torch.ones(2)), torch.zeros(2)).log_prob(torch.zeros(()))
print("unchanged")
"""
    assert run(code) == "unchanged\n"


def test_validation_that_the_user_switched_off_stays_off():
    code = """
import torch.distributions as td, aevb.flows
td.Distribution.set_default_validate_args(False)
aevb.flows.FlowPrior(2)
print(td.Distribution._validate_args)
"""
    assert run(code) == "False\n"


def test_without_zuko():
    """What needs zuko says so, and leaves torch alone; what does not works."""
    code = """
import sys
sys.modules["zuko"] = None
import torch.distributions as td
from torch import nn
from aevb import InputError
from aevb.flows import FlowPrior, PlanarFlow
PlanarFlow(nn.Identity(), 2, 1)
try:
    FlowPrior(2)
except InputError as error:
    print(error)
assert td.Distribution._validate_args is True
"""
    assert "pip install 'aevb[flows]'" in run(code)
