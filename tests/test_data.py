"""`aevb.data`: every source, every refusal, the law of the draws, and files written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aevb.config import InputError
from aevb.data import Binarized, Data, as_images, load, open_array, read_rows, write_images, write_rows

SHARED = Path(__file__).parents[1].parent / "shared/data"
NAN = float("nan")


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        message = f"{path} is absent; this test checks aevb.data against real data"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


@pytest.fixture(scope="module")
def mnist() -> Data:
    return load(shared("mnist/mnist.npz"))


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def npy(folder: Path, values, name: str = "a.npy") -> Path:
    np.save(folder / name, np.asarray(values))
    return folder / name


def npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "a.npz", **{name: np.asarray(values) for name, values in arrays.items()})
    return folder / "a.npz"


def parquet(folder: Path, columns: dict, name: str = "a.parquet") -> Path:
    pl.DataFrame(columns).write_parquet(folder / name)
    return folder / name


def idx(values, code: int = 8) -> bytes:
    values = np.asarray(values)
    kind = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}[code]
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, code, values.ndim, *values.shape) + values.astype(kind).tobytes()


def same(x: torch.Tensor, y) -> None:
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), rtol=0, atol=0, equal_nan=True)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_digits_are_split_and_keep_their_shape():
    data = load("digits")
    assert (data.name, data.features, data.image_shape, data.total_count) == ("digits", 64, (8, 8), 16)
    assert (data.train.shape, data.test.shape, data.train.dtype) == ((1500, 64), (297, 64), torch.float32)
    assert (data.train.min(), data.train.max()) == (0, 16)
    assert data.train_labels.dtype == torch.int64
    assert data.train_labels[:10].tolist() == list(range(10))
    assert (len(data.train_labels), len(data.test_labels)) == (1500, 297)


def test_mnist(mnist):
    assert (mnist.name, mnist.image_shape, mnist.features) == ("mnist.npz", (28, 28), 784)
    assert (mnist.train.shape, mnist.test.shape) == ((60000, 784), (10000, 784))
    assert mnist.train.dtype == mnist.test.dtype == torch.uint8
    assert abs(mnist.train.sum(dtype=torch.float64).item() / mnist.train.numel() / 255 - 0.13066) < 5e-6
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert len(mnist.constant) == 67  # the pixels that no training image of MNIST touches
    assert mnist.constant[0] == "column 0"


@pytest.mark.parametrize("dot", "-.")
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_folder(tmp_path, dot, zipped):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 7), ("t10k", 3)):
        arrays[split] = rng.integers(0, 256, (n, 4, 5)), rng.integers(0, 10, n)
        for kind, axes, values in zip(("images", "labels"), (3, 1), arrays[split], strict=True):
            content = idx(values)
            name = f"{split}-{kind}{dot}idx{axes}-ubyte" + (".gz" if zipped else "")
            put(tmp_path, name, gzip.compress(content) if zipped else content)
    for source in (tmp_path, f"mnist:{tmp_path}"):
        data = load(source)
        same(data.train, arrays["train"][0].reshape(7, 20))
        same(data.test_labels, arrays["t10k"][1])
        assert (data.name, data.image_shape, data.train.dtype) == (tmp_path.name, (4, 5), torch.uint8)
    (next(tmp_path.glob("t10k-labels*"))).unlink()
    with pytest.raises(InputError, match="lacks t10k-labels; a folder must hold the four IDX files"):
        load(tmp_path)


def test_mnist_prefix_takes_a_file(tmp_path):
    path = npz(tmp_path, x_train=np.eye(3), y_train=[0, 1, 2], x_test=np.ones((2, 3)), y_test=[1, 1])
    same(load(f"mnist:{path}").train, np.eye(3))


@pytest.mark.parametrize("code", [8, 9, 11, 12, 13, 14])
def test_idx_types(tmp_path, code):
    values = np.arange(12).reshape(3, 2, 2)
    for name, content in (("some.idx", idx(values, code)), ("images-ubyte.gz", gzip.compress(idx(values, code)))):
        data = load(put(tmp_path, name, content))
        same(data.train, values.reshape(3, 4))
        assert (data.train.dtype, data.image_shape) == (torch.uint8 if code == 8 else torch.float32, (2, 2))


@pytest.mark.parametrize("names", [("x_train", "x_test"), ("train", "test")])
def test_npz_with_two_parts(tmp_path, names):
    train, test = np.arange(6.0).reshape(3, 2), np.ones((1, 2))
    data = load(npz(tmp_path, **dict(zip(names, (train, test), strict=True)), other=np.zeros(5)))
    same(data.train, train)
    same(data.test, test)
    assert data.train_labels is data.test_labels is None


@pytest.mark.parametrize("rows", ["x", "X", "data"])
@pytest.mark.parametrize("labels", ["y", "labels"])
def test_npz_with_labels(tmp_path, rows, labels):
    data = load(npz(tmp_path, **{rows: np.eye(3), labels: [[2], [0], [1]]}))
    same(data.train, np.eye(3))
    assert data.train_labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.0, NAN, 2.0], [0, -1, 2]),
        ([True, False, True], [1, 0, 1]),
        ([0.5, 1.0, 2.0], None),
        ([np.inf, 1, 2], None),
        (["a", "b", "c"], None),
        ([2**60, 0, 1], None),
    ],
)
def test_labels_are_codes_or_left_out(tmp_path, labels, expected):
    data = load(npz(tmp_path, x=np.eye(3), y=labels))
    assert (None if data.train_labels is None else data.train_labels.tolist()) == expected


def test_npz_with_one_array(tmp_path):
    same(load(npz(tmp_path, anything=np.eye(2))).train, np.eye(2))


def test_numpy_files_are_told_by_content(tmp_path):
    npy(tmp_path, np.eye(3))
    (tmp_path / "a.npy").rename(tmp_path / "b.npz")
    same(load(tmp_path / "b.npz").train, np.eye(3))


def test_real_archives():
    yacht = load(shared("uci_regression/yacht.npz"))
    assert (yacht.train.shape, yacht.train.dtype, yacht.train_labels) == ((308, 6), torch.float32, None)
    optdigits = load(shared("adbench/26_optdigits.npz"))
    assert (optdigits.constant, optdigits.train_labels.unique().tolist()) == (("column 0", "column 39"), [0, 1])
    frey = load(shared("frey_faces/frey_faces.npz"))
    assert (frey.train.shape, frey.image_shape) == ((1965, 560), (28, 20))
    assert abs(frey.train.float().mean().item() - 154.46) < 0.01
    with pytest.raises(InputError, match=r"arrays `train_bits`.*; its rows must be called x_train"):
        load(shared("binarized_mnist/binarized_mnist.npz"))
    cells = load(shared("single_cell/mouse_bladder_2100_counts.npz"))
    assert (tuple(cells.train.shape), len(cells.constant), int(cells.train_labels.max())) == ((2100, 20670), 1591, 16)
    cifar, stored = load(path := shared("cifar10_subset/cifar10_subset.npz")), np.load(path)
    assert (cifar.train.shape, cifar.train.dtype, cifar.image_shape) == ((1000, 3072), torch.uint8, (3, 32, 32))
    same(cifar.train.reshape(-1, 3, 32, 32)[7, 1], stored["x_train"][7, :, :, 1])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([[0, 1], [2, 255]], np.uint8), torch.uint8),
        (np.array([[True, False], [False, True]]), torch.float32),
        (np.array([[1, 2], [3, -4]], np.int64), torch.float32),
        (np.array([[1, 2], [3, 2**24]], np.int64), torch.float32),
        (np.array([[1, 2], [3, 2**24 + 1]], np.int64), torch.float64),
        (np.array([[1, 2], [3, 2**24 + 2]], np.int32), torch.float32),
        (np.array([[0.1, 2], [3, 4]], np.float16), torch.float32),
        (np.array([[0.1, 2], [NAN, 4]]), torch.float32),
        (np.array([[0.1, 2], [3, 1e39]]), torch.float64),
        (np.array([[0.1, 2], [3, 1e-50]]), torch.float64),
        (np.array([[0.1, 2], [3, 1700000000.123]]), torch.float64),
        (np.array([[0.1, 2], [3, 4]], ">f4"), torch.float32),
        (np.asfortranarray([[0.1, 2], [3, 4]]), torch.float32),
        (np.array([[0.1, 2], [3, 4]], np.longdouble), torch.float32),
    ],
)
def test_the_smallest_type_that_loses_nothing(tmp_path, values, dtype):
    x = load(npy(tmp_path, values)).train
    assert x.dtype == dtype
    same(x, torch.from_numpy(values.astype(np.float64)))


def test_parts_share_one_type(tmp_path):
    data = load(npz(tmp_path, train=np.array([[0], [9]], np.uint8), test=np.array([[0.5]])))
    assert data.train.dtype == data.test.dtype == torch.float32


def test_shapes(tmp_path):
    assert load(npy(tmp_path, [1.0, 2.0])).train.shape == (2, 1)
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    data = load(npy(tmp_path, images))
    same(data.train, images.reshape(2, 12))
    assert data.image_shape == (3, 4)


# ---- images ----------------------------------------------------------------------------------------------------------

COLOUR = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
PLANES = COLOUR.transpose(0, 3, 1, 2).reshape(4, 90)
GREY = COLOUR[..., 0]


def picture(folder: Path, name: str, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_colour_is_plane_after_plane_as_the_convolutions_take_it(tmp_path):
    data = load(npz(tmp_path, x_train=COLOUR, y_train=range(4), x_test=COLOUR[:1], y_test=[0]))
    assert (data.image_shape, data.train.dtype, data.describe()["image_shape"]) == ((3, 5, 6), torch.uint8, [3, 5, 6])
    same(data.train, PLANES)
    same(data.test, PLANES[:1])
    np.testing.assert_array_equal(as_images(data.train.numpy(), data.image_shape), COLOUR)
    one = load(npy(tmp_path, COLOUR[..., :1]))
    assert one.image_shape == (5, 6)
    same(one.train, GREY.reshape(4, 30))
    np.testing.assert_array_equal(as_images(one.train.numpy(), one.image_shape), GREY)
    holed = np.where(COLOUR == COLOUR[0, 0, 0, 0], NAN, COLOUR)
    same(load(npy(tmp_path, holed)).train, holed.transpose(0, 3, 1, 2).reshape(4, 90))
    same(load(npy(tmp_path, COLOUR / 255)).train, PLANES / 255)
    shape = open_array(npy(tmp_path, COLOUR)).take(torch.tensor([1]))["x"]
    same(shape, COLOUR[[1]])  # a file larger than memory is handed on as it is


def test_a_folder_of_images_of_any_form(tmp_path):
    flat = tmp_path / "flat"
    picture(flat, "a.png", GREY[0])
    picture(flat, "c.bmp", GREY[1])
    picture(flat, "b.TIF", GREY[2])
    picture(flat, ".hidden.png", GREY[3, :2])
    put(flat, "about.txt", "no image")
    data = load(flat)
    assert (data.name, data.image_shape, data.train.dtype, data.train_labels) == ("flat", (5, 6), torch.uint8, None)
    same(data.train, GREY[[0, 2, 1]].reshape(3, 30))
    picture(flat, "d.png", GREY[3], "1")
    assert set(load(flat).train[3].tolist()) == {0, 255}
    # One in colour, and all are; a palette becomes colours, transparency that is nowhere used goes.
    picture(flat, "e.webp", COLOUR[0], lossless=True)
    picture(flat, "f.png", np.dstack([COLOUR[1], np.full((5, 6), 255, np.uint8)]))
    palette = picture(flat, "g.png", COLOUR[2], "P")
    colour = load(flat)
    assert colour.image_shape == (3, 5, 6)
    same(colour.train[:3], GREY[[0, 2, 1]].reshape(3, 30).repeat(3, 0).reshape(3, 90))
    same(colour.train[4:6], PLANES[:2])
    same(colour.train[6], np.asarray(Image.open(palette).convert("RGB")).transpose(2, 0, 1).flatten())


def test_a_photograph_is_turned_as_a_viewer_turns_it(tmp_path):
    told = Image.Exif()
    told[0x0112] = 6  # to be turned clockwise by a quarter
    lying = np.zeros((16, 8, 3), np.uint8)
    lying[:8] = 255
    path = picture(tmp_path, "a.jpg", lying, exif=told, quality=95)
    standing = read_rows(path, features=384, image_shape=(3, 8, 16)).reshape(3, 8, 16)
    assert standing[..., 8:].min() > 200
    assert standing[..., :8].max() < 50


def test_sub_folders_are_classes_or_parts(tmp_path):
    for i, name in enumerate(("cats/2.png", "ants/deep/1.png", "cats/1.png", "dogs/0.png")):
        picture(tmp_path / "all", name, GREY[i])
    data = load(tmp_path / "all")
    same(data.train, GREY[[1, 2, 0, 3]].reshape(4, 30))
    same(data.train_labels, [0, 1, 1, 2])
    assert data.classes == ("ants", "cats", "dogs")
    for i, name in enumerate(("train/cats/1.png", "train/dogs/1.png", "test/dogs/1.png")):
        picture(tmp_path / "parted", name, GREY[i])
    parted = load(tmp_path / "parted")
    same(parted.train, GREY[:2].reshape(2, 30))
    same(parted.test, GREY[2:3].reshape(1, 30))
    assert (parted.train_labels.tolist(), parted.test_labels.tolist()) == ([0, 1], [1])
    assert parted.classes == ("cats", "dogs")


def _broken(folder: Path) -> None:
    whole = picture(folder, "a.png", COLOUR[0].repeat(20, 0)).read_bytes()
    put(folder, "b.png", whole[: len(whole) // 2])


def _sixteen(folder: Path, colour: bool = False) -> None:
    if not colour:
        picture(folder, "a.png", GREY[0].astype(np.uint16) * 100)
        return
    # Pillow writes none: an image of 2 x 1 pixels by hand.
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(12))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    put(folder, "a.png", content)


IMAGES_REFUSED = {
    "no image": (lambda f: put(f, "a.txt", "x"), r"holds no images \(\.png, .*Give a folder that does"),
    "both": (
        lambda f: (picture(f, "a.png", GREY[0]), picture(f, "cats/b.png", GREY[1])),
        r"both by themselves \(`a\.png`\) and in sub-folders \(`.*cats/b\.png`\).*Put all into sub-folders, or none",
    ),
    "beside its parts": (
        lambda f: [picture(f, name, GREY[0]) for name in ("train/a.png", "test/b.png", "c.png")],
        r"has `c\.png` beside its parts train and test\. Move it into one of the two",
    ),
    "sizes": (
        lambda f: (picture(f, "a.png", GREY[0]), picture(f, "b.png", GREY[1, :4])),
        r"`.*b\.png` is 6 pixels wide and 4 high, `.*a\.png` 6 and 5; all images must have one size\. Crop or resize",
    ),
    "cut short": (_broken, r"`.*b\.png` cannot be read as an image: .*damaged, cut short"),
    "no image in it": (lambda f: put(f, "a.jpg", "x" * 99), r"`.*a\.jpg` cannot be read as an image: "),
    "empty file": (lambda f: put(f, "a.jpg", ""), r"`.*a\.jpg` is empty"),
    "16 bits": (_sixteen, r"`.*a\.png` has more than 8 bits a channel \(I;16\).*Convert it to 8 bits, or save its"),
    "48 bits": (lambda f: _sixteen(f, colour=True), r"`.*a\.png` has more than 8 bits a channel \(RGB;16B\)"),
    "floats": (lambda f: picture(f, "a.tif", GREY[0].astype(np.float32)), r"more than 8 bits a channel \(F\)"),
    "transparent": (
        lambda f: picture(f, "a.png", np.dstack([COLOUR[1], np.full((5, 6), 254, np.uint8)])),
        r"`.*a\.png` has transparent pixels.*Put it on a background first",
    ),
    "a colour": (lambda f: picture(f, "a.png", COLOUR[0] // 255, transparency=(0, 0, 0)), "transparent pixels"),
    "inks": (lambda f: picture(f, "a.jpg", COLOUR[0], "CMYK"), r"a\.jpg` is a CMYK image; .*Convert it to RGB"),
    "frames": (
        lambda f: picture(f, "a.tif", GREY[0], save_all=True, append_images=[Image.fromarray(GREY[1])]),
        r"`.*a\.tif` holds 2 frames; a file must hold one image",
    ),
    "one": (lambda f: picture(f, "a.png", GREY[0]), r"has one row; a model of one row would only repeat it"),
    "alike": (lambda f: [picture(f, name, GREY[0]) for name in ("a.png", "b.png")], "has only constant columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES_REFUSED)
def test_folders_that_hold_no_data_of_ours(tmp_path, name):
    make, told = IMAGES_REFUSED[name]
    make(tmp_path)
    with pytest.raises(InputError, match=told):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (COLOUR * 1.5, r"has values from .* in float64; images are bytes, floats in \[0, 1\].*x\.astype\(np\.uint8\)"),
        (COLOUR / 127.5 - 1, "has values from -1 to .* in float64; images are bytes"),
        (COLOUR.astype(np.int64) - 1, "has values from -1 to .* in int64"),
        (COLOUR.astype(np.uint16) * 2, "in uint16; images are bytes"),
        (np.zeros((2, 5, 6, 4), np.uint8), r"shape \(2, 5, 6, 4\); images in four axes .* with 3 channels, or 1"),
        (np.zeros((2, 3, 5, 6), np.uint8), r"put the channels last; x\.transpose\(0, 2, 3, 1\) puts them there"),
        (np.zeros((2, 2, 2, 2, 3)), r"shape \(2, 2, 2, 2, 3\); it must be .* colour images \(rows, height, width, 3\)"),
        (np.zeros((2, 2, 2, 3), complex), "real numbers are needed"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, values, told):
    with pytest.raises(InputError, match=told):
        load(npy(tmp_path, values))


def test_new_images_are_read_as_the_model_takes_them(tmp_path):
    colour = {"features": 90, "image_shape": (3, 5, 6)}
    paths = [picture(tmp_path / "in", f"{i}.png", COLOUR[i]) for i in range(4)]
    same(read_rows(tmp_path / "in", **colour), PLANES)
    same(read_rows(paths[2], **colour), PLANES[[2]])
    same(read_rows(npy(tmp_path, COLOUR), **colour), PLANES)
    same(read_rows(npy(tmp_path, PLANES), **colour), PLANES)  # flat ones are in the order of the model
    same(read_rows(npy(tmp_path, GREY), **colour), GREY.reshape(4, 30).repeat(3, 0).reshape(4, 90))
    told = r"images of 5 x 6 pixels \(width x height\) in grey; the model was .* 6 x 5 pixels .* in grey\. Crop, resize"
    with pytest.raises(InputError, match=told):
        read_rows(npy(tmp_path, GREY.transpose(0, 2, 1)), features=30, image_shape=(5, 6))
    with pytest.raises(InputError, match=r"in colour; the model was trained on images of 6 x 5 pixels .* in grey"):
        read_rows(tmp_path / "in", features=30, image_shape=(5, 6))


def test_images_are_written_as_they_are_read(tmp_path):
    write_images(tmp_path / "a.npy", PLANES, (3, 5, 6))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), COLOUR)
    write_images(tmp_path / "a.png", PLANES[:3], (3, 5, 6))
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * 5 + 2, 2 * 6 + 2, 3)
    for at, image in zip(((0, 0), (0, 8), (7, 0)), COLOUR, strict=False):
        np.testing.assert_array_equal(grid[at[0] : at[0] + 5, at[1] : at[1] + 6], image)
    assert (grid[7:, 8:] == 255).all()
    write_images(tmp_path / "b.png", np.array([[-1.0, 0.0, 1.0, 3.0]]), (2, 2), (0.0, 2.0))
    assert np.asarray(Image.open(tmp_path / "b.png")).tolist() == [[0, 0], [128, 255]]
    with pytest.raises(InputError, match=r"must end in \.npy, \.csv, \.parquet, \.png; got '\.gif'"):
        write_images(tmp_path / "a.gif", PLANES, (3, 5, 6))
    with pytest.raises(InputError, match="exists already"):
        write_images(tmp_path / "a.png", PLANES, (3, 5, 6))


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    path = put(tmp_path, "a.csv", "a,b , c\n1,2.5,true\n-3e2, 4 ,False\n,NA,NaN\nnan,null,?\n")
    data = load(path)
    assert (data.name, data.columns, data.train.dtype) == ("a.csv", ("a", "b", "c"), torch.float32)
    same(data.train, [[1, 2.5, 1], [-300, 4, 0], [NAN] * 3, [NAN] * 3])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa,b\n1,2\n3,4",
        b"a,b\r\n1,2\r\n3,4\r\n",
        b"a,b\r1,2\r3,4\r",
        b"a,b\n1,2\n3,4\n\n\n",
        b'"a","b"\n"1",2\n3,"4"\n',
    ],
)
def test_csv_dialects(tmp_path, content):
    data = load(put(tmp_path, "a.csv", content))
    assert data.columns == ("a", "b")
    same(data.train, [[1, 2], [3, 4]])


def test_csv_without_a_header(tmp_path):
    data = load(put(tmp_path, "a.CSV", "1,?\n2,5\n3,6\n"))
    assert data.columns == ("x1", "x2")
    same(data.train, [[1, NAN], [2, 5], [3, 6]])


def test_csv_of_one_column_may_have_blank_lines(tmp_path):
    same(load(put(tmp_path, "a.csv", "a\n1\n\n2\n")).train, [[1], [NAN], [2]])


def test_parquet(tmp_path):
    columns = {"i": [1, None, 3], "f": [0.5, NAN, None], "b": [True, False, None], "n": [None] * 3}
    frame = pl.DataFrame(columns).with_columns(pl.Series("d", ["1.5", "2", None]).cast(pl.Decimal(10, 2)))
    frame.write_parquet(tmp_path / "a[*].parquet")
    data = load(tmp_path / "a[*].parquet")
    assert (data.columns, data.constant) == (("i", "f", "b", "n", "d"), ("f", "n"))
    same(data.train, [[1, 0.5, 1, NAN, 1.5], [NAN, NAN, 0, NAN, 2], [3, NAN, NAN, NAN, NAN]])


def test_horse_colic_has_its_holes(tmp_path):
    content = lzma.open(shared("tabular/horse_colic.csv.xz")).read()
    data = load(put(tmp_path, "horse.csv", content))
    assert data.train.shape == (300, 28)
    assert data.describe()["missing"] == {"train": 1605, "test": None}
    assert data.columns == tuple(f"a{j + 1}" for j in range(28))


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [("abalone", "sex", "M"), ("yeast", "name", "ADT1_YEAST"), ("auto_imports", "a3", "alfa-romero")],
)
def test_a_text_column_is_named_with_its_first_text(tmp_path, name, column, value):
    path = put(tmp_path, f"{name}.csv", lzma.open(shared(f"tabular/{name}.csv.xz")).read())
    with pytest.raises(InputError, match=rf"{name}.csv`, column `{column}`: '{value}' in row 0 .*Remove the column"):
        load(path)


@pytest.mark.parametrize("name", ["banknote", "pima_diabetes", "winequality_red", "breast_cancer_wisconsin"])
def test_numeric_tables_agree_with_numpy(tmp_path, name):
    content = lzma.open(shared(f"tabular/{name}.csv.xz")).read()
    expected = np.genfromtxt(io.BytesIO(content), delimiter=",", skip_header=1)
    same(load(put(tmp_path, "a.csv", content)).train, expected.astype(np.float32))


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "text": ("a.csv", "a,b\n1,2\n3,x\n4,y\n", r"column `b`: 'x' in row 1 \(counting from 0\) is not a number"),
    "semicolons": ("a.csv", "a;b\n1;2\n3;4\n", "cells separated by commas"),
    "long line": ("a.csv", "a,b\n1,2\n3,4,5\n", "line 3: 3 cells where the first line has 2"),
    "short line": ("a.csv", "a,b\n1,2\n\n3\n", "line 3: 0 cells where the first line has 2"),
    "line after a quoted break": ("a.csv", 'a,"b\nc"\n1,2\n3\n', "line 4: 1 cells"),
    "empty": ("a.csv", "", "is empty"),
    "blank": ("a.csv", "\n\n", "starts with a blank line"),
    "blank first": ("a.csv", "\na,b\n1,2\n", "starts with a blank line"),
    "header only": ("a.csv", "a,b\n", r"shape \(0, 2\); it must be"),
    "doubled name": ("a.csv", "a,b,a\n1,2,3\n4,5,6\n", "column name `a` more than once"),
    "name of two lines": ("a.csv", 'a,"b\nc"\n1,2\n3,x\n', r"column `b\\nc`: 'x' in row 1"),
    "nameless": ("a.csv", ",a\n0,2\n1,3\n", r"column 0 \(counting from 0\) has no name.*index=False"),
    "infinite": ("a.csv", "a,b\n1,2\n3,-inf\n", r"row 1 \(counting from 0\), b, is infinite"),
    "overflow": ("a.csv", "a,b\n1e999,2\n3,4\n", r"row 0 \(counting from 0\), a, is infinite"),
    "not UTF-8": ("a.csv", b"a,b\n1,\xff\n", "cannot be read as a CSV file in UTF-8"),
    "open quote": ("a.csv", 'a,b\n"1,2\n3,4\n', "cannot be read as a CSV"),
    "text after quote": ("a.csv", 'a,b\n1,"2"x\n3,4\n', "cannot be read as a CSV"),
    "one row": ("a.csv", "a,b\n1,2\n", "has one row; a model of one row"),
    "constant": ("a.csv", "a,b\n1,2\n1,2\n", "has only constant columns"),
    "nothing observed": ("a.csv", "a\n?\n?\n", "has only constant columns"),
    "not NumPy": ("a.npy", b"hello, world", "cannot be read as NumPy data"),
    "not a zip": ("a.npz", b"PK\x03\x04 and no more", "cannot be read as NumPy data"),
    "not Parquet": ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
    "unknown": ("a.xlsx", b"hello, world", "in no known format. Convert it to one of these: .npy, .npz, .csv"),
    "no suffix": ("data", b"\0\0\x07\x01aaaa", "in no known format"),
    "short idx": ("a.idx", idx([[1, 2], [3, 4]])[:-1], r"promises 4 bytes .* shape \(2, 2\), and fewer follow"),
    "long idx": ("a.idx", idx([[1, 2], [3, 4]]) + b"0", "more follow"),
    "vast idx": ("a.idx", b"\0\0\x0e\x03" + b"\xff" * 12 + b"12345678", "fewer follow"),
    "cut idx header": ("a.idx", b"\0\0\x08\x03\0\0", "cannot be read as an IDX file"),
    "cut gzip": ("a.idx.gz", gzip.compress(idx(np.eye(9)))[:-9], "cannot be read as an IDX file"),
    "gzip of text": ("a.csv.gz", gzip.compress(b"a,b\n1,2\n"), "in no known format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    name, content, message = REFUSED[case]
    path = put(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[1j]]), "entries of type complex128; real numbers are needed"),
        (np.array([["a"]]), "entries of type <U1"),
        (np.array(["2020-01-01"], "M8[D]"), r"entries of type datetime64\[D\]"),
        (np.zeros(3, [("a", "f4")]), "entries of type"),
        (np.array(3.0), r"shape \(\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.zeros((2, 2, 2, 2)), r"shape \(2, 2, 2, 2\)"),
        (np.array([[0, 1], [2, np.inf]]), r"row 1 \(counting from 0\), column 1, is infinite"),
        (np.array([[0], [2**53 + 1]]), r"whole numbers beyond 2\*\*53"),
        (np.array([[0], [2**64 - 1]], np.uint64), r"whole numbers beyond 2\*\*53"),
    ],
)
def test_refused_arrays(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        load(npy(tmp_path, values))


def test_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([Trap()], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match="holds pickled Python objects"):
            load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 10)})
    content = head.getvalue()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for path in (tmp_path / "a.npz", put(tmp_path, "a.npy", content)):
        with pytest.raises(InputError, match="promises shape"):
            load(path)


def test_refused_archives(tmp_path):
    with pytest.raises(InputError, match="holds the arrays `a`, `b`; its rows must be called x_train"):
        load(npz(tmp_path, a=[1, 2], b=[3, 4]))
    with pytest.raises(InputError, match=r"holds the arrays `x`, `data`; .*one of these names only"):
        load(npz(tmp_path, x=[1, 2], data=[3, 4]))
    with pytest.raises(InputError, match="holds no array; its rows must be called x_train"):
        load(npz(tmp_path))
    for labels in ([1, 2, 3], 1, [[1, 2], [3, 4]]):
        with pytest.raises(InputError, match="one label a row"):
            load(npz(tmp_path, x=np.eye(2), y=labels))
    with pytest.raises(InputError, match=r"rows of 3 entries .*they must agree"):
        load(npz(tmp_path, train=np.eye(2), test=np.eye(3)))
    with pytest.raises(InputError, match="they must agree"):
        load(npz(tmp_path, train=np.eye(6).reshape(3, 3, 4), test=np.eye(6).reshape(3, 2, 6)))
    with pytest.raises(InputError, match=r"`test` in .* has shape \(0, 2\)"):
        load(npz(tmp_path, train=np.eye(2), test=np.empty((0, 2))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b"], r"column `c`: 'a' in row 0"),
        ([None, "b"], r"column `c`: 'b' in row 1"),
        ([[1], [2]], "column `c`"),
        (pl.Series([None, None], dtype=pl.String), "column `c`: 'type String'"),
        ([2**60, 1], r"column `c` has whole numbers beyond 2\*\*53"),
        ([np.inf, 1.0], r"row 0 \(counting from 0\), c, is infinite"),
        ([], r"shape \(0, 1\)"),
    ],
)
def test_refused_parquet(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        load(parquet(tmp_path, {"c": values}))


def test_a_panic_of_polars_is_a_damaged_file(tmp_path, monkeypatch):
    def panic(*_: object) -> None:
        raise pl.exceptions.PanicException("assertion failed\n  left: 0")

    path = parquet(tmp_path, {"a": [1, 2]})
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(InputError, match=r"cannot be read as Parquet: assertion failed\. The file is damaged"):
        load(path)


def test_places_that_hold_no_data(tmp_path, monkeypatch):
    for missing in ("nowhere.csv", "nowhere.npy", "nowhere/a.parquet", "nowhere", "mnist:nowhere"):
        with pytest.raises(InputError, match=r"does not exist. Check the spelling"):
            load(tmp_path / missing if ":" not in missing else missing)
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match="lacks train-images, train-labels, t10k-images, t10k-labels"):
        load(f"mnist:{tmp_path / 'a.csv'}")
    with pytest.raises(InputError, match=r"holds no images \(\.png, .* and none of the four IDX files of MNIST"):
        load(tmp_path / "a.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="is not a regular file"):
        load(tmp_path / "pipe.csv")
    for odd in ("a\0b.csv", "x" * 5000 + ".npy"):
        with pytest.raises(InputError, match="cannot be opened"):
            load(odd)
    path = npy(tmp_path, np.eye(2))

    def forbid(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("aevb.data.files.os.stat", forbid)
    with pytest.raises(InputError, match=r"may not be read\. Change its permissions"):
        load(path)


def test_options_are_checked():
    with pytest.raises(InputError, match="`binarize` must be one of none, static, epoch; got 'always'"):
        load("digits", binarize="always")
    for seed in (-1, 0.5):
        with pytest.raises(InputError, match="`seed` must be a whole number"):
            load("digits", seed=seed)
    with pytest.raises(InputError, match="`part` must be train or test"):
        read_rows("digits", part="both")


# Bytes that nearly are files: whatever comes of them is an InputError or a data set.


def _valid() -> dict[str, bytes]:
    numbers = np.arange(40.0).reshape(8, 5)
    array, archive, packed, table = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, numbers)
    np.savez(archive, x=numbers, y=np.arange(8))
    np.savez_compressed(packed, x=numbers)
    pl.DataFrame(numbers, schema=list("abcde")).write_parquet(table)
    lines = b'a,b,"c"\n1,2.5,true\n?,NA,"4"\n-1e3,nan,0\n'
    return {
        "a.npy": array.getvalue(),
        "a.npz": archive.getvalue(),
        "b.npz": packed.getvalue(),
        "a.csv": lines,
        "a.parquet": table.getvalue(),
        "a-ubyte": idx(numbers),
        "a-ubyte.gz": gzip.compress(idx(numbers)),
    }


VALID = _valid()


def survives(folder: Path, name: str, content: bytes) -> None:
    path = put(folder, name, content)
    for read in (load, read_rows):
        try:
            x = read(path)
        except InputError as error:
            message = str(error)
        else:
            message = ""
            assert (x.train if isinstance(x, Data) else x).ndim == 2
        assert len(message.splitlines()) <= 1


FUZZ = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # files overwrite each other in one folder
)


@pytest.mark.parametrize("name", VALID)
def test_truncated_files(tmp_path, name):
    content = VALID[name]
    for length in {*range(0, len(content), max(1, len(content) // 60)), len(content) - 1, len(content)}:
        survives(tmp_path, name, content[:length])
    if name != "a.csv":  # a table without its last byte is a table
        with pytest.raises(InputError):
            load(put(tmp_path, name, content[:-1]))


@pytest.mark.parametrize("name", VALID)
@FUZZ
@given(content=st.binary(max_size=200), head=st.integers(0, 12))
def test_random_bytes(tmp_path, name, content, head):
    survives(tmp_path, name, VALID[name][:head] + content)


# Not Parquet, which is spared: a changed byte inside it can end the process within polars, where no error is raised.
@pytest.mark.parametrize("name", [name for name in VALID if name != "a.parquet"])
@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(tmp_path, name, changes):
    content = bytearray(VALID[name])
    for place, byte in changes:
        content[place % len(content)] = byte
    survives(tmp_path, name, bytes(content))


@FUZZ
@given(text=st.text(st.sampled_from('01ab.,"\n\r \t?-eN;\0é'), max_size=60))
def test_random_text(tmp_path, text):
    survives(tmp_path, "a.csv", text.encode())


# ---- binarisation ----------------------------------------------------------------------------------------------------


def grey_images(n: int = 500) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 6), dtype=np.uint8)


def z_scores(draws: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """Of the mean of all draws and of each column's, against Bernoulli(grey); grey in [0, 1]."""
    error, variance = draws.double() - grey, (grey * (1 - grey)).double()
    return torch.cat([(error.sum() / variance.sum().sqrt()).reshape(1), error.sum(0) / variance.sum(0).sqrt()])


