"""Open a store and read rows of sealed shards."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from storage.arrays import Array, ArraySpec
from storage.backends import Backend, CacheSettings, IsFarAway, backend_for, holding
from storage.backends.files import READ_BYTES
from storage.backends.mapped import read_scattered
from storage.backends.zarr3 import seal_name
from storage.encodings import HeadArrays, Hidden
from storage.errors import DamageError, NotSealedError, PathError
from storage.head import read_head
from storage.layout import Layout, RowLayout
from storage.manifest import Manifest
from storage.records import (
    FINAL,
    MANIFEST,
    Final,
    QuarantineEntry,
    Seal,
    parse_manifest,
    sha256,
)


class Store:
    """A store that is open for reading. A context manager; opened again by its path when it is pickled.

    Attributes:
        backend: where its bytes lie.
        manifest: what made it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        try:
            data = backend.get_record(MANIFEST)
            if data is None:
                raise PathError(self._not_a_store())
            self.manifest: Manifest = parse_manifest(data, f"{self.path}: {MANIFEST}")
            self.manifest_sha256 = sha256(data)
            backend.attach(self.manifest)
            self.final: Final | None = self._final()
        except BaseException:
            backend.close()
            raise
        self._sealed = frozenset(() if self.final is None else self.final.sealed)
        self._checked: set[int] = set()
        self._head: HeadArrays | None = None

    def _final(self) -> Final | None:
        data = self.backend.get_record(FINAL)
        if data is None:
            return None
        final = Final.from_bytes(data, f"{self.path}: {FINAL}")
        if final.manifest_sha256 != self.manifest_sha256:
            raise DamageError(f"{self.path}: expected the manifest that was finalized, got another; take another copy")
        if final.sealed and final.sealed[-1] >= self.manifest.layout.num_shards:
            raise DamageError(f"{self.path}: {FINAL}: expected shards of the store, got others; take another copy")
        return final

    def _not_a_store(self) -> str:
        if not self.backend.exists():
            return (
                f"{self.path}: expected a logit store, got no such path; check the path, or make one: teacherdump run"
            )
        return f"{self.path}: expected a logit store, got something without a manifest; give the path of a store"

    @property
    def path(self) -> str:
        """The path that opens the store."""
        return self.backend.location

    @property
    def layout(self) -> RowLayout:
        """How rows are cut into shards and chunks."""
        return self.manifest.layout

    @property
    def members(self) -> "tuple[Store, ...]":
        """The stores that it is made of: itself, or those of a series."""
        return (self,)

    def refresh(self) -> None:
        """Take up what a series grew by since; a store by itself never grows by rows."""

    @property
    def finalized(self) -> bool:
        """Whether nothing will be written any more."""
        return self.final is not None

    @property
    def content_digest(self) -> str | None:
        """Identity of what the store says, or None until it is finalized."""
        return None if self.final is None else self.final.content_digest

    def head(self) -> HeadArrays | None:
        """The head that makes logits of hidden states, read once; None where the encoding keeps no hidden states.

        Raises:
            DamageError: it is missing, or not the one that the manifest names.
        """
        encoding = self.manifest.encoding
        if self._head is None and isinstance(encoding, Hidden):
            self._head = read_head(self.backend.get_record, encoding, self.manifest.num_classes, self.path)
        return self._head

    def sealed_shards(self) -> tuple[int, ...]:
        """Indices of the sealed shards as of now, ascending."""
        if self.final is not None:
            return self.final.sealed
        sealed = [shard for shard in self.backend.list_seals() if shard < self.layout.num_shards]
        self._sealed = frozenset(sealed)
        return tuple(sealed)

    @property
    def num_sealed_rows(self) -> int:
        """Rows in sealed shards, as of now."""
        if self.final is not None:
            return self.final.num_sealed_rows
        return num_rows_of(self.manifest.layout, self.sealed_shards())

    def seal(self, shard: int) -> Seal:
        """The seal of a shard, checked.

        Raises:
            NotSealedError: the shard has none.
            DamageError: it was changed, or is of another store or shard.
        """
        where = f"{self.path}: {seal_name(shard)}"
        data = self.backend.get_record(seal_name(shard))
        if data is None:
            if self.final is not None and shard in self._sealed:
                raise DamageError(
                    f"{where}: expected a seal, got none; take another copy of the store",
                    shard=shard,
                )
            raise NotSealedError(f"{where}: expected a seal, got none; resume the dump with the same command")
        try:
            seal = Seal.from_bytes(data, where)
        except DamageError as error:
            raise DamageError(str(error), shard=shard) from error
        bounds = (seal.start, seal.stop)
        if (
            seal.shard != shard
            or bounds != self.layout.shard_bounds(shard)
            or seal.manifest_sha256 != self.manifest_sha256
        ):
            raise DamageError(
                f"{where}: expected the seal of this shard and store, got another's",
                shard=shard,
            )
        known = {spec.name for spec in self.manifest.arrays}
        if any(key.split("/")[0] not in known for key in seal.objects):
            raise DamageError(f"{where}: expected objects of the store's arrays, got others", shard=shard)
        if any(not seal.start <= entry.row < seal.stop for entry in seal.quarantine):
            raise DamageError(f"{where}: expected a quarantine of the shard's own rows, got others", shard=shard)
        if isinstance(self.backend, IsFarAway):
            self.backend.know_objects(shard, seal.objects)
        return seal

    def quarantine(self) -> list[QuarantineEntry]:
        """Rows without targets, with their reasons, in order."""
        return [entry for shard in self.sealed_shards() for entry in self.seal(shard).quarantine]

    @property
    def num_quarantined(self) -> int:
        """Rows without targets in sealed shards, as of now; no seal is read once the store is finalized."""
        return len(self.quarantine()) if self.final is None else self.final.num_quarantined

    def check_sealed(self, shard: int) -> None:
        """Check that a shard is sealed, and its seal, once.

        Raises:
            NotSealedError: the shard has no seal.
            DamageError: its seal was changed, or is of another store or shard.
        """
        if shard in self._checked:
            return
        if shard not in self._sealed and shard not in self.sealed_shards():
            first, end = self.layout.shard_bounds(shard)
            raise NotSealedError(
                f"{self.path}: expected rows {first} to {end - 1} sealed, got shard {shard} without a seal; "
                + ("" if self.finalized else "resume the dump with the same command, or ")
                + "read sealed rows only"
            )
        self.seal(shard)
        self._checked.add(shard)

    def read(
        self, names: Sequence[str], start: int, stop: int, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Rows [start, stop) of the named arrays, every chunk's checksum checked, and each shard's seal once.

        Args:
            names: arrays to read.
            start: first row.
            stop: row after the last.
            out: an array for each name to read into, C-contiguous, of the stored type and of stop - start rows.

        Raises:
            NotSealedError: some of the rows are not sealed.
            DamageError: a checksum does not hold.
            ValueError: rows that the store does not have, an array that it does not keep, or a wrong `out`.
        """
        specs = {spec.name: spec for spec in self.manifest.arrays}
        for name in names:
            if name not in specs:
                raise ValueError(f"names: expected one of {', '.join(specs)}, got {name!r}")
            if out is not None:
                _check_out(out, specs[name], stop - start)
        pieces = list(self.layout.split(start, stop))
        for shard, _, _ in pieces:
            self.check_sealed(shard)
        found = {}
        for name in names:
            spec = specs[name]
            values = np.empty((stop - start, *spec.row_shape), spec.dtype) if out is None else out[name]
            for shard, first, end in pieces:
                self.backend.read(name, shard, first, end, values[first - start : end - start])
            found[name] = values
        return found

    def read_scattered(self, name: str, ranges: Sequence[tuple[int, int]], out: Array, positions: Array) -> None:
        """Read ranges of sealed rows of an array, one after the other, into out[positions], every checksum checked.

        Args:
            name: the array.
            ranges: first row and row after the last, each inside one shard.
            out: of the stored type and row shape.
            positions: int64, a different place in `out` for each row of the ranges.

        Raises:
            NotSealedError: some of the rows are not sealed.
            DamageError: a checksum does not hold.
        """
        for start, _ in ranges:
            self.check_sealed(self.layout.shard_of(start))
        read_scattered(self.backend, self.manifest, name, ranges, out, positions)

    @property
    def is_far_away(self) -> bool:
        """Whether every read is a request over a network, so that `read_window` pays."""
        return isinstance(self.members[0].backend, IsFarAway)

    def read_window(
        self,
        ranges: Sequence[tuple[int, int]],
        outs: Mapping[str, Array],
        positions: Array,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """What `read_scattered` does, for several arrays at once, of a store that is far away.

        It takes few requests, many of them side by side.

        Args:
            ranges: first row and row after the last, each inside one shard, ascending.
            outs: an array for each name, of the stored type and row shape.
            positions: int64, a different place in each of `outs` for each row of the ranges.
            is_stopped: asked now and then; once it says so, the rest is left unread.

        Raises:
            NotSealedError: some of the rows are not sealed.
            DamageError: a checksum does not hold.
        """
        backend = self.backend
        assert isinstance(backend, IsFarAway)
        shards = dict.fromkeys(self.layout.shard_of(start) for start, _ in ranges)
        for _ in backend.each(self.check_sealed, (shard for shard in shards if shard not in self._checked)):
            if is_stopped():
                return
        backend.read_windows(ranges, outs, positions, is_stopped)

    def check_shard(self, shard: int) -> Seal:
        """Check a shard's objects and arrays against its seal, and give the seal.

        Raises:
            DamageError: something does not hold.
        """
        seal = self.seal(shard)
        with holding(self.backend, shard):
            self.check_objects(seal)
            for spec in self.manifest.arrays:
                if self._array_digest(spec, seal) != seal.arrays.get(spec.name):
                    expected = "the sealed sha256 to hold, got another"
                    raise DamageError.in_shard(self.path, spec.name, shard, None, expected)
        return seal

    def _array_digest(self, spec: ArraySpec, seal: Seal) -> str:
        """The sha256 of a shard's rows of an array, read some chunks at a time: what a shard's size is, is a claim."""
        state, chunk_rows = hashlib.sha256(), self.manifest.chunk_rows
        step = chunk_rows * max(1, READ_BYTES // (chunk_rows * spec.row_bytes))
        for start in range(seal.start, seal.stop, step):
            values = self.backend.read(spec.name, seal.shard, start, min(start + step, seal.stop))
            state.update(np.ascontiguousarray(values).data.cast("B"))
        return state.hexdigest()

    def check_objects(self, seal: Seal) -> None:
        """Check the digests of a shard's objects as they lie.

        Raises:
            DamageError: one does not hold.
        """
        objects = self.backend.shard_objects(seal.shard)
        for key in sorted({*objects, *seal.objects}):
            if objects.get(key) != seal.objects.get(key):
                raise DamageError(
                    f"{self.path}: {key}, shard {seal.shard}: expected the sealed digest to hold, got another; "
                    "take another copy of the store, or dump this shard again",
                    shard=seal.shard,
                    array=key.split("/")[0],
                )

    def close(self) -> None:
        """Give files back."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, tuple[Any, ...]]:
        cache = getattr(self.members[0].backend, "cache_settings", None)
        return open_store, (self.path,) if cache is None else (self.path, cache)


def _check_out(out: Mapping[str, Array], spec: ArraySpec, num_rows: int) -> None:
    values = out.get(spec.name)
    shape = (num_rows, *spec.row_shape)
    if values is None:
        raise ValueError(f"out: expected an array for {spec.name!r}, got none")
    if values.shape != shape or values.dtype != np.dtype(spec.dtype) or not values.flags.c_contiguous:
        raise ValueError(
            f"out: expected {spec.name!r} C-contiguous, {spec.dtype} {shape}, got {values.dtype} {values.shape}"
        )


def num_rows_of(layout: Layout, shards: Sequence[int]) -> int:
    """Rows in some shards."""
    total = len(shards) * layout.shard_rows
    if layout.num_shards - 1 in shards:
        start, stop = layout.shard_bounds(layout.num_shards - 1)
        total += stop - start - layout.shard_rows
    return total


def open_store(path: str | Path, cache: CacheSettings | None = None) -> Store:
    """A store, or a series of stores as one, open for reading.

    Args:
        path: of the store, or its URL.
        cache: for a store at a URL, where pieces of its objects are kept; None keeps none.

    Raises:
        PathError: there is no store at the path.
        RemoteError: the URL can't be reached.
        NotSealedError: it is a series of which nothing is sealed yet.
        FormatVersionError: it is of a newer format version.
        DamageError: its manifest or final record was changed.
    """
    from storage.series import open_series  # a series is made of stores

    backend = backend_for(path, cache)
    try:
        return Store(backend)
    except PathError:
        series = open_series(path, cache)
        if series is None:
            raise
        return series


def open_one_store(path: str | Path) -> Store:
    """A store, open for reading, where a series of them won't do.

    Raises:
        PathError: there is no store at the path, or a series of several.
        FormatVersionError: it is of a newer format version.
        DamageError: its manifest or final record was changed.
    """
    from storage.series import refuse_series

    backend = backend_for(path)
    try:
        return Store(backend)
    except PathError:
        refuse_series(path)
        raise
