"""Images: files in a folder, arrays of pixels, and how a row holds either.

A row is an image flattened: a grey one `(H, W)`, one in colour plane after plane, `(3, H, W)`, the order in which the
convolutional nets of `aevb.nets` take it. Arrays of colour images on the disk have their channels last, `(N, H, W, 3)`.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aevb.checkpoint import write_atomically
from aevb.config import InputError
from aevb.data.files import Part, Source, opened, parsing
from aevb.data.writing import check_destination

__all__ = ["SUFFIXES", "as_images", "as_rows", "described", "read_image", "read_image_folder", "write_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Files that hold images."""

_PARTS = {"train", "test"}
_DEEP = re.compile(r"(I|F|L|LA|RGB|RGBA|RGBX|CMYK);16")  # BGR;16 are bitmaps of 5 and 6 bits a channel
_GAP = 2  # pixels between the images of a grid


def read_image(path: Path) -> Source:
    """One image file, as one row.

    Raises:
        InputError: If it is no such file, or its pixels are no bytes.
    """
    return Source(name=path.name, train=Part(where=f"`{path}`", values=_pixels(path)[None]))


def read_image_folder(folder: Path) -> Source:
    """The images of a folder in the order of their names, with sub-folders as classes; `aevb.data.load` has the rules.

    Raises:
        InputError: If there are none, they differ in size, or one cannot be read.
    """
    with parsing(f"`{folder}`", "a folder"):
        inside = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
        apart = inside == _PARTS
        parts = {name: _files(folder / name) for name in ("train", "test")} if apart else {"train": _files(folder)}
        loose = sorted(e.name for e in os.scandir(folder) if apart and Path(e.name).suffix.lower() in SUFFIXES)
    if loose:
        raise InputError(f"`{folder}` has `{loose[0]}` beside its parts train and test. Move it into one of the two.")
    files = [file for found in parts.values() for file, _ in found]
    images = _alike(files)
    classes = sorted({name for found in parts.values() for _, name in found if name is not None})
    made, at = {}, 0
    for part, found in parts.items():
        labels = [classes.index(name) for _, name in found if name is not None]
        made[part] = Part(
            where=f"`{folder / part if apart else folder}`",
            values=images[at : at + len(found)],
            labels=np.array(labels) if labels else None,
            classes=tuple(classes),
        )
        at += len(found)
    return Source(name=folder.resolve().name, train=made["train"], test=made.get("test"))


def _files(folder: Path) -> list[tuple[Path, str | None]]:
    """Image files by name, each with the sub-folder that it lies in, below which there may be more."""

    def images(found: list[Path]) -> list[Path]:
        visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        return sorted(p for p in visible if p.suffix.lower() in SUFFIXES and p.is_file())

    own = images(list(folder.iterdir()))
    below = [p for p in images(list(folder.rglob("*"))) if p.parent != folder]
    if own and below:
        raise InputError(
            f"`{folder}` holds images both by themselves (`{own[0].name}`) and in sub-folders (`{below[0]}`), which "
            "are classes. Put all into sub-folders, or none."
        )
    if not own and not below:
        raise InputError(
            f"`{folder}` holds no images ({', '.join(SUFFIXES)}), in sub-folders neither, and none of the four IDX "
            "files of MNIST (train-images-idx3-ubyte and so on, also .gz). Give a folder that does, or one data file."
        )
    return [(p, None) for p in own] + [(p, p.relative_to(folder).parts[0]) for p in below]


def _alike(files: Sequence[Path]) -> NDArray[np.uint8]:
    """All images `(N, H, W)`, or, if one is in colour, `(N, H, W, 3)`."""
    images = []
    for file in files:
        images.append(_pixels(file))
        (height, width), (first_height, first_width) = images[-1].shape[:2], images[0].shape[:2]
        if (height, width) != (first_height, first_width):
            raise InputError(
                f"`{file}` is {width} pixels wide and {height} high, `{files[0]}` {first_width} and {first_height}; "
                "all images must have one size. Crop or resize them first."
            )
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else image[..., None].repeat(3, -1) for image in images]
    return np.stack(images)


