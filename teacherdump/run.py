"""One run of the dump, from its options to what it did: what is owed, the loop, the final record.

torch is imported only once there is work for a teacher: a run over a finished store ends in a moment.
"""

import contextlib
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from storage.backends import Hdf5Backend
from storage.console import Pass, format_bytes, format_count, format_duration, format_plural, format_rate, progress
from storage.corpus import verify_hard_targets
from storage.errors import OutOfSpaceError, StoreError
from storage.exclusive import discard_unsealed, sole_run
from storage.interruption import Interrupted, stop_requests
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.urls import is_url
from storage.writer import StoreWriter
from teacherdump.config import DumpConfig
from teacherdump.plan import Limits, estimate
from teacherdump.report import ShardReport
from teacherdump.room import Room
from teacherdump.source import Say, Source, load_teacher_of, open_source, prepare
from teacherdump.watching import Watch, watching

if TYPE_CHECKING:
    from teacherdump.cluster import ClusterJob
    from teacherdump.cluster_team import Team
    from teacherdump.dump import Job
    from teacherdump.retry import Retried
    from teacherdump.teacher import Teacher

    AnyJob = Job | ClusterJob


@dataclass(frozen=True)
class DumpResult:
    """What a run did, and where the store stands.

    Attributes:
        path: of the store.
        num_rows: rows of the store.
        num_sealed_rows: of these, in sealed shards.
        num_new_rows: of these, sealed by this run.
        num_refused: sealed rows without targets.
        num_bytes: bytes of the store on the disk.
        seconds: that the loop of this run took.
        content_digest: identity of the finished store, or None while rows are missing.
        limit: what stopped the run before the end, such as `--limit-hours 2`; None where nothing did.
        retried: what became of the refused rows of an older version; None where none were tried again.
    """

    path: str
    num_rows: int
    num_sealed_rows: int
    num_new_rows: int
    num_refused: int
    num_bytes: int
    seconds: float
    content_digest: str | None
    limit: str | None
    retried: "Retried | None" = None

    def summary(self) -> str:
        """What the run did and where the store stands, some lines for a person."""
        if self.retried is not None and not self.retried.is_written:
            return self.retried.summary()
        if self.num_new_rows:
            rate = format_rate(self.num_new_rows / max(self.seconds, 1e-9), "rows")
            did = f"dumped {format_plural(self.num_new_rows, 'row')} in {format_duration(self.seconds)} ({rate})"
        elif self.content_digest is not None:
            did = "nothing to do: the store is finished"
        else:
            did = "dumped nothing"
        rows = f"{format_count(self.num_sealed_rows)} of {format_count(self.num_rows)} rows"
        refused = f"{format_count(self.num_refused)} refused"
        if self.num_refused:
            refused += f" (logitstore info {shlex.quote(self.path)} --quarantine lists them)"
        if self.content_digest is not None and self.num_sealed_rows < self.num_rows:
            state = f"finalized at {rows}; the others can't be added any more; {refused}"
        else:
            state = f"{rows} sealed, {refused}"
        lines = [did, f"{self.path}: {state}, {format_bytes(self.num_bytes)}"]
        if self.retried is not None:
            lines.insert(1, self.retried.summary())
        if self.content_digest is not None:
            lines.append(f"content digest {self.content_digest}")
        else:
            lines.append(f"stopped by {self.limit}; {how_to_go_on(self.path)}")
        return "\n".join(lines)


def run(config: DumpConfig, say: Say = lambda _: None, quiet: bool = True) -> DumpResult:
    """Dump what a store is owed, within the limits, and finalize it when nothing is owed any more.

    In the main thread the first SIGINT or SIGTERM ends the loop with whole shards.

    Args:
        config: what to do.
        say: told of what a person should know, a line each.
        quiet: show no progress.

    Raises:
        StoreError: what can't be used, or what stopped it; what is sealed stays, and the same run goes on.
        ValueError: options that contradict what is there.
        Interrupted: a signal ended it; the message says where the store stands and how to go on.
    """
    if config.retry_quarantined is not None:
        from teacherdump.retry import retry

        return retry(config, say, quiet)
    with contextlib.ExitStack() as stack:
        with progress(None, "files", "indexing", quiet=quiet) as bar:
            source = open_source(config, progress=bar)
        _say_what_is_passed_over(source, say)
        return run_source(source, Preparation(config, say, stack).prepared, say, quiet)


