"""One minibatch update as a function of the batch, eager or compiled whole, and the sums that history is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import (
    Kl,
    Terms,
    estimate,
    free_bits_kl,
    keeping_buffers,
    mean_bound,
    mean_log_bound,
    refuse_shared,
    total_correlation,
)
from aevb.config import InputError, TrainConfig
from aevb.training.processes import Processes
from aevb.training.updates import OptimizerState, update_eagerly

__all__ = ["NOTHING", "OBJECTIVES", "Meter", "Objective", "Step", "Total", "check_memory"]

_log = logging.getLogger("aevb")

Objective = Callable[..., Tensor]


def _elbo(found: Terms, weight: Tensor | float, config: TrainConfig, rows: int, shared: tuple[str, ...]) -> Tensor:
    if config.free_bits:
        integrand = found.reconstruction - weight * free_bits_kl(
            found, config.free_bits, config.free_bits_groups, shared
        )
    else:
        integrand = found.weighted(weight)
    if config.tc_weight != 1:
        integrand = integrand - (config.tc_weight - 1) * total_correlation(found)
    return mean_bound(found, integrand, config.samples, rows)


def _iwae(found: Terms, weight: Tensor | float, config: TrainConfig, rows: int, shared: tuple[str, ...]) -> Tensor:
    return mean_log_bound(found, found.log_weights(weight), config.samples, rows)


OBJECTIVES: dict[str, tuple[Kl, Callable[[Terms, Tensor | float, TrainConfig, int, tuple[str, ...]], Tensor]]] = {
    "elbo": ("auto", _elbo),
    "iwae": ("sampled", _iwae),
}
"""Name to the kind of KL its terms need and their reduction to `(N,)`, nats, higher is better."""

_PLAIN = TrainConfig()

NOTHING = "nothing when replayed"
"""What `Step.explain` says where all is finite."""


class Meter:
    """Sums over the steps of a log interval, kept on the device and read once."""

    names = ("gradient_norm", "bound", "objective", "reconstruction")

    def __init__(self, groups: dict[str, int], device: torch.device) -> None:
        self.groups = groups  # latent node to the number of groups its KL comes in
        self.sums = torch.zeros(len(self.names) + sum(groups.values()), device=device)
        self.dropped = torch.zeros((), device=device)
        self.steps = 0

    def add(self, norm: Tensor, means: Tensor, ok: Tensor) -> None:
        """Take in one step's means over the batch; where `ok` is false only the fact is kept."""
        row = torch.cat([norm.reshape(1).to(means), means])
        self.sums.add_(torch.where(ok, row, 0.0))
        self.dropped.add_(~ok)

    def read(self) -> dict[str, Any]:
        """Means since the last call, with the KL by node and dimension, and the count of dropped steps."""
        dropped = int(self.dropped)
        taken = self.steps - dropped
        means = (self.sums / taken if taken else torch.full_like(self.sums, math.nan)).tolist()
        record: dict[str, Any] = dict(zip(self.names, means, strict=False))
        record["dropped"] = dropped
        offset = len(self.names)
        by_node = {}
        for node, count in self.groups.items():
            by_node[node] = means[offset : offset + count]
            record[f"kl_{node}"] = sum(by_node[node])
            offset += count
        record["kl"] = sum(record[f"kl_{node}"] for node in self.groups)
        record["kl_dims"] = by_node
        self.sums.zero_()
        self.dropped.zero_()
        self.steps = 0
        return record


def _wanted(objective: Objective) -> set[str]:
    """Which of the tensors that `fit` can hand over an objective takes."""
    parameters = inspect.signature(objective).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wanted = {name for name in ("kl_weight", "bound") if name in parameters}
    if not open_ended and "kl_weight" not in wanted:
        raise InputError(
            "`objective` must take `(vae, values, **tensors)`, since it is handed kl_weight. "
            "Wrap it: lambda vae, values, **tensors: ..."
        )
    return wanted | {"kl_weight"}


