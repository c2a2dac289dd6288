"""A new version of a finished store, in which its refused rows are tried again; what did not change is shared.

The old store is never touched. Whatever is in the new one is bit for bit what an undisturbed run would have put there:
rows are scored in the batches that they belong to, in their places, zeros in the place of the rows that need no trial.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from storage.backends import backend_for
from storage.console import Pass, format_count
from storage.errors import MismatchError, NotSealedError, PathError
from storage.exclusive import sole_run
from storage.reader import Store, open_one_store
from storage.records import MANIFEST, QuarantineEntry, Seal
from storage.urls import is_url
from storage.versions import read_shard, share_shard
from storage.writer import StoreWriter
from teacherdump.config import DumpConfig
from teacherdump.plan import batches
from teacherdump.report import KILLED, ShardReport, Stopwatch, sealed_bytes
from teacherdump.room import Room
from teacherdump.source import Say, Source, open_source, prepare

if TYPE_CHECKING:
    from teacherdump.dump import Job
    from teacherdump.run import DumpResult
    from teacherdump.shard import EncodedShard

SHOWN_ROWS = 3
RETRIED_FROM = "retried_from"  # in the provenance: the content digest of the older version


@dataclass(frozen=True)
class Retried:
    """What became of refused rows that were tried again.

    Attributes:
        path: of the older version.
        num_tried: rows that it holds without targets.
        left: of these, the ones that still have none, with the reasons of now; samples that kill the process that runs
            them are not tried at all, and among these.
        is_written: whether there is a new version; there is none where nothing was to be tried.
    """

    path: str
    num_tried: int
    left: tuple[QuarantineEntry, ...]
    is_written: bool

    def summary(self) -> str:
        """How many came back, and why the others did not."""
        if not self.is_written:
            why = "targets for every row" if not self.left else "no refused row but those that kill what runs them"
            return f"nothing to retry: {self.path} has {why}; nothing was written"
        num_back = self.num_tried - len(self.left)
        text = f"retried {format_count(self.num_tried)} rows of {self.path}: {format_count(num_back)} came back"
        if self.left:
            shown = "; ".join(f"row {entry.row} ({entry.key}): {entry.reason}" for entry in self.left[:SHOWN_ROWS])
            more = len(self.left) - SHOWN_ROWS
            text += f", {format_count(len(self.left))} did not: {shown}"
            text += f"; and {format_count(more)} more (logitstore info --quarantine)" if more > 0 else ""
        return text


def retry(config: DumpConfig, say: Say, quiet: bool) -> "DumpResult":
    """Write the new version, or go on with it.

    Raises:
        NotSealedError: the old store is not finalized.
        MismatchError: this run's teacher, corpus or encoding is not that of the old store, or the new path holds
            something else.
        PathError: both are one path.
    """
    from teacherdump.run import dump_job, untouched

    assert config.retry_quarantined is not None
    with open_one_store(config.retry_quarantined) as old:
        source = _checked_source(old, config)
        tried = old.quarantine()
        if not may_be_tried(tried):
            return replace(untouched(old), retried=Retried(old.path, 0, tuple(tried), is_written=False))
        with sole_run(config.out):
            job = prepare(source, say)
            provenance = {**job.manifest.provenance, RETRIED_FROM: old.content_digest}
            job = replace(job, manifest=replace(old.manifest, provenance=provenance), head=old.head())
            say(f"retrying {format_count(len(tried))} rows of {old.path}")
            result = dump_job(config, job, say, quiet, old)
        with open_one_store(config.out) as new:
            left = tuple(new.quarantine())
        return replace(result, retried=Retried(old.path, len(tried), left, is_written=True))


def _checked_source(old: Store, config: DumpConfig) -> Source:
    """What the run reads, which must be what the old store was made from."""
    where = f"retry_quarantined '{old.path}'"
    if old.content_digest is None:
        raise NotSealedError(
            f"{where}: expected a finalized store, got one that is not; finish the dump, or finalize at what is sealed"
            ": logitstore finalize --partial"
        )
    if _is_same(old.path, config.out):
        raise PathError(f"{where}: expected another path than --out, got the same; a finalized store is never changed")
    begun = _begun_from(config.out)
    if begun not in (None, old.content_digest):
        raise MismatchError(
            f"{config.out}: expected nothing, or this retry begun, got a store that is none of {old.path}; give --out "
            "another path"
        )
    source = replace(open_source(config), existing=old.manifest)
    manifest = source.manifest(old.manifest.num_classes, old.manifest.provenance)
    differences = old.manifest.differences(manifest)
    mine, theirs = old.manifest.corpus, manifest.corpus
    if mine.get("fingerprint") != theirs.get("fingerprint"):
        raise MismatchError(
            f"{where}: expected the corpus that it was made from, got another: a sample was added, or removed, or has "
            "another size. A file that was mended, and is of another size now, makes another corpus: dump that into a "
            "store of its own, without --retry-quarantined"
        )
    if differences:
        raise MismatchError(
            f"{where}: expected the settings that it was made with, got others: {'; '.join(differences[:3])}; use the "
            "same"
        )
    return source


def _is_same(old: str, new: str) -> bool:
    if is_url(old) or is_url(new):
        return old.rstrip("/") == new.rstrip("/")
    return Path(old).resolve() == Path(new).resolve()


def _begun_from(out: str) -> str | None:
    """The digest of the store that the one at a path was begun from; None where nothing is there, "" for another."""
    backend = backend_for(out)
    if not backend.exists() or backend.get_record(MANIFEST) is None:
        return None
    with Store(backend) as store:
        return str(store.manifest.provenance.get(RETRIED_FROM, ""))


def retry_shards(
    job: "Job",
    writer: StoreWriter,
    shards: Iterable[int],
    bar: Pass,
    is_stopped: Callable[[], bool],
    on_report: Callable[[ShardReport], object],
    *,
    old: Store,
    room: Room,
) -> None:
    """What `dump` does, for shards of which an older version has all rows but some.

    Args:
        job: what is dumped.
        writer: the new version.
        shards: which, in order.
        bar: told of the rows as they are there.
        is_stopped: asked between shards.
        on_report: called with what is known of each shard once it is sealed.
        old: the older version.
        room: how a full disk is waited for.
    """
    from teacherdump.dump import write_shard

    with ThreadPoolExecutor(job.num_readers, "reader") as pool:
        for shard in shards:
            if is_stopped():
                return
            seal = old.seal(shard)
            num_bytes = (seal.stop - seal.start) * old.manifest.row_bytes
            if may_be_tried(seal.quarantine):
                encoded = patched(job, old, seal, pool)
                write = partial(write_shard, writer, encoded)
            else:
                write = partial(_shared, old, writer, shard)
            report = room.keep_trying(write, num_bytes, is_stopped)
            bar.advance(report.num_rows)
            on_report(report)


def may_be_tried(quarantine: Sequence[QuarantineEntry]) -> list[QuarantineEntry]:
    """Those of some refused rows that can be run here: a sample that kills its process would kill this one too."""
    return [entry for entry in quarantine if not entry.reason.startswith(KILLED)]


def _shared(old: Store, writer: StoreWriter, shard: int) -> ShardReport:
    """A shard that is taken over as it is."""
    watch = Stopwatch()
    seal = watch.time(share_shard, old, writer, shard)
    return ShardReport(seal, sealed_bytes(seal, writer.manifest.row_bytes), 0.0, 0.0, watch.seconds, None)


def patched(job: "Job", old: Store, seal: Seal, pool: ThreadPoolExecutor) -> "EncodedShard":
    """A shard of the old store, its refused rows scored again.

    Samples that kill the process that runs them stay as they are. Sequences are read with all rows of their batch:
    whether it holds several documents decides how it is scored.
    """
    from teacherdump.dump import read_rows, soft_targets
    from teacherdump.shard import EncodedShard, fill_rows

    manifest, rows = job.manifest, {entry.row for entry in may_be_tried(seal.quarantine)}
    reading, scoring = Stopwatch(), 0.0
    arrays = reading.time(read_shard, old, seal)
    quarantine = [entry for entry in seal.quarantine if entry.row not in rows]
    killers: Mapping[int, str] = {entry.row: entry.reason for entry in quarantine}
    for start, stop in batches(seal.start, seal.stop, job.batch_size):
        mine = sorted(rows.intersection(range(start, stop)))
        if not mine:
            continue
        rows_N = np.arange(start, stop)
        others = killers if manifest.sequences else {row: "" for row in rows_N.tolist() if row not in rows}
        read = reading.time(read_rows, job, seal.shard, rows_N, pool, others)
        (said,) = soft_targets(job, [read])
        scoring += said.seconds
        fresh = {spec.name: np.empty((stop - start, *spec.row_shape), spec.dtype) for spec in manifest.arrays}
        quarantine += [entry for entry in fill_rows(fresh, said, manifest, job.corpus) if entry.row in rows]
        for name, values in arrays.items():
            for row in mine:
                values[row - seal.start] = fresh[name][row - start]
    quarantine.sort(key=lambda entry: entry.row)
    return EncodedShard(seal.shard, arrays, quarantine, reading.seconds, scoring)
