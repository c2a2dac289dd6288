"""What a legal row looks like: the rules that `verify` holds every row to, beyond its checksums.

Legend: N rows, P positions, R distributions (N, or N P in sequences), C classes, T temperatures, K kept entries (all C
of them in a dense store), D places for drawn ids.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array, Arrays
from storage.encodings import HeadArrays, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.manifest import Manifest
from storage.scan.recompute import logit_bound, max_and_lse
from storage.sequences import flatten_positions, target_mask

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
        position: of the first one in its sequence; None where the rule is about whole rows.
    """

    array: str
    first: int
    num_rows: int
    expected: str
    position: int | None = None


def broken_rules(manifest: Manifest, arrays: Arrays, head: HeadArrays | None = None) -> list[BrokenRule]:
    """The rules that rows break.

    Args:
        manifest: of the store.
        arrays: all arrays of the manifest, of the same whole chunks.
        head: of a store of hidden states, to recompute a few rows of each chunk with; None recomputes nothing.
    """
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    status_N = arrays["status"]
    every, without = np.arange(len(status_N)), np.flatnonzero(status_N != STATUS_OK)
    found = []
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        for rows, rules in (
            (every, _status_rules(arrays)),
            (every, _token_rules(manifest, arrays)),
            (without, _refused_rules(_take(arrays, without, len(status_N)))),
        ):
            for name, bad_N, expected in rules:
                if bad_N.any():
                    found.append(BrokenRule(name, int(rows[bad_N][0]), int(bad_N.sum()), expected))
        for name, rows_R, expected in _distribution_rules(manifest, arrays, head, num_positions):
            row, position = divmod(int(rows_R[0]), num_positions)
            num_rows = len(np.unique(rows_R // num_positions))
            found.append(BrokenRule(name, row, num_rows, expected, None if manifest.sequences is None else position))
    return found


def _take(arrays: Arrays, rows: Array, num_rows: int) -> Arrays:
    if len(rows) == num_rows:
        return arrays
    return {name: values[rows] for name, values in arrays.items()}


def _status_rules(arrays: Arrays) -> Iterator[Rule]:
    legal = (STATUS_OK, STATUS_UNDECODABLE, STATUS_NOT_FINITE)
    yield "status", ~np.isin(arrays["status"], legal), f"a status of {', '.join(map(str, legal))}"


def _token_rules(manifest: Manifest, arrays: Arrays) -> Iterator[Rule]:
    """Tokens are of the vocabulary, and their positions count up within a document."""
    if "token_ids" not in arrays:
        return
    yield "token_ids", (arrays["token_ids"] >= manifest.num_classes).any(axis=1), f"ids below {manifest.num_classes}"
    position_ids = arrays["position_ids"].astype(np.int64)
    follows = (position_ids[:, 1:] == 0) | (position_ids[:, 1:] == position_ids[:, :-1] + 1)
    yield "position_ids", (position_ids[:, 0] != 0) | ~follows.all(axis=1), "0 first, then 0 or one more than before"


def _refused_rules(arrays: Arrays) -> Iterator[Rule]:
    """Rows without targets hold NaN in every array of floats, and no ids or counts."""
    for name, values in arrays.items():
        axes = tuple(range(1, values.ndim))
        if values.dtype.kind == "f":
            yield name, ~np.isnan(values).all(axis=axes), "NaN in a row without targets"
        elif name in ("ids", "counts"):
            yield name, (values != 0).any(axis=axes), "0 in a row without targets"


def _distribution_rules(
    manifest: Manifest, arrays: Arrays, head: HeadArrays | None, num_positions: int
) -> Iterator[Rule]:
    """Broken rules of rows with targets, each with which distributions break it, counted from the block's first."""
    is_target_R = np.repeat(arrays["status"] == STATUS_OK, num_positions)
    rows_R = np.flatnonzero(is_target_R)
    flat = _take(flatten_positions(manifest.sequences, arrays), rows_R, len(is_target_R))
    known_R = None
    if manifest.has_hard_targets:
        known_R = flat["hard_target"] >= 0
    elif "position_ids" in arrays:
        known_R = target_mask(arrays["position_ids"]).reshape(-1)[rows_R]
    chunk_R = rows_R // (manifest.chunk_rows * num_positions)
    for name, bad_R, expected in (
        *_target_rules(manifest, flat, known_R),
        *_spot_rules(manifest, flat, chunk_R, head),
    ):
        if bad_R.any():
            yield name, rows_R[bad_R], expected


def _target_rules(manifest: Manifest, arrays: Arrays, known_R: Array | None) -> Iterator[Rule]:
    """What distributions over the classes hold; `known_R` says where there is a hard target, if that can be told."""
    num_classes = manifest.num_classes
    highest = math.log(num_classes) + 2**-10 * (1 + math.log(num_classes))  # it is stored as float16
    yield "max_logit", ~np.isfinite(arrays["max_logit"]), "a finite number"
    yield "lse", ~((arrays["lse"] >= 0) & np.isfinite(arrays["lse"])).all(axis=1), "finite numbers of at least 0"
    entropy_R = arrays["entropy"]
    yield "entropy", ~((entropy_R >= 0) & (entropy_R <= highest)), f"0 to log {num_classes} nats"
    if "hard_target" in arrays:
        target_R = arrays["hard_target"]
        yield "hard_target", (target_R < -1) | (target_R >= num_classes), f"-1 to {num_classes - 1}"
    if "hard_target_logprob" in arrays:
        logprob_R = arrays["hard_target_logprob"]
        known_R = ~np.isnan(logprob_R) if known_R is None else known_R
        bad_R = known_R & ~(logprob_R <= 0)
        yield "hard_target_logprob", bad_R, "at most 0 where the hard target is known"
        if manifest.sequences is not None:
            yield "hard_target_logprob", ~known_R & ~np.isnan(logprob_R), "NaN where the next token is masked"
    if isinstance(manifest.encoding, Sample):
        yield from _sample_rules(manifest, manifest.encoding, arrays)
    elif isinstance(manifest.encoding, Hidden):
        yield "hidden", ~np.isfinite(arrays["hidden"]).all(axis=1), "finite numbers"
    else:
        yield from _value_rules(manifest, arrays)


def _value_rules(manifest: Manifest, arrays: Arrays) -> Iterator[Rule]:
    """What centred logits are, all of them or the kept ones."""
    if "value_range" in arrays:
        range_R = arrays["value_range"]
        yield "value_range", ~((range_R >= 0) & np.isfinite(range_R)), "a finite number of at least 0"
    if isinstance(manifest.encoding, TopK):
        yield from _topk_rules(manifest, arrays)
    else:
        top_R = ordered(arrays["values"]).min(axis=1)
        yield "values", _top_value(arrays["values"], top_R) != 0, "0 as the largest value"
    if arrays["values"].dtype.kind == "f":
        yield "values", ~(arrays["values"] <= 0).all(axis=1), "numbers of at most 0 or -inf"
    for column, temperature in enumerate(manifest.temperatures):
        yield "values", _wrong_mass(manifest, arrays, column), f"probabilities that sum to one at T = {temperature:g}"


def ordered(values_RK: Array) -> Array:
    """Stored values as unsigned integers, whose order is the reverse of theirs: 0 is the largest value.

    A number that is not above 0 has its sign bit set, or is +0: the further down it is, the larger its bits. Integers
    of any size are compared much quicker than halves.
    """
    if values_RK.dtype == np.uint8:
        return values_RK
    return values_RK.view(f"u{values_RK.dtype.itemsize}")


def _top_value(values_RK: Array, top_R: Array) -> Array:
    return top_R if values_RK.dtype == np.uint8 else top_R.view(values_RK.dtype)


def _topk_rules(manifest: Manifest, arrays: Arrays) -> Iterator[Rule]:
    ids_RK, values_RK = arrays["ids"], arrays["values"]
    yield "ids", (ids_RK >= manifest.num_classes).any(axis=1), f"ids below {manifest.num_classes}"
    sorted_RK = np.sort(ids_RK, axis=1)
    yield "ids", (sorted_RK[:, 1:] == sorted_RK[:, :-1]).any(axis=1), "every id once"
    yield "values", values_RK[:, 0] != 0, "0 as the first value"
    upward_RK = values_RK if values_RK.dtype == np.uint8 else -values_RK
    yield "values", ~(upward_RK[:, 1:] >= upward_RK[:, :-1]).all(axis=1), "values sorted downward"
    yield "log_tail", ~(arrays["log_tail"] <= ROUNDING).all(axis=1), "numbers of at most 0 or -inf"


def _sample_rules(manifest: Manifest, encoding: Sample, arrays: Arrays) -> Iterator[Rule]:
    ids_RD, counts_RD = arrays["ids"], arrays["counts"]
    drawn_RD = counts_RD > 0
    yield "ids", (ids_RD >= manifest.num_classes).any(axis=1), f"ids below {manifest.num_classes}"
    yield "counts", counts_RD.sum(axis=1, dtype=np.int64) != encoding.draws, f"counts that sum to {encoding.draws}"
    yield "counts", (drawn_RD[:, 1:] & ~drawn_RD[:, :-1]).any(axis=1), "no count behind a count of 0"
    upward_RD = (ids_RD[:, 1:] > ids_RD[:, :-1]) | ~drawn_RD[:, 1:]
    yield "ids", ~upward_RD.all(axis=1), "ids in ascending order, each once"
    yield "ids", ((ids_RD != 0) & ~drawn_RD).any(axis=1), "id 0 where the count is 0"


def _spot_rules(manifest: Manifest, arrays: Arrays, chunk_R: Array, head: HeadArrays | None) -> Iterator[Rule]:
    """The first and the last distribution of each chunk, computed anew from its hidden state."""
    encoding = manifest.encoding
    if not isinstance(encoding, Hidden) or head is None or not len(chunk_R):
        return
    first = np.flatnonzero(np.diff(chunk_R, prepend=-1))
    spots = np.unique(np.concatenate([first, np.append(first[1:], len(chunk_R)) - 1]))
    hidden_SW, stored_S = arrays["hidden"][spots], arrays["max_logit"][spots].astype(np.float64)
    max_S, lse_ST = max_and_lse(encoding, head, hidden_SW, manifest.temperatures)
    bound_S = logit_bound(encoding, head, hidden_SW, manifest.teacher) + ROUNDING + 2**-23 * abs(stored_S)
    wrong_R = np.zeros(len(chunk_R), bool)
    wrong_R[spots] = ~(abs(max_S - stored_S) <= bound_S)
    yield "hidden", wrong_R, "hidden states from which the head computes the stored max_logit"
    for column, temperature in enumerate(manifest.temperatures):
        # log sum exp(z / T) moves by no more than the largest of the z / T
        offset_S = lse_ST[:, column] + max_S / temperature
        offset_S = offset_S - arrays["lse"][spots, column] - stored_S / temperature
        wrong_R = np.zeros(len(chunk_R), bool)
        wrong_R[spots] = ~(abs(offset_S) <= bound_S / temperature + ROUNDING)
        yield "hidden", wrong_R, f"hidden states from which the head computes the stored lse at T = {temperature:g}"


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
    save for -inf, which is read as -R. What a store was transcoded from adds its own: a tail may have taken it over.
    """
    before = {origin["encoding"].get("values") for origin in manifest.lineage or ()}
    float16_bound = 2**-10 * math.log(manifest.num_classes) + 2**-24 / temperature
    if rows["values"].dtype == np.uint8:
        range_N = rows["value_range"].astype(np.float64) / temperature
        num_lowest_N = manifest.num_classes if "uint8" in before else (rows["values"] == 255).sum(axis=1)
        bound: Array = ROUNDING + range_N / 510 + np.log1p(num_lowest_N * np.exp(-range_N))
        return bound + float16_bound if "float16" in before else bound
    return ROUNDING + float16_bound if rows["values"].dtype == np.float16 else ROUNDING
