"""Add members to a series: its records, written in an order that a kill at any moment does no harm to.

A member's record of files is written before its store, and the next record only when that store is finalized. So the
record that is the last is the only one whose store may be missing or unfinished, and it says what to go on with.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.backends import backend_for
from storage.errors import DamageError, MismatchError, PathError
from storage.exclusive import discard_unsealed
from storage.manifest import Manifest
from storage.reader import Store
from storage.records import MANIFEST
from storage.series import differing_facts
from storage.series_records import (
    SERIES,
    FilesRecord,
    SeriesRecord,
    files_name,
    join_path,
    keys_name,
    member_name,
    read_files_record,
    read_series_record,
    records_at,
    shared_facts,
)
from storage.urls import is_url

SHOWN_DIFFERENCES = 3


class SeriesWriter:
    """A series to which members are added. Whoever has one holds `sole_run` of its folder.

    Args:
        path: the folder or URL.
        suffix: of the members of a new series; None takes that of the one that is there, or `.zarr`.

    Attributes:
        path: the folder or URL.
        record: what the members share; None before the first one is made.
        files: the records of all members, those without a store among them.

    Raises:
        PathError: something else is there.
        MismatchError: the series has members of another suffix.
    """

    def __init__(self, path: str, suffix: str | None = None) -> None:
        self.path = path
        self._records = records_at(path)
        self.record: SeriesRecord | None = read_series_record(self._records, path)
        self.files: list[FilesRecord] = []
        while (found := read_files_record(self._records, path, len(self.files))) is not None:
            self.files.append(found)
        if self.record is None and not self.files:
            self._refuse_others()
        if self.record is not None and suffix not in (None, self.record.suffix):
            raise MismatchError(
                f"{path}: expected members in {self.record.suffix}, as the series has them, got {suffix}; leave "
                "--member-format out"
            )
        self.suffix = suffix or ".zarr" if self.record is None else self.record.suffix

    def _refuse_others(self) -> None:
        """Refuse a place that holds something else."""
        folder = Path(self.path)
        is_store = self._records.get(MANIFEST) is not None
        names = [] if is_url(self.path) or not folder.is_dir() else sorted(entry.name for entry in folder.iterdir())
        if is_store or names:
            what = "a store" if is_store else f"a folder with {names[0]!r}"
            raise PathError(
                f"{self.path}: expected a series of stores, an empty folder or nothing, got {what}; give --out another "
                "path"
            )

    def member_path(self, record: FilesRecord) -> str:
        """Where a member's store is, or will be."""
        return join_path(self.path, member_name(record.member, self.suffix))

    def unfinished(self) -> FilesRecord | None:
        """The member that is to be gone on with, or None.

        One of which nothing is sealed is taken back, so that a wrong option can be mended; at a URL, where another run
        may be at it, it is gone on with.
        """
        last = self._last_begun()
        if not self.files and self.record is not None and not is_url(self.path):
            self._records.delete(SERIES)  # nothing is there that agrees with it
            self.record = None
        return last

    def _last_begun(self) -> FilesRecord | None:
        if not self.files or not self.files[-1].num_rows:
            return None
        last = self.files[-1]
        try:
            with Store(backend_for(self.member_path(last))) as store:
                if store.finalized:
                    return None
                if store.sealed_shards() or not discard_unsealed(store):
                    return last
        except PathError:
            if is_url(self.path):
                return last
        self._records.delete(keys_name(last.member))
        self._records.delete(files_name(last.member))
        self.files.pop()
        return None

    def agree(self, manifest: Manifest) -> None:
        """Hold the manifest of a member that is about to be made against the others; the first one sets what is shared.

        Raises:
            MismatchError: it was made from something else than the others.
        """
        shared = shared_facts(manifest)
        if self.record is None:
            record = SeriesRecord(self.suffix, shared)
            self._records.put_new(SERIES, record.to_bytes())
            self.record = read_series_record(self._records, self.path)  # another run's, if that was first
        assert self.record is not None
        different = differing_facts(self.record.shared, shared)
        if different:
            more = f" (and {len(different) - SHOWN_DIFFERENCES} more)" if len(different) > SHOWN_DIFFERENCES else ""
            raise MismatchError(
                f"{self.path}: expected a run that goes on with this series, got other settings: "
                f"{'; '.join(different[:SHOWN_DIFFERENCES])}{more}; use the same settings, or give --out another folder"
            )

    def add(self, record: FilesRecord, hashes_N: NDArray[np.uint64] | None = None) -> None:
        """Write the record of a new member, before its store, and the hashes that its samples are compared by.

        Raises:
            PathError: another run added that member.
        """
        assert record.member == len(self.files)
        if hashes_N is not None and len(hashes_N):
            buffer = io.BytesIO()
            np.save(buffer, hashes_N.astype("<u8"), allow_pickle=False)
            self._records.put(keys_name(record.member), buffer.getvalue())
        if not self._records.put_new(files_name(record.member), record.to_bytes()):
            raise PathError(
                f"{join_path(self.path, files_name(record.member))}: expected the next member to be this run's, got "
                "another's: another teacherdump run --follow writes this series; stop one of them"
            )
        self.files.append(record)

    def hashes(self, record: FilesRecord) -> NDArray[np.uint64]:
        """The hashes of a member's samples, in any order.

        Raises:
            DamageError: there are none, or not so many.
        """
        if not record.num_rows:
            return np.zeros(0, np.uint64)
        name = keys_name(record.member)
        data, found = self._records.get(name), None
        if data is not None:
            try:
                found = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError, OSError):
                found = None
        if found is None or found.dtype != np.dtype("<u8") or found.shape != (record.num_rows,):
            raise DamageError(
                f"{join_path(self.path, name)}: expected the hashes of {record.num_rows} samples, got others or none; "
                "take another copy of it"
            )
        hashes_N: NDArray[np.uint64] = found.astype(np.uint64)
        return hashes_N
