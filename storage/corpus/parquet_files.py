"""Parquet files through pyarrow, on disk or behind a URL: footers at opening, a column of a row group when it is read.

Here and in the modules beside it whose names begin with `parquet` is pyarrow imported, and only when a file is opened.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from storage.corpus.access import Files, LocalFiles, where_is
from storage.corpus.labels import one_line
from storage.errors import CorpusError

T = TypeVar("T")

# Bytes of the largest footer, and of the largest column of a row group, that are read.
MAX_FOOTER_BYTES, MAX_GROUP_BYTES = 256 << 20, 4 << 30

# Rows that a byte of a file may stand for: far more than a corpus of samples has, and few enough to be held.
MAX_ROWS_A_BYTE = 8

# Memory for columns of row groups that were read last, and footers that are kept, in one process.
GROUP_BYTES, _NUM_FOOTERS = 1 << 30, 32

# Bytes of a file's end that are read at once behind a URL: footer and all, for most files.
_TAIL_BYTES = 256 << 10

_MAGIC = b"PAR1"


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file of a corpus.

    Attributes:
        files: where it is.
        name: below the folder.
        num_bytes: its size.
    """

    files: Files
    name: str
    num_bytes: int

    @property
    def where(self) -> str:
        """For messages."""
        return where_is(self.files, self.name)


class _Ranges(io.RawIOBase):
    """A file behind a URL as a stream that pyarrow reads; its end is read once."""

    def __init__(self, file: ParquetFile) -> None:
        self._file, self._at = file, 0
        self._tail_start = max(0, file.num_bytes - _TAIL_BYTES)
        self._tail = file.files.read_ranges(file.name, [(self._tail_start, file.num_bytes)])[0]

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.num_bytes}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Bytes from where it stands; fewer at the end."""
        start, end = self._at, self._file.num_bytes
        stop = end if size is None or size < 0 else min(start + size, end)
        if start >= stop:
            return b""
        if start >= self._tail_start:
            data = self._tail[start - self._tail_start : stop - self._tail_start]
        else:
            data = self._file.files.read_ranges(self._file.name, [(start, stop)])[0]
        self._at = stop
        return data


class _Kept(Generic[T]):
    """Things that take long to make, kept while there is room; what is made is made once, also where threads ask."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, tuple[T, int]] = OrderedDict()
        self._making: dict[object, threading.Lock] = {}

    def found(self, key: object, make: Callable[[], tuple[T, int]]) -> T:
        """What is kept under a key, made where there is none; `make` gives it with its size."""
        while True:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key][0]
                making = self._making.setdefault(key, threading.Lock())
            with making:
                with self._lock:
                    if key in self._kept or self._making.get(key) is not making:
                        continue
                try:
                    made, size = make()
                    self._keep(key, made, size)
                finally:
                    with self._lock:
                        self._making.pop(key, None)
                return made

    def _keep(self, key: object, made: T, size: int) -> None:
        with self._lock:
            self._kept[key] = made, size
            self._size += size
            while self._size > self._most and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1][1]


# Shared by all corpora of a process, and by their parts, so that what several of them need is read once.
_FOOTERS = _Kept[tuple[Any, threading.Lock]](_NUM_FOOTERS)
_GROUPS = _Kept[list[Any]](GROUP_BYTES)


def import_parquet(where: str) -> Any:
    """The module `pyarrow.parquet`.

    Raises:
        CorpusError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CorpusError(
            f"{where}: expected the library pyarrow, got an environment without it; pip install 'logitstore[parquet]'"
        ) from error
    return pyarrow.parquet


@contextmanager
def arrow_errors(where: str) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into one line."""
    try:
        yield
    except CorpusError:
        raise
    except (ValueError, OSError, KeyError, NotImplementedError, TypeError, MemoryError, IndexError) as error:
        raise CorpusError(
            f"{where}: expected a whole Parquet file, got a damaged one, or one that pyarrow does not read "
            f"({one_line(error)}); take another copy"
        ) from error


