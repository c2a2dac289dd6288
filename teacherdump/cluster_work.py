"""What runs in a worker of a cluster: its checks, the trial of the teacher, and the dump of one shard.

The module imports no torch: the driver and the scheduler import it too, for the names of its functions. What a person
can mend comes back as a `Failure`, not as an exception, so that nobody's log fills with tracebacks.
"""

import functools
import importlib.metadata
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from storage.backends import backend_for
from storage.backends.zarr3 import seal_name
from storage.corpus import Preprocess, read_batch, sample_digest
from storage.corpus.part import CorpusPart
from storage.corpus.protocol import SampleError, Samples
from storage.errors import CorpusMismatchError, MismatchError, PathError, StoreError, TeacherError
from storage.reader import Store
from storage.records import MANIFEST, sha256
from storage.writer import StoreWriter
from teacherdump.cluster_bisect import Piece
from teacherdump.config import Combine, Precision
from teacherdump.model_file import teacher_identity
from teacherdump.plan import batches
from teacherdump.report import ShardReport, sealed_bytes
from teacherdump.source import MOST_READERS, TeacherAnswer, TeacherQuestion, try_teacher

if TYPE_CHECKING:
    from teacherdump.dump import Job
    from teacherdump.teacher import Teacher

VERSIONS_THAT_MATTER = ("logitstore", "torch", "numpy")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class TeacherSpec:
    """How a worker loads the teacher, and who that must be.

    Attributes:
        models: absolute paths.
        arch: as the option of that name; and so on.
        combine: of an ensemble.
        device: of the worker.
        precision: of matrix products.
        compile: whether it goes through `torch.compile`.
        trust_pickle: whether a file may run code while it is loaded.
        digest: of the teacher.
    """

    models: tuple[str, ...]
    arch: str | None
    combine: Combine | None
    device: str
    precision: Precision
    compile: bool
    trust_pickle: bool
    digest: str


@dataclass(frozen=True)
class Plan:
    """What every task of a run has in common. Names and numbers only: what they name is opened in the worker.

    Attributes:
        run: names the run among others on the same cluster.
        teacher: how it is loaded.
        out: absolute path, or URL, of the store.
        manifest_sha256: of the store's manifest.
        batch_size: rows of one forward pass.
        num_readers: threads that decode samples; None is one for each core of the worker's machine, at most 8.
        alarms: that are on.
    """

    run: str
    teacher: TeacherSpec
    out: str
    manifest_sha256: str
    batch_size: int
    num_readers: int | None
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class SampleCard:
    """A sample by which a worker is seen to have the corpus: its row, its digest, and what reads it."""

    row: int
    digest: int
    part: CorpusPart


@dataclass(frozen=True)
class Card:
    """What a worker must see before it is given work.

    Attributes:
        versions: of the software, as in the driver.
        teacher: whose file must be there.
        where: how an error names the corpus.
        samples: some, spread over the corpus.
        out: the store; None while there is none.
        manifest_sha256: of its manifest.
    """

    versions: tuple[tuple[str, str | None], ...]
    teacher: TeacherSpec
    where: str
    samples: tuple[SampleCard, ...]
    out: str | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True)
class Failure:
    """What stopped a task, for a person to mend."""

    error: StoreError | ValueError


@dataclass(frozen=True)
class Dropped:
    """The run was asked to stop, and the shard was not whole by then."""


class _StoppedError(Exception):
    """The run was asked to stop."""


def answered(call: Callable[P, T]) -> Callable[P, "T | Failure | Dropped"]:
    """The same function, which returns what a person can mend."""

    @functools.wraps(call)
    def answer(*args: P.args, **kwargs: P.kwargs) -> T | Failure | Dropped:
        try:
            return call(*args, **kwargs)
        except (StoreError, ValueError) as error:
            return Failure(error)
        except _StoppedError:
            return Dropped()

    return answer


