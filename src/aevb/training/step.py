"""One minibatch update as a function of the batch, eager or compiled whole, and the sums that history is made of."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import Kl, Terms, log_mean, terms
from aevb.config import InputError, TrainConfig
from aevb.training.updates import OptimizerState, update_eagerly, update_traced

__all__ = ["OBJECTIVES", "Meter", "Objective", "Step", "can_compile"]

_log = logging.getLogger("aevb")

Objective = Callable[..., Tensor]


def _elbo(found: Terms, kl_weight: Tensor | float, samples: int, rows: int) -> Tensor:
    return found.weighted(kl_weight).expand(samples, rows).mean(0)


def _iwae(found: Terms, kl_weight: Tensor | float, samples: int, rows: int) -> Tensor:
    return log_mean(found.weighted(kl_weight).expand(samples, rows))


OBJECTIVES: dict[str, tuple[Kl, Callable[[Terms, Tensor | float, int, int], Tensor]]] = {
    "elbo": ("auto", _elbo),
    "iwae": ("sampled", _iwae),
}
"""Name to the kind of KL its terms need and their reduction to `(N,)`, nats, higher is better."""


class Meter:
    """Sums over the steps of a log interval, kept on the device and read once."""

    names = ("bound", "objective", "reconstruction", "gradient_norm")

    def __init__(self, groups: dict[str, int], device: torch.device) -> None:
        self.groups = groups  # latent node to the number of groups its KL comes in
        self.sums = torch.zeros(len(self.names) + sum(groups.values()), device=device)
        self.dropped = torch.zeros((), device=device)
        self.steps = 0

    def add(self, scalars: list[Tensor], divergences: list[Tensor], ok: Tensor) -> None:
        """Take in one step's means over the batch; where `ok` is false only the fact is kept."""
        row = torch.cat([torch.stack(scalars), *divergences])
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


def _check_objective(objective: Objective, vae: VAE, values: Values) -> None:
    parameters = inspect.signature(objective).parameters
    if "kl_weight" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise InputError(
            "`objective` must take `(vae, values, **tensors)`, since it is handed kl_weight. "
            "Wrap it: lambda vae, values, **tensors: ..."
        )
    found = objective(vae, values, kl_weight=torch.ones(()))
    if found.shape != (rows_of(values),):
        raise InputError(
            f"`objective` must return one number a datum, ({rows_of(values)},); got {tuple(found.shape)}. "
            "Sum over events, average over draws, and leave the data."
        )


class Step:
    """Bound, gradient, clipping, update, averaging and sums for one batch."""

    def __init__(
        self, vae: VAE, objective: str | Objective, state: OptimizerState, config: TrainConfig, holes: tuple[str, ...]
    ) -> None:
        if objective not in OBJECTIVES if isinstance(objective, str) else not callable(objective):
            raise InputError(f"`objective` must be one of {', '.join(OBJECTIVES)}, or a function; got {objective!r}.")
        if objective == "iwae" and config.samples < 2:
            raise InputError("`objective` iwae with one draw is elbo with more variance. Give `samples` of 2 or more.")
        self.vae, self.objective, self.state, self.config, self.holes = vae, objective, state, config, holes
        self.update = update_eagerly
        self.meter = Meter({}, state.count.device)

    def measure(self, values: Values) -> None:
        """Learn from one batch into how many groups each latent's KL comes."""
        kl: Kl = OBJECTIVES[self.objective][0] if isinstance(self.objective, str) else "auto"
        with torch.no_grad():
            found = terms(self.vae, values, 1, kl=kl, holes=self.holes)
            if not isinstance(self.objective, str):
                _check_objective(self.objective, self.vae, values)
        self.meter = Meter({node: found.node_kl(node).shape[-1] for node in found.latents}, self.state.count.device)

    def __call__(self, values: Values, rate: Tensor | float, kl_weight: Tensor | float) -> None:
        """Take one step on `values`."""
        loss, bound, found = self._loss(values, kl_weight)
        raw = torch.autograd.grad(loss, self.state.params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.state.params, raw, strict=True)]
        norm, ok = self.update(self.state, grads, loss, rate, self.config)
        with torch.no_grad():
            # Means over draws and data of terms that broadcast over either.
            divergences = [found.node_kl(node).flatten(0, -2).mean(0) for node in self.meter.groups]
            scalars = [bound, -loss, found.reconstruction.mean(), norm]
            self.meter.add([s.detach().to(torch.get_default_dtype()) for s in scalars], divergences, ok)

    def _loss(self, values: Values, kl_weight: Tensor | float) -> tuple[Tensor, Tensor, Terms]:
        rows, samples = rows_of(values), self.config.samples
        if isinstance(self.objective, str):
            kl, reduce = OBJECTIVES[self.objective]
            found = terms(self.vae, values, samples, kl=kl, holes=self.holes)
            loss = -reduce(found, kl_weight, samples, rows).mean()
            if isinstance(kl_weight, float) and kl_weight == 1.0:
                return loss, -loss.detach(), found
            with torch.no_grad():
                return loss, reduce(found, 1.0, samples, rows).mean(), found
        weight = torch.as_tensor(kl_weight)
        loss = -self.objective(self.vae, values, kl_weight=weight).mean()
        with torch.no_grad():
            found = terms(self.vae, values, samples, holes=self.holes)
            return loss, _elbo(found, 1.0, samples, rows).mean(), found

    def explain(self, values: Values, kl_weight: float) -> str:
        """Which term, rows and parameters are not finite on this batch, in words."""
        found = terms(self.vae, values, self.config.samples, kl="sampled", holes=self.holes)
        told = []
        for kind, by_node in (("log p", found.log_p), ("log q", found.log_q)):
            for node, value in by_node.items():
                bad = (~value.expand(self.config.samples, rows_of(values)).isfinite()).any(0).nonzero()[:, 0]
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
        return "; ".join(told) or "nothing when replayed"

    @contextlib.contextmanager
    def compiling(self) -> Iterator[Callable[[Values, Tensor, Tensor], None]]:
        """The step as one compiled graph; draws come from torch's own generator, so that they are those of eager."""
        import torch._dynamo

        self.update = update_traced
        # autograd.grad inside the graph: a private switch of the pinned torch, held by a test.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield torch.compile(self.__call__, fullgraph=True, dynamic=False, options={"fallback_random": True})
        self.update = update_eagerly


def can_compile() -> str | None:
    """None if this machine can compile a step, else why not."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler was found"
    return None
