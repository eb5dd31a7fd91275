r"""Importance draws from q in packs: what every estimate from them reduces, in memory that does not grow with draws.

q's parameters are computed once a row. A row's draws are keyed by (seed, the row's content, block of draws), so that
its figure depends neither on its company nor on the packs, beyond rounding.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

import torch
import torch.distributions as td
from torch import Tensor

from aevb._heap import keep_pages
from aevb._shapes import Values, rows_of
from aevb.bayesnet import VAE
from aevb.bounds import Terms, draw_latents, evaluating, holes_in, prepare, refuse_shared, terms
from aevb.config import InputError
from aevb.distributions import Noise

__all__ = ["BLOCK", "Keyed", "Pass", "Reducer", "digest_of", "stream"]

BLOCK = 256
"""Draws that share one key: a row's noise is drawn by whole blocks, so that it does not depend on the packs."""

_ROWS_A_WORKER = 4
"""Fewer rows are better served by torch's own threads."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How one pack of draws is made."""

    holes: tuple[str, ...]
    noise: Callable[[str], Noise]
    encoded: dict[str, td.Distribution]
    discrete: Literal["sum", "sample"]
    alone: bool  # some noise is not known to be normal

    def terms(self, vae: VAE, values: Values, count: int) -> Terms:
        """Both networks at the draws, every density sampled."""
        return terms(
            vae, values, count, kl="sampled", holes=self.holes, noise=self.noise, encoded=self.encoded,
            discrete=self.discrete,
        )  # fmt: skip


class Reducer(Protocol):
    """Takes in the packs of some rows, one after another, and tells what came of them."""

    def add(self, found: Any, count: int) -> None:
        """Take in what `look` found at one pack of `count` draws."""
        ...

    def result(self) -> tuple[Tensor, ...]:
        """The figures of these rows, each `(N, ...)`."""
        ...


