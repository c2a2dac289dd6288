"""Tars of samples, as the webdataset library writes them: images or arrays, read where they lie.

Legend: F tars, N rows.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.corpus.access import Files, LocalFiles, files_in, in_order, read_merged, where_is
from storage.corpus.files import TAR_SUFFIXES, check_one_split, choose_files, find_files
from storage.corpus.images import decode_image
from storage.corpus.labels import NO_LABELS, read_labels
from storage.corpus.matching import Advances
from storage.corpus.npy import decode_npy
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, SampleError, SampleKind, check_range, check_row
from storage.corpus.tar_index import NO_CLASS, SampleTable, shown
from storage.corpus.tar_tables import TABLE_BYTES, HeldTables, ReadTables, Tables, TarShards, read_table
from storage.errors import CorpusError

# Bytes of the largest sample that is read: any image that is decoded fits, packed or not.
MAX_SAMPLE_BYTES = 512 << 20

_THREADS_ON_DISK, _THREADS_BY_URL = 2, 16


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
            index.add(table, where_is(access, name))
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
