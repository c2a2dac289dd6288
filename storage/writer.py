"""Write a store: append shards, seal each, finalize."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from storage.arrays import STATUS_OK, STATUS_UNWRITTEN, Array, Arrays
from storage.backends import Backend, Hdf5Backend, IsFarAway, SealsShards, ZarrBackend, backend_for
from storage.backends.files import clear_os_errors
from storage.backends.zarr3 import seal_name
from storage.encodings import HeadArrays, Hidden
from storage.errors import DamageError, MismatchError, NotSealedError, OutOfSpaceError, PathError, StoreError
from storage.exclusive import discard_begun
from storage.head import check_head, head_records
from storage.layout import Layout
from storage.manifest import Manifest
from storage.reader import Store, num_rows_of
from storage.records import (
    FINAL,
    MANIFEST,
    Final,
    QuarantineEntry,
    Seal,
    array_digests,
    content_digest,
    manifest_bytes,
)


def _create(backend: Backend, manifest: Manifest, head: Mapping[str, bytes]) -> bool:
    """Begin a store; False where another writer has done so just now."""
    backend.create(manifest)
    for name, data in head.items():  # before the manifest: where that is, the head is
        backend.put_record(name, data)
    return backend.put_record(MANIFEST, manifest_bytes(manifest))


class StoreWriter:
    """A store that is open for writing. A context manager.

    Shards may be written in any order, each once: a sealed shard is never written again.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, head: HeadArrays | None = None) -> Self:
        """Create a store, or go on with the one that is there.

        Args:
            path: whose suffix names the backend.
            manifest: what is, or would be, in the store.
            head: of a new store that keeps hidden states; else None.

        Raises:
            PathError: the path can't be written, or holds something else.
            MismatchError: the store there was made from something else; the message names what differs.
        """
        return cls.on(backend_for(path), manifest, head)

    @classmethod
    def on(cls, backend: Backend, manifest: Manifest, head: HeadArrays | None = None) -> Self:
        """Like `open`, on any backend."""
        if backend.exists() and backend.get_record(MANIFEST) is not None:
            return cls._resumed(Store(backend), manifest)
        if (head is not None) != isinstance(manifest.encoding, Hidden):
            raise ValueError("head: expected one beside hidden states, and none without, got it otherwise")
        if head is not None and isinstance(manifest.encoding, Hidden):
            check_head(head, manifest.encoding, manifest.num_classes)
        is_new = not backend.exists()
        try:
            is_mine = _create(backend, manifest, {} if head is None else head_records(head))
        except OutOfSpaceError:
            if is_new and isinstance(backend, ZarrBackend | Hdf5Backend) and backend.get_record(MANIFEST) is None:
                with contextlib.suppress(StoreError, OSError):  # what went wrong first is what is told
                    discard_begun(backend.location, manifest)
            raise
        return cls(Store(backend)) if is_mine else cls._resumed(Store(backend), manifest)

    @classmethod
    def _resumed(cls, store: Store, manifest: Manifest) -> Self:
        differences = store.manifest.differences(manifest)
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise MismatchError(
                f"{store.path}: expected a run that goes on with this store, got other settings: "
                f"{'; '.join(differences[:3])}{more}; use the same settings, or another path{_removable(store)}"
            )
        if store.finalized:
            store.backend.seal_writing({}, store.sealed_shards())  # a kill may have left parts behind
        return cls(store)

    @property
    def manifest(self) -> Manifest:
        """The manifest that is in the store."""
        return self.store.manifest

    @property
    def layout(self) -> Layout:
        """How rows are cut into shards and chunks."""
        return self.store.manifest.layout

    @property
    def finalized(self) -> bool:
        """Whether nothing may be written any more."""
        return self.store.finalized

    def sealed_shards(self) -> tuple[int, ...]:
        """Indices of the sealed shards, ascending."""
        return self.store.sealed_shards()

    def owed_shards(self) -> tuple[int, ...]:
        """Indices of the shards that are not sealed, ascending; none once the store is finalized."""
        if self.finalized:
            return ()
        sealed = set(self.sealed_shards())
        return tuple(shard for shard in range(self.layout.num_shards) if shard not in sealed)

    def write_shard(self, shard: int, arrays: Arrays, quarantine: Sequence[QuarantineEntry] = ()) -> Seal:
        """Write a shard's arrays durably, then seal it.

        Args:
            shard: index of the shard.
            arrays: every array of the manifest, with the shard's rows and the stored type.
            quarantine: the rows without targets, in order.

        Returns:
            The seal; another writer's, if that sealed the same shard first.

        Raises:
            PathError: the store is finalized.
            OutOfSpaceError: the disk is full; the shard is not sealed.
            ValueError: arrays that don't fit the manifest.
        """
        start, stop = self.layout.shard_bounds(shard)
        self._check_arrays(arrays, start, stop, quarantine)
        backend, digests = self.store.backend, array_digests(arrays)
        partial_seal = Seal(shard, start, stop, self.store.manifest_sha256, digests, {}, tuple(quarantine))
        self._check_open()
        with clear_os_errors(self.store.path), backend.lock_shard(shard):
            if backend.get_record(seal_name(shard)) is not None:
                return self.store.seal(shard)
            if isinstance(backend, SealsShards):
                return self._sealed_in_one(backend, shard, arrays, partial_seal)
            backend.write_shard(shard, arrays)
            seal = replace(partial_seal, objects=backend.shard_objects(shard))
            if not backend.put_record(seal_name(shard), seal.to_bytes()):
                self._check_open()
                return self.store.seal(shard)
        return seal

    def _sealed_in_one(self, backend: SealsShards, shard: int, arrays: Arrays, seal: Seal) -> Seal:
        """Write a shard where the storage has no locks; the seal of whoever won."""
        made = seal

        def seal_of(objects: Mapping[str, Mapping[str, Any]]) -> bytes:
            nonlocal made
            made = replace(seal, objects=objects)
            return made.to_bytes()

        if backend.seal_shard(shard, arrays, seal_of):
            return made
        self._check_open()
        return self.store.seal(shard)

    def _check_open(self) -> None:
        """Refuse to write into a finalized store, whoever finalized it."""
        if self.finalized or self.store.backend.get_record(FINAL) is not None:
            raise PathError(f"{self.store.path}: expected a store that is not finalized, got one; give another path")

    def _check_arrays(
        self,
        arrays: Arrays,
        start: int,
        stop: int,
        quarantine: Sequence[QuarantineEntry],
    ) -> None:
        specs = {spec.name: spec for spec in self.manifest.arrays}
        if set(arrays) != set(specs):
            raise ValueError(f"arrays: expected {sorted(specs)}, got {sorted(arrays)}")
        for name, spec in specs.items():
            values: Array = arrays[name]
            shape = (stop - start, *spec.row_shape)
            if values.shape != shape or values.dtype != np.dtype(spec.dtype):
                raise ValueError(f"{name}: expected {spec.dtype} {shape}, got {values.dtype} {values.shape}")
        status = arrays["status"]
        if (status == STATUS_UNWRITTEN).any():
            raise ValueError(f"status: expected every row written, got row {start + int(status.argmax())} unwritten")
        refused = (np.flatnonzero(status != STATUS_OK) + start).tolist()
        if refused != [entry.row for entry in quarantine]:
            raise ValueError(f"quarantine: expected an entry for each of rows {refused[:5]}, got others")

    def finalize(self, partial: bool = False, progress: Callable[[int], None] | None = None) -> str:
        """Hash the sealed shards again, then make the store read-only for good.

        Args:
            partial: finalize at what is sealed, though rows are missing.
            progress: called with the number of rows checked, shard by shard.

        Returns:
            The content digest.

        Raises:
            NotSealedError: rows are missing, and `partial` was not asked for; or nothing is sealed.
            DamageError: a shard is not what was sealed.
        """
        if self.store.final is not None:
            return self.store.final.content_digest
        sealed = self.sealed_shards()
        if not sealed:
            raise NotSealedError(
                f"{self.store.path}: expected shards that are sealed, got none: nothing is sealed yet; "
                "go on with the same teacherdump run"
            )
        if len(sealed) < self.layout.num_shards and not partial:
            raise NotSealedError(
                f"{self.store.path}: expected all {self.layout.num_shards} shards sealed, got {len(sealed)}; "
                "go on with the same teacherdump run, or finalize at what is sealed: logitstore finalize --partial"
            )
        seals, state, num_quarantined = [], hashlib.sha256(), 0
        for shard in sealed:
            seal = self._checked_seal(shard)
            state.update(seal.to_bytes())
            num_quarantined += len(seal.quarantine)
            seals.append(replace(seal, objects={}, quarantine=()))  # the rest grows with the rows
            if progress is not None:
                progress(seal.stop - seal.start)
        final = self._final_record(seals, state.hexdigest(), num_quarantined)
        self.store.backend.seal_writing({FINAL: final.to_bytes()}, sealed)
        self.store.close()
        self.store = Store(self.store.backend)  # another's final record, if that was there first
        assert self.store.content_digest is not None
        return self.store.content_digest

    def _checked_seal(self, shard: int) -> Seal:
        try:
            return self.store.check_shard(shard)
        except DamageError as error:
            raise DamageError(
                f"{error}; to dump it again, remove {seal_name(shard)} of the store and run the same command again",
                shard=shard,
                array=error.array,
                chunk=error.chunk,
            ) from error

    def _final_record(self, seals: Sequence[Seal], seals_sha256: str, num_quarantined: int) -> Final:
        shards = tuple(seal.shard for seal in seals)
        return Final(
            content_digest=content_digest(self.manifest, seals),
            complete=len(shards) == self.layout.num_shards,
            num_sealed_rows=num_rows_of(self.layout, shards),
            num_quarantined=num_quarantined,
            sealed=shards,
            manifest_sha256=self.store.manifest_sha256,
            seals_sha256=seals_sha256,
            metadata=self.store.backend.metadata_objects(),
        )

    def close(self) -> None:
        """Give files back."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _removable(store: Store) -> str:
    """What else may be done with a store of which nothing is sealed, where nobody can tell whether it is in use."""
    if not isinstance(store.backend, IsFarAway) or store.finalized or store.sealed_shards():
        return ""
    return "; nothing of it is sealed: if no other run is writing it, its objects may be removed"
