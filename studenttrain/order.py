"""The order in which a student sees the rows of an epoch: arithmetic without I/O.

Legend: B blocks, R rows of a window, N rows of a batch.

The rows of the sealed shards are cut into blocks of neighbouring rows. The blocks of all shards are shuffled and dealt
out into windows of `window_blocks` blocks, about 128 MiB. Inside a window all rows are shuffled, whatever block they
are from; the windows follow one another. So a reader fetches whole blocks, keeps two windows in memory, and every row
comes once an epoch. Batch b of the epoch is rows [b * batch_size, (b + 1) * batch_size) of that sequence, the last one
shorter, and each rank takes its slice of every batch: the order does not know how many ranks there are.

Where only some rows are chosen for an epoch, blocks without any are left out, and a window's chosen rows take its first
places: what else its blocks hold is read with them, lies behind them and is never given.

Random numbers are the raw output of Philox, a counter-based generator, keyed by (seed, epoch), and a permutation is a
sort of them: neither changes between releases of numpy, as the shuffles of its `Generator` may.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from storage.layout import RowLayout, from_ranges
from storage.manifest import Manifest

BLOCK_BYTES = 512 << 10
WINDOW_BYTES = 128 << 20
WINDOW_ROWS = 1 << 18  # of narrow rows: more would only make shuffling and skipping ahead slower
MIN_WINDOW_BLOCKS = 16  # however large a chunk is: fewer would hardly be a shuffle

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together.

    Attributes:
        start: place of its first row in the epoch.
        blocks: (first row, row after the last) of each block, ascending.
        positions_R: for each row of the blocks, one after the other, its place in the window; those of rows that are
            not chosen lie behind all others.
        rows_R: the chosen row at each place: the inverse.
    """

    start: int
    blocks: tuple[tuple[int, int], ...]
    positions_R: Indices  # noqa: N815
    rows_R: Indices  # noqa: N815

    @property
    def stop(self) -> int:
        """Place in the epoch of the row after its last."""
        return self.start + len(self.rows_R)


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch's rows, from nothing but these numbers.

    Attributes:
        layout: how the store's rows are cut into shards.
        sealed: the shards of the epoch, as half-open ranges, ascending; at least one shard.
        seed: any integer from 0 to 2^64 - 1.
        epoch: from 0.
        block_rows: rows that stay together until a window is shuffled, at least 1.
        window_blocks: blocks of a window, at least 1.
        chosen_N: bool, one for each row of the layout, the rows that the epoch gives; None gives all.
    """

    layout: RowLayout
    sealed: tuple[tuple[int, int], ...]
    seed: int
    epoch: int
    block_rows: int
    window_blocks: int
    chosen_N: NDArray[np.bool_] | None = None  # noqa: N815

    @cached_property
    def _blocks(self) -> tuple[Indices, Indices, Indices]:
        """First rows, sizes and numbers of chosen rows of all blocks that have any, shuffled."""
        bounds = [self.layout.shard_bounds(shard) for shard in from_ranges(self.sealed)]
        starts_B = np.concatenate([np.arange(start, stop, self.block_rows) for start, stop in bounds])
        ends_B = np.concatenate(
            [np.minimum(np.arange(start, stop, self.block_rows) + self.block_rows, stop) for start, stop in bounds]
        )
        sizes_B = ends_B - starts_B
        counts_B = sizes_B
        if self.chosen_N is not None:
            counts_B = np.array([np.count_nonzero(self.chosen_N[a:b]) for a, b in zip(starts_B, ends_B, strict=True)])
            kept_B = counts_B > 0
            starts_B, sizes_B, counts_B = starts_B[kept_B], sizes_B[kept_B], counts_B[kept_B]
        shuffled_B = permutation(len(starts_B), self.seed, self.epoch, 0)
        return starts_B[shuffled_B], sizes_B[shuffled_B], counts_B[shuffled_B]

    @cached_property
    def _window_starts(self) -> Indices:
        """Place of each window's first row in the epoch, and the number of rows last."""
        return self._sums_of_windows(self._blocks[2])

    def _sums_of_windows(self, sizes_B: Indices) -> Indices:
        """What the blocks before each window have together, and all of them last."""
        ends = np.cumsum(sizes_B)
        last = np.arange(1, self.num_windows + 1) * self.window_blocks - 1
        return np.concatenate([[0], ends[np.minimum(last, len(ends) - 1)]])

    @property
    def num_windows(self) -> int:
        """Windows in the epoch."""
        return -(-len(self._blocks[0]) // self.window_blocks)

    @property
    def num_rows(self) -> int:
        """Rows in the epoch: the chosen ones; 0 where there are none."""
        return int(self._window_starts[-1])

    @property
    def max_window_rows(self) -> int:
        """Rows of the largest window, with those that are read and not given."""
        return int(np.diff(self._sums_of_windows(self._blocks[1])).max(initial=0))

    @cached_property
    def window(self) -> Callable[[int], Window]:
        """The window of an index; the last few are remembered, since several readers ask for the same."""
        return lru_cache(maxsize=4)(self._window)

    def _window(self, index: int) -> Window:
        members = slice(index * self.window_blocks, (index + 1) * self.window_blocks)
        starts_B, sizes_B = (values[members] for values in self._blocks[:2])
        ascending = np.argsort(starts_B)
        starts_B, sizes_B = starts_B[ascending], sizes_B[ascending]
        offsets_B = np.cumsum(sizes_B) - sizes_B
        unshuffled_R = np.arange(sizes_B.sum()) + np.repeat(starts_B - offsets_B, sizes_B)
        positions_R = self._positions(unshuffled_R, index)
        rows_R = np.empty_like(unshuffled_R)
        rows_R[positions_R] = unshuffled_R
        if self.chosen_N is not None:
            rows_R = rows_R[: self._window_starts[index + 1] - self._window_starts[index]]
        blocks = tuple(zip(starts_B.tolist(), (starts_B + sizes_B).tolist(), strict=True))
        return Window(int(self._window_starts[index]), blocks, positions_R, rows_R)

    def _positions(self, unshuffled_R: Indices, index: int) -> Indices:
        """The place in a window of each of its rows: of the chosen ones any of the first, the others behind."""
        if self.chosen_N is None:
            return permutation(len(unshuffled_R), self.seed, self.epoch, 1 + index)
        chosen_R = self.chosen_N[unshuffled_R]
        count = int(np.count_nonzero(chosen_R))
        positions_R = np.empty_like(unshuffled_R)
        positions_R[chosen_R] = permutation(count, self.seed, self.epoch, 1 + index)
        positions_R[~chosen_R] = np.arange(count, len(unshuffled_R))
        return positions_R

    def window_at(self, place: int) -> int:
        """Index of the window that holds a place of the epoch."""
        return int(np.searchsorted(self._window_starts, place, side="right")) - 1

    def rows(self, start: int, stop: int) -> Indices:
        """The rows at places [start, stop) of the epoch."""
        pieces: list[Indices] = []
        while start < stop:
            window = self.window(self.window_at(start))
            pieces.append(window.rows_R[start - window.start : stop - window.start])
            start = window.stop
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def num_batches(num_rows: int, batch_size: int) -> int:
    """Batches of an epoch, the last, shorter one counted.

    Example:
        >>> num_batches(1000, 128)
        8
    """
    return -(-num_rows // batch_size)


def batch_bounds(num_rows: int, batch_size: int, batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Places in the epoch of a rank's slice of a batch: the slices of all ranks make up the batch, in order.

    They differ by at most one row in size. A last batch of fewer rows than ranks leaves some ranks without any.

    Example:
        >>> [batch_bounds(1000, 128, 7, rank, 3) for rank in range(3)]
        [(896, 930), (930, 965), (965, 1000)]
    """
    first = batch * batch_size
    size = min(batch_size, num_rows - first)
    return first + size * rank // world_size, first + size * (rank + 1) // world_size


def choose_block_rows(manifest: Manifest) -> int:
    """Rows of a block: as many whole chunks as come to 512 KiB, at least one, at most a shard."""
    layout = manifest.layout
    chunks = max(1, BLOCK_BYTES // (manifest.row_bytes * layout.chunk_rows))
    return min(chunks * layout.chunk_rows, layout.shard_rows)


def choose_window_blocks(manifest: Manifest, block_rows: int) -> int:
    """Blocks of a window: as many as come to 128 MiB or 262,144 rows, at least 16."""
    rows = min(WINDOW_ROWS, WINDOW_BYTES // manifest.row_bytes)
    return max(MIN_WINDOW_BLOCKS, rows // block_rows)


def permutation(size: int, seed: int, epoch: int, stream: int) -> Indices:
    """A random permutation of `size` numbers, int64, one for each (seed, epoch, stream).

    Args:
        size: at least 0.
        seed: from 0 to 2^64 - 1.
        epoch: from 0 to 2^64 - 1.
        stream: from 0 to 2^64 - 1.
    """
    counter, key = np.array([0, 0, 0, stream], np.uint64), np.array([seed, epoch], np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw(-(-size // 4))
    # numpy sorts 16 bits by radix, in a quarter of the time of 64; equal ones, few, stay neighbours in their old order
    digits = words.astype("<u8", copy=False).view("<u2")[:size]
    return np.argsort(digits, kind="stable")


def check_sealed(sealed: Sequence[Sequence[int]], layout: RowLayout) -> tuple[tuple[int, int], ...]:
    """Ranges of shards as they stand in a state, checked.

    Raises:
        ValueError: they are not ascending ranges of the store's shards.
    """
    ranges = tuple((int(start), int(stop)) for start, stop in sealed)
    edges = [edge for pair in ranges for edge in pair]
    if not ranges or edges != sorted(set(edges)) or edges[0] < 0 or edges[-1] > layout.num_shards:
        raise ValueError(f"sealed: expected ascending ranges in 0 to {layout.num_shards}, got {list(ranges)}")
    return ranges
