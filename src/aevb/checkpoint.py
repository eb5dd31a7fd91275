"""Save and load a run: safetensors and JSON with checksums, never pickle.

A run is a folder of numbered checkpoints. Each is written whole to a new folder, flushed and renamed, so that at every
moment the newest one that holds its checksums is complete, whatever stops the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
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

__all__ = [
    "Run",
    "explained",
    "holds_nothing",
    "load",
    "load_weights",
    "made_here",
    "packed",
    "save",
    "unpacked",
    "write_atomically",
]

_FORMAT = 1
_SUMS = "checksums.json"
_WEIGHTS, _RECORD, _TRAINING = "model.safetensors", "run.json", "training.safetensors"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model with how it was made."""

    vae: VAE
    config: TrainConfig
    history: list[dict[str, Any]]  # one record a log interval, nats a datum
    path: Path | None = None  # folder on disk
    data: dict[str, Any] = field(default_factory=dict)  # what it was trained on, in words
    made: dict[str, str] = field(default_factory=dict)  # versions and machine that trained it
    resume: dict[str, Any] = field(default_factory=dict, repr=False)  # `tensors` and `numbers` training goes on from


def save(run: Run, path: str | Path | None = None, *, keep: int = 2) -> Path:
    """Write a new checkpoint of `run` and drop all but the newest ones.

    Args:
        run: What to save.
        path: Folder of the run; `run.path` if None.
        keep: How many checkpoints stay, the new one among them.

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
    weights, told = packed(run.vae)
    record = {
        "format": _FORMAT,
        **told,
        "train": run.config.to_json(),
        "data": run.data,
        "made": run.made,
        "history": run.history,
        "resume": run.resume.get("numbers", {}),
    }
    files = {_WEIGHTS: safetensors.torch.save(weights), _RECORD: json.dumps(record, indent=1).encode()}
    if run.resume:
        files[_TRAINING] = safetensors.torch.save(run.resume["tensors"])
    files[_SUMS] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in files.items()}).encode()
    with explained(target):
        return _write(target, files, keep)


def made_here() -> dict[str, str]:
    """Versions and machine that a run is trained with."""
    import aevb

    return {
        "aevb": aevb.__version__, "torch": str(torch.__version__), "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "processor": _processor(),
    }  # fmt: skip


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def holds_nothing(path: Path) -> bool:
    """Whether a folder is absent, or holds only what a run left that was killed before its first checkpoint."""
    if not os.path.lexists(path):  # which, unlike pathlib, does not raise where the folder above may not be read
        return True
    try:
        names = os.listdir(path)
    except OSError:
        return False
    left = ("history.csv", ".history.csv.partial")
    return all(name in left or (name.startswith(".checkpoint-") and name.endswith(".partial")) for name in names)


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
        stopped = target.is_dir() and holds_nothing(target) and any(target.iterdir())
        raise InputError(
            f"`{target}` is not a run: it holds no checkpoint. "
            + ("It was stopped before its first; train anew into it." if stopped else "")
            + ("" if stopped else "Give the folder that `aevb train --out` wrote.")
        )
    faults = []
    for folder in reversed(folders):
        try:
            files = _read(folder)
        except (OSError, ValueError) as error:
            faults.append(f"{folder.name}: {_fault(error)}")
            continue
        if faults:
            warnings.warn(
                f"Damaged checkpoints were passed over ({'; '.join(faults)}); using {folder.name}.", stacklevel=2
            )
        return _restore(target, files, vae)
    raise InputError(
        f"No checkpoint of `{target}` can be used ({'; '.join(faults)}). Restore the folder from a copy, load it with "
        "the aevb that wrote it, or train again."
    )


def _fault(error: Exception) -> str:
    """What is wrong with a checkpoint, in a few words."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "a file is not JSON"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


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


