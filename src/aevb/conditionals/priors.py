"""Priors: conditionals without parents; and classes, with parents or without."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from aevb.conditionals.form import check_out, check_width, independent
from aevb.config import InputError
from aevb.distributions import NormalMixture, OneHot, base_of

__all__ = ["Categorical", "LearnedNormal", "MixtureOfNormals", "StandardNormal", "VampPrior"]


@final
class StandardNormal(nn.Module):
    r"""The prior :math:`N(0, I)` over `dims` dimensions.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        _check_count("dims", dims, "the number of latent dimensions")
        self.register_buffer("loc", torch.zeros(dims), persistent=False)
        self.register_buffer("scale", torch.ones(dims), persistent=False)

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        return independent(td.Normal(self.loc, self.scale, validate_args=False))


@final
class LearnedNormal(nn.Module):
    r"""The factorized Gaussian :math:`N(\mu, \operatorname{diag} \sigma^2)` with learned parameters; starts at N(0, I).

    As q of a root it is the posterior of ordinary, not amortised, variational inference.

    Args:
        dims: D.
        scale: Where every :math:`\sigma` starts.

    Example:
        >>> LearnedNormal(2)().log_prob(torch.zeros(2)).item()
        -1.8378...
    """

    def __init__(self, dims: int, scale: float = 1.0) -> None:
        super().__init__()
        _check_count("dims", dims, "the number of dimensions")
        if not 0 < scale < math.inf:
            raise InputError(f"`scale` must be finite and above 0; got {scale}. Give a standard deviation.")
        self.loc = nn.Parameter(torch.zeros(dims))
        self.raw_scale = nn.Parameter(torch.full((dims,), _inverse_softplus(scale)))

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        return independent(td.Normal(self.loc, F.softplus(self.raw_scale), validate_args=False))


@final
class MixtureOfNormals(nn.Module):
    r"""The prior :math:`\sum_c \pi_c N(\mu_c, \operatorname{diag} \sigma_c^2)`, all of it learned.

    Means start as draws of N(0, I) from torch's current generator, scales at 1, weights equal.

    Args:
        dims: D.
        components: C.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> MixtureOfNormals(2, 5)().sample(torch.Size([3])).shape
        torch.Size([3, 2])
    """

    def __init__(self, dims: int, components: int) -> None:
        super().__init__()
        _check_count("dims", dims, "the number of latent dimensions")
        _check_count("components", components, "the number of Gaussians")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, dims))
        self.raw_scale = nn.Parameter(torch.full((components, dims), _inverse_softplus(1.0)))

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        return NormalMixture(self.logits, self.loc, F.softplus(self.raw_scale))


@final
class VampPrior(nn.Module):
    r"""The mixture of posteriors :math:`\frac{1}{C} \sum_c q(z | u_c)` at learned pseudo-inputs.

    Eq. 9 of Tomczak and Welling (2018), "VAE with a VampPrior".

    `posterior` is the very module that is q's factor: its weights are trained, averaged and saved once.

    Args:
        posterior: q(z | x), a conditional of one parent.
        start: Where the pseudo-inputs start, `(C, *event)`: rows of the training data, say.
        bounds: Smallest and largest value of x, to which pseudo-inputs are cut; None for data without.

    Example:
        >>> from aevb import MLP, DiagonalNormal
        >>> _ = torch.manual_seed(0)
        >>> encoder = DiagonalNormal(MLP(4, [8], 2 * 2))
        >>> VampPrior(encoder, torch.rand(10, 4), bounds=(0, 1))().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(self, posterior: nn.Module, start: Tensor, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        if start.ndim < 2 or not len(start) or bool(start.isnan().any()):
            raise InputError(
                f"`start` must hold one pseudo-input a row, (C, *event), without NaN; got shape {tuple(start.shape)}. "
                "Give some rows of the training data, holes filled."
            )
        if bounds is not None and not bounds[0] < bounds[1]:
            raise InputError(f"`bounds` must rise; got {bounds}. Give (smallest, largest) value of x.")
        self.posterior, self.bounds = posterior, bounds
        self.pseudo_inputs = nn.Parameter(start.detach().to(torch.get_default_dtype(), copy=True))

    def forward(self) -> td.Distribution:
        """A root has no parents."""
        inputs = self.pseudo_inputs if self.bounds is None else self.pseudo_inputs.clamp(*self.bounds)
        parts, logits = self.posterior(inputs), inputs.new_zeros(len(inputs))
        base = base_of(parts)
        if type(base) is td.Normal:
            return NormalMixture(logits, base.loc, base.scale)
        weights = td.Categorical(logits=logits, validate_args=False)
        return td.MixtureSameFamily(weights, parts, validate_args=False)


@final
class Categorical(nn.Module):
    r"""One of C classes, :math:`p(y = c | a) = \operatorname{softmax}(\operatorname{net}(a))_c`.

    Values are codes 0..C-1, `(N,)`; children receive one-hot vectors, `(*, C)`. Where no value is given, the bounds sum
    over the classes exactly.

    Args:
        classes: C.
        net: Takes the parents, returns the logits `(*, C)`; None for a root.
        learned: For a root: learn its probabilities, which start equal, instead of keeping them so.

    Example:
        >>> Categorical(10)().mean.sum().item()
        1.0...
    """

    def __init__(self, classes: int, net: nn.Module | None = None, *, learned: bool = False) -> None:
        super().__init__()
        _check_count("classes", classes, "the number of classes")
        if net is not None and learned:
            raise InputError("`learned` is for a root, whose probabilities have no net. Drop it.")
        if net is not None:
            check_width("Categorical", net, lambda width: width == classes, f"{classes}, a logit a class")
        self.classes, self.net = classes, net
        if learned:
            self.logits = nn.Parameter(torch.zeros(classes))
        elif net is None:
            self.register_buffer("logits", torch.zeros(classes), persistent=False)

    def forward(self, *parents: Tensor) -> td.Distribution:
        """Parents, `(*, D_i)` each; none for a root."""
        if self.net is None:
            return OneHot(self.logits)
        logits = self.net(*parents)
        check_out("Categorical", logits, self.classes)
        return OneHot(logits)


def _check_count(name: str, count: int, what: str) -> None:
    if count < 1:
        raise InputError(f"`{name}` must be at least 1; got {count}. Give {what}.")


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
