"""The pilot of the alarms on a worker: it is sent the rows that it looks at, wherever they lie in the corpus."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.corpus import Corpus
from storage.corpus.part import CorpusPart, hard_targets_at
from storage.corpus.protocol import Array, SampleKind
from teacherdump.cluster_team import Team, WorkerDiedError
from teacherdump.cluster_work import Plan, answered, is_dropped, job_of, turn, writer_of
from teacherdump.source import Say


@dataclass(frozen=True, eq=False)
class HardTargetsByRow:
    """Hard targets of a few rows, found by their numbers in the whole corpus."""

    by_row: Mapping[int, int] = field(repr=False)

    def __getitem__(self, rows_N: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.array([self.by_row[row] for row in rows_N.tolist()], np.int32)


@dataclass(frozen=True, eq=False)
class SpreadSamples:
    """A few rows from all over a corpus, under the numbers that they have in the whole. Small to pickle.

    Attributes:
        kind: of the corpus.
        path: of the corpus.
        num_samples: of the whole corpus.
        fingerprint: of the whole corpus.
        sample_kind: of the corpus.
        hard_targets: of these rows; None where the corpus has none.
        parts: what reads each row.
    """

    kind: str
    path: Path | str
    num_samples: int
    fingerprint: str
    sample_kind: SampleKind
    hard_targets: HardTargetsByRow | None
    parts: Mapping[int, CorpusPart] = field(repr=False)

    def key(self, row: int) -> str:
        """The stable name of a sample."""
        return self.parts[row].key(row)

    def read_raw(self, row: int) -> bytes:
        """The bytes that a sample is known by."""
        return self.parts[row].read_raw(row)

    def decode(self, raw: bytes) -> Array:
        """The sample of some bytes."""
        return next(iter(self.parts.values())).decode(raw)


def spread_samples(corpus: Corpus, rows: list[int]) -> SpreadSamples:
    """Some rows of a corpus, at least one."""
    hard_targets_N = hard_targets_at(corpus, np.array(rows))
    hard_targets = None
    if hard_targets_N is not None:
        hard_targets = HardTargetsByRow(dict(zip(rows, hard_targets_N.tolist(), strict=True)))
    return SpreadSamples(
        corpus.kind,
        corpus.path,
        corpus.num_samples,
        corpus.fingerprint,
        corpus.sample_kind,
        hard_targets,
        {row: corpus.part(row, row + 1) for row in rows},
    )


@answered
def rows_of_pilot(plan: Plan) -> list[int]:
    """The rows that a pilot looks at."""
    from teacherdump.alarm_pilot import choose_rows

    rows: list[int] = choose_rows(writer_of(plan).manifest, plan.batch_size).tolist()
    return rows


@answered
def run_pilot(plan: Plan, samples: SpreadSamples) -> None:
    """Score the rows of a pilot.

    Raises:
        StoreError: the run would go wrong.
    """
    from teacherdump.alarm_pilot import pilot_alarm

    with turn():
        pilot_alarm(job_of(plan, samples), lambda: is_dropped(plan.run))


def pilot_on_workers(team: Team, plan: Plan, corpus: Corpus, is_stopped: Callable[[], bool], say: Say) -> None:
    """Have a worker look at rows from all over the corpus; none where all alarms are off.

    Raises:
        StoreError: the run would go wrong.
    """
    if not plan.alarms:
        return
    try:
        rows = team.ask(rows_of_pilot, plan, is_stopped=is_stopped)
        if rows is not None:
            team.ask(run_pilot, plan, spread_samples(corpus, rows), is_stopped=is_stopped)
    except WorkerDiedError:
        say("note: the workers that looked at some rows from all over the corpus died; the run goes on without a pilot")
