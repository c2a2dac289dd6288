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
    found = bytearray(stop - start)
    missing: list[int] = []  # starts of pieces that lie one behind the other

    def fill(first: int, data: bytes) -> None:
        low, high = max(start, first), min(stop, first + len(data))
        found[low - start : high - start] = memoryview(data)[low - first : high - first]

    def fetch() -> None:
        if not missing:
            return
        first, end = missing[0], min(missing[-1] + PIECE_BYTES, known.num_bytes)
        if not cache.has_room():  # then no more than is asked for
            first, end = max(first, start), min(end, stop)
        data = place.get_range(key, first, end)
        fill(first, data)
        for piece in missing:
            if first <= piece and min(piece + PIECE_BYTES, known.num_bytes) <= end:
                cache.put(known.digest, piece, data[piece - first : piece - first + PIECE_BYTES])
        missing.clear()

    for piece in range(start // PIECE_BYTES * PIECE_BYTES, stop, PIECE_BYTES):
        data = cache.get(known.digest, piece, min(piece + PIECE_BYTES, known.num_bytes))
        if data is None:
            missing.append(piece)
        else:
            fetch()
            fill(piece, data)
    fetch()
    return bytes(found)


def forget_bytes(cache: ByteCache | None, known: Known | None, start: int, stop: int) -> bool:
    """Drop what the cache has of bytes [start, stop) of an object, for it does not hold; whether there is a cache."""
    if cache is None or known is None:
        return False
    for piece in range(start // PIECE_BYTES * PIECE_BYTES, stop, PIECE_BYTES):
        cache.drop(known.digest, piece)
    return True
