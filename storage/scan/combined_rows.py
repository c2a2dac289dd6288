"""The rows of an ensemble's store, made of the same rows of its members' stores.

Legend: N rows, P positions, R distributions (N, or N P in sequences), C classes, K kept entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, Array, Arrays
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.scan.ensemble import (
    Combine,
    Known,
    joined_draws,
    known_entries,
    mean_logits,
    mean_target_logprobs,
    target_logprobs,
)
from storage.sequences import ROW_ARRAYS, flatten_positions, next_tokens

BATCH_VALUES = 1 << 17  # few enough to stay in the cache while they are exponentiated
NO_CLASS = "logits are not finite: -inf for every class"  # as a dump says it


@dataclass(frozen=True)
class MemberRows:
    """Some rows of one member's store.

    Attributes:
        name: of the store, for messages.
        manifest: of the store.
        arrays: of the rows; what they are made for says which.
        quarantine: entries of the rows without targets, by row.
    """

    name: str
    manifest: Manifest
    arrays: Arrays
    quarantine: Mapping[int, QuarantineEntry] = field(default_factory=dict)


def topk_columns(manifests: Sequence[Manifest]) -> list[int]:
    """Which column of the statistics is T = 1, for each member that declares it."""
    return [manifest.temperatures.index(1.0) for manifest in manifests]


def has_targets(parts: Sequence[MemberRows]) -> Array:
    """Which rows have targets in every member, bool (N,)."""
    has_N: Array = np.logical_and.reduce([part.arrays["status"] == STATUS_OK for part in parts])
    return has_N


def known_parts(parts: Sequence[MemberRows]) -> Iterator[Known]:
    """What is known of topk members' rows with targets in all of them, some distributions after the other."""
    manifests = [part.manifest for part in parts]
    chosen = _chosen(parts, has_targets(parts), ("ids", "values", "value_range", "lse", "log_tail", "entropy"))
    columns = topk_columns(manifests)
    for batch in _batches(chosen, sum(flat["ids"].shape[1] for flat in chosen)):
        yield known_entries(batch, columns, manifests[0].num_classes)


def combined_rows(
    manifest: Manifest, combine: Combine, parts: Sequence[MemberRows], start: int
) -> tuple[dict[str, Array], list[QuarantineEntry]]:
    """All arrays of some rows of the ensemble's store, and the entries of those without targets.

    Args:
        manifest: of the ensemble's store.
        combine: how the members speak together.
        parts: the rows in each member's store, all arrays.
        start: the first row.
    """
    has_N = has_targets(parts)
    num_rows = len(has_N)
    refused = np.flatnonzero(~has_N)
    source_N = np.argmax([part.arrays["status"] != STATUS_OK for part in parts], axis=0)  # the first that refuses it
    found = {spec.name: spec.full(num_rows) for spec in manifest.arrays}
    for name in ROW_ARRAYS & set(found):
        found[name] = parts[0].arrays[name].copy()
        for row in refused:
            found[name][row] = parts[source_N[row]].arrays[name][row]
    digests = np.stack([part.arrays["sample_digest"] for part in parts])
    found["sample_digest"] = digests[(digests != 0).argmax(axis=0), np.arange(num_rows)]
    quarantine = {start + int(row): _entry(parts, start + int(row)) for row in refused}
    specs = [spec for spec in manifest.arrays if spec.name not in ROW_ARRAYS]
    new = _combined_distributions(manifest, combine, parts, has_N)
    for spec in specs:
        found[spec.name][has_N] = new[spec.name].reshape(-1, *spec.row_shape)
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    lost_N = np.zeros(num_rows, bool)
    lost_N[has_N] = np.isneginf(new["max_logit"]).reshape(-1, num_positions).any(axis=1)
    found["status"][lost_N] = STATUS_NOT_FINITE
    for spec in specs:
        found[spec.name][lost_N] = spec.fill_value
    quarantine |= {start + int(row): QuarantineEntry(start + int(row), "", NO_CLASS) for row in np.flatnonzero(lost_N)}
    return found, [quarantine[row] for row in sorted(quarantine)]


