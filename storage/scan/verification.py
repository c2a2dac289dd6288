"""Check a whole store: every record, object, chunk, array and row, and say everything that does not hold."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import STATUS_OK, Array, Arrays
from storage.backends import IsFarAway, backend_for, holding
from storage.encodings import HeadArrays
from storage.errors import DamageError, FormatVersionError, NotSealedError, PathError
from storage.reader import Store, num_rows_of
from storage.records import FINAL, Final, Seal, content_digest
from storage.scan.files import check_metadata, lost_manifest, unexpected_files
from storage.scan.passes import Block, Progress, blocks, fold_shards, one_at_a_time
from storage.scan.rows import broken_rules
from storage.series import is_series

MAX_DAMAGE = 1000  # of a shard
MAX_LOST_SEALS = 1000  # after so many, one more says nothing new: a final record may claim millions
SPOT_HEAD_VALUES = 1 << 26  # of a head so small, every block's rows are recomputed; of a larger one, a shard's first's


@dataclass(frozen=True)
class Damage:
    """Something that does not hold.

    Attributes:
        message: what and where, one line.
        shard: index of the shard, or None where it is not in a shard.
        array: name of the array, or None.
        chunk: index of the chunk inside the shard, or None where it can't be told.
    """

    message: str
    shard: int | None = None
    array: str | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, error: DamageError) -> "Damage":
        """The damage that an error tells of."""
        return cls(str(error), error.shard, error.array, error.chunk)


@dataclass(frozen=True)
class VerifyResult:
    """What a check of a whole store found.

    Attributes:
        path: the store.
        damage: everything that does not hold, records first, then by shard.
        warnings: what is odd but harms nothing, such as files that are not the store's.
        notes: what could not be checked, and why.
        finalized: whether nothing will be written any more.
        content_digest: identity of the store, computed anew; None until it is finalized or where seals are damaged.
        num_rows: rows of the store; None where its manifest can't be read.
        num_sealed_rows: rows in sealed shards.
        missing_rows: half-open ranges of rows that are not sealed.
        num_shards: shards checked.
        num_chunks: chunks checked, all arrays together.
    """

    path: str
    damage: tuple[Damage, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finalized: bool = False
    content_digest: str | None = None
    num_rows: int | None = None
    num_sealed_rows: int = 0
    missing_rows: tuple[tuple[int, int], ...] = ()
    num_shards: int = 0
    num_chunks: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, `ok` first."""
        return {"ok": self.ok, **asdict(self)}


def verify(path: str | Path, *, num_workers: int | None = None, progress: Progress | None = None) -> VerifyResult:
    """Everything that is damaged in a store, nothing left out because something else is damaged too.

    Checked are: every record and how they refer to each other; the digest of every object, or of the whole file in
    HDF5; every chunk's checksum; every array's sealed sha256; that the sealed rows are those that they should be; the
    content digest; and that every row is one that a teacher can have given. Of hidden states, a few distributions of
    each chunk are computed anew and held against what is stored of them.

    Args:
        path: the store.
        num_workers: threads; by default one for each core.
        progress: called with the number of rows that were checked, now and then.

    Raises:
        PathError: there is no store at the path.
        FormatVersionError: it is of a newer format version.
    """
    if is_series(path):
        from storage.scan.series import verify_series

        return verify_series(path, num_workers, progress)
    backend = backend_for(path)
    try:
        store = Store(backend)
    except DamageError as error:
        notes = ("nothing else could be checked: the store does not open",)
        return VerifyResult(str(path), (Damage.of(error),), notes=notes)
    except (PathError, FormatVersionError) as error:
        lost = lost_manifest(backend)
        if lost is None:
            raise
        return VerifyResult(str(path), (Damage(f"{path}: {lost} (it does not open: {error})"),))
    with store:
        return _verify(store, num_workers, progress)


def _verify(store: Store, num_workers: int | None, progress: Progress | None) -> VerifyResult:
    sealed = store.sealed_shards()
    records = _check_records(store, sealed)
    sealed = sealed if records.only is None else records.only
    advance = one_at_a_time(progress)
    head = records.head
    shards = fold_shards(sealed, lambda shard: _check_shard(store, shard, head, advance), _merge, num_workers)
    shards = shards or _Shards()
    return VerifyResult(
        path=store.path,
        damage=(*records.damage, *shards.damage),
        warnings=tuple(unexpected_files(store, sealed)),
        notes=tuple(_notes(store, sealed)),
        finalized=store.finalized,
        content_digest=records.content_digest,
        num_rows=store.layout.num_rows,
        num_sealed_rows=num_rows_of(store.manifest.layout, sealed),
        missing_rows=tuple(_missing_rows(store, sealed)),
        num_shards=len(sealed),
        num_chunks=shards.num_chunks,
    )


