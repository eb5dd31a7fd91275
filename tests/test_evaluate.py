"""Estimates: importance sampling with its diagnostics. Monte Carlo comparisons allow four standard errors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributions as td
from scipy import stats
from torch import Tensor, nn

import aevb
from aevb import MLP, VAE, BayesNet, Bernoulli, DiagonalNormal, FullNormal, Holes, InputError, Normal, StandardNormal
from aevb._compiler import can_compile
from aevb.apps.summary import UNTRUSTED_ABOVE, summarize
from aevb.evaluate import pareto_k, rounding

pytestmark = pytest.mark.usefixtures("double")

ROUNDING = 1e-10
FIELDS = ("log_prob", "std_error", "ess", "pareto_k", "elbo")


class LocationScale(nn.Module):
    """A posterior of a family that is not known to be normal."""

    def __init__(self, net: nn.Module, family: type[td.Distribution]) -> None:
        super().__init__()
        self.net, self.family = net, family

    def forward(self, *parents: Tensor) -> td.Distribution:
        loc, raw = self.net(*parents).chunk(2, dim=-1)
        return td.Independent(self.family(loc, 0.1 + nn.functional.softplus(raw)), 1)


class Recording(nn.Module):
    """Keeps what passes into a net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[Tensor] = []

    def forward(self, *parents: Tensor) -> Tensor:
        self.seen.append(parents[0].detach().clone())
        return self.net(*parents)


D, K = 5, 2
POSTERIORS = {
    "diagonal": lambda net: DiagonalNormal(net(2 * K)),
    "full": lambda net: FullNormal(net(2 * K + K * K), K),
    "laplace": lambda net: LocationScale(net(2 * K), td.Laplace),
    "gumbel": lambda net: LocationScale(net(2 * K), td.Gumbel),
}


def encoder(outputs: int) -> nn.Module:
    return MLP(D, [6], outputs, "tanh")


def model(posterior: str = "diagonal", net=encoder) -> VAE:
    torch.manual_seed(0)
    p = BayesNet({"z": StandardNormal(K), "x | z": Bernoulli(MLP(K, [6], D, "tanh"))})
    return VAE(p, BayesNet({"z | x": POSTERIORS[posterior](net)}))


def ladder() -> VAE:
    """Two layers, one of them Gaussian, the other not."""
    torch.manual_seed(0)
    p = BayesNet({
        "b": StandardNormal(1),
        "a | b": DiagonalNormal(MLP(1, [], 2 * K)),
        "x | a": Bernoulli(MLP(K, [6], D, "tanh")),
    })  # fmt: skip
    q = BayesNet({
        "a | x": DiagonalNormal(encoder(2 * K)),
        "b | a, x": LocationScale(MLP(K + D, [], 2), td.Laplace),
    })  # fmt: skip
    return VAE(p, q)


def binary(rows: int) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(rows, D) < 0.5).to(torch.get_default_dtype())


MODELS = {name: (lambda name=name: model(name)) for name in POSTERIORS} | {"ladder": ladder}


