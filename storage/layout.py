"""Where a row lives: arithmetic without I/O.

A store's rows are cut into shards of `shard_rows` rows, a shard into chunks of `chunk_rows` rows. Only the last shard,
and in it the last chunk, may be shorter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

# Of one store: what a reader lists, or keeps an index of, must not grow with what a manifest merely says.
MAX_ROWS = 2**63 - 1
MAX_SHARDS = 1 << 20
MAX_SHARD_CHUNKS = 1 << 16


class RowLayout(Protocol):
    """How numbered rows are cut into numbered shards: what a reader asks, of one store or of a series of them."""

    @property
    def num_rows(self) -> int:
        """Rows in all."""

    @property
    def num_shards(self) -> int:
        """Shards in all."""

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""

    def shard_of(self, row: int) -> int:
        """The shard that holds a row."""

    def num_chunks(self, shard: int) -> int:
        """Chunks in a shard that hold rows."""

    def chunk_bounds(self, shard: int, chunk: int) -> tuple[int, int]:
        """First row of a chunk of a shard, and the row after its last."""

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows [start, stop) at shard borders: (shard, first row, row after the last), in order."""


@dataclass(frozen=True)
class Layout:
    """How rows are cut into shards and chunks.

    Attributes:
        num_rows: rows in the store, at least 1.
        shard_rows: rows in a full shard, a multiple of `chunk_rows`.
        chunk_rows: rows in a full chunk, at least 1.

    Raises:
        ValueError: a count is not positive, a shard is not a whole number of chunks, or there are too many of them.

    Example:
        >>> Layout(num_rows=10, shard_rows=4, chunk_rows=2).shard_bounds(2)
        (8, 10)
    """

    num_rows: int
    shard_rows: int
    chunk_rows: int

    def __post_init__(self) -> None:
        for name in ("num_rows", "shard_rows", "chunk_rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number, at least 1, got {getattr(self, name)}")
        if self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"shard_rows: expected a multiple of chunk_rows ({self.chunk_rows}), got {self.shard_rows}; "
                "choose a whole number of chunks"
            )
        for name, count, what, most in (
            ("num_rows", self.num_rows, "rows", MAX_ROWS),
            ("shard_rows", self.num_shards, "shards", MAX_SHARDS),
            ("chunk_rows", self.shard_rows // self.chunk_rows, "chunks a shard", MAX_SHARD_CHUNKS),
        ):
            if count > most:
                raise ValueError(f"{name}: expected at most {most:,} {what}, got {count:,}; choose a larger {name}")

    @property
    def num_shards(self) -> int:
        """Shards in the store."""
        return -(-self.num_rows // self.shard_rows)

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard: expected 0 to {self.num_shards - 1}, got {shard}")
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.num_rows)

    def shard_of(self, row: int) -> int:
        """The shard that holds a row."""
        if not 0 <= row < self.num_rows:
            raise ValueError(f"row: expected 0 to {self.num_rows - 1}, got {row}")
        return row // self.shard_rows

    def num_chunks(self, shard: int) -> int:
        """Chunks in a shard that hold rows."""
        start, stop = self.shard_bounds(shard)
        return -(-(stop - start) // self.chunk_rows)

    def chunk_bounds(self, shard: int, chunk: int) -> tuple[int, int]:
        """First row of a chunk of a shard, and the row after its last."""
        if not 0 <= chunk < self.num_chunks(shard):
            raise ValueError(f"chunk: expected 0 to {self.num_chunks(shard) - 1} in shard {shard}, got {chunk}")
        start, stop = self.shard_bounds(shard)
        first = start + chunk * self.chunk_rows
        return first, min(first + self.chunk_rows, stop)

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows [start, stop) at shard borders: (shard, first row, row after the last), in order."""
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows: expected a range inside [0, {self.num_rows}), got [{start}, {stop})")
        while start < stop:
            shard = start // self.shard_rows
            end = min(stop, (shard + 1) * self.shard_rows)
            yield shard, start, end
            start = end


def to_ranges(shards: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted shard indices as half-open ranges.

    Example:
        >>> to_ranges([0, 1, 2, 5])
        [(0, 3), (5, 6)]
    """
    ranges: list[tuple[int, int]] = []
    for shard in shards:
        if ranges and ranges[-1][1] == shard:
            ranges[-1] = (ranges[-1][0], shard + 1)
        else:
            ranges.append((shard, shard + 1))
    return ranges


def from_ranges(ranges: Sequence[Sequence[int]]) -> list[int]:
    """The shard indices of half-open ranges, the inverse of `to_ranges`."""
    return [shard for start, stop in ranges for shard in range(start, stop)]
