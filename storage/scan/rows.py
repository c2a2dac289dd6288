"""What a legal row looks like: the rules that `verify` holds every row to, beyond its checksums.

Legend: N rows, C classes, T temperatures, K kept entries (all C of them in a dense store).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array, Arrays
from storage.encodings import TopK
from storage.encodings.dense import loaded_values
from storage.manifest import Manifest

ROUNDING = 1e-4  # of a float32 reduction over all classes, on any device
BATCH_VALUES = 1 << 17  # few enough to stay in the cache while they are exponentiated

Rule = tuple[str, Any, str]  # the array, which rows break it, what was expected


@dataclass(frozen=True)
class BrokenRule:
    """A rule that some rows of a block break.

    Attributes:
        array: the array that breaks it.
        first: the first such row, counted from the block's first.
        num_rows: how many rows do.
        expected: what the rule asks for.
    """

    array: str
    first: int
    num_rows: int
    expected: str


def broken_rules(manifest: Manifest, arrays: Arrays) -> list[BrokenRule]:
    """The rules that rows break; `arrays` holds all arrays of the manifest, of the same rows."""
    status_N = arrays["status"]
    with_targets, without = np.flatnonzero(status_N == STATUS_OK), np.flatnonzero(status_N != STATUS_OK)
    groups = (
        (np.arange(len(status_N)), _status_rules(arrays)),
        (without, _refused_rules(_take(arrays, without))),
        (with_targets, _target_rules(manifest, _take(arrays, with_targets))),
    )
    found = []
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        for rows, rules in groups:
            for name, bad_N, expected in rules:
                if bad_N.any():
                    found.append(BrokenRule(name, int(rows[bad_N][0]), int(bad_N.sum()), expected))
    return found


def _take(arrays: Arrays, rows: Array) -> Arrays:
    if len(rows) == len(arrays["status"]):
        return arrays
    return {name: values[rows] for name, values in arrays.items()}


def _status_rules(arrays: Arrays) -> Iterator[Rule]:
    legal = (STATUS_OK, STATUS_UNDECODABLE, STATUS_NOT_FINITE)
    yield "status", ~np.isin(arrays["status"], legal), f"a status of {', '.join(map(str, legal))}"


def _refused_rules(arrays: Arrays) -> Iterator[Rule]:
    """Rows without targets hold NaN in every array of floats."""
    for name, values in arrays.items():
        if values.dtype.kind == "f":
            axes = tuple(range(1, values.ndim))
            yield name, ~np.isnan(values).all(axis=axes), "NaN in a row without targets"


def _target_rules(manifest: Manifest, arrays: Arrays) -> Iterator[Rule]:
    """Rows with targets hold a distribution over the classes."""
    num_classes = manifest.num_classes
    highest = math.log(num_classes) + 2**-10 * (1 + math.log(num_classes))  # it is stored as float16
    yield "max_logit", ~np.isfinite(arrays["max_logit"]), "a finite number"
    yield "lse", ~((arrays["lse"] >= 0) & np.isfinite(arrays["lse"])).all(axis=1), "finite numbers of at least 0"
    entropy_N = arrays["entropy"]
    yield "entropy", ~((entropy_N >= 0) & (entropy_N <= highest)), f"0 to log {num_classes} nats"
    if manifest.has_hard_targets:
        target_N = arrays["hard_target"]
        yield "hard_target", (target_N < -1) | (target_N >= num_classes), f"-1 to {num_classes - 1}"
        bad_N = (target_N >= 0) & ~(arrays["hard_target_logprob"] <= 0)
        yield "hard_target_logprob", bad_N, "at most 0 where the hard target is known"
    if "value_range" in arrays:
        range_N = arrays["value_range"]
        yield "value_range", ~((range_N >= 0) & np.isfinite(range_N)), "a finite number of at least 0"
    if isinstance(manifest.encoding, TopK):
        yield from _topk_rules(manifest, arrays)
    else:
        top_N = ordered(arrays["values"]).min(axis=1)
        yield "values", _top_value(arrays["values"], top_N) != 0, "0 as the largest value"
    if arrays["values"].dtype.kind == "f":
        yield "values", ~(arrays["values"] <= 0).all(axis=1), "numbers of at most 0 or -inf"
    for column, temperature in enumerate(manifest.temperatures):
        yield "values", _wrong_mass(manifest, arrays, column), f"probabilities that sum to one at T = {temperature:g}"


def ordered(values_NK: Array) -> Array:
    """Stored values as unsigned integers, whose order is the reverse of theirs: 0 is the largest value.

    A number that is not above 0 has its sign bit set, or is +0: the further down it is, the larger its bits. Integers
    of any size are compared much quicker than halves.
    """
    if values_NK.dtype == np.uint8:
        return values_NK
    return values_NK.view(f"u{values_NK.dtype.itemsize}")


def _top_value(values_NK: Array, top_N: Array) -> Array:
    return top_N if values_NK.dtype == np.uint8 else top_N.view(values_NK.dtype)


def _topk_rules(manifest: Manifest, arrays: Arrays) -> Iterator[Rule]:
    ids_NK, values_NK = arrays["ids"], arrays["values"]
    yield "ids", (ids_NK >= manifest.num_classes).any(axis=1), f"ids below {manifest.num_classes}"
    sorted_NK = np.sort(ids_NK, axis=1)
    yield "ids", (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(axis=1), "every id once"
    yield "values", values_NK[:, 0] != 0, "0 as the first value"
    upward_NK = values_NK if values_NK.dtype == np.uint8 else -values_NK
    yield "values", ~(upward_NK[:, 1:] >= upward_NK[:, :-1]).all(axis=1), "values sorted downward"
    yield "log_tail", ~(arrays["log_tail"] <= ROUNDING).all(axis=1), "numbers of at most 0 or -inf"


def _wrong_mass(manifest: Manifest, arrays: Arrays, column: int) -> Array:
    """Which rows' stored probabilities do not sum to one, within what the encoding and its rounding allow."""
    num_rows, num_kept = arrays["values"].shape
    wrong_N = np.zeros(num_rows, bool)
    step = max(1, BATCH_VALUES // num_kept)
    for first in range(0, num_rows, step):
        rows = {name: arrays[name][first : first + step] for name in ("values", "value_range") if name in arrays}
        mass = _kept_mass(rows, arrays["lse"][first : first + step, column], manifest.temperatures[column])
        if "log_tail" in arrays:
            mass = mass + np.exp(arrays["log_tail"][first : first + step, column].astype(np.float64))
        bound = mass_bound(manifest, rows, manifest.temperatures[column])
        wrong_N[first : first + step] = ~(np.abs(np.log(mass)) <= bound)
    return wrong_N


def _kept_mass(rows: Arrays, lse_N: Array, temperature: float) -> Array:
    scaled_NK = loaded_values(rows)
    scaled_NK /= np.float32(temperature)
    mass: Array = np.exp(scaled_NK, out=scaled_NK).sum(axis=1, dtype=np.float64) * np.exp(-lse_N.astype(np.float64))
    return mass


def mass_bound(manifest: Manifest, rows: Arrays, temperature: float) -> Array | float:
    """How far from 0 the log of a row's mass may be, given how its values are stored.

    With values off by d, log sum exp(v / T) is off by at most log sum p exp(|d| / T). For float16,
    |d| <= 2^-11 |v| + 2^-25, and sum p |v| / T is the entropy less lse, so at most log C. For uint8, |d| <= R / 510,
    save for -inf, which is read as -R.
    """
    if rows["values"].dtype == np.uint8:
        range_N = rows["value_range"].astype(np.float64) / temperature
        num_lowest_N = (rows["values"] == 255).sum(axis=1)
        bound: Array = ROUNDING + range_N / 510 + np.log1p(num_lowest_N * np.exp(-range_N))
        return bound
    if rows["values"].dtype == np.float16:
        return ROUNDING + 2**-10 * math.log(manifest.num_classes) + 2**-24 / temperature
    return ROUNDING
