"""Rows of an array: `.npy` (mapped), `.npz` (in memory), an HDF5 dataset or a Zarr v3 array."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.corpus.idx import take_rows
from storage.corpus.labels import NO_LABELS, check_labels, one_line, read_labels
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, SampleError, SampleKind, check_row
from storage.corpus.tables import READ_ERRORS, Table, open_table, pickled
from storage.errors import CorpusError

# Rows that lie scattered are read with all that lies between them up to this many times their number.
_MAX_SPREAD = 4


@dataclass(frozen=True, eq=False)
class ArrayCorpus:
    """Rows of an array. A sample's key is its row; its bytes are the row's, little-endian and in C order."""

    kind: ClassVar[str] = "arrays"
    sample_kind: ClassVar[SampleKind] = "array"
    class_names: ClassVar[None] = None
    num_ignored: ClassVar[int] = 0

    path: Path | str
    labels: str | Path | None
    array: str | None
    hard_targets: NDArray[np.int32] | None
    fingerprint: str
    values: Table = field(repr=False)

    @property
    def num_samples(self) -> int:
        """Rows of the array."""
        return int(self.values.shape[0])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(int(size) for size in self.values.shape[1:])

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Little-endian type of a value."""
        return little_endian(self.values)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.row_dtype.itemsize

    def key(self, row: int) -> str:
        """The row."""
        check_row(row, self.num_samples)
        return str(row)

    def read_raw(self, row: int) -> bytes:
        """The row's values, little-endian and in C order."""
        check_row(row, self.num_samples)
        return self.read_rows(np.array([row], np.int64)).tobytes()

    def decode(self, raw: bytes) -> Array:
        """The row of its bytes."""
        if len(raw) != self.row_bytes:
            raise SampleError(f"expected {self.row_bytes} bytes of a row, got {len(raw)}; take another copy")
        return np.frombuffer(raw, self.row_dtype).reshape(self.row_shape)

    def read_rows(self, rows_N: NDArray[np.int64]) -> Array:
        """Rows (N, ...) of the array."""
        try:
            rows = _take(self.values, rows_N)
        except READ_ERRORS as error:
            raise SampleError(
                f"expected a row that can be read, got a damaged one ({one_line(error)}); take another copy"
            ) from error
        return np.ascontiguousarray(rows, self.row_dtype)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers; the whole is opened once a process that reads of it."""
        return part_of(self, start, stop)

    def __reduce__(self) -> tuple[Callable[..., "ArrayCorpus"], tuple[Any, ...]]:
        return open_arrays, (self.path, self.labels, self.array)


def little_endian(values: Table) -> np.dtype[Any]:
    """The little-endian type of a table's values."""
    dtype: np.dtype[Any] = np.dtype(values.dtype)
    return dtype.newbyteorder("<")


def open_arrays(path: Path | str, labels: str | Path | None = None, array: str | None = None) -> ArrayCorpus:
    """The rows of an array in a file or a Zarr v3 group, or of a `.npy` behind a URL.

    Args:
        path: `.npy`, `.npz`, HDF5 or Zarr v3; by URL a `.npy`.
        labels: file of hard targets, or `none` for none; None takes the array beside it that is named as one of
            `LABEL_NAMES`.
        array: name of the array, with `/` between groups; None takes the only one that is not named so.

    Raises:
        CorpusError: there is no such array, it holds objects or no rows, or the labels do not fit.
        ValueError: `array` for a file without names.
    """
    where = f"corpus '{path}'"
    values, beside = open_table(path, array, where)
    _check_samples(values, where)
    num_samples = int(values.shape[0])
    hard_targets: NDArray[np.int32] | None = None
    if labels is not None and labels != NO_LABELS:
        hard_targets = read_labels(labels, num_samples)
    elif beside is not None and labels is None:
        hard_targets = check_labels(beside, f"{where}: the labels in it", num_samples)
    dtype = little_endian(values).str
    index = {"kind": "arrays", "shape": [int(size) for size in values.shape], "dtype": dtype}
    fingerprint = sha256(json.dumps(index).encode()).hexdigest()
    return ArrayCorpus(path, labels, array, hard_targets, fingerprint, values)


def _check_samples(values: Table, where: str) -> None:
    dtype = np.dtype(values.dtype)
    if dtype.hasobject:
        raise pickled(where)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise CorpusError(f"{where}: expected numbers of at most 64 bits, got {dtype}; save the samples as numbers")
    if len(values.shape) < 2:
        raise CorpusError(
            f"{where}: expected samples along the first axis, shape (N, ...), got shape {values.shape}; "
            "give the array of samples"
        )
    if 0 in values.shape:
        raise CorpusError(f"{where}: expected at least one sample, got shape {values.shape}; give an array with rows")


def _take(values: Table, rows_N: NDArray[np.int64]) -> Array:
    """Rows of a table, in few reads where it is on disk."""
    if isinstance(values, np.ndarray):
        return take_rows(values, rows_N)
    first, last = int(rows_N.min()), int(rows_N.max())
    if last - first + 1 <= _MAX_SPREAD * len(rows_N):
        return take_rows(np.asarray(values[first : last + 1]), rows_N - first)
    unique, inverse = np.unique(rows_N, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
    rows: Array = np.concatenate([values[int(run[0]) : int(run[-1]) + 1] for run in runs])[inverse]
    return rows
