"""Mean and covariance of what a teacher said at T = 1: one pass over a store, by products of blocks of rows.

Legend: N rows, R distributions, C classes, K entries of a distribution that are kept or were drawn.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from storage.arrays import STATUS_OK, Array, Arrays
from storage.console import format_bytes, format_count
from storage.encodings import HeadArrays, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.errors import DamageError, MismatchError, NotSealedError, StoreError
from storage.manifest import Manifest
from storage.reader import Store
from storage.scan.passes import Block, Progress, blocks
from storage.scan.recompute import BLOCK_ROWS, logit_blocks
from storage.sequences import flatten_positions, next_tokens

BLOCK_VALUES = 1 << 23  # of a block as float32: a product of fewer rows spends its time on the sums, not on the product
FEWEST_ROWS = 512  # of a block
CACHED_VALUES = 1 << 17  # few enough to stay in the cache while they are exponentiated
TILE = 256  # classes of a product, so that only half of a symmetric matrix is computed
PAIR_CLASSES = 48  # with so many classes for each kept entry, adding up pairs is quicker than a product with zeros
MOST_READERS = 8  # threads; the product has all cores anyway
SUM_BYTES, RESULT_BYTES = 8, 4  # of an entry of the matrix


@dataclass(frozen=True, eq=False)
class Covariance:
    """What a store's distributions are together, at T = 1.

    Attributes:
        num_distributions: how many there are: rows with targets, or their positions with a target.
        mean_C: mean probability of each class, float64.
        covariance_CC: covariance of the classes' probabilities, over all distributions (not one fewer), float32.
        class_counts_C: distributions of each class: by the hard target where it is known, else by the top-1, int64.
        num_by_target: of these, how many by the hard target.
        mean_tail: mean probability that topk does not keep, and that is taken for 0; 0 where all is kept.
        biased_within: of draws, how far the expected value of an entry may be from the truth; 0 where nothing is drawn.
    """

    num_distributions: int
    mean_C: Array  # noqa: N815
    covariance_CC: Array  # noqa: N815
    class_counts_C: Array  # noqa: N815
    num_by_target: int
    mean_tail: float
    biased_within: float


def covariance(store: Store, *, num_workers: int | None = None, progress: Progress | None = None) -> Covariance:
    """Mean and covariance of the probabilities at T = 1 of all sealed rows with targets, in one pass.

    Memory: 12 bytes for each of C x C entries (4.8 GB at C = 20,000, 12 MB at 1,000), and some blocks of rows; see
    `covariance_bytes`, which is held against the free memory before the pass. Some blocks are read side by side, then
    added up in their order, so that the result does not depend on which was first.

    It is exact for dense and hidden stores. A topk store must declare T = 1; classes that a row does not keep count as
    0 in it, and `mean_tail` says how much that leaves out. Of draws the mean is unbiased, but no product of two shares
    is: counts of one row depend on each other. |count - draws p| < 1, so that two counts have a covariance of at most
    1/4, and an entry is off by at most 1 / (4 draws^2) in the mean.

    Args:
        store: open for reading; a series too.
        num_workers: threads that read; by default one for each core, at most 8. BLAS takes what it is given.
        progress: called with the number of rows that were added, now and then.

    Raises:
        MismatchError: the store can't tell probabilities at T = 1.
        NotSealedError: no row with targets is sealed yet.
        StoreError: there is not enough memory.
        DamageError: a checksum does not hold, or a row is none.
    """
    from dask.base import compute
    from dask.delayed import delayed

    check_temperature_one(store)
    workers = num_workers or min(MOST_READERS, len(os.sched_getaffinity(0)))
    _check_memory(store, covariance_bytes(store.manifest, workers))
    total, head = _Moments(store.manifest, store.path), store.head()

    def load(block: Block) -> "_Part":
        return _load(store, block, head)

    waiting = _all_blocks(store)
    while batch := list(islice(waiting, workers)):  # so many are in memory at most
        parts = [delayed(load, pure=False)(block) for block in batch]
        for part in compute(*parts, scheduler="threads", num_workers=workers):  # type: ignore[no-untyped-call]
            total.add(part)  # here, since BLAS takes all cores, which reading threads would only hold up
            if progress is not None:
                progress(part.num_rows)
    return total.result()


def check_temperature_one(store: Store) -> None:
    """Refuse a store that can't tell probabilities at T = 1.

    Raises:
        MismatchError: it is of topk or draws, and does not declare T = 1.
    """
    manifest = store.manifest
    if isinstance(manifest.encoding, TopK | Sample) and 1.0 not in manifest.temperatures:
        declared = ", ".join(f"{temperature:g}" for temperature in manifest.temperatures)
        raise MismatchError(
            f"{store.path}: expected {manifest.encoding.name} targets that declare T = 1, at which the covariance is "
            f"taken, got T = {declared}; take a dense store of that teacher, or one with --temperature 1"
        )


def covariance_bytes(manifest: Manifest, num_workers: int) -> int:
    """Memory that `covariance` takes at most, bytes: sums, the result, and blocks in work.

    Args:
        manifest: of the store.
        num_workers: threads that read.
    """
    num_classes = manifest.num_classes
    matrix = num_classes**2 * (SUM_BYTES + RESULT_BYTES)
    rows = max(_block_rows(manifest), manifest.chunk_rows)
    num_probs = rows * _num_positions(manifest) * _kept_of(manifest)
    # of kept entries ids are integers of 8 bytes, and sums go over buckets in float64
    part = rows * manifest.row_bytes + num_probs * (4 if _is_full(manifest) else 32)
    spread = 0 if _is_full(manifest) or _has_pairs(manifest) else 2 * max(FEWEST_ROWS * num_classes, BLOCK_VALUES) * 4
    return (
        matrix + min(TILE, num_classes) * num_classes * 4 + spread + (num_workers + 1) * part
    )  # the last one stays while others are read


def _check_memory(store: Store, needed: int) -> None:
    free = free_memory()
    if free is not None and needed > free:
        raise StoreError(
            f"{store.path}: expected {format_bytes(needed)} of free memory for the covariance of "
            f"{format_count(store.manifest.num_classes)} classes, got {format_bytes(free)}; run it on a machine with "
            "more memory"
        )


def free_memory() -> int | None:
    """Memory that this process may still take, bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit, used = (group / name for name in ("memory.max", "memory.current"))
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(int(most) - int(used.read_text()) + int(cached.get("inactive_file", 0)))
    except (OSError, ValueError, IndexError):
        return None
    return min(found, default=None)


def _num_positions(manifest: Manifest) -> int:
    return 1 if manifest.sequences is None else manifest.sequences.num_positions


def _is_full(manifest: Manifest) -> bool:
    """Whether a row tells every class's probability."""
    return not isinstance(manifest.encoding, TopK | Sample)


def _kept_of(manifest: Manifest) -> int:
    """Probabilities of a distribution as a store has them."""
    encoding = manifest.encoding
    if isinstance(encoding, TopK):
        return encoding.k
    return encoding.num_places(manifest.num_classes) if isinstance(encoding, Sample) else manifest.num_classes


def _has_pairs(manifest: Manifest) -> bool:
    """Whether products are added up by pairs of kept entries, not by matrices with zeros."""
    return manifest.num_classes >= PAIR_CLASSES * _kept_of(manifest)


def _block_rows(manifest: Manifest) -> int:
    """Rows of a block: enough for a product that is worth its sums, where chunks are not larger anyway."""
    return max(1, max(FEWEST_ROWS, BLOCK_VALUES // manifest.num_classes) // _num_positions(manifest))


def _all_blocks(store: Store) -> Iterator[Block]:
    block_bytes = _block_rows(store.manifest) * store.manifest.row_bytes
    for shard in store.sealed_shards():
        yield from blocks(store.manifest, shard, block_bytes, store.layout)


@dataclass(frozen=True)
class _Part:
    """What a block says.

    Attributes:
        num_rows: rows of the block, with and without targets.
        probs_RK: probabilities, float32; of all classes where there are no ids.
        ids_RK: the classes that they are of; None for all.
        tail: sum of what topk does not keep.
        class_R: the class that each distribution counts for.
        num_by_target: how many of these are hard targets.
    """

    num_rows: int
    probs_RK: Array  # noqa: N815
    ids_RK: Array | None  # noqa: N815
    tail: float
    class_R: Array  # noqa: N815
    num_by_target: int


def _load(store: Store, block: Block, head: HeadArrays | None) -> _Part:
    manifest = store.manifest
    wanted = {"status", "hard_target", "values", "value_range", "ids", "counts", "hidden", "log_tail", "lse"}
    if manifest.sequences is not None:
        wanted |= {"hard_target_logprob", "token_ids", "position_ids"}
    if _is_full(manifest):
        wanted.discard("lse")
    names = [spec.name for spec in manifest.arrays if spec.name in wanted]
    arrays = store.read(names, block.start, block.stop)
    is_ok_N = arrays.pop("status") == STATUS_OK
    if not is_ok_N.all():
        arrays = {name: values[is_ok_N] for name, values in arrays.items()}
    flat = _with_target(manifest, arrays)
    probs_RK, ids_RK, tail = _probabilities(manifest, flat, head)
    class_R, num_by_target = _classes(probs_RK, ids_RK, flat.get("hard_target"))
    most = max((int(ids.max()) for ids in (ids_RK, class_R) if ids is not None and ids.size), default=0)
    if most >= manifest.num_classes:
        raise DamageError(
            f"{store.path}: expected classes below {manifest.num_classes}, got {most}; see what else is wrong: "
            "logitstore verify"
        )
    return _Part(block.stop - block.start, probs_RK, ids_RK, tail, class_R, num_by_target)


def _with_target(manifest: Manifest, arrays: Arrays) -> Arrays:
    """One distribution a row: of sequences, those of positions whose next token is of the same document."""
    if manifest.sequences is None:
        return arrays
    flat = flatten_positions(manifest.sequences, arrays)
    if "token_ids" in arrays:
        flat["hard_target"] = next_tokens(arrays["token_ids"], arrays["position_ids"]).reshape(-1)
    is_target_R = ~np.isnan(flat["hard_target_logprob"])
    return {name: values[is_target_R] for name, values in flat.items()}


def _probabilities(manifest: Manifest, flat: Arrays, head: HeadArrays | None) -> tuple[Array, Array | None, float]:
    """Probabilities at T = 1, float32, the classes that they are of (None for all), and the sum of the tails."""
    encoding = manifest.encoding
    if isinstance(encoding, Sample):
        return flat["counts"].astype(np.float32) / np.float32(encoding.draws), flat["ids"].astype(np.int64), 0.0
    if isinstance(encoding, TopK):
        probs_RB = np.exp(encoding.logprobs(flat, 1.0, manifest.temperatures))
        return probs_RB[:, :-1], flat["ids"].astype(np.int64), float(probs_RB[:, -1].sum(dtype=np.float64))
    name = "hidden" if isinstance(encoding, Hidden) else "values"
    probs_RC = np.empty((len(flat[name]), manifest.num_classes), np.float32)
    step = BLOCK_ROWS if isinstance(encoding, Hidden) else max(1, CACHED_VALUES // manifest.num_classes)
    for first in range(0, len(probs_RC), step):
        rows, part = slice(first, first + step), probs_RC[first : first + step]
        if isinstance(encoding, Hidden):
            assert head is not None
            for start, logits_RB in logit_blocks(encoding, head, flat["hidden"][rows]):
                part[:, start : start + logits_RB.shape[1]] = logits_RB
            part -= part.max(axis=1, keepdims=True)
        else:
            part[:] = loaded_values({key: values[rows] for key, values in flat.items() if key.startswith("value")})
        np.exp(part, out=part)
        part /= part.sum(axis=1, keepdims=True)
    return probs_RC, None, 0.0


def _classes(probs_RK: Array, ids_RK: Array | None, target_R: Array | None) -> tuple[Array, int]:
    """The class that each distribution counts for, and how many of these are hard targets."""
    class_R = np.full(len(probs_RK), -1, np.int64) if target_R is None else target_R.astype(np.int64)
    unknown = np.flatnonzero(class_R < 0)
    if len(unknown):
        place_R = probs_RK[unknown].argmax(axis=1)
        class_R[unknown] = place_R if ids_RK is None else ids_RK[unknown, place_R]
    return class_R, len(class_R) - len(unknown)


class _Moments:
    """Sums over distributions, which parts are added to in order.

    Probabilities are taken less the mean of the first part, so that a class that is nearly always likely loses nothing
    to cancellation. Products are of float32, a block at a time; the sums over blocks are of float64.
    """

    def __init__(self, manifest: Manifest, where: str) -> None:
        self.where, self.manifest = where, manifest
        num_classes = manifest.num_classes
        self.has_pairs = _has_pairs(manifest)
        self.num, self.num_by_target, self.tail = 0, 0, 0.0
        self.shift_C = np.zeros(num_classes, np.float32)
        self.sums_C, self.counts_C = np.zeros(num_classes), np.zeros(num_classes, np.int64)
        self.products_CC = np.zeros((num_classes, num_classes))  # what is below the diagonal stays 0

    def add(self, part: _Part) -> None:
        """Add the distributions of a block."""
        num = len(part.probs_RK)
        if not num:
            return
        self.counts_C += np.bincount(part.class_R, minlength=len(self.counts_C))
        self.num_by_target += part.num_by_target
        self.tail += part.tail
        if part.ids_RK is None:
            self._add_full(part.probs_RK)
        elif self.has_pairs:
            self._add_pairs(part.probs_RK, part.ids_RK)
        else:
            step = max(FEWEST_ROWS, BLOCK_VALUES // len(self.counts_C))
            for first in range(0, num, step):
                rows = slice(first, first + step)
                self._add_full(_spread(part.probs_RK[rows], part.ids_RK[rows], len(self.counts_C)))

    def _add_full(self, probs_RC: Array) -> None:
        if not self.num:
            self.shift_C = probs_RC.mean(axis=0)
        self.num += len(probs_RC)
        probs_RC -= self.shift_C
        self.sums_C += probs_RC.sum(axis=0, dtype=np.float64)
        for first in range(0, len(self.sums_C), TILE):
            tile = slice(first, first + TILE)
            self.products_CC[tile, first:] += probs_RC[:, tile].T @ probs_RC[:, first:]

    def _add_pairs(self, probs_RK: Array, ids_RK: Array) -> None:
        num_classes = len(self.sums_C)
        self.num += len(probs_RK)
        order_RK = np.argsort(ids_RK, axis=1)
        ids_RK = np.take_along_axis(ids_RK, order_RK, axis=1)
        probs_RK = np.take_along_axis(probs_RK, order_RK, axis=1).astype(np.float64)
        self.sums_C += np.bincount(ids_RK.reshape(-1), probs_RK.reshape(-1), minlength=num_classes)
        one, two = np.triu_indices(ids_RK.shape[1])
        entries, step = self.products_CC.reshape(-1), max(1, CACHED_VALUES // len(one))
        for first in range(0, len(ids_RK), step):
            ids, probs = ids_RK[first : first + step], probs_RK[first : first + step]
            at = ids[:, one] * num_classes + ids[:, two]
            np.add.at(entries, at.reshape(-1), (probs[:, one] * probs[:, two]).reshape(-1))

    def result(self) -> Covariance:
        """The mean and covariance of what was added."""
        if not self.num:
            raise NotSealedError(
                f"{self.where}: expected rows with targets, got none that is sealed; resume the dump first"
            )
        offset_C = self.sums_C / self.num
        found_CC = np.empty(self.products_CC.shape, np.float32)
        for first in range(0, len(offset_C), TILE):
            tile = slice(first, first + TILE)
            found = self.products_CC[tile, first:] / self.num - offset_C[tile, None] * offset_C[first:]
            square = found[:, : len(found)]
            square[:] = np.triu(square) + np.triu(square, 1).T  # pairs are only added up above the diagonal
            found_CC[tile, first:] = found
            found_CC[first:, tile] = found.T
        if not (np.isfinite(offset_C).all() and np.isfinite(np.diagonal(found_CC)).all()):
            raise DamageError(
                f"{self.where}: expected probabilities in every row with targets, got others; see what is wrong: "
                "logitstore verify"
            )
        encoding = self.manifest.encoding
        return Covariance(
            num_distributions=self.num,
            mean_C=self.shift_C.astype(np.float64) + offset_C,
            covariance_CC=found_CC,
            class_counts_C=self.counts_C,
            num_by_target=self.num_by_target,
            mean_tail=self.tail / self.num,
            biased_within=1 / (4 * encoding.draws**2) if isinstance(encoding, Sample) else 0.0,
        )


def _spread(probs_RK: Array, ids_RK: Array, num_classes: int) -> Array:
    """Entries among all classes, float32 (R, C): 0 where none is."""
    found_RC = np.zeros((len(ids_RK), num_classes), np.float32)
    at = np.arange(len(ids_RK))[:, None] * num_classes + ids_RK
    np.add.at(found_RC.reshape(-1), at.reshape(-1), probs_RK.reshape(-1))  # draws repeat class 0 behind the last one
    return found_RC
