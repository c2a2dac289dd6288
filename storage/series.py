"""A series of stores, read as one: rows and shards are numbered through all members, in order.

Members are only ever added, each of a fixed number of rows, and only the last one may still be written. So the number
of a row, or of a shard, never changes, and whoever reads may look again for more at any time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from storage.arrays import Array
from storage.backends import Backend, CacheSettings, backend_for
from storage.encodings import HeadArrays
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.manifest import Manifest
from storage.reader import Store
from storage.records import QuarantineEntry, Seal, sha256
from storage.series_layout import SeriesLayout
from storage.series_records import (
    SERIES,
    FilesRecord,
    Records,
    SeriesRecord,
    files_name,
    join_path,
    member_name,
    read_files_record,
    read_series_record,
    records_at,
    series_digest,
    shared_facts,
)

SHOWN_CHARACTERS = 60


class Series(Store):
    """Stores of one series, open for reading as one. A context manager; opened again by its path when it is pickled.

    It is a `Store` to whoever reads rows, shards and facts; where one backend is asked for, it says what to do instead.

    Attributes:
        record: what the members share.
        files: the files that each member covers.
        manifest: of the first member, with the rows of all.

    Args:
        path: the folder or URL.
        records: what lies there.
        record: what the members share.
        cache: of the members' objects, where the series is at a URL; None for none.

    Raises:
        NotSealedError: nothing is sealed yet.
        DamageError: a record was changed, or a member is missing.
        MismatchError: a member was made from something else.
    """

    def __init__(self, path: str, records: Records, record: SeriesRecord, cache: CacheSettings | None = None) -> None:
        self._path, self._records, self.record, self._cache = path, records, record, cache
        self.final = None
        self.manifest_sha256 = sha256(record.to_bytes())
        self.files: tuple[FilesRecord, ...] = ()
        self._members: tuple[Store, ...] = ()
        self._next = 0  # the record to look for
        self.refresh()
        if not self._members:
            raise NotSealedError(
                f"{path}: expected a series with a sealed shard, got none yet; wait until teacherdump run --follow has "
                "sealed one, or run it again if it stopped"
            )

    def refresh(self) -> None:
        """Take up members that were added since, and what was sealed of the one that was being written."""
        settled = [pair for pair in zip(self.files, self._members, strict=True) if pair[0].member < self._next]
        entries, unfinished = list(settled), None
        number = self._next
        while (found := read_files_record(self._records, self._path, number)) is not None:
            if unfinished is not None:  # it may have been finalized between the two looks
                entries = [pair for pair in entries if pair[0] is not unfinished]
                entries.append((unfinished, self._open_finalized(unfinished, found)))
                unfinished = None
            number += 1
            if not found.num_rows:
                continue  # its files held nothing new
            store = self._open_member(found)
            if store is not None:
                entries.append((found, store))
            if store is None or not store.finalized:
                unfinished = found
        before = self._members
        if len(entries) < len(before):
            raise DamageError(
                f"{self._path}: expected {len(before)} members, as before, got {len(entries)}; take a copy"
            )
        self._next = number if unfinished is None else unfinished.member
        if entries:
            self._take([store for _, store in entries], [record for record, _ in entries])
        for old in before[len(settled) :]:
            old.close()

    def _open_finalized(self, record: FilesRecord, behind: FilesRecord) -> Store:
        """A member that must be finalized, since another is there behind it."""
        store = self._open_member(record)
        if store is not None and store.finalized:
            return store
        if store is not None:
            store.close()
        raise DamageError(
            f"{self.member_path(record)}: expected a finalized store, since member {behind.member} is there behind it, "
            "got none; take another copy of the series"
        )

    def member_path(self, record: FilesRecord) -> str:
        """Where a member's store lies."""
        return join_path(self._path, member_name(record.member, self.record.suffix))

    def _take(self, members: list[Store], files: list[FilesRecord]) -> None:
        layout = SeriesLayout(tuple(member.manifest.layout for member in members))
        first = members[0].manifest
        fingerprints = [str(member.manifest.corpus.get("fingerprint")) for member in members]
        corpus = {**first.corpus, "fingerprint": series_digest(fingerprints), "num_samples": layout.num_rows}
        self.manifest: Manifest = replace(first, num_rows=layout.num_rows, corpus=corpus)
        self._members, self.files, self._layout = tuple(members), tuple(files), layout

    def _open_member(self, found: FilesRecord) -> Store | None:
        """A member, or None where nothing of it is sealed yet."""
        try:
            store = Store(backend_for(self.member_path(found), self._cache))
        except PathError:
            return None  # not begun
        try:
            check_member(store, self.record, found, self._path)
            if store.finalized or (not _can_t_list(self._path) and store.sealed_shards()):
                return store
        except BaseException:
            store.close()
            raise
        store.close()
        return None

    @property
    def backend(self) -> Backend:  # type: ignore[override]
        """None: each member has its own.

        Raises:
            PathError: always.
        """
        raise one_is_needed(self._path, len(self._members), self.record.suffix)

    @property
    def path(self) -> str:
        """The folder or URL that opens the series."""
        return self._path

    @property
    def layout(self) -> SeriesLayout:
        """How the rows of all members are cut into shards and chunks."""
        return self._layout

    @property
    def members(self) -> tuple[Store, ...]:
        """The stores, in order."""
        return self._members

    @property
    def finalized(self) -> bool:
        """Whether every member that is there is finalized; more may come all the same."""
        return all(member.finalized for member in self._members)

    @property
    def content_digest(self) -> str | None:
        """Identity of what all members that are there say, or None until each is finalized."""
        return self.digest_of(len(self._members)) if self.finalized else None

    @property
    def num_finalized(self) -> int:
        """Members that are finalized: all of them, or all but the last."""
        return sum(member.finalized for member in self._members)

    def digest_of(self, num_members: int) -> str | None:
        """Identity of what the first members say; None where there are not so many that are finalized."""
        digests = [member.content_digest for member in self._members[:num_members]]
        found = [digest for digest in digests if digest is not None]
        return series_digest(found) if len(found) == num_members else None

    def head(self) -> HeadArrays | None:
        """The head of the first member: the same in all."""
        return self._members[0].head()

    def sealed_shards(self) -> tuple[int, ...]:
        """Numbers of the sealed shards, ascending, of the members that were there at the last look."""
        starts = self.layout.first_shards
        return tuple(
            first + shard
            for first, member in zip(starts, self._members, strict=False)
            for shard in member.sealed_shards()
        )

    @property
    def num_sealed_rows(self) -> int:
        """Rows in sealed shards of all members."""
        return sum(member.num_sealed_rows for member in self._members)

    def seal(self, shard: int) -> Seal:
        """The seal of a shard, checked, with the numbers of the series."""
        member, own = self.layout.member_of_shard(shard)
        return self._renumbered(member, shard, self._members[member].seal(own))

    def quarantine(self) -> list[QuarantineEntry]:
        """Rows without targets, with their reasons, in order."""
        return [
            replace(entry, row=entry.row + first)
            for first, member in zip(self.layout.first_rows, self._members, strict=False)
            for entry in member.quarantine()
        ]

    @property
    def num_quarantined(self) -> int:
        """Rows without targets in sealed shards."""
        return sum(member.num_quarantined for member in self._members)

    def check_sealed(self, shard: int) -> None:
        """Check that a shard is sealed, and its seal, once."""
        member, own = self.layout.member_of_shard(shard)
        self._members[member].check_sealed(own)

    def read(
        self, names: Sequence[str], start: int, stop: int, out: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Rows [start, stop) of the named arrays; see `Store.read`."""
        parts = list(self.layout.split_members(start, stop))
        if len(parts) == 1:
            member, first, end = parts[0]
            return self._members[member].read(names, first, end, out)
        specs = {spec.name: spec for spec in self.manifest.arrays}
        for name in names:
            if name not in specs:
                raise ValueError(f"names: expected one of {', '.join(specs)}, got {name!r}")
        found: dict[str, Array] = {
            name: np.empty((stop - start, *specs[name].row_shape), specs[name].dtype) if out is None else out[name]
            for name in names
        }
        done = 0
        for member, first, end in parts:
            place = slice(done, done + end - first)
            self._members[member].read(names, first, end, {name: values[place] for name, values in found.items()})
            done = place.stop
        return found

    def read_scattered(self, name: str, ranges: Sequence[tuple[int, int]], out: Array, positions: Array) -> None:
        """Read ranges of sealed rows of an array into out[positions]; see `Store.read_scattered`."""
        done = 0
        for member, group in groupby(ranges, lambda pair: self.layout.member_of_row(pair[0])[0]):
            first = self.layout.first_rows[member]
            own = [(start - first, stop - first) for start, stop in group]
            count = sum(stop - start for start, stop in own)
            self._members[member].read_scattered(name, own, out, positions[done : done + count])
            done += count

    def read_window(
        self,
        ranges: Sequence[tuple[int, int]],
        outs: Mapping[str, Array],
        positions: Array,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read ranges of sealed rows of several arrays at once; see `Store.read_window`."""
        done = 0
        for member, group in groupby(ranges, lambda pair: self.layout.member_of_row(pair[0])[0]):
            first = self.layout.first_rows[member]
            own = [(start - first, stop - first) for start, stop in group]
            count = sum(stop - start for start, stop in own)
            self._members[member].read_window(own, outs, positions[done : done + count], is_stopped)
            done += count

    def check_shard(self, shard: int) -> Seal:
        """Check a shard's objects and arrays against its seal, and give the seal."""
        member, own = self.layout.member_of_shard(shard)
        return self._renumbered(member, shard, self._members[member].check_shard(own))

    def check_objects(self, seal: Seal) -> None:
        """Check the digests of a shard's objects as they lie; the seal has the numbers of the series."""
        member, own = self.layout.member_of_shard(seal.shard)
        self._members[member].check_objects(self._members[member].seal(own))

    def _renumbered(self, member: int, shard: int, seal: Seal) -> Seal:
        first = self.layout.first_rows[member]
        quarantine = tuple(replace(entry, row=entry.row + first) for entry in seal.quarantine)
        return replace(seal, shard=shard, start=seal.start + first, stop=seal.stop + first, quarantine=quarantine)

    def close(self) -> None:
        """Give files back."""
        for member in self._members:
            member.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _can_t_list(path: str) -> bool:
    """Whether a series lies where nothing can be listed, so that of a member only its end is seen: behind HTTP."""
    return path.startswith(("http://", "https://"))


def check_member(store: Store, record: SeriesRecord, files: FilesRecord, series: str) -> None:
    """Refuse a store that is no member of a series.

    Raises:
        MismatchError: it was made from something else than the others; the message names what differs.
    """
    different = differing_facts(record.shared, shared_facts(store.manifest))
    if different:
        raise MismatchError(
            f"{store.path}: expected a member of the series {series}, got a store made otherwise: "
            f"{'; '.join(different[:3])}; take another copy of the series"
        )
    if store.manifest.num_rows != files.num_rows:
        raise MismatchError(
            f"{store.path}: expected {files.num_rows} rows, as the record of its files says, got "
            f"{store.manifest.num_rows}; take another copy of the series"
        )


def differing_facts(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """`name: the series has THERE, this one HERE`, one for each fact in which they differ."""
    return [
        f"{name}: the series has {_brief(there.get(name))}, this one {_brief(here.get(name))}"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]


def open_series(path: str | Path, cache: CacheSettings | None = None) -> Series | None:
    """The series at a path, open for reading, or None where there is none.

    Raises:
        NotSealedError: nothing of it is sealed yet.
        DamageError: a record was changed, or a member is missing.
        MismatchError: a member was made from something else.
        FormatVersionError: it is of a newer format version.
    """
    records = records_at(path)
    record = read_series_record(records, path)
    return None if record is None else Series(str(path), records, record, cache)


def is_series(path: str | Path) -> bool:
    """Whether a series, and no store, is at a path."""
    return records_at(path).get(SERIES) is not None


def refuse_series(path: str | Path) -> None:
    """Refuse a series where one store is needed.

    Raises:
        PathError: it is a series; the message names a member.
    """
    records = records_at(path)
    record = read_series_record(records, path)
    if record is not None:
        number = 0
        while records.get(files_name(number)) is not None:
            number += 1
        raise one_is_needed(str(path), number, record.suffix)


def one_is_needed(path: str, num_members: int, suffix: str) -> PathError:
    """What to say where one store is needed and a series is given."""
    return PathError(
        f"{path}: expected one store, got a series of {num_members}; give one of its members, such as "
        f"{join_path(path, member_name(0, suffix))}"
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
