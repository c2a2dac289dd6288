"""A corpus that keeps growing: new files become the next store of a series, dumped by the ordinary run.

look -> files that are whole -> record of the next member -> run -> finalized member -> look again
"""

import contextlib
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from storage.backends import backend_for
from storage.console import format_count, format_plural
from storage.corpus import Corpus, FileEntry, Preprocess, without_rows
from storage.corpus.access import files_in
from storage.corpus.files import FILE_KINDS, absolute, find_files, has_suffix
from storage.errors import CorpusError, CorpusMismatchError, MismatchError
from storage.exclusive import sole_run
from storage.interruption import Interrupted, StopRequest, stop_requests
from storage.layout import from_ranges
from storage.manifest import Manifest
from storage.reader import open_one_store
from storage.series_records import CoveredFile, FilesRecord, left_out_ranges
from storage.series_writer import SeriesWriter
from teacherdump.config import DumpConfig
from teacherdump.dedupe import Hashes, Known, sample_hashes
from teacherdump.follow_files import Settling, changes, first_group
from teacherdump.follow_options import FollowOptions, FollowResult
from teacherdump.run import Preparation, run_source
from teacherdump.source import MOST_READERS, Say, Source, open_data, open_source

if TYPE_CHECKING:
    from teacherdump.run import AnyJob

NAP_S = 0.2  # how late a signal is noticed while nothing arrives
NO_LABELS = "none"
LEAST_HOURS = 1e-6  # what is left of a limit that is just being reached
TAR_BLOCK = 512  # bytes
LOOKS = 5  # at a folder in which files come and go


def follow(config: DumpConfig, options: FollowOptions, say: Say = lambda _: None, quiet: bool = True) -> FollowResult:
    """Dump what is there of a corpus, and then what arrives, until a limit, a signal or idleness ends it.

    Args:
        config: what to do; `out` is the folder of the series, and the limits are over the whole run.
        options: how to follow.
        say: told of what a person should know, a line each.
        quiet: show no progress.

    Raises:
        StoreError: what can't be used, or what stopped it; what is sealed stays, and the same run goes on.
        ValueError: options that contradict each other or what is there, or that would be ignored.
        Interrupted: a signal ended it.
    """
    _check_config(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_run(config.out))
        request = stack.enter_context(stop_requests())
        follower = _Follower(config, options, say, quiet, request, Preparation(config, say, stack))
        try:
            follower.run()
        finally:
            follower.result.seconds = time.monotonic() - follower.start
        return follower.result


def _check_config(config: DumpConfig) -> None:
    """Refuse what has no meaning for a corpus that grows."""
    if config.labels not in (None, NO_LABELS):
        raise ValueError(
            f"labels: expected none with --follow, since a file of labels can't grow with the corpus, got "
            f"{config.labels!r}; leave it out, or give none"
        )
    if config.array is not None:
        raise ValueError(f"array: expected none with --follow, which takes many files, got {config.array!r}")
    if config.sequence_length is not None:
        raise ValueError(
            f"sequence_length: expected none with --follow, which takes samples that stand alone, got "
            f"{config.sequence_length}; dump text and tokens without --follow"
        )
    if config.retry_quarantined is not None:
        raise ValueError("retry_quarantined: expected no --follow beside it, got both; retry one store of the series")
    if config.corpus_kind not in (None, *FILE_KINDS):
        raise ValueError(
            f"corpus_kind: expected {', '.join(FILE_KINDS)} with --follow, whose corpora are many files, got "
            f"{config.corpus_kind}"
        )
    if config.out.lower().endswith((".h5", ".hdf5")):
        raise ValueError(f"out: expected a folder for a series of stores, got {config.out!r}; give a folder's name")