def _write(target: Path, files: Mapping[str, bytes], keep: int) -> Path:
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
    for old in before[: max(0, len(before) + 1 - keep)]:
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
    """The files of a checkpoint; raises for one that is not whole, or not of this format."""
    sums = json.loads((folder / _SUMS).read_bytes())
    if not isinstance(sums, dict) or not {_WEIGHTS, _RECORD} <= set(sums) <= {_WEIGHTS, _RECORD, _TRAINING}:
        raise ValueError("it is not one of aevb's")
    files = {name: (folder / name).read_bytes() for name in sums}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise ValueError(f"the checksum of {name} does not hold")
    if (found := json.loads(files[_RECORD]).get("format")) != _FORMAT:
        raise ValueError(f"it is of format {found}, and this version reads format {_FORMAT}")
    return files


def _restore(target: Path, files: Mapping[str, bytes], vae: VAE | None) -> Run:
    record = json.loads(files[_RECORD])
    vae = unpacked(record, files[_WEIGHTS], f"the run `{target}`", vae, "aevb.load(path, vae)")
    resume = {}
    if _TRAINING in files:
        resume = {"tensors": safetensors.torch.load(files[_TRAINING]), "numbers": record["resume"]}
    return Run(
        vae=vae,
        config=TrainConfig.from_json(record["train"]),
        history=record["history"],
        path=target,
        data=record["data"],
        made=record.get("made", {}),
        resume=resume,
    )


def packed(vae: VAE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by name, each storage once, and the model as a record tells it, JSON-able."""
    weights, aliases = _unshare(vae)
    told = {
        "model": vae.config.to_json() if vae.config else None,
        "factors": {name: list(keys) for name, keys in _factors(vae).items()},
        "aliases": aliases,
    }
    return weights, told


def unpacked(told: Mapping[str, Any], content: bytes, origin: str, vae: VAE | None, remedy: str) -> VAE:
    """The model that `packed` told of, in evaluation mode.

    Args:
        told: As `packed` gave it.
        content: The weights, as safetensors writes them.
        origin: Where both stood, in words.
        vae: A model composed by hand, as it was; filled and returned. One made from a `ModelConfig` is rebuilt.
        remedy: The call that takes such a model.

    Raises:
        InputError: If keys, names or shapes differ.
    """
    weights = safetensors.torch.load(content)
    whose, cure = "`vae`", "Build it as it was saved."
    if vae is None:
        if told["model"] is None:
            keys = ", ".join(map(repr, (*told["factors"]["p"], *told["factors"]["q"])))
            raise InputError(
                f"{origin[0].upper()}{origin[1:]} holds a model composed by hand ({keys}). Build it the same way and "
                f"pass it: {remedy}."
            )
        kinds = [value.dtype for value in weights.values() if value.dtype.is_floating_point]
        vae = build_vae(ModelConfig.from_json(told["model"])).to(kinds[0] if kinds else torch.get_default_dtype())
        whose, cure = (
            "The configuration",
            "It was written by another version of aevb: load it with that one, or train anew.",
        )
    factors = _factors(vae)
    if factors != {"shared": []} | told["factors"]:
        raise InputError(f"{whose} has the factors {factors}, {origin} {told['factors']}. {cure}")
    weights |= {alias: weights[name] for alias, name in told["aliases"].items()}
    load_weights(vae, weights, origin, whose, cure)
    return vae.eval()  # as `fit` left it


def _factors(vae: VAE) -> dict[str, list[str]]:
    return {"p": list(vae.p.keys), "q": list(vae.q.keys), "given": list(vae.given), "shared": list(vae.shared)}


def load_weights(
    vae: nn.Module, weights: Mapping[str, Tensor], origin: str, whose: str = "`vae`",
    cure: str = "Build it as it was saved.",
) -> None:  # fmt: skip
    """Put `weights` into `vae` once names and shapes are seen to agree."""
    own = vae.state_dict()
    ours, theirs = ({name: _form(value) for name, value in state.items()} for state in (own, weights))
    if ours != theirs:
        odd = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        told = ", ".join(
            f"{name}: {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} there" for name in odd[:5]
        )
        raise InputError(f"{whose} does not match {origin} in {len(odd)} tensors ({told}). {cure}")
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
