"""The dump on many workers: the driver hands out shards, and looks after those whose worker died.

    driver: corpus, index, seals -> two shards in flight a worker -> worker: reader, teacher, writer, seal -> report

The driver needs no device and never holds the teacher. Where a run stands is in the seals of the store alone: nothing
is kept in the scheduler, so that driver, scheduler and workers may die at any moment.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from storage.console import Pass
from storage.corpus.protocol import spread_rows
from storage.corpus.reading import sample_digests
from storage.encodings import HeadArrays
from storage.manifest import Manifest
from storage.urls import is_url
from storage.writer import StoreWriter
from teacherdump.cluster_drive import WAIT_S, Drive
from teacherdump.cluster_pilot import pilot_on_workers
from teacherdump.cluster_team import Done, Left, Team, WorkerDiedError, checked, is_death
from teacherdump.cluster_work import (
    Card,
    Plan,
    SampleCard,
    TeacherSpec,
    check_worker,
    choose_batch_size_of,
    try_teacher_on,
    versions,
)
from teacherdump.model_file import HF_PREFIX, is_hf
from teacherdump.report import ShardReport
from teacherdump.room import Room
from teacherdump.source import NUM_PROBE_ROWS, Say, Source, TeacherAnswer, settle, teacher_question

NUM_CHECKED_SAMPLES = 5  # of the corpus, by which a worker is seen to have it


@dataclass(frozen=True)
class ClusterJob:
    """All that shards are handed out from.

    Attributes:
        source: the corpus, opened, and the options.
        team: the workers.
        manifest: of the store.
        batch_size: rows of one forward pass.
        head: what a store of hidden states keeps once; else None.
        teacher: how a worker loads it.
        say: told of what a person should know.
    """

    source: Source
    team: Team
    manifest: Manifest
    batch_size: int
    head: HeadArrays | None
    teacher: TeacherSpec
    say: Say


def prepare_on_workers(team: Team, source: Source, say: Say) -> ClusterJob:
    """All workers checked, the teacher tried on one of them, and what shards are handed out from.

    Raises:
        StoreError: a worker does not see the corpus or the teacher; or the teacher can't be used.
        ValueError: an option contradicts what the teacher is.
    """
    config, preprocess = source.config, source.preprocess
    spec = TeacherSpec(
        tuple(absolute(path) for path in config.models),
        config.arch,
        config.combine,
        config.device,
        config.precision,
        config.compile,
        config.trust_pickle,
        str(source.identity["digest"]),
    )
    team.wait_for_one()
    check_all(team, card_of(source, spec))
    answer = tried(team, source, spec)

    def choose(most_rows: int) -> int:
        return int(team.ask(choose_batch_size_of, spec, preprocess.shape, most_rows, source.is_tokens))

    settled = settle(source, answer, choose, say)
    return ClusterJob(source, team, settled.manifest, settled.batch_size, settled.head, spec, say)


def tried(team: Team, source: Source, spec: TeacherSpec) -> TeacherAnswer:
    """What the teacher was found to be on the first samples; on some from elsewhere where these kill its workers.

    Raises:
        StoreError: it can't be used.
        WorkerDiedError: the workers died of all of these.
    """
    num_samples = source.corpus.num_samples
    last = max(0, num_samples - NUM_PROBE_ROWS)

    def tried_from(start: int) -> TeacherAnswer:
        part = source.corpus.part(start, min(start + NUM_PROBE_ROWS, num_samples))
        answer: TeacherAnswer = team.ask(
            try_teacher_on, spec, teacher_question(source, np.empty(0)), part, source.preprocess
        )
        return answer

    for start in sorted({0, last // 2} - {last}):
        with contextlib.suppress(WorkerDiedError):
            return tried_from(start)
    return tried_from(last)


def absolute(path: str) -> str:
    """A path as any process finds it; a URL stays as it is."""
    if is_url(path):
        return path
    if is_hf(path):
        return HF_PREFIX + os.path.abspath(path.removeprefix(HF_PREFIX))  # noqa: PTH100 - links stay as they are
    return os.path.abspath(path)  # noqa: PTH100


def card_of(source: Source, spec: TeacherSpec, writer: StoreWriter | None = None) -> Card:
    """What each worker must see; with a writer, the store too."""
    corpus = source.corpus
    samples = tuple(
        SampleCard(row, int(sample_digests(corpus, row, row + 1)[0]), corpus.part(row, row + 1))
        for row in spread_rows(corpus.num_samples, NUM_CHECKED_SAMPLES)
    )
    card = Card(versions(), spec, f"corpus '{corpus.path}'", samples)
    if writer is None:
        return card
    return replace(card, out=absolute(source.config.out), manifest_sha256=writer.store.manifest_sha256)


def check_all(team: Team, card: Card) -> set[str]:
    """Check every worker that is there, at the same time.

    Returns:
        The addresses of those that may work.

    Raises:
        StoreError: one does not see what it must; the message names it.
    """
    fit: set[str] = set()
    waiting = {team.submit(check_worker, card, address=address)[0]: address for address in team.names}
    while waiting:
        for event in team.wait(WAIT_S):
            if isinstance(event, Done) and (address := waiting.pop(event.key, None)) is not None:
                if event.error is None or not is_death(event.error):
                    checked(event, team.name(address))
                    fit.add(address)
            elif isinstance(event, Left):  # whoever comes in its place is checked when it comes
                waiting = {key: address for key, address in waiting.items() if address != event.address}
    return fit & set(team.names)


def dump_on_workers(
    job: ClusterJob,
    writer: StoreWriter,
    shards: Iterable[int],
    bar: Pass,
    is_stopped: Callable[[], bool],
    on_report: Callable[[ShardReport], object],
    room: Room,
) -> None:
    """Dump shards on the workers of a team, and seal each; the arguments are those of `dump`.

    Args:
        job: what is dumped, and by whom.
        writer: the store.
        shards: which, in order; taken as workers have room for them.
        bar: told of the rows of each sealed shard.
        is_stopped: asked now and then; once it says so, shards in flight get some seconds, and are dropped.
        on_report: called with what is known of each shard once it is sealed.
        room: how the run waits while the disk is full.

    Raises:
        StoreError: what stopped it; every shard that was sealed stays, and the same dump goes on.
    """
    plan = Plan(
        run=uuid.uuid4().hex,
        teacher=job.teacher,
        out=absolute(job.source.config.out),
        manifest_sha256=writer.store.manifest_sha256,
        batch_size=job.batch_size,
        num_readers=job.team.num_readers,
        alarms=job.source.config.alarms,
    )
    card = card_of(job.source, job.teacher, writer)
    fit = check_all(job.team, card)
    pilot_on_workers(job.team, plan, job.source.corpus, is_stopped, job.say)
    drive = Drive(
        job.team,
        job.source.corpus,
        writer.layout,
        writer.manifest.row_bytes,
        job.say,
        plan,
        card,
        iter(shards),
        bar,
        on_report,
        room,
    )
    try:
        drive.run(fit, is_stopped)
    finally:
        drive.drop()
