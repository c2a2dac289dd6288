"""Some rows of a corpus under their own numbers, small enough to send to the process that reads them.

A part of files (images, tar members, Parquet files) carries the index of its own rows. A part of one array or text
names how the whole is opened, which is done once a process.

Legend: N rows.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from storage.corpus.protocol import Array, Corpus, ReadsRows, SampleError, SampleKind, Samples, check_range, read_raws
from storage.errors import CorpusError, CorpusMismatchError

# Corpora that a process keeps open for the parts of them that it is given.
_MAX_OPEN = 4


@dataclass(frozen=True, eq=False)
class CorpusPart:
    """Rows [start, stop) of a corpus, under their numbers in the whole. Nothing is opened until it is used.

    Attributes:
        kind: of the corpus.
        path: of the corpus.
        num_samples: of the whole corpus.
        fingerprint: of the whole corpus.
        sample_kind: of the corpus.
        start: first row.
        stop: behind the last row.
        hard_targets_N: int32 (stop - start,), or None where the corpus has none.
        source: what reads the rows, or how it is opened.
        offset: the corpus's row that is the source's row 0.
    """

    kind: str
    path: Path | str
    num_samples: int
    fingerprint: str
    sample_kind: SampleKind
    start: int
    stop: int
    hard_targets_N: NDArray[np.int32] | None = field(repr=False)  # noqa: N815
    source: "Samples | Reopened" = field(repr=False)
    offset: int

    @property
    def samples(self) -> Samples:
        """What reads the rows; it is opened here, where it is not open yet.

        Raises:
            CorpusError: it can't be opened any more, or is another corpus now.
        """
        return self.source.opened() if isinstance(self.source, Reopened) else self.source

    def key(self, row: int) -> str:
        """The stable name of a sample."""
        return self.samples.key(self._inside(row))

    def read_raw(self, row: int) -> bytes:
        """The bytes that a sample is known by."""
        return self.samples.read_raw(self._inside(row))

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row, or the error that it raises."""
        self._check(rows_N)
        return read_raws(self.samples, rows_N - self.offset)

    def decode(self, raw: bytes) -> Array:
        """The sample of some bytes."""
        return self.samples.decode(raw)

    def _inside(self, row: int) -> int:
        if not self.start <= row < self.stop:
            raise ValueError(f"row: expected {self.start} to {self.stop - 1}, the rows of this part, got {row}")
        return row - self.offset

    def _check(self, rows_N: NDArray[np.int64]) -> None:
        for row in () if not len(rows_N) else (int(rows_N.min()), int(rows_N.max())):
            self._inside(row)


@dataclass(frozen=True, eq=False)
class RowsPart(CorpusPart):
    """A part of a corpus whose samples have one shape, of which many are read at once.

    Attributes:
        row_bytes: bytes of one sample.
    """

    row_bytes: int

    def read_rows(self, rows_N: NDArray[np.int64]) -> Array:
        """Samples (N, ...), C order, little-endian."""
        self._check(rows_N)
        return cast("ReadsRows", self.samples).read_rows(rows_N - self.offset)


@dataclass(frozen=True, eq=False)
class Reopened:
    """How a corpus is opened again, in another process; it is kept open there for its next part.

    Attributes:
        opener: opens it.
        arguments: of the opener, hashable.
        fingerprint: that it must have.
        path: of the corpus, for messages.
    """

    opener: Callable[..., Samples]
    arguments: tuple[Any, ...]
    fingerprint: str
    path: Path | str

    def opened(self) -> Samples:
        """The corpus, opened once a process.

        Raises:
            CorpusError: it can't be opened here.
            CorpusMismatchError: it is another one now, or here.
        """
        try:
            samples = _OPEN.opened(self.opener, self.arguments)
        except OSError as error:
            raise CorpusError(
                f"corpus '{self.path}': expected the corpus that the run was begun with, got "
                f"'{error.strerror or type(error).__name__}'; make it readable for every process of the run"
            ) from error
        if samples.fingerprint != self.fingerprint:
            _OPEN.forget(self.opener, self.arguments)
            raise CorpusMismatchError(
                f"corpus '{self.path}': expected the one that the run was begun with (fingerprint "
                f"{self.fingerprint[:12]}), got another here ({samples.fingerprint[:12]}); give every process the same"
            )
        return samples


class _OpenCorpora:
    """The corpora that were opened last, by how they are opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[Callable[..., Samples], tuple[Any, ...]], Samples] = OrderedDict()

    def opened(self, opener: Callable[..., Samples], arguments: tuple[Any, ...]) -> Samples:
        """The corpus that the opener gives, opened by one thread alone."""
        with self._lock:
            samples = self._found.pop((opener, arguments), None)
            self._found[opener, arguments] = samples = opener(*arguments) if samples is None else samples
            while len(self._found) > _MAX_OPEN:
                self._found.popitem(last=False)
            return samples

    def forget(self, opener: Callable[..., Samples], arguments: tuple[Any, ...]) -> None:
        """Open it anew the next time."""
        with self._lock:
            self._found.pop((opener, arguments), None)


# Opened corpora are kept for the life of a worker process, which has nothing else that lives from task to task.
_OPEN = _OpenCorpora()


def part_of(corpus: Corpus, start: int, stop: int, source: Samples | None = None, offset: int = 0) -> CorpusPart:
    """Rows [start, stop) of a corpus.

    Args:
        corpus: the whole.
        start: first row.
        stop: behind the last row.
        source: what reads the rows, and is small to pickle; None opens the whole corpus again where the part is used.
        offset: the corpus's row that is the source's row 0.

    Raises:
        ValueError: rows that the corpus does not have.
    """
    check_range(start, stop, corpus.num_samples)
    hard_targets = corpus.hard_targets
    reads: Samples | Reopened
    if source is None:
        opener, arguments = cast("tuple[Callable[..., Samples], tuple[Any, ...]]", corpus.__reduce__())
        reads = Reopened(opener, arguments, corpus.fingerprint, corpus.path)
    else:
        reads = source
    values = (
        corpus.kind,
        corpus.path,
        corpus.num_samples,
        corpus.fingerprint,
        corpus.sample_kind,
        start,
        stop,
        None if hard_targets is None else hard_targets[start:stop].copy(),
        reads,
        offset,
    )
    return RowsPart(*values, corpus.row_bytes) if isinstance(corpus, ReadsRows) else CorpusPart(*values)


def hard_targets_at(samples: Samples, rows_N: NDArray[np.int64]) -> NDArray[np.int32] | None:
    """Hard targets (N,) of some rows of a corpus or of a part of one, -1 where unknown; None where it has none."""
    if isinstance(samples, CorpusPart):
        return None if samples.hard_targets_N is None else samples.hard_targets_N[rows_N - samples.start]
    hard_targets: NDArray[np.int32] | None = cast("Corpus", samples).hard_targets
    return None if hard_targets is None else hard_targets[rows_N]