def _say_what_is_passed_over(source: Source, say: Say) -> None:
    """How much beside the samples there is in the corpus: it may be all that the user meant."""
    if count := source.corpus.num_ignored:
        what = "members of its tars" if source.corpus.kind == "webdataset" else "other files"
        say(f"note: corpus '{source.corpus.path}': {format_count(count)} {what} are no samples, and are passed over")


class Preparation:
    """The teacher of one run after another, loaded once: here, or on workers, which stay for as long as the stack does.

    Args:
        config: that names the teacher and the workers.
        say: told of what a person should know.
        stack: closes what is opened here.
    """

    def __init__(self, config: DumpConfig, say: Say, stack: contextlib.ExitStack) -> None:
        self._config, self._say, self._stack = config, say, stack

    def prepared(self, source: Source) -> "AnyJob":
        """All that a shard of a source is dumped from."""
        if not self._config.is_on_cluster:
            return prepare(source, self._say, self._teacher)
        from teacherdump.cluster import prepare_on_workers

        return prepare_on_workers(self._team, source, self._say)

    @cached_property
    def _teacher(self) -> "Teacher":
        return load_teacher_of(self._config)

    @cached_property
    def _team(self) -> "Team":
        from teacherdump.cluster_local import open_team

        return self._stack.enter_context(open_team(self._config, self._say))


def run_source(source: Source, prepared: "Callable[[Source], AnyJob]", say: Say, quiet: bool) -> DumpResult:
    """Go on with the store of a source, or begin it.

    Args:
        source: what is dumped, and where to.
        prepared: makes all that a shard is dumped from, asked only where a shard is owed.
        say: told of what a person should know, a line each.
        quiet: show no progress.

    Raises:
        StoreError: what can't be used, or what stopped it; what is sealed stays, and the same run goes on.
        ValueError: options that contradict what is there.
        Interrupted: a signal ended it; the message says where the store stands and how to go on.
    """
    config = source.config
    if source.existing is not None:
        with sole_run(config.out):
            if not _discarded(config.out):
                return _go_on(source, prepared, say, quiet)
    job = prepared(replace(source, existing=None))
    _planned(config, job.manifest, range(job.manifest.layout.num_shards), _unsaid)  # refused before a store is made
    with sole_run(config.out):
        return dump_job(config, job, say, quiet)


def _discarded(path: str) -> bool:
    """Whether nothing was sealed in the store that is there; then it is gone, so that a wrong option can be mended."""
    with open_store(path) as store:
        if store.finalized or store.sealed_shards():
            return False
        return discard_unsealed(store)


def _go_on(source: Source, prepared: "Callable[[Source], AnyJob]", say: Say, quiet: bool) -> DumpResult:
    """Dump the rest of a store, without a look at the teacher where nothing is owed."""
    config = source.config
    assert source.existing is not None
    manifest = source.manifest(source.existing.num_classes, source.existing.provenance)
    with StoreWriter.open(config.out, manifest) as writer:  # refuses another teacher, corpus or encoding
        if not writer.finalized:
            verify_hard_targets(writer.store, source.corpus)
        if not writer.owed_shards():
            return _finish(writer, _Tally(), quiet)
    return dump_job(config, prepared(source), say, quiet)


def dump_job(config: DumpConfig, job: "AnyJob", say: Say, quiet: bool, old: Store | None = None) -> DumpResult:
    """Dump what is owed, or what an older version has of it; what can't be begun leaves no store behind."""
    with StoreWriter.open(config.out, job.manifest, job.head) as writer:
        try:
            if not _owed(writer, old):
                return _finish(writer, _Tally(), quiet, old)
            _say_where_it_goes_on(writer, job, say)
            return _dump_owed(config, job, writer, say, quiet, old)
        except (StoreError, ValueError):
            if not is_url(config.out) and not writer.sealed_shards():
                discard_unsealed(writer.store)
            raise


def _owed(writer: StoreWriter, old: Store | None) -> Sequence[int]:
    """Shards that are to be written: those that are not sealed, and that an older version has."""
    owed = writer.owed_shards()
    if old is None:
        return owed
    there = frozenset(old.sealed_shards())
    return [shard for shard in owed if shard in there]


