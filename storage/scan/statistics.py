"""Figures of a whole store: what the teacher said, how surely, how much of it is kept, and what it costs.

Legend: N rows, C classes, T temperatures, K kept entries.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array, Arrays
from storage.encodings import TopK
from storage.errors import NotSealedError
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.scan.passes import Progress, blocks, fold_shards, one_at_a_time
from storage.scan.rows import ordered
from storage.scan.sizes import bytes_by_array

ENTROPY_BINS = 50
# tails are counted in bins of their log odds, so that a quantile is right within 1 % of the tail and of the kept mass
ODDS_STEP = 0.01
MAX_ODDS = 28.0  # a tail below 1e-12 counts as 1e-12
BINS_A_SIDE = round(MAX_ODDS / ODDS_STEP)
COARSE = 50  # bins of these in one that is given out
MAX_REASONS = 1000


@dataclass(frozen=True)
class Entropy:
    """Entropy of the teacher's distribution at T = 1.

    Attributes:
        edges: of the bins, nats, from 0 to log C.
        counts: rows in each bin.
        mean: nats; NaN where no row has targets.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float


@dataclass(frozen=True)
class KeptMass:
    """How much of the distribution the kept entries hold, at one declared temperature.

    Attributes:
        temperature: the temperature.
        mean: mean over rows.
        p5: the mass that 95 % of the rows have at least, right within 1 %, and so is 1 - p5.
        min: of the worst row.
        tail_edges: tail masses, ascending: upper edges of bins of half a unit of log odds.
        tail_counts: rows in each bin.
    """

    temperature: float
    mean: float
    p5: float
    min: float
    tail_edges: tuple[float, ...]
    tail_counts: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """Rows without targets for one reason.

    Attributes:
        reason: one line; reasons that differ in their numbers alone are counted as the first of them.
        num_rows: how many rows.
        key: key of the first of them.
        row: the first of them.
    """

    reason: str
    num_rows: int
    key: str
    row: int


@dataclass(frozen=True)
class Agreement:
    """How often the teacher's top-1 is the hard target, over rows that have both.

    Attributes:
        num_rows: rows that have both.
        num_agreed: of these, rows where they are the same class.
        hard_target_counts: rows of each hard target.
        agreed_counts: of these, rows where top-1 is the same.
    """

    num_rows: int
    num_agreed: int
    hard_target_counts: tuple[int, ...]
    agreed_counts: tuple[int, ...]


