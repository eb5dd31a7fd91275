"""Save and load a run: safetensors and JSON with checksums, never pickle.

A run is a folder of numbered checkpoints. Each is written whole to a new folder, flushed and renamed, so that at every
moment the newest one that holds its checksums is complete, whatever stops the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from aevb.bayesnet import VAE
from aevb.build import build_vae
from aevb.config import InputError, ModelConfig, TrainConfig

__all__ = ["Run", "explained", "load", "load_weights", "save", "write_atomically"]

_FORMAT = 1
_KEPT = 2
_SUMS = "checksums.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with how it was made."""

    vae: VAE
    config: TrainConfig
    history: list[dict[str, Any]]  # one record a log interval, nats a datum
    path: Path | None = None  # folder on disk
    data: dict[str, Any] = field(default_factory=dict)  # what it was trained on, in words
    resume: dict[str, Any] = field(default_factory=dict, repr=False)  # `tensors` and `numbers` training goes on from


def save(run: Run, path: str | Path | None = None) -> Path:
    """Write a new checkpoint of `run` and drop all but the last two.

    Args:
        run: What to save.
        path: Folder of the run; `run.path` if None.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: If there is no folder to write to, or writing fails; what was there before is untouched.

    Example:
        >>> import aevb, tempfile
        >>> vae = aevb.build_vae(aevb.ModelConfig(features=5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(Run(vae=vae, config=aevb.TrainConfig(), history=[]), folder)
        ...     load(folder).vae.p.keys
        ('z', 'x | z')
    """
    target = run.path if path is None else Path(path)
    if target is None:
        raise InputError("This run has no folder yet. Give one: aevb.save(run, path).")
    weights, aliases = _unshare(run.vae)
    model = run.vae.config
    record = {
        "format": _FORMAT,
        "model": model.to_json() if model else None,
        "factors": {name: list(keys) for name, keys in _factors(run.vae).items()},
        "aliases": aliases,
        "train": run.config.to_json(),
        "data": run.data,
        "history": run.history,
        "resume": run.resume.get("numbers", {}),
    }
    files = {"model.safetensors": safetensors.torch.save(weights), "run.json": json.dumps(record, indent=1).encode()}
    if run.resume:
        files["training.safetensors"] = safetensors.torch.save(run.resume["tensors"])
    files[_SUMS] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in files.items()}).encode()
    with explained(target):
        return _write(target, files)


