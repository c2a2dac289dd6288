"""Which rows an epoch gives: those of some classes, or any other pure function of the epoch and its sealed shards.

Legend: N rows of a store.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.console import format_count, printable
from storage.corpus import Corpus
from storage.errors import MismatchError, StudentError
from storage.reader import Store
from studenttrain.top1 import stored_top1

MAX_NAMES = 5  # classes that are named in a line
HARD_TARGETS, STORED_TOP1 = "hard targets", "stored top-1"


class RowSelection(Protocol):
    """Chooses the rows of an epoch. The same (epoch, sealed shards) must always give the same rows."""

    def chosen(self, epoch: int, shards: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each row is given, bool (num_rows,); looked at in the sealed shards of the epoch alone."""

    def describe(self) -> str:
        """Which rows they are, in some words."""


@dataclass(eq=False)
class RowClasses:
    """The class of each row: its hard target, in the store or else the corpus; where neither has any, the stored top-1.

    Read a shard at a time when it is first asked for, and remembered, so that a store may grow.

    Attributes:
        store: whose rows they are.
        corpus: of the store, with hard targets or without.
    """

    store: Store
    corpus: Corpus
    _classes: NDArray[np.int32] = field(init=False, repr=False)
    _known: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        self._classes = np.full(self.store.layout.num_rows, -1, np.int32)

    @property
    def by_top1(self) -> bool:
        """Whether the stored top-1 is the class, since there are no hard targets."""
        return not self.store.manifest.has_hard_targets and self.corpus.hard_targets is None

    @property
    def told_by(self) -> str:
        """What tells the class of a row."""
        return STORED_TOP1 if self.by_top1 else HARD_TARGETS

    def of_shards(self, shards: Iterable[int]) -> NDArray[np.int32]:
        """The classes of all rows (num_rows,); -1 where one is not known, or in none of these or earlier shards."""
        if len(self._classes) < (num_rows := self.store.layout.num_rows):  # a series grew
            grown = np.full(num_rows - len(self._classes), -1, np.int32)
            self._classes = np.concatenate([self._classes, grown])
        for shard in shards:
            if shard not in self._known:
                start, stop = self.store.layout.shard_bounds(shard)
                self._classes[start:stop] = self._read(start, stop)
                self._known.add(shard)
        return self._classes

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        if self.by_top1:
            return stored_top1(self.store, start, stop)
        if self.store.manifest.has_hard_targets:
            return self.store.read(["hard_target"], start, stop)["hard_target"]
        assert self.corpus.hard_targets is not None
        return self.corpus.hard_targets[start:stop]


@dataclass(frozen=True)
class ClassSelection:
    """The rows of some classes, or of all but some. Rows of no known class are in none of them.

    Attributes:
        classes: class numbers, ascending.
        is_without: whether these are left out; otherwise they are all that is given.
        rows: the class of each row.
    """

    classes: tuple[int, ...]
    is_without: bool
    rows: RowClasses

    def chosen(self, epoch: int, shards: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each row is given; the same in every epoch."""
        del epoch
        return np.isin(self.rows.of_shards(shards), self.classes, invert=self.is_without)

    def describe(self) -> str:
        """Which rows they are, in some words."""
        names = self.rows.store.manifest.class_names
        what = name_classes(self.classes, names)
        told = ", by the stored top-1" if self.rows.by_top1 else ""
        return f"{'without ' if self.is_without else ''}{what}{told}"

    def to_json(self) -> dict[str, Any]:
        """What the card of a student says of the rows that it was shown."""
        name = "without_classes" if self.is_without else "only_classes"
        return {name: list(self.classes), "by": self.rows.told_by}


def name_classes(classes: Sequence[int], names: Sequence[str] | None) -> str:
    """Some classes by name, where they have names that are not their numbers.

    Example:
        >>> name_classes([7, 8], None)
        'classes 7, 8'
        >>> name_classes([0], ["cat", "dog"])
        "class 'cat'"
    """

    def said(number: int) -> str:
        return str(number) if names is None or names[number] == str(number) else f"'{printable(names[number])}'"

    shown = ", ".join(said(number) for number in classes[:MAX_NAMES])
    more = f" and {format_count(len(classes) - MAX_NAMES)} more" if len(classes) > MAX_NAMES else ""
    return f"{'class' if len(classes) == 1 else 'classes'} {shown}{more}"


def choose_classes(only: str | None, without: str | None, rows: RowClasses) -> ClassSelection | None:
    """The selection that `--only-classes` or `--without-classes` ask for, None for neither.

    Raises:
        MismatchError: a class is not one of the store's.
        StudentError: no sealed row is left.
    """
    text = only if only is not None else without
    if text is None:
        return None
    option = "only_classes" if only is not None else "without_classes"
    store = rows.store
    if store.manifest.sequences is not None:
        raise StudentError(
            f"{option}: expected a store whose rows have a class, got sequences of tokens in '{store.path}'; leave it "
            "out"
        )
    classes = parse_classes(option, text, store)
    selection = ClassSelection(classes, without is not None, rows)
    # of a store that still grows, rows of these classes may yet come: an epoch without any says so itself
    shards = store.sealed_shards()
    if store.finalized and not any_chosen(selection, 0, shards, store):
        raise StudentError(
            f"{option}: expected rows that are left in '{store.path}', got none ({selection.describe()}); give other "
            "classes"
        )
    return selection


def any_chosen(selection: RowSelection, epoch: int, shards: Sequence[int], store: Store) -> bool:
    """Whether any row of some shards is chosen."""
    chosen_N = selection.chosen(epoch, shards)
    bounds = map(store.layout.shard_bounds, shards)
    return any(bool(chosen_N[start:stop].any()) for start, stop in bounds)


def parse_classes(option: str, text: str, store: Store) -> tuple[int, ...]:
    """Class numbers, ascending, from numbers and names with commas between them; a name may be in double quotes.

    Args:
        option: that was given, for messages.
        text: such as `7,8` or `cat,"tench, Tinca tinca"`.
        store: whose classes they are.

    Raises:
        MismatchError: one is not a class of the store, or a number and the name of another class at once.
    """
    manifest = store.manifest
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(manifest.class_names or ())}
    found = set()
    for given in next(csv.reader([text.strip()], skipinitialspace=True)) or [""]:
        name = given.strip()
        by_name = numbers.get(name)
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else None
        by_number = number if number is not None and number < manifest.num_classes else None
        if by_name is None and by_number is None:
            some = f" such as '{manifest.class_names[0]}'" if manifest.class_names else ""
            raise MismatchError(
                f"{option}: expected classes of '{store.path}', numbers from 0 to {manifest.num_classes - 1} or "
                f"names{some}, got {name!r}; see logitstore info"
            )
        if None not in (by_name, by_number) and by_name != by_number:
            raise MismatchError(
                f"{option}: expected one class, got {name!r}, which is class {by_number} by number and class {by_name} "
                f"by name in '{store.path}'; give the number of the class"
            )
        found.add(by_name if by_name is not None else by_number)
    return tuple(sorted(number for number in found if number is not None))
