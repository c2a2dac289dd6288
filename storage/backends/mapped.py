"""Rows of a store put straight to their own places in memory, for a reader that shuffles.

Reading a shuffled window of rows through `read` costs two copies: chunks into a buffer, then rows out of it. Where a
shard is a plain file that can be mapped, the rows are copied once, from the page cache, and the checksum is taken over
the same pages while the processor's cache still holds them.
"""

import errno
import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import google_crc32c
import numpy as np

from storage.arrays import Array
from storage.manifest import Manifest

CRC_BYTES = 4
_UINT32 = struct.Struct("<I")
MADV_POPULATE_READ = 22  # of Linux 5.14 and later; Python 3.11 has no name for it


class MappedShard:
    """An array's part of a shard, mapped; unmapped when nothing refers to it any more.

    Args:
        path: its file.
        index: offset and length of each chunk in it, uint64 (chunks, 2).
        decompress: puts a chunk's bytes, uint8, into an array of the bytes that it is used as; None where it is stored
            as it is used.

    Raises:
        OSError: the file can't be opened, or can't be mapped where it lies.
        ValueError: it is empty.
    """

    def __init__(self, path: Path, index: Array, decompress: Callable[[int, Array, Array], None] | None) -> None:
        self._index: list[list[int]] = index.tolist()
        self._decompress = decompress
        self._opened: list[tuple[Array, int] | None] = [None] * len(self._index)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def put(self, chunk: int, skipped: int, out: Array, positions: Array, scratch: Array) -> bool:
        """Rows of a chunk into out[positions]; False where they can't be read, or the chunk's checksum does not hold.

        Args:
            chunk: index of the chunk.
            skipped: its rows before the first that is wanted.
            out: of the stored type and row shape.
            positions: int64, a place in `out` for each row that is wanted.
            scratch: a whole chunk of rows, to decompress into.

        Raises:
            DamageError: the chunk does not decompress.
        """
        opened = self._opened[chunk] or self._open(chunk)
        if opened is None:
            return False
        stored, end = opened
        if self._decompress is not None:
            if google_crc32c.value(stored) != _UINT32.unpack_from(self._map, end)[0]:
                return False
            self._decompress(chunk, stored, scratch.reshape(-1).view(np.uint8))
            out[positions] = scratch[skipped : skipped + len(positions)]
            return True
        if len(stored) != scratch.nbytes:
            return False
        # the checksum last: copying is the faster way to bring the chunk into the processor's cache
        out[positions] = stored.view(out.dtype).reshape(scratch.shape)[skipped : skipped + len(positions)]
        return bool(google_crc32c.value(stored) == _UINT32.unpack_from(self._map, end)[0])

    def _open(self, chunk: int) -> tuple[Array, int] | None:
        """A chunk's bytes and where its checksum is, its pages brought in; None where that fails.

        On a bad disk, touching pages that can't be brought in would end the process. It is asked for once a chunk,
        since it costs a tenth of the reading.
        """
        start, length = self._index[chunk]
        end = start + length - CRC_BYTES
        if length < CRC_BYTES or end + CRC_BYTES > len(self._bytes):
            return None
        first = start - start % mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_READ, first, end + CRC_BYTES - first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which an older kernel, or another system, answers: no way to ask
                return None
        self._opened[chunk] = self._bytes[start:end], end
        return self._opened[chunk]


class Reads(Protocol):
    """A backend, as a reader of rows."""

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), all in one shard, every checksum checked."""


@runtime_checkable
class MapsShards(Protocol):
    """A backend whose shards may be plain files on a local disk."""

    def map_shard(self, name: str, shard: int) -> MappedShard | None:
        """An array's part of a shard, mapped, or None where it is no such file."""


def read_scattered(
    backend: Reads, manifest: Manifest, name: str, ranges: Sequence[tuple[int, int]], out: Array, positions: Array
) -> None:
    """Read ranges of rows, one after the other, into out[positions], every checksum checked.

    Args:
        backend: where the rows are: mapped where it can be, else read.
        manifest: of the store.
        name: the array.
        ranges: first row and row after the last, each inside one shard.
        out: of the stored type and row shape.
        positions: int64, a different place in `out` for each row of the ranges.

    Raises:
        DamageError: a checksum does not hold.
    """
    chunk_rows, shard_rows = manifest.chunk_rows, manifest.shard_rows
    maps = backend if isinstance(backend, MapsShards) else None
    most = max(chunk_rows, *(stop - start for start, stop in ranges))
    scratch = np.empty((most, *out.shape[1:]), out.dtype)
    one_chunk = scratch[:chunk_rows]
    done = 0
    for start, stop in ranges:
        shard = start // shard_rows
        mapped = None if maps is None else maps.map_shard(name, shard)
        while start < stop:
            chunk, skipped = divmod(start - shard * shard_rows, chunk_rows)
            end = stop if mapped is None else min(stop, start - skipped + chunk_rows)
            places = positions[done : done + end - start]
            if mapped is None or not mapped.put(chunk, skipped, out, places, one_chunk):
                # which also says what is wrong, if anything is
                out[places] = backend.read(name, shard, start, end, scratch[: end - start])
            start, done = end, done + end - start
