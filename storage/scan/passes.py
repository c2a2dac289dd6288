"""How a whole store is gone through: shards in parallel on dask's threads, in each its chunks one after the other."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from storage.layout import RowLayout
from storage.manifest import Manifest

WINDOW = 256  # shards in one dask graph, so that a graph does not grow with the store
BLOCK_BYTES = 8 << 20  # of rows in memory at a time, for each thread

Progress = Callable[[int], None]
R = TypeVar("R")


@dataclass(frozen=True)
class Block:
    """Some whole chunks of a shard.

    Attributes:
        shard: index of the shard.
        chunks: indices of the chunks in it.
        start: first row.
        stop: row after the last.
    """

    shard: int
    chunks: range
    start: int
    stop: int


def blocks(
    manifest: Manifest, shard: int, block_bytes: int = BLOCK_BYTES, layout: RowLayout | None = None
) -> Iterator[Block]:
    """A shard's rows in blocks of about `block_bytes` before compression, in order, each at least a chunk.

    Args:
        manifest: of the store.
        shard: index of the shard.
        block_bytes: of a block.
        layout: of the series that the shard's number is of; None where it is of one store.
    """
    layout = layout or manifest.layout
    per_block = max(1, block_bytes // (manifest.chunk_rows * manifest.row_bytes))
    num_chunks = layout.num_chunks(shard)
    for first in range(0, num_chunks, per_block):
        chunks = range(first, min(first + per_block, num_chunks))
        yield Block(shard, chunks, layout.chunk_bounds(shard, first)[0], layout.chunk_bounds(shard, chunks[-1])[1])


def fold_shards(
    shards: Sequence[int],
    task: Callable[[int], R],
    merge: Callable[[R, R], R],
    num_workers: int | None = None,
) -> R | None:
    """The results of a task for every shard, merged in the order of the shards; None where there are no shards.

    Args:
        shards: the shards to go through.
        task: what to do with one. Runs in a thread.
        merge: merges the results of two neighbouring runs of shards, the earlier first.
        num_workers: threads; by default one for each core that this process may use.
    """
    from dask.base import compute
    from dask.delayed import delayed

    total: R | None = None
    workers = num_workers or len(os.sched_getaffinity(0))
    for begin in range(0, len(shards), WINDOW):
        parts = [delayed(task, pure=False)(shard) for shard in shards[begin : begin + WINDOW]]
        while len(parts) > 1:
            pairs = [parts[index : index + 2] for index in range(0, len(parts), 2)]
            parts = [delayed(merge, pure=False)(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        part: R = compute(parts[0], scheduler="threads", num_workers=workers)[0]  # type: ignore[no-untyped-call]
        total = part if total is None else merge(total, part)
    return total


def one_at_a_time(progress: Progress | None) -> Progress:
    """The callback, made safe to call from several threads."""
    lock = threading.Lock()

    def advance(num_rows: int) -> None:
        if progress is not None:
            with lock:
                progress(num_rows)

    return advance
