"""A trained model as a folder that others load, in the form of model hubs: configuration, weights, card; never pickle.

`config.json` tells what `model.safetensors` holds, and of the data what their columns are; `README.md` is the card.
`aevb.save_pretrained`, which writes all three, stands with the applications, for a card shows an evaluation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from aevb.bayesnet import VAE
from aevb.checkpoint import Run, explained, packed, unpacked, write_atomically
from aevb.config import InputError, TrainConfig

__all__ = ["from_pretrained", "is_pretrained", "read_pretrained", "write_pretrained"]

_FORMAT = 1
_LIBRARY = "aevb"
_WEIGHTS, _CARD, _CONFIG = "model.safetensors", "README.md", "config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
"""`owner/name`; `./name` and `../name` are folders."""


def from_pretrained(name_or_path: str | Path, vae: VAE | None = None) -> VAE:
    """The model in a folder that `aevb.save_pretrained` wrote.

    Args:
        name_or_path: The folder; or `owner/name` on the Hugging Face hub, if there is no such folder here and the
            package huggingface_hub is installed.
        vae: A model composed by hand, as it was when saved; its keys, names and shapes are compared. A model made from
            a `ModelConfig` is rebuilt.

    Returns:
        The model, in evaluation mode, its weights those that were saved to the bit.

    Raises:
        InputError: If there is no such folder or name, the folder is not whole or not aevb's, or `vae` does not match.

    Example:
        >>> import aevb, tempfile
        >>> run = aevb.Run(vae=aevb.build_vae(aevb.ModelConfig(features=5)), config=aevb.TrainConfig(), history=[])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = aevb.save_pretrained(run, folder)
        ...     from_pretrained(folder).p.keys
        ('z', 'x | z')
    """
    folder = Path(name_or_path)
    if isinstance(name_or_path, str) and not folder.exists() and _HUB_NAME.fullmatch(name_or_path):
        folder = _fetched(name_or_path)
    return read_pretrained(folder, vae).vae


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like one that `aevb.save_pretrained` wrote."""
    return (folder / _CONFIG).is_file()


def read_pretrained(folder: Path, vae: VAE | None = None) -> Run:
    """As `from_pretrained` of a folder; with the configurations, and what is told of the data. Without a history.

    Raises:
        InputError: As `from_pretrained`.
    """
    told = _told(folder)
    try:
        content = (folder / _WEIGHTS).read_bytes()
    except OSError as error:
        raise InputError(
            f"`{folder / _WEIGHTS}` cannot be read: {error.strerror}. Copy or download the folder again, whole."
        ) from None
    try:
        if hashlib.sha256(content).hexdigest() != told["weights_sha256"]:
            raise InputError(
                f"`{folder / _WEIGHTS}` is not what `{_CONFIG}` was written with: it was cut or exchanged, or is what "
                "git leaves in place of a large file. Copy or download it again (with git: `git lfs pull`)."
            )
        return Run(
            vae=unpacked(told, content, f"the folder `{folder}`", vae, "aevb.from_pretrained(folder, vae)"),
            config=TrainConfig.from_json(told["train"]),
            history=[],
            path=folder,
            data=dict(told["data"]),
            made=told["made"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"`{folder / _CONFIG}` is damaged ({type(error).__name__}: {error}). Copy or download it again."
        ) from None


def write_pretrained(run: Run, folder: Path, data: Mapping[str, Any], card: str) -> None:
    """Write the three files, or none of them.

    Args:
        run: The run, whose model, configurations and versions are told.
        folder: Where to; absent or empty.
        data: What others may know of the data, JSON-able.
        card: The text of `README.md`.

    Raises:
        InputError: If the folder holds anything, or cannot be written.
    """
    import aevb

    weights, told = packed(run.vae)
    content = safetensors.torch.save(weights, metadata={"format": "pt"})
    config = {
        "library_name": _LIBRARY,
        "format": _FORMAT,
        "aevb_version": aevb.__version__,
        **told,
        "train": run.config.to_json(),
        "data": dict(data),
        "made": run.made,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    # The configuration last: a folder without it is no model.
    files = {
        _WEIGHTS: content,
        _CARD: card.encode(),
        _CONFIG: (json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    with explained(folder):
        fresh = not folder.exists()
        if not fresh and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"`{folder}` exists already, and is not overwritten. Choose a new or an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, each in files.items():
            write_atomically(folder / name, each)
    except BaseException:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        if fresh:
            folder.rmdir()
        raise


def _told(folder: Path) -> dict[str, Any]:
    """The configuration, if it is one of ours that this version reads."""
    path = folder / _CONFIG
    if not is_pretrained(folder):
        raise InputError(
            f"`{folder}` holds no pretrained model: there is no `{_CONFIG}` in it. Give a folder that "
            "aevb.save_pretrained wrote; a run is read by aevb.load."
        )
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"`{path}` cannot be read as JSON ({error}). Copy or download it again.") from None
    library = told.get("library_name") if isinstance(told, dict) else None
    if library != _LIBRARY:
        raise InputError(
            f"`{path}` is not aevb's: its `library_name` is {library!r}, not {_LIBRARY!r}. Load it with the library "
            "that wrote it."
        )
    if told.get("format") != _FORMAT:
        raise InputError(
            f"`{path}` is of format {told.get('format')}, by aevb {told.get('aevb_version')}, and this version reads "
            f"format {_FORMAT}. Load it with that version."
        )
    return dict(told)


def _fetched(name: str) -> Path:
    """A folder with the three files of a model on the hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"`{name}` is no folder here, and huggingface_hub, which fetches a model of such a name, is not installed. "
            "Check the path, or install it: pip install huggingface_hub."
        ) from None
    try:
        return Path(snapshot_download(repo_id=name, allow_patterns=[_CONFIG, _WEIGHTS, _CARD]))
    except (OSError, ValueError) as error:  # what the hub's own exceptions are made of
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"`{name}` is no folder here, and could not be fetched from the hub ({reason}). Check the name and the "
            "network, or download the model and give its folder."
        ) from None
