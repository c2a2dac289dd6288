"""Where a row of a series lives: arithmetic without I/O.

The rows, and the shards, of a series are those of its members, one member after the other. So a shard that is the last
of its member may be short in the middle of the series; and where members are added behind, no number changes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from storage.layout import Layout


@dataclass(frozen=True)
class SeriesLayout:
    """How the rows of several stores, numbered through, are cut into shards, numbered through.

    Attributes:
        members: layouts of the stores, in order; at least one.

    Example:
        >>> SeriesLayout((Layout(5, 4, 2), Layout(6, 4, 2))).shard_bounds(2)
        (5, 9)
    """

    members: tuple[Layout, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members: expected at least one, got none")

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """First row of each member, and the number of rows last."""
        return _starts([layout.num_rows for layout in self.members])

    @cached_property
    def first_shards(self) -> tuple[int, ...]:
        """First shard of each member, and the number of shards last."""
        return _starts([layout.num_shards for layout in self.members])

    @property
    def num_rows(self) -> int:
        """Rows of all members."""
        return self.first_rows[-1]

    @property
    def num_shards(self) -> int:
        """Shards of all members."""
        return self.first_shards[-1]

    def member_of_shard(self, shard: int) -> tuple[int, int]:
        """The member that holds a shard, and the shard's number there."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard: expected 0 to {self.num_shards - 1}, got {shard}")
        member = bisect_right(self.first_shards, shard) - 1
        return member, shard - self.first_shards[member]

    def member_of_row(self, row: int) -> tuple[int, int]:
        """The member that holds a row, and the row's number there."""
        if not 0 <= row < self.num_rows:
            raise ValueError(f"row: expected 0 to {self.num_rows - 1}, got {row}")
        member = bisect_right(self.first_rows, row) - 1
        return member, row - self.first_rows[member]

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        member, own = self.member_of_shard(shard)
        start, stop = self.members[member].shard_bounds(own)
        return self.first_rows[member] + start, self.first_rows[member] + stop

    def shard_of(self, row: int) -> int:
        """The shard that holds a row."""
        member, own = self.member_of_row(row)
        return self.first_shards[member] + self.members[member].shard_of(own)

    def num_chunks(self, shard: int) -> int:
        """Chunks in a shard that hold rows."""
        member, own = self.member_of_shard(shard)
        return self.members[member].num_chunks(own)

    def chunk_bounds(self, shard: int, chunk: int) -> tuple[int, int]:
        """First row of a chunk of a shard, and the row after its last."""
        member, own = self.member_of_shard(shard)
        start, stop = self.members[member].chunk_bounds(own, chunk)
        return self.first_rows[member] + start, self.first_rows[member] + stop

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows [start, stop) at shard borders: (shard, first row, row after the last), in order."""
        for member, first, end in self.split_members(start, stop):
            row, shard = self.first_rows[member], self.first_shards[member]
            for own, own_first, own_end in self.members[member].split(first, end):
                yield shard + own, row + own_first, row + own_end

    def split_members(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut rows [start, stop) at members' borders: (member, first row there, row after the last there), in order."""
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows: expected a range inside [0, {self.num_rows}), got [{start}, {stop})")
        while start < stop:
            member, first = self.member_of_row(start)
            end = min(stop, self.first_rows[member + 1])
            yield member, first, end - self.first_rows[member]
            start = end


def _starts(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))
