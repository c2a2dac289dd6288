"""The tables of a corpus's tars: read where they are needed, and kept while there is room.

Legend: F tars.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.corpus.access import Files, LocalFiles, where_is
from storage.corpus.tar_index import SampleTable, index_tar
from storage.corpus.tar_members import Window
from storage.errors import CorpusError

# Memory for the tables of members; those that were not used for the longest are read again where they are needed.
TABLE_BYTES = 256 << 20

# Bytes that are read for headers at once: where members are small, and behind a member that is jumped over.
_NEAR_ON_DISK, _FAR_ON_DISK = 64 << 10, 1 << 10
_NEAR_BY_URL, _FAR_BY_URL = 256 << 10, 8 << 10


@dataclass(frozen=True, eq=False)
class TarShards:
    """The tars of a corpus.

    Attributes:
        names: below the folder.
        sizes: bytes of each, int64 (F,).
        ends: rows up to the end of each, int64 (F,).
        digests: sha256 of the table of each.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    ends: NDArray[np.int64]
    digests: tuple[bytes, ...]


class Tables(Protocol):
    """The table of each tar."""

    def table(self, index: int) -> SampleTable:
        """The samples of a tar.

        Raises:
            CorpusError: it can't be read any more, or is another one now.
        """
        ...


@dataclass(frozen=True, eq=False)
class HeldTables:
    """Tables that are all there."""

    tables: tuple[SampleTable, ...]

    def table(self, index: int) -> SampleTable:
        """The samples of a tar."""
        return self.tables[index]


class ReadTables:
    """Tables that are read where they are needed, and kept while there is room; threads may share it."""

    def __init__(self, files: Files, shards: TarShards, most_bytes: int = TABLE_BYTES) -> None:
        self._files, self._shards, self._most_bytes = files, shards, most_bytes
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[int, SampleTable] = OrderedDict()
        self._num_bytes = 0

    def __reduce__(self) -> tuple[Callable[..., "ReadTables"], tuple[Any, ...]]:
        return ReadTables, (self._files, self._shards, self._most_bytes)

    def table(self, index: int) -> SampleTable:
        """The samples of a tar."""
        found = self._find(index)
        if found is not None:
            return found
        with self._reading:  # one thread reads what several ask for
            found = self._find(index)
            if found is None:
                found = self._read(index)
                self.keep(index, found)
            return found

    def keep(self, index: int, table: SampleTable) -> None:
        """Keep a table that was read, and forget others where there is no more room."""
        with self._lock:
            self._kept[index] = table
            self._num_bytes += table.num_bytes
            while self._num_bytes > self._most_bytes and len(self._kept) > 1:
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _find(self, index: int) -> SampleTable | None:
        with self._lock:
            if index in self._kept:
                self._kept.move_to_end(index)
            return self._kept.get(index)

    def _read(self, index: int) -> SampleTable:
        shards = self._shards
        table = read_table(self._files, shards.names[index], int(shards.sizes[index]), wants_classes=False)
        if table.digest() != shards.digests[index]:
            raise CorpusError(
                f"{where_is(self._files, shards.names[index])}: expected the members that it had when it was opened, "
                "got others; leave a corpus as it is while it is read, and run the same command again"
            )
        return table


def read_table(files: Files, name: str, size: int, wants_classes: bool) -> SampleTable:
    """The samples of a tar.

    Raises:
        CorpusError: it is no plain tar, is damaged or cut off, or its members do not make samples.
    """
    is_local = isinstance(files, LocalFiles)
    near, far = (_NEAR_ON_DISK, _FAR_ON_DISK) if is_local else (_NEAR_BY_URL, _FAR_BY_URL)

    def read(start: int, stop: int) -> bytes:
        return files.read_ranges(name, [(start, stop)])[0]

    return index_tar(Window(read, size, near, far), where_is(files, name), wants_classes)
