"""Parquet files with a column of encoded images; class numbers and names where the files have them.

Legend: F files, N rows.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.corpus.access import Files, LocalFiles, files_in, in_order
from storage.corpus.files import PARQUET_SUFFIXES, check_one_split, choose_files, find_files
from storage.corpus.images import decode_image
from storage.corpus.labels import NO_LABELS, check_labels, read_labels
from storage.corpus.matching import Advances
from storage.corpus.parquet_columns import Columns, FoundColumns, find_columns
from storage.corpus.parquet_files import ParquetFile, arrow_errors, group_rows, open_footer, read_group
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, SampleError, SampleKind, check_range, check_row
from storage.corpus.tar_index import shown
from storage.errors import CorpusError

# Class numbers that are read at once.
_LABEL_ROWS = 1 << 16

_THREADS_ON_DISK, _THREADS_BY_URL = 2, 16


@dataclass(frozen=True, eq=False)
class ParquetCorpus:
    """Encoded images in a column of Parquet files. A sample's bytes are those of its image.

    A sample's key is that of the column `key` where there is one, else the file and the row in it, `FILE:ROW`. Row
    groups are read whole, and the last ones are kept, shared by all of a process.

    Attributes:
        image: path of the column of images.
        key_column: column of keys, or None.
        names: of the files, below the folder.
        sizes: bytes of each file, int64 (F,).
        groups: file, number in it, and rows up to the end, of each row group, int64 (G, 3).
    """

    kind: ClassVar[str] = "parquet"
    sample_kind: ClassVar[SampleKind] = "image"

    path: Path | str
    class_names: tuple[str, ...] | None
    hard_targets: NDArray[np.int32] | None = field(repr=False)
    fingerprint: str
    num_ignored: int
    image: str
    key_column: str | None
    names: tuple[str, ...] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    groups: NDArray[np.int64] = field(repr=False)
    files: Files = field(repr=False)

    @property
    def num_samples(self) -> int:
        """Rows of all files."""
        return int(self.groups[-1, 2])

    def _group_of(self, row: int) -> int:
        """The row group of a row."""
        check_row(row, self.num_samples)
        return int(np.searchsorted(self.groups[:, 2], row, "right"))

    def _first(self, group: int) -> int:
        """First row of a row group."""
        return int(self.groups[group - 1, 2]) if group else 0

    def _column(self, group: int, column: str) -> list[Any]:
        index, number, end = self.groups[group].tolist()
        file = ParquetFile(self.files, self.names[index], int(self.sizes[index]))
        return read_group(file, number, column, end - self._first(group))

    def key(self, row: int) -> str:
        """What the column `key` says, or the file and the row in it."""
        group = self._group_of(row)
        index = int(self.groups[group, 0])
        if self.key_column is not None:
            value = _value_at(self._column(group, self.key_column), row - self._first(group))
            if value is not None:
                return shown(str(value).encode("utf-8", "surrogatepass"))
        first = int(np.searchsorted(self.groups[:, 0], index, "left"))
        return f"{self.names[index]}:{row - self._first(first)}"

    def read_raw(self, row: int) -> bytes:
        """The bytes of the image."""
        (raw,) = self.read_raws(np.array([row], np.int64))
        if isinstance(raw, SampleError):
            raise raw
        return raw

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row; a row group is read once."""
        raws: list[bytes | SampleError] = []
        for row in rows_N.tolist():
            group = self._group_of(row)
            value = _value_at(self._column(group, self.image), row - self._first(group))
            if value is None:
                raws.append(SampleError("expected an image, got null; write one, or leave the row out"))
            else:
                raws.append(value)
        return raws

    def decode(self, raw: bytes) -> Array:
        """The image of its bytes."""
        return decode_image(raw)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers, with the index of their files only."""
        check_range(start, stop, self.num_samples)
        first, last = self._group_of(start), self._group_of(stop - 1)
        files = slice(int(self.groups[first, 0]), int(self.groups[last, 0]) + 1)
        # from the first row group of the first file, so that keys are counted as in the whole
        begin = int(np.searchsorted(self.groups[:, 0], files.start, "left"))
        offset = self._first(begin)
        groups = self.groups[begin : last + 1] - np.array([files.start, 0, offset], np.int64)
        inner = ParquetCorpus(
            self.path,
            None,
            None,
            self.fingerprint,
            0,
            self.image,
            self.key_column,
            self.names[files],
            self.sizes[files],
            groups,
            self.files,
        )
        return part_of(self, start, stop, inner, offset)


def _value_at(chunks: Sequence[Any], row: int) -> Any:
    """A value of arrays that lie one behind the other; None where it is null."""
    for chunk in chunks:
        if row < len(chunk):
            return chunk[row].as_py()
        row -= len(chunk)
    raise AssertionError("a row behind its row group")


@dataclass(frozen=True, eq=False)
class _Indexed:
    """What is known of a file: its columns, rows of each row group, and class numbers."""

    columns: FoundColumns
    rows: list[int]
    classes_N: NDArray[np.int64] | None  # noqa: N815


def open_parquet(
    path: Path | str,
    labels: str | Path | None = None,
    columns: Columns | None = None,
    files: Sequence[str] | None = None,
    progress: Advances | None = None,
) -> ParquetCorpus:
    """The images of Parquet files.

    Args:
        path: one file, a folder of them, or a pattern, on disk or by URL.
        labels: a file of hard targets instead of the column; `none` for none.
        columns: names of columns; what is None there is found.
        files: names of the files that are taken, in this order.
        progress: told of each file that is indexed.

    Raises:
        CorpusError: no files or no rows, one is damaged or has other columns, or a class number can't be.
        ValueError: a column of labels beside `labels`.
    """
    where, columns = f"corpus '{path}'", columns or Columns()
    if labels is not None and columns.label is not None:
        raise ValueError(f"label_column: expected none beside labels '{labels}', got {columns.label!r}; leave one out")
    found = choose_files(find_files(path, PARQUET_SUFFIXES), files, where)
    if not found.entries:
        raise CorpusError(f"{where}: expected .parquet files, got none; give a folder, file or pattern of them")
    if files is None:
        check_one_split(found, where)
    access = files_in(found.folder)
    opened = [ParquetFile(access, entry.name, entry.num_bytes) for entry in found.entries]
    indexed: list[_Indexed] = []
    with ThreadPoolExecutor(_THREADS_ON_DISK if isinstance(access, LocalFiles) else _THREADS_BY_URL, "files") as pool:
        for file, one in zip(
            opened, in_order(pool, (partial(_index, it, columns, labels) for it in opened)), strict=True
        ):
            _check_alike(indexed[0].columns if indexed else one.columns, one.columns, file, opened[0])
            indexed.append(one)
            if progress is not None:
                progress.advance(1)
    places = [(index, number, rows) for index, one in enumerate(indexed) for number, rows in enumerate(one.rows)]
    groups = np.array(places, np.int64).reshape(-1, 3)
    groups[:, 2] = np.cumsum(groups[:, 2])
    if not len(groups) or groups[-1, 2] == 0:
        raise CorpusError(f"{where}: expected at least one row, got none; give files with rows")
    chosen = indexed[0].columns
    hard_targets = None
    if labels is not None and labels != NO_LABELS:
        hard_targets = read_labels(labels, int(groups[-1, 2]))
    elif chosen.label is not None:
        values = np.concatenate([one.classes_N for one in indexed if one.classes_N is not None])
        hard_targets = check_labels(values, f"{where}: column {chosen.label!r}", int(groups[-1, 2]))
    _check_names(chosen, hard_targets, where)
    return ParquetCorpus(
        path=path,
        class_names=chosen.class_names,
        hard_targets=hard_targets,
        fingerprint=_fingerprint(opened, indexed),
        num_ignored=found.num_ignored,
        image=chosen.image,
        key_column=chosen.key,
        names=tuple(file.name for file in opened),
        sizes=np.array([file.num_bytes for file in opened], np.int64),
        groups=groups,
        files=access,
    )


def _index(file: ParquetFile, columns: Columns, labels: str | Path | None) -> _Indexed:
    """Columns and row groups of a file from its footer, and its class numbers."""
    footer, lock = open_footer(file)
    with lock, arrow_errors(file.where):
        found = find_columns(footer.schema_arrow, columns, labels is None, file.where)
    rows = group_rows(file)
    return _Indexed(found, rows, None if found.label is None else _read_classes(file, found.label, sum(rows)))


def _read_classes(file: ParquetFile, label: str, num_rows: int) -> NDArray[np.int64]:
    """Class numbers of a file, -1 where one is null."""
    footer, lock = open_footer(file)
    parts: list[NDArray[np.int64]] = []
    with lock, arrow_errors(file.where):
        batches = footer.iter_batches(_LABEL_ROWS, columns=[label], use_threads=False)
        parts += [batch.column(0).cast("int64").fill_null(-1).to_numpy(zero_copy_only=False) for batch in batches]
    found = np.concatenate([np.zeros(0, np.int64), *parts])
    if len(found) != num_rows:
        raise CorpusError(
            f"{file.where}: expected {num_rows} class numbers in {label!r}, got {len(found)}; it is damaged, take "
            "another copy"
        )
    return found


def _check_alike(first: FoundColumns, other: FoundColumns, file: ParquetFile, first_file: ParquetFile) -> None:
    """Refuse files whose columns or classes are not those of the first."""
    for name, one, two in (
        ("images in the column", first.image, other.image),
        ("class numbers in the column", first.label, other.label),
        ("keys in the column", first.key, other.key),
        ("the class names", first.class_names, other.class_names),
    ):
        if one != two:
            raise CorpusError(
                f"{file.where}: expected {name} {one!r:.200}, as in {first_file.name!r}, got {two!r:.200}; give files "
                "that were written alike"
            )


def _check_names(columns: FoundColumns, hard_targets: NDArray[np.int32] | None, where: str) -> None:
    """Refuse class numbers for which there is no name."""
    names = columns.class_names
    if names is not None and hard_targets is not None and int(hard_targets.max()) >= len(names):
        row = int((hard_targets >= len(names)).argmax())
        raise CorpusError(
            f"{where}: row {row}: expected class numbers below {len(names)}, for which there are names, got "
            f"{hard_targets[row]}; mend the column {columns.label!r}, or ignore it: --labels none"
        )


def _fingerprint(files: Sequence[ParquetFile], indexed: Sequence[_Indexed]) -> str:
    state = sha256(f"parquet {len(files)} {indexed[0].columns.image}".encode("utf-8", "surrogateescape"))
    for file, one in zip(files, indexed, strict=True):
        text = f" {len(file.name)} {file.name} {file.num_bytes} {' '.join(map(str, one.rows))}"
        state.update(text.encode("utf-8", "surrogateescape"))
    return state.hexdigest()