def _check_settings(objective: str | Objective, config: TrainConfig) -> None:
    """Raise for settings that the objective would ignore or cannot take."""
    if objective not in OBJECTIVES if isinstance(objective, str) else not callable(objective):
        raise InputError(f"`objective` must be one of {', '.join(OBJECTIVES)}, or a function; got {objective!r}.")
    if objective == "iwae" and config.samples < 2:
        raise InputError("`objective` iwae with one draw is elbo with more variance. Give `samples` of 2 or more.")
    if config.gradient == {"iwae": "stl"}.get(str(objective), "dreg"):
        raise InputError(
            f"`gradient` {config.gradient} is not for this objective: sticking the landing (stl) is biased on iwae "
            "with several draws, and the doubly reparameterized one (dreg) is made for it. Use stl with elbo, dreg "
            "with iwae."
        )
    shaping = [name for name in ("free_bits", "tc_weight") if getattr(config, name) != getattr(_PLAIN, name)]
    if shaping and objective == "iwae":
        raise InputError(f"`{shaping[0]}` changes the KL, which iwae does not have. Use objective elbo.")
    if config.discrete == "relax" and objective == "iwae":
        raise InputError("`discrete` relax leaves no weights, so there is no iwae. Use elbo, or sum or sample.")
    if not isinstance(objective, str) and "bound" not in _wanted(objective):
        shaping += [name for name in ("gradient", "discrete") if getattr(config, name) != getattr(_PLAIN, name)]
        if shaping:
            raise InputError(
                f"`{shaping[0]}` shapes the bound, and this objective does not take one. Let it take the keyword "
                "`bound`, (N,), or drop the setting."
            )


class Total:
    """What the parts of a batch add up to, in one flat buffer: gradients, loss, means, and who asked to stop."""

    def __init__(self, params: list[Tensor], means: int, shards: int, processes: Processes) -> None:
        self.shards, self.processes = shards, processes
        sizes = [p.numel() for p in params]
        self.flat = torch.zeros(sum(sizes) + means + 2, dtype=params[0].dtype, device=params[0].device)
        *pieces, self.means, self.loss, self.stop = self.flat.split([*sizes, means, 1, 1])
        self.grads = [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]

    @torch.no_grad()
    def add(self, grads: list[Tensor], loss: Tensor, means: Tensor) -> None:
        """Take in one part."""
        torch._foreach_add_([*self.grads, self.means, self.loss], [*grads, means.to(self.flat), loss.reshape(1)])

    @torch.no_grad()
    def reduce_(self) -> None:
        """From sums over the parts of this process to means over those of all."""
        self.processes.sum_(self.flat).div_(self.shards)


