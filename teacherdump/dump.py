"""The dump: the road from samples to sealed shards.

    readers -> batch -> teacher -> sparsify on the device -> host -> shard -> writer -> seal

Legend: N rows of a batch, C classes, P positions of a sequence, Q = P + 1 tokens, R flat rows: N, or N * P.

The device never waits for the disk: a thread reads ahead, another one writes behind, and results are copied to the host
while the next batch is in work. What lies between the stages is bounded, so memory does not grow with the rows.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_OK, STATUS_UNDECODABLE, Array
from storage.console import Pass, format_count
from storage.corpus import Batch, Preprocess, read_batch
from storage.corpus.part import hard_targets_at
from storage.corpus.protocol import Samples
from storage.corpus.sequences import check_ids
from storage.encodings import HeadArrays, Sample
from storage.encodings.sample import uniforms
from storage.errors import CorpusError, TeacherError
from storage.manifest import Manifest
from storage.sequences import next_tokens
from storage.writer import StoreWriter
from teacherdump.alarms import shard_alarm
from teacherdump.config import ALARMS
from teacherdump.plan import batches
from teacherdump.report import ShardReport, Stopwatch, mean_entropy, sealed_bytes
from teacherdump.room import Room
from teacherdump.shard import EncodedShard, ShardBuffer
from teacherdump.sparsify import HostArrays, Sparsify, TeacherRows, build_sparsify, copy_to_host, joined
from teacherdump.stages import Queues, ReadAhead, WriteBehind
from teacherdump.teacher import Said, Teacher

READ_AHEAD_BATCHES = 4
READ_AHEAD_BYTES = 256 << 20
BLOCK_ROWS = {"cpu": 16}  # rows that a batch is filled up to a multiple of; none elsewhere
ON_THE_WAY = {"cuda": 2}  # batches whose results are copied while the next is in work; none elsewhere
NOTHING: Mapping[int, str] = MappingProxyType({})
NO_TURN: AbstractContextManager[object] = contextlib.nullcontext()
SHARDS_BEHIND = 1  # shards that wait for the one that is written


@dataclass(frozen=True)
class Job:
    """All that a shard is dumped from.

    Attributes:
        corpus: where the samples are: a corpus, or a part of one with the rows that are dumped.
        preprocess: how a sample becomes an input.
        teacher: what gives the logits, on its device.
        manifest: of the store.
        batch_size: rows of one forward pass, at least 1.
        num_readers: threads that decode samples, at least 1.
        head: what a store of hidden states keeps once; else None.
        alarms: that are on.
        is_proven: whether a store before this one shows that teacher and corpus go together; then samples that all
            have no targets are odd ones, and no reason to stop.
        queues: where it is told what waits between the stages.
    """

    corpus: Samples
    preprocess: Preprocess
    teacher: Teacher
    manifest: Manifest
    batch_size: int
    num_readers: int
    head: HeadArrays | None = None
    alarms: tuple[str, ...] = ALARMS
    is_proven: bool = False
    queues: Queues = field(default_factory=Queues, compare=False, repr=False)

    def speak(self, read: "ReadBatch") -> Iterator[Said]:
        """What the teacher says of a batch, in parts that make up its flat rows."""
        inputs = read.inputs.to(self.teacher.device, non_blocking=True)
        keeps_hidden = self.manifest.encoding.name == "hidden"
        if self.manifest.sequences is None:
            return speak_in_whole_blocks(self.teacher, inputs, keeps_hidden)
        run = read.batch.inputs
        if read.left_out:  # zeros that stand in for a sample are no document
            run = np.delete(run, read.left_out, axis=0)
        is_one_document = bool((run[:, 1, 1:-1] != 0).all())
        return self.teacher.speak_tokens(inputs, self.manifest.num_classes, keeps_hidden, is_one_document)


def speak_in_whole_blocks(teacher: Teacher, inputs: Tensor, keeps_hidden: bool) -> Iterator[Said]:
    """What a teacher says of samples (N, ...); a batch of an odd size is filled up with zeros, and these are cut off.

    On a CPU a matrix product of few odd rows gives other last bits with another number of threads; of whole blocks of
    rows it does not. So a worker with its share of the cores says what a run with all of them says.
    """
    num_rows = len(inputs)
    num_filled = -num_rows % BLOCK_ROWS.get(teacher.device.type, 1)
    if num_filled and num_rows + num_filled <= (teacher.max_batch or num_rows + num_filled):
        inputs = torch.cat([inputs, inputs.new_zeros(num_filled, *inputs.shape[1:])])
    for said in teacher.speak(inputs, keeps_hidden):
        yield Said(said.logits_RC[:num_rows], None if said.hidden_RW is None else said.hidden_RW[:num_rows])


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """A batch on its way through the teacher.

    Attributes:
        shard: the shard that its rows are in; none of them is in another.
        batch: the samples.
        inputs: float32 (N, ...), or int64 (N, 2, Q) of tokens, pinned where the teacher is on CUDA.
        hard_targets_R: int32, -1 where unknown; None where the store has none. Of sequences the next tokens.
        uniform_R: float64 random numbers, where the encoding draws; else None.
        left_out: positions in the batch whose samples were not read, on purpose.
        seconds: that reading it took.
    """

    shard: int
    batch: Batch
    inputs: Tensor
    hard_targets_R: Tensor | None  # noqa: N815
    uniform_R: Tensor | None  # noqa: N815
    left_out: tuple[int, ...] = ()
    seconds: float = 0.0


def dump(
    job: Job,
    writer: StoreWriter,
    shards: Iterable[int],
    bar: Pass,
    is_stopped: Callable[[], bool],
    on_report: Callable[[ShardReport], object],
    *,
    before_write: Callable[[EncodedShard], object] = lambda _: None,
    room: Room | None = None,
) -> None:
    """Dump shards one after the other, and seal each.

    Args:
        job: what is dumped.
        writer: the store.
        shards: which, in order; taken as the readers come to them.
        bar: told of the rows as they come out of the teacher.
        is_stopped: asked between batches; once it says so, what is not a whole shard by then is dropped.
        on_report: called with what is known of each shard once it is sealed, in the writing thread.
        before_write: called with each shard before it is written, and may refuse it by an error.
        room: how a full disk is waited for; None does not wait.

    Raises:
        StoreError: what stopped it; every shard that was sealed stays, and the same dump goes on.
    """
    is_first, given_up = not (job.is_proven or writer.sealed_shards()), threading.Event()
    room = room or Room(writer.store.path, 0, lambda _: None)

    def write(shard: EncodedShard) -> None:
        num_bytes = sum(values.nbytes for values in shard.arrays.values())
        on_report(
            room.keep_trying(lambda: write_shard(writer, shard), num_bytes, lambda: given_up.is_set() or is_stopped())
        )

    with WriteBehind[EncodedShard](write, SHARDS_BEHIND) as behind:
        job.queues.behind = behind
        encoded = encode_shards(job, shards, bar, lambda: is_stopped() or behind.failed)
        try:
            for shard in encoded:
                if is_first:
                    _refuse_if_nothing_is_kept(shard)
                    is_first = False
                _look_at(job, shard)
                before_write(shard)
                behind.put(shard)
        except BaseException:
            given_up.set()  # what waits for room waits no longer
            raise
        finally:
            encoded.close()


def dump_shard(
    job: Job,
    writer: StoreWriter,
    shard: int,
    bar: Pass,
    without: Mapping[int, str] = NOTHING,
    turn: AbstractContextManager[object] = NO_TURN,
) -> ShardReport:
    """Dump and seal one shard, by itself.

    Args:
        job: what is dumped.
        writer: the store.
        shard: index of the shard.
        bar: told of the rows as they come out of the teacher.
        without: reason by row of samples that are not even read: quarantined as if they could not be decoded, without
            a digest. Batches keep their bounds and shapes, zeros in the place of these samples, so that every other
            row is what it would be with them.
        turn: held while the shard is in the teacher, so that another one of this process is read or written meanwhile.
    """
    (encoded,) = encode_shards(job, [shard], bar, lambda: False, without, turn)
    _look_at(job, encoded)
    return write_shard(writer, encoded)


def _look_at(job: Job, shard: EncodedShard) -> None:
    """Stop before a shard is written that no healthy teacher gives."""
    start, stop = job.manifest.layout.shard_bounds(shard.shard)
    where = f"shard {shard.shard} (rows {format_count(start)} to {format_count(stop - 1)}), before it was written"
    shard_alarm(shard.arrays, job.manifest, job.alarms, where)


def write_shard(writer: StoreWriter, shard: EncodedShard) -> ShardReport:
    """Write a shard durably, and seal it."""
    watch = Stopwatch()
    seal = watch.time(writer.write_shard, shard.shard, shard.arrays, shard.quarantine)
    return ShardReport(
        seal=seal,
        num_bytes=sealed_bytes(seal, writer.manifest.row_bytes),
        seconds_read=shard.seconds_read,
        seconds_teacher=shard.seconds_teacher,
        seconds_write=watch.seconds,
        mean_entropy=mean_entropy(shard.arrays),
    )


def encode_shards(
    job: Job,
    shards: Iterable[int],
    bar: Pass,
    is_stopped: Callable[[], bool],
    without: Mapping[int, str] = NOTHING,
    turn: AbstractContextManager[object] = NO_TURN,
) -> Generator[EncodedShard, None, None]:
    """What the store keeps of each shard, in order; a shard that is not whole when someone stops is dropped."""
    shard: ShardBuffer | None = None
    with read_ahead(job, shards, without) as ahead, turn:
        job.queues.ahead = ahead
        for said in soft_targets(job, ahead.until(is_stopped)):
            shard = shard or ShardBuffer(job, said.read.shard)
            shard.put(said)
            bar.advance(len(said.read.batch.rows_N))
            if shard.is_full:
                yield shard.encoded()
                shard = None


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A batch that came out of the teacher.

    Attributes:
        read: the batch.
        arrays: what the encoding keeps of its logits, and `refusal`.
        seconds: that the teacher took for it, and what is kept of its logits.
    """

    read: ReadBatch
    arrays: dict[str, Array]
    seconds: float


