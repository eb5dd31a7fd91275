"""Values where they enter: cast, told apart from what the model cannot take, holes seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributions as td
from torch import Tensor, nn

from aevb._shapes import Values, check_event, rows_of
from aevb.bayesnet import VAE, BayesNet
from aevb.config import InputError
from aevb.distributions import Mixed, check_factorizes, count_states, draw, support_violation

__all__ = ["evaluating", "holes_in", "keeping_buffers", "prepare"]


_ROWS = 4096
"""Rows looked at together: what a look makes of them is as large as they are, and data may fill half of the memory."""


def holes_in(values: Values) -> tuple[str, ...]:
    """Names whose values hold NaN; while a graph is traced, where no value can be read, every name that could."""
    floats = [name for name, value in values.items() if value.is_floating_point()]
    if torch.compiler.is_compiling():
        return tuple(floats)
    return tuple(name for name in floats if any(bool(part.isnan().any()) for part in values[name].split(_ROWS)))


def prepare(vae: VAE, values: Values) -> dict[str, Tensor]:
    """Values as the model takes them: in its dtype and on its device, once they are seen to be what it can model.

    Classes, given as codes, become one-hot vectors. Costs a reduction over the values and one pass over a single row;
    the checks are left out while a graph is traced.

    Raises:
        InputError: Naming the node, what came, the rule and the remedy: for shapes, infinities, values outside the
            support, and holes that a net cannot see.
    """
    reference = next(vae.parameters(), torch.empty(0))
    if not isinstance(values, Mapping):
        rows_of(values)
    given = {name: torch.as_tensor(value) for name, value in values.items()}
    if torch.compiler.is_compiling():
        return {name: value.to(reference) for name, value in vae.p.to_states(given).items()}
    rows_of(given)
    vae.p.check_codes(given)
    cast = {name: value.to(reference) for name, value in vae.p.to_states(given).items()}
    for name, value in given.items():
        narrow = torch.finfo(reference.dtype).bits < 64 and value.dtype in (torch.float64, torch.int64, torch.int32)
        if narrow and value.shape == cast[name].shape:
            _check_cast(name, value.double(), cast[name])
    if not rows_of(cast):
        raise InputError("`values` has no rows; give at least one datum.")
    vae.latents(cast)
    batches = 0 if vae.config is None else vae.config.batches
    if batches and cast["batch"].shape[1:] != (batches,):
        raise InputError(
            f"`batch` must be (N, {batches}), one-hot; got shape {tuple(cast['batch'].shape)}. Make it of codes with "
            f"`aevb.data.Batch.one_hot(codes)`, or torch.eye({batches})[codes]."
        )
    if not any(name in vae.p.nodes for name in cast):
        raise InputError(f"`values` gives no node of p, which has {', '.join(vae.p.nodes)}. Give at least one.")
    for name, value in cast.items():
        if any(bool(part.isinf().any()) for part in value.split(_ROWS)):
            at = tuple(int(i) for i in value.isinf().nonzero()[0])
            raise InputError(
                f"`{name}` is infinite at {at}; values must be finite, or NaN for missing. Clean that entry."
            )
    holes = holes_in(cast)
    for name in holes:
        if name in vae.q.nodes:
            _check_whole_rows(name, cast[name])
        if name in vae.given:
            _check_context(vae, name, cast[name])
    vae.require_sight(holes)
    _check_support(vae, cast, holes)
    return cast


def _check_whole_rows(name: str, value: Tensor) -> None:
    """A node that q infers is known in a row, or latent there: nothing in between."""
    missing = value.isnan().reshape(len(value), -1)
    if bool((mixed := missing.any(1) & ~missing.all(1)).any()):
        row = int(mixed.nonzero()[0])
        raise InputError(
            f"`{name}` is missing in part in row {row}, but q infers it as a whole. Give all of its entries or none, "
            "or drop its factor from q, so that single entries are integrated out."
        )


def _check_context(vae: VAE, name: str, value: Tensor) -> None:
    """Context is known in every row, unless all factors that take it see what is missing."""
    try:
        vae.require_sight([name])
    except InputError:
        row = int(value.isnan().reshape(len(value), -1).any(1).nonzero()[0])
        raise InputError(
            f"`{name}` is missing (NaN) in row {row}, and the model is given it: context must be known in every row. "
            "Fill it in, or leave that row out; a batch is made of codes with `aevb.data.Batch.one_hot(codes)`."
        ) from None


def _check_cast(name: str, value: Tensor, cast: Tensor) -> None:
    """Raise if the model's dtype holds the values, but not what tells them apart."""
    lost = (value - cast.to(value)).abs().nan_to_num(0.0)
    known = (~value.isnan()).sum(0).clamp(min=1)
    spread = ((value - value.nansum(0) / known).square().nansum(0) / known).sqrt()
    # A thousandth of a column's spread: far more than rounding, unless its offset is ten thousand times its spread.
    worst = lost.amax(0) > 1e-3 * spread
    if len(value) > 1 and bool((worst & (spread > 0)).any()):
        at = tuple(int(i) for i in worst.nonzero()[0])
        raise InputError(
            f"`{name}` loses its differences in {str(cast.dtype).removeprefix('torch.')}, the model's dtype, at entry "
            f"{at} of a row: its size is too far from its spread. Subtract its mean, or use the model in float64: "
            "vae.double()."
        )