def _entry(parts: Sequence[MemberRows], row: int) -> QuarantineEntry:
    """What the members that refuse a row say of it, each by its store's name."""
    entries = [(part.name, part.quarantine[row]) for part in parts if row in part.quarantine]
    key = next((entry.key for _, entry in entries if entry.key), "")
    return QuarantineEntry(row, key, "; ".join(f"{name}: {entry.reason}" for name, entry in entries))


def _combined_distributions(
    manifest: Manifest, combine: Combine, parts: Sequence[MemberRows], has_N: Array
) -> dict[str, Array]:
    """The flat arrays of the rows with targets in all members."""
    chosen = _chosen(parts, has_N, None)
    target_R = _targets(manifest, parts[0].arrays, has_N)
    width = max(_width(part.manifest.encoding, manifest.num_classes) for part in parts)
    columns = topk_columns([part.manifest for part in parts]) if isinstance(manifest.encoding, TopK) else []
    made, start = [], 0
    for batch in _batches(chosen, width * len(parts)):
        stop = start + len(batch[0]["max_logit"])
        target = None if target_R is None else target_R[start:stop]
        made.append(_of_batch(manifest, combine, batch, columns, target))
        start = stop
    if not made:
        return {spec.name: spec.full(0) for spec in manifest.arrays}
    return {name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]}


def _of_batch(
    manifest: Manifest, combine: Combine, batch: Sequence[Arrays], columns: Sequence[int], target_R: Array | None
) -> dict[str, Array]:
    encoding, num_classes = manifest.encoding, manifest.num_classes
    logits_RC = None
    with np.errstate(invalid="ignore"):  # rows of which no class is left
        if isinstance(encoding, TopK):
            made = known_entries(batch, columns, num_classes).arrays(encoding.k, encoding.values, num_classes)
        elif isinstance(encoding, Sample):
            places = encoding.num_places(num_classes)
            made = joined_draws(batch, encoding.draws // len(batch), num_classes, places)
        else:
            assert isinstance(encoding, Dense)
            logits_RC = mean_logits(batch, combine)
            made = encoding.encode(np.where(_is_lost(logits_RC), 0, logits_RC), manifest.temperatures)
            made["max_logit"] = logits_RC.max(axis=1)
        if "hard_target_logprob" in batch[0]:
            if logits_RC is not None and target_R is not None:
                made["hard_target_logprob"] = target_logprobs(logits_RC, target_R)
            else:
                made["hard_target_logprob"] = mean_target_logprobs(batch, combine, logits_RC)
    return made


def _is_lost(logits_RC: Array) -> Array:
    is_lost_R1: Array = np.isneginf(logits_RC.max(axis=1))[:, None]
    return is_lost_R1


def _width(encoding: Encoding, num_classes: int) -> int:
    """Numbers that are worked on for a distribution of a member."""
    if isinstance(encoding, TopK):
        return encoding.k
    return encoding.num_places(num_classes) if isinstance(encoding, Sample) else num_classes


def _targets(manifest: Manifest, arrays: Arrays, has_N: Array) -> Array | None:
    """The true class of each distribution, -1 where it has none; None where the store does not hold them."""
    if "hard_target" in arrays:
        return arrays["hard_target"][has_N]
    if manifest.sequences is not None and "token_ids" in arrays:
        return next_tokens(arrays["token_ids"][has_N], arrays["position_ids"][has_N]).reshape(-1)
    return None


def _chosen(parts: Sequence[MemberRows], has_N: Array, names: Sequence[str] | None) -> list[dict[str, Array]]:
    """Flat arrays of the rows with targets, of each member."""
    found = []
    for part in parts:
        wanted = [name for name in part.arrays if name not in ROW_ARRAYS and (names is None or name in names)]
        rows = {name: part.arrays[name] if has_N.all() else part.arrays[name][has_N] for name in wanted}
        found.append(flatten_positions(part.manifest.sequences, rows))
    return found


def _batches(flats: Sequence[Mapping[str, Array]], width: int) -> Iterator[list[dict[str, Array]]]:
    """Some distributions of each member after the other."""
    num_rows, step = len(flats[0]["lse"]), max(1, BATCH_VALUES // width)
    for start in range(0, num_rows, step):
        yield [{name: values[start : start + step] for name, values in flat.items()} for flat in flats]
