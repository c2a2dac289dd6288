"""The mean soft-target mass of each class at T = 1, over a whole store, and which classes have next to none of it.

Legend: R distributions, C classes, K kept entries, D places for drawn ids, B classes of a block.

The mean is what the teacher says a class's share of the corpus is: a student of the store learns it as its prior.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from storage.arrays import STATUS_OK, Array, Arrays
from storage.encodings import HeadArrays, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.errors import DamageError, MismatchError, NotSealedError
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.scan.figures import ClassMass
from storage.scan.passes import Progress, blocks, fold_shards, one_at_a_time
from storage.scan.recompute import BLOCK_ROWS, logit_blocks, top1_and_lse
from storage.sequences import flatten_positions

SLICE_VALUES = 1 << 17  # few enough to stay in the cache while they are exponentiated
TOTAL_BITS = 62  # of a sum that an int64 holds

# A class is starved where its mean mass is below this part of an equal share, 1 / C. Of what a balanced corpus gives,
# not of the median class: where a store has but a few of its classes, as one of 7s and 8s, the median is starved too.
STARVED_SHARE = 0.1
# Distributions for each class below which nothing is called starved: of a balanced corpus of so many a class is below a
# tenth of its share, by chance, in less than e^-10 of the cases.
FEWEST_A_CLASS = 10


def class_mass(path: str | Path, *, num_workers: int | None = None, progress: Progress | None = None) -> ClassMass:
    """Mean mass of each class at T = 1 over a store's sealed rows; of sequences, over the tokens that are counted.

    Args:
        path: the store.
        num_workers: threads; by default one for each core.
        progress: called with the number of rows that were counted, now and then.

    Raises:
        PathError: there is no store at the path.
        NotSealedError: no row with targets is sealed yet.
        MismatchError: T = 1 is not exact on the store.
        DamageError: a checksum does not hold.
    """
    with open_store(path) as store:
        reason = mass_is_unknown(store.manifest)
        if reason is not None:
            raise MismatchError(
                f"{path}: expected soft targets that are exact at T = 1, for the mass of each class, got none: "
                f"{reason}; use a store that is, or dump again with --temperature 1 too"
            )
        sealed = store.sealed_shards()
        counts, head, advance = MassCounts(store), store.head(), one_at_a_time(progress)

        def count(shard: int) -> None:
            for block in blocks(store.manifest, shard, layout=store.layout):
                arrays = _counted(store, block.start, block.stop)
                if len(arrays[_values_name(store.manifest)]):
                    counts.add(arrays, head)
                advance(block.stop - block.start)

        fold_shards(sealed, count, lambda *_: None, num_workers)
        found = counts.mass()
        if found is None:
            raise NotSealedError(f"{path}: expected rows with targets to count, got none; resume the dump first")
        return found


def mass_is_unknown(manifest: Manifest) -> str | None:
    """Why the mass of each class at T = 1 can't be told from a store, or None where it can."""
    exact = manifest.encoding.exact_temperatures(manifest.temperatures)
    if exact is None or 1.0 in exact:
        return None
    declared = ", ".join(f"{value:g}" for value in exact)
    return f"its {manifest.encoding.name} targets are exact at T = {declared} only"


def starved_classes(mass_C: Array, num_counted: int) -> tuple[int, ...]:
    """The classes whose share of the mass is below `STARVED_SHARE` of an equal share, ascending.

    Args:
        mass_C: mass, or counts, of each class; their sum is what shares are of, so that a tail counts as spread like
            what is known.
        num_counted: distributions that it was counted over; of few, none is called starved.
    """
    total = float(mass_C.sum())
    if len(mass_C) < 2 or total <= 0 or num_counted < FEWEST_A_CLASS * len(mass_C):
        return ()
    return tuple(np.flatnonzero(mass_C < STARVED_SHARE * total / len(mass_C)).tolist())


