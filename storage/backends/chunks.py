"""The chunks of one array in one shard, out of bytes that lie in a file or came over a network.

A shard's object is its chunks, then an index of them. Everything is checked on the way: the index, each chunk's crc32c,
and what a compressed chunk says of itself before it is decompressed.
"""

import os
from dataclasses import dataclass
from typing import Protocol

import google_crc32c
import numcodecs.blosc
import numpy as np

from storage.arrays import Array, ArraySpec
from storage.errors import DamageError
from storage.manifest import Manifest

NO_CHUNK = np.iinfo(np.uint64).max
CRC_BYTES = 4
BLOSC_HEADER_BYTES = 16
CACHED_BYTES = 512 << 10  # read at a time and checked before the next, while it is in the second-level cache
MAX_PIECES = 512  # buffers of one scattered read; the kernel takes at most 1,024


class Source(Protocol):
    """Where an object's bytes are read from."""

    def read(self, length: int, offset: int) -> bytes:
        """So many bytes from there on; fewer only at the end."""

    def read_into(self, pieces: list[memoryview], offset: int) -> int:
        """Fill the pieces in order, and say how many bytes came; none only at the end."""


@dataclass(frozen=True)
class FileSource:
    """A file that is open.

    Attributes:
        descriptor: of the file.
    """

    descriptor: int

    def read(self, length: int, offset: int) -> bytes:
        """Bytes of the file."""
        return os.pread(self.descriptor, length, offset)

    def read_into(self, pieces: list[memoryview], offset: int) -> int:
        """Bytes of the file, scattered."""
        return os.preadv(self.descriptor, pieces, offset)


