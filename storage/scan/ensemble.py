"""What several teachers say together, from what each one's store holds: arithmetic on flat rows, without I/O.

Legend: R distributions, C classes, M members, K kept entries, E entries of all members one after the other, D places
for drawn ids, T temperatures.

The ensemble is the one that a dump of several models makes. mean-probs: z = log of the mean of the members' softmax at
T = 1; at another temperature its probabilities are softmax(z / T), which is not the mean of the members' there.
mean-logits: z = the mean of their logits. All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from storage.arrays import Array, Arrays, smallest_uint
from storage.encodings.dense import loaded_values, stored_values
from storage.encodings.statistics import logsumexp, to_float16
from storage.encodings.values import ValueType

Combine = Literal["mean-probs", "mean-logits"]

HALF = (2.0**-11, 2.0**-25)  # what float16 moves a number by: a share of it, and this much where it is small
ROUNDING = 1e-9  # of a probability: less than a stored float32 can tell


def mean_logits(parts: Sequence[Arrays], combine: Combine) -> Array:
    """The ensemble's logits, float32 (R, C), from dense members' `values` (and `value_range`) and `max_logit`.

    Where every class of a row is -inf for one member or another, mean-logits leaves none: such a row is all -inf.
    """
    if combine == "mean-logits":
        total_RC = sum(loaded_values(part).astype(np.float64) + part["max_logit"][:, None] for part in parts)
        return np.asarray(total_RC / len(parts), np.float32)
    logprobs = []
    for part in parts:
        values_RC = loaded_values(part).astype(np.float64)
        values_RC -= logsumexp(values_RC)[:, None]
        logprobs.append(values_RC)
    top_RC = np.maximum.reduce(logprobs)
    top_RC[np.isneginf(top_RC)] = 0.0
    with np.errstate(divide="ignore", under="ignore"):
        summed_RC = sum(np.exp(values_RC - top_RC) for values_RC in logprobs)
        return np.asarray(np.log(summed_RC / len(parts)) + top_RC, np.float32)


def target_logprobs(logits_RC: Array, target_R: Array) -> Array:
    """Log-probability at T = 1 of the true classes, float16 (R,); NaN where they are -1."""
    values_RC = logits_RC.astype(np.float64)
    known_R = np.take_along_axis(values_RC, np.maximum(target_R, 0).astype(np.int64)[:, None], axis=1)[:, 0]
    return to_float16(np.where(target_R < 0, np.nan, np.minimum(known_R - logsumexp(values_RC), 0)))


def mean_target_logprobs(parts: Sequence[Arrays], combine: Combine, logits_RC: Array | None = None) -> Array:
    """The same, float16 (R,), from what each member says of its true class, where that class is not known here.

    Args:
        parts: members' `hard_target_logprob`; for mean-logits `max_logit` and the `values` of all classes too.
        combine: how they speak together.
        logits_RC: of the ensemble; for mean-logits.
    """
    logprobs_MR = np.stack([part["hard_target_logprob"].astype(np.float64) for part in parts])
    if combine == "mean-probs":
        return to_float16(np.minimum(logsumexp(logprobs_MR.T) - np.log(len(parts)), 0))
    assert logits_RC is not None
    lse_MR = [logsumexp(loaded_values(part)) + part["max_logit"] for part in parts]
    found_R = (logprobs_MR + np.stack(lse_MR)).mean(axis=0) - logsumexp(logits_RC)
    return to_float16(np.minimum(found_R, 0))


@dataclass(frozen=True)
class Known:
    """What is known of the mean of topk members' distributions at T = 1, entry by entry, the likeliest first.

    A member that keeps a class knows its probability; of one that it does not keep it knows no more than that it is at
    most its smallest kept one, and at most its tail. So the mean is known of a class that every member keeps; of
    another one it lies between `probs` and `probs` + `unknown`.

    Attributes:
        ids_RE: classes; behind the last one that a member keeps, entries of probability -1.
        probs_RE: what the members that keep the class give it, over M: downward, equal ones by ascending class.
        unknown_RE: what the others may add at most.
        unseen_R: what a class that no member keeps may have at most; 0 where there is none.
        tail_R: the mean of the members' tails: with `probs` it sums to one.
        entropy_R: of the mean, nats, in the middle of what it may be.
        entropy_within_R: how far it may be from that.
    """

    ids_RE: Array  # noqa: N815
    probs_RE: Array  # noqa: N815
    unknown_RE: Array  # noqa: N815
    unseen_R: Array  # noqa: N815
    tail_R: Array  # noqa: N815
    entropy_R: Array  # noqa: N815
    entropy_within_R: Array  # noqa: N815

    def off_by(self, most: int) -> Array:
        """How far a row may be off where its first 1, 2, .. `most` entries are kept, as probabilities (R, most).

        It is 0 where each of them is known, and surely above every class behind them. Else no kept probability is
        further off, and no class that is left out is likelier than the least kept one by more.
        """
        kept_RK = np.maximum.accumulate(self.unknown_RE[:, :most], axis=1)
        most_RE = np.where(self.probs_RE < 0, 0.0, self.probs_RE + self.unknown_RE)
        behind_RE = np.maximum.accumulate(most_RE[:, ::-1], axis=1)[:, ::-1]
        behind_RE = np.concatenate([behind_RE[:, 1:], np.zeros((len(behind_RE), 1))], axis=1)[:, :most]
        above_RK = np.maximum(behind_RE, self.unseen_R[:, None]) - self.probs_RE[:, :most]
        above_RK[above_RK <= ROUNDING * self.probs_RE[:, :most]] = 0.0
        off_RK: Array = np.maximum(kept_RK, above_RK)
        return off_RK

    def arrays(self, k: int, values: ValueType, num_classes: int) -> dict[str, Array]:
        """The arrays of a topk store that keeps the first `k`, at the one temperature 1; all else is in its tail."""
        probs_RE = np.maximum(self.probs_RE, 0.0)
        with np.errstate(divide="ignore"):
            logprobs_RK = np.log(probs_RE[:, :k])
            log_tail_R = np.log(self.tail_R + probs_RE[:, k:].sum(axis=1))
        max_logit_R = logprobs_RK[:, 0].astype(np.float32)
        return stored_values((logprobs_RK - logprobs_RK[:, :1]).astype(np.float32), values) | {
            "ids": self.ids_RE[:, :k].astype(smallest_uint(num_classes - 1)),
            "max_logit": max_logit_R,
            "lse": np.maximum(-max_logit_R, 0)[:, None],
            "log_tail": np.minimum(log_tail_R, 0)[:, None].astype(np.float32),
            "entropy": self.entropy_R.astype(np.float16),
        }


def known_entries(parts: Sequence[Arrays], columns: Sequence[int], num_classes: int) -> Known:
    """What is known of the mean of topk members' distributions at T = 1.

    Args:
        parts: members' `ids`, `values` (and `value_range`), `lse`, `log_tail` and `entropy`.
        columns: which column of `lse` and `log_tail` is T = 1, for each member.
        num_classes: of all classes.
    """
    num_members = len(parts)
    ids, probs, tails, most = [], [], [], []
    for part, column in zip(parts, columns, strict=True):
        probs_RK, tail_R = _buckets(part, column)
        ids.append(part["ids"].astype(np.int64))
        probs.append(probs_RK)
        tails.append(tail_R)
        most.append(np.minimum(probs_RK[:, -1], tail_R))
    member_E = np.repeat(np.arange(num_members), [values.shape[1] for values in ids])
    by_id_RE = np.argsort(np.concatenate(ids, axis=1), axis=1, kind="stable")
    ids_RE = np.take_along_axis(np.concatenate(ids, axis=1), by_id_RE, axis=1)
    probs_RE = np.take_along_axis(np.concatenate(probs, axis=1), by_id_RE, axis=1)
    tails_MR, most_MR = np.stack(tails), np.stack(most)
    member_RE = member_E[by_id_RE]
    most_RE = most_MR.T[np.arange(len(ids_RE))[:, None], member_RE]
    count_RE = _over_run(ids_RE, np.ones_like(probs_RE), num_members)
    is_first_RE = np.ones(ids_RE.shape, bool)
    is_first_RE[:, 1:] = ids_RE[:, 1:] != ids_RE[:, :-1]
    is_shared_RE = count_RE == num_members
    mean_RE = _over_run(ids_RE, probs_RE, num_members) / num_members
    unknown_RE = np.maximum(most_MR.sum(axis=0)[:, None] - _over_run(ids_RE, most_RE, num_members), 0) / num_members
    unknown_RE[is_shared_RE | (unknown_RE <= ROUNDING * most_MR.max(axis=0)[:, None])] = 0.0
    low_R, high_R = _entropy_by_member(parts, probs_RE, mean_RE, member_RE, is_shared_RE, is_first_RE, tails_MR)
    mean_RE[~is_first_RE] = -1.0
    unknown_RE[~is_first_RE] = 0.0
    downward_RE = np.argsort(-mean_RE, axis=1, kind="stable")  # by id before: equal ones stay so
    unseen_R = np.where(is_first_RE.sum(axis=1) < num_classes, most_MR.mean(axis=0), 0.0)
    tail_R = tails_MR.mean(axis=0)
    by_class = _entropy_by_class(mean_RE, unknown_RE, unseen_R, tail_R, num_classes - is_first_RE.sum(axis=1))
    high_R = np.minimum(np.minimum(high_R, by_class[1]), np.log(num_classes))
    low_R = np.minimum(np.maximum(low_R, by_class[0]), high_R)
    return Known(
        ids_RE=np.take_along_axis(ids_RE, downward_RE, axis=1),
        probs_RE=np.take_along_axis(mean_RE, downward_RE, axis=1),
        unknown_RE=np.take_along_axis(unknown_RE, downward_RE, axis=1),
        unseen_R=unseen_R,
        tail_R=tail_R,
        entropy_R=(low_R + high_R) / 2,
        entropy_within_R=(high_R - low_R) / 2,
    )


def _buckets(part: Arrays, column: int) -> tuple[Array, Array]:
    """A topk member's kept probabilities (R, K) and its tail (R,), which sum to one, as `TopK.logprobs` has them."""
    scaled_RK = loaded_values(part).astype(np.float64) - part["lse"][:, column, None]
    log_tail_R = part["log_tail"][:, column].astype(np.float64)
    total_R = logsumexp(np.concatenate([scaled_RK, log_tail_R[:, None]], axis=1))
    return np.exp(scaled_RK - total_R[:, None]), np.exp(log_tail_R - total_R)


