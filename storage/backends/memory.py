"""A store in memory: the model that the property tests compare the others against."""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from storage.arrays import Array
from storage.backends.files import bytes_digest
from storage.errors import NotSealedError
from storage.head import HEAD_FOLDER
from storage.manifest import Manifest


class MemoryBackend:
    """Arrays and records in dictionaries."""

    location = "memory"

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.records: dict[str, bytes] = {}
        self.shards: dict[int, dict[str, Array]] = {}
        self._lock = threading.Lock()

    def exists(self) -> bool:
        """Whether a store was created here."""
        return self.manifest is not None

    def create(self, manifest: Manifest) -> None:
        """Remember the manifest."""
        self.records = {name: data for name, data in self.records.items() if not name.startswith(HEAD_FOLDER)}
        self.manifest = manifest

    def attach(self, manifest: Manifest) -> None:
        """Remember the manifest."""
        self.manifest = manifest

    def put_record(self, name: str, data: bytes) -> bool:
        """Keep a record, if there is none of that name."""
        if name in self.records:
            return False
        self.records[name] = data
        return True

    def get_record(self, name: str) -> bytes | None:
        """A record's bytes, or None."""
        return self.records.get(name)

    def list_seals(self) -> list[int]:
        """Indices of the sealed shards."""
        return sorted(int(name[6:-5]) for name in self.records if name.startswith("seals/"))

    def lock_shard(self, shard: int) -> AbstractContextManager[None]:
        """One lock for all shards."""
        del shard
        return self._locked()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            yield

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Keep a copy of a shard's arrays."""
        self.shards[shard] = {name: values.copy() for name, values in arrays.items()}

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """A copy of rows [start, stop)."""
        assert self.manifest is not None
        if shard not in self.shards:
            raise NotSealedError(f"memory: expected shard {shard}, got none; write it first")
        first, _ = self.manifest.layout.shard_bounds(shard)
        values = self.shards[shard][name][start - first : stop - first]
        if out is None:
            return values.copy()
        out[...] = values
        return out

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Digests of a shard's arrays."""
        return {f"{name}/{shard}": bytes_digest(values.tobytes()) for name, values in self.shards[shard].items()}

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """Nothing: arrays in memory have no metadata of their own."""
        return {}

    def num_bytes(self) -> int:
        """Bytes of arrays and records."""
        arrays = sum(values.nbytes for shard in self.shards.values() for values in shard.values())
        return arrays + sum(map(len, self.records.values()))

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Keep the last records and the sealed shards."""
        for shard in set(self.shards) - set(sealed):
            del self.shards[shard]
        for name, data in records.items():
            self.put_record(name, data)

    def check_final(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        """Nothing to give back."""
