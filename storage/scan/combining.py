"""Write what several teachers say together, from their stores, without any of them: the store of an ensemble.

Legend: K kept entries.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from storage.encodings import Encoding, Sample, TopK
from storage.exclusive import sole_run
from storage.layout import Layout
from storage.manifest import COMBINED, Manifest
from storage.reader import open_store
from storage.scan.combine_options import CombineOptions, choose_encoding
from storage.scan.combined_rows import MemberRows, combined_rows
from storage.scan.conversion import check_target
from storage.scan.ensemble import Combine
from storage.scan.members import (
    BOUNDS,
    Member,
    SealedRows,
    bounds_of,
    check_members,
    ensemble_identity,
    lineage_of,
    whole_shards,
)
from storage.scan.passes import BLOCK_BYTES, Progress, fold_shards, one_at_a_time
from storage.scan.survey import Survey, choose_k, survey_shard
from storage.writer import StoreWriter


@dataclass(frozen=True)
class CombineResult:
    """What was written.

    Attributes:
        path: the new store.
        content_digest: of the new store.
        source_digests: of the stores, in order.
        encoding: of the new store, as a JSON object.
        num_rows: its sealed rows.
        num_quarantined: of these, rows without targets.
        num_bytes: of the new store on the disk.
        source_bytes: of the stores together.
        within: how far the new store may be from the ensemble, beyond rounding: `probability_within`,
            `entropy_within` and `max_logit_within`; 0 where it is exact.
        notes: what a person should know, a line each.
    """

    path: str
    content_digest: str
    source_digests: tuple[str, ...]
    encoding: dict[str, Any]
    num_rows: int
    num_quarantined: int
    num_bytes: int
    source_bytes: int
    within: dict[str, float]
    notes: tuple[str, ...]


def combine(
    sources: Sequence[str | Path],
    target: str | Path,
    options: CombineOptions | None = None,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> CombineResult:
    """Write the store of an ensemble, from the finalized stores of its members over the same rows.

    A pass over all rows first, that they are of the same samples, and for topk what is known of the ensemble; then
    shard by shard, each held against its members' seals on the way and checked again in the new store. Run again after
    a kill, it goes on where it stopped.

    Args:
        sources: two or more stores, or series.
        target: where the new one shall be; its suffix names the backend.
        options: how; the mean of probabilities by default.
        num_workers: threads, each with a shard in memory; by default one for each core.
        progress: called with the number of rows: each counts once in each of three passes.

    Raises:
        NotSealedError: a store is not finalized, or there is no shard that all have.
        MismatchError: they are not over the same rows and classes, or can't say what was asked for; or the target is
            another store.
        CorpusMismatchError: a row is not of the same sample in all, or has another hard target.
        PathError: the target holds something else.
        DamageError: a store is damaged.
        ValueError: an option would be ignored.
    """
    options = options or CombineOptions()
    advance = one_at_a_time(progress)
    with contextlib.ExitStack() as stack:
        members = [Member(stack.enter_context(open_store(source))) for source in sources]
        notes = check_members(members)
        encoding, temperatures = choose_encoding(members, options)
        lineage = lineage_of(members)
        for source in sources:
            check_target(source, target, "combination", lambda there: list(there.lineage or ()) == lineage)
        first = members[0].manifest
        layout = Layout(first.num_rows, first.shard_rows, first.chunk_rows)
        shards = whole_shards(members, layout)
        survey = fold_shards(
            shards, lambda shard: survey_shard(members, layout, shard, encoding, advance), Survey.merge, num_workers
        )
        assert survey is not None
        if isinstance(encoding, TopK):
            encoding = choose_k(survey, encoding, options.k, options.tolerance or 0.0, members)
        within = _within(members, survey, encoding)
        manifest = _target_manifest(members, options, encoding, temperatures, lineage, within)
        notes += _notes(members, encoding, within)
        with sole_run(target), StoreWriter.open(target, manifest) as writer:
            _write(members, writer, options.combine, shards, num_workers, advance)
            digest = writer.finalize(partial=True, progress=advance)
            store = writer.store
            return CombineResult(
                path=str(target),
                content_digest=digest,
                source_digests=tuple(member.digest for member in members),
                encoding=encoding.to_json(),
                num_rows=store.num_sealed_rows,
                num_quarantined=store.num_quarantined,
                num_bytes=store.backend.num_bytes(),
                source_bytes=sum(member.num_bytes() for member in members),
                within=within,
                notes=tuple(notes),
            )


def _within(members: Sequence[Member], survey: Survey, encoding: Encoding) -> dict[str, float]:
    """How far the new store may be from the ensemble, those bounds included that the stores have themselves."""
    own = dict.fromkeys(BOUNDS, 0.0)
    if isinstance(encoding, TopK):
        own |= {"probability_within": float(survey.off_K[encoding.k - 1]), "entropy_within": survey.entropy_within}
        own |= {"max_logit_within": survey.max_logit_within}
    elif isinstance(encoding, Sample):
        own |= {"entropy_within": math.log(len(members)) / 2, "max_logit_within": math.log(len(members)) / 2}
    before = [bounds_of(member.manifest) for member in members]
    return {
        name: _rounded_up(value + sum(bounds.get(name, 0.0) for bounds in before) / len(members))
        for name, value in own.items()
    }


def _rounded_up(value: float) -> float:
    """A bound with four digits, no smaller than it is."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit) * unit:.4g}")


