"""A corpus without some of its rows: those whose samples are in another store already, or all but a range.

Legend: M rows that are left out.
"""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import (
    Array,
    Corpus,
    ReadsRows,
    SampleError,
    SampleKind,
    Samples,
    check_range,
    check_row,
    read_raws,
)
from storage.errors import CorpusError


@dataclass(frozen=True, eq=False)
class Kept:
    """Samples that are numbered anew, without those that are left out.

    Attributes:
        samples: what they are read from.
        num_samples: those that are kept.
        fingerprint: of what is kept.
        first: row of the samples that row 0 would be, were none left out.
        shift_M: of each row that is left out, ascending: how many are kept before it.
    """

    samples: Samples = field(repr=False)
    num_samples: int
    fingerprint: str
    first: int
    shift_M: NDArray[np.int64] = field(repr=False)  # noqa: N815

    @property
    def kind(self) -> str:
        """Of the corpus."""
        return self.samples.kind

    @property
    def path(self) -> Path | str:
        """Of the corpus."""
        return self.samples.path

    @property
    def sample_kind(self) -> SampleKind:
        """Of the corpus."""
        return self.samples.sample_kind

    def rows_before(self, rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows in what the samples are read from."""
        return rows_N + self.first + np.searchsorted(self.shift_M, rows_N, "right")

    def row_before(self, row: int) -> int:
        """The row in what the samples are read from."""
        check_row(row, self.num_samples)
        return int(self.rows_before(np.array([row], np.int64))[0])

    def key(self, row: int) -> str:
        """The key that the sample has in the whole corpus."""
        return self.samples.key(self.row_before(row))

    def read_raw(self, row: int) -> bytes:
        """The bytes that a sample is known by."""
        return self.samples.read_raw(self.row_before(row))

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row, or the error that it raises."""
        return read_raws(self.samples, self.rows_before(rows_N))

    def decode(self, raw: bytes) -> Array:
        """The sample of some bytes."""
        return self.samples.decode(raw)


@dataclass(frozen=True, eq=False)
class KeptRows(Kept):
    """The same of samples of one shape, of which many are read at once.

    Attributes:
        row_bytes: bytes of one sample.
    """

    row_bytes: int

    def read_rows(self, rows_N: NDArray[np.int64]) -> Array:
        """Samples (N, ...), C order, little-endian."""
        return cast("ReadsRows", self.samples).read_rows(self.rows_before(rows_N))


class _Whole(Kept):
    """What makes a corpus of the kept rows of a whole one."""

    @property
    def _corpus(self) -> Corpus:
        return cast("Corpus", self.samples)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the corpus."""
        return self._corpus.class_names

    @cached_property
    def hard_targets(self) -> NDArray[np.int32] | None:
        """Of the kept rows."""
        hard_targets = self._corpus.hard_targets
        if hard_targets is None:
            return None
        stop = self.first + self.num_samples + len(self.shift_M)
        return np.delete(hard_targets[self.first : stop], self.shift_M + np.arange(len(self.shift_M)))

    @property
    def whole(self) -> Corpus:
        """The corpus with all its rows."""
        return whole_corpus(self._corpus)

    @property
    def num_ignored(self) -> int:
        """Of the corpus."""
        return self._corpus.num_ignored

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers."""
        first, last = self.row_before(start), self.row_before(stop - 1)
        inside = self.shift_M[(self.shift_M > start) & (self.shift_M < stop)] - start
        inner = self._corpus.part(first, last + 1)
        row_bytes = self.row_bytes if isinstance(self, ReadsRows) else None
        kept = _kept(inner, stop - start, self.fingerprint, first, inside, row_bytes)
        return part_of(self, start, stop, kept, start)


@dataclass(frozen=True, eq=False)
class CorpusWithout(_Whole):
    """A corpus without some of its rows."""


@dataclass(frozen=True, eq=False)
class RowsWithout(_Whole, KeptRows):
    """A corpus without some of its rows, whose samples have one shape."""


def without_rows(corpus: Corpus, rows: "NDArray[np.int64] | set[int]") -> Corpus:
    """A corpus without some of its rows; those behind them move up. Keys and bytes stay as they are.

    Args:
        corpus: any but sequences, which share tokens with their neighbours.
        rows: those that are left out; with none it is the corpus itself.

    Raises:
        CorpusError: nothing is left.
        ValueError: rows that the corpus does not have, or sequences.
    """
    out_M = np.unique(np.fromiter(rows, np.int64) if isinstance(rows, set) else np.asarray(rows, np.int64))
    if not len(out_M):
        return corpus
    if corpus.sample_kind == "tokens":
        raise ValueError("rows: expected a corpus of samples that stand alone, got sequences; leave none out")
    if out_M[0] < 0 or out_M[-1] >= corpus.num_samples:
        raise ValueError(f"rows: expected 0 to {corpus.num_samples - 1}, got {out_M[0]} to {out_M[-1]}")
    num_samples = corpus.num_samples - len(out_M)
    if not num_samples:
        raise CorpusError(f"corpus '{corpus.path}': expected a sample that is kept, got none; give another corpus")
    state = sha256(f"without {corpus.fingerprint}".encode())
    state.update(out_M.astype("<i8").tobytes())
    fingerprint, shift_M = state.hexdigest(), out_M - np.arange(len(out_M))
    if isinstance(corpus, ReadsRows):
        return RowsWithout(corpus, num_samples, fingerprint, 0, shift_M, corpus.row_bytes)
    return CorpusWithout(corpus, num_samples, fingerprint, 0, shift_M)


def rows_from(corpus: Corpus, first: int, num_samples: int) -> Corpus:
    """Rows [first, first + num_samples) of a corpus as a corpus of their own; its fingerprint stays that of the whole.

    Raises:
        ValueError: rows that the corpus does not have.
    """
    check_range(first, first + num_samples, corpus.num_samples)
    none_M = np.zeros(0, np.int64)
    if isinstance(corpus, ReadsRows):
        return RowsWithout(corpus, num_samples, corpus.fingerprint, first, none_M, corpus.row_bytes)
    return CorpusWithout(corpus, num_samples, corpus.fingerprint, first, none_M)


def whole_corpus(corpus: Corpus) -> Corpus:
    """The corpus that some rows were taken of; itself, where it is whole."""
    return corpus.whole if isinstance(corpus, _Whole) else corpus


def _kept(
    samples: Samples, num_samples: int, fingerprint: str, first: int, shift_M: NDArray[np.int64], row_bytes: int | None
) -> Kept:
    if row_bytes is None:
        return Kept(samples, num_samples, fingerprint, first, shift_M)
    return KeptRows(samples, num_samples, fingerprint, first, shift_M, row_bytes)
