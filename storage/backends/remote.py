"""A store as a Zarr v3 group at a URL: the same objects, byte for byte, as in a folder.

Over HTTP a store can be read once it is finalized: there is nothing that lists what is sealed before.
"""

import contextlib
import errno
import json
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from storage.arrays import Array
from storage.backends.cache import ByteCache, CacheSettings
from storage.backends.files import bytes_digest
from storage.backends.remote_reader import ShardReader
from storage.backends.remote_seal import PATIENCE_S, Sealing, intent_name
from storage.backends.zarr_objects import (
    GROUP,
    begun_keys,
    metadata_bytes,
    metadata_keys,
    seal_name,
    sealed_in,
    shard_bytes,
)
from storage.errors import DamageError, NotSealedError, PathError, RemoteError
from storage.head import HEAD_FOLDER
from storage.manifest import FORMAT_NAME, Manifest
from storage.records import FINAL, MANIFEST, Final, Seal
from storage.remote import PART_BYTES, Place
from storage.untrusted import record_limit

PROBE_SUFFIX = ".probe"  # of an object that tries what the storage can do
THREADS = 32  # requests at a time: each waits for the network, not for the processor

Item = TypeVar("Item")
Result = TypeVar("Result")


class RemoteBackend:
    """A Zarr v3 group at a URL, records as plain objects beside the arrays. Threads may share it.

    Args:
        place: the store.
        cache: where pieces of objects are kept between epochs and runs; None keeps none.
        patience_s: how long another writer's intent to seal a shard is waited for.
    """

    def __init__(self, place: Place, cache: CacheSettings | None = None, patience_s: float = PATIENCE_S) -> None:
        self.place, self.cache_settings, self._patience_s = place, cache, patience_s
        self._writer = uuid.uuid4().hex
        self._manifest: Manifest | None = None
        self._names: frozenset[str] = frozenset()
        self._created: dict[str, bytes] = {}
        self._pool = ThreadPoolExecutor(THREADS, "remote")
        self._reader = ShardReader(place, None if cache is None else ByteCache(cache), self.each)
        self._locks: dict[int, threading.Lock] = {}
        self._locking = threading.Lock()

    @property
    def location(self) -> str:
        """The URL."""
        return self.place.url

    @property
    def bytes_read(self) -> int:
        """Bytes of objects that came from there so far."""
        return self.place.bytes_read

    def each(self, do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What a function gives for each of some things, in order, side by side; not from inside such a function."""
        futures = [self._pool.submit(do, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:  # nothing goes on behind the caller's back
            wait([future for future in futures if not future.cancel()])

    def exists(self) -> bool:
        """Whether there is anything below the URL; over HTTP, whether there is a store."""
        if self.place.is_read_only:
            return self.place.state(MANIFEST) is not None or self.place.state(GROUP) is not None
        return next(iter(self.place.list()), None) is not None

    def create(self, manifest: Manifest) -> None:
        """Write the group's and the arrays' metadata, as zarr-python makes it."""
        self.place.refuse_to_write()
        legal, found = begun_keys(manifest), []
        for entry in self.place.list():
            if _is_probe(entry.key):  # of another run that looks just now, or of one that was killed
                continue
            if entry.key not in legal:
                if self.place.state(MANIFEST) is not None:  # another run created the store just now
                    self.attach(manifest)
                    return
                raise self._something_else()
            found.append(entry.key)
        if found and not self._is_begun():
            raise self._something_else()
        self._check_conditions()
        self.place.delete_all([key for key in found if key.startswith(f"{HEAD_FOLDER}/")])
        self._created = metadata_bytes(manifest)
        for key, data in self._created.items():
            self.place.put(key, data)
        self.attach(manifest)

    def _something_else(self) -> PathError:
        return PathError(f"{self.location}: expected nothing, or a logit store, got something else; give another URL")

    def _is_begun(self) -> bool:
        try:
            attributes = json.loads(self.place.get(GROUP, record_limit(GROUP)) or b"")["attributes"]
            return bool(attributes["format"] == FORMAT_NAME)
        except (ValueError, KeyError, TypeError):
            return False

    def _check_conditions(self) -> None:
        """Refuse a storage that writes over an object though it was told not to: two runs would mix."""
        key = f"{GROUP}.{uuid.uuid4().hex}{PROBE_SUFFIX}"
        try:
            if not self.place.put_new(key, b"1") or self.place.put_new(key, b"2"):
                raise RemoteError(
                    f"{self.location}: expected a storage that writes an object only if there is none, got one that "
                    "ignores the condition; use another, or write to a disk and copy the store"
                )
        finally:
            self.place.delete(key)

    def attach(self, manifest: Manifest) -> None:
        """Take shapes and types from the manifest."""
        self._manifest = manifest
        self._names = frozenset(spec.name for spec in manifest.arrays)
        self._reader.attach(manifest)

    def put_record(self, name: str, data: bytes) -> bool:
        """Create a record, if there is none."""
        if name.startswith(f"{HEAD_FOLDER}/"):  # before the manifest, which names its digest; maybe over another run's
            if self.place.state(MANIFEST) is not None:
                return False
            self.place.put(name, data)
            self._created[name] = data
            return True
        if not self.place.put_new(name, data):
            return False
        if name == MANIFEST:  # another run with other settings may have begun here at the same moment, and lost
            for key, made in self._created.items():
                if self.place.get(key, record_limit(key)) != made:
                    self.place.put(key, made)
        return True

    def get_record(self, name: str) -> bytes | None:
        """A record's bytes, or None; one that is too large is not read."""
        return self.place.get(name, record_limit(name))

    def list_seals(self) -> list[int]:
        """Shards that have a seal record."""
        if self.place.is_read_only:
            raise NotSealedError(
                f"{self.location}: expected a finalized store, since HTTP can't list which shards are sealed, got one "
                "that is not; finalize it first, or open it by its s3://, gs:// or az:// URL"
            )
        return sealed_in(entry.key.removeprefix("seals/") for entry in self.place.list("seals"))

    @contextlib.contextmanager
    def _locked(self, shard: int) -> Iterator[None]:
        with self._locking:
            lock = self._locks.setdefault(shard, threading.Lock())
        with lock:
            yield

    def lock_shard(self, shard: int) -> AbstractContextManager[None]:
        """A lock in this process; between processes the intent records do."""
        return self._locked(shard)

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Write the shard's objects, and no seal."""
        for _ in self.each(lambda item: self.place.put(*item), self._encoded(shard, arrays).items()):
            pass

    def seal_shard(
        self, shard: int, arrays: Mapping[str, Array], seal_of: Callable[[Mapping[str, Mapping[str, Any]]], bytes]
    ) -> bool:
        """Write the shard's objects and create its seal; False where another writer's is there.

        Args:
            shard: index of the shard.
            arrays: as in `write_shard`.
            seal_of: the seal record of the objects.
        """
        objects = self._encoded(shard, arrays)
        return self.seal_objects(shard, objects, seal_of({key: bytes_digest(data) for key, data in objects.items()}))

    def seal_objects(self, shard: int, objects: Mapping[str, bytes], seal: bytes) -> bool:
        """Write a shard's objects as they shall lie and create its seal; False where another writer's is there."""
        sealing = Sealing(
            self.place,
            seal_name(shard),
            seal,
            objects,
            self._writer,
            self._patience_s,
            self.each,
            self.put_record,
        )
        return sealing.run()

    def _encoded(self, shard: int, arrays: Mapping[str, Array]) -> dict[str, bytes]:
        assert self._manifest is not None
        return shard_bytes(self._manifest, shard, arrays)

    def know_objects(self, shard: int, objects: Mapping[str, Mapping[str, Any]]) -> None:
        """Take sizes and digests of a shard's objects from its seal."""
        self._reader.know_objects(shard, objects)

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), with one request for the chunks of all, after one for their index."""
        return self._reader.read(name, shard, start, stop, out)

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
        self._reader.read_windows(ranges, outs, positions, is_stopped)

    def holding(self, shard: int) -> AbstractContextManager[None]:
        """All objects of a shard in memory, so that whoever hashes them and reads their rows gets them only once."""
        return self._reader.holding(shard)

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Digests of a shard's objects, each read whole."""
        return self._reader.digests(shard)

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """Digests of the group's and the arrays' `zarr.json`."""
        assert self._manifest is not None
        found = {}
        for key in metadata_keys(self._manifest):
            data = self.get_record(key)
            if data is None:
                raise DamageError(f"{self.location}: expected {key}, got none; take another copy of the store")
            found[key] = bytes_digest(data)
        return found

    def read_object(self, key: str, max_bytes: int) -> Iterator[bytes]:
        """An object's bytes as they lie, some at a time.

        Raises:
            FileNotFoundError: there is none.
            DamageError: it is larger than that.
        """
        state = self.place.state(key)
        if state is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", key)
        if state.num_bytes > max_bytes:
            raise DamageError(
                f"{self.location}/{key}: expected at most {max_bytes} bytes, got {state.num_bytes}; take another copy"
            )
        for start in range(0, state.num_bytes, PART_BYTES):
            yield self.place.get_range(key, start, min(start + PART_BYTES, state.num_bytes))

    def write_object(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write an object as it shall lie, over what is there."""
        self.place.put(key, b"".join(pieces))

    def keys(self) -> list[str] | None:
        """Keys of all objects below the URL; None where they can't be listed."""
        return None if self.place.is_read_only else [entry.key for entry in self.place.list()]

    def num_bytes(self) -> int:
        """Bytes of all objects; over HTTP, of those that the records name, and of the records."""
        if not self.place.is_read_only:
            return sum(entry.num_bytes for entry in self.place.list())
        data = self.get_record(FINAL)
        if data is None:
            return 0
        final = Final.from_bytes(data, f"{self.location}: {FINAL}")
        total = len(data) + len(self.get_record(MANIFEST) or b"")
        total += sum(int(value["num_bytes"]) for value in final.metadata.values())

        def of_shard(shard: int) -> int:
            record = self.get_record(seal_name(shard))
            if record is None:
                return 0
            seal = Seal.from_bytes(record, f"{self.location}: {seal_name(shard)}")
            return len(record) + sum(int(value["num_bytes"]) for value in seal.objects.values())

        return total + sum(self.each(of_shard, final.sealed))

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Remove intents and what is not sealed, then create the last records."""
        if not records:  # what a kill left behind went before the last records came
            return
        self.place.refuse_to_write()
        keep = set(sealed)
        left = []
        for entry in self.place.list():
            first, *rest = entry.key.split("/")
            if (first == "seals" and entry.key.endswith(intent_name(".json"))) or _is_probe(entry.key):
                left.append(entry.key)
            is_of_shard = first in self._names and len(rest) > 1 and rest[0] == "c" and rest[1].isdigit()
            if is_of_shard and int(rest[1]) not in keep:
                left.append(entry.key)
        self.place.delete_all(left)
        for name, data in records.items():
            self.put_record(name, data)

    def check_final(self) -> None:
        """Nothing: every object has a digest of its own."""

    def close(self) -> None:
        """Forget the chunk indices."""
        self._reader.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = ThreadPoolExecutor(THREADS, "remote")  # a closed store may be read again, as on a disk


def _is_probe(key: str) -> bool:
    return key.startswith(f"{GROUP}.") and key.endswith(PROBE_SUFFIX)