def _say_where_it_goes_on(writer: StoreWriter, job: "AnyJob", say: Say) -> None:
    """Where a run goes on, and what could change its last bits."""
    num_sealed_rows = writer.store.num_sealed_rows
    if not num_sealed_rows:
        return
    say(f"going on: {format_count(num_sealed_rows)} of {format_count(writer.layout.num_rows)} rows are sealed")
    then, now = writer.manifest.provenance, job.manifest.provenance
    changed = [name for name in ("batch_size", "device", "compile") if then.get(name) != now[name]]
    if then.get("versions", {}).get("torch") != now["versions"]["torch"]:
        changed.append("torch")
    if changed:
        say(
            f"note: these rows were dumped with another {' and '.join(changed).replace('_', ' ')}: "
            "the last bits of new rows may differ from what an undisturbed run gives"
        )


@dataclass
class _Tally:
    """What the run has sealed so far; the writing thread counts, the reading thread looks."""

    num_rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    limit: str | None = None
    start: float = field(default_factory=time.perf_counter)

    def add(self, report: ShardReport) -> None:
        """Count a shard that is sealed."""
        self.num_bytes += report.num_bytes
        self.num_rows += report.num_rows

    def bytes_a_row(self, row_bytes: int) -> float:
        """Bytes that a row takes on the disk, as far as that is known."""
        return self.num_bytes / self.num_rows if self.num_rows else float(row_bytes)


def _dump_owed(
    config: DumpConfig, job: "AnyJob", writer: StoreWriter, say: Say, quiet: bool, old: Store | None
) -> DumpResult:
    layout, row_bytes = writer.layout, job.manifest.row_bytes
    owed, tally = _owed(writer, old), _Tally()
    limits = _limits(config)
    planned = _planned(config, job.manifest, owed, say)

    def within_limits() -> Iterator[int]:
        """The owed shards, as the readers come to them."""
        num_rows = 0
        for shard in owed:
            first, stop = layout.shard_bounds(shard)
            seconds = time.perf_counter() - tally.start
            tally.limit = limits.reached(num_rows, stop - first, seconds, tally.bytes_a_row(row_bytes))
            if tally.limit is not None:
                return
            num_rows += stop - first
            watch.num_begun += 1
            yield shard

    def on_report(report: ShardReport) -> None:
        tally.add(report)
        watch.add(report)

    with watching(config, writer.manifest, len(owed), planned, say) as watch, _told_of_the_end(watch):
        job = replace(job, manifest=writer.manifest)
        room = Room(writer.store.path, config.wait_for_room, watch.telling(say))
        with stop_requests() as request:
            try:
                with progress(planned, "rows", "dumping", quiet=quiet) as bar:
                    dump = _loop(config, watch, room, old)
                    dump(job, writer, within_limits(), bar, lambda: request.signal != 0, on_report)
            except KeyboardInterrupt as error:  # the second one: at once, but not without a word
                raise Interrupted(f"interrupted: {standing(writer)}", request.signal or signal.SIGINT) from error
            except OutOfSpaceError as error:
                if not request.signal:
                    raise
                raise Interrupted(f"interrupted while the disk was full: {standing(writer)}", request.signal) from error
        tally.seconds = time.perf_counter() - tally.start
        if request.signal and _owed(writer, old):
            raise Interrupted(f"interrupted: {standing(writer)}", request.signal)
        result = _finish(writer, tally, quiet, old, room)
        watch.end("finished" if result.limit is None else "limit", limit=result.limit, digest=result.content_digest)
        return result


def _loop(config: DumpConfig, watch: Watch, room: Room, old: Store | None) -> Callable[..., None]:
    """What dumps the shards in this process, or another of the same arguments that does it some other way."""
    if old is not None:
        from teacherdump.retry import retry_shards

        return partial(retry_shards, old=old, room=room)
    if config.is_on_cluster:
        from teacherdump.cluster import dump_on_workers

        return partial(dump_on_workers, room=room)
    from teacherdump.alarm_pilot import pilot_alarm
    from teacherdump.dump import dump

    def in_process(
        job: "Job",
        writer: StoreWriter,
        shards: Iterable[int],
        bar: Pass,
        is_stopped: Callable[[], bool],
        on_report: Callable[[ShardReport], object],
    ) -> None:
        job = replace(job, queues=watch.queues)
        pilot_alarm(job, is_stopped)
        dump(job, writer, shards, bar, is_stopped, on_report, before_write=watch.before_write, room=room)

    return in_process


