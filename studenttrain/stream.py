"""The student's stream: batches of samples with their stored targets, in a seeded order, from where it stands.

Legend: N rows.

What is to come is a function of the state alone: seed, epoch, batch, and the shards that were sealed when the epoch
began. So a run that goes on from a state sees what it would have seen, whatever the number of ranks and threads.
"""

import contextlib
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from storage.arrays import STATUS_OK, Arrays
from storage.corpus import Batch, Corpus, Preprocess, check_digests, read_batch
from storage.corpus.protocol import ReadsRows
from storage.corpus.reading import batch_of
from storage.corpus.stored import StoredTokens, stored_samples
from storage.errors import CorpusMismatchError, NotSealedError
from storage.layout import from_ranges, to_ranges
from storage.reader import Store
from studenttrain.order import (
    EpochOrder,
    Indices,
    batch_bounds,
    check_sealed,
    choose_block_rows,
    choose_window_blocks,
    num_batches,
)
from studenttrain.selection import RowSelection
from studenttrain.window import TargetBatch, TargetReader

MAX_READERS = 8

# Small batches are read some at a time, so that the reading thread seldom takes Python from the student's.
GROUP_BATCHES = 8
GROUP_BYTES = 8 << 20  # of inputs and stored rows


@dataclass(frozen=True, eq=False)
class StudentBatch:
    """A rank's slice of one batch: samples, and what the store holds of them.

    Attributes:
        rows_N: rows of the store, int64; the last batch of an epoch may leave a rank with none.
        inputs: preprocessed samples, float32 (N, ...), zeros where one can't be decoded; of sequences token ids and
            position ids, int64 (N, 2, P + 1).
        arrays: the stored arrays that were asked for, as they are stored, rows first.
        hard_targets_N: true classes as in the store, int32, -1 where unknown; None where the store has none.
        valid_N: bool, False where the row is quarantined and so has no soft targets.
    """

    rows_N: Indices  # noqa: N815
    inputs: NDArray[np.float32]
    arrays: Arrays
    hard_targets_N: NDArray[np.int32] | None  # noqa: N815
    valid_N: NDArray[np.bool_]  # noqa: N815

    @property
    def is_tokens(self) -> bool:
        """Whether the samples are sequences of tokens."""
        return self.inputs.dtype == np.int64


@dataclass(frozen=True, eq=False)
class _Group:
    """Batches that were read at once.

    Attributes:
        batches: in order.
        error: what the batch after them met; None where there was nothing.
    """

    batches: list[StudentBatch]
    error: Exception | None = None


