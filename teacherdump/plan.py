"""What a dump is going to do: layout, batches, limits. Arithmetic without I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.arrays import ArraySpec
from storage.layout import MAX_SHARDS, Layout

CHUNK_BYTES = 512 << 10  # of the widest array: what a reader takes at a time
CHUNK_ROWS = (16, 4096)
SHARD_BYTES = 64 << 20  # of all arrays: what a dump holds in memory a few times, and loses in a kill
MAX_SHARD_ROWS = 65536
MIN_SHARDS = 16  # so that a kill costs a slow teacher little of a small corpus ...
SMALL_SHARD_ROWS = 1024  # ... but no shard is cut below this for it: to seal one takes 45 ms of a core in any case
SMALL_CHUNK_ROWS = 256


def choose_layout(
    num_rows: int,
    arrays: Sequence[ArraySpec],
    shard_rows: int | None = None,
    chunk_rows: int | None = None,
    num_positions: int = 1,
) -> Layout:
    """How rows are cut, where the user does not say.

    Args:
        num_rows: rows of the store.
        arrays: every array that it holds.
        shard_rows: rows of a shard, or None.
        chunk_rows: rows of a chunk, or None.
        num_positions: distributions of a row: long rows make small chunks and shards.

    Raises:
        ValueError: a shard is not a whole number of chunks.

    Example:
        >>> choose_layout(1_281_167, [ArraySpec("values", "float16", (1000,))])
        Layout(num_rows=1281167, shard_rows=33536, chunk_rows=256)
    """
    if chunk_rows is None:
        chunk_rows = _choose_chunk_rows(num_rows, max(spec.row_bytes for spec in arrays), num_positions)
        if shard_rows is not None:
            chunk_rows = next(rows for rows in range(min(chunk_rows, shard_rows), 0, -1) if shard_rows % rows == 0)
    if shard_rows is None:
        most = min(MAX_SHARD_ROWS, SHARD_BYTES // sum(spec.row_bytes for spec in arrays))
        wanted = max(SMALL_SHARD_ROWS / num_positions, num_rows / MIN_SHARDS)
        num_chunks = min(most // chunk_rows, round(wanted / chunk_rows))
        least = -(-num_rows // (chunk_rows * MAX_SHARDS))  # large shards of a huge corpus rather than none
        shard_rows = chunk_rows * max(1, num_chunks, least)
    return Layout(num_rows, shard_rows, chunk_rows)


def _choose_chunk_rows(num_rows: int, row_bytes: int, num_positions: int) -> int:
    """A power of two: about `CHUNK_BYTES`, fewer where the corpus has few rows."""
    least, most = (max(1, rows // num_positions) for rows in CHUNK_ROWS)
    rows = min(most, max(least, _power_of_two(CHUNK_BYTES // row_bytes)))
    rows = min(rows, max(SMALL_CHUNK_ROWS // num_positions, _power_of_two(num_rows // (2 * MIN_SHARDS))))
    return _power_of_two(rows)


def _power_of_two(most: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def batches(start: int, stop: int, batch_size: int) -> list[tuple[int, int]]:
    """Rows [start, stop) of a shard in batches of `batch_size`; the last may be smaller.

    They are a function of the shard and the batch size alone: a shard that is dumped again runs in the same batches,
    and so gives the same bits.

    Example:
        >>> batches(0, 10, 4)
        [(0, 4), (4, 8), (8, 10)]
    """
    return [(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]


def cpu_batch_sequences(num_positions: int) -> int:
    """Sequences of a batch on a CPU: about 4,096 positions, from 1 to 256.

    Example:
        >>> cpu_batch_sequences(256)
        16
    """
    return min(256, max(1, 4096 // num_positions))


def cpu_batch_size(sample_bytes: int) -> int:
    """Rows of a batch on a CPU: about 4 MiB of input, a power of two from 16 to 256.

    It is a function of the sample alone, and no trial: a trial gives another size now and then, and another batch size
    other last bits.

    Example:
        >>> cpu_batch_size(28 * 28 * 4), cpu_batch_size(3 * 224 * 224 * 4)
        (256, 16)
    """
    return min(256, max(16, _power_of_two((4 << 20) // sample_bytes)))


@dataclass(frozen=True)
class Limits:
    """How much one run adds at most, in whole shards; None for any.

    Attributes:
        samples: rows, rounded up to a whole shard.
        hours: time, hours; one shard is always dumped.
        num_bytes: bytes on the disk.
    """

    samples: int | None = None
    hours: float | None = None
    num_bytes: int | None = None

    def reached(self, num_rows: int, next_rows: int, seconds: float, row_bytes: float) -> str | None:
        """The limit that a further shard would break, or None.

        Args:
            num_rows: rows that the run has taken on so far.
            next_rows: rows of the further shard.
            seconds: that the run has taken so far.
            row_bytes: bytes that a row takes on the disk.
        """
        if self.samples is not None and num_rows >= self.samples:
            return f"--limit-samples {self.samples}"
        if self.hours is not None and num_rows and seconds * (num_rows + next_rows) / num_rows > self.hours * 3600:
            return f"--limit-hours {self.hours:g}"
        if self.num_bytes is not None and (num_rows + next_rows) * row_bytes > self.num_bytes:
            return f"--limit-bytes {self.num_bytes}"
        return None


@dataclass(frozen=True)
class Estimate:
    """What a dump will take.

    Attributes:
        num_rows: rows that this run would add.
        num_shards: shards that they lie in.
        num_bytes: bytes before compression.
        seconds: time, or None where nothing was timed.
    """

    num_rows: int
    num_shards: int
    num_bytes: int
    seconds: float | None


def estimate(layout: Layout, owed: Sequence[int], limits: Limits, row_bytes: int, rows_per_s: float | None) -> Estimate:
    """What a run that owes some shards would do within its limits."""
    num_rows = num_shards = 0
    for shard in owed:
        start, stop = layout.shard_bounds(shard)
        seconds = num_rows / rows_per_s if rows_per_s else 0.0
        if limits.reached(num_rows, stop - start, seconds, row_bytes) is not None:
            break
        num_rows, num_shards = num_rows + stop - start, num_shards + 1
    seconds_all = num_rows / rows_per_s if rows_per_s else None
    return Estimate(num_rows, num_shards, num_rows * row_bytes, seconds_all)