def _pixels(path: Path) -> NDArray[np.uint8]:
    """`(H, W)`, or `(H, W, 3)`; as a viewer turns it."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError("Images need Pillow, which is not installed. Install it: pip install 'aevb[apps]'.") from None
    where = f"`{path}`"
    with opened(path) as file, parsing(where, "an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; pixels are read or are not
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            _check_form(image, where)
            turned = ImageOps.exif_transpose(image)
            grey = turned.mode in ("1", "L", "LA")
            if turned.has_transparency_data:
                if (np.array(turned.convert("RGBA"))[..., 3] < 255).any():
                    raise InputError(
                        f"{where} has transparent pixels, whose colour depends on what lies behind them. Put it on a "
                        "background first; a transparency that is nowhere used is dropped."
                    )
            return np.array(turned.convert("L" if grey else "RGB"))


def _check_form(image: Any, where: str) -> None:
    raw = [tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0] for tile in image.tile]
    deep = next((form for form in (image.mode, *raw) if isinstance(form, str) and _DEEP.match(form)), None)
    if deep is not None or image.mode in ("I", "F"):
        raise InputError(
            f"{where} has more than 8 bits a channel ({deep or image.mode}); images are read as bytes. Convert it to "
            "8 bits, or save its numbers as an array (N, height, width) in .npy."
        )
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise InputError(f"{where} is a {image.mode} image; grey and RGB ones are read. Convert it to RGB.")
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{where} holds {image.n_frames} frames; a file must hold one image. Save each by itself.")


def as_rows(values: NDArray[Any], where: str) -> tuple[NDArray[Any], tuple[int, ...] | None]:
    """An array of up to four axes as rows `(N, P)`, with the shape of the images that they hold, if they do.

    Raises:
        InputError: If it has more axes, or four and holds no images.
    """
    if values.ndim not in (1, 2, 3, 4) or values.size == 0:
        raise InputError(
            f"{where} has shape {values.shape}; it must be (rows,), (rows, columns), grey images (rows, height, width) "
            "or colour images (rows, height, width, 3), with at least one of each. Reshape it: x.reshape(len(x), -1)."
        )
    shape: tuple[int, ...] | None = values.shape[1:] if values.ndim == 3 else None
    if values.ndim == 4:
        _check_images(values, where)
        height, width, channels = values.shape[1:]
        shape = (height, width) if channels == 1 else (channels, height, width)
        values = values.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values.reshape(len(values), -1)), shape


def _check_images(values: NDArray[Any], where: str) -> None:
    if values.shape[-1] not in (1, 3):
        first = "; x.transpose(0, 2, 3, 1) puts them there" if values.shape[1] in (1, 3) else ""
        raise InputError(
            f"{where} has shape {values.shape}; images in four axes are (rows, height, width, channels) with 3 "
            f"channels, or 1 if grey. Leave out what is no colour, and put the channels last{first}."
        )
    if values.dtype != np.uint8 and values.dtype.kind in "buif":
        known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
        low, high = (known.min(), known.max()) if known.size else (0, 0)
        if low < 0 or high > (255 if (known == np.floor(known)).all() else 1):
            raise InputError(
                f"{where} has values from {low:g} to {high:g} in {values.dtype}; images are bytes, floats in [0, 1], "
                "or, with NaN for missing pixels, whole numbers from 0 to 255. Undo their scaling, and save them with "
                "x.astype(np.uint8)."
            )


def as_images(rows: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Rows `(N, P)` as images `(N, H, W)`, or `(N, H, W, 3)` where `shape` is (3, H, W).

    Example:
        >>> as_images(np.arange(12)[None], (3, 2, 2))[0, 0, 1].tolist()
        [1, 5, 9]
    """
    images = rows.reshape(len(rows), *shape)
    return images if len(shape) == 2 else images.transpose(0, 2, 3, 1)


def described(shape: Sequence[int]) -> str:
    """The size of images in words."""
    return f"{shape[-1]} x {shape[-2]} pixels (width x height) {'in grey' if len(shape) == 2 else 'in colour'}"


def write_images(
    path: str | Path, rows: NDArray[Any], shape: Sequence[int], limits: tuple[float, float] = (0.0, 255.0), *,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes rows as images, whole or not at all: `.npy` an array, `.png` one picture of all side by side.

    Args:
        path: Where to; the folder must exist.
        rows: `(N, P)`.
        shape: (H, W), or (3, H, W) in colour.
        limits: In a picture, what is black and what is white; an array has the numbers as they are.
        overwrite: Replace a file that is there.

    Raises:
        InputError: As for `write_rows`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "images.npy"
        >>> write_images(path, np.zeros((5, 12), np.uint8), (3, 2, 2))
        >>> np.load(path).shape
        (5, 2, 2, 3)
    """
    path = Path(path)
    check_destination(path, overwrite=overwrite, images=True)
    images, content = as_images(rows, shape), io.BytesIO()
    if path.suffix.lower() == ".png":
        from PIL import Image

        low, high = limits
        tones = ((images - low) / max(high - low, 1e-9) * 255).clip(0, 255).round().astype(np.uint8)
        Image.fromarray(_grid(tones)).save(content, "png")
    else:
        np.save(content, np.ascontiguousarray(images), allow_pickle=False)
    write_atomically(path, content.getvalue())


def _grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All of them in about a square, on white, row by row."""
    count, height, width = images.shape[:3]
    across = max(1, round(math.sqrt(count * height / width)))
    down = -(-count // across)
    size = (down * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP, *images.shape[3:])
    canvas = np.full(size, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // across * (height + _GAP), i % across * (width + _GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas
