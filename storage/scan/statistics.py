"""The count of a whole store: what the teacher said, how surely, how much of it is kept, and what it costs.

Legend: N rows, P positions, R distributions, C classes, T temperatures, K kept entries, D places for drawn ids.
"""

import math
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array, Arrays
from storage.encodings import HeadArrays, Hidden, Sample, TopK
from storage.errors import DamageError, NotSealedError
from storage.head import head_records
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.scan.class_mass import MassCounts, mass_is_unknown, starved_classes
from storage.scan.figures import Agreement, Entropy, KeptMass, Refused, Stats
from storage.scan.passes import Progress, blocks, fold_shards, one_at_a_time
from storage.scan.recompute import top1_classes
from storage.scan.rows import ordered
from storage.scan.sizes import bytes_by_array
from storage.sequences import flatten_positions, next_tokens

ENTROPY_BINS = 50
# tails are counted in bins of their log odds, so that a quantile is right within 1 % of the tail and of the kept mass
ODDS_STEP = 0.01
MAX_ODDS = 28.0  # a tail below 1e-12 counts as 1e-12
BINS_A_SIDE = round(MAX_ODDS / ODDS_STEP)
COARSE = 50  # bins of these in one that is given out
MAX_REASONS = 1000


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
        advance, head, classes = one_at_a_time(progress), store.head(), _ClassCounts(store.manifest, store.path)
        mass = MassCounts(store) if mass_is_unknown(store.manifest) is None else None

        def count(shard: int) -> _Tally:
            return _tally_shard(store, shard, head, advance, classes, mass)

        tally = fold_shards(sealed, count, _Tally.merge, num_workers)
        if tally is None:
            raise NotSealedError(f"{path}: expected rows to count, got no sealed shard; resume the dump first")
        return _to_stats(store, tally, mass)


@dataclass
class _Tally:
    """Counts that add up."""

    status: Array
    classes: "_ClassCounts"
    entropy: Array
    tails: Array
    num_ties: int = 0
    nll_sum: float = 0.0
    num_nll: int = 0
    entropy_sum: float = 0.0
    tail_sum: Array = field(default_factory=lambda: np.zeros(0))
    tail_max: Array = field(default_factory=lambda: np.zeros(0))
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, manifest: Manifest, classes: "_ClassCounts") -> Self:
        """No rows."""
        tails = len(manifest.temperatures) if isinstance(manifest.encoding, TopK) else 0
        return cls(
            status=np.zeros(256, np.int64),
            classes=classes,
            entropy=np.zeros(ENTROPY_BINS, np.int64),
            tails=np.zeros((tails, 2 * BINS_A_SIDE + 1), np.int64),
            tail_sum=np.zeros(tails),
            tail_max=np.zeros(tails),
        )

    def merge(self, later: Self) -> Self:
        """The counts of both."""
        for name in ("status", "entropy", "tails", "tail_sum"):
            getattr(self, name).__iadd__(getattr(later, name))
        self.num_ties += later.num_ties
        self.nll_sum += later.nll_sum
        self.num_nll += later.num_nll
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


class _ClassCounts:
    """Counts of each class, one for all threads: a store may claim more classes than a shard has bytes.

    Attributes:
        where: the store, for messages.
        top1: rows whose top-1 it is, int64 (C,).
        known: rows whose hard target it is.
        agreed: of these, rows whose top-1 it is too.
    """

    def __init__(self, manifest: Manifest, where: str) -> None:
        self.where = where
        known = manifest.num_classes if _has_hard_targets(manifest) else 0
        self.top1 = np.zeros(manifest.num_classes, np.int64)
        self.known, self.agreed = np.zeros(known, np.int64), np.zeros(known, np.int64)
        self._lock = threading.Lock()

    def add(self, top1_R: Array, target_R: Array | None) -> None:
        """Count some rows; -1 in `target_R` is not known."""
        most = max(int(ids_R.max()) for ids_R in (top1_R, target_R) if ids_R is not None and len(ids_R))
        if most >= len(self.top1):
            raise DamageError(
                f"{self.where}: expected classes below {len(self.top1)}, got {most}; see what else is wrong: "
                "logitstore verify"
            )
        with self._lock:
            np.add.at(self.top1, top1_R, 1)
            if target_R is not None:
                known_R = target_R >= 0
                np.add.at(self.known, target_R[known_R], 1)
                np.add.at(self.agreed, target_R[known_R & (target_R == top1_R)], 1)


def _has_hard_targets(manifest: Manifest) -> bool:
    """Whether a store can tell each hard target, be it a class or the next token."""
    return manifest.has_hard_targets or (manifest.sequences is not None and manifest.sequences.has_tokens)


def _names(manifest: Manifest) -> list[str]:
    """The arrays that are counted."""
    wanted = {"status", "entropy", "hard_target", "hard_target_logprob", "token_ids", "position_ids"}
    wanted |= {"values", "value_range", "ids", "lse", "log_tail", "counts", "hidden"}
    if mass_is_unknown(manifest) is not None:
        wanted -= {"values", "value_range", "lse"}  # a topk store's top-1 is its first id
    return [spec.name for spec in manifest.arrays if spec.name in wanted]


def _tally_shard(
    store: Store,
    shard: int,
    head: HeadArrays | None,
    advance: Progress,
    classes: _ClassCounts,
    mass: MassCounts | None,
) -> _Tally:
    manifest = store.manifest
    tally = _Tally.empty(manifest, classes)
    for entry in store.seal(shard).quarantine:
        tally.refuse(entry.reason, entry.key, entry.row)
    names = _names(manifest)
    for block in blocks(manifest, shard, layout=store.layout):
        arrays = store.read(names, block.start, block.stop)
        status_N = arrays.pop("status")
        tally.status += np.bincount(status_N, minlength=256)
        if (status_N != STATUS_OK).any():
            arrays = {name: values[status_N == STATUS_OK] for name, values in arrays.items()}
        counted = _counted(manifest, arrays)
        if len(counted["entropy"]):
            _tally_rows(tally, manifest, counted, head, mass)
        advance(block.stop - block.start)
    return tally


def _counted(manifest: Manifest, arrays: Arrays) -> Arrays:
    """The distributions that are counted: of sequences, those at positions whose next token is of the same document."""
    if manifest.sequences is None:
        return arrays
    flat = flatten_positions(manifest.sequences, arrays)
    if "token_ids" in arrays:
        flat["hard_target"] = next_tokens(arrays["token_ids"], arrays["position_ids"]).reshape(-1)
    is_target_R = ~np.isnan(flat["hard_target_logprob"])
    return flat if is_target_R.all() else {name: values[is_target_R] for name, values in flat.items()}


def _tally_rows(
    tally: _Tally, manifest: Manifest, arrays: Arrays, head: HeadArrays | None, mass: MassCounts | None
) -> None:
    """Count distributions."""
    if mass is not None and isinstance(manifest.encoding, Hidden):
        top1_R = mass.add(arrays, head)  # in the products that it needs anyway
    else:
        top1_R = _top1(tally, manifest, arrays, head)
        if mass is not None:
            mass.add(arrays, head)
    tally.classes.add(top1_R, arrays.get("hard_target"))
    if "log_tail" in arrays:
        _tally_tails(tally, arrays["log_tail"])
    entropy_R = arrays["entropy"].astype(np.float64)
    highest = math.log(manifest.num_classes) or 1.0
    bins_R = np.clip(entropy_R * (ENTROPY_BINS / highest), 0, ENTROPY_BINS - 1).astype(np.int64)
    tally.entropy += np.bincount(bins_R, minlength=ENTROPY_BINS)
    tally.entropy_sum += float(entropy_R.sum())
    if "hard_target_logprob" in arrays:
        logprob_R = arrays["hard_target_logprob"].astype(np.float64)
        logprob_R = logprob_R[~np.isnan(logprob_R)]
        tally.nll_sum -= float(logprob_R.sum())
        tally.num_nll += len(logprob_R)