def assert_same(found: aevb.Marginal, wanted: aevb.Marginal, rows: list[int] | slice) -> None:
    for field in FIELDS:
        ours, theirs = getattr(found, field), getattr(wanted, field)[rows]
        torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING, msg=lambda m, f=field: f"{f}: {m}")
    assert list(found.curve) == list(wanted.curve)
    for count, bound in found.curve.items():
        torch.testing.assert_close(bound, wanted.curve[count][rows], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_figures_depend_on_neither_company_nor_packs(name):
    vae, x = MODELS[name](), binary(6)
    whole = aevb.log_marginal(vae, {"x": x}, 700)
    for pack in (1, 300, 700, 10_000):
        assert_same(aevb.log_marginal(vae, {"x": x}, 700, pack=pack), whole, slice(None))
    for rows in ([3], [4, 0], [5, 4, 3, 2, 1, 0], [2, 2]):
        assert_same(aevb.log_marginal(vae, {"x": x[rows]}, 700), whole, rows)


@pytest.mark.parametrize(("samples", "pack"), [(700, 256), (40, 4096)])
def test_compiled_figures_are_those_of_eager(samples, pack, monkeypatch):
    """Packs that are cut, rows beside each other, a model of two latents; where there is no compiler, its graph."""
    if can_compile() is not None:
        monkeypatch.setattr("aevb.evaluate.marginal.can_compile", lambda: None)
        monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    vae, x = ladder(), binary(40)
    eager = aevb.log_marginal(vae, {"x": x}, samples, pack=pack)
    assert_same(aevb.log_marginal(vae, {"x": x}, samples, pack=pack, compile=True), eager, slice(None))


@pytest.mark.parametrize("name", MODELS)
def test_torchs_generator_is_neither_used_nor_moved(name):
    vae, x = MODELS[name](), binary(3)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = aevb.log_marginal(vae, {"x": x}, 300)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert_same(aevb.log_marginal(vae, {"x": x}, 300), first, slice(None))
    other = aevb.log_marginal(vae, {"x": x}, 300, seed=1)
    assert not bool((other.log_prob == first.log_prob).any())


@pytest.mark.parametrize("pack", [1, 500, 4096])
@pytest.mark.parametrize("posterior", ["diagonal", "full", "laplace"])
def test_each_row_is_encoded_once(posterior, pack):
    """Whatever the number of packs; the check of the support, one pass over the first row, is the one exception."""
    nets = []

    def recording(outputs: int) -> nn.Module:
        nets.append(Recording(encoder(outputs)))
        return nets[-1]

    vae = model(posterior, recording)
    x = binary(32)
    x = x.unique(dim=0)
    aevb.log_marginal(vae, {"x": x}, 1000, pack=pack)
    seen = collections.Counter(tuple(row.tolist()) for batch in nets[0].seen for row in batch.reshape(-1, D))
    expected = collections.Counter(tuple(row.tolist()) for row in x)
    expected[tuple(x[0].tolist())] += 1
    assert seen == expected


@pytest.mark.parametrize("compile", [False, True])
def test_rows_shared_out_among_threads_have_the_figures_of_one(compile):
    vae, x = MODELS["diagonal"](), binary(23)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[threads] = aevb.log_marginal(vae, {"x": x}, 700, pack=1024, compile=compile)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(found[2], found[1], slice(None))
    assert_same(found[3], found[1], slice(None))


def test_an_error_in_one_thread_is_the_callers(monkeypatch):
    vae, x = MODELS["diagonal"](), binary(16)
    vae.p.conditional("x").net.register_forward_hook(_raise_past(4))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="call"):
            aevb.log_marginal(vae, {"x": x}, 300, pack=512)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _raise_past(calls: int):
    seen = itertools.count(1)

    def hook(*_: object) -> None:
        if (number := next(seen)) > calls:
            raise RuntimeError(f"call {number}")

    return hook


class Sign(nn.Module):
    """Logits +-1.5 by the sign of z: a weight has one of two known values."""

    def forward(self, z: Tensor) -> Tensor:
        return 1.5 * z.sign()


@pytest.mark.parametrize("pack", [300, 4096])
@pytest.mark.parametrize("samples", [1, 2, 255, 256, 257, 1000, 5000])
def test_all_that_was_drawn_is_counted(samples, pack):
    """Q is the prior, so that w = p(x | z) is one of two numbers; how often each came is counted at the decoder."""
    net = Recording(Sign())
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": Bernoulli(net)}), BayesNet({"z": StandardNormal(1)}))
    for x in (0.0, 1.0):
        net.seen.clear()
        told = []
        found = aevb.log_marginal(vae, {"x": torch.tensor([[x]])}, samples, pack=pack, progress=told.append)
        z = torch.cat(net.seen[1:]).flatten().numpy()  # without the pass that checks the support
        assert len(z) == samples == found.samples
        assert told == [1]
        w = stats.bernoulli.pmf(x, 1 / (1 + np.exp(-1.5 * np.sign(z))))
        assert len(np.unique(w.round(12))) == (2 if samples > 2 else len(np.unique(np.sign(z))))
        assert float(found.log_prob) == pytest.approx(np.log(w.mean()), abs=ROUNDING)
        assert float(found.elbo) == pytest.approx(np.log(w).mean(), abs=ROUNDING)
        assert float(found.ess) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=ROUNDING)
        if samples == 1:
            assert math.isnan(found.std_error)
        else:
            assert float(found.std_error) == pytest.approx(stats.sem(w) / w.mean(), rel=1e-8, abs=1e-8)