def _over_run(ids_RE: Array, values_RE: Array, num_members: int) -> Array:
    """Sum of the values whose ids are equal, at each of them; the ids ascend, and one comes at most M times."""
    total_RE: Array = values_RE.copy()
    none = values_RE.dtype.type(0)
    for distance in range(1, num_members):
        same = ids_RE[:, distance:] == ids_RE[:, :-distance]
        total_RE[:, :-distance] += np.where(same, values_RE[:, distance:], none)
        total_RE[:, distance:] += np.where(same, values_RE[:, :-distance], none)
    return total_RE


def _entropy_by_member(
    parts: Sequence[Arrays],
    probs_RE: Array,
    mean_RE: Array,
    member_RE: Array,
    is_shared_RE: Array,
    is_first_RE: Array,
    tails_MR: Array,
) -> tuple[Array, Array]:
    """The least and the most that the entropy of the mean may be, nats (R,), from the members' own, which are known.

    H(mean) = mean of H, stored as float16, + JSD. The JSD over the classes that all members keep and one bucket of all
    others is known, and no more than the true one; inside the bucket, where the members' masses are w, there is at most
    sum w_m log(sum w / w_m) / M more (the chain rule, and that JSD is at most the entropy of the weights).
    """
    num_members = len(parts)
    mean_H_R = np.mean([part["entropy"].astype(np.float64) for part in parts], axis=0)
    others_RE = np.where(is_shared_RE, 0.0, probs_RE)
    mass_MR = tails_MR + np.stack([np.where(member_RE == m, others_RE, 0.0).sum(axis=1) for m in range(num_members)])
    total_R = mass_MR.sum(axis=0)
    shared_R = _surprise(np.where(is_shared_RE, probs_RE, 0.0)).sum(axis=1) / num_members
    together_R = _surprise(np.where(is_shared_RE & is_first_RE, mean_RE, 0.0)).sum(axis=1)
    jsd_R = together_R - shared_R + _surprise(total_R / num_members) - _surprise(mass_MR).mean(axis=0)
    inside_R = (_surprise(mass_MR).sum(axis=0) - _surprise(total_R)) / num_members
    middle_R, rounding_R = mean_H_R + np.maximum(jsd_R, 0), mean_H_R * HALF[0] + HALF[1]
    return middle_R - rounding_R, middle_R + np.maximum(inside_R, 0) + rounding_R