class MassCounts:
    """Sums of mass of each class, one for all threads: a store may claim more classes than a shard has bytes.

    They are whole numbers of a unit that so many distributions can't overflow, added up block by block, so that the
    order in which threads come does not matter: a mean is off by less than 2^-62 for each block.

    Args:
        store: its sealed rows are those that may be counted.
    """

    def __init__(self, store: Store) -> None:
        manifest = store.manifest
        self.where, self.manifest = store.path, manifest
        num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
        most = max(1, store.num_sealed_rows * num_positions)
        self._unit = 2.0 ** (most.bit_length() - TOTAL_BITS)
        self._mass_C = np.zeros(manifest.num_classes, np.int64)
        self._own_C = np.zeros(manifest.num_classes, np.int64)
        self._top1_C = np.zeros(manifest.num_classes, np.int64)
        self._tail = self._num_counted = 0
        self._lock = threading.Lock()

    def add(self, arrays: Arrays, head: HeadArrays | None) -> Array:
        """Count some distributions, at least one.

        Args:
            arrays: of the encoding, flat.
            head: of a store of hidden states.

        Returns:
            Their top-1 classes, int64 (R,), the lowest of equal ones.

        Raises:
            DamageError: they are no distributions.
        """
        with np.errstate(all="ignore"):
            return self._add(arrays, head)

    def _add(self, arrays: Arrays, head: HeadArrays | None) -> Array:
        encoding = self.manifest.encoding
        if isinstance(encoding, TopK):
            probs_RK = np.exp(encoding.logprobs(arrays, 1.0, self.manifest.temperatures).astype(np.float64))
            self._add_ids(arrays["ids"], probs_RK[:, :-1])
            top1_R, own_R = arrays["ids"][:, 0].astype(np.int64), probs_RK[:, 0]
            tail = int(self._units(probs_RK[:, -1].sum(keepdims=True))[0])
            with self._lock:
                self._tail += tail
        elif isinstance(encoding, Sample):
            shares_RD = arrays["counts"] / float(encoding.draws)
            self._add_ids(arrays["ids"], shares_RD)
            most_R = shares_RD.argmax(axis=1)[:, None]
            top1_R = np.take_along_axis(arrays["ids"], most_R, axis=1)[:, 0].astype(np.int64)
            own_R = np.take_along_axis(shares_RD, most_R, axis=1)[:, 0]
        elif isinstance(encoding, Hidden):
            assert head is not None
            top1_R, own_R = self._add_hidden(encoding, head, arrays["hidden"])
        else:
            top1_R, own_R = self._add_dense(arrays)
        self._add_own(top1_R, own_R)
        return top1_R

    def _add_dense(self, arrays: Arrays) -> tuple[Array, Array]:
        num_rows, num_classes = arrays["values"].shape
        top1_R, own_R = np.zeros(num_rows, np.int64), np.zeros(num_rows)
        mass_C = np.zeros(num_classes)
        for rows in _slices(num_rows, max(1, SLICE_VALUES // num_classes)):
            part = {name: arrays[name][rows] for name in ("values", "value_range") if name in arrays}
            values_RC = loaded_values(part)
            top1_R[rows] = values_RC.argmax(axis=1)
            probs_RC = np.exp(values_RC, out=values_RC)  # the largest is 0
            probs_RC /= probs_RC.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            own_R[rows] = np.take_along_axis(probs_RC, top1_R[rows][:, None], axis=1)[:, 0]
            mass_C += probs_RC.sum(axis=0, dtype=np.float64)
        self._add_classes(0, mass_C)
        return top1_R, own_R

    def _add_hidden(self, encoding: Hidden, head: HeadArrays, hidden_RW: Array) -> tuple[Array, Array]:
        """Two products with the head: one for what a distribution is divided by, one for its mass."""
        top1_R, own_R = np.zeros(len(hidden_RW), np.int64), np.zeros(len(hidden_RW))
        for rows in _slices(len(hidden_RW), BLOCK_ROWS):
            top1_R[rows], max_R, lse_R = top1_and_lse(encoding, head, hidden_RW[rows])
            own_R[rows] = np.exp(-lse_R)
            shift_R = (max_R + lse_R).astype(np.float32)
            for first, logits_RB in logit_blocks(encoding, head, hidden_RW[rows]):
                probs_RB = np.exp(logits_RB - shift_R[:, None])
                self._add_classes(first, probs_RB.sum(axis=0, dtype=np.float64))
        return top1_R, own_R

    def _units(self, mass: Array) -> Array:
        """Mass as whole units."""
        if not np.isfinite(mass).all():
            raise DamageError(
                f"{self.where}: expected finite soft targets, got others in rows that have some; see what else is "
                "wrong: logitstore verify"
            )
        return np.rint(mass / self._unit).astype(np.int64)

    def _add_classes(self, first: int, mass_B: Array) -> None:
        units_B = self._units(mass_B)
        with self._lock:
            self._mass_C[first : first + len(units_B)] += units_B

    def _add_ids(self, ids_RK: Array, mass_RK: Array) -> None:
        """Add mass by class id; where there are more classes than ids, no array of all classes is made."""
        if int(ids_RK.max()) >= len(self._mass_C):
            raise DamageError(
                f"{self.where}: expected classes below {len(self._mass_C)}, got {int(ids_RK.max())}; see what else is "
                "wrong: logitstore verify"
            )
        ids = ids_RK.reshape(-1).astype(np.int64)
        if len(self._mass_C) <= len(ids):
            self._add_classes(0, np.bincount(ids, mass_RK.reshape(-1), minlength=len(self._mass_C)))
            return
        found, place = np.unique(ids, return_inverse=True)
        units = self._units(np.bincount(place, mass_RK.reshape(-1)))
        with self._lock:
            self._mass_C[found] += units

    def _add_own(self, top1_R: Array, own_R: Array) -> None:
        """Add what distributions give to their own top-1, each rounded for itself."""
        units_R = self._units(own_R)
        with self._lock:
            np.add.at(self._own_C, top1_R, units_R)
            np.add.at(self._top1_C, top1_R, 1)
            self._num_counted += len(top1_R)

    def mass(self) -> ClassMass | None:
        """Of all that was counted; None where nothing was."""
        if not self._num_counted:
            return None
        other_C = self._num_counted - self._top1_C
        elsewhere_C = np.maximum(self._mass_C - self._own_C, 0) * self._unit / np.maximum(other_C, 1)
        return ClassMass(
            mean=tuple((self._mass_C * (self._unit / self._num_counted)).tolist()),
            tail=float(self._tail * self._unit / self._num_counted),
            elsewhere=tuple(float(mass) if count else None for mass, count in zip(elsewhere_C, other_C, strict=True)),
        )


def _slices(num_rows: int, step: int) -> Iterator[slice]:
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _values_name(manifest: Manifest) -> str:
    """The array that has a row for each distribution."""
    return {"dense": "values", "topk": "ids", "sample": "ids", "hidden": "hidden"}[manifest.encoding.name]


def _counted(store: Store, start: int, stop: int) -> Arrays:
    """What tells the mass of the distributions of some rows, those that are counted: flat."""
    manifest = store.manifest
    wanted = {"values", "value_range", "ids", "lse", "log_tail", "counts", "hidden", "status"}
    if manifest.sequences is not None:
        wanted |= {"hard_target_logprob"}
    arrays = store.read([spec.name for spec in manifest.arrays if spec.name in wanted], start, stop)
    good_N = arrays.pop("status") == STATUS_OK
    arrays = {name: values[good_N] for name, values in arrays.items()}
    if manifest.sequences is None:
        return arrays
    flat = flatten_positions(manifest.sequences, arrays)
    is_target_R = ~np.isnan(flat["hard_target_logprob"])
    return {name: values[is_target_R] for name, values in flat.items()}
