"""How a step is run: whole in one compiled graph, with its loss alone compiled, or eagerly; one mathematics."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from aevb._compiler import can_compile, compiled, products, program
from aevb.config import InputError, TrainConfig
from aevb.training.step import Step
from aevb.training.updates import update_eagerly, update_traced

__all__ = ["Tier", "Tiers", "wanted_tier"]

_log = logging.getLogger("aevb")

Tier = Literal["whole", "loss", "eager"]
_TIERS: tuple[Tier, ...] = get_args(Tier)

_WORTH_SECONDS = 120
"""An eager run longer than this is compiled by "auto": a third of it is won, and compilation takes half a minute."""
_MOST_CHANGED = 4
"""Steps in a row after which dynamo's guards do not hold any more, and compiling is given up."""
_STEP_SECONDS, _FLOP_RATE = 1e-3, 4e10
"""What a step costs beside its products, and products a second: round figures for two cores. They must not be measured,
or the tier, and with it the rounding, would depend on how busy the machine is."""


def wanted_tier(config: TrainConfig, vae: nn.Module, batch_size: int) -> Tier:
    """The tier to begin in, decided by the settings and the size of the model alone."""
    best: Tier = "whole" if config.shards == 1 else "loss"  # a batch in parts is updated by once they are summed
    if config.compile != "auto":
        return best if config.compile else "eager"
    flops = 6 * sum(p.numel() for p in vae.parameters()) * batch_size * config.samples
    return best if config.steps * (_STEP_SECONDS + flops / _FLOP_RATE) > _WORTH_SECONDS else "eager"


@final
class Tiers:
    """Takes steps in a tier, and in the next one where that cannot be."""

    def __init__(self, step: Step, config: TrainConfig, tier: Tier, device: torch.device) -> None:
        self.step, self.tier, self.asked, self.precision = step, tier, config.compile is True, config.precision
        self.rate, self.weight = torch.zeros((), device=device), torch.zeros((), device=device)
        self.run: Callable[..., None] = step
        self.again: Callable[..., None] | None = None  # the program of the last step
        self.form: object = None  # and of its batch: names, shapes, strides and types
        self.changed = 0  # steps in a row that left no program for the next
        if tier != "eager" and (reason := can_compile()):
            self._fall("eager", reason)

    def go_on_in(self, recorded: Tier) -> None:
        """Go on in the tier that a run was in, or raise: another would round otherwise."""
        if recorded != "eager" and (reason := can_compile()):
            raise InputError(
                f"The run was trained compiled, in the tier `{recorded}`, and here {reason}; it would not be the same "
                "run. Install one, or train anew."
            )
        self.tier = recorded

    def look_again(self) -> None:
        """Look for the program of the next step anew, since other code has run that could have changed the model."""
        self.again = None

    @contextlib.contextmanager
    def ready(self) -> Iterator[Callable[[dict[str, Tensor], float, float], None]]:
        """A function that takes a step; within, matrix products are of the precision that was asked for."""
        with products(self.precision):
            if self.tier == "eager":
                yield self.step
                return
            import torch._dynamo  # takes a second or two

            # autograd.grad inside the graph: a private switch of the pinned torch, held by a test.
            with torch._dynamo.config.patch(trace_autograd_ops=True), warnings.catch_warnings():
                # Where a graph breaks, torch looks at the .grad of what crosses the break, and warns that it did.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
                self._prepare()
                yield self._take
            self.step.update = update_eagerly

    def _prepare(self) -> None:
        self.step.update = update_traced if self.tier == "whole" else update_eagerly
        # Draws come from torch's own generator, so that they are those of eager.
        how: dict[str, Any] = {"precision": self.precision, "rounded": True, "fallback_random": True}
        how["cpp_wrapper"] = self.rate.device.type == "cpu"  # kernels are called from C++: a twentieth of a small step
        if self.tier == "whole":
            # Inductor's checks of its own buffers' sizes would be made anew each step; dynamo's guards stay.
            asserts: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}
            self.run = compiled(self.step.__call__, **how, **asserts)
        elif self.tier == "loss":
            loss = compiled(self.step.look, whole=False, **how)

            def run(values: dict[str, Tensor], rate: Tensor, weight: Tensor) -> None:
                value, means = loss(values, weight)
                self.step.take(value, means, rate)

            self.run = run
        else:
            self.run = self.step

    def _take(self, values: dict[str, Tensor], rate: float, weight: float) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        while self.tier != "eager":
            self.rate.fill_(rate)  # numbers that change would be compiled anew
            self.weight.fill_(weight)
            form = [(name, value.shape, value.stride(), value.dtype) for name, value in values.items()]
            if self.again is not None and form == self.form:
                self.again(values, self.rate, self.weight)
                return
            try:
                self.run(values, self.rate, self.weight)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                # raised before anything of the graph has run
                self._fall(_TIERS[_TIERS.index(self.tier) + 1], str(error).strip().splitlines()[0])
                self._prepare()
                continue
            if self.tier == "whole":
                self._keep(values, form)
            return
        self.step(values, rate, weight)

    def _keep(self, values: dict[str, Tensor], form: object) -> None:
        """Keep the program of the step just taken: to search for it anew takes a twentieth of a step, or a tenth."""
        self.again, self.form = program(self.step.__call__, values, self.rate, self.weight), form
        self.changed = 0 if self.again is not None else self.changed + 1
        if self.changed == _MOST_CHANGED:
            self._fall("eager", "a net or the objective changes by Python at each step")
            self._prepare()

    def _fall(self, tier: Tier, reason: str) -> None:
        self.again = None
        told = "eagerly, not compiled" if tier == "eager" else "with its loss compiled, not whole"
        _log.log(logging.WARNING if self.asked else logging.INFO, "Training runs %s: %s.", told, reason.rstrip("."))
        self.tier = tier