@contextlib.contextmanager
def _told_of_the_end(watch: Watch) -> Iterator[None]:
    """Tell who watches what ended a run that did not come to its end."""
    try:
        yield
    except BaseException as error:
        outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        watch.end(outcome, error=None if outcome == "interrupted" else type(error).__name__)
        raise


def _unsaid(_: str) -> None:
    """What will be said later."""


def _limits(config: DumpConfig) -> Limits:
    return Limits(config.limit_samples, config.limit_hours, config.limit_bytes)


def _planned(config: DumpConfig, manifest: Manifest, owed: Sequence[int], say: Say) -> int:
    """Rows that a run would add, were it not for a limit of hours.

    Raises:
        ValueError: the limit of bytes leaves no room for a shard.
    """
    row_bytes = manifest.row_bytes
    planned = estimate(manifest.layout, owed, replace(_limits(config), hours=None), row_bytes, None).num_rows
    if not planned and config.limit_bytes is not None:
        start, stop = manifest.layout.shard_bounds(owed[0])
        raise ValueError(
            f"limit_bytes: expected room for one shard of {format_count(stop - start)} rows, "
            f"{format_bytes((stop - start) * row_bytes)}, got {config.limit_bytes} bytes; give more, or begin another "
            "store with fewer --shard-rows"
        )
    if config.limit_samples is not None and planned > config.limit_samples:
        say(
            f"--limit-samples {format_count(config.limit_samples)}: rounded up to {format_count(planned)}, "
            "since shards are dumped whole"
        )
    return planned


def _finish(
    writer: StoreWriter, tally: _Tally, quiet: bool, old: Store | None = None, room: Room | None = None
) -> DumpResult:
    """Finalize when nothing is owed any more, and say what there is."""
    if not writer.finalized and not _owed(writer, old):
        tally.limit = None
        try:
            with progress(writer.layout.num_rows, "rows", "checking", quiet=quiet) as bar:
                backend = writer.store.backend
                num_bytes = backend.num_bytes() if isinstance(backend, Hdf5Backend) else 0  # it is packed into one file
                room = room or Room(writer.store.path, 0, _unsaid)
                room.keep_trying(lambda: writer.finalize(old is not None, bar.advance), num_bytes, lambda: False)
        except KeyboardInterrupt as error:
            raise Interrupted(f"interrupted: {standing(writer)}", 2) from error
    store = writer.store
    return DumpResult(
        path=store.path,
        num_rows=writer.layout.num_rows,
        num_sealed_rows=store.num_sealed_rows,
        num_new_rows=tally.num_rows,
        num_refused=store.final.num_quarantined if store.final is not None else len(store.quarantine()),
        num_bytes=store.backend.num_bytes(),
        seconds=tally.seconds,
        content_digest=store.content_digest,
        limit=tally.limit,
    )


def untouched(store: Store) -> DumpResult:
    """What there is where a run had nothing to do."""
    return DumpResult(
        path=store.path,
        num_rows=store.manifest.num_rows,
        num_sealed_rows=store.num_sealed_rows,
        num_new_rows=0,
        num_refused=store.num_quarantined,
        num_bytes=store.backend.num_bytes(),
        seconds=0.0,
        content_digest=store.content_digest,
        limit=None,
    )


def standing(writer: StoreWriter) -> str:
    """How much of a store is sealed, and how to go on."""
    sealed, total = writer.store.num_sealed_rows, writer.layout.num_rows
    text = f"{format_count(sealed)} of {format_count(total)} rows are sealed in {writer.store.path}"
    if sealed == total:
        return f"{text}; run the same command again to finalize it"
    return f"{text}; {how_to_go_on(writer.store.path)}" if sealed else f"{text}; run the same command again to go on"


def how_to_go_on(path: str) -> str:
    """What to do with a store of which rows are missing."""
    finalize = f"logitstore finalize {shlex.quote(path)} --partial"
    return f"run the same command again to go on, or finalize at what is sealed: {finalize}"