@dataclass(frozen=True)
class Stats:
    """Figures of a store's sealed rows.

    Attributes:
        path: the store.
        num_rows: rows of the store.
        num_sealed_rows: of these, sealed rows; all that follows is of these.
        num_undecodable: rows whose sample could not be read.
        num_not_finite: rows whose logits were not finite.
        num_classes: classes.
        class_names: names in class order, or None.
        top1_counts: rows by top-1 class.
        num_top1_ties: dense stores: rows whose stored values name more than one class as top-1; the lowest is counted.
        entropy: at T = 1.
        kept_mass: at each declared temperature; empty for a dense store, which keeps everything.
        agreement: with hard targets, or None where the store has none.
        refused: rows without targets by reason, the most frequent first.
        bytes_by_array: stored bytes of each array.
    """

    path: str
    num_rows: int
    num_sealed_rows: int
    num_undecodable: int
    num_not_finite: int
    num_classes: int
    class_names: tuple[str, ...] | None
    top1_counts: tuple[int, ...]
    num_top1_ties: int
    entropy: Entropy
    kept_mass: tuple[KeptMass, ...]
    agreement: Agreement | None
    refused: tuple[Refused, ...]
    bytes_by_array: Mapping[str, int]

    @property
    def num_refused(self) -> int:
        """Rows without targets."""
        return self.num_undecodable + self.num_not_finite

    @property
    def bytes_per_row(self) -> dict[str, float]:
        """Stored bytes a row of each array."""
        return {name: count / self.num_sealed_rows for name, count in self.bytes_by_array.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object; null where there is no number."""
        value = asdict(self) | {"num_refused": self.num_refused, "bytes_per_row": self.bytes_per_row}
        if math.isnan(self.entropy.mean):
            value["entropy"]["mean"] = None
        return value


def class_label(stats: Stats, index: int) -> str:
    """A class's name, or its number where it has none."""
    return str(index) if stats.class_names is None else stats.class_names[index]


def stats(path: str | Path, *, num_workers: int | None = None, progress: Progress | None = None) -> Stats:
    """Figures of a store's sealed rows, counted exactly.

    Args:
        path: the store.
        num_workers: threads; by default one for each core.
        progress: called with the number of rows that were counted, now and then.

    Raises:
        PathError: there is no store at the path.
        NotSealedError: no shard is sealed yet.
        DamageError: a checksum does not hold.
    """
    with open_store(path) as store:
        sealed = store.sealed_shards()
        advance = one_at_a_time(progress)
        tally = fold_shards(sealed, lambda shard: _tally_shard(store, shard, advance), _Tally.merge, num_workers)
        if tally is None:
            raise NotSealedError(f"{path}: expected rows to count, got no sealed shard; resume the dump first")
        return _to_stats(store, tally)


@dataclass
class _Tally:
    """Counts that add up."""

    status: Array
    top1: Array
    entropy: Array
    tails: Array
    known: Array
    agreed: Array
    num_ties: int = 0
    entropy_sum: float = 0.0
    tail_sum: Array = field(default_factory=lambda: np.zeros(0))
    tail_max: Array = field(default_factory=lambda: np.zeros(0))
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, manifest: Manifest) -> Self:
        """No rows."""
        num_classes, num_temperatures = manifest.num_classes, len(manifest.temperatures)
        tails = num_temperatures if isinstance(manifest.encoding, TopK) else 0
        known = num_classes if manifest.has_hard_targets else 0
        return cls(
            status=np.zeros(256, np.int64),
            top1=np.zeros(num_classes, np.int64),
            entropy=np.zeros(ENTROPY_BINS, np.int64),
            tails=np.zeros((tails, 2 * BINS_A_SIDE + 1), np.int64),
            known=np.zeros(known, np.int64),
            agreed=np.zeros(known, np.int64),
            tail_sum=np.zeros(tails),
            tail_max=np.zeros(tails),
        )

    def merge(self, later: Self) -> Self:
        """The counts of both."""
        for name in ("status", "top1", "entropy", "tails", "known", "agreed", "tail_sum"):
            getattr(self, name).__iadd__(getattr(later, name))
        self.num_ties += later.num_ties
        self.entropy_sum += later.entropy_sum
        self.tail_max = np.maximum(self.tail_max, later.tail_max)
        for group, count in later.reasons.items():
            self.refuse(*later.examples[group], count=count)
        return self

    def refuse(self, reason: str, key: str, row: int, count: int = 1) -> None:
        """Count a row without targets."""
        group = re.sub(r"\d+", "#", reason)  # sizes and offsets differ from file to file
        if group not in self.reasons and len(self.reasons) >= MAX_REASONS:
            group = reason = "other reasons"
        self.reasons[group] += count
        self.examples.setdefault(group, (reason, key, row))


def _tally_shard(store: Store, shard: int, advance: Progress) -> _Tally:
    manifest = store.manifest
    tally = _Tally.empty(manifest)
    for entry in store.seal(shard).quarantine:
        tally.refuse(entry.reason, entry.key, entry.row)
    topk = isinstance(manifest.encoding, TopK)
    names = ["status", "entropy", *(["ids", "log_tail"] if topk else ["values"])]
    if manifest.has_hard_targets:
        names.append("hard_target")
    for block in blocks(manifest, shard):
        arrays = {name: store.backend.read(name, shard, block.start, block.stop) for name in names}
        status_N = arrays["status"]
        tally.status += np.bincount(status_N, minlength=256)
        if (status_N != STATUS_OK).any():
            arrays = {name: values[status_N == STATUS_OK] for name, values in arrays.items()}
        if len(arrays["status"]):
            _tally_rows(tally, manifest, arrays)
        advance(block.stop - block.start)
    return tally