def _entropy_by_class(
    mean_RE: Array, unknown_RE: Array, unseen_R: Array, tail_R: Array, num_unseen_R: Array
) -> tuple[Array, Array]:
    """The same, class by class: each probability x adds -x log x, which rises up to 1 / e and falls behind it.

    The classes that nobody keeps share what is left of the tail, none of them with more than `unseen`: at least
    -log unseen for each unit of it, at most as if they were all alike.
    """
    least_RE = np.maximum(mean_RE, 0.0)
    most_RE = np.minimum(least_RE + unknown_RE, 1.0)
    ends = _surprise(least_RE), _surprise(most_RE)
    peak_RE = np.where((least_RE < np.exp(-1)) & (most_RE > np.exp(-1)), np.exp(-1), np.maximum(*ends))
    left_R = np.maximum(tail_R - unknown_RE.sum(axis=1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        least_R = np.where(left_R > 0, -left_R * np.log(unseen_R), 0.0)
        alike_R = np.minimum(tail_R, num_unseen_R * np.exp(-1))
        most_R = np.where((alike_R > 0) & (num_unseen_R > 0), alike_R * np.log(num_unseen_R / alike_R), 0.0)
    low_R = np.minimum(*ends).sum(axis=1) + np.where(num_unseen_R > 0, np.maximum(least_R, 0.0), 0.0)
    high_R: Array = peak_RE.sum(axis=1) + most_R
    return low_R, high_R


def _surprise(values: Array) -> Array:
    """-x log x, 0 at 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(values > 0, -values * np.log(values), 0.0)
    return found


def joined_draws(parts: Sequence[Arrays], draws: int, num_classes: int, places: int) -> dict[str, Array]:
    """All members' draws as one store's, with statistics at T = 1 as far as they are known.

    Args:
        parts: members' `ids`, `counts`, `lse` and `entropy`.
        draws: of each member, the same number.
        num_classes: of all classes.
        places: for distinct ids.

    The largest probability lies between the largest member's over M and the mean of theirs, and within 1 / draws of the
    share of what came up most often; `max_logit` is in the middle, and `lse` what it must be then. The entropy lies
    between the mean of the members' and log M above that.
    """
    num_members = len(parts)
    counts_RE = np.concatenate([part["counts"] for part in parts], axis=1).astype(np.int64)
    ids_RE = np.concatenate([part["ids"] for part in parts], axis=1).astype(np.int64)
    ids_RE[counts_RE == 0] = num_classes
    by_id_RE = np.argsort(ids_RE, axis=1, kind="stable")
    ids_RE, counts_RE = (np.take_along_axis(values, by_id_RE, axis=1) for values in (ids_RE, counts_RE))
    summed_RE = _over_run(np.where(counts_RE == 0, -1 - np.arange(ids_RE.shape[1]), ids_RE), counts_RE, num_members)
    is_gone_RE = counts_RE == 0
    is_gone_RE[:, 1:] |= ids_RE[:, 1:] == ids_RE[:, :-1]
    order_RD = np.argsort(is_gone_RE, axis=1, kind="stable")[:, :places]
    is_there_RD = ~np.take_along_axis(is_gone_RE, order_RD, axis=1)
    counts_RD = np.where(is_there_RD, np.take_along_axis(summed_RE, order_RD, axis=1), 0)
    ids_RD = np.where(is_there_RD, np.take_along_axis(ids_RE, order_RD, axis=1), 0)
    tops_MR = np.exp(-np.stack([part["lse"][:, 0].astype(np.float64) for part in parts]))
    share_R = counts_RD.max(axis=1) / (draws * num_members)
    low_R = np.maximum(tops_MR.max(axis=0) / num_members, share_R - 1 / draws)
    high_R = np.maximum(np.minimum(tops_MR.mean(axis=0), share_R + 1 / draws), low_R)
    lse_R = np.maximum(-(np.log(low_R) + np.log(high_R)) / 2, 0).astype(np.float32)
    entropy_R = np.mean([part["entropy"].astype(np.float64) for part in parts], axis=0) + np.log(num_members) / 2
    return {
        "ids": ids_RD.astype(smallest_uint(num_classes - 1)),
        "counts": counts_RD.astype(np.uint8),
        "max_logit": -lse_R,
        "lse": lse_R[:, None],
        "entropy": np.minimum(entropy_R, np.log(num_classes)).astype(np.float16),
    }
