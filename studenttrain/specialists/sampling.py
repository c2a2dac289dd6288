"""The rows of a specialist: all of its own classes, and some of the rest, drawn at random and anew each epoch.

Legend: N rows of a store, R rows of other classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.console import format_count
from storage.errors import StudentError
from storage.reader import Store
from studenttrain.order import Indices, permutation
from studenttrain.selection import RowClasses, name_classes

DEFAULT_OWN_SHARE = 0.5
REST_STREAM = 2**64 - 1  # of random numbers: far from those of blocks and windows


@dataclass(frozen=True)
class RowCounts:
    """Rows that a specialist is trained on, of those that have a class and targets.

    Attributes:
        own: of its own classes; each epoch has all of them.
        rest: of all other classes.
        drawn: of these, in each epoch.
        by: what tells the class of a row: hard targets, or the stored top-1.
    """

    own: int
    rest: int
    drawn: int
    by: str

    @property
    def dustbin_shift(self) -> float:
        """The log of how much more often an own row is seen than another: what the dustbin's logit lacks.

        Source: Hinton, Vinyals and Dean 2015, section 5.2.
        """
        return math.log(self.rest / self.drawn)


@dataclass(frozen=True, eq=False)
class SpecialistRows:
    """The selection of a specialist's rows, as `TargetStream` asks for it.

    Attributes:
        own_N: bool (num_rows,), the own rows.
        rest_R: the others, int64, ascending.
        counts: of them, and of those that are drawn.
        seed: of the drawing.
        shards: that were sealed when they were counted: an epoch of others would make the counts wrong.
        text: which rows they are, in some words.
    """

    own_N: NDArray[np.bool_] = field(repr=False)  # noqa: N815
    rest_R: Indices = field(repr=False)  # noqa: N815
    counts: RowCounts
    seed: int
    shards: tuple[int, ...] = field(repr=False)
    text: str

    def chosen(self, epoch: int, shards: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each row is given: all own ones, and others that are drawn by (seed, epoch).

        Raises:
            StudentError: the store has grown since the rows were counted.
        """
        if tuple(shards) != self.shards:
            raise StudentError(
                f"epoch {epoch}: expected the {len(self.shards)} shards that the specialist's rows were counted in, "
                f"got {len(shards)}; give --out another folder for specialists of the store as it is now"
            )
        chosen_N = self.own_N.copy()
        drawn = permutation(len(self.rest_R), self.seed, epoch, REST_STREAM)[: self.counts.drawn]
        chosen_N[self.rest_R[drawn]] = True
        return chosen_N

    def describe(self) -> str:
        """Which rows they are, in some words."""
        return self.text


def check_has_classes(store: Store) -> None:
    """Refuse a store of sequences.

    Raises:
        StudentError: its rows have no class.
    """
    if store.manifest.sequences is not None:
        raise StudentError(
            f"store '{store.path}': expected one whose rows have a class, got sequences of tokens; specialists are for "
            "classes"
        )


def choose_rows(
    store: Store, classes_N: NDArray[np.int32], classes: Sequence[int], own_share: float, seed: int, by: str
) -> SpecialistRows:
    """The rows of a specialist. Rows without targets, or of no known class, are none of them.

    Args:
        store: whose sealed rows they are.
        classes_N: the class of each row, -1 where it is not known, as `RowClasses` gives it.
        classes: the specialist's own.
        own_share: of the rows of an epoch, above 0 and below 1.
        seed: of the drawing, from 0 to 2^64 - 1.
        by: what told the classes.

    Raises:
        StudentError: there is no own row, or no other.
    """
    shards = tuple(store.sealed_shards())
    usable_N = np.zeros(store.layout.num_rows, bool)
    for start, stop in map(store.layout.shard_bounds, shards):
        usable_N[start:stop] = True
    usable_N &= classes_N >= 0
    usable_N[[entry.row for entry in store.quarantine()]] = False
    is_own_N = np.isin(classes_N, classes)
    own_N, rest_R = usable_N & is_own_N, np.flatnonzero(usable_N & ~is_own_N)
    num_own = int(np.count_nonzero(own_N))
    named = name_classes(classes, store.manifest.class_names)
    for count, what in ((num_own, f"rows of its {named}"), (len(rest_R), "rows of other classes")):
        if not count:
            raise StudentError(
                f"store '{store.path}': expected {what}, by the {by}, got none; make a plan of classes that have rows"
            )
    drawn = min(len(rest_R), max(1, round(num_own * (1 - own_share) / own_share)))
    counts = RowCounts(num_own, len(rest_R), drawn, by)
    text = f"{format_count(num_own)} of its {named}, {format_count(drawn)} of {format_count(len(rest_R))} others anew"
    return SpecialistRows(own_N, rest_R, counts, seed, shards, f"{text} each epoch")


def classes_of_rows(rows: RowClasses) -> tuple[NDArray[np.int32], str]:
    """The class of each sealed row, and what told it."""
    return rows.of_shards(rows.store.sealed_shards()), rows.told_by


def counts_of(value: Any) -> RowCounts:
    """The counts of a JSON object.

    Raises:
        ValueError: they can't be.
    """
    own, rest, drawn = (value[name] for name in ("own", "rest", "drawn"))
    if not all(isinstance(it, int) and it >= 1 for it in (own, rest, drawn)) or drawn > rest:
        raise ValueError(f"rows: expected counts of own, rest and drawn rows, got {own}, {rest}, {drawn}")
    return RowCounts(own, rest, drawn, str(value["by"]))