def linear_gaussian(scale: float = 1.4, holes: bool = False) -> tuple[VAE, np.ndarray, np.ndarray]:
    """Z of 2 dimensions, x of 3; a factorized q near the posterior, `scale` times as wide. Mean and covariance of x."""
    torch.manual_seed(0)
    w, b, s = torch.randn(3, 2), torch.randn(3), 0.8
    conditional = Normal(MLP(2, [], 3), 3, "global")
    net = MLP(6 if holes else 3, [], 4)
    precision = w.T @ w + s**2 * torch.eye(2)
    gain = torch.linalg.solve(precision, w.T)
    width = scale * s * torch.linalg.inv(precision).diagonal().sqrt()
    with torch.no_grad():
        conditional.net.last.weight.copy_(w)
        conditional.net.last.bias.copy_(b)
        conditional.raw_noise.fill_(math.log(math.expm1(s)))
        net.last.weight.zero_()
        net.last.weight[:2, :3] = gain
        net.last.bias.copy_(torch.cat([-gain @ b, width.expm1().log()]))
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": conditional}),
        BayesNet({"z | x": DiagonalNormal(Holes(net) if holes else net)}),
    )
    return vae, b.numpy(), (w @ w.T + s**2 * torch.eye(3)).numpy()


def test_standard_error_is_calibrated():
    """Squared scatter over repeated seeds against the reported squares: a chi-square of R - 1 degrees, at 1e-4.

    And the scatter is about log p(x): its mean lies within 4 standard errors once the bias -SE^2 / 2 is allowed for.
    """
    vae, mean, cov = linear_gaussian()
    x = torch.as_tensor(stats.multivariate_normal(mean, cov).rvs(4, random_state=0))
    repetitions = 300
    runs = [aevb.log_marginal(vae, {"x": x}, 1000, seed=seed) for seed in range(repetitions)]
    estimates = torch.stack([run.log_prob for run in runs])
    reported = torch.stack([run.std_error for run in runs]).square().mean(0)
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], repetitions - 1) / (repetitions - 1)
    ratio = estimates.var(0) / reported
    assert bool(((ratio > low) & (ratio < high)).all())
    exact = torch.as_tensor(stats.multivariate_normal(mean, cov).logpdf(x.numpy()))
    error = estimates.mean(0) - (exact - reported / 2)
    assert bool((error.abs() < 4 * (reported / repetitions).sqrt()).all())


def covered(scale: float, rows: int = 1000) -> tuple[VAE, Tensor, aevb.Marginal, Tensor]:
    """Rows of the model, their estimates, and which 95 % interval holds log p(x), q being `scale` times as wide."""
    vae, mean, cov = linear_gaussian(scale)
    x = torch.as_tensor(stats.multivariate_normal(mean, cov).rvs(rows, random_state=0))
    found = aevb.log_marginal(vae, {"x": x}, 2000)
    exact = torch.as_tensor(stats.multivariate_normal(mean, cov).logpdf(x.numpy()))
    return vae, x, found, (found.log_prob - exact).abs() < stats.norm.ppf(0.975) * found.std_error


def test_intervals_cover_where_k_hat_is_low():
    """As often as they say, by a two-sided binomial band at 1e-4; the bias SE^2 / 2 is a hundredth of an SE here.

    A q that is wide enough has a low k-hat in all rows, not in those alone whose draws happened to miss the tail.
    """
    _, _, found, inside = covered(1.4)
    assert bool((found.pareto_k < 0.5).all())
    assert bool((found.std_error < 0.03).all())
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], len(inside), 0.95)
    assert low <= int(inside.sum()) <= high


def test_intervals_do_not_cover_where_k_hat_is_high_and_the_caveat_counts_those_rows():
    """A q of 0.3 times the posterior's width: of the rows that are flagged, fewer are covered than the band allows."""
    vae, x, found, inside = covered(0.3)
    flagged = found.pareto_k > UNTRUSTED_ABOVE
    count = int(flagged.sum())
    assert count > 500
    assert int(inside[flagged].sum()) < stats.binom.ppf(5e-5, count, 0.95)
    told = summarize(vae, {"x": x}, found)
    assert told.untrusted == count
    assert told.caveat.endswith(f"k-hat > 0.7 in {count} of 1000 rows")


