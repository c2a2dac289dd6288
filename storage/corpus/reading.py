"""Read rows of a corpus into one array, each with its digest; what can't be read is named, not raised.

Legend: N rows.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.corpus.preprocess import Preprocess
from storage.corpus.protocol import Array, ReadsMany, ReadsRows, SampleError, Samples, read_raws

# Rows that one task of the pool reads: enough to hide what a task costs, few enough to share a batch evenly.
_TASK_ROWS = 16

# Rows that are asked for at once where that takes few requests.
_REQUEST_ROWS = 64

# Bytes that are read at once where only digests are wanted.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a corpus as a model takes them.

    Attributes:
        rows_N: the rows, int64.
        inputs: (N, ...) of the preprocessing's `dtype`, zeros where a sample was refused: float32 for images and
            arrays; int64 (N, 2, P + 1) for tokens, the ids and each one's place in its document.
        digests_N: uint64 digest of each sample; 0 where its bytes could not be read.
        errors: reason by position in the batch (not by row) of each sample that was refused.
    """

    rows_N: NDArray[np.int64]  # noqa: N815
    inputs: Array
    digests_N: NDArray[np.uint64]  # noqa: N815
    errors: dict[int, str] = field(default_factory=dict)


def sample_digest(raw: bytes) -> int:
    """xxh3-64 of a sample's bytes, 1 instead of 0: in a store, 0 means that a sample could not be read.

    Example:
        >>> hex(sample_digest(b"sample"))
        '0x6a58212247c13bb'
    """
    return xxhash.xxh3_64_intdigest(raw) or 1


def read_batch(
    corpus: Samples, rows: Sequence[int] | NDArray[np.int64], preprocess: Preprocess, pool: Executor | None = None
) -> Batch:
    """Rows of a corpus, decoded and preprocessed.

    Args:
        corpus: where they are: a corpus, or a part of one.
        rows: any rows of it, in any order.
        preprocess: how a sample becomes an input.
        pool: threads that share the work where it is done a sample at a time; None does it in this thread.

    Raises:
        CorpusError: no sample can be read any more.
        ValueError: a row that the corpus does not have.
    """
    rows_N = np.asarray(rows, np.int64)
    if rows_N.ndim != 1 or (len(rows_N) and not 0 <= rows_N.min() <= rows_N.max() < corpus.num_samples):
        raise ValueError(f"rows: expected numbers from 0 to {corpus.num_samples - 1}, got others")
    if len(rows_N) and isinstance(corpus, ReadsRows):
        try:
            return batch_of(rows_N, corpus.read_rows(rows_N), preprocess)
        except SampleError:
            pass  # one of them can't be read: find out which, a row at a time
    return _read_singly(corpus, rows_N, preprocess, pool)


def batch_of(rows_N: NDArray[np.int64], samples: Array, preprocess: Preprocess) -> Batch:
    """Rows whose samples (N, ...) have been read already, C order, little-endian.

    Raises:
        SampleError: the samples can't be preprocessed.
    """
    return Batch(rows_N, preprocess.apply_rows(samples), _row_digests(samples))


def _read_singly(corpus: Samples, rows_N: NDArray[np.int64], preprocess: Preprocess, pool: Executor | None) -> Batch:
    """What `read_batch` gives, a sample at a time; where many are read in few requests, these come before the rest."""
    inputs = np.zeros((len(rows_N), *preprocess.shape), preprocess.dtype)
    batch = Batch(rows_N, inputs, np.zeros(len(rows_N), np.uint64))
    fetched = _fetch(corpus, rows_N, pool) if isinstance(corpus, ReadsMany) else None

    def raw_at(position: int) -> bytes:
        if fetched is None:
            return corpus.read_raw(int(rows_N[position]))
        raw = fetched[position]
        if isinstance(raw, SampleError):
            raise raw
        return raw

    def read_some(start: int) -> dict[int, str]:
        errors = {}
        for position in range(start, min(start + _TASK_ROWS, len(rows_N))):
            try:
                raw = raw_at(position)
                batch.digests_N[position] = sample_digest(raw)
                batch.inputs[position] = preprocess.apply(corpus.decode(raw))
            except SampleError as error:
                errors[position] = str(error)
        return errors

    starts = range(0, len(rows_N), _TASK_ROWS)
    for errors in map(read_some, starts) if pool is None else pool.map(read_some, starts):
        batch.errors.update(errors)
    return batch


def _fetch(corpus: Samples, rows_N: NDArray[np.int64], pool: Executor | None) -> list[bytes | SampleError]:
    """The bytes of rows, or why there are none."""
    parts = [rows_N[start : start + _REQUEST_ROWS] for start in range(0, len(rows_N), _REQUEST_ROWS)]

    def fetch(part_N: NDArray[np.int64]) -> list[bytes | SampleError]:
        return read_raws(corpus, part_N)

    return [raw for raws in (map(fetch, parts) if pool is None else pool.map(fetch, parts)) for raw in raws]


def _row_digests(samples: Array) -> NDArray[np.uint64]:
    """Digests of samples (N, ...) in C order, little-endian."""
    if not len(samples):
        return np.zeros(0, np.uint64)
    data = np.ascontiguousarray(samples).reshape(-1).view(np.uint8).data
    step, digest = len(data) // len(samples), xxhash.xxh3_64_intdigest
    digests = np.fromiter(
        (digest(data[start : start + step]) for start in range(0, len(data), step)), np.uint64, len(samples)
    )
    digests[digests == 0] = 1
    return digests


def sample_digests(corpus: Samples, start: int, stop: int, pool: Executor | None = None) -> NDArray[np.uint64]:
    """Digests of rows [start, stop), uint64 (N,); 0 where a sample can't be read.

    Raises:
        CorpusError: no sample can be read any more.
        ValueError: rows that the corpus does not have.
    """
    if not 0 <= start <= stop <= corpus.num_samples:
        raise ValueError(f"rows: expected a range inside [0, {corpus.num_samples}), got [{start}, {stop})")
    digests_N = np.zeros(stop - start, np.uint64)
    block = _REQUEST_ROWS if isinstance(corpus, ReadsMany) else _TASK_ROWS
    if isinstance(corpus, ReadsRows):
        block = max(1, _BLOCK_BYTES // corpus.row_bytes)

    def read_some(first: int) -> None:
        rows_N = np.arange(first, min(first + block, stop))
        if isinstance(corpus, ReadsRows):
            try:
                digests_N[first - start : first - start + block] = _row_digests(corpus.read_rows(rows_N))
                return
            except SampleError:
                pass
        for row, raw in zip(rows_N.tolist(), read_raws(corpus, rows_N), strict=True):
            if not isinstance(raw, SampleError):
                digests_N[row - start] = sample_digest(raw)

    starts = range(start, stop, block)
    for _ in map(read_some, starts) if pool is None else pool.map(read_some, starts):
        pass
    return digests_N
