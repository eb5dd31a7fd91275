r"""A model with a target beside its rows: :math:`p(y) p(z) p(x | y, z)` with :math:`q(y | x) q(z | x, y)`.

Model M2 of Kingma et al. (2014), "Semi-supervised learning with deep generative models"; y may be missing in some rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE, BayesNet
from aevb.build.start import moving, step
from aevb.conditionals import Categorical, DiagonalNormal, LearnedNormal, Scaled
from aevb.config import InputError, Kind, ModelConfig
from aevb.nets import Standardize

__all__ = ["TargetStart", "semi_supervised"]


@dataclass(frozen=True, kw_only=True)
class TargetStart:
    """What the training rows tell of y before the model is trained."""

    classes: int  # 0 where y is a number
    log: bool  # whether y is Gaussian on the log scale
    log_share: Tensor  # (classes,)
    loc: Tensor  # (1,), of a number or its logarithm
    scale: Tensor  # (1,) above 0
    resolution: Tensor  # (1,), the step of its values

    @classmethod
    def of(cls, config: ModelConfig, y: Tensor | None) -> TargetStart:
        """From values `(N,)`, NaN for missing; without any, what is usual.

        Raises:
            InputError: If y has no known value, or is constant.
        """
        kind, dtype = Kind.parse(config.target), torch.get_default_dtype()
        zero, one, log = torch.zeros(1), torch.ones(1), kind.name == "positive"
        made = cls(
            classes=kind.classes, log=log, log_share=torch.zeros(kind.classes), loc=zero, scale=one, resolution=zero
        )
        if y is None:
            return made
        known = y.reshape(-1).to(torch.float64)
        known = known[~known.isnan()]
        if not len(known):
            raise InputError("`y` has no known value, and nothing can be learned of it. Give it in some rows.")
        if kind.classes:  # a class that no row has starts at half a row
            share = torch.bincount(known.long(), minlength=kind.classes)[: kind.classes] + 0.5
            log_share = (share / share.sum()).log().to(dtype)
            return cls(classes=kind.classes, log=log, log_share=log_share, loc=zero, scale=one, resolution=zero)
        known = known.log() if log else known
        loc = known.mean()
        scale = moving(known.std(correction=0), loc)
        if scale == 0:
            raise InputError("`y` is constant, and the scale of its Gaussian would go to zero. Give another target.")
        loc, scale, least = (each.reshape(1).to(dtype) for each in (loc, scale, step(known)))
        return cls(classes=0, log=log, log_share=made.log_share, loc=loc, scale=scale, resolution=least)

    @property
    def width(self) -> int:
        """Of y inside the networks."""
        return self.classes or 1

    @property
    def heads(self) -> int:
        """Numbers from a net that tell q(y | x)."""
        return self.classes or 2

    def shown(self, net: nn.Module, at: int) -> nn.Module:
        """A net whose parent `at` is y, as it is to see it."""
        return net if self.classes else Standardize(net, self.loc, self.scale, log=self.log, at=at)

    def prior(self) -> nn.Module:
        """p(y), which starts as the training rows have it."""
        if not self.classes:
            return Scaled(LearnedNormal(1), self.loc, self.scale, log=self.log)
        prior = Categorical(self.classes, learned=True)
        with torch.no_grad():
            prior.logits.copy_(self.log_share)
        return prior

    def judge(self, net: nn.Module) -> nn.Module:
        """q(y | x) of a net with as many outputs as `heads`."""
        if self.classes:
            return Categorical(self.classes, net)
        return Scaled(DiagonalNormal(net), self.loc, self.scale, self.resolution, log=self.log)


def semi_supervised(*, y: nn.Module, z: nn.Module, x: nn.Module, judge: nn.Module, encoder: nn.Module) -> VAE:
    """p(y) p(z) p(x | y, z) with q(y | x) q(z | x, y) of their conditionals; `judge` and `encoder` are q's."""
    return VAE(BayesNet({"y": y, "z": z, "x | y, z": x}), BayesNet({"y | x": judge, "z | x, y": encoder}))