def test_noise_is_new_for_each_node_row_and_block():
    """Two latents that q draws alike, in rows that differ and over two blocks of draws: no number comes twice."""
    decoders = Recording(nn.Identity()), Recording(nn.Identity())
    wide = td.Independent(td.Normal(torch.zeros(1), torch.ones(1)), 1)
    one, other = nn.Module(), nn.Module()
    one.forward = other.forward = lambda: wide
    p = BayesNet({
        "a": StandardNormal(1),
        "b": StandardNormal(1),
        "x | a": Normal(decoders[0], 1),
        "y | b": Normal(decoders[1], 1),
    })  # fmt: skip
    vae = VAE(p, BayesNet({"a": one, "b": other}))
    values = {"x": torch.tensor([[0.0], [1.0], [2.0]]), "y": torch.zeros(3, 1)}
    aevb.log_marginal(vae, values, 512)
    checks = sum(seen.shape[0] == 1 for seen in decoders[0].seen)  # the pass that checks the support, one draw
    assert checks == 1
    eps = torch.cat([seen.flatten() for decoder in decoders for seen in decoder.seen if seen.shape[0] > 1])
    assert eps.unique().numel() == eps.numel() == 2 * 512 * 3
    # A second seed's are others again.
    aevb.log_marginal(vae, values, 512, seed=1)
    both = torch.cat([seen.flatten() for decoder in decoders for seen in decoder.seen if seen.shape[0] > 1])
    assert both.unique().numel() == both.numel() == 4 * 512 * 3


@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_the_diagnostics(name):
    vae, x = MODELS[name](), binary(6)
    for samples in (1, 2, 10, 400):
        found = aevb.log_marginal(vae, {"x": x}, samples)
        assert bool((found.ess >= 1 - ROUNDING).all())
        assert bool((found.ess <= samples * (1 + ROUNDING)).all())
        assert bool((found.log_prob >= found.elbo - ROUNDING).all())
        assert all(getattr(found, field).shape == (6,) for field in FIELDS)
        # The tail is a fifth of the draws; fewer than five tell nothing.
        assert bool(found.pareto_k.isnan().all()) == (samples < 25)


def test_estimates_are_double_whatever_the_model_is():
    vae = model().float()
    found = aevb.log_marginal(vae, {"x": binary(3).float()}, 50)
    assert all(getattr(found, field).dtype == torch.float64 for field in FIELDS)


def test_single_precision_meets_double():
    """The draws differ, as float32's are others: the difference is within 4 of its standard errors."""
    x = binary(6)
    wide, narrow = aevb.log_marginal(model(), {"x": x}, 5000), aevb.log_marginal(model().float(), {"x": x}, 5000)
    standard_error = (wide.std_error.square() + narrow.std_error.square()).sqrt()
    assert bool(((wide.log_prob - narrow.log_prob).abs() < 4 * standard_error).all())


def test_the_precision_of_products_holds_for_the_call():
    """In both networks, and no longer; without units for bfloat16 torch takes float32 products all the same."""
    seen = set()

    class Told(MLP):
        def forward(self, *parents: Tensor) -> Tensor:
            seen.add(torch.get_float32_matmul_precision())
            return super().forward(*parents)

    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(Told(2, [4], 5))}),
        BayesNet({"z | x": DiagonalNormal(Told(5, [4], 4))}),
    )
    before = torch.get_float32_matmul_precision()
    for precision, expected in (("bfloat16", "medium"), ("float32", before)):
        seen.clear()
        aevb.log_marginal(vae, {"x": torch.ones(2, 5)}, 10, precision=precision)
        assert seen == {expected}
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("shift", "zigzag", "allowed"),
    [(0.09, 0.0, True), (0.11, 0.0, False), (-0.11, 0.0, False), (0.0, 0.9, True), (0.0, 1.1, False)],
)
def test_rounding_is_allowed_where_both_errors_hide_it(shift, zigzag, allowed):
    """`shift` is of the mean, in units of its sampling error; `zigzag` of rows, up and down, in their own error's."""
    exact = aevb.log_marginal(model(), {"x": binary(6)}, 100)
    signs = torch.tensor([1.0, -1.0]).repeat(3)
    errors = exact.std_error.square().mean().sqrt()
    change = shift * exact.log_prob.std() / math.sqrt(6) + zigzag * errors * signs
    # Of the rows' own error the shift alone takes little, so that one rule is tried at a time.
    wide = dataclasses.replace(exact, std_error=exact.std_error * 100) if shift else exact
    coarse = dataclasses.replace(exact, log_prob=exact.log_prob + change)
    found = rounding(wide, coarse)
    assert found.allowed is allowed
    assert found.change == pytest.approx(float(change.mean()))
    assert found.row_change == pytest.approx(float(change.square().mean().sqrt()))


def test_the_sampling_error_that_rounding_is_held_to_is_that_of_all_rows():
    exact = aevb.log_marginal(model(), {"x": binary(6)}, 100)
    coarse = dataclasses.replace(exact, log_prob=exact.log_prob + 0.05 * exact.log_prob.std() / math.sqrt(6))
    wide = dataclasses.replace(exact, std_error=exact.std_error * 100)
    assert rounding(wide, coarse).allowed
    assert not rounding(wide, coarse, total=60).allowed
    one = aevb.log_marginal(model(), {"x": binary(1)}, 100)
    assert not rounding(one, one).allowed  # no error is known


def test_compiled_in_bfloat16_as_eagerly():
    """The same rounded products, summed up in another order; where there is no compiler, eagerly both."""
    vae, x = model().float(), {"x": binary(9).float()}
    eager, compiled = (aevb.log_marginal(vae, x, 600, compile=c, precision="bfloat16") for c in (False, True))
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled.elbo, eager.elbo, rtol=0, atol=1e-4)


def test_precision_is_one_of_two():
    with pytest.raises(InputError, match="`precision` must be one of float32, bfloat16; got 'bf16'"):
        aevb.log_marginal(model(), {"x": binary(2)}, 10, precision="bf16")


def test_rounding_is_of_the_same_rows_and_draws():
    vae = model()
    few, more, other = (aevb.log_marginal(vae, {"x": binary(n)}, k) for n, k in ((3, 10), (3, 11), (4, 10)))
    for coarse in (more, other):
        with pytest.raises(InputError, match="same rows and draws"):
            rounding(few, coarse)


def test_memory_does_not_grow_with_the_draws():
    """10^6 draws of one row take less than 100 MB more at their peak than 10^4.

    All at once, a layer of 50 alone would take 200 MB. The peak is the kernel's VmHWM: ru_maxrss starts at that of the
    process that started this one, and could hide a growth.
    """
    code = """
        import torch, aevb
        def peak():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = aevb.ModelConfig(features=64, likelihood="bernoulli", latents=50, hidden=(50,))
        vae = aevb.build_vae(config)
        x = (torch.rand(1, 64) < 0.5).float()
        peaks = []
        for samples in (10**4, 10**6):
            assert aevb.log_marginal(vae, {"x": x}, samples).samples == samples
            peaks.append(peak())
        print(peaks[1] - peaks[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 100e6  # kilobytes


@pytest.mark.parametrize("k", [0.2, 0.7, 1.2])
def test_pareto_k_of_generalised_pareto_draws(k):
    """The mean over 200 rows lies within 4 of its standard errors of k, drawn to 0.5 by the prior's ten draws.

    A row's k-hat scatters by (1 + k) / sqrt(M), the information bound; the fit's own bias of order 1 / M is smaller.
    """
    draws, rows, cutoff = 2000, 200, 1.7
    excess = stats.genpareto.rvs(k, size=(draws, rows), random_state=0)
    tail = torch.as_tensor(np.log(cutoff + excess))
    found = pareto_k(tail, torch.full((rows,), math.log(cutoff)))
    expected = (draws * k + 5) / (draws + 10)
    assert abs(float(found.mean()) - expected) < 4 * (1 + k) / math.sqrt(draws * rows)
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], rows - 1) / (rows - 1)
    assert low < float(found.var()) / ((1 + k) ** 2 / draws) < high


def zhang_stephens(x: np.ndarray) -> float:
    """Their k of excesses `x`, in their own notation and sign (2009, Technometrics 51, section 3): minus the shape."""
    x = np.sort(x)
    n = len(x)
    m = 30 + int(math.sqrt(n))
    theta = np.array(
        [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * x[int(n / 4 + 0.5) - 1]) for j in range(1, m + 1)]
    )
    k = np.array([-np.log(1 - t * x).mean() for t in theta])
    profile = n * (np.log(theta / k) + k - 1)
    weights = np.array([1 / np.exp(profile - one).sum() for one in profile])
    return float(-np.log(1 - (weights * theta).sum() * x).mean())


@pytest.mark.parametrize("draws", [5, 20, 300])
def test_pareto_k_is_the_published_fit(draws):
    """Zhang and Stephens' estimate, drawn to a half by a prior worth ten draws."""
    excess = stats.genpareto.rvs(0.6, size=(draws, 4), random_state=1)
    found = pareto_k(torch.as_tensor(np.log(2.0 + excess)), torch.full((4,), math.log(2.0)))
    expected = [(draws * -zhang_stephens(column) + 5) / (draws + 10) for column in excess.T]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_pareto_k_by_hand():
    """No scale and no order of the weights matters; ties with the cutoff are flat; four draws tell nothing."""
    torch.manual_seed(0)
    tail, cutoff = torch.randn(50, 3).abs(), torch.zeros(3)
    found = pareto_k(tail, cutoff)
    torch.testing.assert_close(pareto_k(tail + 700, cutoff + 700), found, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pareto_k(tail.flip(0), cutoff), found, rtol=ROUNDING, atol=ROUNDING)
    assert pareto_k(torch.zeros(50, 2), torch.zeros(2)).tolist() == [-math.inf, -math.inf]
    assert bool(pareto_k(tail[:4], cutoff).isnan().all())


def test_tail_is_that_of_the_whole_stream():
    """k-hat from packs is k-hat of all log-weights at once: the ceil(3 sqrt(L)) largest above the next one."""
    net = Recording(Sign())
    net.net = nn.Identity()
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": Bernoulli(net)}), BayesNet({"z": StandardNormal(1)}))
    samples = 3000
    found = aevb.log_marginal(vae, {"x": torch.ones(1, 1)}, samples, pack=512)
    z = torch.cat(net.seen[1:]).flatten()
    log_w = nn.functional.logsigmoid(z).sort(descending=True).values
    size = min(math.ceil(3 * math.sqrt(samples)), samples // 5)
    expected = pareto_k(log_w[:size].unsqueeze(1), log_w[size].unsqueeze(0))
    torch.testing.assert_close(found.pareto_k, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pack", [256, 1024, 10_000])
@pytest.mark.parametrize("samples", [1, 2, 700, 3000])
def test_curve_is_the_mean_bound_of_consecutive_groups(samples, pack):
    """With K = 1, 2, 4, ... draws, each of the L // K groups by itself; the last point is the estimate."""
    net = Recording(Sign())
    net.net = nn.Identity()
    vae = VAE(BayesNet({"z": StandardNormal(1), "x | z": Bernoulli(net)}), BayesNet({"z": StandardNormal(1)}))
    found = aevb.log_marginal(vae, {"x": torch.ones(1, 1)}, samples, pack=pack)
    log_w = nn.functional.logsigmoid(torch.cat(net.seen[1:]).flatten())
    sizes = [2**level for level in range(samples.bit_length())]
    assert list(found.curve) == list(dict.fromkeys([*sizes, samples]))
    for size in sizes[:-1] if samples in sizes else sizes:
        whole = log_w[: samples // size * size].view(-1, size)
        expected = (whole.logsumexp(1) - math.log(size)).mean().reshape(1)
        torch.testing.assert_close(found.curve[size], expected, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(found.curve[1], found.elbo)
    assert torch.equal(found.curve[samples], found.log_prob)


class Fragile(nn.Module):
    """NaN for rows that begin with a 7."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] == 7, torch.nan, self.net(x))


def test_rows_whose_weights_are_not_numbers_are_named():
    torch.manual_seed(0)
    vae = VAE(
        BayesNet({"z": StandardNormal(2), "x | z": Normal(MLP(2, [], 3), 3)}),
        BayesNet({"z | x": DiagonalNormal(Fragile(MLP(3, [], 4)))}),
    )
    x = torch.randn(9, 3)
    x[[2, 5], 0] = 7
    with pytest.raises(InputError, match=r"2 of 9 rows.*2, 5"):
        aevb.log_marginal(vae, {"x": x}, 100)
    assert bool(aevb.log_marginal(vae, {"x": x[[0, 1, 3]]}, 100).log_prob.isfinite().all())


@pytest.mark.parametrize(("samples", "pack"), [(0, 100), (-1, 100), (10, 0)])
def test_no_draws_are_refused(samples, pack):
    with pytest.raises(InputError, match="at least 1"):
        aevb.log_marginal(model(), {"x": binary(2)}, samples, pack=pack)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        aevb.log_marginal(model(), {"x": binary(2)[:0]}, 10)


@pytest.mark.parametrize("seen", [[0], [1], [2], [0, 2], [0, 1, 2], []])
def test_missing_values_are_integrated_out(seen):
    """Log p of what is seen is a Gaussian in closed form, of nothing 0; 4 standard errors, for one row."""
    vae, mean, cov = linear_gaussian(scale=2.5, holes=True)
    row = stats.multivariate_normal(mean, cov).rvs(random_state=3)
    x = torch.full((1, 3), torch.nan)
    x[0, seen] = torch.as_tensor(row[seen])
    found = aevb.log_marginal(vae, {"x": x}, 50_000)
    exact = stats.multivariate_normal(mean[seen], cov[np.ix_(seen, seen)]).logpdf(row[seen]) if seen else 0.0
    assert float(found.std_error) < 0.1
    assert abs(float(found.log_prob) - exact) <= 4 * float(found.std_error)


def test_rows_with_different_holes_share_a_call():
    vae, mean, cov = linear_gaussian(scale=2.5, holes=True)
    x = torch.as_tensor(stats.multivariate_normal(mean, cov).rvs(8, random_state=3))
    holed = torch.where(torch.arange(24).reshape(8, 3) % 5 == 0, torch.nan, x)
    whole = aevb.log_marginal(vae, {"x": holed}, 600)
    for row in range(8):
        assert_same(aevb.log_marginal(vae, {"x": holed[row : row + 1]}, 600), whole, [row])


def test_active_units_by_hand():
    """Posterior means (2 x_0, 0.05 x_1, 1): variances 4 Var x_0, 0.0025 Var x_1 and none, over the data given."""
    net = MLP(2, [], 6)
    with torch.no_grad():
        net.last.weight.zero_()
        net.last.weight[0, 0], net.last.weight[1, 1] = 2.0, 0.05
        net.last.bias.copy_(torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, 3.0]))
    vae = VAE(
        BayesNet({"z": StandardNormal(3), "x | z": Normal(MLP(3, [], 2), 2)}), BayesNet({"z | x": DiagonalNormal(net)})
    )
    x = torch.tensor([[0.0, 1.0], [1.0, 2.0], [5.0, 6.0]])
    expected = torch.tensor([4 * np.var([0, 1, 5]), 0.0025 * np.var([1, 2, 6]), 0.0])
    torch.testing.assert_close(aevb.active_units(vae, {"x": x})["z"], expected, rtol=ROUNDING, atol=ROUNDING)


def test_active_units_of_a_posterior_that_sees_nothing():
    """One posterior for all rows has one mean for all rows: no dimension is active, and there are D of them."""
    root = nn.Module()
    root.forward = lambda: td.Independent(td.Normal(torch.tensor([0.0, 5.0]), torch.ones(2)), 1)
    vae = VAE(BayesNet({"z": StandardNormal(2), "x | z": Bernoulli(MLP(2, [], D))}), BayesNet({"z": root}))
    torch.testing.assert_close(aevb.active_units(vae, {"x": binary(4)})["z"], torch.zeros(2))


def test_model_is_left_as_it_was():
    """Evaluation mode and no gradients inside; each module's own mode, and the weights' gradients, afterwards."""
    vae = model(net=lambda outputs: nn.Sequential(encoder(outputs), nn.Dropout(0.5)))
    vae.train()
    vae.p.eval()
    modes = [module.training for module in vae.modules()]
    first, again = (aevb.log_marginal(vae, {"x": binary(3)}, 300) for _ in range(2))
    assert_same(again, first, slice(None))
    assert not first.log_prob.requires_grad
    aevb.active_units(vae, {"x": binary(3)})
    assert [module.training for module in vae.modules()] == modes
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_fully_observed_models_need_no_draws():
    """Without latents every weight is p(x): exact, no spread."""
    torch.manual_seed(0)
    vae = VAE(BayesNet({"a": StandardNormal(2), "b | a": DiagonalNormal(MLP(2, [], 2))}), BayesNet({}))
    values = {"a": torch.randn(4, 2), "b": torch.randn(4, 1)}
    found = aevb.log_marginal(vae, values, 40)
    expected = sum(vae.p.log_prob(values).values()).detach()
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=ROUNDING)
    assert bool((found.std_error < 1e-7).all())
