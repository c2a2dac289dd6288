"""The dump: the road from samples to sealed shards.

    readers -> batch -> teacher -> sparsify on the device -> host -> shard -> writer -> seal

Legend: N rows of a batch, C classes, P positions of a sequence, Q = P + 1 tokens, R flat rows: N, or N * P.

The device never waits for the disk: a thread reads ahead, another one writes behind, and results are copied to the host
while the next batch is in work. What lies between the stages is bounded, so memory does not grow with the rows.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.console import Pass
from storage.corpus import Batch, Corpus, Preprocess, read_batch
from storage.corpus.sequences import check_ids
from storage.encodings import HeadArrays, Sample
from storage.encodings.sample import uniforms
from storage.errors import CorpusError, TeacherError
from storage.manifest import Manifest
from storage.records import QuarantineEntry, Seal
from storage.sequences import next_tokens
from storage.writer import StoreWriter
from teacherdump.plan import batches
from teacherdump.sparsify import (
    HAS_NAN,
    HAS_POSITIVE_INF,
    NO_CLASS,
    REFUSAL,
    HostArrays,
    Sparsify,
    TeacherRows,
    build_sparsify,
    copy_to_host,
    joined,
)
from teacherdump.stages import ReadAhead, WriteBehind
from teacherdump.teacher import Said, Teacher

READ_AHEAD_BATCHES = 4
READ_AHEAD_BYTES = 256 << 20
ON_THE_WAY = {"cuda": 2}  # batches whose results are copied while the next is in work; none elsewhere
SHARDS_BEHIND = 1  # shards that wait for the one that is written


@dataclass(frozen=True)
class Job:
    """All that a shard is dumped from.

    Attributes:
        corpus: where the samples are.
        preprocess: how a sample becomes an input.
        teacher: what gives the logits, on its device.
        manifest: of the store.
        batch_size: rows of one forward pass, at least 1.
        num_readers: threads that decode samples, at least 1.
        head: what a store of hidden states keeps once; else None.
    """

    corpus: Corpus
    preprocess: Preprocess
    teacher: Teacher
    manifest: Manifest
    batch_size: int
    num_readers: int
    head: HeadArrays | None = None

    def speak(self, read: "ReadBatch") -> Iterator[Said]:
        """What the teacher says of a batch, in parts that make up its flat rows."""
        inputs = read.inputs.to(self.teacher.device, non_blocking=True)
        keeps_hidden = self.manifest.encoding.name == "hidden"
        if self.manifest.sequences is None:
            return self.teacher.speak(inputs, keeps_hidden)
        is_one_document = bool((read.batch.inputs[:, 1, 1:-1] != 0).all())
        return self.teacher.speak_tokens(inputs, self.manifest.num_classes, keeps_hidden, is_one_document)


@dataclass(frozen=True, eq=False)
class EncodedShard:
    """A shard that is ready to be written.

    Attributes:
        shard: its index.
        arrays: every array of the manifest, with the shard's rows.
        quarantine: the rows without targets, in order.
    """

    shard: int
    arrays: dict[str, Array]
    quarantine: list[QuarantineEntry]


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """A batch on its way through the teacher.

    Attributes:
        shard: the shard that its rows are in; none of them is in another.
        batch: the samples.
        inputs: float32 (N, ...), or int64 (N, 2, Q) of tokens, pinned where the teacher is on CUDA.
        hard_targets_R: int32, -1 where unknown; None where the store has none. Of sequences the next tokens.
        uniform_R: float64 random numbers, where the encoding draws; else None.
    """

    shard: int
    batch: Batch
    inputs: Tensor
    hard_targets_R: Tensor | None  # noqa: N815
    uniform_R: Tensor | None  # noqa: N815


def dump(
    job: Job,
    writer: StoreWriter,
    shards: Iterable[int],
    bar: Pass,
    is_stopped: Callable[[], bool],
    on_seal: Callable[[Seal], object],
) -> None:
    """Dump shards one after the other, and seal each.

    Args:
        job: what is dumped.
        writer: the store.
        shards: which, in order; taken as the readers come to them.
        bar: told of the rows as they come out of the teacher.
        is_stopped: asked between batches; once it says so, what is not a whole shard by then is dropped.
        on_seal: called with each seal, in the writing thread.

    Raises:
        StoreError: what stopped it; every shard that was sealed stays, and the same dump goes on.
    """
    is_first = not writer.sealed_shards()
    with WriteBehind[EncodedShard](lambda shard: on_seal(write_shard(writer, shard)), SHARDS_BEHIND) as behind:
        encoded = encode_shards(job, shards, bar, lambda: is_stopped() or behind.failed)
        with contextlib.closing(encoded):
            for shard in encoded:
                if is_first:
                    _refuse_if_nothing_is_kept(shard)
                    is_first = False
                behind.put(shard)


def dump_shard(job: Job, writer: StoreWriter, shard: int, bar: Pass) -> Seal:
    """Dump and seal one shard, by itself."""
    (encoded,) = encode_shards(job, [shard], bar, lambda: False)
    return write_shard(writer, encoded)


def write_shard(writer: StoreWriter, shard: EncodedShard) -> Seal:
    """Write a shard durably, and seal it."""
    return writer.write_shard(shard.shard, shard.arrays, shard.quarantine)


def encode_shards(
    job: Job, shards: Iterable[int], bar: Pass, is_stopped: Callable[[], bool]
) -> Generator[EncodedShard, None, None]:
    """What the store keeps of each shard, in order; a shard that is not whole when someone stops is dropped."""
    shard: ShardBuffer | None = None
    with read_ahead(job, shards) as ahead:
        for read, arrays in soft_targets(job, ahead.until(is_stopped)):
            shard = shard or ShardBuffer(job, read.shard)
            shard.put(read, arrays)
            bar.advance(len(read.batch.rows_N))
            if shard.is_full:
                yield shard.encoded()
                shard = None


def soft_targets(job: Job, reads: Iterable[ReadBatch]) -> Iterator[tuple[ReadBatch, dict[str, Array]]]:
    """Each batch with what the encoding keeps of the teacher's logits; on CUDA a few batches late."""
    sparsify = build_sparsify(job.manifest.encoding, job.manifest.temperatures)
    device, on_the_way = job.teacher.device, deque[tuple[ReadBatch, HostArrays]]()
    for read in reads:
        on_the_way.append((read, copy_to_host(sparsified(job, read, sparsify))))
        if len(on_the_way) > ON_THE_WAY.get(device.type, 0):
            arrived, host = on_the_way.popleft()
            yield arrived, host.wait()
    for arrived, host in on_the_way:
        yield arrived, host.wait()