def _notes(store: Store, sealed: tuple[int, ...]) -> Iterator[str]:
    if not sealed:
        yield "no shard is sealed: there is nothing yet that the manifest could be checked against"
    elif not store.finalized:
        yield "not finalized: there is no content digest yet, and shards that are not sealed are not looked at"
    if isinstance(store.backend, IsFarAway) and store.backend.keys() is None:
        yield "HTTP can't list what is there: objects that are not the store's would not be found"


def _missing_rows(store: Store, sealed: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    row = 0
    for shard in sealed:
        start, stop = store.layout.shard_bounds(shard)
        if start > row:
            yield row, start
        row = stop
    if row < store.layout.num_rows:
        yield row, store.layout.num_rows


@dataclass(frozen=True)
class _Records:
    damage: tuple[Damage, ...]
    content_digest: str | None
    head: HeadArrays | None
    only: tuple[int, ...] | None  # shards that are worth a look, where most seals are none


def _check_records(store: Store, sealed: tuple[int, ...]) -> _Records:
    """Read every seal, and check the final record and the metadata against what is there."""
    damage: list[Damage] = []
    seals: list[Seal] = []
    state, num_quarantined, only = hashlib.sha256(), 0, None
    for shard in sealed:
        if len(damage) >= MAX_LOST_SEALS:
            text = f"{store.path}: expected a store, got {len(damage):,} seals that are none; the others were not read"
            damage.append(Damage(text))
            only = tuple(seal.shard for seal in seals)
            break
        try:
            seal = store.seal(shard)
        except NotSealedError:
            damage.append(Damage(f"{store.path}: shard {shard}: expected its seal, got none any more", shard))
            continue
        except DamageError as error:
            damage.append(Damage.of(error))
            continue
        state.update(seal.to_bytes())
        num_quarantined += len(seal.quarantine)
        seals.append(replace(seal, objects={}, quarantine=()))  # the rest grows with the rows
    digest = content_digest(store.manifest, seals) if store.final is not None and len(seals) == len(sealed) else None
    if store.final is not None and digest is not None:
        counted = _Counted(digest, state.hexdigest(), num_quarantined)
        damage += [Damage(f"{store.path}: {FINAL}: {text}") for text in _check_final(store, store.final, counted)]
    try:
        store.backend.check_final()  # also without a final record: it may be what was damaged
    except DamageError as error:
        damage.append(Damage.of(error))
    head = None
    try:
        head = store.head()
    except DamageError as error:
        damage.append(Damage.of(error))
    damage += [Damage(f"{store.path}: {text}") for text in check_metadata(store)]
    return _Records(tuple(damage), digest, head, only)


@dataclass(frozen=True)
class _Counted:
    content_digest: str
    seals_sha256: str
    num_quarantined: int


def _check_final(store: Store, final: Final, counted: _Counted) -> Iterator[str]:
    """What the final record says otherwise than the seals and the manifest do."""
    expected = {
        "content_digest": counted.content_digest,
        "seals_sha256": counted.seals_sha256,
        "num_quarantined": counted.num_quarantined,
        "num_sealed_rows": num_rows_of(store.manifest.layout, final.sealed),
        "complete": len(final.sealed) == store.layout.num_shards,
    }
    for name, value in expected.items():
        if getattr(final, name) != value:
            yield f"expected {name} {value} as the seals give, got {getattr(final, name)}; take another copy"


@dataclass(frozen=True)
class _Shards:
    damage: tuple[Damage, ...] = ()
    num_chunks: int = 0


def _merge(left: _Shards, right: _Shards) -> _Shards:
    return _Shards(left.damage + right.damage, left.num_chunks + right.num_chunks)


@dataclass
class _Findings:
    """Damage of one shard as it is found, and the arrays that need no further look."""

    store: Store
    shard: int
    damage: list[Damage] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)

    def add(self, message: str, array: str | None = None, chunk: int | None = None) -> None:
        place = "" if array is None else f"array {array!r}, "
        place += f"shard {self.shard}" + ("" if chunk is None else f", chunk {chunk}")
        self.damage.append(Damage(f"{self.store.path}: {place}: {message}", self.shard, array, chunk))

    def found_in(self, array: str) -> bool:
        return any(item.array == array for item in self.damage)


def _check_shard(store: Store, shard: int, head: HeadArrays | None, advance: Progress) -> _Shards:
    """Go through one shard once, block by block, with the digests of its arrays running along."""
    with holding(store.backend, shard):
        return _check_held(store, shard, head, advance)