def _check_support(vae: VAE, values: Values, holes: Iterable[str]) -> None:
    # Supports do not depend on the row, so one row tells all.
    with evaluating(vae), torch.random.fork_rng(devices=[]):
        known = {name: value[:1].nan_to_num(0.0) for name, value in values.items()}
        latent = dict.fromkeys(vae.latents(values))
        for node in vae.drawing_order(latent):
            d = _named(vae.home(node), node, known)
            one = torch.Size([1, 1])
            known[node] = draw(d, one) if d.has_rsample else d.expand(one).sample()
        for node in vae.p.nodes:
            if node in values:
                d = _named(vae.p, node, known)
                check_event(node, values[node], d.event_shape)
                if node in holes:
                    check_factorizes(d, ~values[node].isnan())
                if count_states(d) is None or node not in vae.p.classes:  # classes were checked as codes
                    _refuse(node, values[node], d)


def _named(net: BayesNet, node: str, known: Values) -> td.Distribution:
    """The conditional of a node; what its net refuses is told with the factor's name."""
    try:
        return net.distribution(node, known)
    except InputError as error:
        came = ", ".join(f"{parent}: {tuple(known[parent].shape[1:])}" for parent in net.parents[node])
        raise InputError(f"The factor of `{node}` cannot take one row of its parents ({came}). {error}") from None


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each submodule's own mode restored afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """A pass that leaves batch-norm's running statistics as they are."""
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._NormBase) and each.training]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.data.copy_(before)  # a graph that holds the buffer wants this very value back


def _refuse(node: str, value: Tensor, d: td.Distribution) -> None:
    for first, part in zip(range(0, len(value), _ROWS), value.split(_ROWS), strict=True):
        if (found := support_violation(d, part)) is not None:
            at = (first + found[0], *found[1:])
            break
    else:
        return
    base = d.base_dist if isinstance(d, td.Independent) else d
    family = type(base).__name__
    if isinstance(base, Mixed) and len(at) == 2:
        kind, entry = base.kinds[at[1]], value[at].item()
        raise InputError(
            f"`{node}` is {entry:g} in row {at[0]}, column {at[1]} (counting from 0), which is no value of its kind, "
            f"{kind}. Mend the entry, make it NaN, or build the model with another kind."
        )
    came = value[at].tolist() if len(at) == value.ndim else value[at[0]].tolist()
    remedy = {
        "Bernoulli": "Binarise the values first, or choose a likelihood for grey values (binomial, normal).",
        "Binomial": "Values are whole counts from 0 to total_count: raise total_count, or choose another likelihood.",
    }.get(family, "Choose a likelihood whose support holds the data.")
    raise InputError(f"`{node}` is {came} at {at}, outside the support of its {family} likelihood. {remedy}")