def sparsified(job: Job, read: ReadBatch, sparsify: Sparsify) -> dict[str, Tensor]:
    """What the encoding keeps of a batch, on the teacher's device, of a part of the teacher's rows after the other."""
    device = job.teacher.device

    def moved(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device, non_blocking=True)

    hard_targets_R, uniform_R = moved(read.hard_targets_R), moved(read.uniform_R)
    parts, start = [], 0
    for said in job.speak(read):
        part = slice(start, start + len(said.logits_RC))
        hard = None if hard_targets_R is None else hard_targets_R[part]
        uniform = None if uniform_R is None else uniform_R[part]
        with torch.inference_mode():
            parts.append(sparsify(TeacherRows(said.logits_RC, hard, uniform, said.hidden_RW)))
        start = part.stop
    with torch.inference_mode():
        return joined(parts)


@contextlib.contextmanager
def read_ahead(job: Job, shards: Iterable[int]) -> Iterator[ReadAhead[ReadBatch]]:
    """The batches of shards, read in threads, a few ahead: as many as fit `READ_AHEAD_BYTES`."""
    batch_bytes = job.preprocess.dtype.itemsize * int(np.prod(job.preprocess.shape)) * job.batch_size
    depth = min(READ_AHEAD_BATCHES, max(1, READ_AHEAD_BYTES // batch_bytes))
    with (
        ThreadPoolExecutor(job.num_readers, "reader") as pool,
        ReadAhead(_read_shards(job, shards, pool), depth) as ahead,
    ):
        yield ahead


def _read_shards(job: Job, shards: Iterable[int], pool: ThreadPoolExecutor) -> Iterator[ReadBatch]:
    for shard in shards:
        for start, stop in batches(*job.manifest.layout.shard_bounds(shard), job.batch_size):
            yield read_one(job, shard, start, stop, pool)


def read_one(job: Job, shard: int, start: int, stop: int, pool: ThreadPoolExecutor) -> ReadBatch:
    """Rows [start, stop) of a shard, with all that goes with them through the teacher.

    Raises:
        CorpusError: a token is not of the teacher's vocabulary, or no sample can be read any more.
    """
    return read_rows(job, shard, np.arange(start, stop), pool)


def read_rows(job: Job, shard: int, rows_N: NDArray[np.int64], pool: ThreadPoolExecutor) -> ReadBatch:
    """Any rows, as `read_one` gives those of a shard."""
    manifest = job.manifest
    batch = read_batch(job.corpus, rows_N, job.preprocess, pool)
    hard_targets = None
    if manifest.sequences is not None:
        check_ids(batch.inputs[:, 0], rows_N, manifest.num_classes, f"corpus '{job.corpus.path}'")
        hard_targets = next_tokens(batch.inputs[:, 0], batch.inputs[:, 1]).reshape(-1)
    elif manifest.has_hard_targets and job.corpus.hard_targets is not None:
        hard_targets = job.corpus.hard_targets[rows_N]
    uniform = None
    if isinstance(manifest.encoding, Sample):
        num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
        uniform = torch.from_numpy(uniforms(manifest.encoding.seed, rows_N, num_positions))
    inputs = torch.from_numpy(batch.inputs)
    if job.teacher.device.type == "cuda":
        inputs = inputs.pin_memory()
    return ReadBatch(shard, batch, inputs, None if hard_targets is None else torch.from_numpy(hard_targets), uniform)


class ShardBuffer:
    """The arrays of one shard while its batches come in."""

    def __init__(self, job: Job, shard: int) -> None:
        self._corpus, self._manifest, self._shard = job.corpus, job.manifest, shard
        self._start, self._stop = job.manifest.layout.shard_bounds(shard)
        self._num_rows = 0
        rows = self._stop - self._start
        self._arrays = {spec.name: np.empty((rows, *spec.row_shape), spec.dtype) for spec in job.manifest.arrays}
        self._quarantine: list[QuarantineEntry] = []

    @property
    def is_full(self) -> bool:
        """Whether every row is there."""
        return self._num_rows == self._stop - self._start

    def put(self, read: ReadBatch, arrays: dict[str, Array]) -> None:
        """Take the next batch of rows, and quarantine those without targets."""
        batch = read.batch
        rows = slice(self._num_rows, self._num_rows + len(batch.rows_N))
        refusal_N = np.bitwise_or.reduce(arrays[REFUSAL].reshape(len(batch.rows_N), -1), axis=1)
        reasons = {
            int(position): _what_is_wrong(int(refusal_N[position])) for position in np.flatnonzero(refusal_N)
        } | batch.errors
        refused = sorted(reasons)
        for spec in self._manifest.arrays:
            if spec.name in arrays:
                part = self._arrays[spec.name][rows]
                part[...] = arrays[spec.name].reshape(part.shape)
                part[refused] = spec.fill_value
        self._arrays["sample_digest"][rows] = batch.digests_N
        if "token_ids" in self._arrays:
            self._arrays["token_ids"][rows], self._arrays["position_ids"][rows] = batch.inputs.swapaxes(0, 1)
        if self._manifest.has_hard_targets and read.hard_targets_R is not None:
            self._arrays["hard_target"][rows] = read.hard_targets_R.numpy()
        status_N = self._arrays["status"][rows]
        status_N[...] = STATUS_OK
        for position in refused:
            status_N[position] = STATUS_UNDECODABLE if position in batch.errors else STATUS_NOT_FINITE
            row = int(batch.rows_N[position])
            self._quarantine.append(QuarantineEntry(row, self._corpus.key(row), reasons[position]))
        self._num_rows = rows.stop

    def encoded(self) -> EncodedShard:
        """The shard, once it is full."""
        return EncodedShard(self._shard, self._arrays, self._quarantine)


def _what_is_wrong(refusal: int) -> str:
    if refusal & (HAS_NAN | HAS_POSITIVE_INF | NO_CLASS):
        what = "NaN" if refusal & HAS_NAN else "+inf" if refusal & HAS_POSITIVE_INF else "-inf for every class"
        return f"logits are not finite: {what}"
    return "the hidden state is not finite as it would be stored; with --values float32 it may be"


def _refuse_if_nothing_is_kept(shard: EncodedShard) -> None:
    """Stop before a store is filled with nothing: what fails for the whole first shard will fail for the others."""
    if (shard.arrays["status"] == STATUS_OK).any():
        return
    first, count = shard.quarantine[0], len(shard.quarantine)
    if shard.arrays["status"][0] == STATUS_UNDECODABLE:
        raise CorpusError(
            f"row {first.row} ({first.key!r}): expected some of the first {count} samples to be usable, got none: "
            f"{first.reason}; check the corpus and its preprocessing; nothing was sealed"
        )
    raise TeacherError(
        f"row {first.row} ({first.key!r}): expected finite logits for some of the first {count} samples, got none: "
        f"{first.reason}; check the teacher, its --precision and the preprocessing; nothing was sealed"
    )