@dataclass(frozen=True)
class ShardChunks:
    """How the chunks of one array's part of a shard are read.

    Attributes:
        where: the store, for messages.
        manifest: of the store.
        spec: the array.
        shard: index of the shard.
    """

    where: object
    manifest: Manifest
    spec: ArraySpec
    shard: int

    @property
    def num_index_bytes(self) -> int:
        """Bytes of the index, which ends the object."""
        return self.manifest.shard_rows // self.manifest.chunk_rows * 16 + CRC_BYTES

    def damage(self, chunk: int | None, expected: str) -> DamageError:
        """The error of this array and shard; `expected` goes on as `expected ..., got ...`."""
        return DamageError.in_shard(self.where, self.spec.name, self.shard, chunk, expected)

    def absent(self, chunk: int) -> DamageError:
        """The error of a chunk that the index says is not there."""
        return self.damage(chunk, "a chunk, got none")

    def index(self, source: Source, num_bytes: int) -> Array:
        """Offset and length of every chunk, uint64 (chunks, 2), the index's own checksum checked.

        Args:
            source: the object.
            num_bytes: its size.
        """
        size = self.num_index_bytes
        if num_bytes < size:
            raise self.damage(None, f"at least {size} bytes, got {num_bytes}")
        data = np.frombuffer(source.read(size, num_bytes - size), np.uint8)
        if len(data) != size or google_crc32c.value(data[:-CRC_BYTES]) != int(data[-CRC_BYTES:].view("<u4")[0]):
            raise self.damage(None, "the checksum of its chunk index to hold, got another")
        index: Array = data[:-CRC_BYTES].view("<u8").reshape(-1, 2)
        present = index[index[:, 0] != NO_CHUNK]
        ends = present[:, 0] + present[:, 1]
        if (ends > num_bytes).any() or (ends < present[:, 0]).any():
            raise self.damage(None, "chunks inside its object, got others")
        return index

    def read_rows(self, source: Source, index: Array, low: int, high: int, out: Array) -> None:
        """Rows [low, high) of the shard, at least one, straight into `out` where the chunks are not compressed."""
        chunk_rows = self.manifest.chunk_rows
        # whole chunks go straight into the result, the ragged ends (the store's last chunk too) through a buffer
        whole_low, whole_high = -(-low // chunk_rows), high // chunk_rows
        if whole_low < whole_high:
            whole = out[whole_low * chunk_rows - low : whole_high * chunk_rows - low]
            self.read(source, index, whole_low, whole.reshape(whole_high - whole_low, -1))
        for chunk in {low // chunk_rows, (high - 1) // chunk_rows} - set(range(whole_low, whole_high)):
            buffer = np.empty((chunk_rows, *self.spec.row_shape), out.dtype)
            self.read(source, index, chunk, buffer.reshape(1, -1))
            begin, end = max(low, chunk * chunk_rows), min(high, (chunk + 1) * chunk_rows)
            out[begin - low : end - low] = buffer[begin - chunk * chunk_rows : end - chunk * chunk_rows]

    def read(self, source: Source, index: Array, low: int, values: Array) -> None:
        """Fill `values` (chunks, values of a chunk) with chunks low, low + 1, ..."""
        rows = values.view(np.uint8)
        index = index[low : low + len(rows)]
        for absent in np.flatnonzero(index[:, 0] == NO_CHUNK):
            raise self.absent(low + int(absent))
        if self.manifest.compressor == "none":
            self._read_plain(source, low, rows, index)
            return
        for position, (offset, length) in enumerate(index.tolist()):
            data = np.frombuffer(source.read(length, offset), np.uint8)
            payload = self._checked(data, low + position, length)
            self.decompress(low + position, payload, rows[position])

    def decompress(self, chunk: int, payload: Array, out: Array) -> None:
        """Decompress a chunk into its place; its header must claim just as many bytes as the place has."""
        whole = len(payload) >= BLOSC_HEADER_BYTES
        claimed = (int(payload[4:8].view("<u4")[0]), int(payload[12:16].view("<u4")[0])) if whole else None
        if claimed != (len(out), len(payload)):
            raise self.damage(chunk, f"{len(out)} bytes compressed into {len(payload)}, got {claimed}")
        try:
            numcodecs.blosc.decompress(payload, out)
        except (RuntimeError, ValueError) as error:
            raise self.damage(chunk, f"a chunk that decompresses, got {error}") from error

    def _read_plain(self, source: Source, low: int, rows: Array, index: Array) -> None:
        """Read uncompressed chunks with scattered reads, checksums apart, and check each while it is in the cache."""
        stored_bytes = rows.shape[1] + CRC_BYTES
        for other in np.flatnonzero(index[:, 1] != stored_bytes):
            raise self.damage(low + int(other), f"{stored_bytes} bytes, got another length")
        checksums = np.empty(len(rows), "<u4")
        crc_bytes = checksums.view(np.uint8).reshape(-1, CRC_BYTES)
        batch = min(MAX_PIECES // 2, max(1, CACHED_BYTES // stored_bytes))
        breaks = np.flatnonzero(np.diff(index[:, 0]) != stored_bytes) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            for begin in range(0, len(run), batch):
                part = run[begin : begin + batch].tolist()
                pieces = [buffer for position in part for buffer in (rows[position].data, crc_bytes[position].data)]
                self._read_fully(source, pieces, int(index[part[0], 0]), len(part) * stored_bytes, low + part[0])
                for position in part:
                    if google_crc32c.value(rows[position]) != checksums[position]:
                        raise self.damage(low + position, "its checksum to hold, got another")

    def _read_fully(self, source: Source, pieces: list[memoryview], offset: int, expected: int, chunk: int) -> None:
        """Read `expected` bytes at `offset` into the pieces, in order."""
        got = source.read_into(pieces, offset)
        while 0 < got < expected:  # a short read: go on behind it, into what is not filled yet
            rest, skip = [], got
            for piece in pieces:
                if skip < len(piece):
                    rest.append(piece[skip:])
                skip = max(0, skip - len(piece))
            more = source.read_into(rest, offset + got)
            if more == 0:
                break
            got += more
        if got != expected:
            raise self.damage(chunk, f"{expected} bytes, got {got}")

    def _checked(self, data: Array, chunk: int, length: int) -> Array:
        """The bytes before a chunk's trailing crc32c, checked."""
        if len(data) != length or length < CRC_BYTES:
            raise self.damage(chunk, f"{length} bytes, got {len(data)}")
        payload = data[:-CRC_BYTES]
        if google_crc32c.value(payload) != int(data[-CRC_BYTES:].view("<u4")[0]):
            raise self.damage(chunk, "its checksum to hold, got another")
        return payload
