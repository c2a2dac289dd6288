"""A pilot: a teacher scores some rows once, and every encoding is tried on what it says.

Legend: N rows, P positions, R flat rows (N, or N P), C classes, T temperatures.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from storage.console import format_bytes, format_duration, format_plural
from storage.corpus.protocol import spread_rows
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.values import ValueType
from storage.errors import TeacherError
from studenttrain.heads import Head
from teacherdump.config import DumpConfig
from teacherdump.dump import Job, read_rows
from teacherdump.pilot_trials import Candidate, Trial, head_of, try_batch

PILOT_ROWS = 256
PILOT_POSITIONS = 4096  # of sequences
PILOT_VALUES = 1 << 27  # logits: of a large vocabulary fewer rows are enough for a table, and take their time
KS = (8, 16, 32, 64, 128, 256)
DRAWS = (16, 32, 64, 128)
VALUES: tuple[ValueType, ...] = ("float16", "uint8")


@dataclass(frozen=True)
class PilotOptions:
    """How a pilot is made.

    Attributes:
        rows: that the teacher scores, at least 1; None is 256, or about 4,096 positions of sequences, and fewer of a
            large vocabulary.
        student_epochs: passes of a student run over the corpus, above 0.

    Raises:
        ValueError: an option is out of range.
    """

    rows: int | None = None
    student_epochs: float = 1.0

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"pilot_rows: expected at least 1, or 0 for no pilot, got {self.rows}")
        if not 0 < self.student_epochs < math.inf:
            raise ValueError(f"student_epochs: expected a number above 0, got {self.student_epochs}")


@dataclass(frozen=True)
class Pilot:
    """What a pilot found.

    Attributes:
        num_rows: rows that the teacher scored.
        num_positions: distributions with finite logits among them.
        hours: of the teacher for all rows of the corpus, whatever the encoding.
        student_epochs: passes of a student run.
        temperatures: that were asked for.
        candidates: the encodings.
    """

    num_rows: int
    num_positions: int
    hours: float
    student_epochs: float
    temperatures: tuple[float, ...]
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        """Every figure by name."""
        return asdict(self)

    def table(self) -> str:
        """The same as a table for a person."""
        unit = "a row" if self.candidates[0].position_bytes is None else "a token"
        titles = ["", f"bytes {unit}", "in all"]
        for temperature in self.temperatures:
            titles += [f"T={temperature:g}: kept", "nats lost"]
        titles += [f"gradient at T={self.temperatures[0]:g}", "pays after"]
        lines = [titles, *(self._cells(candidate) for candidate in self.candidates)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
        text = [
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        scored = f"{format_plural(self.num_rows, 'row')}, {format_plural(self.num_positions, 'distribution')}"
        epochs = "1 epoch" if self.student_epochs == 1 else f"{self.student_epochs:g} epochs"
        return "\n".join(
            [
                f"pilot       {scored}; the teacher takes about {format_duration(self.hours * 3600)} for all rows,",
                "            whatever the encoding; writing is done meanwhile",
                *text,
                "> is what was asked for. nats lost: KL(teacher || what is read). gradient: how far off for one",
                f"distribution; of draws it is noise (+-), nothing in the mean. pays after: student runs of {epochs},",
                "against running the teacher in each.",
            ]
        )

    def _cells(self, candidate: Candidate) -> list[str]:
        num_bytes = candidate.row_bytes if candidate.position_bytes is None else candidate.position_bytes
        size = f"{num_bytes:,.0f}" if num_bytes >= 100 else f"{num_bytes:.1f}"
        cells = [f"{'>' if candidate.is_chosen else ' '} {candidate.name}", size, format_bytes(candidate.num_bytes)]
        by_temperature = {part.temperature: part for part in candidate.at}
        for temperature in self.temperatures:
            part = by_temperature.get(temperature)
            if part is None or part.kept is None or part.kl is None:
                cells += ["-", "-"]
            else:
                cells += [f"{100 * part.kept:.4g} %", f"{part.kl:.2g}"]
        first = by_temperature.get(self.temperatures[0])
        sign = "+-" if candidate.encoding["name"] == "sample" else ""
        cells.append("-" if first is None else f"{sign}{100 * first.gradient_error:.2g} %")
        runs = candidate.runs_to_pay
        cells.append("never" if runs is None else format_plural(max(1, math.ceil(runs)), "run"))
        return cells


def run_pilot(job: Job, config: DumpConfig, options: PilotOptions, rows_per_s: float) -> Pilot:
    """Score some rows, and try every encoding on them.

    Args:
        job: what would be dumped.
        config: its options.
        options: of the pilot.
        rows_per_s: of reading and teacher.

    Raises:
        TeacherError: the teacher gives no finite logits for any of the rows.
    """
    manifest, num_rows = job.manifest, job.corpus.num_samples
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    most = options.rows or pilot_rows(num_positions, manifest.num_classes)
    rows_N = np.array(spread_rows(num_rows, most, job.corpus.kind), np.int64)
    head = head_of(job)
    trials = [Trial.of(job, config, encoding) for encoding in encodings_to_try(job, head)]
    num_given = 0
    with ThreadPoolExecutor(job.num_readers) as pool:
        for start in range(0, len(rows_N), job.batch_size):
            read = read_rows(job, 0, rows_N[start : start + job.batch_size], pool)
            num_given += try_batch(job, read, trials, head, num_positions)
    if not num_given:
        raise TeacherError(
            f"{job.teacher.members[0].where}: expected finite logits for some of {len(rows_N)} rows of a pilot, got "
            "none; check the teacher, its --precision and the preprocessing"
        )
    teacher_s = 1 / rows_per_s
    return Pilot(
        num_rows=len(rows_N),
        num_positions=num_given,
        hours=num_rows * teacher_s / 3600,
        student_epochs=options.student_epochs,
        temperatures=manifest.temperatures,
        candidates=tuple(
            trial.candidate(job, options.student_epochs, head, num_positions, teacher_s) for trial in trials
        ),
    )


def pilot_rows(num_positions: int, num_classes: int) -> int:
    """Rows of a pilot, where nobody says.

    Example:
        >>> pilot_rows(1, 1000), pilot_rows(256, 50_000), pilot_rows(256, 151_936)
        (256, 10, 3)
    """
    rows = PILOT_ROWS if num_positions == 1 else PILOT_POSITIONS // num_positions
    return max(1, min(rows, PILOT_VALUES // (num_positions * num_classes)))


def encodings_to_try(job: Job, head: Head | None) -> list[Encoding]:
    """Every encoding in several sizes that fit the classes, and the one that was asked for, in the order of a table."""
    chosen, num_classes = job.manifest.encoding, job.manifest.num_classes
    found: list[Encoding] = [Dense(values) for values in VALUES]
    if head is not None:
        found.append(Hidden(head.width, "float16", head.scale, head.soft_cap, head.bias_C is not None))
    found += [TopK(k, values) for k in KS if k < num_classes for values in VALUES]
    found += [Sample(draws, chosen.seed if isinstance(chosen, Sample) else 0) for draws in DRAWS]
    if isinstance(chosen, Hidden):
        chosen = replace(chosen, head_sha256="")
    if chosen not in found:
        found.append(chosen)
    order = ("dense", "hidden", "topk", "sample")
    return sorted(found, key=lambda encoding: (order.index(encoding.name), _size(encoding)))


def _size(encoding: Encoding) -> tuple[int, str]:
    return getattr(encoding, "k", getattr(encoding, "draws", 0)), str(getattr(encoding, "values", ""))
