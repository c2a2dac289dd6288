"""Statistics that every encoding keeps, and the quantisation that two of them share.

Legend: N rows, C classes, T temperatures. Source: the formulas are in `storage/FORMAT.md`, "Statistics".
"""

from collections.abc import Sequence

import numpy as np

from storage.arrays import Array

FLOAT16_LOWEST = -65504.0


def centred(logits_NC: Array) -> tuple[Array, Array]:
    """Logits less their row's maximum, float32 (N, C), and the maximum, float32 (N,)."""
    logits_NC = np.asarray(logits_NC, np.float32)
    max_logit_N = logits_NC.max(axis=1)
    return logits_NC - max_logit_N[:, None], max_logit_N


def logsumexp(values_NC: Array) -> Array:
    """Log of the summed exp over the last axis, in float64; -inf for a row of -inf or no columns."""
    values_NC = np.asarray(values_NC, np.float64)
    with np.errstate(divide="ignore"):
        if values_NC.shape[-1] == 0:
            return np.full(values_NC.shape[:-1], -np.inf)
        top = values_NC.max(axis=-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        total: Array = np.log(np.exp(values_NC - top).sum(axis=-1)) + top[..., 0]
    return total


def lse(values_NC: Array, temperatures: Sequence[float]) -> Array:
    """Log of the summed exp of centred logits over each temperature, float32 (N, T), at least 0."""
    columns = [logsumexp(np.asarray(values_NC, np.float64) / temperature) for temperature in temperatures]
    return np.stack(columns, axis=1).astype(np.float32)


def entropy(values_NC: Array) -> Array:
    """Entropy at T = 1 of centred logits, nats, float16 (N,)."""
    values_NC = np.asarray(values_NC, np.float64)
    logprobs = values_NC - logsumexp(values_NC)[:, None]
    probs = np.exp(logprobs)
    total_N: Array = -(probs * np.where(probs > 0, logprobs, 0.0)).sum(axis=1)
    return total_N.astype(np.float16)


def statistics(logits_NC: Array, temperatures: Sequence[float]) -> dict[str, Array]:
    """`max_logit`, `lse` and `entropy` of finite logits."""
    values_NC, max_logit_N = centred(logits_NC)
    return {
        "max_logit": max_logit_N,
        "lse": lse(values_NC, temperatures),
        "entropy": entropy(values_NC),
    }


def to_float16(values: Array) -> Array:
    """Float16 of centred logits: finite values below its range become its lowest value, -inf stays."""
    return np.where(np.isneginf(values), values, np.maximum(values, FLOAT16_LOWEST)).astype(np.float16)


def quantise(values_NK: Array) -> dict[str, Array]:
    """Centred values as uint8 `values` and the range R of each row as `value_range`.

    R = -min of the row's finite values; q = round(-255 v / R), 255 for -inf, 0 where R = 0.
    """
    values_NK = np.asarray(values_NK, np.float32)
    range_N = -np.where(np.isneginf(values_NK), np.float32(0), values_NK).min(axis=1)
    clipped = np.maximum(values_NK, -range_N[:, None])
    safe = np.where(range_N > 0, range_N, np.float32(1))
    quantised = np.rint(clipped * np.float32(-255) / safe[:, None])
    return {
        "values": quantised.astype(np.uint8),
        "value_range": range_N.astype(np.float32),
    }


def dequantise(quantised_NK: Array, value_range_N: Array) -> Array:
    """Centred float32 values of `quantise`d ones: v = -q R / 255."""
    return quantised_NK.astype(np.float32) * (value_range_N[:, None] / np.float32(-255))