def _tally_rows(tally: _Tally, manifest: Manifest, arrays: Arrays) -> None:
    """Count rows that have targets."""
    if "ids" in arrays:
        top1_N = arrays["ids"][:, 0].astype(np.int64)
        _tally_tails(tally, arrays["log_tail"])
    else:
        ordered_NC = ordered(arrays["values"])
        top1_N = ordered_NC.argmin(axis=1)
        tally.num_ties += int(((ordered_NC == 0).sum(axis=1) > 1).sum())
    tally.top1 += np.bincount(top1_N, minlength=manifest.num_classes)
    entropy_N = arrays["entropy"].astype(np.float64)
    highest = math.log(manifest.num_classes) or 1.0
    bins_N = np.clip(entropy_N * (ENTROPY_BINS / highest), 0, ENTROPY_BINS - 1).astype(np.int64)
    tally.entropy += np.bincount(bins_N, minlength=ENTROPY_BINS)
    tally.entropy_sum += float(entropy_N.sum())
    if "hard_target" in arrays:
        target_N = arrays["hard_target"]
        known_N = target_N >= 0
        tally.known += np.bincount(target_N[known_N], minlength=manifest.num_classes)
        tally.agreed += np.bincount(target_N[known_N & (target_N == top1_N)], minlength=manifest.num_classes)


def _tally_tails(tally: _Tally, log_tail_NT: Array) -> None:
    log_tail_NT = np.minimum(log_tail_NT.astype(np.float64), 0)
    tail_NT = np.exp(log_tail_NT)
    tally.tail_sum += tail_NT.sum(axis=0)
    tally.tail_max = np.maximum(tally.tail_max, tail_NT.max(axis=0))
    # bin b holds log odds in ((b - 1 - BINS_A_SIDE) ODDS_STEP, (b - BINS_A_SIDE) ODDS_STEP]
    with np.errstate(divide="ignore"):
        odds_NT = log_tail_NT - np.log(-np.expm1(log_tail_NT))
    bins_NT = np.ceil(np.clip(odds_NT, -MAX_ODDS, MAX_ODDS) / ODDS_STEP).astype(np.int64) + BINS_A_SIDE
    for column in range(bins_NT.shape[1]):
        tally.tails[column] += np.bincount(bins_NT[:, column], minlength=2 * BINS_A_SIDE + 1)


def _tail_of(bins: Array) -> Array:
    """The upper edges of bins as tail masses."""
    tails: Array = 1 / (1 + np.exp(-(bins - BINS_A_SIDE) * ODDS_STEP))
    return tails


def _to_stats(store: Store, tally: _Tally) -> Stats:
    manifest, num_ok = store.manifest, int(tally.status[STATUS_OK])
    edges = np.linspace(0, math.log(manifest.num_classes) or 1.0, ENTROPY_BINS + 1)
    refused = []
    for group, count in tally.reasons.most_common():
        reason, key, row = tally.examples[group]
        refused.append(Refused(reason, count, key, row))
    agreement = Agreement(int(tally.known.sum()), int(tally.agreed.sum()), _ints(tally.known), _ints(tally.agreed))
    return Stats(
        path=store.path,
        num_rows=manifest.num_rows,
        num_sealed_rows=int(tally.status.sum()),
        num_undecodable=int(tally.status[STATUS_UNDECODABLE]),
        num_not_finite=int(tally.status[STATUS_NOT_FINITE]),
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        top1_counts=_ints(tally.top1),
        num_top1_ties=tally.num_ties,
        entropy=Entropy(
            tuple(edges.tolist()), _ints(tally.entropy), tally.entropy_sum / num_ok if num_ok else math.nan
        ),
        kept_mass=tuple(_kept_mass(manifest, tally, num_ok)) if num_ok else (),
        agreement=agreement if manifest.has_hard_targets else None,
        refused=tuple(refused),
        bytes_by_array=bytes_by_array(store),
    )


def _kept_mass(manifest: Manifest, tally: _Tally, num_ok: int) -> list[KeptMass]:
    found = []
    for column, counts in enumerate(tally.tails):
        below = np.cumsum(counts)
        p95 = float(_tail_of(np.asarray(np.searchsorted(below, 0.95 * num_ok))))
        tail_max = float(tally.tail_max[column])
        coarse = np.add.reduceat(counts[1:], np.arange(0, 2 * BINS_A_SIDE, COARSE))
        coarse[0] += counts[0]
        upper = _tail_of(np.arange(COARSE, 2 * BINS_A_SIDE + 1, COARSE))
        found.append(
            KeptMass(
                temperature=manifest.temperatures[column],
                mean=1 - float(tally.tail_sum[column]) / num_ok,
                p5=1 - min(tail_max, p95),
                min=1 - tail_max,
                tail_edges=tuple(upper.tolist()),
                tail_counts=_ints(coarse),
            )
        )
    return found


def _ints(counts: Array) -> tuple[int, ...]:
    return tuple(counts.tolist())
