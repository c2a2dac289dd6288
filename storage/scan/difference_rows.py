"""How the rows of two stores differ: number by number, in what they hold likeliest, and as distributions.

Legend: N rows, R distributions (N, or N P in sequences).
"""

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from storage.arrays import STATUS_OK, Array, Arrays
from storage.encodings.dense import loaded_values
from storage.reader import Store
from storage.scan.difference_plan import Pair, Plan, num_positions_of
from storage.scan.divergence import divergence_of, top1_of, width_of
from storage.sequences import ROW_ARRAYS, flatten_positions

BATCH_VALUES = 1 << 17  # few enough to stay in the cache while they are exponentiated
KINDS = {"full": "all classes", "kept": "the classes that both keep, and all others as one: a lower bound"}


@dataclass(frozen=True)
class ArrayDifference:
    """How an array that both stores keep differs.

    Attributes:
        name: of the array.
        num_rows: rows in which it differs.
        first_row: the first of them, or None.
        max_abs: largest difference of two finite numbers; None where its entries are no quantities, such as ids.
        mean_abs: mean over all its numbers; None as above.
        num_not_finite: numbers that are not finite in one store, and finite or another in the other.
    """

    name: str
    num_rows: int
    first_row: int | None
    max_abs: float | None
    mean_abs: float | None
    num_not_finite: int


@dataclass(frozen=True)
class Divergence:
    """KL of the first store's distributions to the second's.

    Attributes:
        temperature: at which it is taken.
        over: what it goes over.
        mean: nats, over the distributions of which it is finite; None where there is none.
        max: nats, of those.
        max_row: the row of that one.
        num_infinite: distributions of which it is not finite: the second gives nothing to what the first expects.
    """

    temperature: float
    over: str
    mean: float | None
    max: float | None
    max_row: int | None
    num_infinite: int


@dataclass(frozen=True)
class RowFigures:
    """How the rows of two stores differ.

    Attributes:
        num_differing: rows in which any number that both keep differs.
        first_differing: the first of them, or None.
        num_other_samples: rows whose sample's digest differs.
        first_other_sample: the first of them, or None.
        num_other_status: rows whose status differs.
        first_other_status: the first of them, or None.
        num_compared: rows that have targets, and the same sample, in both: what follows is of these.
        num_distributions: distributions of these.
        num_top1_agreed: of these, those with the same top-1 class, the lowest of equal ones.
        divergence: None where the two encodings have none in common.
    """

    num_differing: int
    first_differing: int | None
    num_other_samples: int
    first_other_sample: int | None
    num_other_status: int
    first_other_status: int | None
    num_compared: int
    num_distributions: int
    num_top1_agreed: int
    divergence: Divergence | None


@dataclass
class _Counts:
    """Of one array."""

    num_rows: int = 0
    first_row: int | None = None
    total: float = 0.0
    largest: float = 0.0
    num_not_finite: int = 0

    def merge(self, later: Self) -> None:
        """Add what was counted behind."""
        self.num_rows += later.num_rows
        self.first_row = _earlier(self.first_row, later.first_row)
        self.total += later.total
        self.largest = max(self.largest, later.largest)
        self.num_not_finite += later.num_not_finite


def _earlier(one: int | None, two: int | None) -> int | None:
    return two if one is None else one if two is None else min(one, two)