def soft_targets(job: Job, reads: Iterable[ReadBatch]) -> Iterator[SoftTargets]:
    """Each batch with what the encoding keeps of the teacher's logits; on CUDA a few batches late."""
    sparsify = build_sparsify(job.manifest.encoding, job.manifest.temperatures)
    device, on_the_way = job.teacher.device, deque[tuple[ReadBatch, HostArrays, DeviceTime]]()
    for read in reads:
        took = DeviceTime(device)
        on_the_way.append((read, copy_to_host(sparsified(job, read, sparsify)), took))
        took.stop()
        if len(on_the_way) > ON_THE_WAY.get(device.type, 0):
            arrived, host, took = on_the_way.popleft()
            yield SoftTargets(arrived, host.wait(), took.seconds())
    for arrived, host, took in on_the_way:
        yield SoftTargets(arrived, host.wait(), took.seconds())


class DeviceTime:
    """How long a device was at work between two moments: wall time, on CUDA by events that lie in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record(torch.cuda.current_stream(device))
            self._stream = torch.cuda.current_stream(device)
        self._start = self._stop = time.perf_counter()

    def stop(self) -> None:
        """The second moment."""
        self._stop = time.perf_counter()
        if self._events is not None:
            self._events[1].record(self._stream)

    def seconds(self) -> float:
        """The time between them; on CUDA once the device has come to the second."""
        if self._events is None:
            return self._stop - self._start
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


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
def read_ahead(job: Job, shards: Iterable[int], without: Mapping[int, str] = NOTHING) -> Iterator[ReadAhead[ReadBatch]]:
    """The batches of shards, read in threads, a few ahead: as many as fit `READ_AHEAD_BYTES`."""
    batch_bytes = job.preprocess.dtype.itemsize * int(np.prod(job.preprocess.shape)) * job.batch_size
    depth = min(READ_AHEAD_BATCHES, max(1, READ_AHEAD_BYTES // batch_bytes))
    with (
        ThreadPoolExecutor(job.num_readers, "reader") as pool,
        ReadAhead(_read_shards(job, shards, pool, without), depth) as ahead,
    ):
        yield ahead


def _read_shards(
    job: Job, shards: Iterable[int], pool: ThreadPoolExecutor, without: Mapping[int, str]
) -> Iterator[ReadBatch]:
    for shard in shards:
        for start, stop in batches(*job.manifest.layout.shard_bounds(shard), job.batch_size):
            watch = Stopwatch()
            read = watch.time(read_rows, job, shard, np.arange(start, stop), pool, without)
            yield replace(read, seconds=watch.seconds)


def read_one(job: Job, shard: int, start: int, stop: int, pool: ThreadPoolExecutor) -> ReadBatch:
    """Rows [start, stop) of a shard, with all that goes with them through the teacher.

    Raises:
        CorpusError: a token is not of the teacher's vocabulary, or no sample can be read any more.
    """
    return read_rows(job, shard, np.arange(start, stop), pool)


def read_rows(
    job: Job,
    shard: int,
    rows_N: NDArray[np.int64],
    pool: ThreadPoolExecutor,
    without: Mapping[int, str] = NOTHING,
) -> ReadBatch:
    """Any rows, as `read_one` gives those of a shard; of those in `without` nothing is read."""
    manifest = job.manifest
    left_out = tuple(position for position, row in enumerate(rows_N.tolist()) if row in without)
    batch = _read_but(job, rows_N, left_out, pool, without)
    hard_targets = None
    if manifest.sequences is not None:
        check_ids(batch.inputs[:, 0], rows_N, manifest.num_classes, f"corpus '{job.corpus.path}'")
        hard_targets = next_tokens(batch.inputs[:, 0], batch.inputs[:, 1]).reshape(-1)
    elif manifest.has_hard_targets:
        hard_targets = hard_targets_at(job.corpus, rows_N)
    uniform = None
    if isinstance(manifest.encoding, Sample):
        num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
        uniform = torch.from_numpy(uniforms(manifest.encoding.seed, rows_N + manifest.first_row, num_positions))
    inputs = torch.from_numpy(batch.inputs)
    if job.teacher.device.type == "cuda":
        inputs = inputs.pin_memory()
    hard_targets_R = None if hard_targets is None else torch.from_numpy(hard_targets)
    return ReadBatch(shard, batch, inputs, hard_targets_R, uniform, left_out)


def _read_but(
    job: Job, rows_N: NDArray[np.int64], left_out: Sequence[int], pool: ThreadPoolExecutor, without: Mapping[int, str]
) -> Batch:
    """Rows of the corpus, zeros and a reason in the place of those that are left out."""
    if not left_out:
        return read_batch(job.corpus, rows_N, job.preprocess, pool)
    kept = np.delete(np.arange(len(rows_N)), left_out)
    read = read_batch(job.corpus, rows_N[kept], job.preprocess, pool)
    inputs = np.zeros((len(rows_N), *job.preprocess.shape), job.preprocess.dtype)
    digests_N = np.zeros(len(rows_N), np.uint64)
    inputs[kept], digests_N[kept] = read.inputs, read.digests_N
    errors = {position: without[int(rows_N[position])] for position in left_out}
    return Batch(rows_N, inputs, digests_N, errors | {int(kept[at]): text for at, text in read.errors.items()})


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
