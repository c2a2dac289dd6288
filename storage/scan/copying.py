"""Take a store to another place: as it is, byte for byte, or a part of it as a store of its own."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import xxhash

from storage.backends import Backend, Hdf5Backend, backend_for
from storage.backends.files import READ_BYTES, bytes_digest, clear_os_errors, sync_file, sync_folder
from storage.backends.zarr_objects import metadata_keys, seal_name, shard_key
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.exclusive import sole_run
from storage.head import HEAD_BIAS, HEAD_WEIGHT
from storage.reader import Store, open_one_store
from storage.records import MANIFEST, QuarantineEntry, Seal, sha256
from storage.scan.conversion import check_digest, check_target, rewrite, target_manifest
from storage.scan.files import MAX_METADATA_BYTES, MovesObjects, check_metadata
from storage.scan.passes import Progress, fold_shards, one_at_a_time
from storage.scan.reencoding import reencoded
from storage.scan.selection import Chosen, Selection, check_sealed_rows, choose, chosen_manifest, rewriting_of
from storage.urls import is_url
from storage.writer import StoreWriter

REMOTE_WORKERS = 8  # shards that are on their way at once, where waiting costs more than working


@runtime_checkable
class SealsObjects(Protocol):
    """A backend without locks, whose shards are written and sealed in one, so that one of several writers wins."""

    def seal_objects(self, shard: int, objects: Mapping[str, bytes], seal: bytes) -> bool:
        """Write a shard's objects as they shall lie and create its seal; False where another writer's is there."""


@dataclass(frozen=True)
class CopyResult:
    """What is in the new place.

    Attributes:
        path: the new store.
        content_digest: of the new store; None while the source is not finalized.
        source_digest: of the source; the same, where all of it was taken.
        num_rows: rows that the new store has, sealed or not.
        num_sealed_rows: of these, rows in sealed shards.
        num_bytes: of the new store.
        num_moved: bytes that were written by this call, where they were moved as they are.
        is_whole: whether all of the source was taken.
        come_along: arrays that were not named, and that every such store has.
    """

    path: str
    content_digest: str | None
    source_digest: str | None
    num_rows: int
    num_sealed_rows: int
    num_bytes: int
    num_moved: int
    is_whole: bool
    come_along: tuple[str, ...] = ()


def copy(
    source: str | Path,
    target: str | Path,
    selection: Selection | None = None,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
    moved: Progress | None = None,
) -> CopyResult:
    """Copy a store, or a part of it, to another place. Run again after a kill, it goes on where it stopped.

    Between two places of the same kind the objects are moved as they are, and the copy is the same byte for byte; from
    Zarr to HDF5 or back it is what `convert` makes. Every shard is held against its seal on the way, and the whole of
    the copy once more when it is finalized. Of a store that is not finalized, what is sealed now is copied, and the
    copy is left unfinalized: the same call takes up later what was sealed since, and finalizes the copy once the source
    is final.

    Args:
        source: a store; with a selection, a finalized one.
        target: where the copy shall be.
        selection: what to take; all by default.
        num_workers: threads, each with a shard under way; by default one for each core, more for a URL.
        progress: called with the number of rows: each row counts once when it is copied, and, where the source is
            finalized, once when the copy is checked.
        moved: called with the number of bytes that were written, now and then, where objects are moved as they are.

    Raises:
        NotSealedError: nothing is sealed, or a part was asked for of a store that is not finalized.
        PathError: the target can't be written, or holds something else.
        MismatchError: the target is another store.
        DamageError: the source is damaged.
        ValueError: a selection that the store does not have.
    """
    if num_workers is None and (is_url(source) or is_url(target)):
        num_workers = REMOTE_WORKERS
    with open_one_store(source) as store:
        chosen = choose(store, selection or Selection())
        work = _Copy(store, target, num_workers, one_at_a_time(progress), _Counted(moved))
        if chosen is not None:
            return work.part(chosen)
        return work.whole()


class _Counted:
    """Bytes that were moved, by several threads."""

    def __init__(self, moved: Progress | None) -> None:
        self.total = 0
        self._advance = one_at_a_time(self._add)
        self._moved = moved

    def _add(self, num_bytes: int) -> None:
        self.total += num_bytes
        if self._moved is not None:
            self._moved(num_bytes)

    def __call__(self, num_bytes: int) -> None:
        self._advance(num_bytes)


@dataclass(frozen=True)
class _Copy:
    """One copy that is under way."""

    store: Store
    target: str | Path
    num_workers: int | None
    advance: Progress
    moved: _Counted

    def whole(self) -> CopyResult:
        """All that is sealed now."""
        there, here = backend_for(self.target), self.store.backend
        if not self.store.sealed_shards():
            raise NotSealedError(f"{self.store.path}: expected a sealed shard, got none yet; wait until one is sealed")
        if isinstance(here, MovesObjects) and isinstance(there, MovesObjects):
            check_target(self.store.path, self.target, "copy", lambda _: True)  # whose manifest is looked at below
            with sole_run(self.target), _Mirror(self.store, here, there, there, self.moved) as mirror:
                return self._result(mirror.fill(self.num_workers, self.advance))
        if isinstance(here, Hdf5Backend) and isinstance(there, Hdf5Backend) and self._is_same_file(there):
            check_target(self.store.path, self.target, "copy", lambda _: True)
            with sole_run(self.target):
                _copy_file(self.store, here.path, there, self.advance, self.moved)
            return self._result(Store(backend_for(self.target)))
        manifest = target_manifest(self.store, None)
        rewrite(self.store, self.target, manifest, self.num_workers, self.advance)
        return self._result(Store(backend_for(self.target)))

    def _is_same_file(self, there: Hdf5Backend) -> bool:
        """Whether the target is a final file to be copied, and not shards that were taken while the source grew."""
        found = there.get_record(MANIFEST) if there.exists() else None
        return self.store.finalized and (found is None or sha256(found) == self.store.manifest_sha256)

    def _result(self, copied: Store) -> CopyResult:
        with copied:
            digest, num_sealed_rows = copied.content_digest, copied.num_sealed_rows
            num_bytes = copied.backend.num_bytes()
        here = self.store
        return CopyResult(
            str(self.target),
            digest,
            here.content_digest,
            here.manifest.num_rows,
            num_sealed_rows,
            num_bytes,
            self.moved.total,
            is_whole=True,
        )

    def part(self, chosen: Chosen) -> CopyResult:
        """A store of its own, of some rows or arrays, or with fewer entries."""
        store, digest = self.store, self.store.content_digest
        if digest is None:
            raise NotSealedError(
                f"{store.path}: expected a finalized store to take a part of, got one that is not; finish the dump, or "
                "finalize at what is sealed: logitstore finalize --partial"
            )
        check_sealed_rows(store, chosen)
        manifest = chosen_manifest(store, chosen, Path(store.path).name)
        lineage = manifest.to_json()["lineage"]
        check_target(store.path, self.target, "copy", lambda it: it.to_json().get("lineage") == lineage)
        with sole_run(self.target), StoreWriter.open(self.target, manifest, store.head()) as writer:
            _rewrite_rows(store, chosen, writer, self.num_workers, self.advance)
            written = writer.finalize(partial=True, progress=self.advance)
            num_sealed_rows, num_bytes = writer.store.num_sealed_rows, writer.store.backend.num_bytes()
        return CopyResult(
            str(self.target),
            written,
            digest,
            manifest.num_rows,
            num_sealed_rows,
            num_bytes,
            self.moved.total,
            is_whole=False,
            come_along=chosen.come_along,
        )


def _rewrite_rows(
    store: Store, chosen: Chosen, writer: StoreWriter, num_workers: int | None, advance: Progress
) -> None:
    """Write the shards of a part that are not there yet; its rows are cut anew where it begins elsewhere."""
    reencode = rewriting_of(store.manifest, chosen)
    bounds = writer.layout.shard_bounds
    wanted = range(writer.layout.num_shards)
    if (chosen.start, chosen.stop) == (0, store.manifest.num_rows):
        wanted = store.sealed_shards()  # type: ignore[assignment]  # of the same rows; the others are missing for good
    owed = frozenset(writer.owed_shards())

    def write(shard: int) -> None:
        start, stop = (chosen.start + row for row in bounds(shard))
        arrays = reencoded(store, start, stop, writer.manifest, reencode)
        refused = [
            QuarantineEntry(entry.row - chosen.start, entry.key, entry.reason)
            for source_shard, first, end in store.layout.split(start, stop)
            for entry in store.seal(source_shard).quarantine
            if first <= entry.row < end
        ]
        writer.write_shard(shard, arrays, refused)
        advance(stop - start)

    for shard in wanted:
        if shard not in owed:
            first, end = bounds(shard)
            advance(end - first)
    fold_shards([shard for shard in wanted if shard in owed], write, lambda *_: None, num_workers)


class _Mirror:
    """A store whose objects and records are moved as they are. A context manager."""

    def __init__(
        self, store: Store, here: MovesObjects, there: MovesObjects, backend: Backend, moved: Callable[[int], None]
    ) -> None:
        self._store, self._here, self._there, self._moved = store, here, there, moved
        self._writer = self._begun(backend)

    def _begun(self, backend: Backend) -> StoreWriter:
        """The copy, with everything in it that comes before the first shard."""
        store, manifest = self._store, self._record(MANIFEST)
        found = backend.get_record(MANIFEST) if backend.exists() else None
        if found is None:
            backend.create(store.manifest)
            self._put_metadata()
            if store.head() is not None:
                for name in (HEAD_WEIGHT, HEAD_BIAS):
                    data = store.backend.get_record(name)
                    if data is not None:
                        backend.put_record(name, data)
            backend.put_record(MANIFEST, manifest)
            found = backend.get_record(MANIFEST)
        if found != manifest:
            raise MismatchError(
                f"{backend.location}: expected nothing, or this copy begun, got another store; give another path"
            )
        return StoreWriter(Store(backend))

    def _record(self, name: str) -> bytes:
        data = self._store.backend.get_record(name)
        if data is None:
            raise DamageError(f"{self._store.path}: expected {name}, got none; take another copy of the store")
        return data

    def _put_metadata(self) -> None:
        """Take over each `zarr.json` as it is: the final record names its digest."""
        final = self._store.final
        for key in metadata_keys(self._store.manifest):
            data = b"".join(self._here.read_object(key, MAX_METADATA_BYTES))
            if final is not None and final.metadata.get(key) != bytes_digest(data):
                raise DamageError(
                    f"{self._store.path}: {key}: expected the metadata that the store was made with, got another; take "
                    "another copy of the store"
                )
            self._there.write_object(key, [data])

    def fill(self, num_workers: int | None, advance: Progress) -> Store:
        """Move the shards that are not there yet; finalize the copy where the source is. Gives the copy."""
        store, writer = self._store, self._writer
        done = frozenset(writer.sealed_shards())

        def move(shard: int) -> None:
            seal = store.seal(shard)
            if shard in done:
                self._check_same(seal)
            elif writer.finalized:
                raise PathError(
                    f"{writer.store.path}: expected a copy that goes on, got one that is finalized without shard "
                    f"{shard}; give another path"
                )
            else:
                self._move_shard(seal)
            advance(seal.stop - seal.start)

        fold_shards(store.sealed_shards(), move, lambda *_: None, num_workers)
        for wrong in check_metadata(writer.store):
            raise DamageError(f"{store.path}: {wrong}")
        if store.content_digest is not None:
            check_digest(writer.store.path, writer.finalize(partial=True, progress=advance), store.content_digest)
        return writer.store

    def _check_same(self, seal: Seal) -> None:
        """A shard that is there already must say the same: it may be of a dump that went on in the copy."""
        if self._writer.store.seal(seal.shard).arrays != seal.arrays:
            raise MismatchError(
                f"{self._writer.store.path}: expected shard {seal.shard} as '{self._store.path}' has it, got other "
                "targets; give another path"
            )

    def _move_shard(self, seal: Seal) -> None:
        backend = self._writer.store.backend
        expected = {shard_key(spec, seal.shard) for spec in self._store.manifest.arrays}
        if set(seal.objects) != expected:
            raise DamageError(
                f"{self._store.path}: {seal_name(seal.shard)}: expected the objects of the shard, got others; take "
                "another copy of the store",
                shard=seal.shard,
            )
        record = self._record(seal_name(seal.shard))
        with clear_os_errors(backend.location), backend.lock_shard(seal.shard):
            if backend.get_record(seal_name(seal.shard)) is not None:
                pass
            elif isinstance(backend, SealsObjects):
                objects = {key: b"".join(self._checked(seal, key)) for key in sorted(expected)}
                backend.seal_objects(seal.shard, objects, record)
            else:
                for key in sorted(expected):
                    self._there.write_object(key, self._checked(seal, key))
                backend.put_record(seal_name(seal.shard), record)
        self._check_same(seal)

    def _checked(self, seal: Seal, key: str) -> Iterator[bytes]:
        """An object's bytes; at the end they are held against the seal, before the object is there as a whole."""
        state, num_bytes = xxhash.xxh3_128(), 0
        path, name, wanted = self._store.path, key.split("/", maxsplit=1)[0], seal.objects[key]
        try:
            for piece in self._here.read_object(key, wanted["num_bytes"]):
                state.update(piece)
                num_bytes += len(piece)
                self._moved(len(piece))
                yield piece
        except FileNotFoundError:
            raise DamageError.in_shard(path, name, seal.shard, None, "its object, got none") from None
        if {"num_bytes": num_bytes, "xxh3_128": state.hexdigest()} != wanted:
            raise DamageError.in_shard(path, name, seal.shard, None, f"the sealed digest of {key} to hold, got another")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _copy_file(store: Store, source: Path, there: Hdf5Backend, advance: Progress, moved: Callable[[int], None]) -> None:
    """Copy a final HDF5 file; one that was cut off goes on where it stopped, since its name tells what it is of."""
    target = there.path
    if target.exists():
        with Store(Hdf5Backend(target)) as copied:
            if copied.content_digest != store.content_digest:
                raise MismatchError(f"{target}: expected nothing, or this copy, got another store; give another path")
        advance(2 * store.num_sealed_rows)
        return
    if any(there.parts.iterdir()):
        raise MismatchError(f"{target}: expected nothing, or this copy, got a store that is begun; give another path")
    identity = hashlib.sha256(str((store.manifest_sha256, store.content_digest)).encode()).hexdigest()[:16]
    partial = target.with_name(f"{target.name}.{identity}.partial")
    with clear_os_errors(target):
        for num_bytes in _append(source, partial):
            moved(num_bytes)
        sync_file(partial)
        advance(store.num_sealed_rows)
        try:
            Hdf5Backend(partial).check_final()
        except DamageError:
            partial.unlink()
            store.backend.check_final()  # which of the two is damaged
            raise DamageError(
                f"{target}: expected the bytes of '{source}', got others; run the same command again"
            ) from None
        partial.replace(target)
        sync_folder(target.parent)
    advance(store.num_sealed_rows)


def _append(source: Path, partial: Path) -> Iterator[int]:
    """Write to a file what it does not have yet of another; numbers of bytes as they are written."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with source.open("rb") as file, os.fdopen(descriptor, "r+b") as copied:
        file.seek(copied.seek(0, os.SEEK_END))
        while data := file.read(READ_BYTES):
            copied.write(data)
            yield len(data)
