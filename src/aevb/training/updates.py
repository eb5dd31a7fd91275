r"""Update rules, once as kernels for eager training and once as formulas for a compiled step; torch.optim's numbers.

Either form takes the gradients, scales them so that their joint norm is at most the clip, and leaves everything as it
was where `ok` is false: a non-finite step never reaches the weights, and nothing is read back to decide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aevb.config import TrainConfig

__all__ = ["OptimizerState", "update_eagerly", "update_traced"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_TINY_FIRST = 1e-30  # a mean that adds 1e-22 of the rate to a weight, and takes 180 steps from there to be denormal
_TINY = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm, too


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """Weights and what their update carries along, one tensor a parameter in each list."""

    params: list[Tensor]
    first: list[Tensor]  # Adam's running mean of gradients
    second: list[Tensor]  # Adam's running mean of squared gradients
    average: list[Tensor]  # exponential moving average of the weights; empty where it is off
    running: list[Tensor]  # floating buffers of the model, batch-norm's statistics among them; empty likewise
    running_average: list[Tensor]  # and their moving average, which belongs to the averaged weights
    count: Tensor  # (), updates taken
    factors: Tensor  # (3,), those of `_factors` for the update to come; a compiled step's alone

    @classmethod
    def start(cls, params: Sequence[Tensor], config: TrainConfig, buffers: Sequence[Tensor] = ()) -> OptimizerState:
        """Zeros, and the weights as their own average."""
        params = list(params)
        running = [b for b in buffers if b.is_floating_point() and b.numel()] if config.average else []
        adam = config.optimizer != "sgd"
        count = torch.zeros((), device=params[0].device)
        return cls(
            params=params,
            first=[torch.zeros_like(p) for p in params] if adam else [],
            second=[torch.zeros_like(p) for p in params] if adam else [],
            average=[p.detach().clone() for p in params] if config.average else [],
            running=running,
            running_average=[b.detach().clone() for b in running],
            count=count,
            factors=_factors(count, config),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint; parameters aside, which the model saves."""
        lists = {"first": self.first, "second": self.second, "average": self.average}
        lists["running_average"] = self.running_average
        named = {f"{kind}/{i}": tensor for kind, tensors in lists.items() for i, tensor in enumerate(tensors)}
        return named | {"count": self.count, "factors": self.factors}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, in place."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def drop_tiny_(self) -> None:
        """Set to 0 what is left of the gradients of a weight that has none any more: it no longer moves the weight.

        Some 800 steps on, the mean would be a denormal number for good, and a step several times slower for it; called
        less than once in 180 steps, this lets it be one for a while.
        """
        for moments, tiny in ((self.first, _TINY_FIRST), (self.second, _TINY_FIRST * 1e-6)):
            for moment in moments:
                moment.masked_fill_(moment.abs() < tiny, 0.0)


@torch.no_grad()
def update_eagerly(
    state: OptimizerState, grads: Sequence[Tensor], loss: Tensor, rate: Tensor | float, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """One update by torch's fused kernels; returns the norm of the gradient and whether the step was taken, `()`."""
    grads = list(grads)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    ok = (norm + loss).isfinite()
    if config.clip_norm:
        torch._foreach_mul_(grads, (config.clip_norm / (norm + _TINY)).clamp(max=1.0))
    state.count.add_(ok)
    for decay, some in _groups(state, config):
        params, steps = [state.params[i] for i in some], [grads[i] for i in some]
        if config.optimizer == "sgd":
            for p, g in zip(params, steps, strict=True):
                p.sub_(torch.where(ok, g + decay * p, 0.0) * rate)
            continue
        kernel = torch._fused_adamw_ if config.optimizer == "adamw" else torch._fused_adam_
        first, second = [state.first[i] for i in some], [state.second[i] for i in some]
        kernel(
            params, steps, first, second, [], [state.count] * len(some), lr=rate, beta1=_BETAS[0], beta2=_BETAS[1],
            weight_decay=decay, eps=_EPS, amsgrad=False, maximize=False, found_inf=(~ok).to(torch.float32),
        )  # fmt: skip
    if state.average:
        mixing = _averaging(state.count, config) * ok
        torch._foreach_lerp_(state.average, state.params, [mixing] * len(state.params))
        for mean, now in zip(state.running_average, state.running, strict=True):
            mean.lerp_(now, mixing)
    return norm, ok


@torch.no_grad()
def update_traced(
    state: OptimizerState, grads: Sequence[Tensor], loss: Tensor, rate: Tensor | float, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """As `update_eagerly`, in formulas that one graph can hold; nothing in it is a Python number that changes.

    Inductor repeats the formula of a number in every loop over a tensor that uses it, two powers every eight weights
    among them, unless it is an input or comes out of a reduction: hence `factors`, and `all` and `amin` of pairs.
    """
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    ok = torch.stack([norm, loss]).isfinite().all()
    clip = torch.stack([config.clip_norm / (norm + _TINY), torch.ones_like(norm)]).amin() if config.clip_norm else None
    mixing = state.factors[2] * ok if state.average else None
    for i, (p, raw) in enumerate(zip(state.params, grads, strict=True)):
        g = raw if clip is None else raw * clip
        decay = _decay(p, config)
        if decay and config.optimizer != "adamw":
            g = g + decay * p
        old = p * (1 - rate * decay) if decay and config.optimizer == "adamw" else p
        new = torch.where(ok, old - rate * (g if config.optimizer == "sgd" else _adam(state, i, g, ok)), p)
        p.copy_(new)
        if mixing is not None:
            state.average[i].add_(mixing * (new - state.average[i]))
    if mixing is not None:
        for mean, now in zip(state.running_average, state.running, strict=True):
            mean.lerp_(now, mixing)
    state.count.add_(ok)
    state.factors.copy_(_factors(state.count, config))
    return norm, ok


def _decay(p: Tensor, config: TrainConfig) -> float:
    """Weight matrices decay; biases and scales, whose size is the data's, do not."""
    return config.weight_decay if p.ndim >= 2 else 0.0


def _groups(state: OptimizerState, config: TrainConfig) -> list[tuple[float, list[int]]]:
    """Positions of the parameters by their decay, since a kernel knows but one."""
    by_decay: dict[float, list[int]] = {}
    for i, p in enumerate(state.params):
        by_decay.setdefault(_decay(p, config), []).append(i)
    return list(by_decay.items())


def _adam(state: OptimizerState, i: int, grad: Tensor, ok: Tensor) -> Tensor:
    """Adam's direction (Kingma and Ba, 2015, algorithm 1); moments stay where the step is dropped."""
    first = state.first[i].lerp(grad, 1 - _BETAS[0])
    second = _BETAS[1] * state.second[i] + (1 - _BETAS[1]) * grad.square()
    state.first[i].copy_(torch.where(ok, first, state.first[i]))
    state.second[i].copy_(torch.where(ok, second, state.second[i]))
    return first * state.factors[0] / (second.sqrt() * state.factors[1] + _EPS)


def _factors(count: Tensor, config: TrainConfig) -> Tensor:
    """What the next update multiplies Adam's mean and root of squares by to unbias them, and averages weights with."""
    coming = count + 1
    unbias = [1 / (1 - _BETAS[0] ** coming), (1 - _BETAS[1] ** coming).rsqrt()]
    return torch.stack([*unbias, _averaging(coming, config)])


def _averaging(count: Tensor, config: TrainConfig) -> Tensor:
    """Weight of the newest weights in the average; larger at first, so that it forgets the random start."""
    kept = ((1 + count) / (10 + count)).clamp(max=config.average)
    return 1 - kept
