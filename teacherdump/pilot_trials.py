"""An encoding tried on what a teacher says of a few rows: its bytes, compressed as a store would, and what it gives up.

Legend: N rows, P positions, R flat rows (N, or N P), C classes, T temperatures.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import torch
from numpy.typing import NDArray

from storage.arrays import Array, ArraySpec
from storage.backends.zarr3 import CRC_BYTES, zstd_codec
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.errors import TeacherError
from storage.manifest import Compressor, store_arrays
from storage.scan.reencoding import shortened
from storage.sequences import ROW_ARRAYS
from studenttrain.heads import Head
from teacherdump.config import DumpConfig
from teacherdump.distortion import Lost, Truth, lost, read_back
from teacherdump.dump import Job, ReadBatch
from teacherdump.plan import choose_layout
from teacherdump.rescoring import is_given, parts_of, speak
from teacherdump.sparsify import TeacherRows, build_sparsify

CHUNK_OVERHEAD = CRC_BYTES + 16  # bytes of a chunk beside what is in it: its checksum, and its place in the index


@dataclass(frozen=True)
class AtTemperature:
    """What an encoding gives up at a temperature, in the mean over the pilot's distributions.

    Attributes:
        temperature: one that was asked for.
        kept: mass on the classes that are told apart; None for draws.
        kl: KL(teacher || what a reader gets), nats, as `teacherdump.distortion` has it; None for draws.
        gradient_error: of one distribution, root mean square, over the gradient of a student that knows nothing; of
            draws it is noise, nothing in the mean.
    """

    temperature: float
    kept: float | None
    kl: float | None
    gradient_error: float


@dataclass(frozen=True)
class Candidate:
    """An encoding, and what it would cost and give up.

    Attributes:
        name: for people.
        encoding: as a manifest has it.
        is_chosen: whether it is the one that was asked for.
        compressor: that a run would take.
        row_bytes: of a row on the disk, compressed, all arrays together.
        position_bytes: of a token of a sequence; None where rows are no sequences.
        num_bytes: of all rows, and of a head.
        read_s: seconds of a core to check and decompress a row.
        runs_to_pay: student runs after which the dump and reading took less time than the teacher run live; None for
            never.
        at: what it gives up, at each temperature that it is exact at.
    """

    name: str
    encoding: dict[str, Any]
    is_chosen: bool
    compressor: Compressor
    row_bytes: float
    position_bytes: float | None
    num_bytes: int
    read_s: float
    runs_to_pay: float | None
    at: tuple[AtTemperature, ...]


def runs_to_pay(teacher_s: float, read_s: float, student_epochs: float) -> float | None:
    """Student runs after which a store took less time than the teacher run live in each of them; None for never.

    A run with the teacher live takes teacher_s a row and epoch. A dump takes teacher_s a row once, and a run from it
    read_s a row and epoch: n E teacher_s = teacher_s + n E read_s.

    Example:
        >>> runs_to_pay(1.0, 0.2, 1), runs_to_pay(1.0, 0.2, 5), runs_to_pay(1.0, 1.5, 5)
        (1.25, 0.25, None)
    """
    saved_s = teacher_s - read_s
    return teacher_s / (student_epochs * saved_s) if saved_s > 0 else None


def head_of(job: Job) -> Head | None:
    """The teacher's head in float32, as a store keeps it; None where it has none."""
    try:
        head = job.teacher.head().cut(job.manifest.num_classes)
    except TeacherError:
        return None
    bias_C = None if head.bias_C is None else head.bias_C.detach().float()
    return Head(head.weight_CW.detach().float(), bias_C, float(head.scale), head.soft_cap)


class _Sizer:
    """Bytes of an array on the disk, and seconds to read them back, chunk by chunk of what comes in."""

    def __init__(self, spec: ArraySpec, compressor: Compressor, chunk_units: int) -> None:
        self.spec, self.compressor, self.chunk_units = spec, compressor, chunk_units
        self.waiting: list[Array] = []
        self.num_waiting = self.num_units = self.num_bytes = 0
        self.seconds = 0.0

    def add(self, values: Array) -> None:
        """Take in values, a unit each: rows, or distributions of rows."""
        self.waiting.append(np.ascontiguousarray(values, self.spec.dtype))
        self.num_waiting += len(values)
        if self.num_waiting >= self.chunk_units:
            self._pack(whole_only=True)

    def _pack(self, whole_only: bool) -> None:
        values = np.concatenate(self.waiting)
        stop = len(values) - len(values) % self.chunk_units if whole_only else len(values)
        for start in range(0, stop, self.chunk_units):
            self._measure(np.ascontiguousarray(values[start : min(start + self.chunk_units, stop)]))
        self.waiting = [values[stop:]]
        self.num_waiting = len(values) - stop

    def _measure(self, chunk: Array) -> None:
        self.num_units += len(chunk)
        packed: Any = chunk.tobytes()
        if self.compressor == "zstd":
            settings: Mapping[str, Any] = zstd_codec(self.spec.dtype).to_dict()["configuration"]  # type: ignore[assignment]
            shuffle = numcodecs.blosc.SHUFFLE if settings["shuffle"] == "shuffle" else numcodecs.blosc.NOSHUFFLE
            packed = numcodecs.blosc.compress(
                packed, settings["cname"].encode(), settings["clevel"], shuffle, 0, settings["typesize"]
            )
        self.num_bytes += len(packed) + CHUNK_OVERHEAD
        start = time.perf_counter()
        google_crc32c.value(packed)
        if self.compressor == "zstd":
            numcodecs.blosc.decompress(packed)
        self.seconds += time.perf_counter() - start

    def a_unit(self) -> tuple[float, float]:
        """Bytes and seconds of one unit."""
        if self.num_waiting:
            self._pack(whole_only=False)
        return self.num_bytes / self.num_units, self.seconds / self.num_units