class TargetStream:
    """Batches of a corpus with the targets that a store holds of it. A context manager; iterating gives one epoch.

    An epoch holds the shards that are sealed when it begins, so a student may train while the dump still runs.
    Iterating again gives the next epoch; after a `break`, the rest of the same.

    Args:
        store: opened, of this corpus.
        corpus: opened; each sample that is read is held against the digest of its row.
        preprocess: how a sample becomes an input.
        batch_size: rows of a batch over all ranks, at least 1; the last batch of an epoch may be shorter.
        seed: of the order, at least 0.
        rank: this rank, from 0.
        world_size: ranks that share each batch, at least 1; the order does not depend on it.
        arrays: stored arrays to read, such as `loss.target_arrays` names.
        readers: threads that read samples, at least 1; None is one for each core, at most 8.
        prefetch: batches that are at least read ahead, from 1.
        block_rows: of the order; None chooses it by the store.
        window_blocks: of the order; None chooses it by the store.
        selection: chooses the rows of each epoch; None gives all. It is no part of the state: give the same one again.

    Attributes:
        ready: batches that are whole and come next, in order; there may be none, or more than are waited for.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        store: Store,
        corpus: Corpus,
        preprocess: Preprocess,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        arrays: Sequence[str] = (),
        readers: int | None = None,
        prefetch: int = 2,
        block_rows: int | None = None,
        window_blocks: int | None = None,
        selection: RowSelection | None = None,
    ) -> None:
        if batch_size < 1 or prefetch < 1 or (readers is not None and readers < 1):
            raise ValueError(
                f"batch_size, prefetch, readers: expected at least 1, got {batch_size}, {prefetch}, {readers}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {seed}")
        self.store, self.corpus, self.preprocess = store, corpus, preprocess
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.arrays = tuple(arrays)
        self.selection = selection
        self._prefetch = prefetch
        self._block_rows = block_rows or choose_block_rows(store.manifest)
        self._window_blocks = window_blocks or choose_window_blocks(store.manifest, self._block_rows)
        self._epoch, self._batch = 0, 0
        self.ready: deque[StudentBatch] = deque()
        self._order: EpochOrder | None = None
        self._running: Generator[StudentBatch] | None = None
        beside: tuple[str, ...] = ("hard_target",) if store.manifest.has_hard_targets else ()
        if isinstance(corpus, StoredTokens):
            beside += ("token_ids", "position_ids")
        self._targets = TargetReader(store, tuple(dict.fromkeys((*self.arrays, "status", "sample_digest", *beside))))
        self._readers = ThreadPoolExecutor(readers or min(MAX_READERS, len(os.sched_getaffinity(0))), "samples")
        self._ahead = ThreadPoolExecutor(1, "batches")
        row_bytes = preprocess.dtype.itemsize * math.prod(preprocess.shape) + store.manifest.row_bytes
        # what is decoded a sample at a time takes long enough for a batch of its own
        most = GROUP_BATCHES if isinstance(corpus, ReadsRows) else 1
        self._group_batches = max(1, min(most, GROUP_BYTES // (row_bytes * -(-batch_size // world_size))))

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch

    @property
    def batch(self) -> int:
        """Index of the next batch in its epoch, from 0."""
        return self._batch

    @property
    def has_begun(self) -> bool:
        """Whether the shards of the epoch of the next batch are fixed."""
        return self._order is not None

    @property
    def num_rows(self) -> int:
        """Rows of the epoch of the next batch, which thereby begins."""
        return self.begin_epoch().num_rows

    @property
    def num_batches(self) -> int:
        """Batches of the epoch of the next batch, which thereby begins."""
        return num_batches(self.num_rows, self.batch_size)

    def begin_epoch(self, sealed: Sequence[int] | None = None) -> EpochOrder:
        """Fix the shards of the epoch of the next batch, if it has not begun, and give its order.

        Args:
            sealed: sealed shards, ascending; None takes those that are sealed now. Ranks must be given the same ones
                while a dump is still running, since each may see another moment of it.

        Raises:
            NotSealedError: no shard is sealed yet, or none with a row that is chosen.
        """
        if self._order is None:
            shards = self.store.sealed_shards() if sealed is None else sealed
            if not shards:
                raise NotSealedError(
                    f"{self.store.path}: expected a sealed shard, got none yet; wait until the dump has sealed one"
                )
            self._order = self._order_of(check_sealed(to_ranges(shards), self.store.layout))
        return self._order

    def _order_of(self, sealed: tuple[tuple[int, int], ...]) -> EpochOrder:
        chosen_N = None if self.selection is None else self.selection.chosen(self._epoch, from_ranges(sealed))
        order = EpochOrder(
            self.store.layout, sealed, self.seed, self._epoch, self._block_rows, self._window_blocks, chosen_N
        )
        if not order.num_rows:
            raise NotSealedError(
                f"{self.store.path}: expected a sealed row that is chosen, got none yet; wait until the dump has "
                "sealed one, or choose other rows"
            )
        return order

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as a small JSON value: after the last batch that it gave.

        `sealed` holds the shards of the epoch as half-open ranges, or null where it has not begun.
        """
        sealed = None if self._order is None else [list(pair) for pair in self._order.sealed]
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "epoch": self._epoch,
            "batch": self._batch,
            "sealed": sealed,
            "block_rows": self._block_rows,
            "window_blocks": self._window_blocks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where a state says; iterating then goes on with the batch after it.

        Raises:
            ValueError: the state is of another seed or batch size, or of another store.
            NotSealedError: the store lacks a shard of the state.
        """
        for name in ("seed", "batch_size"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: expected {state[name]} as in the state, got {getattr(self, name)}")
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._block_rows, self._window_blocks = int(state["block_rows"]), int(state["window_blocks"])
        self._order = None
        if state["sealed"] is None:
            return
        sealed = check_sealed(state["sealed"], self.store.layout)
        if missing := set(from_ranges(sealed)) - set(self.store.sealed_shards()):
            raise NotSealedError(
                f"{self.store.path}: expected shard {min(missing)} sealed, as when the training stopped, got no seal; "
                "give the store that the training began with"
            )
        self._order = self._order_of(sealed)

    def __iter__(self) -> Iterator[StudentBatch]:
        """The rest of the epoch.

        Raises:
            CorpusMismatchError: a sample is not the one that its row was made from.
            DamageError: a checksum of the store does not hold.
        """
        if self._running is not None:
            self._running.close()  # it would go on in the same buffers
        self._running = self._rest()
        return self._running

    def _rest(self) -> Generator[StudentBatch]:
        """What `__iter__` gives."""
        order, batch = self.begin_epoch(), self._batch
        count = num_batches(order.num_rows, self.batch_size)
        groups = self._read_groups(order, batch, count)  # only the reading thread goes through it
        ahead: deque[Future[_Group | None]] = deque()
        try:
            for _ in range(1 + -(-self._prefetch // self._group_batches)):
                ahead.append(self._ahead.submit(next, groups, None))
            while (group := ahead.popleft().result()) is not None:
                ahead.append(self._ahead.submit(next, groups, None))
                self.ready.extend(group.batches)
                while self.ready:
                    self._stand_after(batch, count)
                    batch += 1
                    yield self.ready.popleft()
                if group.error is not None:
                    raise group.error
        finally:
            self.ready.clear()
            # what is running writes to buffers that the next epoch will use
            wait([future for future in ahead if not future.cancel()])
            groups.close()

    def _read_groups(self, order: EpochOrder, first: int, count: int) -> Generator[_Group]:
        """Batches `first` to `count` of an epoch, some at a time."""
        targets = self._targets.batches(order, self.batch_size, first, self.rank, self.world_size)
        with contextlib.closing(targets):
            for start in range(first, count, self._group_batches):
                group = range(start, min(start + self._group_batches, count))
                samples = None if isinstance(self.corpus, StoredTokens) else self._read_samples(order, group)
                batches: list[StudentBatch] = []
                try:
                    for place in range(len(group)):
                        stored = next(targets)
                        found = self._stored_samples(stored) if samples is None else samples[place]
                        batches.append(self._joined(found, stored.arrays))
                except Exception as error:  # noqa: BLE001 - it is raised again, after the batches before it
                    yield _Group(batches, error)
                    return
                yield _Group(batches)

    def _stand_after(self, batch: int, count: int) -> None:
        """Stand after a batch: at the next one, or before the next epoch."""
        self._batch = batch + 1
        if self._batch == count:
            self._epoch, self._batch, self._order = self._epoch + 1, 0, None

    def _read_samples(self, order: EpochOrder, batches: range) -> list[Batch]:
        """Samples of some batches, of this rank alone, read at once."""
        bounds = [batch_bounds(order.num_rows, self.batch_size, it, self.rank, self.world_size) for it in batches]
        rows_R = np.concatenate([order.rows(start, stop) for start, stop in bounds])
        return split_samples(
            read_batch(self.corpus, rows_R, self.preprocess, self._readers), [stop - start for start, stop in bounds]
        )

    def _stored_samples(self, stored: TargetBatch) -> Batch:
        """Samples of a batch, of the tokens that the store keeps of its rows."""
        return batch_of(stored.rows_N, stored_samples(stored.arrays), self.preprocess)

    def _joined(self, samples: Batch, stored: Arrays) -> StudentBatch:
        """Samples and targets as one batch that owns its arrays, after the samples were held against their digests."""
        check_digests(stored["sample_digest"], samples.digests_N, samples.rows_N, self.corpus, self.store.path)
        valid_N = stored["status"] == STATUS_OK
        for position, reason in samples.errors.items():
            if valid_N[position]:
                row = int(samples.rows_N[position])
                raise CorpusMismatchError(
                    f"{self.store.path}: row {row} ({self.corpus.key(row)!r}): expected a sample that decodes as it "
                    f"did at the dump, got {reason}; use the software that the store was made with"
                )
        hard_targets_N = stored["hard_target"].copy() if "hard_target" in stored else None
        arrays = {name: stored[name].copy() for name in self.arrays}
        return StudentBatch(samples.rows_N, samples.inputs, arrays, hard_targets_N, valid_N)

    def close(self) -> None:
        """Stop all threads: what they are at is finished, what waits is dropped."""
        if self._running is not None:
            self._running.close()
        for pool in (self._ahead, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._targets.close()
        for pool in (self._ahead, self._readers):
            pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def split_samples(samples: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Samples that were read at once, cut into batches of these sizes."""
    batches, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        errors = {it - start: reason for it, reason in samples.errors.items() if start <= it < start + size}
        batches.append(Batch(samples.rows_N[part], samples.inputs[part], samples.digests_N[part], errors))
        start += size
    return batches
