"""Where a store's bytes lie: Zarr v3, HDF5, or memory, behind one small protocol.

A backend knows arrays, shards and named records. It does not know what a seal says: `storage.writer` and
`storage.reader` do.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from storage.arrays import Array
from storage.backends.hdf5 import Hdf5Backend
from storage.backends.memory import MemoryBackend
from storage.backends.zarr3 import ZarrBackend
from storage.errors import PathError
from storage.manifest import Manifest

__all__ = ["Backend", "Hdf5Backend", "MemoryBackend", "ZarrBackend", "backend_for"]

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


def backend_for(path: str | Path) -> Backend:
    """The backend that a path's suffix asks for: `.h5` and `.hdf5` HDF5, else Zarr.

    Raises:
        PathError: the path is a URL.
    """
    if "://" in str(path):
        raise PathError(f"{path}: expected a local path, got a URL; give a path on this machine")
    path = Path(path)
    if path.suffix.lower() in HDF5_SUFFIXES:
        return Hdf5Backend(path)
    return ZarrBackend(path)
