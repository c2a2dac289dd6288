"""The bytes of a corpus's files, on disk or behind a URL, in few requests; and jobs over many files, in order."""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from storage.corpus.protocol import SampleError
from storage.errors import CorpusError
from storage.remote import Place, open_place

T = TypeVar("T")

# Errors of the machine, not of one file.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# Places that lie no further apart than that are read at once, up to so many bytes.
_MERGE_BYTES, _MAX_READ_BYTES = 16 << 10, 8 << 20

_JOBS_AHEAD = 64


class Files(Protocol):
    """The bytes of files of one folder. It pickles as the folder.

    Attributes:
        folder: absolute, or a URL.
    """

    @property
    def folder(self) -> Path | str:
        """Where they are."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            SampleError: this file can't be read.
            CorpusError: none can be read any more.
        """
        ...

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file, each just as many as that.

        Raises:
            CorpusError: the file is shorter, or can't be read.
            RemoteError: it can't be reached.
        """
        ...


@dataclass(frozen=True)
class LocalFiles:
    """The files of a folder on disk."""

    folder: Path

    def read(self, name: str) -> bytes:
        """A whole file."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            if error.errno in MACHINE_ERRORS or not self.folder.is_dir():
                raise CorpusError(
                    f"corpus '{self.folder}': expected its files to open, got '{error.strerror}'; mend that and run "
                    "the same command again"
                ) from error
            raise SampleError(f"expected a file that can be read, got '{error.strerror}'; mend the file") from error

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file, each just as many as that."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = [_pread(descriptor, start, stop - start) for start, stop in ranges]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CorpusError(
                f"corpus file '{path}': expected a file that can be read, got '{error.strerror}'; mend that and run "
                "the same command again"
            ) from error
        for data, (start, stop) in zip(found, ranges, strict=True):
            if len(data) != stop - start:
                raise CorpusError(
                    f"corpus file '{path}': expected bytes {start} to {stop - 1}, got a file of "
                    f"{start + len(data)}; it was cut off since it was opened: take another copy"
                )
        return found


def _pread(descriptor: int, start: int, count: int) -> bytes:
    """Bytes of a file; fewer where it ends."""
    data = os.pread(descriptor, count, start)
    while len(data) < count and (more := os.pread(descriptor, count - len(data), start + len(data))):
        data += more
    return data


@dataclass(frozen=True)
class RemoteFiles:
    """The files below a URL."""

    place: Place

    @property
    def folder(self) -> str:
        """The URL."""
        return self.place.url

    def read(self, name: str) -> bytes:
        """A whole file."""
        raw = self.place.get(name)
        if raw is None:
            raise SampleError("expected a file that can be read, got none there any more; mend the file")
        return raw

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file, each just as many as that."""
        return self.place.get_ranges(name, ranges)


def files_in(folder: Path | str) -> Files:
    """What reads the files of a folder, or of a URL."""
    return LocalFiles(folder) if isinstance(folder, Path) else RemoteFiles(open_place(folder))


def read_merged(files: Files, name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes [start, stop) of a file for each place; places that lie close together are read at once."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(places):
        if merged and start - merged[-1][1] <= _MERGE_BYTES and stop - merged[-1][0] <= _MAX_READ_BYTES:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    pieces, firsts = files.read_ranges(name, merged), [start for start, _ in merged]
    found = []
    for start, stop in places:
        at = int(np.searchsorted(firsts, start, "right")) - 1
        found.append(pieces[at][start - firsts[at] : stop - firsts[at]])
    return found


def in_order(pool: Executor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What jobs give, in their order, with a few of them ahead; on an error those that have not begun are dropped."""
    ahead: deque[Future[T]] = deque()
    try:
        for job in jobs:
            ahead.append(pool.submit(job))
            if len(ahead) > _JOBS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def where_is(files: Files, name: str) -> str:
    """A file, for messages."""
    return f"corpus file '{files.folder}/{name}'"
