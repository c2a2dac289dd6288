"""What hidden states say, recomputed from the store's head, some rows and classes at a time.

Legend: R distributions, C classes, B classes of a block, W width of the hidden state, T temperatures.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from storage.arrays import Array
from storage.encodings import HeadArrays, Hidden

BLOCK_ROWS = 512
BLOCK_VALUES = 1 << 21  # of the head as float32, and of the logits: some of these fit the cache or are near it
FLOAT32_UNIT = 2.0**-24  # largest relative error of one rounding
UNITS = {"fp32": FLOAT32_UNIT, "fp16": 2.0**-11, "bf16": 2.0**-8}  # by the teacher's precision
FLOAT16_SPACING = 2.0**-25  # largest error of a float16 below 2^-14


def logit_blocks(encoding: Hidden, head: HeadArrays, hidden_RW: Array) -> Iterator[tuple[int, Array]]:
    """The logits of some classes after the other: the first class of a block, and its logits (R, B), float32."""
    num_classes, width = head.weight_CW.shape
    step = max(1, BLOCK_VALUES // max(width, len(hidden_RW)))
    for first in range(0, num_classes, step):
        bias_B = None if head.bias_C is None else head.bias_C[first : first + step]
        block = HeadArrays(head.weight_CW[first : first + step], bias_B)
        yield first, encoding.logits({"hidden": hidden_RW}, block)


def top1_classes(encoding: Hidden, head: HeadArrays, hidden_RW: Array) -> Array:
    """The class of the largest logit, the lowest of equal ones, int64 (R,)."""
    found_R = np.zeros(len(hidden_RW), np.int64)
    for start in range(0, len(hidden_RW), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        best_R = np.full(len(hidden_RW[rows]), -np.inf, np.float32)
        for first, logits_RB in logit_blocks(encoding, head, hidden_RW[rows]):
            place_R = logits_RB.argmax(axis=1)
            value_R = np.take_along_axis(logits_RB, place_R[:, None], axis=1)[:, 0]
            is_better_R = value_R > best_R
            found_R[rows][is_better_R] = place_R[is_better_R] + first
            best_R = np.maximum(best_R, value_R)
    return found_R


def top1_and_lse(encoding: Hidden, head: HeadArrays, hidden_RW: Array) -> tuple[Array, Array, Array]:
    """What `top1_classes` gives, the largest logit, and the lse of the centred ones at T = 1, in one product.

    Returns:
        int64 (R,), float64 (R,) and float64 (R,).
    """
    top1_R = np.zeros(len(hidden_RW), np.int64)
    max_R, sum_R = np.full(len(hidden_RW), -np.inf), np.zeros(len(hidden_RW))
    for first, logits_RB in logit_blocks(encoding, head, hidden_RW):
        place_R = logits_RB.argmax(axis=1)
        value_R = np.take_along_axis(logits_RB, place_R[:, None], axis=1)[:, 0]
        is_better_R = value_R > max_R
        top1_R[is_better_R] = place_R[is_better_R] + first
        higher_R = np.maximum(max_R, value_R)
        sum_R *= np.exp(max_R - higher_R)
        sum_R += np.exp(logits_RB - higher_R.astype(np.float32)[:, None]).sum(axis=1)
        max_R = higher_R
    return top1_R, max_R, np.log(sum_R)


def max_and_lse(
    encoding: Hidden, head: HeadArrays, hidden_RW: Array, temperatures: Sequence[float]
) -> tuple[Array, Array]:
    """The largest logit, float64 (R,), and the lse of the centred ones at each temperature, float64 (R, T)."""
    max_R = np.full(len(hidden_RW), -np.inf)
    sums_RT = np.zeros((len(hidden_RW), len(temperatures)))
    temperatures_T = np.asarray(temperatures, np.float64)
    for _, logits_RB in logit_blocks(encoding, head, hidden_RW):
        higher_R = np.maximum(max_R, logits_RB.max(axis=1))
        sums_RT *= np.exp((max_R - higher_R)[:, None] / temperatures_T)
        centred_RB = logits_RB - higher_R[:, None]
        for column, temperature in enumerate(temperatures):
            sums_RT[:, column] += np.exp(centred_RB / temperature).sum(axis=1)
        max_R = higher_R
    return max_R, np.log(sums_RT)


def logit_bound(encoding: Hidden, head: HeadArrays, hidden_RW: Array, teacher: Mapping[str, Any]) -> Array:
    """How far a recomputed logit may be from the teacher's, at most, float64 (R,).

    A logit is scale (sum_j w_j h_j + b). Storing h and w as float16 moves each by 2^-11 of itself, or by 2^-25; two
    sums of W products in float32 round by 2^-24 a term; the teacher itself rounded h, w and the sum to its precision,
    and so each step of scale and soft cap. All of that is relative to sum_j |w_j| |h_j| + |b| <= |w| |h| + |b|
    (Cauchy-Schwarz). A soft cap is no steeper than 1, so it makes no error larger.
    """
    width = encoding.width
    steps = 3 + (encoding.scale != 1) + (0 if encoding.soft_cap is None else 3)
    stored = (_unit(hidden_RW), _unit(head.weight_CW))
    unit = sum(stored) + steps * UNITS.get(str(teacher.get("precision")), UNITS["bf16"])
    unit += 2 * (width + steps) * FLOAT32_UNIT
    weight = _largest_norm(head.weight_CW)
    bias = 0.0 if head.bias_C is None else float(abs(head.bias_C.astype(np.float64)).max())
    hidden_R = np.linalg.norm(hidden_RW.astype(np.float64), axis=1)
    bound_R: Array = unit * (weight * hidden_R + bias)
    if max(stored) > FLOAT32_UNIT:
        bound_R = bound_R + FLOAT16_SPACING * (math.sqrt(width) * (weight + hidden_R) + 1)
    return abs(encoding.scale) * bound_R


def _unit(values: Array) -> float:
    return 2.0**-11 if values.dtype == np.float16 else FLOAT32_UNIT


def _largest_norm(weight_CW: Array) -> float:
    """The largest Euclidean norm of a class's weights, a few classes at a time."""
    step = max(1, BLOCK_VALUES // weight_CW.shape[1])
    parts = (weight_CW[first : first + step].astype(np.float32) for first in range(0, len(weight_CW), step))
    return max(float(np.linalg.norm(part, axis=1).max()) for part in parts)
