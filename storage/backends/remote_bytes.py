"""Bytes of a store's remote objects: what is known of each object, and how parts of it are got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.backends.cache import PIECE_BYTES, ByteCache
from storage.remote import Place

PACKED_BYTES = 24  # of a size and a digest


@dataclass(frozen=True)
class Known:
    """An object as a seal tells of it.

    Attributes:
        num_bytes: its size.
        digest: `xxh3_128` of its bytes, as hex.
    """

    num_bytes: int
    digest: str


class KnownObjects:
    """What the seals that were read say of their objects; 24 bytes an object, for there may be a million."""

    def __init__(self) -> None:
        self._packed: dict[int, bytes] = {}

    def learn(self, shard: int, keys: Sequence[str], objects: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember the objects of a shard, in the order of the keys; one that is not there is left out."""
        packed = []
        for key in keys:
            value = objects.get(key)
            try:
                assert value is not None
                packed.append(
                    int(value["num_bytes"]).to_bytes(8, "little") + bytes.fromhex(value["xxh3_128"]).rjust(16)
                )
            except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
                packed.append(bytes(PACKED_BYTES))
        if all(len(it) == PACKED_BYTES for it in packed):
            self._packed[shard] = b"".join(packed)

    def __contains__(self, shard: int) -> bool:
        return shard in self._packed

    def of(self, shard: int, position: int) -> Known | None:
        """The object of a shard at a place in the order of the keys, or None."""
        packed = self._packed.get(shard, b"")[position * PACKED_BYTES : (position + 1) * PACKED_BYTES]
        num_bytes = int.from_bytes(packed[:8], "little")
        return Known(num_bytes, packed[8:].hex()) if num_bytes else None


@dataclass(frozen=True)
class BufferSource:
    """Bytes of an object that are in memory.

    Attributes:
        start: place of the first one in the object.
        data: the bytes.
    """

    start: int
    data: bytes | bytearray

    def read(self, length: int, offset: int) -> bytes:
        """Bytes of the object."""
        low = offset - self.start
        return bytes(memoryview(self.data)[low : low + length]) if low >= 0 else b""

    def read_into(self, pieces: list[memoryview], offset: int) -> int:
        """Bytes of the object, scattered."""
        low, view, got = offset - self.start, memoryview(self.data), 0
        for piece in pieces if low >= 0 else []:
            part = view[low + got : low + got + len(piece)]
            piece[: len(part)] = part
            got += len(part)
        return got


def get_bytes(place: Place, cache: ByteCache | None, key: str, known: Known | None, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object, out of the cache as far as it has them.

    Args:
        place: the store.
        cache: None for none.
        key: of the object.
        known: what its seal says of it; None where that is not known, and then the cache isn't used.
        start: first byte.
        stop: the byte after the last.

    Raises:
        RemoteError: the object is not there, is shorter, or can't be read.
    """
    if cache is None or known is None or not 0 <= start <= stop <= known.num_bytes:
        return place.get_range(key, start, stop)
    return _Gathering(place, cache, key, known, start, stop).run()


class _Gathering:
    """Bytes of an object as they come together, out of the cache and over the network.

    Each piece is fetched by one of the threads that need it; the others wait. Threads go through an object from its
    start on, and fetch what they claimed before they wait, so that no two wait for each other.
    """

    def __init__(self, place: Place, cache: ByteCache, key: str, known: Known, start: int, stop: int) -> None:
        self._place, self._cache, self._key, self._known = place, cache, key, known
        self._start, self._stop = start, stop
        self._found = bytearray(stop - start)
        self._missing: list[int] = []  # starts of pieces to fetch that lie one behind the other
        self._claimed: list[int] = []

    def run(self) -> bytes:
        try:
            for piece in range(self._start // PIECE_BYTES * PIECE_BYTES, self._stop, PIECE_BYTES):
                data = self._cached(piece)
                if data is not None:
                    self._fetch()
                    self._fill(piece, data)
            self._fetch()
        finally:
            self._release()
        return bytes(self._found)

    def _end(self, piece: int) -> int:
        return min(piece + PIECE_BYTES, self._known.num_bytes)

    def _cached(self, piece: int) -> bytes | None:
        """A piece that the cache has, or soon has; None where it is this one's to fetch."""
        digest = self._known.digest
        while (data := self._cache.get(digest, piece, self._end(piece))) is None:
            # of a full cache each takes what it needs itself
            coming = None
            if self._cache.has_room():
                coming = self._cache.claim(digest, piece)
                if coming is None:
                    self._claimed.append(piece)
            if coming is None:
                self._missing.append(piece)
                return None
            self._fetch()
            coming.wait()
        return data

    def _fetch(self) -> None:
        """Fetch the pieces that are missing so far, with one request."""
        if not self._missing:
            return
        first, end = self._missing[0], self._end(self._missing[-1])
        if not self._cache.has_room():  # then no more than is asked for
            first, end = max(first, self._start), min(end, self._stop)
        data = self._place.get_range(self._key, first, end)
        self._fill(first, data)
        for piece in self._missing:
            if first <= piece and self._end(piece) <= end:
                self._cache.put(self._known.digest, piece, data[piece - first : piece - first + PIECE_BYTES])
        self._missing.clear()
        self._release()

    def _release(self) -> None:
        for piece in self._claimed:
            self._cache.release(self._known.digest, piece)
        self._claimed.clear()

    def _fill(self, first: int, data: bytes) -> None:
        low, high = max(self._start, first), min(self._stop, first + len(data))
        self._found[low - self._start : high - self._start] = memoryview(data)[low - first : high - first]


def forget_bytes(cache: ByteCache | None, known: Known | None, start: int, stop: int) -> bool:
    """Drop what the cache has of bytes [start, stop) of an object, for it does not hold; whether there is a cache."""
    if cache is None or known is None:
        return False
    for piece in range(start // PIECE_BYTES * PIECE_BYTES, stop, PIECE_BYTES):
        cache.drop(known.digest, piece)
    return True
