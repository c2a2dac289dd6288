"""The JSON records of a store: manifest, seals, final record. Each can tell whether a bit of it was changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.arrays import Arrays
from storage.errors import DamageError, FormatVersionError
from storage.layout import MAX_SHARDS, from_ranges, to_ranges
from storage.manifest import Manifest
from storage.untrusted import check_object_names, is_count, parse_json

MANIFEST = "manifest.json"
FINAL = "final.json"


@dataclass(frozen=True)
class QuarantineEntry:
    """A row that holds no targets, and why.

    Attributes:
        row: the row in the store.
        key: the sample's key.
        reason: one line for a person.
    """

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class Seal:
    """What makes a shard visible: its rows, and digests of what it says and of how it lies.

    Attributes:
        shard: index of the shard.
        start: its first row.
        stop: the row after its last.
        manifest_sha256: of the bytes of the store's manifest.
        arrays: sha256 of each array's rows, as C-order little-endian bytes.
        objects: `num_bytes` and `xxh3_128` of each object of the shard by key; empty in HDF5.
        quarantine: the rows without targets.
    """

    shard: int
    start: int
    stop: int
    manifest_sha256: str
    arrays: Mapping[str, str]
    objects: Mapping[str, Mapping[str, Any]]
    quarantine: tuple[QuarantineEntry, ...]

    def to_bytes(self) -> bytes:
        """One line of JSON, its own sha256 last."""
        value = vars(self) | {"quarantine": [vars(entry) for entry in self.quarantine]}
        return signed(value)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Seal":
        """The seal of a record.

        Raises:
            DamageError: a bit of it was changed.
        """
        value = checked_record(data, where)
        try:
            value["quarantine"] = tuple(QuarantineEntry(**entry) for entry in value["quarantine"])
            seal = cls(**value)
            _check_seal(seal)
            return seal
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamageError(
                f"{where}: expected a seal record, got {error}; take another copy of the store"
            ) from error


@dataclass(frozen=True)
class Final:
    """The final record: what the store is, once nothing is written any more.

    Attributes:
        content_digest: identity of what the store says.
        complete: whether every row is sealed.
        num_sealed_rows: rows in sealed shards.
        num_quarantined: of these, rows without targets.
        sealed: indices of the sealed shards.
        manifest_sha256: of the bytes of the store's manifest.
        seals_sha256: of all seal records, one after the other.
        metadata: `num_bytes` and `xxh3_128` of each object that is neither of a shard nor a record.
    """

    content_digest: str
    complete: bool
    num_sealed_rows: int
    num_quarantined: int
    sealed: tuple[int, ...]
    manifest_sha256: str
    seals_sha256: str
    metadata: Mapping[str, Mapping[str, Any]]

    def to_bytes(self) -> bytes:
        """One line of JSON, its own sha256 last; the sealed shards as half-open ranges."""
        return signed(vars(self) | {"sealed": to_ranges(self.sealed)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Final":
        """The final record of its bytes.

        Raises:
            DamageError: a bit of it was changed.
        """
        value = checked_record(data, where)
        try:
            value["sealed"] = _sealed_shards(value["sealed"])
            final = cls(**value)
            _check_final(final)
            return final
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamageError(
                f"{where}: expected a final record, got {error}; take another copy of the store"
            ) from error


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only: one value, one sequence of bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: JSON that a person can read."""
    return (json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest of stored bytes.

    Raises:
        FormatVersionError: a newer format version.
        DamageError: not JSON, or not a manifest that can be.
    """
    value = parse_json(data, where)
    try:
        return Manifest.from_json(value)
    except (FormatVersionError, DamageError) as error:
        text = str(error).removeprefix("manifest: ")
        raise type(error)(f"{where}: {text}") from error


def sha256(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def array_digests(arrays: Arrays) -> dict[str, str]:
    """sha256 of each array's bytes: C order, little-endian."""
    digests = {}
    for name in sorted(arrays):
        values = arrays[name]
        little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
        digests[name] = hashlib.sha256(little.data.cast("B") if little.size else b"").hexdigest()
    return digests


def content_digest(manifest: Manifest, seals: Sequence[Seal]) -> str:
    """sha256 of what the store says: the manifest's identity, then each sealed shard's rows and array digests.

    When, where, in how many runs and by how many workers it was written is not in it, nor how it is packed.
    """
    state = hashlib.sha256(canonical(manifest.identity()) + b"\n")
    for seal in seals:
        state.update(canonical({"start": seal.start, "stop": seal.stop, "arrays": dict(seal.arrays)}) + b"\n")
    return state.hexdigest()


def signed(value: Mapping[str, Any]) -> bytes:
    """A record's bytes: one line of canonical JSON, with the sha256 of the rest in it."""
    return canonical({**value, "record_sha256": sha256(canonical(dict(value)))}) + b"\n"


def checked_record(data: bytes, where: str) -> dict[str, Any]:
    """The object of a signed record, whose bytes must be just those that it would be written with.

    Raises:
        DamageError: a bit of it was changed.
    """
    value = parse_json(data, where)
    if isinstance(value, dict):
        digest = value.pop("record_sha256", None)
        try:
            if digest is not None and signed(value) == data:
                return value
        except (ValueError, RecursionError):
            pass
    raise DamageError(f"{where}: expected its checksum to hold, got another; take another copy of the store")


def _check_seal(seal: Seal) -> None:
    """Refuse a seal whose fields are no such values: whoever made it could sign it."""
    if not all(map(is_count, (seal.shard, seal.start, seal.stop))) or not isinstance(seal.manifest_sha256, str):
        raise ValueError("a shard, its rows and its manifest")
    check_object_names(seal.objects)
    if not isinstance(seal.arrays, dict) or not all(isinstance(digest, str) for digest in seal.arrays.values()):
        raise ValueError("a digest of each array")
    for entry in seal.quarantine:
        if not is_count(entry.row) or not isinstance(entry.key, str) or not isinstance(entry.reason, str):
            raise ValueError("a row, a key and a reason in each entry of the quarantine")


def _check_final(final: Final) -> None:
    if not all(map(is_count, (final.num_sealed_rows, final.num_quarantined))) or not isinstance(final.complete, bool):
        raise ValueError("counts of rows")
    if not all(isinstance(it, str) for it in (final.content_digest, final.manifest_sha256, final.seals_sha256)):
        raise ValueError("digests")
    check_object_names(final.metadata)


def _sealed_shards(ranges: Any) -> tuple[int, ...]:
    """Shards of ascending ranges, counted before they are listed."""
    total = last = 0
    for start, stop in ranges:
        if not is_count(start) or not is_count(stop) or not last <= start < stop:
            raise ValueError("ascending ranges of shards")
        last, total = stop, total + stop - start
    if total > MAX_SHARDS:
        raise ValueError(f"at most {MAX_SHARDS:,} sealed shards")
    return tuple(from_ranges(ranges))
