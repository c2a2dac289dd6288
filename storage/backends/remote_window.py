"""Which ranges of bytes a window of rows is read with: few requests, and hardly a byte more than is needed.

A window is some hundred runs of rows, from all over a store, of several arrays. The chunks of a run lie one behind the
other in an object; those of narrow arrays are so small that a request each would take longer than what lies between
them. So neighbours are joined over gaps, the smallest first, until the gaps come to a twentieth of what is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from storage.arrays import Array
from storage.backends.chunks import NO_CHUNK
from storage.layout import Layout

WASTE = 0.05  # bytes between chunks that may be read, as a share of the chunks' own
MAX_REQUEST_BYTES = 4 << 20  # so that a window is many requests side by side, and a repeated one costs little


@dataclass(frozen=True)
class ChunkRows:
    """Rows of a chunk, and where they go.

    Attributes:
        chunk: index in the shard.
        skipped: rows of the chunk before the first that is wanted.
        num_rows: how many are wanted.
        place: the first one's place in the order of the ranges.
    """

    chunk: int
    skipped: int
    num_rows: int
    place: int


@dataclass(frozen=True)
class Request:
    """One range of bytes of an object, and the rows in it.

    Attributes:
        name: the array.
        shard: index of the shard.
        start: first byte.
        stop: the byte after the last.
        rows: what is in it.
    """

    name: str
    shard: int
    start: int
    stop: int
    rows: tuple[ChunkRows, ...]


def rows_by_shard(layout: Layout, ranges: Sequence[tuple[int, int]]) -> dict[int, list[ChunkRows]]:
    """The chunks that hold ranges of rows, each inside one shard, by shard."""
    found: dict[int, list[ChunkRows]] = {}
    place = 0
    for start, stop in ranges:
        shard = start // layout.shard_rows
        while start < stop:
            chunk, skipped = divmod(start - shard * layout.shard_rows, layout.chunk_rows)
            count = min(stop - start, layout.chunk_rows - skipped)
            found.setdefault(shard, []).append(ChunkRows(chunk, skipped, count, place))
            start, place = start + count, place + count
    return found


def plan_requests(
    names: Sequence[str],
    rows: Mapping[int, Sequence[ChunkRows]],
    index_of: Callable[[str, int], Array],
    missing: Callable[[str, int, int], Exception],
) -> list[Request]:
    """Requests that bring all rows of some arrays.

    Args:
        names: of the arrays.
        rows: chunks by shard.
        index_of: offsets and lengths of the chunks of an array in a shard.
        missing: the error of an array, shard and chunk that is not there.
    """
    objects: list[tuple[str, int, list[tuple[int, int, ChunkRows]]]] = []
    gaps: list[tuple[int, int, int]] = []  # bytes, object, which of its chunks comes behind
    useful = 0
    for name in names:
        for shard, wanted in rows.items():
            index = index_of(name, shard)[[it.chunk for it in wanted]].tolist()
            for it, (offset, _) in zip(wanted, index, strict=True):
                if offset == NO_CHUNK:
                    raise missing(name, shard, it.chunk)
            chunks = sorted(
                ((offset, offset + length, it) for it, (offset, length) in zip(wanted, index, strict=True)),
                key=lambda chunk: chunk[:2],
            )
            useful += sum(stop - start for start, stop, _ in chunks)
            gaps += [(max(0, chunks[at][0] - chunks[at - 1][1]), len(objects), at) for at in range(1, len(chunks))]
            objects.append((name, shard, chunks))
    joined, left = set(), useful * WASTE
    for gap, at_object, at in sorted(gaps):
        if gap > left:
            break
        left -= gap
        joined.add((at_object, at))
    requests = []
    for number, (name, shard, chunks) in enumerate(objects):
        begin = 0
        for at in range(1, len(chunks) + 1):
            if at < len(chunks) and (number, at) in joined and chunks[at][1] - chunks[begin][0] <= MAX_REQUEST_BYTES:
                continue
            run = chunks[begin:at]
            stop = max(stop for _, stop, _ in run)
            requests.append(Request(name, shard, run[0][0], stop, tuple(it for _, _, it in run)))
            begin = at
    return sorted(requests, key=lambda request: request.start - request.stop)  # the largest first