def _check_held(store: Store, shard: int, head: HeadArrays | None, advance: Progress) -> _Shards:
    findings = _Findings(store, shard)
    try:
        seal = store.seal(shard)
    except (DamageError, NotSealedError):
        seal = None  # told among the records
    specs = store.manifest.arrays
    running = {spec.name: hashlib.sha256() for spec in specs}
    refused = set() if seal is None else {entry.row for entry in seal.quarantine}
    num_chunks = 0
    is_small = head is not None and head.weight_CW.size <= SPOT_HEAD_VALUES
    for block in blocks(store.manifest, shard):
        arrays = {}
        for spec in specs:
            values = None if spec.name in findings.lost else _read(findings, spec.name, block)
            if values is not None:
                arrays[spec.name] = values
                running[spec.name].update(values.data.cast("B"))
        if len(arrays) == len(specs):
            _check_rows(findings, block, arrays, head if is_small or block.chunks[0] == 0 else None)
        if seal is not None and "status" in arrays:
            _check_quarantine(findings, block, arrays["status"], refused)
        num_chunks += len(block.chunks) * len(specs)
        advance(block.stop - block.start)
        if len(findings.lost) == len(specs):  # nothing is left to look at, however many chunks there should be
            advance(store.layout.shard_bounds(shard)[1] - block.stop)
            break
    if seal is not None:
        _check_digests(findings, seal, {name: state.hexdigest() for name, state in running.items()})
    return _Shards(tuple(findings.damage), num_chunks)


def _read(findings: _Findings, name: str, block: Block) -> Array | None:
    """An array's rows of a block; where they can't be read, each of its chunks alone, so as to name every bad one."""
    backend, layout = findings.store.backend, findings.store.layout
    try:
        return backend.read(name, block.shard, block.start, block.stop)
    except (DamageError, OSError) as error:
        first = error
    before = len(findings.damage)
    for chunk in block.chunks:
        try:
            backend.read(name, block.shard, *layout.chunk_bounds(block.shard, chunk))
        except DamageError as error:
            findings.damage.append(Damage.of(error))
            if error.chunk is None:  # the array as a whole: no other chunk can tell more
                findings.lost.add(name)
                break
            if len(findings.damage) >= MAX_DAMAGE:
                findings.lost.add(name)
                findings.add("expected chunks that hold, got so many that don't that the others were not read", name)
                break
        except OSError as error:
            findings.add(f"expected a disk that can be read, got {error.strerror or error}", name, chunk)
    if len(findings.damage) == before:
        findings.add(f"expected the same bytes each time it is read, got an error once: {first}", name)
    return None


def _check_rows(findings: _Findings, block: Block, arrays: Arrays, head: HeadArrays | None) -> None:
    for rule in broken_rules(findings.store.manifest, arrays, head):
        row = str(block.start + rule.first) + ("" if rule.position is None else f", position {rule.position}")
        chunk = block.chunks[0] + rule.first // findings.store.manifest.chunk_rows
        others = f" and in {rule.num_rows - 1} more rows near it" if rule.num_rows > 1 else ""
        findings.add(f"expected {rule.expected}, got something else in row {row}{others}", rule.array, chunk)


def _check_quarantine(findings: _Findings, block: Block, status_N: Array, refused: set[int]) -> None:
    """A row is in the seal's quarantine if, and only if, its status says so."""
    by_status = set((np.flatnonzero(status_N != STATUS_OK) + block.start).tolist())
    by_seal = {row for row in refused if block.start <= row < block.stop}
    for row in sorted(by_status ^ by_seal)[:1]:
        chunk = block.chunks[0] + (row - block.start) // findings.store.manifest.chunk_rows
        findings.add(f"expected a quarantine entry for just the refused rows, got row {row} otherwise", "status", chunk)


def _check_digests(findings: _Findings, seal: Seal, running: dict[str, str]) -> None:
    """The sealed sha256 of every array, and the digests of the objects as they lie, where nothing else is known yet."""
    for name, digest in running.items():
        if seal.arrays.get(name) != digest and not findings.found_in(name):
            findings.add("expected the sealed sha256 to hold, got another; take another copy of the store", name)
    try:
        objects = findings.store.backend.shard_objects(seal.shard)
    except DamageError as error:
        if not findings.found_in(str(error.array)):
            findings.damage.append(Damage.of(error))
        return
    for key in sorted({*objects, *seal.objects}):
        name = key.split("/")[0]
        if objects.get(key) != seal.objects.get(key) and not findings.found_in(name):
            findings.add(f"expected the sealed digest of {key} to hold, got another; take another copy", name)
