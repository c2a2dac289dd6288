"""Distributions of two stores: their top-1 classes, and how far one is from the other.

Legend: R distributions, C classes, K kept entries, E entries of two stores, one after the other.
"""

from typing import Any

import numpy as np

from storage.arrays import Array, Arrays
from storage.encodings import Encoding, HeadArrays, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.manifest import Manifest
from storage.scan.difference_plan import Plan
from storage.scan.recompute import top1_classes


def width_of(manifest: Manifest) -> int:
    """Numbers of a distribution."""
    encoding = manifest.encoding
    if isinstance(encoding, TopK):
        return encoding.k
    return encoding.num_places(manifest.num_classes) if isinstance(encoding, Sample) else manifest.num_classes


def top1_of(encoding: Encoding, flat: Arrays, head: HeadArrays | None) -> Array:
    """The top-1 class of each distribution, the lowest of equal ones, int64 (R,)."""
    if isinstance(encoding, TopK):
        return flat["ids"][:, 0].astype(np.int64)
    if isinstance(encoding, Sample):
        most_R = flat["counts"].argmax(axis=1)
        return np.take_along_axis(flat["ids"], most_R[:, None], axis=1)[:, 0].astype(np.int64)
    if isinstance(encoding, Hidden):
        assert head is not None
        return top1_classes(encoding, head, flat["hidden"])
    top1_R: Array = loaded_values(flat).argmax(axis=1)
    return top1_R


def divergence_of(plan: Plan, parts: list[dict[str, Array]]) -> Array:
    """KL of the first store's distributions to the second's, nats, float64 (R,); see `Divergence`."""
    logprobs = [
        _logprobs(manifest, part, head, plan.temperature)
        for manifest, part, head in zip((plan.first, plan.second), parts, plan.heads, strict=True)
    ]
    if plan.kind == "full":
        return _kl(*logprobs)
    ids = [
        part.get("ids") if isinstance(it.encoding, TopK) else None
        for it, part in zip((plan.first, plan.second), parts, strict=True)
    ]
    if ids[0] is not None and ids[1] is not None:
        return _kl(*_shared_buckets(ids[0], ids[1], logprobs))
    known = ids[0] if ids[0] is not None else ids[1]
    assert known is not None
    return _kl(*[_gathered(known, it) if ids[index] is None else it for index, it in enumerate(logprobs)])


def _logprobs(manifest: Manifest, flat: Arrays, head: HeadArrays | None, temperature: float) -> Array:
    encoding = manifest.encoding
    options: dict[str, Any] = {"head": head} if isinstance(encoding, Hidden) else {}
    return encoding.logprobs(flat, temperature, manifest.temperatures, **options).astype(np.float64)


def _kl(one: Array, two: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        terms = np.where(np.isneginf(one), 0.0, np.exp(one) * (one - two))
    total_R: Array = terms.sum(axis=1)
    return total_R


def _gathered(ids_RK: Array, logprobs_RC: Array) -> Array:
    """All classes as some of them and one bucket of all others."""
    ids_RK = ids_RK.astype(np.int64)
    probs_RC = np.exp(logprobs_RC)
    np.put_along_axis(probs_RC, ids_RK, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        rest_R1 = np.log(probs_RC.sum(axis=1, keepdims=True))
    return np.concatenate([np.take_along_axis(logprobs_RC, ids_RK, axis=1), rest_R1], axis=1)


def _shared_buckets(one_ids: Array, two_ids: Array, logprobs: list[Array]) -> tuple[Array, Array]:
    """Two topk rows as the classes that both keep (-inf in the place of others), and one bucket of all others."""
    ids_RE = np.concatenate([one_ids.astype(np.int64), two_ids.astype(np.int64)], axis=1)
    order_RE = np.argsort(ids_RE, axis=1, kind="stable")  # the first store's entry before the second's of one class
    ids_RE = np.take_along_axis(ids_RE, order_RE, axis=1)
    is_pair_RE = np.zeros(ids_RE.shape, bool)
    is_pair_RE[:, :-1] = ids_RE[:, :-1] == ids_RE[:, 1:]
    is_second_RE = np.roll(is_pair_RE, 1, axis=1)
    sorted_RE = np.take_along_axis(np.concatenate([it[:, :-1] for it in logprobs], axis=1), order_RE, axis=1)
    one_RE = np.where(is_pair_RE, sorted_RE, -np.inf)
    two_RE = np.where(is_pair_RE, np.roll(sorted_RE, -1, axis=1), -np.inf)
    is_left_RE = ~is_pair_RE & ~is_second_RE
    buckets = []
    for index, own_RE in enumerate((one_RE, two_RE)):
        is_own_RE = is_left_RE & ((order_RE >= one_ids.shape[1]) == bool(index))
        with np.errstate(divide="ignore"):
            mass_R = np.where(is_own_RE, np.exp(sorted_RE), 0.0).sum(axis=1) + np.exp(logprobs[index][:, -1])
            buckets.append(np.concatenate([own_RE, np.log(mass_R)[:, None]], axis=1))
    return buckets[0], buckets[1]