class _Bench:
    """What a worker process keeps from task to task: the teacher, the store, and which runs were stopped.

    Attributes:
        turn: held by the shard that is in the teacher.
        stopped: runs that were asked to stop.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.stopped: set[str] = set()
        self._loading = threading.Lock()
        self._teacher: tuple[TeacherSpec, Teacher] | None = None
        self._writer: tuple[str, StoreWriter] | None = None

    def teacher(self, spec: TeacherSpec) -> "Teacher":
        """The teacher, loaded once; another one takes its place in the memory."""
        from teacherdump.teacher import load_teacher

        with self._loading:
            if self._teacher is None or self._teacher[0] != spec:
                self._teacher = None
                teacher = load_teacher(
                    spec.models,
                    spec.arch,
                    spec.combine,
                    spec.device,
                    spec.precision,
                    spec.compile,
                    spec.trust_pickle,
                )
                _check_teacher(teacher.digest, spec)
                self._teacher = (spec, teacher)
            return self._teacher[1]

    def writer(self, plan: Plan) -> StoreWriter:
        """The store, open for writing; opened again where it was begun anew."""
        with self._loading:
            if self._writer is None or self._writer[0] != f"{plan.out} {plan.manifest_sha256}":
                if self._writer is not None:
                    self._writer[1].close()
                self._writer = None
                writer = StoreWriter(Store(backend_for(plan.out)))
                if writer.store.manifest_sha256 != plan.manifest_sha256:
                    writer.close()
                    raise _other_store(plan.out)
                self._writer = (f"{plan.out} {plan.manifest_sha256}", writer)
            return self._writer[1]


# A worker process lives from task to task, and a teacher takes long to load: nothing else can keep it.
_BENCH = _Bench()


class _UntilStopped:
    """A progress bar that nobody sees, and which ends a shard between two batches once its run is stopped."""

    def __init__(self, run: str) -> None:
        self._run = run

    def advance(self, count: int) -> None:
        del count
        if is_dropped(self._run):
            raise _StoppedError

    def note(self, text: str) -> None:
        del text


def dask_setup(worker: object) -> None:
    """Leave Ctrl-C to the driver: a terminal sends it to the workers of a local cluster too."""
    del worker
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_run(run: str) -> None:
    """Drop the shards of a run that are in work, between two batches."""
    _BENCH.stopped.add(run)


def is_dropped(run: str) -> bool:
    """Whether a run was asked to stop."""
    return run in _BENCH.stopped


def writer_of(plan: Plan) -> StoreWriter:
    """The store, open for writing in this process."""
    return _BENCH.writer(plan)


def turn() -> threading.Lock:
    """What whoever uses the teacher of this process holds."""
    return _BENCH.turn


def versions() -> tuple[tuple[str, str | None], ...]:
    """The software that must be the same everywhere, without what a build adds to its version."""
    return tuple((name, _version(name)) for name in VERSIONS_THAT_MATTER)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


@answered
def check_worker(card: Card) -> None:
    """Refuse to work where the corpus, the teacher or the store can't be seen, or with other software.

    Raises:
        StoreError: what the worker does not see, or has otherwise.
    """
    for (name, expected), (_, found) in zip(card.versions, versions(), strict=True):
        if found != expected:
            raise MismatchError(f"{name}: expected version {expected}, as the run has it, got {found}; install that")
    spec = card.teacher
    _check_teacher(str(teacher_identity(spec.models, spec.arch, spec.combine, spec.precision)["digest"]), spec)
    for sample in card.samples:
        _check_sample(sample, card.where)
    if card.out is not None:
        data = backend_for(card.out).get_record(MANIFEST)
        if data is None:
            raise PathError(
                f"store '{card.out}': expected the store that the run writes, got nothing there; give --out a folder "
                "that every worker sees under this path, or a URL"
            )
        if sha256(data) != card.manifest_sha256:
            raise _other_store(card.out)


def _other_store(out: str) -> PathError:
    return PathError(
        f"store '{out}': expected the store that the run writes, got another one there; give --out a folder that every "
        "worker sees under this path, or a URL"
    )


def _check_teacher(digest: str, spec: TeacherSpec) -> None:
    if digest != spec.digest:
        raise TeacherError(
            f"teacher '{spec.models[0]}': expected the one that the run was begun with ({spec.digest[:12]}), got "
            f"another file ({digest[:12]}); give every worker the same"
        )


def _check_sample(sample: SampleCard, where: str) -> None:
    found, reason = 0, "another one"
    try:
        found = sample_digest(sample.part.read_raw(sample.row))
    except SampleError as error:
        reason = f"'{error}'"
    if found != sample.digest:
        raise CorpusMismatchError(
            f"{where}: row {sample.row}: expected the sample that the run sees, got {reason}; give every worker the "
            "same corpus under this path"
        )


@answered
def try_teacher_on(
    spec: TeacherSpec, question: TeacherQuestion, part: CorpusPart, preprocess: Preprocess
) -> TeacherAnswer:
    """The teacher, loaded here and tried on the first samples of a part."""
    teacher = _BENCH.teacher(spec)
    rows = np.arange(part.start, part.stop)[: teacher.max_batch]
    with _BENCH.turn:
        return try_teacher(teacher, replace(question, inputs=read_batch(part, rows, preprocess).inputs))


@answered
def choose_batch_size_of(spec: TeacherSpec, shape: tuple[int, ...], most_rows: int, is_tokens: bool) -> int:
    """Rows of a forward pass, tried on this worker's device."""
    from teacherdump.batch_size import choose_batch_size

    teacher = _BENCH.teacher(spec)
    with _BENCH.turn:
        return choose_batch_size(teacher, shape, most_rows, is_tokens)


