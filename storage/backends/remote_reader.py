"""Rows of a store's remote objects: what `ZarrBackend` reads out of files, out of ranges of bytes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from storage.arrays import Array, ArraySpec
from storage.backends.cache import ByteCache
from storage.backends.chunks import CRC_BYTES, NO_CHUNK, ShardChunks
from storage.backends.files import bytes_digest
from storage.backends.remote_bytes import BufferSource, Known, KnownObjects, forget_bytes, get_bytes
from storage.backends.remote_window import Request, plan_requests, rows_by_shard
from storage.backends.zarr_objects import shard_key
from storage.errors import DamageError
from storage.manifest import Manifest
from storage.remote import LostObjectError, Place

MAX_INDICES = 16384  # of arrays in shards, some kilobytes each
SLACK_BYTES = 1 << 20  # that an object may be larger than its rows are before compression, beside its index

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


class ShardReader:
    """Reads the shards of one store. Threads may share it.

    Args:
        place: the store.
        cache: where pieces of objects are kept; None keeps none.
        each: calls a function with each of some things, side by side.
    """

    manifest: Manifest

    def __init__(self, place: Place, cache: ByteCache | None, each: Each) -> None:
        self._place, self._cache, self._each = place, cache, each
        self._chunks: dict[str, tuple[int, ArraySpec]] = {}
        self._known = KnownObjects()
        self._held: dict[int, dict[str, bytes]] = {}
        self._index = lru_cache(maxsize=MAX_INDICES)(self._read_index)

    def attach(self, manifest: Manifest) -> None:
        """Take shapes and types from the manifest."""
        self.manifest = manifest
        self._chunks = {spec.name: (at, spec) for at, spec in enumerate(manifest.arrays)}

    def forget(self) -> None:
        """Forget the chunk indices."""
        self._index.cache_clear()

    def know_objects(self, shard: int, objects: Mapping[str, Mapping[str, Any]]) -> None:
        """Take sizes and digests of a shard's objects from its seal."""
        if shard not in self._known:
            self._known.learn(shard, [shard_key(spec, shard) for _, spec in self._chunks.values()], objects)

    def _chunks_of(self, name: str, shard: int) -> ShardChunks:
        return ShardChunks(self._place.url, self.manifest, self._chunks[name][1], shard)

    def _key(self, name: str, shard: int) -> str:
        return shard_key(self._chunks[name][1], shard)

    def _known_of(self, name: str, shard: int) -> Known | None:
        return self._known.of(shard, self._chunks[name][0])

    def _get(self, name: str, shard: int, start: int, stop: int) -> BufferSource:
        """Bytes of an array's part of a shard."""
        try:
            key, known = self._key(name, shard), self._known_of(name, shard)
            return BufferSource(start, get_bytes(self._place, self._cache, key, known, start, stop))
        except LostObjectError as error:
            raise self._chunks_of(name, shard).damage(None, "its object whole, got less, or none") from error

    def _read_index(self, name: str, shard: int, known: Known | None) -> Array:
        """Offset and length of every chunk of a shard; `known` tells one object from another under the same key."""
        chunks = self._chunks_of(name, shard)
        num_bytes = self._place.size(self._key(name, shard)) if known is None else known.num_bytes
        if num_bytes is None:
            raise chunks.damage(None, "its object, got none")
        start = max(0, num_bytes - chunks.num_index_bytes)
        try:
            return chunks.index(self._get(name, shard, start, num_bytes), num_bytes)
        except DamageError:
            if not forget_bytes(self._cache, known, start, num_bytes):
                raise
            return chunks.index(self._get(name, shard, start, num_bytes), num_bytes)

    def _index_of(self, name: str, shard: int) -> Array:
        known = self._known_of(name, shard)
        return self._read_index(name, shard, None) if known is None else self._index(name, shard, known)

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), with one request for the chunks of all, after one for their index."""
        chunks = self._chunks_of(name, shard)
        first, _ = self.manifest.layout.shard_bounds(shard)
        low, high = start - first, stop - first
        if out is None:
            out = np.empty((stop - start, *chunks.spec.row_shape), np.dtype(chunks.spec.dtype).newbyteorder("<"))
        if low == high:
            return out
        held = self._held.get(shard, {}).get(self._key(name, shard))
        if held is not None:
            source = BufferSource(0, held)
            chunks.read_rows(source, chunks.index(source, len(held)), low, high, out)
            return out
        index = self._index_of(name, shard)
        wanted = index[low // self.manifest.chunk_rows : -(-high // self.manifest.chunk_rows)]
        present = wanted[wanted[:, 0] != NO_CHUNK]
        begin, end = (int(present[:, 0].min()), int(present.sum(axis=1).max())) if len(present) else (0, 0)
        try:
            chunks.read_rows(self._get(name, shard, begin, end), index, low, high, out)
        except DamageError:
            if not forget_bytes(self._cache, self._known_of(name, shard), begin, end):
                raise
            chunks.read_rows(self._get(name, shard, begin, end), index, low, high, out)
        return out

    def read_windows(
        self,
        ranges: Sequence[tuple[int, int]],
        outs: Mapping[str, Array],
        positions: Array,
        is_stopped: Callable[[], bool],
    ) -> None:
        """Read ranges of rows of several arrays into their places, with few requests, many of them side by side.

        Args:
            ranges: first row and row after the last, each inside one shard.
            outs: an array for each name, of the stored type and row shape.
            positions: int64, a different place in each of `outs` for each row of the ranges.
            is_stopped: asked now and then; once it says so, the rest is left unread.

        Raises:
            DamageError: a checksum does not hold.
        """
        rows = rows_by_shard(self.manifest.layout, ranges)
        pairs = [(name, shard) for name in outs for shard in rows]
        for _ in self._each(lambda pair: self._index_of(*pair), pairs):
            if is_stopped():
                return
        requests = plan_requests(
            list(outs), rows, self._index_of, lambda name, shard, chunk: self._chunks_of(name, shard).absent(chunk)
        )

        def do(request: Request) -> None:
            if not is_stopped():
                self._put_rows(request, outs[request.name], positions)

        for _ in self._each(do, requests):
            pass

    def _put_rows(self, request: Request, out: Array, positions: Array) -> None:
        """Get what a request is for and put each row into its place."""
        source = self._get(request.name, request.shard, request.start, request.stop)
        index = self._index_of(request.name, request.shard)
        chunks = self._chunks_of(request.name, request.shard)
        scratch = np.empty((self.manifest.chunk_rows, *chunks.spec.row_shape), out.dtype)
        for it in request.rows:
            try:
                chunks.read(source, index, it.chunk, scratch.reshape(1, -1))
            except DamageError:
                known = self._known_of(request.name, request.shard)
                if not forget_bytes(self._cache, known, request.start, request.stop):
                    raise
                source = self._get(request.name, request.shard, request.start, request.stop)
                chunks.read(source, index, it.chunk, scratch.reshape(1, -1))
            places = positions[it.place : it.place + it.num_rows]
            out[places] = scratch[it.skipped : it.skipped + it.num_rows]

    @contextlib.contextmanager
    def holding(self, shard: int) -> Iterator[None]:
        """All objects of a shard in memory, so that whoever hashes them and reads their rows gets them only once."""

        def get(name: str) -> bytes | None:
            with contextlib.suppress(DamageError):  # whoever reads it will say so
                return self._whole(name, shard)
            return None

        found = zip(self._chunks, self._each(get, self._chunks), strict=True)
        self._held[shard] = {self._key(name, shard): data for name, data in found if data is not None}
        try:
            yield
        finally:
            self._held.pop(shard, None)

    def _whole(self, name: str, shard: int) -> bytes:
        """All bytes of an array's part of a shard; one that is larger than it can be is not read."""
        key = self._key(name, shard)
        held = self._held.get(shard, {}).get(key)
        if held is not None:
            return held
        try:
            data = self._place.get(key, self._max_object_bytes())
        except DamageError as error:
            raise self._chunks_of(name, shard).damage(None, "no more bytes than its rows take, got more") from error
        if data is None:
            raise self._chunks_of(name, shard).damage(None, "its object, got none")
        return data

    def _max_object_bytes(self) -> int:
        """More than any object of a shard can have, so that none fills the memory."""
        widest = max(spec.row_bytes for spec in self.manifest.arrays)
        chunks = self.manifest.shard_rows // self.manifest.chunk_rows
        return self.manifest.shard_rows * widest + chunks * (16 + 2 * CRC_BYTES + 64) + SLACK_BYTES

    def digests(self, shard: int) -> dict[str, dict[str, Any]]:
        """Digests of a shard's objects, each read whole."""
        names = sorted(self._chunks)
        found = self._each(lambda name: bytes_digest(self._whole(name, shard)), names)
        return {self._key(name, shard): digest for name, digest in zip(names, found, strict=True)}
