"""Tars of samples, as the webdataset library writes them: images or arrays, read where they lie.

Legend: F tars, N rows.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.corpus.files import TAR_SUFFIXES, Files, LocalFiles, check_one_split, choose_files, files_in, find_files
from storage.corpus.images import decode_image
from storage.corpus.labels import NO_LABELS, read_labels
from storage.corpus.matching import Advances
from storage.corpus.npy import decode_npy
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, SampleError, SampleKind, check_range, check_row
from storage.corpus.tar_index import NO_CLASS, SampleTable, index_tar, shown
from storage.corpus.tar_members import Window
from storage.errors import CorpusError

T = TypeVar("T")

# Bytes of the largest sample that is read: any image that is decoded fits, packed or not.
MAX_SAMPLE_BYTES = 512 << 20

# Memory for the tables of members; those that were not used for the longest are read again where they are needed.
TABLE_BYTES = 256 << 20

# Samples that lie no further apart than that are read at once, up to so many bytes.
_MERGE_BYTES, _MAX_READ_BYTES = 16 << 10, 8 << 20

# Bytes that are read for headers at once: where members are small, and behind a member that is jumped over.
_NEAR_ON_DISK, _FAR_ON_DISK = 64 << 10, 1 << 10
_NEAR_BY_URL, _FAR_BY_URL = 256 << 10, 8 << 10

_THREADS_ON_DISK, _THREADS_BY_URL, _JOBS_AHEAD = 2, 16, 64


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
                f"{_where(self._files, shards.names[index])}: expected the members that it had when it was opened, got "
                "others; leave a corpus as it is while it is read, and run the same command again"
            )
        return table


@dataclass(frozen=True, eq=False)
class WebDatasetCorpus:
    """Samples in tars. A sample's key is its members' path up to the first dot; its bytes are its image or `.npy`.

    About 4 bytes of index a sample with hard targets, and a table of a tar's members, some 45 bytes a sample, while it
    is in use.
    """

    kind: ClassVar[str] = "webdataset"
    class_names: ClassVar[None] = None

    path: Path | str
    sample_kind: SampleKind
    hard_targets: NDArray[np.int32] | None = field(repr=False)
    fingerprint: str
    num_ignored: int
    shards: TarShards = field(repr=False)
    tables: Tables = field(repr=False)
    files: Files = field(repr=False)

    @property
    def num_samples(self) -> int:
        """Samples in all tars."""
        return int(self.shards.ends[-1])

    def _place(self, row: int) -> tuple[int, int]:
        """The tar of a row, and the row's number in it."""
        check_row(row, self.num_samples)
        index = int(np.searchsorted(self.shards.ends, row, "right"))
        return index, row - (int(self.shards.ends[index - 1]) if index else 0)

    def key(self, row: int) -> str:
        """Path of the sample's members up to the first dot."""
        index, number = self._place(row)
        return self.tables.table(index).key(number)

    def read_raw(self, row: int) -> bytes:
        """The bytes of the image or the `.npy`."""
        (raw,) = self.read_raws(np.array([row], np.int64))
        if isinstance(raw, SampleError):
            raise raw
        return raw

    def read_raws(self, rows_N: NDArray[np.int64]) -> "list[bytes | SampleError]":
        """What `read_raw` gives of each row; samples that lie one behind the other are read at once."""
        by_tar: dict[int, list[tuple[int, int]]] = {}
        for position, row in enumerate(rows_N.tolist()):
            index, number = self._place(row)
            by_tar.setdefault(index, []).append((number, position))
        raws: list[bytes | SampleError] = [b""] * len(rows_N)
        for index, wanted in by_tar.items():
            table, name = self.tables.table(index), self.shards.names[index]
            places = {}
            for number, position in wanted:
                start, size = int(table.starts[number]), int(table.sizes[number])
                if size > MAX_SAMPLE_BYTES:
                    raws[position] = SampleError(
                        f"expected at most {MAX_SAMPLE_BYTES} bytes, got a member of {size}; make the sample smaller"
                    )
                else:
                    places[position] = start, start + size
            for position, raw in zip(places, read_merged(self.files, name, list(places.values())), strict=True):
                raws[position] = raw
        return raws

    def decode(self, raw: bytes) -> Array:
        """The image or the array of a sample's bytes."""
        return decode_image(raw) if self.sample_kind == "image" else decode_npy(raw)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers, with the index of these only."""
        check_range(start, stop, self.num_samples)
        (first, begin), (last, end) = self._place(start), self._place(stop - 1)
        tables, ends = list[SampleTable](), list[int]()
        for index in range(first, last + 1):
            table = self.tables.table(index)
            if table.num_samples:
                low = begin if index == first else 0
                tables.append(table.cut(low, end + 1 if index == last else table.num_samples))
            else:
                tables.append(table)
            ends.append((ends[-1] if ends else 0) + tables[-1].num_samples)
        rows = slice(first, last + 1)
        shards = TarShards(
            self.shards.names[rows], self.shards.sizes[rows], np.array(ends, np.int64), self.shards.digests[rows]
        )
        inner = WebDatasetCorpus(
            self.path, self.sample_kind, None, self.fingerprint, 0, shards, HeldTables(tuple(tables)), self.files
        )
        return part_of(self, start, stop, inner, start)


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


def read_table(files: Files, name: str, size: int, wants_classes: bool) -> SampleTable:
    """The samples of a tar.

    Raises:
        CorpusError: it is no plain tar, is damaged or cut off, or its members do not make samples.
    """
    is_local = isinstance(files, LocalFiles)
    near, far = (_NEAR_ON_DISK, _FAR_ON_DISK) if is_local else (_NEAR_BY_URL, _FAR_BY_URL)

    def read(start: int, stop: int) -> bytes:
        return files.read_ranges(name, [(start, stop)])[0]

    return index_tar(Window(read, size, near, far), _where(files, name), wants_classes)


def open_webdataset(
    path: Path | str,
    labels: str | Path | None = None,
    files: Sequence[str] | None = None,
    progress: Advances | None = None,
) -> WebDatasetCorpus:
    """The samples of tars.

    A sample is an image (jpg, jpeg, png, webp) or an array (`.npy`) with the members beside it that share its path up
    to the first dot. Its hard target is the number in its `.cls`, or `label` or `cls` in its `.json`, where all samples
    have one. Folders, links, devices, hidden files, and what is absolute or has `..` in its path are no samples.

    Args:
        path: one `.tar`, a folder of them, or a pattern, on disk or by URL.
        labels: a file of hard targets instead of those; `none` for none.
        files: names of the tars that are taken, in this order.
        progress: told of each tar that is indexed.

    Raises:
        CorpusError: no tars or no samples, one is damaged, cut off or packed, or its members do not make samples.
    """
    where = f"corpus '{path}'"
    found = choose_files(find_files(path, TAR_SUFFIXES), files, where)
    if not found.entries:
        raise CorpusError(f"{where}: expected .tar files, got none; give a folder, file or pattern of them")
    if files is None:
        check_one_split(found, where)
    access = files_in(found.folder)
    index = _Index(labels is None)
    jobs = [partial(read_table, access, it.name, it.num_bytes, wants_classes=labels is None) for it in found.entries]
    names = tuple(entry.name for entry in found.entries)
    sizes = np.array([entry.num_bytes for entry in found.entries], np.int64)
    with ThreadPoolExecutor(_THREADS_ON_DISK if isinstance(access, LocalFiles) else _THREADS_BY_URL, "tars") as pool:
        for name, table in zip(names, in_order(pool, jobs), strict=True):
            index.add(table, _where(access, name))
            if progress is not None:
                progress.advance(1)
    shards = TarShards(names, sizes, np.cumsum(index.counts, dtype=np.int64), tuple(index.digests))
    if not index.sample_kind:
        example = f", for example {shown(index.example)!r}" if index.example else ""
        raise CorpusError(
            f"{where}: expected samples (NAME.jpg, .png, .webp or .npy), got {index.num_ignored} other member(s)"
            f"{example}; give tars of samples"
        )
    hard_targets = index.hard_targets()
    if labels is not None and labels != NO_LABELS:
        hard_targets = read_labels(labels, int(shards.ends[-1]))
    tables = ReadTables(access, shards)
    for number, table in index.kept.items():
        tables.keep(number, table)
    return WebDatasetCorpus(
        path,
        index.sample_kind,
        hard_targets,
        _fingerprint(shards),
        index.num_ignored + found.num_ignored,
        shards,
        tables,
        access,
    )


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


def _fingerprint(shards: TarShards) -> str:
    state = sha256(f"webdataset {len(shards.names)}".encode())
    for name, size, digest in zip(shards.names, shards.sizes.tolist(), shards.digests, strict=True):
        state.update(f"{len(name)} {name} {size} ".encode("utf-8", "surrogateescape"))
        state.update(digest)
    return state.hexdigest()


class _Index:
    """What is known of all tars while they are indexed."""

    def __init__(self, wants_classes: bool) -> None:
        self.counts, self.digests = list[int](), list[bytes]()
        self.kept: dict[int, SampleTable] = {}
        self.sample_kind: SampleKind | None = None
        self.num_ignored, self.example = 0, b""
        self._classes: list[NDArray[np.int32]] | None = [] if wants_classes else None
        self._num_bytes, self._first = 0, ""

    def add(self, table: SampleTable, where: str) -> None:
        """Take the next tar.

        Raises:
            CorpusError: its samples are of another kind than those before.
        """
        if table.num_samples:
            if self.sample_kind not in (None, table.sample_kind):
                raise CorpusError(
                    f"{where}: expected samples of one kind, got {table.sample_kind}s after {self.sample_kind}s in "
                    f"{self._first}; give tars of one kind"
                )
            self.sample_kind, self._first = table.sample_kind, self._first or where
        self.counts.append(table.num_samples)
        self.digests.append(table.digest())
        self.num_ignored += table.num_ignored
        self.example = self.example or table.example
        classes_N = table.classes_N
        if self._classes is not None and classes_N is not None:
            # one sample without a class, and there are none
            self._classes.append(classes_N)
            if (classes_N == NO_CLASS).any():
                self._classes = None
        if self._num_bytes + table.num_bytes <= TABLE_BYTES:
            self._num_bytes += table.num_bytes
            self.kept[len(self.counts) - 1] = table

    def hard_targets(self) -> NDArray[np.int32] | None:
        """Of all rows; None where a sample has none."""
        return None if self._classes is None else np.concatenate(self._classes)


def _where(files: Files, name: str) -> str:
    return f"corpus file '{files.folder}/{name}'"
