"""The stores that are combined: whether they are over the same rows, who they are together, and reading from them."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import Array, Arrays
from storage.errors import CorpusMismatchError, DamageError, MismatchError, NotSealedError
from storage.layout import Layout
from storage.manifest import COMBINED, Manifest
from storage.reader import Store
from storage.records import QuarantineEntry
from storage.scan.ensemble import Combine

BOUNDS = ("probability_within", "entropy_within", "max_logit_within")  # in it; nats but for the first
SHARED = ("num_rows", "num_classes", "class_names", "has_hard_targets", "sequences")
ENSEMBLE = "ensemble"  # as `teacherdump` names the kind of a teacher that is several models


class Member:
    """A store that is combined with others, open.

    Attributes:
        store: the store, or a series as one.
        digest: its content digest.

    Raises:
        NotSealedError: it is not finalized.
    """

    def __init__(self, store: Store) -> None:
        digest = store.content_digest
        if digest is None:
            raise NotSealedError(
                f"{store.path}: expected a finalized store, got one that is not; "
                "finish the dump, or finalize at what is sealed: logitstore finalize --partial"
            )
        self.store, self.digest = store, digest
        self.name = Path(store.path).name
        self._sealed = frozenset(store.sealed_shards())
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What made it."""
        return self.store.manifest

    def has(self, start: int, stop: int) -> bool:
        """Whether rows [start, stop) are sealed."""
        return all(shard in self._sealed for shard, _, _ in self.store.layout.split(start, stop))

    def check_once(self, shard: int) -> None:
        """Hold a shard against its seal, the first time.

        Raises:
            DamageError: something does not hold.
        """
        with self._lock:
            if shard not in self._checked:
                self.store.check_shard(shard)
                self._checked.add(shard)

    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(store.backend.num_bytes() for store in self.store.members)


class SealedRows:
    """Rows [start, stop) of a member, read in order, a block after the other, and held against the seals.

    A shard that lies in the rows as a whole is hashed while it is read; one that does not is checked once, apart.

    Args:
        member: the store.
        start: first row.
        stop: row after the last.
    """

    def __init__(self, member: Member, start: int, stop: int) -> None:
        self._member, store = member, member.store
        self.names = [spec.name for spec in store.manifest.arrays]
        pieces = list(store.layout.split(start, stop))
        self._seals = {shard: store.seal(shard) for shard, _, _ in pieces}
        self._running: dict[int, dict[str, Any]] = {}
        for shard, first, end in pieces:
            if (first, end) == store.layout.shard_bounds(shard):
                self._running[shard] = {name: hashlib.sha256() for name in self.names}
            else:
                member.check_once(shard)
        entries = [entry for seal in self._seals.values() for entry in seal.quarantine]
        self.quarantine: Mapping[int, QuarantineEntry] = {entry.row: entry for entry in entries}

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """The next rows of all arrays."""
        store = self._member.store
        arrays = store.read(self.names, start, stop)
        for shard, first, end in store.layout.split(start, stop):
            for name, state in self._running.get(shard, {}).items():
                state.update(np.ascontiguousarray(arrays[name][first - start : end - start]).data.cast("B"))
        return arrays

    def check(self) -> None:
        """Hold what was read against the seals, once all of it was.

        Raises:
            DamageError: a shard is not what was sealed.
        """
        for shard, states in self._running.items():
            for name, state in states.items():
                if state.hexdigest() != self._seals[shard].arrays.get(name):
                    raise DamageError.in_shard(
                        self._member.store.path, name, shard, None, "the sealed sha256 to hold, got another"
                    )


def bounds_of(manifest: Manifest) -> dict[str, float]:
    """How far a store may be from the ensemble that it was combined to, by name; empty where it was not.

    Raises:
        DamageError: the manifest says no such thing.
    """
    said = manifest.extra.get(COMBINED, {})
    if not isinstance(said, dict):
        raise DamageError(f"manifest: expected an object as {COMBINED!r}, got another; take another copy of the store")
    bounds = {name: value for name, value in said.items() if name in BOUNDS}
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise DamageError(
                f"manifest: expected a number of at least 0 as {name!r}, got {value!r}; take another copy of the store"
            )
    return bounds


