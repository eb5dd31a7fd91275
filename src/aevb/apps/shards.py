"""A folder of Parquet files as one long table: a file in, a file out, shared out among the processes of a launcher.

Whose a file is follows from its place in the order of names, so that no process waits for another. A file that is
written is whole; what is not written yet is done by whoever runs the command again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aevb.config import InputError

if TYPE_CHECKING:
    from aevb.checkpoint import Run

__all__ = ["shared_out"]

_ABOUT = "shards.json"


def shared_out(run: Run, data: str, out: Path | None, settings: dict[str, Any]) -> Iterator[tuple[str, Path]] | None:
    """The files that this process is to read, each with the one to write; None if DATA is no folder of Parquet files.

    The folder of results says by which weights and settings they were made, and takes no others.

    Args:
        run: Whose weights make the results.
        data: Where the rows are.
        out: Where the results go.
        settings: The verb and what its results depend on, JSON-able.

    Raises:
        InputError: If there are several processes and one file, or the folder holds other results.
    """
    from aevb.training.processes import place

    rank, size = place()
    files = sorted(Path(data).glob("*.parquet")) if os.path.isdir(data) else []
    if not files:
        if size > 1:
            raise InputError(
                f"`{data}` is no folder of Parquet files, which is what the {size} processes can share out. Split it "
                "into such files, or start one process."
            )
        return None
    if out is None:
        raise InputError(f"`{data}` is a folder of Parquet files; `--out` must name a folder for as many results.")
    pairs = [(str(file), out / file.name) for file in files]
    return _unwritten(run, out, pairs, settings, rank, size)


def _unwritten(
    run: Run, out: Path, pairs: list[tuple[str, Path]], settings: dict[str, Any], rank: int, size: int
) -> Iterator[tuple[str, Path]]:
    _claim(run, out, [target for _, target in pairs], settings, rank)
    own = pairs[rank::size]
    todo = [(file, target) for file, target in own if not target.exists()]
    if len(todo) < len(own):
        print(f"{len(own) - len(todo)} of {len(own)} files are in {out} already", flush=True)
    yield from todo


def _claim(run: Run, out: Path, targets: list[Path], settings: dict[str, Any], rank: int) -> None:
    """Say in the folder what made its files; raise if it was something else."""
    from aevb.apps.summary import weights_of
    from aevb.checkpoint import explained, write_atomically

    told = settings | {"weights": weights_of(run.vae)}
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        # In this order: another process says what it does before it does it.
        written = next((target for target in targets if target.exists()), None)
        about = out / _ABOUT
        if about.exists():
            try:
                before = json.loads(about.read_text())
            except ValueError:
                before = None
            if before != told:
                changed = [name for name in told if not isinstance(before, dict) or before.get(name) != told[name]]
                raise InputError(
                    f"`{out}` holds results that were made otherwise ({', '.join(changed)}). Give the same settings to "
                    "go on with them, or another folder."
                )
            return
        if written is not None:
            raise InputError(
                f"`{written}` exists already and is no result of this command. Choose another folder for `--out`."
            )
        # Processes that begin together write the same, each under a name of its own until it is whole.
        own = out / f".{rank}-{_ABOUT}"
        write_atomically(own, json.dumps(told, indent=1).encode())
        os.replace(own, about)