@answered
def dump_part(plan: Plan, piece: Piece, part: CorpusPart) -> ShardReport:
    """Dump and seal a shard; one that is sealed already is only reported."""
    from teacherdump.dump import dump_shard

    writer = _BENCH.writer(plan)
    if writer.store.backend.get_record(seal_name(piece.shard)) is not None:
        return _of_seal(writer, piece.shard)
    job = job_of(plan, part)
    report = dump_shard(job, writer, piece.shard, _UntilStopped(plan.run), dict(piece.without), _BENCH.turn)
    return replace(report, worker=_name())


def _of_seal(writer: StoreWriter, shard: int) -> ShardReport:
    """The report of a shard that somebody sealed, as far as its seal tells."""
    seal = writer.store.seal(shard)
    return ShardReport(seal, sealed_bytes(seal, writer.manifest.row_bytes), 0.0, 0.0, 0.0, None, _name())


@answered
def score_part(plan: Plan, piece: Piece, part: CorpusPart) -> None:
    """Put some rows of a shard through reader and teacher, in the batches of the shard, and keep nothing."""
    from teacherdump.dump import read_rows, sparsified
    from teacherdump.sparsify import build_sparsify, copy_to_host

    job, bar = job_of(plan, part), _UntilStopped(plan.run)
    manifest, without = job.manifest, dict(piece.without)
    sparsify = build_sparsify(manifest.encoding, manifest.temperatures)
    with ThreadPoolExecutor(job.num_readers, "reader") as pool:
        for start, stop in batches(*manifest.layout.shard_bounds(piece.shard), plan.batch_size):
            if start >= piece.stop or stop <= piece.start:
                continue
            rows_N = np.arange(start, stop)
            others = {row: "" for row in rows_N.tolist() if not piece.start <= row < piece.stop}
            read = read_rows(job, piece.shard, rows_N, pool, without | others)
            with _BENCH.turn:
                copy_to_host(sparsified(job, read, sparsify)).wait()
            bar.advance(stop - start)


def job_of(plan: Plan, samples: Samples) -> "Job":
    """What samples are dumped from in this process."""
    from teacherdump.dump import Job

    writer = _BENCH.writer(plan)
    num_readers = plan.num_readers or min(MOST_READERS, os.cpu_count() or 1)
    preprocess = Preprocess.from_json(writer.manifest.preprocess)
    teacher = _BENCH.teacher(plan.teacher)
    return Job(
        samples, preprocess, teacher, writer.manifest, plan.batch_size, num_readers, head=None, alarms=plan.alarms
    )


def _name() -> str:
    """Of this worker."""
    from distributed import get_worker

    worker: Any = get_worker()
    return str(worker.name)