@dataclass
class _Follower:
    """A run that follows a corpus, and where it stands."""

    config: DumpConfig
    options: FollowOptions
    say: Say
    quiet: bool
    request: StopRequest
    preparation: Preparation
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.series = SeriesWriter(self.config.out, self.options.suffix)
        self.result = FollowResult(self.config.out)
        self.kind: str | None = self.config.corpus_kind
        self.folder: Path | str = absolute(self.config.data)
        self._settling = Settling(self.options.settle)
        self._known = Known()
        self._told: set[tuple[str, int, str]] = set()
        self._unusable: dict[str, FileEntry] = {}
        self._covered: set[str] = set()
        self._row_bytes = 0  # of a row before compression; 0 until it is known
        self._like: Preprocess | None = None  # of the stores that are finished

    def run(self) -> None:
        """Go on with what is unfinished, then look for files again and again."""
        begun = self.series.unfinished()
        self._check_dedupe()
        finished = [record for record in self.series.files if record.num_rows and record is not begun]
        if finished:
            with open_one_store(self.series.member_path(finished[-1])) as store:
                self._take_up(store.manifest)
        if self.series.record is not None:
            self.kind = self.kind or str(self.series.record.shared["corpus"]["kind"])
        self._covered = {file.name for record in self.series.files for file in record.files}
        done = self.series.files if begun is None else self.series.files[:-1]
        if self.options.dedupe is not None:
            self._known.add(self.series.hashes(record) for record in self.series.files)
        self._count(done)
        if begun is not None:
            entries = self._look()
            self._refuse_changed(begun, entries)
            self._dump(begun, self._corpus_of(begun))
        last_new = time.monotonic()
        while not self._is_limited():
            entries = self._look()
            self._tell_changes(entries)
            added = self._add_members(self._settling.settled(self._new(entries)))
            if added or self._settling.num_waiting:
                last_new = time.monotonic()
            elif self.options.idle is not None and time.monotonic() - last_new >= self.options.idle:
                return
            if not added:  # else more may have come meanwhile
                self._wait()

    def _check_dedupe(self) -> None:
        """Refuse to compare samples otherwise than for the members that are there."""
        before = {record.dedupe for record in self.series.files}
        if before - {self.options.dedupe}:
            then = next(iter(before - {self.options.dedupe})) or "not at all"
            raise MismatchError(
                f"{self.series.path}: expected samples compared as for the stores that are there (--dedupe: {then}), "
                f"got {self.options.dedupe or 'not at all'}; give the same --dedupe, or --out another folder"
            )

    def _look(self) -> list[FileEntry]:
        """The files of the corpus that are there now."""
        kinds = FILE_KINDS if self.kind is None else {self.kind: FILE_KINDS[self.kind]}
        suffixes = tuple(suffix for values in kinds.values() for suffix in values)
        for _ in range(LOOKS):
            with contextlib.suppress(FileNotFoundError):  # one went away between two looks at it
                found = find_files(absolute(self.config.data), suffixes)
                self.folder = found.folder
                entries = [entry for entry in found.entries if has_suffix(entry.name, suffixes)]
                if self.kind is None:
                    self.kind = self._kind_of(entries)
                return entries
        raise CorpusError(
            f"corpus '{self.config.data}': expected a list of its files, got files that went away at each of {LOOKS} "
            "looks; move files there that are whole, and leave them there"
        )

    def _kind_of(self, entries: Sequence[FileEntry]) -> str | None:
        """The one kind that the files are of; None where there are none."""
        found = [
            kind for kind, suffixes in FILE_KINDS.items() if any(has_suffix(entry.name, suffixes) for entry in entries)
        ]
        if len(found) > 1:
            raise CorpusError(
                f"corpus '{self.config.data}': expected files of one kind, got {' and '.join(found)}; say which: "
                "--corpus-kind"
            )
        return found[0] if found else None

    def _new(self, entries: Sequence[FileEntry]) -> list[FileEntry]:
        """The files that no member covers, and that are not known to be unusable as they are."""
        covered = {file.name for record in self.series.files for file in record.files}
        return [entry for entry in entries if entry.name not in covered and self._unusable.get(entry.name) != entry]

    def _tell_changes(self, entries: Sequence[FileEntry]) -> None:
        """Say, once, which files are not what a finished store was made from."""
        for change in changes(self.series.files, entries):
            now = ("", 0) if change.now is None else (change.now.version, change.now.num_bytes)
            told = (change.then.name, now[1], now[0])
            if told not in self._told:
                self._told.add(told)
                name = Path(self.series.member_path(change.record)).name
                self.say(
                    f"note: {change.text} since it was dumped into {name}; it is not dumped again, and a student that "
                    "reads other samples there is refused"
                )

    def _refuse_changed(self, begun: FilesRecord, entries: Sequence[FileEntry]) -> None:
        """Refuse to go on with a member whose files are not there as they were."""
        for change in changes([begun], entries):
            if change.is_harmful:
                path = self.series.member_path(begun)
                raise CorpusMismatchError(
                    f"{path}: expected the files that it was begun with, but {change.text}; put it back, or finalize "
                    f"what is sealed (logitstore finalize {shlex.quote(path)} --partial) and run the same command again"
                )

    def _corpus_of(self, record: FilesRecord) -> Corpus:
        """The samples of a member."""
        corpus = self._opened([file.name for file in record.files])
        if corpus.num_samples != record.num_samples:
            raise CorpusMismatchError(
                f"{self.series.member_path(record)}: expected {record.num_samples} samples in its files, as it was "
                f"begun with, got {corpus.num_samples}; put the files back as they were"
            )
        return without_rows(corpus, set(from_ranges(record.left_out)))

    def _opened(self, names: Sequence[str]) -> Corpus:
        return open_data(replace(self.config, corpus_kind=self.kind), names)

    def _counted(self, entries: Sequence[FileEntry]) -> tuple[list[FileEntry], list[int]]:
        """The files that can be opened, and their samples; the others are said once, and left until they change."""
        if self.kind == "images":
            return list(entries), [1] * len(entries)
        usable, counts = [], []
        for entry in entries:
            alone = replace(self.config, data=f"{self.folder}/{entry.name}", corpus_kind=self.kind)
            try:
                self._check_end(entry)
                corpus = open_data(alone)
            except CorpusError as error:
                self._unusable[entry.name] = entry
                self.say(f"note: {entry.name!r} is left out until it changes: {error}")
                continue
            usable.append(entry)
            counts.append(corpus.num_samples)
            if sum(counts) > self.options.member_rows:
                break  # the next member will look further
        return usable, counts

    def _check_end(self, entry: FileEntry) -> None:
        """Refuse a tar without the zeros that end one: cut between two members it looks like a whole, shorter one."""
        if self.kind != "webdataset" or entry.num_bytes < TAR_BLOCK:
            return
        (last,) = files_in(self.folder).read_ranges(entry.name, [(entry.num_bytes - TAR_BLOCK, entry.num_bytes)])
        if any(last):
            raise CorpusError("expected the block of zeros that ends a tar, got other bytes: it may still be written")

    def _add_members(self, whole: list[FileEntry]) -> bool:
        """Make members of new files, one after the other; whether there was any file for one."""
        added = False
        while whole and not self._is_limited():
            usable, counts = self._counted(whole)
            self.result.num_unusable = len(self._unusable)
            group = usable[: first_group(counts, self.options.member_rows)]
            if not group:
                break
            self._add_member(group)
            added = True
            done = {entry.name for entry in (*group, *self._unusable.values())}
            whole = [entry for entry in whole if entry.name not in done]
        return added

    def _add_member(self, group: Sequence[FileEntry]) -> None:
        """Make a member of some files: its record, then its store; none where nothing in them is new."""
        corpus = self._opened([entry.name for entry in group])
        hashes: Hashes | None = None
        left_out: list[int] = []
        if self.options.dedupe is not None:
            hashes, left_out = self._compared(corpus)
        files = tuple(CoveredFile(entry.name, entry.num_bytes, entry.version) for entry in group)
        num_rows = corpus.num_samples - len(left_out)
        ranges = left_out_ranges(left_out)
        record = FilesRecord(len(self.series.files), files, num_rows, ranges, self.options.dedupe)
        if self._has_no_room(num_rows):
            return
        self.series.add(record, hashes)
        self._covered.update(file.name for file in files)
        if hashes is not None:
            self._known.add([hashes])
        self.result.num_left_out += len(left_out)
        name = Path(self.series.member_path(record)).name
        text = f"{name}: {format_plural(len(files), 'file')}, {format_count(num_rows)} rows"
        if left_out:
            text += f", {format_count(len(left_out))} samples left out, whose {self.options.dedupe} was there before"
        self.say(text if num_rows else f"{text}: no store is needed")
        if num_rows:
            self._dump(record, without_rows(corpus, set(left_out)))

    def _compared(self, corpus: Corpus) -> tuple[Hashes, list[int]]:
        """Hashes of the samples that are new, and the places of those that are not."""
        by = self.options.dedupe
        assert by is not None
        readers = self.config.readers or min(MOST_READERS, os.cpu_count() or 1)
        hashes_N = sample_hashes(corpus, by, readers)
        repeated = self._known.repeated(hashes_N).tolist()
        is_new_N = [True] * len(hashes_N)
        for place in repeated:
            is_new_N[place] = False
        return hashes_N[is_new_N], repeated

    def _dump(self, record: FilesRecord, corpus: Corpus) -> None:
        """Dump a member's samples with the ordinary run, and finalize it."""
        path = self.series.member_path(record)
        config = self._within_limits(replace(self.config, out=path))
        planned_rows = max(self.options.member_rows, corpus.num_samples)
        source = open_source(config, corpus, like=self._like)
        source = replace(source, planned_rows=planned_rows, is_proven=self._like is not None)
        before = 0
        if source.existing is not None:
            self.series.agree(source.manifest(source.existing.num_classes, source.existing.provenance))
            before = backend_for(path).num_bytes()
        result = run_source(source, self._prepared, self.say, self.quiet)
        total = self.result
        total.num_new_members += 1
        total.num_new_rows += result.num_new_rows
        total.num_new_bytes += max(0, result.num_bytes - before)
        total.num_refused += result.num_refused
        if result.limit is not None:
            total.limit = self._given(result.limit.split()[0].removeprefix("--").replace("-", "_"))
            return
        self._count([record])
        with open_one_store(path) as store:
            self._take_up(store.manifest)

    def _take_up(self, manifest: Manifest) -> None:
        """What the next store takes from this one."""
        batch_size = manifest.provenance.get("batch_size")
        if self.config.batch_size is None and isinstance(batch_size, int):
            self.config = replace(self.config, batch_size=batch_size)
        rows = self.config.shard_rows or manifest.shard_rows, self.config.chunk_rows or manifest.chunk_rows
        self.config = replace(self.config, shard_rows=rows[0], chunk_rows=rows[1])
        self._row_bytes, self._like = manifest.row_bytes, Preprocess.from_json(manifest.preprocess)

    def _prepared(self, source: Source) -> "AnyJob":
        """The job of a member, if it agrees with the others; asked before its store is made."""
        job = self.preparation.prepared(source)
        self.series.agree(job.manifest)
        return job

    def _count(self, records: Sequence[FilesRecord]) -> None:
        """Count finished members."""
        self.result.num_members += sum(record.num_rows > 0 for record in records)
        self.result.num_rows += sum(record.num_rows for record in records)

    def _limits_left(self) -> dict[str, float]:
        """The limits of the run, less what it has done so far."""
        config, done = self.config, self.result
        hours = (time.monotonic() - self.start) / 3600
        limits = {
            "limit_samples": (config.limit_samples, done.num_new_rows),
            "limit_bytes": (config.limit_bytes, done.num_new_bytes),
            "limit_hours": (config.limit_hours, hours),
        }
        return {name: limit - used for name, (limit, used) in limits.items() if limit is not None}

    def _within_limits(self, config: DumpConfig) -> DumpConfig:
        """The options of a member's run."""
        left = self._limits_left()
        return replace(
            config,
            limit_samples=int(left["limit_samples"]) if "limit_samples" in left else None,
            limit_bytes=int(left["limit_bytes"]) if "limit_bytes" in left else None,
            limit_hours=max(left["limit_hours"], LEAST_HOURS) if "limit_hours" in left else None,
        )

    def _given(self, name: str) -> str:
        """A limit as it was given."""
        return f"--{name.replace('_', '-')} {getattr(self.config, name)}"

    def _has_no_room(self, num_rows: int) -> bool:
        """Whether the limit of bytes, of which something was used, leaves no room for the first shard of a member."""
        left = self._limits_left().get("limit_bytes")
        shard_rows = min(num_rows, self.config.shard_rows or num_rows)
        if left is not None and self.result.num_new_bytes and shard_rows * self._row_bytes > left:
            self.result.limit = self._given("limit_bytes")
        return self.result.limit is not None

    def _is_limited(self) -> bool:
        """Whether a limit is reached; a signal is taken up here too.

        Raises:
            Interrupted: a signal came.
        """
        if self.request.signal:
            there = f"{format_plural(self.result.num_members, 'store')}, {format_count(self.result.num_rows)} rows"
            raise Interrupted(
                f"interrupted: {there} in {self.series.path}; run the same command again to go on", self.request.signal
            )
        for name, value in self._limits_left().items():
            if self.result.limit is None and value <= 0:
                self.result.limit = self._given(name)
        return self.result.limit is not None

    def _wait(self) -> None:
        """Until the next look, or a signal."""
        until = time.monotonic() + self.options.poll
        while time.monotonic() < until and not self.request.signal:
            time.sleep(min(NAP_S, self.options.poll))
