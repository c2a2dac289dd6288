"""Where a store's bytes lie: Zarr v3 on a disk or at a URL, HDF5, or memory, behind one small protocol.

A backend knows arrays, shards and named records. It does not know what a seal says: `storage.writer` and
`storage.reader` do.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from storage.arrays import Array
from storage.backends.cache import CacheSettings
from storage.backends.hdf5 import Hdf5Backend
from storage.backends.memory import MemoryBackend
from storage.backends.remote import RemoteBackend
from storage.backends.zarr3 import ZarrBackend
from storage.errors import PathError
from storage.manifest import Manifest
from storage.remote import open_place
from storage.urls import checked_url, is_broken_url, is_url

__all__ = [
    "Backend",
    "CacheSettings",
    "Hdf5Backend",
    "IsFarAway",
    "MemoryBackend",
    "RemoteBackend",
    "SealsShards",
    "ZarrBackend",
    "backend_for",
    "holding",
]

HDF5_SUFFIXES = (".h5", ".hdf5")


class Backend(Protocol):
    """One place for one store.

    Records are small named bytes (`manifest.json`, `seals/00000003.json`, `final.json`), created once, never changed.
    """

    @property
    def location(self) -> str:
        """The path or URL that opens the store again."""

    def exists(self) -> bool:
        """Whether a store, or the beginning of one, is there."""

    def create(self, manifest: Manifest) -> None:
        """Lay out empty arrays. Safe to repeat while no manifest record is there.

        Raises:
            PathError: something else is there.
        """

    def attach(self, manifest: Manifest) -> None:
        """Use what is there as the store of that manifest."""

    def put_record(self, name: str, data: bytes) -> bool:
        """Write a record durably if there is none of that name; False where there is one."""

    def get_record(self, name: str) -> bytes | None:
        """A record's bytes, or None where there is none."""

    def list_seals(self) -> list[int]:
        """Indices of the shards that have a seal record, ascending."""

    def lock_shard(self, shard: int) -> AbstractContextManager[None]:
        """What a writer holds from before it looks for a shard's seal until the seal is there: others wait."""

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Write all arrays of one shard durably, over what an unsealed attempt left."""

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop) of the store, all in one shard, every chunk's checksum checked.

        They are put into `out`, C-contiguous and of the stored type and shape, where it is given.

        Raises:
            DamageError: a checksum does not hold, or bytes are missing.
        """

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Key, `num_bytes` and `xxh3_128` of every object of a shard; empty where they can't be told apart."""

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """The same of every object that is neither of a shard nor a record."""

    def num_bytes(self) -> int:
        """Bytes of all objects and records."""

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Nothing will be written any more: bring the store to its final form, with these last records.

        Safe to repeat. Whatever was written of other shards than the sealed ones goes.
        """

    def check_final(self) -> None:
        """Check what only the final form can tell, such as the digest of a whole file.

        Raises:
            DamageError: it does not hold.
        """

    def close(self) -> None:
        """Give files back."""


@runtime_checkable
class SealsShards(Protocol):
    """A backend without locks, whose shards are written and sealed in one, so that one of several writers wins."""

    def seal_shard(
        self, shard: int, arrays: Mapping[str, Array], seal_of: Callable[[Mapping[str, Mapping[str, Any]]], bytes]
    ) -> bool:
        """Write a shard durably and create the seal that is made of its objects; False where another's is there."""


@runtime_checkable
class IsFarAway(Protocol):
    """A backend whose every read is a request over a network, so that few and large ones pay."""

    @property
    def bytes_read(self) -> int:
        """Bytes of objects that came from there so far."""

    def know_objects(self, shard: int, objects: Mapping[str, Mapping[str, Any]]) -> None:
        """Take sizes and digests of a shard's objects from its seal."""

    def each(self, do: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What a function gives for each of some things, in order, side by side; not from inside such a function."""

    def holding(self, shard: int) -> AbstractContextManager[None]:
        """All objects of a shard in memory, so that whoever hashes them and reads their rows gets them only once."""

    def read_windows(
        self,
        ranges: Sequence[tuple[int, int]],
        outs: Mapping[str, Array],
        positions: Array,
        is_stopped: Callable[[], bool],
    ) -> None:
        """Read ranges of rows of several arrays into their places."""

    def keys(self) -> list[str] | None:
        """Keys of all objects; None where they can't be listed."""


def holding(backend: Backend, shard: int) -> AbstractContextManager[None]:
    """What to read a whole shard in, more than once: nothing where it is near."""
    return backend.holding(shard) if isinstance(backend, IsFarAway) else nullcontext()


def backend_for(path: str | Path, cache: CacheSettings | None = None) -> Backend:
    """The backend that a path asks for: a URL object storage, `.h5` and `.hdf5` HDF5, else Zarr.

    Args:
        path: a path, or a URL as text.
        cache: for a store at a URL, where pieces of its objects are kept; None keeps none.

    Raises:
        PathError: a URL that can't be used, or that of an HDF5 file.
        RemoteError: the library for URLs is not installed.
        ValueError: a cache for a store that is on this machine.
    """
    if is_url(path):
        if str(path).rstrip("/").lower().endswith(HDF5_SUFFIXES):
            raise PathError(
                f"{checked_url(str(path))}: expected a Zarr store at a URL, got the name of an HDF5 file, which needs "
                "a disk; use a name that ends in .zarr, or work on a local copy: logitstore copy"
            )
        return RemoteBackend(open_place(str(path)), cache)
    if re.match(r"[a-z0-9]+:/[^/]", str(path)) and isinstance(path, Path):
        raise PathError(f"{path}: expected a URL as text, got it as a path, which lost a slash; give a str")
    if is_broken_url(str(path)):
        raise PathError(f"{path}: expected :// behind the first word of a URL, got something else; write it whole")
    if cache is not None:
        raise ValueError(f"cache: expected a store at a URL, got {str(path)!r}, which is here; leave the cache out")
    path = Path(path)
    if path.suffix.lower() in HDF5_SUFFIXES:
        return Hdf5Backend(path)
    return ZarrBackend(path)
