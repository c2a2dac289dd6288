"""The first pass of combining stores: that they are of the same samples, and what topk stores know together.

Legend: R distributions, K kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from storage.arrays import Array
from storage.encodings import Encoding, TopK
from storage.errors import MismatchError
from storage.layout import Layout
from storage.scan.combined_rows import MemberRows, has_targets, known_parts
from storage.scan.members import Member, bounds_of, check_same_samples
from storage.scan.passes import BLOCK_BYTES, Progress

SAMPLES = ("status", "sample_digest", "hard_target")
LEAST = 1e-300  # a probability that is divided by
KEPT = ("ids", "values", "value_range", "lse", "log_tail", "entropy")


@dataclass(frozen=True)
class Survey:
    """What is known of the rows of topk stores together; of other stores, nothing has to be found out.

    Attributes:
        off_K: how far the worst row is off with 1, 2, .. K kept entries, as a probability.
        worst_K: that row; -1 where none is off.
        entropy_within: how far the entropy of the worst row is off, nats.
        max_logit_within: how far its largest logit is.
    """

    off_K: Array  # noqa: N815
    worst_K: Array  # noqa: N815
    entropy_within: float = 0.0
    max_logit_within: float = 0.0

    def merge(self, later: "Survey") -> "Survey":
        """What is known of both."""
        is_worse_K = later.off_K > self.off_K
        return Survey(
            np.where(is_worse_K, later.off_K, self.off_K),
            np.where(is_worse_K, later.worst_K, self.worst_K),
            max(self.entropy_within, later.entropy_within),
            max(self.max_logit_within, later.max_logit_within),
        )


def survey_shard(
    members: Sequence[Member], layout: Layout, shard: int, encoding: Encoding, advance: Progress
) -> Survey:
    """The survey of a shard.

    Args:
        members: the stores.
        layout: of the new store.
        shard: of that layout.
        encoding: of the new store; of topk, with as many entries as could be kept.
        advance: told of the rows.

    Raises:
        CorpusMismatchError: a row is not of the same sample in all stores, or has another hard target.
    """
    is_topk = isinstance(encoding, TopK)
    most = encoding.k if isinstance(encoding, TopK) else 0
    found = Survey(np.zeros(most), np.full(most, -1, np.int64))
    names = [
        [spec.name for spec in member.manifest.arrays if spec.name in SAMPLES or (is_topk and spec.name in KEPT)]
        for member in members
    ]
    row_bytes = sum(
        spec.row_bytes
        for member, wanted in zip(members, names, strict=True)
        for spec in member.manifest.arrays
        if spec.name in wanted
    )
    step = layout.chunk_rows * max(1, BLOCK_BYTES // (layout.chunk_rows * row_bytes))
    start, stop = layout.shard_bounds(shard)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        parts = [
            MemberRows(member.name, member.manifest, member.store.read(wanted, first, last))
            for member, wanted in zip(members, names, strict=True)
        ]
        check_same_samples(members, [part.arrays for part in parts], first)
        if is_topk:
            found = found.merge(_survey_rows(parts, first, most))
        advance(last - first)
    return found


def _survey_rows(parts: Sequence[MemberRows], start: int, most: int) -> Survey:
    """The survey of some rows of topk stores."""
    found, done = Survey(np.zeros(most), np.full(most, -1, np.int64)), 0
    sequences = parts[0].manifest.sequences
    num_positions = 1 if sequences is None else sequences.num_positions
    rows = np.flatnonzero(has_targets(parts)) + start
    for known in known_parts(parts):
        off_RK = known.off_by(most)
        worst_K = off_RK.argmax(axis=0)
        off_K = off_RK[worst_K, np.arange(most)]
        row_K = np.where(off_K > 0, rows[(done + worst_K) // num_positions], -1)
        top_off_R = np.log1p(off_RK[:, 0] / np.maximum(known.probs_RE[:, 0], LEAST))
        found = found.merge(Survey(off_K, row_K, float(known.entropy_within_R.max()), float(top_off_R.max())))
        done += len(off_RK)
    return found


def choose_k(survey: Survey, encoding: TopK, k: int | None, tolerance: float, members: Sequence[Member]) -> TopK:
    """The encoding with the entries that are asked for, or with as many as the tolerance allows.

    Raises:
        MismatchError: some row is further off.
    """
    before = sum(bounds_of(member.manifest).get("probability_within", 0.0) for member in members) / len(members)
    allowed = np.flatnonzero(survey.off_K + before <= tolerance) + 1
    if k is None and len(allowed):
        return replace(encoding, k=int(allowed[-1]))
    if k is not None and k in allowed:
        return replace(encoding, k=k)
    best = f"--k {allowed[-1]}" if len(allowed) else "stores that keep more"
    asked = k or int(survey.off_K.argmin()) + 1
    off, row = survey.off_K[asked - 1] + before, survey.worst_K[asked - 1]
    at = f", in row {row}" if row >= 0 else ""
    raise MismatchError(
        f"{members[0].store.path}: expected the {asked} likeliest classes of the ensemble to be known within "
        f"{tolerance:g}, got {off:.3g}{at}: classes that one store keeps and another does not; use {best}, "
        f"--tolerance {_above(float(off))}, or teacherdump run with --model repeated"
    )


def _above(value: float) -> str:
    """A number of two digits above a value."""
    text = f"{value:.1e}"
    return f"{float(text) if float(text) > value else float(text) * 1.1:.2g}"
