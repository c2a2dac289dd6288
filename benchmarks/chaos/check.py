"""Whether a store is what an undisturbed run gives: its digest, every row, every loss named, nothing left behind."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import numpy as np

from benchmarks.chaos.reference import Reference, differing_rows, read_all
from storage.arrays import STATUS_UNWRITTEN
from storage.backends.zarr3 import seal_name
from storage.errors import StoreError
from storage.reader import Store, open_store
from storage.records import FINAL, MANIFEST
from storage.scan import verify

SHOWN = 5
# What the quarantine must say of each kind of loss, a word of it.
REASONS = {"poison": "NaN", "deadly": "died"}


def problems(path: str, reference: Reference, keys: AbstractSet[str] | None = None) -> list[str]:
    """Everything that does not hold of a finished store; nothing where all does.

    Args:
        path: or URL of the store.
        reference: what an undisturbed run gave.
        keys: of all objects in the store; None where its verification looks for strangers itself.
    """
    try:
        found = list(_problems(path, reference, keys))
    except StoreError as error:
        found = [f"the store can't be read: {error}"]
    return [f"{path}: {problem}" for problem in found]


def _problems(path: str, reference: Reference, keys: AbstractSet[str] | None) -> Iterator[str]:
    with open_store(path) as store:
        if not store.finalized:
            yield "expected a finalized store, got one that is not"
            return
        if store.content_digest != reference.content_digest:
            yield f"expected the content digest {reference.content_digest}, got {store.content_digest}"
        yield from _shards(store)
        yield from _quarantine(store, reference)
        if keys is not None:
            yield from _strangers(store, keys)
    arrays = read_all(path)
    unwritten = np.flatnonzero(arrays["status"] == STATUS_UNWRITTEN)
    if len(unwritten):
        yield f"expected every row written, got {len(unwritten)} that are not, the first {unwritten[0]}"
    others = [row for row in differing_rows(arrays, reference.arrays) if row != reference.deadly_row]
    if others:
        yield f"expected the rows of an undisturbed run, got {len(others)} others, such as {others[:SHOWN]}"
    result = verify(path)
    for damage in result.damage:
        yield f"verify: {damage.message}"
    for warning in result.warnings:
        yield f"verify warns: {warning}"


def _shards(store: Store) -> Iterator[str]:
    """Each row in just one sealed shard."""
    seals = [store.seal(shard) for shard in store.sealed_shards()]
    expected = [store.layout.shard_bounds(shard) for shard in range(store.layout.num_shards)]
    if [(seal.start, seal.stop) for seal in seals] != expected:
        yield f"expected {len(expected)} shards that hold each row once, got others"


def _quarantine(store: Store, reference: Reference) -> Iterator[str]:
    """Each loss named with its reason, and nothing else."""
    entries = {entry.row: entry for entry in store.quarantine()}
    missing = sorted(set(reference.refused) - set(entries))
    innocent = sorted(set(entries) - set(reference.refused))
    if missing:
        yield f"expected {len(reference.refused)} rows in the quarantine, got none for {missing[:SHOWN]}"
    for row in innocent[:SHOWN]:
        yield f"expected a target for row {row}, got it quarantined: {entries[row].reason}"
    for row, kind in reference.refused.items():
        reason = entries[row].reason if row in entries else ""
        if row in entries and (not reason or REASONS.get(kind, "") not in reason):
            yield f"row {row}: expected a reason that tells of {kind!r}, got {reason!r}"
        if kind not in REASONS and "NaN" in reason:
            yield f"row {row}: expected a reason that tells of {kind!r}, got {reason!r}"


def _strangers(store: Store, keys: AbstractSet[str]) -> Iterator[str]:
    """Objects that no record tells of, and those that are missing."""
    expected = {MANIFEST, FINAL, "zarr.json", *(f"{spec.name}/zarr.json" for spec in store.manifest.arrays)}
    for shard in store.sealed_shards():
        expected |= {seal_name(shard), *store.seal(shard).objects}
    if keys != expected:
        more, less = sorted(keys - expected), sorted(expected - keys)
        yield f"expected no other objects than the store's, got {more[:SHOWN]} more, and {less[:SHOWN]} missing"
