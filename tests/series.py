"""Series of small stores, written by hand, for the tests of those who read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.corpus import list_files, open_corpus, without_rows
from storage.layout import from_ranges
from storage.reader import open_one_store
from storage.series_records import (
    SERIES,
    CoveredFile,
    FilesRecord,
    FolderRecords,
    SeriesRecord,
    files_name,
    member_name,
    shared_facts,
)
from tests.studenttrain.runs import write_blobs, write_targets


def write_member(
    folder: Path, member: int, num_rows: int, *, left_out: tuple[tuple[int, int], ...] = (), **store: Any
) -> Path:
    """Add a member of blobs to a series in a folder, and `series.json` where it is not there yet.

    Its corpus is written beside it, as `corpus-MEMBER.npz`. Options go to `write_targets`; `suffix` ends its name.
    """
    records, suffix = FolderRecords(folder), store.pop("suffix", ".zarr")
    corpus = open_corpus(write_blobs(folder.parent / f"corpus-{member}.npz", num_rows, seed=member))
    covered = (CoveredFile(f"blobs-{member}.npz", 1000 + member, "1"),)
    records.put_new(files_name(member), FilesRecord(member, covered, num_rows, left_out).to_bytes())
    path = write_targets(folder / member_name(member, suffix), corpus, **{"shard_rows": 8, **store})
    with open_one_store(path) as written:
        records.put_new(SERIES, SeriesRecord(suffix, shared_facts(written.manifest)).to_bytes())
    return path


def write_series(folder: Path, sizes: Sequence[int], **store: Any) -> Path:
    """A series of blobs of so many rows."""
    folder.mkdir(parents=True)
    for member, num_rows in enumerate(sizes):
        write_member(folder, member, num_rows, **store)
    return folder


def write_image_member(
    folder: Path,
    data: Path,
    member: int,
    names: Sequence[str],
    left_out: tuple[tuple[int, int], ...] = (),
    **store: Any,
) -> Path:
    """Add a member of some images of a folder to a series, and `series.json` where it is not there yet."""
    records, suffix = FolderRecords(folder), store.pop("suffix", ".zarr")
    entries = {entry.name: entry for entry in list_files(data, "images")}
    covered = tuple(CoveredFile(name, entries[name].num_bytes, entries[name].version) for name in names)
    corpus = without_rows(open_corpus(data, "images", files=names), set(from_ranges(left_out)))
    folder.mkdir(parents=True, exist_ok=True)
    record = FilesRecord(member, covered, corpus.num_samples, left_out, "digest" if left_out else None)
    records.put_new(files_name(member), record.to_bytes())
    path = write_targets(folder / member_name(member, suffix), corpus, **{"shard_rows": 8, **store})
    with open_one_store(path) as written:
        records.put_new(SERIES, SeriesRecord(suffix, shared_facts(written.manifest)).to_bytes())
    return path