def stream(
    vae: VAE,
    values: Values,
    samples: int,
    reducer: Callable[[Values, Callable[[int], Keyed]], Reducer],
    *,
    look: Callable[[Values, int, Pass], Any],
    seed: int,
    pack: int,
    discrete: Literal["sum", "sample"] = "sum",
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, ...]:
    """Reduce `samples` draws of each row.

    Args:
        vae: Generative and inference networks.
        values: Observed nodes by name; each `(N, *event)`.
        samples: Draws L per datum.
        reducer: Makes a reducer for some rows: their values, and noise of its own keyed as theirs (given the index of
            the first draw).
        look: What is taken from one pack: called with the rows' values, the number of draws, and how they are made.
        seed: Key of the draws.
        pack: Most draws, times states of classes, held in memory at once, by blocks of 256 draws.
        discrete: "sum" over the states of latent classes and binary vectors, or "sample" them.
        progress: Called with the number of rows finished since the last call.

    Returns:
        What the reducers told, all rows together.
    """
    if samples < 1 or pack < 1:
        raise InputError(f"`samples` and `pack` must be at least 1; got {samples} and {pack}.")
    refuse_shared(vae)
    values = prepare(vae, values)
    keep_pages()
    holes, rows = holes_in(values), rows_of(values)
    digests = [digest_of(values, row) for row in range(rows)]
    on_cpu = all(value.device.type == "cpu" for value in values.values())
    workers = max(1, min(torch.get_num_threads(), pack // BLOCK, rows // _ROWS_A_WORKER)) if on_cpu else 1
    encoded: dict[str, td.Distribution] = {}  # of the first row
    states = _states(vae, {name: value[:1] for name, value in values.items()}, discrete, encoded)
    pack = max(1, pack // workers // states)
    # Draws of one row in a pack: whole blocks, and so many that the last pack is full or nearly so, since a compiled
    # pass makes every pack a full one.
    blocks = math.ceil(samples / BLOCK)
    most = min(blocks, max(1, pack // BLOCK))
    draws = min(range(most, most // 2, -1), key=lambda size: -blocks % size) * BLOCK

    @torch.no_grad()  # each thread has a switch of its own
    def reduced(chunk: slice, alone: bool) -> tuple[Tensor, ...]:
        given = {name: value[chunk] for name, value in values.items()}
        keys = _Keys(seed=seed, digests=digests[chunk], alone=alone)
        running, step = reducer(given, functools.partial(_own, keys)), BLOCK if alone else draws
        memo = encoded if chunk.start == 0 else {}
        for first in range(0, samples, step):
            count = min(step, samples - first)
            noise = functools.partial(Keyed, keys, first // BLOCK)
            made = Pass(holes=holes, noise=noise, encoded=memo, discrete=discrete, alone=alone)
            running.add(look(given, count, made), count)
        return running.result()

    with evaluating(vae), _side_by_side(workers) as each:
        # The first row goes alone: it tells whether draws can be keyed for many rows and blocks together.
        leader, alone = slice(0, 1), False
        try:
            (found,) = each(reduced, [leader], [False])
        except _NotNormal:
            found, alone = reduced(leader, True), True
        columns = tuple(part.new_empty(rows, *part.shape[1:]) for part in found)
        width = 1 if alone else max(1, pack // draws)
        chunks = [slice(start, min(start + width, rows)) for start in range(1, rows, width)]

        def finished() -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
            yield leader, found
            # What is not keyed by rows takes its draws from torch's one generator, one after another.
            run = map if alone else each
            # The second chunk goes before the others, too: a graph that is compiled is compiled once.
            for part in (chunks[:1], chunks[1:]):
                yield from zip(part, run(reduced, part, itertools.repeat(alone)), strict=True)

        for chunk, figures in finished():
            for column, part in zip(columns, figures, strict=True):
                column[chunk] = part
            if progress is not None:
                progress(chunk.stop - chunk.start)
    return columns


@contextlib.contextmanager
def _side_by_side(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` on some threads of Python, among which torch's own are shared out.

    A row's parts that are not a product of matrices are too small to be split; rows are not.
    """
    if workers == 1:
        yield map
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # also what threads that come later begin with


def _states(vae: VAE, row: Values, discrete: Literal["sum", "sample"], encoded: dict[str, td.Distribution]) -> int:
    """Joint states that are summed over for each draw of a row."""
    with evaluating(vae), torch.random.fork_rng():
        found = draw_latents(vae, row, 1, holes_in(row), None, encoded, discrete)
    return math.prod(len(found.drawn[node]) for node in found.summed)


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """What the draws of some rows depend on."""

    seed: int
    digests: list[bytes]  # content of each row
    alone: bool  # one row and one block at a time, since some noise is not known to be normal


class _NotNormal(Exception):
    """A draw's noise is not known to be normal, so it can be keyed only for one row and one block alone."""


@final
class Keyed:
    """Noise of one node for some rows and consecutive blocks of draws, keyed by (seed, row's content, block, node)."""

    def __init__(self, keys: _Keys, block: int, node: str) -> None:
        self.keys, self.block, self.node = keys, block, node

    def normal(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Standard normals `(K, N, *event)`; whole blocks are drawn, and the last is cut."""
        count, rows, event = shape[0], shape[1], shape[2:]
        assert rows == len(self.keys.digests)
        blocks = math.ceil(count / BLOCK)
        result = torch.empty((rows, blocks, BLOCK, *event), dtype=like.dtype)
        generator = torch.Generator()
        for row in range(rows):
            for block in range(blocks):
                generator.manual_seed(self._key(row, block))
                result[row, block].normal_(generator=generator)
        return result.flatten(1, 2)[:, :count].transpose(0, 1).to(like.device)

    def rsample(self, d: td.Distribution, shape: torch.Size) -> Tensor:
        """A draw of any other kind: torch's generator, seeded for this row and block, and put back."""
        if not self.keys.alone:
            raise _NotNormal
        with torch.random.fork_rng():
            torch.manual_seed(self._key(0, 0))
            return d.rsample() if d.has_rsample else d.sample()

    @property
    def key(self) -> int:
        """Seed of what these rows draw together."""
        return self._key(0, 0)

    def _key(self, row: int, block: int) -> int:
        # torch's generator keeps 32 bits of it: of 100,000 blocks one or two pairs share their noise, in two rows.
        text = f"{self.keys.seed} {self.block + block} {self.node} ".encode() + self.keys.digests[row]
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _own(keys: _Keys, first: int) -> Keyed:
    """Noise of a reducer's own; no node can have its name."""
    return Keyed(keys, first // BLOCK, "|")


def digest_of(values: Values, row: int) -> bytes:
    """Fingerprint of a row's content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name][row].detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
