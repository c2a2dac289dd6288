"""The corpus of a series of stores: the files that its members cover, in the members' order, so that rows meet.

Legend: N rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, Corpus, SampleError, SampleKind, check_row, read_raws
from storage.corpus.without import without_rows
from storage.errors import CorpusMismatchError
from storage.layout import from_ranges
from storage.series import Series
from storage.series_records import FilesRecord, series_digest

Opens = Callable[[Sequence[str]], Corpus]


class GrowingCorpus:
    """Samples of a series' rows: row r is the sample that row r of the series was made from. It grows as the series.

    Args:
        series: opened.
        opens: opens the corpus of these files, in this order, at the path that was given.

    Raises:
        CorpusError: a file is not there any more, or can't be used.
        CorpusMismatchError: the files hold another number of samples than when the members were made.
    """

    def __init__(self, series: Series, opens: Opens) -> None:
        self.series = series
        self._opens = opens
        self._num_members = 0
        self._parts: list[Corpus] = []
        self._ends: list[int] = []
        self._hard_targets: NDArray[np.int32] | None = None
        self.grow()

    def grow(self) -> None:
        """Take up the files of the members that the series has by now; it has been refreshed before."""
        new = self.series.files[self._num_members :]
        if not new:
            return
        part = self._opened(new)
        self._parts.append(part)
        self._ends.append(self.num_samples + part.num_samples)
        self._num_members += len(new)
        self._hard_targets = None

    def _opened(self, records: Sequence[FilesRecord]) -> Corpus:
        """The samples of some members, opened at once."""
        corpus = self._opens([file.name for record in records for file in record.files])
        expected = sum(record.num_samples for record in records)
        if corpus.num_samples != expected:
            if len(records) > 1:  # say which one it is
                for record in records:
                    self._opened([record])
            names = ", ".join(file.name for file in records[0].files[:3])
            raise CorpusMismatchError(
                f"corpus '{corpus.path}': expected {expected} samples in the files of member {records[0].member} of "
                f"'{self.series.path}' ({names}{', ...' if len(records[0].files) > 3 else ''}), got "
                f"{corpus.num_samples}; put the files back as they were when it was dumped"
            )
        left_out, first = [np.zeros(0, np.int64)], 0
        for record in records:
            left_out.append(np.asarray(from_ranges(record.left_out), np.int64) + first)
            first += record.num_samples
        return without_rows(corpus, np.concatenate(left_out))

    @property
    def kind(self) -> str:
        """Of the corpus."""
        return self._parts[0].kind

    @property
    def path(self) -> Path | str:
        """Of the corpus."""
        return self._parts[0].path

    @property
    def sample_kind(self) -> SampleKind:
        """Of the corpus."""
        return self._parts[0].sample_kind

    @property
    def num_samples(self) -> int:
        """Rows of the members that were taken up."""
        return self._ends[-1] if self._ends else 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As the files that came last say."""
        return self._parts[-1].class_names

    @property
    def hard_targets(self) -> NDArray[np.int32] | None:
        """Of all rows, where the series has them; what it was dumped without, later files may be without too."""
        if not self.series.manifest.has_hard_targets:
            return None
        if self._hard_targets is None:
            found = [part.hard_targets for part in self._parts]
            known = [values for values in found if values is not None]
            self._hard_targets = np.concatenate(known) if len(known) == len(found) else None
        return self._hard_targets

    @property
    def fingerprint(self) -> str:
        """Of what the index of all files says."""
        return series_digest([part.fingerprint for part in self._parts])

    @property
    def num_ignored(self) -> int:
        """Files that are not samples."""
        return self._parts[-1].num_ignored

    def _place(self, row: int) -> tuple[Corpus, int]:
        check_row(row, self.num_samples)
        part = int(np.searchsorted(self._ends, row, "right"))
        return self._parts[part], row - (self._ends[part - 1] if part else 0)

    def key(self, row: int) -> str:
        """The stable name of a sample."""
        part, own = self._place(row)
        return part.key(own)

    def read_raw(self, row: int) -> bytes:
        """The bytes that a sample is known by."""
        part, own = self._place(row)
        return part.read_raw(own)

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row, or the error that it raises."""
        if len(self._parts) == 1:
            return read_raws(self._parts[0], rows_N)
        found: dict[int, bytes | SampleError] = {}
        part_N = np.searchsorted(self._ends, rows_N, "right")
        for part in np.unique(part_N).tolist():
            places = np.flatnonzero(part_N == part)
            first = self._ends[part - 1] if part else 0
            found.update(zip(places.tolist(), read_raws(self._parts[part], rows_N[places] - first), strict=True))
        return [found[place] for place in range(len(rows_N))]

    def decode(self, raw: bytes) -> Array:
        """The sample of some bytes."""
        return self._parts[0].decode(raw)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers."""
        return part_of(self, start, stop, self, 0)
