"""What the data decide of a model where a flag does not: the rules, and what `aevb train --help` says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aevb.config import InputError, Likelihood, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from aevb.data import Data

__all__ = ["AUTO", "COUNTS", "model_config"]

COUNTS = ("poisson", "negative-binomial", "zero-inflated", "binomial", "beta-binomial")
"""Likelihoods of whole numbers from 0."""

AUTO = {
    "likelihood": "mixed for a table whose columns have names; else counts with a known limit, zeros and ones, bytes "
    "of an image (discretized-logistic), or real values, as the data are",
    "library": "observed for a sparse matrix or an AnnData file without holes, under one of these two likelihoods, "
    "else none",
    "net": "convolutional for images of bytes, from 16 pixels a side on, without --hidden or --posterior product; "
    "else plain",
    "latents": "10 with a library, else 32",
    "hidden": "one layer of 128 with a library, else 256 256",
    "batch_norm": "with a library, where hidden layers are plain, the prior is not vamp, and a step sees whole batches "
    "of several rows (--shards 1)",
}
"""Fields of `ModelConfig` whose flags are `auto` unless they are given, and what that comes to."""

_SIZES: dict[str, Any] = {"latents": 10, "hidden": (128,), "batch_norm": True}
"""Sizes of models with a library, whose rows are cells: those of Lopez et al. (2018)."""

_LEAST_SIDE = 16
"""Pixels on the shorter side of images that convolutions are taken for unasked."""


def model_config(model: dict[str, Any], data: Data, training: TrainConfig | None = None) -> ModelConfig:
    """The flags by name, completed by what the data tell.

    Args:
        model: Values of the flags, `auto` among them; each of `AUTO` that is not named is `auto`, others are as in
            `ModelConfig`.
        data: What is to be trained on.
        training: How; batch-norm needs batches that are whole, and of several rows.

    Raises:
        InputError: If flags and data do not go together.
    """
    from aevb.data import SparseRows

    given, training = dict.fromkeys(AUTO, "auto") | model, training or TrainConfig()
    if given["likelihood"] == "auto":
        given["likelihood"] = "mixed" if data.kinds else _likelihood(data)
    if given["likelihood"] in ("binomial", "beta-binomial") and given.get("total_count") is None:
        given["total_count"] = data.total_count
    if given["likelihood"] in ("normal", "student-t") and data.constant:
        raise InputError(
            f"{data.name}: {', '.join(map(repr, data.constant[:10]))} constant in the train rows, and the scale of a "
            "normal or student-t likelihood would go to zero there. Leave them out with --drop-constant."
        )
    if given["likelihood"] == "mixed":
        if not data.kinds:
            raise InputError("`--likelihood mixed` is for tables whose columns have names. Give such a file.")
        given["kinds"] = data.kinds if data.target is None else data.target.others(data.kinds)
        given["target"] = "" if data.target is None else data.target.kind
    if isinstance(data.train, SparseRows):
        if given["likelihood"] in COUNTS:
            data.train.check_counts(data.name)
    elif any(x is not None and bool(x.isnan().any()) for x in (data.train, data.test)):
        given["holes"] = True
    if given["net"] == "auto":
        given["net"] = "convolutional" if _for_convolutions(given, data) else "plain"
    if given["net"] == "convolutional":
        if data.image_shape is None:
            raise InputError(
                f"`--net convolutional` is for images, and the rows of {data.name} are none, or none any more where "
                "--drop-constant left pixels out. Give images, or another --net."
            )
        given["image"] = (1, *data.image_shape)[-3:]
    if given["library"] == "auto":
        dispersed = given["likelihood"] in ("negative-binomial", "zero-inflated") and not given.get("holes")
        given["library"] = "observed" if dispersed and _of_cells(data) else "none"
    given["batches"] = 0 if data.batch is None else len(data.batch)
    sizes = dict(_SIZES) if given["library"] != "none" else {}
    widths = given["hidden"] if given["hidden"] != "auto" else sizes.get("hidden", ModelConfig(features=1).hidden)
    fit = given["net"] == "plain" and given.get("prior") != "vamp" and training.shards == 1 < training.batch_size
    if not (fit and widths):
        sizes.pop("batch_norm", None)
    given = {name: value for name, value in given.items() if value != "auto"}
    return ModelConfig(**sizes | {"features": len(given.get("kinds", ())) or data.features} | given)


def _of_cells(data: Data) -> bool:
    """Whether counts come in a form that counts of cells come in."""
    from aevb.data import SparseRows

    return isinstance(data.train, SparseRows) or data.name.lower().endswith(".h5ad")


def _for_convolutions(given: dict[str, Any], data: Data) -> bool:
    """Whether rows are images of bytes, large enough, and nothing that was asked for stands against it."""
    large = data.image_shape is not None and min(data.image_shape[-2:]) >= _LEAST_SIDE
    plain = given.get("posterior") == "product" or given["hidden"] != "auto"
    return large and given["likelihood"] == "discretized-logistic" and not plain


def _likelihood(data: Data) -> Likelihood:
    """What fits the values: counts with a known limit, zeros and ones, the bytes of an image, or anything."""
    if data.binarize != "none":
        return "bernoulli"
    if data.total_count is not None:
        return "binomial"
    from aevb.data import SparseRows

    if isinstance(data.train, SparseRows):
        return "bernoulli" if bool((data.train.stored == 1).all()) else "negative-binomial"
    known = data.train[~data.train.isnan()]
    if _of_cells(data) and bool(((known >= 0) & (known == known.floor())).all()):
        return "negative-binomial"
    if bool(((known == 0) | (known == 1)).all()):
        return "bernoulli"
    # Of whatever type: where a pixel is missing, bytes are held as floats.
    bytes_ = bool(((known >= 0) & (known <= 255) & (known == known.floor())).all())
    return "discretized-logistic" if bytes_ and data.image_shape is not None else "normal"