def _target_manifest(
    members: Sequence[Member],
    options: CombineOptions,
    encoding: Encoding,
    temperatures: tuple[float, ...],
    lineage: Sequence[dict[str, Any]],
    within: dict[str, float],
) -> Manifest:
    """The manifest of the new store: rows, shards and chunks of the first."""
    first = members[0].manifest
    made = {str(number): dict(member.manifest.provenance) for number, member in enumerate(members, 1)}
    return replace(
        first,
        encoding=encoding,
        temperatures=temperatures,
        teacher=ensemble_identity([member.manifest.teacher for member in members], options.combine),
        compressor=options.compressor or first.compressor,
        provenance={"combined_from": [member.name for member in members], "members": made},
        format_version="",
        lineage=tuple(lineage),
        extra={**first.extra, COMBINED: {"num_stores": len(members), **within}},
    )


def _notes(members: Sequence[Member], encoding: Encoding, within: dict[str, float]) -> list[str]:
    notes = []
    if isinstance(encoding, TopK):
        dropped = sorted({value for member in members for value in member.manifest.temperatures} - {1.0})
        if dropped:
            notes.append(
                f"only T = 1 is declared, not {', '.join(f'{value:g}' for value in dropped)}: there an ensemble's tail "
                "takes the probabilities of all classes"
            )
        if within["probability_within"]:
            notes.append(f"a kept probability is off by {within['probability_within']:g} at most")
    if isinstance(encoding, Sample):
        seeds = [member.manifest.encoding.to_json()["seed"] for member in members]
        if len(set(seeds)) < len(seeds):
            notes.append("stores drew with one seed: draws with a seed each would vary less in the mean")
    if within["max_logit_within"]:
        notes.append(f"max_logit and lse are known within {within['max_logit_within']:g}")
    if within["entropy_within"]:
        notes.append(f"the entropy is known within {within['entropy_within']:g} nats")
    return notes


def _write(
    members: Sequence[Member],
    writer: StoreWriter,
    combine: Combine,
    shards: Sequence[int],
    num_workers: int | None,
    advance: Progress,
) -> None:
    """Write the shards that the target does not have yet."""
    manifest, layout = writer.manifest, writer.layout
    owed = set(writer.owed_shards())
    row_bytes = manifest.row_bytes + sum(member.manifest.row_bytes for member in members)
    step = manifest.chunk_rows * max(1, BLOCK_BYTES // (manifest.chunk_rows * row_bytes))

    def write_shard(shard: int) -> int:
        start, stop = layout.shard_bounds(shard)
        if shard in owed:
            rows = [SealedRows(member, start, stop) for member in members]
            found = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
            quarantine = []
            for first in range(start, stop, step):
                last = min(first + step, stop)
                parts = [
                    MemberRows(member.name, member.manifest, sealed.read(first, last), sealed.quarantine)
                    for member, sealed in zip(members, rows, strict=True)
                ]
                arrays, entries = combined_rows(manifest, combine, parts, first)
                quarantine += entries
                for name, values in arrays.items():
                    found[name][first - start : last - start] = values
            for sealed in rows:
                sealed.check()
            writer.write_shard(shard, found, quarantine)
        advance(stop - start)
        return stop - start

    fold_shards(shards, write_shard, int.__add__, num_workers)
