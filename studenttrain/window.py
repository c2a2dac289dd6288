"""Stored arrays in the order of an epoch: windows of a store, read and shuffled by threads ahead of the student."""

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from storage.arrays import Array, Arrays
from storage.reader import Store
from studenttrain.order import EpochOrder, Indices, Window, batch_bounds, num_batches

NUM_BUFFERS = 2  # one window is read while the other is used
MAX_THREADS = 4
TASKS_PER_THREAD = 4  # of a window: so that no thread waits long for the slowest


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """Stored rows of one batch.

    Attributes:
        rows_N: the rows, int64.
        arrays: stored arrays by name, rows first: views that hold until the next batch is asked for.
    """

    rows_N: Indices  # noqa: N815
    arrays: Arrays


class TargetReader:
    """Reads arrays of a store's sealed rows in the order of an epoch. A context manager.

    It holds two windows in memory, whatever the store's size.

    Args:
        store: opened; every chunk's checksum is checked as it is read.
        names: arrays to read.
        threads: that read, decompress and shuffle; None is one for each core, at most 4.
    """

    def __init__(self, store: Store, names: Sequence[str], threads: int | None = None) -> None:
        self.store = store
        self.names = tuple(names)
        self._specs = {spec.name: spec for spec in store.manifest.arrays if spec.name in self.names}
        if missing := set(self.names) - set(self._specs):
            raise ValueError(f"names: expected arrays that the store keeps, got {', '.join(sorted(missing))}")
        self.num_threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(1 if store.is_far_away else self.num_threads, "targets")
        self._stopped = threading.Event()
        self._buffers: list[dict[str, Array]] = []

    def batches(
        self, order: EpochOrder, batch_size: int, first: int = 0, rank: int = 0, world_size: int = 1
    ) -> Generator[TargetBatch]:
        """Batches `first`, first + 1, ... of an epoch: a rank's slice of each.

        Nothing before the window that holds the first row is read. Close the iterator before another is begun.

        Raises:
            DamageError: a checksum does not hold.
            NotSealedError: a shard of the order is not sealed.
        """
        spans = [
            batch_bounds(order.num_rows, batch_size, batch, rank, world_size)
            for batch in range(first, num_batches(order.num_rows, batch_size))
        ]
        if not spans:
            return
        with contextlib.closing(self._windows(order, order.window_at(spans[0][0]))) as windows:
            window, arrays = next(windows)
            for start, stop in spans:
                pieces = []
                while stop > window.stop:  # the batch goes on in the next window, whose reading overwrites this one
                    if start < window.stop:
                        pieces.append(_piece(window, arrays, start, window.stop, copy=True))
                        start = window.stop
                    window, arrays = next(windows)
                pieces.append(_piece(window, arrays, start, stop, copy=False))
                yield pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _windows(self, order: EpochOrder, index: int) -> Generator[tuple[Window, dict[str, Array]]]:
        """Windows `index`, index + 1, ..., filled; the buffers of one are reused when the next is asked for."""
        free = self._allocate(order.max_window_rows)
        self._stopped.clear()
        pending: deque[tuple[Window, dict[str, Array], list[Future[None]]]] = deque()
        try:
            while pending or index < order.num_windows:
                while free and index < order.num_windows:
                    window, buffers = order.window(index), free.pop()
                    pending.append((window, buffers, self._fill(window, buffers)))
                    index += 1
                if index < order.num_windows:
                    order.window(index)  # planned while the threads read, and remembered
                for future in pending[0][2]:
                    future.result()
                window, buffers, _ = pending.popleft()
                yield window, buffers
                free.append(buffers)
        finally:
            self._stopped.set()
            # what is running writes to buffers that the next epoch will use
            wait([future for _, _, futures in pending for future in futures if not future.cancel()])

    def _allocate(self, num_rows: int) -> list[dict[str, Array]]:
        """Buffers for windows of that many rows: the ones of the last epoch where they are large enough."""
        if not self._buffers or any(len(values) < num_rows for values in self._buffers[0].values()):
            self._buffers = [
                {name: np.empty((num_rows, *spec.row_shape), spec.dtype) for name, spec in self._specs.items()}
                for _ in range(NUM_BUFFERS)
            ]
        return list(self._buffers)

    def _fill(self, window: Window, buffers: dict[str, Array]) -> list[Future[None]]:
        """Start to read a window's blocks into their places."""
        if self.store.is_far_away:  # then one thread asks for all of them at once, and many wait for answers
            return [self._pool.submit(self._read_window, window, buffers)]
        num_tasks = min(len(window.blocks), self.num_threads * TASKS_PER_THREAD)
        cuts = np.linspace(0, len(window.blocks), num_tasks + 1).astype(int).tolist()
        offsets = np.cumsum([0] + [stop - start for start, stop in window.blocks]).tolist()
        return [
            self._pool.submit(self._read_blocks, window, offsets, range(low, high), buffers)
            for low, high in itertools.pairwise(cuts)
        ]

    def _read_blocks(self, window: Window, offsets: list[int], blocks: range, buffers: dict[str, Array]) -> None:
        """Read some blocks of a window and put each row into its place."""
        ranges = window.blocks[blocks.start : blocks.stop]
        positions_R = window.positions_R[offsets[blocks.start] : offsets[blocks.stop]]
        for name in self.names:
            self.store.read_scattered(name, ranges, buffers[name], positions_R)

    def _read_window(self, window: Window, buffers: dict[str, Array]) -> None:
        """Read all blocks of a window; what is left of it is dropped once nobody waits for it."""
        self.store.read_window(window.blocks, buffers, window.positions_R, self._stopped.is_set)

    def close(self) -> None:
        """Stop the threads; what they are reading is finished, what waits is dropped."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _piece(window: Window, arrays: Arrays, start: int, stop: int, copy: bool) -> TargetBatch:
    """Places [start, stop) of the epoch, out of a window."""
    part = slice(start - window.start, stop - window.start)
    found = {name: values[part] for name, values in arrays.items()}
    return TargetBatch(window.rows_R[part], {name: values.copy() for name, values in found.items()} if copy else found)


def _joined(pieces: Sequence[TargetBatch]) -> TargetBatch:
    """Batches one after the other, as one."""
    return TargetBatch(
        np.concatenate([piece.rows_N for piece in pieces]),
        {name: np.concatenate([piece.arrays[name] for piece in pieces]) for name in pieces[0].arrays},
    )