@dataclass
class Tally:
    """Counts that add up."""

    arrays: dict[str, _Counts]
    differing: _Counts = field(default_factory=_Counts)
    samples: _Counts = field(default_factory=_Counts)
    status: _Counts = field(default_factory=_Counts)
    num_compared: int = 0
    num_distributions: int = 0
    num_agreed: int = 0
    kl_sum: float = 0.0
    kl_max: float = -math.inf
    kl_row: int | None = None
    num_infinite: int = 0

    @classmethod
    def empty(cls, plan: Plan) -> Self:
        """No rows."""
        return cls({pair.spec.name: _Counts() for pair in plan.pairs})

    @classmethod
    def of_equal_rows(cls, plan: Plan, store: Store, start: int, stop: int) -> Self:
        """Rows of one whole shard that are the same in both stores: what comparing them would count."""
        found = cls.empty(plan)
        refused = {entry.row for entry in store.seal(store.layout.shard_of(start)).quarantine}
        found.num_compared = stop - start - len(refused)
        found.num_distributions = found.num_agreed = found.num_compared * num_positions_of(plan.first)
        if found.num_compared and plan.kind is not None:
            found.kl_max = 0.0
            found.kl_row = next(row for row in range(start, stop) if row not in refused)
        return found

    def merge(self, later: Self) -> Self:
        """The counts of both."""
        for name, counts in later.arrays.items():
            self.arrays[name].merge(counts)
        for name in ("differing", "samples", "status"):
            getattr(self, name).merge(getattr(later, name))
        for name in ("num_compared", "num_distributions", "num_agreed", "kl_sum", "num_infinite"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        if later.kl_max > self.kl_max:
            self.kl_max, self.kl_row = later.kl_max, later.kl_row
        return self

    def figures(self, plan: Plan) -> tuple[RowFigures, tuple[ArrayDifference, ...]]:
        """What they come to."""
        arrays = []
        for pair in plan.pairs:
            counts, size = self.arrays[pair.spec.name], self.num_compared * pair.row_size
            largest, mean = (counts.largest, counts.total / size if size else 0.0) if pair.is_quantity else (None, None)
            arrays.append(
                ArrayDifference(pair.spec.name, counts.num_rows, counts.first_row, largest, mean, counts.num_not_finite)
            )
        divergence = None
        if plan.kind is not None:
            finite = self.num_distributions - self.num_infinite
            largest = self.kl_max if finite else None
            mean = self.kl_sum / finite if finite else None
            divergence = Divergence(plan.temperature, KINDS[plan.kind], mean, largest, self.kl_row, self.num_infinite)
        rows = RowFigures(
            self.differing.num_rows,
            self.differing.first_row,
            self.samples.num_rows,
            self.samples.first_row,
            self.status.num_rows,
            self.status.first_row,
            self.num_compared,
            self.num_distributions,
            self.num_agreed,
            divergence,
        )
        return rows, tuple(arrays)


def tally_rows(plan: Plan, one: Store, two: Store, start: int, stop: int, block_bytes: int) -> Tally:
    """Compare rows [start, stop) of two stores, some at a time."""
    found = Tally.empty(plan)
    row_bytes = plan.first.row_bytes + plan.second.row_bytes
    chunk_rows = plan.first.chunk_rows
    step = chunk_rows * max(1, block_bytes // (chunk_rows * row_bytes))
    names = [[spec.name for spec in manifest.arrays] for manifest in (plan.first, plan.second)]
    for first in range(start, stop, step):
        last = min(first + step, stop)
        arrays = one.read(names[0], first, last), two.read(names[1], first, last)
        _tally_block(found, plan, arrays, first)
    return found


def _tally_block(tally: Tally, plan: Plan, arrays: tuple[Arrays, Arrays], start: int) -> None:
    one, two = arrays
    other_N = one["sample_digest"] != two["sample_digest"]
    _count(tally.samples, other_N, start)
    _count(tally.status, one["status"] != two["status"], start)
    is_compared_N = ~other_N & (one["status"] == STATUS_OK) & (two["status"] == STATUS_OK)
    differs_N = np.zeros(len(other_N), bool)
    for pair in plan.pairs:
        name = pair.spec.name
        values = _compared(pair, one, pair.first), _compared(pair, two, pair.second)
        unlike = _unlike(*values).reshape(len(other_N), -1)
        differs_N |= unlike.any(axis=1)
        counts = tally.arrays[name]
        is_row_array = name in ("status", "sample_digest")
        _count(counts, unlike.any(axis=1) & (is_compared_N | is_row_array), start)
        if pair.is_quantity:
            _add_quantities(counts, values[0][is_compared_N], values[1][is_compared_N])
    _count(tally.differing, differs_N, start)
    rows = np.flatnonzero(is_compared_N)
    tally.num_compared += len(rows)
    if len(rows) and num_positions_of(plan.first) == num_positions_of(plan.second):
        flats = [
            flatten_positions(manifest.sequences, {key: it[rows] for key, it in part.items() if key not in ROW_ARRAYS})
            for part, manifest in zip(arrays, (plan.first, plan.second), strict=True)
        ]
        _tally_distributions(tally, plan, flats, rows + start)


def _count(counts: _Counts, is_N: Array, start: int) -> None:
    num_rows = int(is_N.sum())
    if num_rows:
        counts.num_rows += num_rows
        counts.first_row = _earlier(counts.first_row, start + int(is_N.argmax()))


def _compared(pair: Pair, arrays: Arrays, places: list[int] | None) -> Array:
    """An array as it is compared: quantised values as what they stand for."""
    values = arrays[pair.spec.name]
    if pair.spec.name == "values" and values.dtype == np.uint8:
        flat = values.reshape(-1, values.shape[-1])
        values = loaded_values({"values": flat, "value_range": arrays["value_range"].reshape(-1)}).reshape(values.shape)
    return values if places is None else values[..., places]


def _unlike(one: Array, two: Array) -> Array:
    """Which entries differ: to the bit, where they are of one type."""
    if one.dtype == two.dtype and one.dtype.kind == "f":
        code = f"u{one.dtype.itemsize}"
        found: Array = np.ascontiguousarray(one).view(code) != np.ascontiguousarray(two).view(code)
        return found
    unlike: Array = one != two
    if one.dtype.kind == "f" and two.dtype.kind == "f":
        unlike &= ~(np.isnan(one) & np.isnan(two))
    return unlike


def _add_quantities(counts: _Counts, one: Array, two: Array) -> None:
    one, two = one.astype(np.float64), two.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(two)
    with np.errstate(invalid="ignore"):
        off = np.abs(one - two)[finite]
    counts.total += float(off.sum())
    counts.largest = max(counts.largest, float(off.max(initial=0.0)))
    counts.num_not_finite += int((~finite & (one != two) & ~(np.isnan(one) & np.isnan(two))).sum())


def _tally_distributions(tally: Tally, plan: Plan, flats: list[dict[str, Array]], rows_N: Array) -> None:
    """Compare distributions, some at a time."""
    num_positions = num_positions_of(plan.first)
    num_distributions = len(rows_N) * num_positions
    tally.num_distributions += num_distributions
    widest = max(width_of(manifest) for manifest in (plan.first, plan.second))
    step = max(1, BATCH_VALUES // widest)
    for start in range(0, num_distributions, step):
        parts = [{key: values[start : start + step] for key, values in flat.items()} for flat in flats]
        tops = [
            top1_of(manifest.encoding, part, head)
            for manifest, part, head in zip((plan.first, plan.second), parts, plan.heads, strict=True)
        ]
        tally.num_agreed += int((tops[0] == tops[1]).sum())
        if plan.kind is None:
            continue
        kl_R = divergence_of(plan, parts)
        finite_R = np.isfinite(kl_R)
        tally.num_infinite += int((~finite_R).sum())
        kl_R = np.where(finite_R, np.maximum(kl_R, 0.0), -1.0)
        tally.kl_sum += float(kl_R[finite_R].sum())
        place = int(kl_R.argmax())
        if finite_R.any() and kl_R[place] > tally.kl_max:
            tally.kl_max, tally.kl_row = float(kl_R[place]), int(rows_N[(start + place) // num_positions])