def test_static_draws_follow_their_grey(tmp_path, mnist):
    path = npz(tmp_path, train=mnist.train[:5000], test=mnist.test[:5000])
    data = load(path, binarize="static", seed=3, drop_constant=True)
    assert set(data.train.unique().tolist()) == {0, 1}
    assert (data.train.dtype, data.test.dtype) == (torch.uint8, torch.uint8)
    for drawn, source in ((data.train, mnist.train[:5000]), (data.test, mnist.test[:5000])):
        grey = source[:, list(data.kept)]
        assert not drawn[grey == 0].any()
        assert drawn[grey == 255].all()
        expected = grey.double() / 255
        error, variance = (drawn - expected).sum(), (expected * (1 - expected)).sum()
        assert error.abs() < 4 * variance.sqrt()


def test_static_draws_are_keyed_by_the_seed_alone(tmp_path):
    path = npz(tmp_path, train=grey_images(), test=grey_images())
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = load(path, binarize="static", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.rand(3)
    again, other = load(path, binarize="static", seed=5), load(path, binarize="static", seed=6)
    same(first.train, again.train)
    same(first.test, again.test)
    assert (first.train != other.train).any()
    assert (first.train != first.test).any()  # the same grey values, another stream
    same(read_rows(path, binarize="static", seed=5), first.test)
    same(read_rows(path, binarize="static", seed=5, part="train"), first.train)
    assert z_scores(first.train, torch.from_numpy(grey_images()) / 255).abs().max() < 4


def test_epoch_draws_anew(tmp_path):
    path = npz(tmp_path, train=grey_images(), test=grey_images(), y=np.zeros(500))
    data = load(path, binarize="epoch", seed=5)
    rows = data.training()
    assert isinstance(rows, Binarized)
    assert len(rows) == 500
    same(data.train, grey_images())
    same(data.test, load(path, binarize="static", seed=5).test)
    indices = torch.tensor([3, 1, 3, 499])
    torch.manual_seed(0)
    first, second = rows.take(indices)["x"], rows.take(indices)["x"]
    torch.manual_seed(0)
    same(first, rows.take(indices)["x"])
    assert first.dtype == torch.float32
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert (first != second).any()
    repeated = torch.arange(6).repeat(20_000)
    draws = rows.take(repeated)["x"]
    grey = (torch.from_numpy(grey_images()) / 255)[:6]
    standard_error = (grey * (1 - grey) / 20_000).sqrt()
    mean = draws.reshape(20_000, 6, 6).mean(0)
    assert ((mean - grey).abs() <= 4 * standard_error).all()


def test_every_grey_value_has_its_share_of_sixteen_bits(monkeypatch):
    """All 65,536 values of the noise, once each: probabilities to 2e-5, exactly 0 and 1 at the ends."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    monkeypatch.setattr("aevb.data.binary._sixteen_bits", lambda like: every.unsqueeze(1).expand(like.shape))
    rows = Binarized(torch.arange(256).to(torch.uint8).unsqueeze(0))
    share = rows.take(torch.zeros(2**16, dtype=torch.int64))["x"].double().mean(0)
    assert ((share - torch.arange(256).double() / 255).abs() < 2e-5).all()
    assert share[0] == 0
    assert share[255] == 1


def test_black_and_white_are_certain():
    rows = Binarized(torch.tensor([[0, 255]], dtype=torch.uint8), node="pixels")
    draws = rows.take(torch.zeros(100_000, dtype=torch.int64))["pixels"]
    assert (draws[:, 0] == 0).all()
    assert (draws[:, 1] == 1).all()


def test_floats_and_counts_are_grey_too(tmp_path):
    grey = np.random.default_rng(2).random((4000, 3))
    data = load(npy(tmp_path, grey), binarize="static")
    assert z_scores(data.train, torch.from_numpy(grey)).abs().max() < 4
    digits, drawn = load("digits"), load("digits", binarize="static")
    assert drawn.total_count is None
    varied = [j for j in range(64) if f"column {j}" not in digits.constant]
    assert z_scores(drawn.train[:, varied], digits.train[:, varied] / 16).abs().max() < 4
    assert load("digits", binarize="epoch").training().grey.max() == 1
    same(read_rows("digits", binarize="epoch", seed=0), load("digits", binarize="epoch").test)


def test_missing_pixels(tmp_path):
    grey = np.random.default_rng(3).random((50, 4))
    grey[::7, 1] = NAN
    path = npy(tmp_path, grey)
    data = load(path, binarize="static")
    same(data.train.isnan(), np.isnan(grey))
    assert set(data.train[~data.train.isnan()].tolist()) == {0.0, 1.0}
    assert data.train.dtype == torch.float32
    with pytest.raises(InputError, match="has 8 missing entries, which binarize='epoch' cannot keep"):
        load(path, binarize="epoch")
    with pytest.raises(InputError, match="`grey` has missing values"):
        Binarized(torch.tensor([[NAN]]))


@pytest.mark.parametrize("binarize", ["static", "epoch"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 1], [1, 0]], np.uint8), "is already binary"),
        (np.array([[0, 1], [NAN, 0]]), "is already binary"),
        (np.array([[0, 0.5], [1.5, 0]]), r"values from 0 to 1.5; to be binarised it must hold uint8 .* \[0, 1\]"),
        (np.array([[0, 0.5], [-0.5, 0]]), "values from -0.5 to 0.5"),
        (np.array([[0, 255], [7, 0]], np.int32), "values from 0 to 255"),
    ],
)
def test_only_grey_is_binarised(tmp_path, binarize, values, message):
    with pytest.raises(InputError, match=message):
        load(npy(tmp_path, values), binarize=binarize)


@pytest.mark.parametrize("grey", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), torch.full((2, 2), 2.0)])
def test_binarized_checks_its_grey(grey):
    with pytest.raises(InputError, match="`grey`"):
        Binarized(grey)


# ---- constant columns, records ---------------------------------------------------------------------------------------


def test_constant_columns(tmp_path):
    path = put(tmp_path, "a.csv", "a,b,c,d,e\n1,7,2,,3\n2,7,2,?,3\n3,,2,,4\n")
    data = load(path)
    assert (data.constant, data.dropped, data.kept, data.features) == (("b", "c", "d"), (), None, 5)
    less = load(path, drop_constant=True)
    assert (less.constant, less.dropped, less.kept) == ((), ("b", "c", "d"), (0, 4))
    assert less.columns == ("a", "e")
    same(less.train, [[1, 3], [2, 3], [3, 4]])
    varied = load(put(tmp_path, "b.csv", "a,b\n1,2\n2,3\n"), drop_constant=True)
    assert (varied.kept, varied.dropped) == (None, ())


def test_constant_columns_go_from_both_parts():
    full, less = load("digits"), load("digits", drop_constant=True)
    assert less.dropped == ("column 0", "column 32", "column 39")
    assert (less.train.shape, less.test.shape, less.image_shape) == ((1500, 61), (297, 61), None)
    same(less.test, full.test[:, list(less.kept)])
    same(read_rows("digits", kept=less.kept, features=61, dropped=less.dropped), less.test)


def test_a_grey_constant_is_none_once_drawn_anew(tmp_path):
    grey = np.array([[0, 128, 255, 9], [0, 128, 255, 200]], np.uint8)
    assert load(npy(tmp_path, grey)).constant == ("column 0", "column 1", "column 2")
    assert load(npy(tmp_path, grey), binarize="epoch").constant == ("column 0", "column 2")


def test_describe(tmp_path):
    path = put(tmp_path, "a.csv", "a,b\n1,2\n?,4\n5,4\n")
    record = load(path).describe()
    assert json.loads(json.dumps(record)) == record
    assert (record["name"], record["rows"], record["features"]) == ("a.csv", {"train": 3, "test": None}, 2)
    assert record["missing"] == {"train": 1, "test": None}
    assert record["columns"] == ["a", "b"]
    assert record["sha256"]["test"] is None
    assert len(record["sha256"]["train"]) == 64
    assert load(path).describe() == record
    prints = {record["sha256"]["train"]}
    for content in ("a,b\n1,2\n?,4\n5,5\n", "a\n1\n2\n?\n4\n5\n4\n", "a,b\n1,2\n4,?\n5,4\n"):
        prints.add(load(put(tmp_path, "b.csv", content)).describe()["sha256"]["train"])
    prints.add(load(npy(tmp_path, np.array([[1, 2], [3, 4]], np.uint8))).describe()["sha256"]["train"])
    prints.add(load(npy(tmp_path, np.array([[1, 2], [3, 4]], np.float32))).describe()["sha256"]["train"])
    assert len(prints) == 6


def test_describe_tells_how_pixels_were_drawn():
    words = [load("digits", binarize=how, seed=9).describe()["binarize"] for how in ("none", "static", "epoch")]
    assert words[0] == "none"
    assert "drawn once from Bernoulli(grey), seed 9" in words[1]
    assert "train pixels drawn anew" in words[2]


def test_training_takes_what_fit_takes():
    data = load("digits")
    assert data.training()["x"] is data.train


def test_data_checks_its_parts():
    x = torch.eye(3)
    with pytest.raises(InputError, match=r"`train` must be \(rows, columns\)"):
        Data(name="a", train=torch.zeros(2, 3, 4))
    with pytest.raises(InputError, match="`test` must be"):
        Data(name="a", train=x, test=torch.eye(2))
    with pytest.raises(InputError, match="`columns` must have 3 names"):
        Data(name="a", train=x, columns=("a",))


def test_importing_reads_no_optional_package():
    names = ("polars", "sklearn", "matplotlib", "PIL")
    code = f"import sys, aevb.data; print([name for name in {names} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# ---- rows for a trained model ----------------------------------------------------------------------------------------


def test_rows_are_matched_by_name(tmp_path):
    path = put(tmp_path, "new.csv", "c,a,b\n3,1,?\n")
    same(read_rows(path, columns=["a", "b", "c"]), [[1, NAN, 3]])
    with pytest.raises(InputError, match=r"lacks the columns `d`, `e`; the model needs all 4"):
        read_rows(path, columns=["a", "b", "d", "e"])
    with pytest.raises(InputError, match=r"has the columns `c`, `b`, unknown to the model. Remove them"):
        read_rows(path, columns=["a"])


def test_rows_are_matched_by_count_without_names(tmp_path):
    path = npy(tmp_path, [[1.0, 2.0, 3.0]])
    same(read_rows(path), [[1, 2, 3]])
    same(read_rows(path, features=3), [[1, 2, 3]])
    same(read_rows(path, columns=["a", "b", "c"]), [[1, 2, 3]])
    bare = put(tmp_path, "bare.csv", "1,2,3\n")
    same(read_rows(bare, columns=["a", "b", "c"], features=3), [[1, 2, 3]])
    for wanted in ({"features": 4}, {"columns": ["a", "b"]}, {"kept": [0, 3]}):
        with pytest.raises(InputError, match="has 3 columns; the model was trained on"):
            read_rows(path, **wanted)


def test_rows_of_a_model_without_its_constant_columns(tmp_path):
    model = load(put(tmp_path, "train.csv", "a,k,b,l\n1,0,2,5\n3,0,4,5\n"), drop_constant=True)
    fits = {"columns": model.columns, "kept": model.kept, "features": model.features}
    assert fits == {"columns": ("a", "b"), "kept": (0, 2), "features": 2}
    as_trained = put(tmp_path, "new.csv", "a,k,b,l\n7,0,8,5\n")
    for extra in ({}, {"dropped": model.dropped}):
        same(read_rows(as_trained, **fits, **extra), [[7, 8]])
        same(read_rows(put(tmp_path, "less.csv", "b,a\n8,7\n"), **fits, **extra), [[7, 8]])
        same(read_rows(npy(tmp_path, [[7.0, 0, 8, 5]]), **fits, **extra), [[7, 8]])
        same(read_rows(npy(tmp_path, [[7.0, 8]]), **fits, **extra), [[7, 8]])
    same(read_rows(put(tmp_path, "order.csv", "l,b,a\n5,8,7\n"), **fits, dropped=model.dropped), [[7, 8]])
    with pytest.raises(InputError, match="has the columns `m`, unknown"):
        read_rows(put(tmp_path, "more.csv", "a,k,b,m\n7,0,8,5\n"), **fits, dropped=model.dropped)
    with pytest.raises(InputError, match=r"has 5 columns; the model was trained on 2 \(4 before constant ones"):
        read_rows(npy(tmp_path, np.ones((1, 5))), **fits, dropped=model.dropped)


def test_rows_are_those_of_the_test_part_unless_asked(tmp_path):
    path = npz(tmp_path, train=np.eye(2), test=np.ones((1, 2)))
    same(read_rows(path), [[1, 1]])
    same(read_rows(path, part="train"), np.eye(2))


# ---- writing ---------------------------------------------------------------------------------------------------------


def odd_floats(dtype) -> np.ndarray:
    """Floats of all magnitudes, drawn by their bits."""
    bits = np.random.default_rng(4).integers(0, 2**63, 6000).astype(np.uint64)
    values = bits.view(dtype) if dtype == np.float64 else bits.astype(np.uint32).view(dtype)
    values = values[np.isfinite(values)][:4000]
    values[:6] = [0.1, 1 / 3, NAN, np.finfo(dtype).tiny / 2, np.finfo(dtype).max, 0]
    return values.reshape(-1, 4)


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_round_trip(tmp_path, suffix, dtype):
    values = odd_floats(dtype)
    write_rows(tmp_path / f"a{suffix}", torch.from_numpy(values), list("pqrs"))
    back = read_rows(tmp_path / f"a{suffix}", columns=list("pqrs"))
    np.testing.assert_array_equal(back.numpy().astype(dtype), values)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float16, ">f4", np.longdouble])
def test_types_round_trip(tmp_path, suffix, kind):
    values = np.array([[1, 0], [1, 1], [0, 0]]).astype(kind)
    write_rows(tmp_path / f"a{suffix}", values)
    same(read_rows(tmp_path / f"a{suffix}"), values.astype(np.float64))


def test_tensors_of_all_sorts_are_written(tmp_path):
    write_rows(tmp_path / "a.csv", torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
    assert (tmp_path / "a.csv").read_text() == "x1\n1.0\n1.0\n"
    write_rows(tmp_path / "b.csv", torch.arange(6).reshape(2, 3).T, ['a,"b"', "c"])
    assert (tmp_path / "b.csv").read_text() == '"a,""b""",c\n0,3\n1,4\n2,5\n'
    same(read_rows(tmp_path / "b.csv", columns=["c", 'a,"b"']), [[3, 0], [4, 1], [5, 2]])


@pytest.mark.parametrize(
    ("name", "array", "columns", "message"),
    [
        ("a.txt", np.eye(2), None, r"must end in .npy, .csv, .parquet; got '.txt'"),
        ("a", np.eye(2), None, "must end in"),
        ("a.csv", np.eye(2), ["a"], "`columns` must have 2 names, one a column; got 1"),
        ("a.csv", np.eye(2), ["a", "a"], "column name `a` more than once"),
        ("a.csv", np.eye(2), ["a", ""], "has no name"),
        ("a.csv", np.eye(2), ["1", "2"], "all numbers, which a CSV reader takes for data"),
        ("a.npy", np.zeros((2, 2, 2)), None, "`array` must be real numbers"),
        ("a.npy", np.zeros((2, 0)), None, "`array` must be real numbers"),
        ("a.npy", [["a"]], None, "`array` must be real numbers"),
        ("a.npy", np.eye(2) * 1j, None, "`array` must be real numbers"),
        ("nowhere/a.npy", np.eye(2), None, "there is no folder"),
        ("folder.npy", np.eye(2), None, "is a folder"),
        ("there.npy", np.eye(2), None, "exists already"),
    ],
)
def test_writing_is_refused(tmp_path, name, array, columns, message):
    (tmp_path / "folder.npy").mkdir()
    put(tmp_path, "there.npy", b"precious")
    with pytest.raises(InputError, match=message):
        write_rows(tmp_path / name, array, columns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npy", "there.npy"]
    assert (tmp_path / "there.npy").read_bytes() == b"precious"


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, suffix, call, there):
    path = tmp_path / f"a{suffix}"
    if there:
        path.write_bytes(b"precious")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"aevb.checkpoint.os.{call}", fail)
    with pytest.raises(
        InputError, match=r"Could not write .*No space left on device. What was there before is untouched"
    ):
        write_rows(path, np.eye(2), overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([(path.name, b"precious")] if there else [])


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aevb.checkpoint.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "a.npy", np.eye(2))
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path):
    path = put(tmp_path, "a.npy", b"old")
    write_rows(path, np.eye(2), overwrite=True)
    same(read_rows(path), np.eye(2))
    assert path.stat().st_mode & 0o777 == put(tmp_path, "b", b"").stat().st_mode & 0o777
