"""Rows of a run with a target: their codes and their holes, where y is told by q(y | x).

What a function needs is imported when it runs, so that `aevb --help` answers before torch could be loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from aevb.apps.runs import predicted, values_of

if TYPE_CHECKING:
    import torch.distributions as td
    from torch import Tensor

    from aevb.checkpoint import Run
    from aevb.data import Target

__all__ = ["filled", "moments_of_codes", "told"]

_POINTS = 20
"""Values of a number that stand for q(y | x), each for as much of its probability."""


def moments_of_codes(run: Run, values: dict[str, Tensor], moments: Callable[[td.Distribution], dict[str, Tensor]]) -> (
    dict[str, Tensor]
):  # fmt: skip
    """Mean and standard deviation of z under q(y | x) q(z | x, y), or q(z | x, y) in rows where y is known.

    Over classes the mixture is exact; a number is taken at the middles of equal parts of its distribution.
    """
    import torch

    from aevb.distributions import OneHot, base_of

    d, y = run.vae.q.distribution("y", {"x": values["x"]}), values["y"]
    if isinstance(d, OneHot):
        states, share = torch.eye(d.event_shape[0]).to(y).unsqueeze(1), d.mean.T
    else:
        middles = torch.special.ndtri((torch.arange(_POINTS) + 0.5) / _POINTS).to(y)
        states = _at(base_of(d), middles.reshape(-1, 1, 1))
        share = torch.full((_POINTS, len(y)), 1 / _POINTS).to(y)
    share = share.unsqueeze(-1)  # (S, N, 1)
    each = []
    for state in states:
        inside = {"x": values["x"], "y": torch.where(y.isnan(), state, y)}
        each.append(moments(run.vae.q.distribution("z", inside)))
    mean, std = (torch.stack([one[name] for one in each]) for name in ("mean", "std"))
    centre = (share * mean).sum(0)
    spread = (share * (std.square() + (mean - centre).square())).sum(0)
    return {"mean": centre, "std": spread.sqrt()}


def _at(base: td.Distribution, normal: Tensor) -> Tensor:
    """The value of a Gaussian, or of one whose logarithm is, at so many standard deviations."""
    from aevb.distributions import LogNormal

    if isinstance(base, LogNormal):
        return _at(base.log, normal).exp()
    return base.mean + base.stddev * normal


def told(run: Run, rows: Tensor, target: Target) -> tuple[str, Tensor]:
    """How sure q(y | x) is, of each row: the name of a column, and the class's probability or the number's spread."""
    d = predicted(run, rows)
    if target.classes:
        return f"{target.name}:probability", d.mean.amax(-1)
    return f"{target.name}:std", d.stddev[:, 0]


def filled(run: Run, rows: Tensor, target: Target, draws: int, samples: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Rows `(N, P)` with their holes filled in, once, or so many times by a draw; and the ESS behind those of x.

    y by q(y | x): its most probable class, or its mean, or a draw. x by importance sampling given what is observed, or,
    where draws are wanted, given the draw of y.
    """
    import torch

    from aevb.evaluate import impute

    values, gone = values_of(run, rows), rows[:, target.at].isnan()
    x, y, d = values["x"], values["y"], predicted(run, rows)
    holes, ess = x.isnan().any(1), torch.full((len(rows),), float(samples), dtype=torch.float64)
    x = x.expand(max(1, draws), *x.shape).clone()
    if not draws:
        best = d.mean.argmax(-1) if target.classes else d.mean
        sets = torch.where(y.isnan(), best.to(y), y).unsqueeze(0)
        if bool(holes.any()):
            found = impute(run.vae, {name: value[holes] for name, value in values.items()}, samples, seed=seed)
            x[0, holes], ess[holes] = found.mean["x"].to(x), found.ess
    else:
        sets = torch.where(y.isnan(), _drawn(d, values["x"], draws, seed).to(y), y)  # (M, N, ...)
        if bool((at := holes & ~gone).any()):
            known = {name: value[at] for name, value in values.items()}
            found = impute(run.vae, known, samples, draws=draws, seed=seed)
            x[:, at], ess[at] = found.draws["x"].to(x), found.ess
        for m in range(draws if bool((at := holes & gone).any()) else 0):
            known = {"x": values["x"][at], "y": sets[m, at]}
            # Another seed each time: rows whose draws of y are equal would have one draw of x.
            found = impute(run.vae, known, samples, draws=1, seed=seed + 1 + m)
            x[m, at], ess[at] = found.draws["x"][0].to(x), torch.minimum(ess[at], found.ess)
    return [torch.where(rows.isnan(), target.join({"x": x[m], "y": sets[m]}), rows) for m in range(len(sets))], ess


def _drawn(d: td.Distribution, x: Tensor, draws: int, seed: int) -> Tensor:
    """Draws of y, `(M, N)` codes or `(M, N, 1)` numbers, keyed by (seed, the row's content)."""
    import torch

    from aevb.distributions import OneHot, base_of
    from aevb.evaluate.stream import digest_of

    uniform, generator = torch.empty(len(x), draws, dtype=torch.float64), torch.Generator()
    for row in range(len(x)):
        text = f"{seed} target ".encode() + digest_of({"x": x}, row)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1)
        uniform[row] = torch.rand(draws, generator=generator, dtype=torch.float64)
    if isinstance(d, OneHot):
        reached = d.mean.double().cumsum(-1)
        codes = torch.searchsorted(reached / reached[:, -1:], uniform, right=True)
        return codes.clamp(max=d.event_shape[0] - 1).T.to(x)
    return _at(base_of(d), torch.special.ndtri(uniform).T.unsqueeze(-1)).to(x)