def _top1(tally: _Tally, manifest: Manifest, arrays: Arrays, head: HeadArrays | None) -> Array:
    """The top-1 class of each distribution, int64 (R,), the lowest of equal ones; ties of dense values are counted."""
    encoding = manifest.encoding
    if isinstance(encoding, TopK):
        return arrays["ids"][:, 0].astype(np.int64)
    if isinstance(encoding, Sample):
        most_R = arrays["counts"].argmax(axis=1)
        return np.take_along_axis(arrays["ids"], most_R[:, None], axis=1)[:, 0].astype(np.int64)
    if isinstance(encoding, Hidden):
        assert head is not None
        return top1_classes(encoding, head, arrays["hidden"])
    ordered_RC = ordered(arrays["values"])
    tally.num_ties += int(((ordered_RC == 0).sum(axis=1) > 1).sum())
    top1_R: Array = ordered_RC.argmin(axis=1)
    return top1_R


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


def _to_stats(store: Store, tally: _Tally, mass: MassCounts | None) -> Stats:
    manifest, num_counted = store.manifest, int(tally.classes.top1.sum())
    class_mass = None if mass is None else mass.mass()
    shares_C = tally.classes.top1 if class_mass is None else np.asarray(class_mass.mean)
    head = store.head()
    edges = np.linspace(0, math.log(manifest.num_classes) or 1.0, ENTROPY_BINS + 1)
    refused = []
    for group, count in tally.reasons.most_common():
        reason, key, row = tally.examples[group]
        refused.append(Refused(reason, count, key, row))
    agreement = Agreement(
        int(tally.classes.known.sum()),
        int(tally.classes.agreed.sum()),
        _ints(tally.classes.known),
        _ints(tally.classes.agreed),
    )
    return Stats(
        path=store.path,
        num_rows=manifest.num_rows,
        num_sealed_rows=int(tally.status.sum()),
        num_undecodable=int(tally.status[STATUS_UNDECODABLE]),
        num_not_finite=int(tally.status[STATUS_NOT_FINITE]),
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        sequences=manifest.sequences,
        num_positions=1 if manifest.sequences is None else manifest.sequences.num_positions,
        num_tokens=None if manifest.sequences is None else num_counted,
        top1_counts=_ints(tally.classes.top1),
        class_mass=class_mass,
        class_mass_unknown=mass_is_unknown(manifest),
        starved_classes=starved_classes(shares_C, num_counted) if manifest.sequences is None else (),
        num_top1_ties=tally.num_ties,
        entropy=Entropy(
            tuple(edges.tolist()), _ints(tally.entropy), tally.entropy_sum / num_counted if num_counted else math.nan
        ),
        kept_mass=tuple(_kept_mass(manifest, tally, num_counted)) if num_counted else (),
        hard_target_nll=tally.nll_sum / tally.num_nll if tally.num_nll else None,
        agreement=agreement if _has_hard_targets(manifest) else None,
        refused=tuple(refused),
        bytes_by_array=bytes_by_array(store),
        head_bytes=0 if head is None else sum(map(len, head_records(head).values())),
    )


def _kept_mass(manifest: Manifest, tally: _Tally, num_counted: int) -> list[KeptMass]:
    found = []
    for column, counts in enumerate(tally.tails):
        below = np.cumsum(counts)
        p95 = float(_tail_of(np.asarray(np.searchsorted(below, 0.95 * num_counted))))
        tail_max = float(tally.tail_max[column])
        coarse = np.add.reduceat(counts[1:], np.arange(0, 2 * BINS_A_SIDE, COARSE))
        coarse[0] += counts[0]
        upper = _tail_of(np.arange(COARSE, 2 * BINS_A_SIDE + 1, COARSE))
        found.append(
            KeptMass(
                temperature=manifest.temperatures[column],
                mean=1 - float(tally.tail_sum[column]) / num_counted,
                p5=1 - min(tail_max, p95),
                min=1 - tail_max,
                tail_edges=tuple(upper.tolist()),
                tail_counts=_ints(coarse),
            )
        )
    return found


def _ints(counts: Array) -> tuple[int, ...]:
    return tuple(counts.tolist())