class Step:
    """Bound, gradient, clipping, update, averaging and sums for one batch."""

    def __init__(
        self, vae: VAE, objective: str | Objective, state: OptimizerState, config: TrainConfig, holes: tuple[str, ...],
        data_size: int, processes: Processes | None = None,
    ) -> None:  # fmt: skip
        _check_settings(objective, config)
        self.processes = processes or Processes()
        self.vae, self.objective, self.state, self.config, self.holes = vae, objective, state, config, holes
        self.data_size = data_size
        self.wanted = set() if isinstance(objective, str) else _wanted(objective)
        self.kl, self.reduce = OBJECTIVES[objective if isinstance(objective, str) else "elbo"]
        # Whether the objective at KL weight 1 is the bound itself.
        self.is_bound = isinstance(objective, str) and not config.free_bits and config.tc_weight == 1
        self.is_bound &= config.discrete != "relax"
        self.update = update_eagerly
        self.meter = Meter({}, state.count.device)
        self.total: Total | None = None  # where batches come in parts

    def measure(self, values: Values) -> None:
        """Learn from one batch into how many groups each latent's KL comes, and let a custom objective be seen."""
        with torch.no_grad(), keeping_buffers(self.vae):
            found = self._terms(values)
            per_row = self._objective(values, found, torch.ones(()))
        if per_row.shape != (rows_of(values),):
            raise InputError(
                f"`objective` must return one number a datum, ({rows_of(values)},); got {tuple(per_row.shape)}. "
                "Sum over events, average over draws, and leave the data."
            )
        if self.objective == "iwae" and found.summed:
            raise InputError(
                f"iwae gives q(`{found.summed[0]}`) no gradient, since its states are summed over. Train by elbo, or "
                "by an objective of your own that adds a term for it, such as aevb.log_q."
            )
        if self.objective == "iwae":
            refuse_shared(self.vae)
        self.meter = Meter({node: found.node_kl(node).shape[-1] for node in found.latents}, self.state.count.device)
        if self.config.shards > 1:
            means = len(self.meter.sums) - 1  # the norm is known of the whole batch only
            self.total = Total(self.state.params, means, self.config.shards, self.processes)

    @torch.no_grad()
    def check_rows_apart(self, values: Values, reseed: Callable[[], None]) -> None:
        """Raise if the objective of a row depends on the rows beside it: cut otherwise, a batch would be another.

        Seen from a pass in which every row is the first, with the same noise; and from buffers that a pass changes.
        """
        buffers = {name: buffer.clone() for name, buffer in self.vae.named_buffers()}
        seen = []
        for rows in (values, {name: value[:1].expand_as(value).contiguous() for name, value in values.items()}):
            reseed()
            seen.append(self._objective(rows, self._terms(rows), torch.ones(()))[0].double())
        learned = []
        for name, buffer in self.vae.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                learned.append(name)
                buffer.copy_(buffers[name])
        cure = "Use shards 1, or what sees a row by itself (not batch-norm, nor a term over the minibatch)."
        if learned:
            raise InputError(f"`shards` cannot cut a batch of which the net keeps statistics ({learned[0]}). {cure}")
        if not torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-4, equal_nan=True):
            raise InputError(
                "`shards` cannot cut a batch whose rows the objective or a net mixes: the first row's changed from "
                f"{seen[0]:.6g} to {seen[1]:.6g} with the rows beside it. {cure}"
            )

    def __call__(self, values: Values, rate: Tensor | float, kl_weight: Tensor | float) -> None:
        """Take one step on `values`."""
        self.take(*self.look(values, kl_weight), rate)

    def look(self, values: Values, kl_weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and what the meter sums of this batch."""
        loss, bound, found = self._loss(values, kl_weight)
        with torch.no_grad():
            # Means over draws and data of terms that broadcast over either.
            divergences = [found.node_kl(node).reshape(-1, count).mean(0) for node, count in self.meter.groups.items()]
            means = [bound, -loss, found.reconstruction.mean()]
            told = torch.stack([each.detach().to(torch.get_default_dtype()) for each in means])
            return loss, torch.cat([told, *divergences])

    def take(self, loss: Tensor, means: Tensor, rate: Tensor | float) -> None:
        """Differentiate, and update the weights; of a part of a batch, keep the gradient for `take_total`."""
        raw = torch.autograd.grad(loss, self.state.params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.state.params, raw, strict=True)]
        if self.total is not None:
            self.total.add(grads, loss.detach(), means)
            return
        norm, ok = self.update(self.state, grads, loss, rate, self.config)
        with torch.no_grad():
            self.meter.add(norm.detach(), means, ok)

    @torch.no_grad()
    def take_total(self, rate: float, stop: bool) -> Tensor:
        """Update the weights by what the parts of all processes add up to; returns whether any of them asked to stop.

        Every process has the same total, so all drop the step or none does.
        """
        assert self.total is not None
        total = self.total
        total.stop.fill_(float(stop))
        total.reduce_()
        norm, ok = self.update(self.state, total.grads, total.loss[0], rate, self.config)
        self.meter.add(norm, total.means.to(self.meter.sums), ok)
        asked: Tensor = total.stop[0] > 0
        total.flat.zero_()
        return asked

    def _terms(self, values: Values) -> Terms:
        config = self.config
        return estimate(
            self.vae, values, config.samples, kl=self.kl, gradient=config.gradient, discrete=config.discrete,
            temperature=config.temperature, data_size=self.data_size, holes=self.holes,
        )  # fmt: skip

    def _objective(self, values: Values, found: Terms, kl_weight: Tensor | float) -> Tensor:
        """What is maximised, `(N,)`."""
        rows = rows_of(values)
        if isinstance(self.objective, str):
            return self.reduce(found, kl_weight, self.config, rows, self.vae.shared)
        given = {"kl_weight": torch.as_tensor(kl_weight)}
        if "bound" in self.wanted:
            given["bound"] = self.reduce(found, kl_weight, self.config, rows, self.vae.shared)
        return self.objective(self.vae, values, **given)

    def _loss(self, values: Values, kl_weight: Tensor | float) -> tuple[Tensor, Tensor, Terms]:
        """The loss to differentiate, the bound beside it, and the terms that history reports; all of one batch."""
        needed = isinstance(self.objective, str) or "bound" in self.wanted
        with contextlib.nullcontext() if needed else torch.no_grad():
            found = self._terms(values)
        loss = -self._objective(values, found, kl_weight).mean()
        if self.is_bound and not isinstance(kl_weight, Tensor) and kl_weight == 1:
            return loss, -loss.detach(), found
        with torch.no_grad():
            if self.config.discrete == "relax":  # a relaxed value is no bound: draw classes instead
                with keeping_buffers(self.vae):
                    found = estimate(
                        self.vae, values, self.config.samples, discrete="sample", data_size=self.data_size,
                        holes=self.holes,
                    )  # fmt: skip
            return loss, self.reduce(found, 1.0, _plain(self.config), rows_of(values), self.vae.shared).mean(), found

    def explain(self, values: Values, kl_weight: float) -> str:
        """Which term, rows and parameters are not finite on this batch, in words."""
        discrete = "sample" if self.config.discrete == "relax" else self.config.discrete
        found = estimate(
            self.vae, values, self.config.samples, kl="sampled", discrete=discrete, data_size=self.data_size,
            holes=self.holes,
        )  # fmt: skip
        told = []
        for kind, by_node in (("log p", found.log_p), ("log q", found.log_q)):
            for node, value in by_node.items():
                odd_rows = ~(value + torch.zeros(rows_of(values), device=value.device)).isfinite()
                bad = odd_rows.flatten(0, -2).any(0).nonzero()[:, 0] if odd_rows.ndim > 1 else odd_rows.nonzero()[:, 0]
                if len(bad):
                    told.append(f"{kind}({node}) in rows {bad[:5].tolist()} of the batch")
        loss, _, _ = self._loss(values, kl_weight)
        names = {id(p): name for name, p in self.vae.named_parameters()}
        grads = torch.autograd.grad(loss, self.state.params, allow_unused=True)
        odd = [
            names.get(id(p), "the objective's own")
            for p, g in zip(self.state.params, grads, strict=True)
            if g is not None and not bool(g.isfinite().all())
        ]
        if odd:
            told.append(f"the gradient of {', '.join(odd[:5])}" + (f" and {len(odd) - 5} more" if len(odd) > 5 else ""))
        return "; ".join(told) or NOTHING


def _plain(config: TrainConfig) -> TrainConfig:
    """As `config`, with nothing in it that makes the objective differ from the bound."""
    return dataclasses.replace(config, beta=1.0, tc_weight=1.0, free_bits=0.0, free_bits_groups=0)


def check_memory(vae: nn.Module, draws: int) -> None:
    """Refuse a batch whose activations alone exceed what is free: the kernel would kill the process without a word."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    widths = sum(module.out_features for module in vae.modules() if isinstance(module, nn.Linear))
    # Values and gradients of each layer's output before and after its nonlinearity.
    needed = 4 * draws * widths * next(vae.parameters()).element_size()
    if needed > free:
        raise InputError(
            f"A batch of {draws} rows times draws needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            "free. Lower `batch_size` or `samples`."
        )