def load(path: str | Path, vae: VAE | None = None) -> Run:
    """Read the newest checkpoint of a run that holds its checksums.

    Args:
        path: Folder of the run.
        vae: A model composed by hand, as it was when saved; its keys, names and shapes are compared. A model made from
            a `ModelConfig` is rebuilt.

    Raises:
        InputError: If `path` is no run, none of its checkpoints is whole, or `vae` does not match.
    """
    target = Path(path)
    folders = _checkpoints(target)
    if not folders:
        raise InputError(
            f"`{target}` is not a run: it holds no checkpoint. Give the folder that `aevb train --out` wrote."
        )
    faults = []
    for folder in reversed(folders):
        try:
            files = _read(folder)
        except (OSError, ValueError) as error:
            faults.append(f"{folder.name}: {error}")
            continue
        if faults:
            warnings.warn(
                f"Damaged checkpoints were passed over ({'; '.join(faults)}); using {folder.name}.", stacklevel=2
            )
        return _restore(target, files, vae)
    raise InputError(
        f"No checkpoint of `{target}` is whole ({'; '.join(faults)}). Restore the folder from a copy, or train again."
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary one beside it, flushed and renamed.

    Raises:
        InputError: If writing fails; a file that was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        try:
            _write_file(partial, content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the file is there; not every system can flush a folder
            _sync_folder(path.parent)


def _write(target: Path, files: Mapping[str, bytes]) -> Path:
    fresh = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    before = _checkpoints(target)
    number = int(before[-1].name.removeprefix("checkpoint-")) + 1 if before else 1
    final, partial = target / f"checkpoint-{number:06d}", target / f".checkpoint-{number:06d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in files.items():
            _write_file(partial / name, content)
        _sync_folder(partial)
        os.rename(partial, final)
        _sync_folder(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if fresh and not final.exists():
            shutil.rmtree(target, ignore_errors=True)
        raise
    for old in before[: len(before) + 1 - _KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written, as an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"Could not write `{path}`: {error.strerror or error}. What was there before is untouched; free space or "
            "choose another folder, and save again."
        ) from error


def _checkpoints(target: Path) -> list[Path]:
    if not target.is_dir():
        return []
    return sorted(folder for folder in target.glob("checkpoint-[0-9]*") if folder.name[11:].isdigit())


def _read(folder: Path) -> dict[str, bytes]:
    sums = json.loads((folder / _SUMS).read_bytes())
    files = {name: (folder / name).read_bytes() for name in sums}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise ValueError(f"the checksum of {name} does not hold")
    if not {"model.safetensors", "run.json"} <= set(files):
        raise ValueError("files are missing")
    return files


def _restore(target: Path, files: Mapping[str, bytes], vae: VAE | None) -> Run:
    record = json.loads(files["run.json"])
    if record["format"] != _FORMAT:
        raise InputError(
            f"`{target}` is of format {record['format']}; this version reads format {_FORMAT}. "
            "Load it with the aevb that wrote it."
        )
    if vae is None:
        if record["model"] is None:
            keys = ", ".join(map(repr, (*record["factors"]["p"], *record["factors"]["q"])))
            raise InputError(
                f"`{target}` holds a model composed by hand ({keys}). Build it the same way and pass it: "
                "aevb.load(path, vae)."
            )
        vae = build_vae(ModelConfig.from_json(record["model"])).to(_dtype(files))
    factors = _factors(vae)
    if factors != {"shared": []} | record["factors"]:
        raise InputError(
            f"`vae` has the factors {factors}, the run `{target}` {record['factors']}. Build it as it was saved."
        )
    weights = safetensors.torch.load(files["model.safetensors"])
    weights |= {alias: weights[name] for alias, name in record["aliases"].items()}
    load_weights(vae, weights, f"the run `{target}`")
    resume = {}
    if "training.safetensors" in files:
        resume = {"tensors": safetensors.torch.load(files["training.safetensors"]), "numbers": record["resume"]}
    vae.eval()  # as `fit` left it
    return Run(
        vae=vae,
        config=TrainConfig.from_json(record["train"]),
        history=record["history"],
        path=target,
        data=record["data"],
        resume=resume,
    )


def _factors(vae: VAE) -> dict[str, list[str]]:
    return {"p": list(vae.p.keys), "q": list(vae.q.keys), "given": list(vae.given), "shared": list(vae.shared)}


def _dtype(files: Mapping[str, bytes]) -> torch.dtype:
    kinds = [value.dtype for value in safetensors.torch.load(files["model.safetensors"]).values()]
    return next(kind for kind in kinds if kind.is_floating_point)


def load_weights(vae: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Put `weights` into `vae` once names and shapes are seen to agree."""
    own = vae.state_dict()
    ours, theirs = ({name: _form(value) for name, value in state.items()} for state in (own, weights))
    if ours != theirs:
        odd = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        told = ", ".join(
            f"{name}: {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} there" for name in odd[:5]
        )
        raise InputError(f"`vae` does not match {origin} in {len(odd)} tensors ({told}). Build it as it was saved.")
    vae.load_state_dict(dict(weights))


def _form(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _unshare(vae: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State by first name, and further names of the same storage: a module held by p and by q is saved once."""
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in vae.state_dict().items():
        owner = first.setdefault((value.data_ptr(), tuple(value.shape)), name) if value.numel() else name
        if owner == name:
            weights[name] = value.detach().cpu().contiguous()
        else:
            aliases[name] = owner
    return weights, aliases
