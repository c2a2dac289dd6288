"""What a fusion does to a generalist's answers, counted.

Legend: N rows, C classes, M specialists, K a specialist's classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from studenttrain.figures import EvalFigures, Tally
from studenttrain.specialists.fused import Fused

# columns of the sums by number of specialists
ROWS, KNOWN, RIGHT_BEFORE, RIGHT_AFTER, CHANGED = range(5)
# columns of the sums of each specialist
SEEN, OWN, OWN_BEFORE, OWN_AFTER, DUSTBIN_SAID, DUSTBIN_TRUE, DUSTBIN_BOTH, ACTIVE = range(8)


@dataclass(frozen=True)
class CountLine:
    """Rows with one number of specialists: that have the true class, or that are active.

    Attributes:
        num_specialists: how many.
        num_rows: rows with so many.
        num_known: of these, rows with a hard target.
        num_changed: rows whose top-1 is another one after the fusion.
        right_before: rows whose hard target is the generalist's top-1.
        right_after: rows whose hard target is the fused top-1.
    """

    num_specialists: int
    num_rows: int
    num_known: int
    num_changed: int
    right_before: int
    right_after: int

    @property
    def change(self) -> int:
        """How many more rows are right."""
        return self.right_after - self.right_before

    @property
    def relative_change(self) -> float | None:
        """Change of the accuracy over what it was; None where nothing was right."""
        return self.change / self.right_before if self.right_before else None

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return asdict(self) | {"change": self.change, "relative_change": self.relative_change}


@dataclass(frozen=True)
class SpecialistLine:
    """A specialist on the rows that it saw.

    Attributes:
        number: of the specialist.
        classes: its own.
        num_active: rows that it was active for.
        num_seen: rows with a hard target that it saw.
        num_own: of these, rows of its own classes.
        own_before: share of its own rows whose hard target is the likeliest of its classes to the generalist.
        own_after: the same to the specialist.
        dustbin_precision: share of the rows that it puts into the dustbin which are not of its classes.
        dustbin_recall: share of the rows that are not of its classes which it puts into the dustbin.
    """

    number: int
    classes: tuple[int, ...]
    num_active: int
    num_seen: int
    num_own: int
    own_before: float | None
    own_after: float | None
    dustbin_precision: float | None
    dustbin_recall: float | None


@dataclass(frozen=True)
class FusedFigures:
    """What an evaluation of generalist and specialists measured.

    Attributes:
        generalist: alone.
        fused: with its specialists.
        num_changed: rows whose top-1 changed.
        by_covering: rows with a hard target by the number of specialists that have it; empty without hard targets.
        by_active: all rows by the number of active specialists.
        specialists: a line for each.
        num_refused: samples without an answer: not decoded, or without targets in the store.
        residual: largest gradient that the fusion left in a row.
        num_iterations: of the slowest row.
        tolerance: that was asked for.
        every_row: whether each specialist saw all rows.
    """

    generalist: EvalFigures
    fused: EvalFigures
    num_changed: int
    by_covering: tuple[CountLine, ...]
    by_active: tuple[CountLine, ...]
    specialists: tuple[SpecialistLine, ...]
    num_refused: int
    residual: float
    num_iterations: int
    tolerance: float
    every_row: bool

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {
            "generalist": self.generalist.to_json(),
            "fused": self.fused.to_json(),
            "num_changed": self.num_changed,
            "num_refused": self.num_refused,
            "by_covering": [line.to_json() for line in self.by_covering],
            "by_active": [line.to_json() for line in self.by_active],
            "specialists": [asdict(line) for line in self.specialists],
            "residual": self.residual,
            "num_iterations": self.num_iterations,
            "tolerance": self.tolerance,
            "every_row": self.every_row,
        }


@dataclass
class FusedTally:
    """Running sums of an evaluation.

    Attributes:
        classes: of each specialist.
        num_classes: of the generalist.
    """

    classes: Sequence[tuple[int, ...]]
    num_classes: int
    num_refused: int = 0
    residual: float = 0.0
    num_iterations: int = 0
    generalist: Tally = field(default_factory=Tally)
    fused: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        num_specialists = len(self.classes)
        self.covering_A5 = torch.zeros(num_specialists + 1, 5, dtype=torch.int64)
        self.active_A5 = torch.zeros(num_specialists + 1, 5, dtype=torch.int64)
        self.each_M8 = torch.zeros(num_specialists, 8, dtype=torch.int64)
        self.member_MC = torch.zeros(num_specialists, self.num_classes, dtype=torch.bool)
        for number, classes in enumerate(self.classes):
            self.member_MC[number, list(classes)] = True

    def add(self, fused: Fused, hard_targets_N: Tensor | None) -> None:
        """Count some rows.

        Args:
            fused: what was said of them.
            hard_targets_N: their classes, -1 where unknown; None where none is known.
        """
        before_NC, after_NC, active_NM = fused.generalist_NC.cpu(), fused.logprobs_NC.cpu(), fused.active_NM.cpu()
        self.residual = max(self.residual, fused.result.residual)
        self.num_iterations = max(self.num_iterations, fused.result.num_iterations)
        hard_N = torch.full((len(after_NC),), -1) if hard_targets_N is None else hard_targets_N.long()
        self.generalist.add(before_NC, hard_targets_N)
        self.fused.add(after_NC, hard_targets_N)
        known_N, before_N, after_N = hard_N >= 0, before_NC.argmax(1), after_NC.argmax(1)
        line_N5 = torch.stack(
            [torch.ones_like(known_N), known_N, before_N == hard_N, after_N == hard_N, before_N != after_N], 1
        ).long()
        self.active_A5.index_add_(0, active_NM.sum(1), line_N5)
        covering_N = self.member_MC[:, hard_N.clamp(min=0)].sum(0)
        self.covering_A5.index_add_(0, covering_N[known_N], line_N5[known_N])
        self.each_M8[:, ACTIVE] += active_NM.sum(0)
        for number, said_NK in enumerate(fused.said):
            self._add_specialist(number, said_NK.cpu(), before_NC, hard_N)

    def _add_specialist(self, number: int, said_NK: Tensor, before_NC: Tensor, hard_N: Tensor) -> None:
        seen_N = ~said_NK[:, -1].isnan() & (hard_N >= 0)
        if not bool(seen_N.any()):
            return
        said_NK, before_NC, hard_N = said_NK[seen_N], before_NC[seen_N], hard_N[seen_N]
        classes_K, is_own_N = torch.tensor(self.classes[number]), self.member_MC[number, hard_N]
        own_before_N = classes_K[before_NC[:, classes_K].argmax(1)] == hard_N
        own_after_N = classes_K[said_NK[:, :-1].argmax(1)] == hard_N
        is_dustbin_N = said_NK.argmax(1) == len(classes_K)
        counted = [
            torch.ones_like(is_own_N), is_own_N, is_own_N & own_before_N, is_own_N & own_after_N, is_dustbin_N,
            ~is_own_N, is_dustbin_N & ~is_own_N,
        ]  # fmt: skip
        self.each_M8[number, :ACTIVE] += torch.stack([values_N.sum() for values_N in counted])

    def figures(self, tolerance: float, *, every_row: bool) -> FusedFigures:
        """The figures of all that was counted."""
        return FusedFigures(
            generalist=self.generalist.figures(),
            fused=self.fused.figures(),
            num_changed=int(self.active_A5[:, CHANGED].sum()),
            by_covering=_lines(self.covering_A5),
            by_active=_lines(self.active_A5),
            specialists=tuple(
                _specialist_line(number, tuple(classes), sums_8.tolist())
                for number, (classes, sums_8) in enumerate(zip(self.classes, self.each_M8, strict=True))
            ),
            num_refused=self.num_refused,
            residual=self.residual,
            num_iterations=self.num_iterations,
            tolerance=tolerance,
            every_row=every_row,
        )


def _lines(sums_A5: Tensor) -> tuple[CountLine, ...]:
    """A line for each number of specialists that a row has."""
    return tuple(
        CountLine(number, row[ROWS], row[KNOWN], row[CHANGED], row[RIGHT_BEFORE], row[RIGHT_AFTER])
        for number, row in enumerate(sums_A5.tolist())
        if row[ROWS]
    )


def _specialist_line(number: int, classes: tuple[int, ...], sums: list[int]) -> SpecialistLine:
    return SpecialistLine(
        number=number,
        classes=classes,
        num_active=sums[ACTIVE],
        num_seen=sums[SEEN],
        num_own=sums[OWN],
        own_before=_share(sums[OWN_BEFORE], sums[OWN]),
        own_after=_share(sums[OWN_AFTER], sums[OWN]),
        dustbin_precision=_share(sums[DUSTBIN_BOTH], sums[DUSTBIN_SAID]),
        dustbin_recall=_share(sums[DUSTBIN_BOTH], sums[DUSTBIN_TRUE]),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