def open_footer(file: ParquetFile, dictionary: str | None = None) -> tuple[Any, threading.Lock]:
    """A file as pyarrow opens it, and the lock under which it is used; the last ones are kept open.

    Args:
        file: which.
        dictionary: column whose equal values are kept once, so that a small file can't become a large column.

    Raises:
        CorpusError: it is no Parquet file, or is damaged.
    """
    key = (file.files, file.name, file.num_bytes, dictionary)
    return _FOOTERS.found(key, lambda: ((open_alone(file, dictionary), threading.Lock()), 1))


def open_alone(file: ParquetFile, dictionary: str | None) -> Any:
    """A file as pyarrow opens it, for one thread; see `open_footer`."""
    parquet = import_parquet(file.where)
    _check_ends(file)
    with arrow_errors(file.where):
        source: Any = _Ranges(file)
        if isinstance(file.files, LocalFiles):
            source = str(file.files.folder / file.name)
        names = None if dictionary is None else [dictionary]
        return parquet.ParquetFile(source, read_dictionary=names, pre_buffer=True)


def _check_ends(file: ParquetFile) -> None:
    """Refuse what is no Parquet file, or claims a footer that is larger than one is."""
    if file.num_bytes < 12:
        raise CorpusError(f"{file.where}: expected a Parquet file, got {file.num_bytes} bytes; take another copy")
    head, tail = file.files.read_ranges(file.name, [(0, 4), (file.num_bytes - 8, file.num_bytes)])
    if head != _MAGIC or tail[4:] != _MAGIC:
        what = "one that is cut off" if head == _MAGIC else f"one that starts with {head.hex(' ')}"
        raise CorpusError(f"{file.where}: expected a Parquet file, got {what}; take another copy")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(MAX_FOOTER_BYTES, file.num_bytes - 12):
        raise CorpusError(
            f"{file.where}: expected a footer of at most {min(MAX_FOOTER_BYTES, file.num_bytes - 12)} bytes, got one "
            f"that claims {footer}; it is damaged, take another copy"
        )


def group_rows(file: ParquetFile) -> list[int]:
    """Rows of each row group, as the footer says.

    Raises:
        CorpusError: it says more rows than the file can hold.
    """
    footer, lock = open_footer(file)
    with lock, arrow_errors(file.where):
        rows = [int(footer.metadata.row_group(number).num_rows) for number in range(footer.metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) > MAX_ROWS_A_BYTE * file.num_bytes:
        raise CorpusError(
            f"{file.where}: expected at most {MAX_ROWS_A_BYTE} rows a byte, got a footer that claims {sum(rows)} in "
            f"{file.num_bytes} bytes; it is damaged, take another copy"
        )
    return rows


def read_group(file: ParquetFile, group: int, column: str, num_rows: int) -> list[Any]:
    """A column of a row group, as pyarrow arrays one behind the other; columns that were read last are kept.

    Args:
        file: which.
        group: number of the row group.
        column: its path, such as `image.bytes`.
        num_rows: that it must have.

    Raises:
        CorpusError: it is damaged, too large, or has other rows.
    """
    key = (file.files, file.name, file.num_bytes, group, column)

    def make() -> tuple[list[Any], int]:
        footer, lock = open_footer(file, column)
        with lock, arrow_errors(file.where):
            _check_group(file, footer.metadata.row_group(group), column, group)
            table = footer.read_row_group(group, columns=[column], use_threads=False)
            chunks = [_leaf(chunk, column) for chunk in table.column(0).chunks]
        if sum(map(len, chunks)) != num_rows:
            raise CorpusError(
                f"{file.where}: expected {num_rows} rows in row group {group}, got {sum(map(len, chunks))}; it was "
                "changed since it was opened, or is damaged: take another copy"
            )
        return chunks, int(table.nbytes)

    return _GROUPS.found(key, make)


def _leaf(chunk: Any, column: str) -> Any:
    """The values of a path, with nulls where what holds them is null."""
    for _ in column.split(".")[1:]:
        chunk = chunk.flatten()[0]
    return chunk


def _check_group(file: ParquetFile, group: Any, column: str, number: int) -> None:
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema == column and not 0 <= chunk.total_uncompressed_size <= MAX_GROUP_BYTES:
            raise CorpusError(
                f"{file.where}: expected at most {MAX_GROUP_BYTES} bytes of {column!r} in a row group, got one that "
                f"claims {chunk.total_uncompressed_size} (row group {number}); write smaller row groups"
            )