@dataclass
class Trial:
    """An encoding that is tried.

    Attributes:
        encoding: which.
        is_chosen: whether it was asked for.
        temperatures: that it would declare.
        compressor: that a run would take.
        sizers: of each array.
        sums: of KL, kept mass, squared errors and squared gradients at each temperature.
        num_lost: distributions that they are sums of.
    """

    encoding: Encoding
    is_chosen: bool
    temperatures: tuple[float, ...]
    compressor: Compressor
    sizers: dict[str, _Sizer]
    sums: dict[float, NDArray[np.float64]] = field(default_factory=dict)
    num_lost: int = 0

    @classmethod
    def of(cls, job: Job, config: DumpConfig, encoding: Encoding) -> "Trial":
        """The trial of an encoding with the options of a run."""
        manifest = job.manifest
        chosen = (
            replace(manifest.encoding, head_sha256="") if isinstance(manifest.encoding, Hidden) else manifest.encoding
        )
        temperatures = manifest.temperatures
        if isinstance(encoding, Sample) and len(temperatures) > 1:
            temperatures = (1.0,) if 1.0 in temperatures else temperatures[:1]
        compressor = config.compressor or ("zstd" if encoding.name in ("topk", "sample") else "none")
        arrays = store_arrays(
            encoding, manifest.num_classes, len(temperatures), manifest.has_hard_targets, manifest.sequences
        )
        num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
        layout = choose_layout(manifest.num_rows, arrays, config.shard_rows, config.chunk_rows, num_positions)
        sizers = {
            spec.name: _Sizer(spec, compressor, layout.chunk_rows * (1 if spec.name in ROW_ARRAYS else num_positions))
            for spec in arrays
        }
        return cls(encoding, encoding == chosen, temperatures, compressor, sizers)

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Take in arrays of some rows or distributions; others than its own are passed over."""
        for name, values in arrays.items():
            if name in self.sizers:
                self.sizers[name].add(values)

    def lose(self, temperature: float, found: Lost) -> None:
        """Take in what is lost of some distributions."""
        parts = (found.kl_R, found.kept_R, found.error_R, found.gradient_R)
        sums = np.array([float(part.sum()) for part in parts])
        self.sums[temperature] = self.sums.get(temperature, 0.0) + sums
        if temperature == self.temperatures[0]:
            self.num_lost += len(found.kl_R)

    def candidate(
        self, job: Job, student_epochs: float, head: Head | None, num_positions: int, teacher_s: float
    ) -> Candidate:
        """The figures."""
        row_bytes = read_s = 0.0
        for name, sizer in self.sizers.items():
            num_bytes, seconds = sizer.a_unit()
            times = 1 if name in ROW_ARRAYS else num_positions
            row_bytes, read_s = row_bytes + times * num_bytes, read_s + times * seconds
        total = row_bytes * job.corpus.num_samples
        if isinstance(self.encoding, Hidden):
            assert head is not None
            total += 4 * (head.weight_CW.numel() + (0 if head.bias_C is None else head.bias_C.numel()))
        encoding = self.encoding.to_json()
        encoding.pop("head_sha256", None)
        return Candidate(
            name=describe(self.encoding),
            encoding=encoding,
            is_chosen=self.is_chosen,
            compressor=self.compressor,
            row_bytes=row_bytes,
            position_bytes=None if job.manifest.sequences is None else row_bytes / num_positions,
            num_bytes=round(total),
            read_s=read_s,
            runs_to_pay=runs_to_pay(teacher_s, read_s, student_epochs),
            at=tuple(self._at(temperature) for temperature in self.temperatures),
        )

    def _at(self, temperature: float) -> AtTemperature:
        kl, kept, error, gradient = self.sums[temperature].tolist()
        is_known = not math.isnan(kl)
        return AtTemperature(
            temperature,
            kept / self.num_lost if is_known else None,
            kl / self.num_lost if is_known else None,
            math.sqrt(error / max(gradient, 1e-30)),
        )


def describe(encoding: Encoding) -> str:
    """An encoding in some words, such as `topk 64 float16`."""
    size = getattr(encoding, "k", getattr(encoding, "draws", None))
    values = getattr(encoding, "values", None)
    return " ".join(str(part) for part in (encoding.name, size, values) if part is not None)


def try_batch(job: Job, read: ReadBatch, trials: list[Trial], head: Head | None, num_positions: int) -> int:
    """Try every encoding on a batch; how many distributions there were."""
    batch, num_given, start = read.batch, 0, 0
    own: dict[str, Array] = {"status": np.zeros(len(batch.rows_N), np.uint8), "sample_digest": batch.digests_N}
    if job.manifest.sequences is not None:
        own |= {"token_ids": batch.inputs[:, 0], "position_ids": batch.inputs[:, 1]}
    elif read.hard_targets_R is not None:
        own["hard_target"] = read.hard_targets_R.numpy()
    for trial in trials:
        trial.add(own)
    for said in speak(job, read.inputs, head is not None):
        for part in parts_of(said, job.manifest.num_classes):
            some = slice(start, start + len(part.logits_RC))
            rows_R = np.arange(some.start, some.stop) // num_positions
            is_read_R = ~np.isin(rows_R, list(batch.errors))
            given_R = np.flatnonzero(is_given(part, Dense()) & is_read_R)
            if len(given_R):
                index = torch.from_numpy(given_R).to(part.logits_RC.device)
                hard_R = None if read.hard_targets_R is None else read.hard_targets_R[some][given_R].to(index.device)
                hidden_RW = None if part.hidden_RW is None else part.hidden_RW[index]
                rows = TeacherRows(part.logits_RC[index], hard_R, None, hidden_RW)
                drawing = _Drawing(batch.rows_N, num_positions, some.start + given_R)
                with torch.inference_mode():
                    _try_rows(rows, drawing, trials, head)
            num_given += len(given_R)
            start = some.stop
    return num_given


@dataclass(frozen=True)
class _Drawing:
    """Where the random numbers of some distributions come from: rows of a batch, and the places among all of theirs."""

    rows_N: NDArray[np.int64]  # noqa: N815
    num_positions: int
    flat_R: NDArray[np.int64]  # noqa: N815

    def uniforms(self, seed: int) -> NDArray[np.float64]:
        """One for each distribution."""
        return uniforms(seed, self.rows_N, self.num_positions)[self.flat_R]


def _try_rows(rows: TeacherRows, drawing: _Drawing, trials: list[Trial], head: Head | None) -> None:
    """Try every encoding on some distributions."""
    temperatures = sorted({temperature for trial in trials for temperature in trial.temperatures})
    encoded = [(trial, arrays) for trial, arrays in _encoded(rows, drawing, trials)]
    for trial, arrays in encoded:
        trial.add(arrays)
    for temperature in temperatures:
        truth = Truth.of(rows.logits_NC, temperature)
        for trial, arrays in encoded:
            if temperature in trial.temperatures:
                read = read_back(trial.encoding, arrays, temperature, trial.temperatures, head, rows.logits_NC)
                trial.lose(temperature, lost(truth, read))


def _encoded(rows: TeacherRows, drawing: _Drawing, trials: list[Trial]) -> Iterator[tuple[Trial, dict[str, Array]]]:
    """Each trial's arrays; all of topk are cut from one."""
    topk = [trial.encoding.k for trial in trials if isinstance(trial.encoding, TopK)]
    longest: dict[str, Array] = {}
    if topk:
        trial = next(trial for trial in trials if isinstance(trial.encoding, TopK))
        longest = _sparsified(rows, TopK(max(topk), "float32"), trial.temperatures)
    for trial in trials:
        encoding = trial.encoding
        if isinstance(encoding, TopK):
            yield trial, longest | shortened(longest, trial.temperatures, encoding, trial.temperatures)
        elif isinstance(encoding, Sample):
            uniform_N = torch.from_numpy(drawing.uniforms(encoding.seed)).to(rows.logits_NC.device)
            yield trial, _sparsified(replace(rows, uniform_N=uniform_N), encoding, trial.temperatures)
        else:
            yield trial, _sparsified(rows, encoding, trial.temperatures)


def _sparsified(rows: TeacherRows, encoding: Encoding, temperatures: tuple[float, ...]) -> dict[str, Array]:
    return {name: values.cpu().numpy() for name, values in build_sparsify(encoding, temperatures)(rows).items()}
