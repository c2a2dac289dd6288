"""What a corpus is: an ordered set of samples, each with a row, a key and the bytes that it is known by."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorpusError

if TYPE_CHECKING:
    from storage.corpus.part import CorpusPart

Array = NDArray[Any]
SampleKind = Literal["image", "array", "tokens"]
TokenType = Literal["uint8", "uint16", "uint32", "int32", "int64"]


# Kinds of which one row is read with those around it, and in how many places some rows of them are looked at.
BLOCK_KINDS = ("webdataset", "parquet")
_MAX_RUNS = 8


class SampleError(CorpusError):
    """One sample can't be read, decoded or preprocessed: its row is quarantined, the others go on."""


class Samples(Protocol):
    """Samples that can be read by their rows: a corpus, or a part of one. It can be pickled, for another process.

    Attributes:
        kind: one of `CORPUS_KINDS`, or `stored`.
        path: where the corpus is: absolute, or a URL, as text.
        num_samples: samples in the whole corpus, at least 1; row r is its r-th sample.
        fingerprint: sha256 of what the index says (kind, keys, sizes, shapes, types), as hex. Hard targets are no part
            of it.
        sample_kind: `image` (decodes to uint8 HxWxC, C 1 or 3), `array` (decodes to one row of the array) or `tokens`
            (decodes to uint32 (2, P + 1): token ids and each one's place in its document; see `TokenCorpus`).
    """

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> Path | str: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sample_kind(self) -> SampleKind: ...

    def key(self, row: int) -> str:
        """The stable name of a sample."""
        ...

    def read_raw(self, row: int) -> bytes:
        """The bytes that a sample is known by: its digest is their xxh3-64.

        Raises:
            SampleError: this sample can't be read.
            CorpusError: none can be read any more.
        """
        ...

    def decode(self, raw: bytes) -> Array:
        """The sample of some bytes: uint8 HxWxC for an image, one row for an array, uint32 (2, P + 1) for tokens.

        Raises:
            SampleError: the bytes are no such sample.
        """
        ...


class Corpus(Samples, Protocol):
    """An ordered, indexed set of samples.

    Attributes:
        class_names: names in class order, or None where the corpus has none.
        hard_targets: int32 (num_samples,), the true class of each sample, -1 where unknown; or None.
        num_ignored: files or members that are not samples.
    """

    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def hard_targets(self) -> NDArray[np.int32] | None: ...
    @property
    def num_ignored(self) -> int: ...

    def part(self, start: int, stop: int) -> "CorpusPart":
        """Rows [start, stop) under their numbers in the whole corpus: small to pickle, nothing is opened until used.

        Raises:
            ValueError: rows that the corpus does not have.
        """
        ...


@runtime_checkable
class ReadsMany(Protocol):
    """Samples of which many are read in few requests."""

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row, or the error that it raises.

        Raises:
            CorpusError: none can be read any more.
        """
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """A corpus of samples of one shape, of which many are read at once."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        ...

    def read_rows(self, rows_N: NDArray[np.int64]) -> Array:
        """Samples (N, ...), C order, little-endian: each as `decode(read_raw(row))` gives it.

        Raises:
            SampleError: at least one of them can't be read.
        """
        ...


def check_row(row: int, num_samples: int) -> None:
    """Refuse a row that is not in the corpus.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= row < num_samples:
        raise ValueError(f"row: expected 0 to {num_samples - 1}, got {row}")


def check_range(start: int, stop: int, num_samples: int) -> None:
    """Refuse a range of rows that is empty, or not in the corpus.

    Raises:
        ValueError: it is.
    """
    if not 0 <= start < stop <= num_samples:
        raise ValueError(f"rows: expected a range inside [0, {num_samples}), got [{start}, {stop})")


def read_raws(samples: Samples, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
    """What `read_raw` gives of each row, or the error that it raises; in few requests where the samples allow it.

    Raises:
        CorpusError: none can be read any more.
    """
    if isinstance(samples, ReadsMany):
        return samples.read_raws(rows_N)
    raws: list[bytes | SampleError] = []
    for row in rows_N.tolist():
        try:
            raws.append(samples.read_raw(row))
        except SampleError as error:
            raws.append(error)
    return raws


def spread_rows(num_samples: int, most: int, kind: str = "") -> list[int]:
    """At most `most` rows, spread over all, the first and the last among them.

    Args:
        num_samples: rows of the corpus.
        most: at least 1.
        kind: of the corpus; of one that is read in blocks, the rows lie in a few runs, so that few blocks are read.

    Example:
        >>> spread_rows(100, 4)
        [0, 33, 66, 99]
        >>> spread_rows(100, 16, "parquet")
        [0, 1, 14, 15, 28, 29, 42, 43, 56, 57, 70, 71, 84, 85, 98, 99]
    """
    if kind not in BLOCK_KINDS or most <= _MAX_RUNS or num_samples <= most:
        return sorted({int(row) for row in np.linspace(0, num_samples - 1, most)})
    rows: list[int] = []
    for run in range(_MAX_RUNS):
        between = (num_samples - most) * run // (_MAX_RUNS - 1)
        rows += range(len(rows) + between, (run + 1) * most // _MAX_RUNS + between)
    return rows