def check_members(members: Sequence[Member]) -> list[str]:
    """What a person should know of stores that may be combined, a line each.

    Raises:
        ValueError: there are fewer than two.
        MismatchError: two are the same, or they are not over the same rows and classes.
    """
    if len(members) < 2:
        raise ValueError(f"stores: expected two or more to combine, got {len(members)}; name each")
    first, notes = members[0], []
    for index, member in enumerate(members[1:], 1):
        same = next((other for other in members[:index] if other.digest == member.digest), None)
        if same is not None:
            raise MismatchError(
                f"{member.store.path}: expected another store than {same.store.path}, got one that says the same; "
                "name each store once"
            )
        for name in SHARED:
            here, there = _fact(first.manifest, name), _fact(member.manifest, name)
            if here != there:
                raise MismatchError(
                    f"{member.store.path}: expected a store over the same rows and classes as {first.store.path}, got "
                    f"another {name}: {_brief(there)} here, {_brief(here)} there; combine stores of one corpus that "
                    "name the same classes"
                )
        if member.manifest.preprocess != first.manifest.preprocess:
            notes.append(f"{member.name}'s teacher saw its input otherwise; students get what {first.name}'s saw")
        if member.manifest.corpus.get("fingerprint") != first.manifest.corpus.get("fingerprint"):
            notes.append(f"{member.name} has another index of the corpus; its samples are compared one by one")
    return notes


def _fact(manifest: Manifest, name: str) -> Any:
    value = getattr(manifest, name)
    if name == "sequences" and value is not None:  # how many outputs of a teacher were cut off is its own business
        return {key: part for key, part in value.to_json().items() if key != "num_padded"}
    return value


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole_shards(members: Sequence[Member], layout: Layout) -> list[int]:
    """The shards of a layout whose rows every member has.

    Raises:
        NotSealedError: there are none.
    """
    shards = [
        shard
        for shard in range(layout.num_shards)
        if all(member.has(*layout.shard_bounds(shard)) for member in members)
    ]
    if not shards:
        raise NotSealedError(
            f"{members[0].store.path}: expected a shard of {layout.shard_rows} rows that all stores have, got none; "
            "finish the dumps"
        )
    return shards


def check_same_samples(members: Sequence[Member], parts: Sequence[Arrays], start: int) -> None:
    """Hold some rows' digests and hard targets against each other; 0 is a sample that could not be read.

    Args:
        members: the stores.
        parts: `sample_digest`, and `hard_target` where it is kept, of the same rows of each.
        start: the first row.

    Raises:
        CorpusMismatchError: they differ; the message names the first row.
    """
    known_N = parts[0]["sample_digest"]
    for member, part in zip(members[1:], parts[1:], strict=True):
        digest_N = part["sample_digest"]
        other_N = (digest_N != known_N) & (digest_N != 0) & (known_N != 0)
        known_N = np.where(known_N == 0, digest_N, known_N)
        _refuse_rows(members[0], member, other_N, start, "samples", "combine stores of the same corpus, in one order")
        if "hard_target" in part:
            other_N = part["hard_target"] != parts[0]["hard_target"]
            _refuse_rows(members[0], member, other_N, start, "hard targets", "dump one of them again with those labels")


def _refuse_rows(first: Member, member: Member, other_N: Array, start: int, what: str, advice: str) -> None:
    if other_N.any():
        row, more = start + int(other_N.argmax()), int(other_N.sum()) - 1
        others = f" and of {more} more rows near it" if more else ""
        raise CorpusMismatchError(
            f"{member.store.path}: expected the {what} of {first.store.path}, got others in row {row}{others}; {advice}"
        )


def ensemble_identity(teachers: Sequence[Mapping[str, Any]], combine: Combine) -> dict[str, Any]:
    """Who the teachers are together: what a dump of their models as an ensemble says, as far as one could be.

    Where they are of several architectures or precisions, which no single dump is, each member says its own.
    """
    members = [{"digest": str(teacher.get("digest")), "kind": teacher.get("kind")} for teacher in teachers]
    lines = "".join(f"{member['digest']}\n" for member in members)
    identity: dict[str, Any] = {"digest": hashlib.sha256(lines.encode() + combine.encode()).hexdigest()}
    identity |= {"kind": ENSEMBLE}
    for name in ("arch", "precision"):
        said = [teacher.get(name) for teacher in teachers]
        known = sorted({str(value) for value in said if value is not None})
        identity[name] = known[0] if len(known) == 1 else None
        if len(known) > 1:
            members = [member | {name: value} for member, value in zip(members, said, strict=True)]
    return identity | {"combine": combine, "members": members}


def lineage_of(members: Sequence[Member]) -> list[dict[str, Any]]:
    """What the manifest says of the stores: one object each, in order, with what it has of its own."""
    first = members[0].manifest
    found = []
    for member in members:
        manifest = member.manifest
        origin: dict[str, Any] = {
            "content_digest": member.digest,
            "encoding": manifest.encoding.to_json(),
            "temperatures": list(manifest.temperatures),
        }
        for name in ("preprocess", "corpus"):
            if getattr(manifest, name) != getattr(first, name):
                origin[name] = dict(getattr(manifest, name))
        for name in (COMBINED, "lineage"):
            value = manifest.to_json().get(name)
            if value is not None:
                origin[name] = value
        found.append(origin)
    return found
