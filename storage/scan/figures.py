"""What `stats` gives: the figures of a whole store.

Counted are distributions: one of each row with targets, or in sequences one of each position of such a row whose next
token is of the same document. Only those are ever trained on.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from storage.sequences import Sequences


@dataclass(frozen=True)
class Entropy:
    """Entropy of the teacher's distribution at T = 1.

    Attributes:
        edges: of the bins, nats, from 0 to log C.
        counts: distributions in each bin.
        mean: nats; NaN where there is no distribution.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float


@dataclass(frozen=True)
class KeptMass:
    """How much of the distribution the kept entries hold, at one declared temperature.

    Attributes:
        temperature: the temperature.
        mean: mean over distributions.
        p5: the mass that 95 % of them have at least, right within 1 %, and so is 1 - p5.
        min: of the worst one.
        tail_edges: tail masses, ascending: upper edges of bins of half a unit of log odds.
        tail_counts: distributions in each bin.
    """

    temperature: float
    mean: float
    p5: float
    min: float
    tail_edges: tuple[float, ...]
    tail_counts: tuple[int, ...]


@dataclass(frozen=True)
class ClassMass:
    """Mean soft-target mass of each class at T = 1: what the teacher says its share of the rows is.

    Attributes:
        mean: of each class; with `tail` they sum to one. Of topk, what its kept entries hold.
        tail: mean mass that the kept entries of topk leave: of which classes it is, is not known. Else 0.
        elsewhere: mean mass of each class in those whose top-1 is another class: what is left of it where these alone
            are learned from. None where it is the top-1 of all.
    """

    mean: tuple[float, ...]
    tail: float
    elsewhere: tuple[float | None, ...]


@dataclass(frozen=True)
class Refused:
    """Rows without targets for one reason.

    Attributes:
        reason: one line; reasons that differ in their numbers alone are counted as the first of them.
        num_rows: how many rows.
        key: key of the first of them.
        row: the first of them.
    """

    reason: str
    num_rows: int
    key: str
    row: int


@dataclass(frozen=True)
class Agreement:
    """How often the teacher's top-1 is the hard target, in sequences the next token, over rows that have both.

    Attributes:
        num_rows: rows that have both; in sequences, positions.
        num_agreed: of these, those where they are the same class.
        hard_target_counts: of these, those of each hard target.
        agreed_counts: of these, those where top-1 is the same.
    """

    num_rows: int
    num_agreed: int
    hard_target_counts: tuple[int, ...]
    agreed_counts: tuple[int, ...]


@dataclass(frozen=True)
class Stats:
    """Figures of a store's sealed rows.

    Attributes:
        path: the store.
        num_rows: rows of the store.
        num_sealed_rows: of these, sealed rows; all that follows is of these.
        num_undecodable: rows whose sample could not be read.
        num_not_finite: rows whose logits were not finite.
        num_classes: classes.
        class_names: names in class order, or None.
        sequences: what makes the rows sequences, or None.
        num_positions: distributions of a row.
        num_tokens: of sequences, the positions that are counted: those of rows with targets whose next token is of the
            same document; None where a row is one distribution.
        top1_counts: distributions by top-1 class: the class of the largest logit, or the one that was drawn most often.
        class_mass: at T = 1, or None where the store is not exact there.
        class_mass_unknown: why there is none, or None.
        starved_classes: classes with less than a tenth of an equal share of the mass, or of the top-1 classes where the
            mass is not known: students of the store will hardly ever answer them. Empty of sequences, and of few rows.
        num_top1_ties: dense stores: those whose stored values name more than one class as top-1; the lowest is counted.
        entropy: at T = 1.
        kept_mass: at each declared temperature; empty where the encoding is not topk.
        hard_target_nll: mean of the teacher's negative log-probability of the hard targets, nats; None without any.
        agreement: with hard targets, or None where the store has none.
        refused: rows without targets by reason, the most frequent first.
        bytes_by_array: stored bytes of each array.
        head_bytes: of the head, which is there once; 0 where there is none.
    """

    path: str
    num_rows: int
    num_sealed_rows: int
    num_undecodable: int
    num_not_finite: int
    num_classes: int
    class_names: tuple[str, ...] | None
    sequences: Sequences | None
    num_positions: int
    num_tokens: int | None
    top1_counts: tuple[int, ...]
    class_mass: ClassMass | None
    class_mass_unknown: str | None
    starved_classes: tuple[int, ...]
    num_top1_ties: int
    entropy: Entropy
    kept_mass: tuple[KeptMass, ...]
    hard_target_nll: float | None
    agreement: Agreement | None
    refused: tuple[Refused, ...]
    bytes_by_array: Mapping[str, int]
    head_bytes: int

    @property
    def counted(self) -> str:
        """What is counted: `rows` or `tokens`."""
        return "rows" if self.sequences is None else "tokens"

    @property
    def num_refused(self) -> int:
        """Rows without targets."""
        return self.num_undecodable + self.num_not_finite

    @property
    def bytes_per_row(self) -> dict[str, float]:
        """Stored bytes a row of each array."""
        return {name: count / self.num_sealed_rows for name, count in self.bytes_by_array.items()}

    @property
    def bytes_per_token(self) -> dict[str, float] | None:
        """Stored bytes of each array for each token that is counted; None where no token is."""
        if not self.num_tokens:
            return None
        return {name: count / self.num_tokens for name, count in self.bytes_by_array.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object; null where there is no number."""
        value = asdict(self) | {"num_refused": self.num_refused}
        value |= {"bytes_per_row": self.bytes_per_row, "bytes_per_token": self.bytes_per_token}
        value["sequences"] = None if self.sequences is None else self.sequences.to_json()
        if math.isnan(self.entropy.mean):
            value["entropy"]["mean"] = None
        if self.hard_target_nll is not None and not math.isfinite(self.hard_target_nll):
            value["hard_target_nll"] = None
        return value


def class_label(stats: Stats, index: int) -> str:
    """A class's name, or its number where it has none."""
    return str(index) if stats.class_names is None else stats.class_names[index]
