"""The records of a series: what its members share, and which files of the corpus each of them covers.

A series is a folder, or a place at a URL, with `series.json` and for each member a record of files and a store:
`000000.files.json` beside `000000.zarr`. Records are created once and signed, like seals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.backends.files import clear_os_errors, replace_file, sync_folder, write_new
from storage.errors import DamageError, FormatVersionError
from storage.layout import from_ranges, to_ranges
from storage.manifest import Manifest
from storage.records import checked_record, sha256, signed
from storage.untrusted import MAX_RECORD_BYTES

SERIES = "series.json"
SERIES_FORMAT = "logit-series"
SERIES_VERSION = "1.0"
SUFFIXES = (".zarr", ".h5")
DEDUPES = ("key", "digest")
# Of a member's manifest: what belongs to it alone. All else of its identity is the same in every member.
OF_A_MEMBER = ("num_rows", "format_version")
OF_A_MEMBERS_CORPUS = ("fingerprint", "num_samples")


class Records(Protocol):
    """Small named bytes in one place: a folder, or what a URL names."""

    def get(self, key: str, max_bytes: int | None = None) -> bytes | None:
        """The bytes of a name, or None where there is nothing; more than `max_bytes` are not read, but an error."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write bytes durably if there is nothing of that name; False where there is."""

    def put(self, key: str, data: bytes) -> None:
        """Write bytes durably, over what is there."""

    def delete(self, key: str) -> None:
        """Remove a name; nothing where it is not there."""


@dataclass(frozen=True)
class FolderRecords:
    """Records that are files of a local folder."""

    folder: Path

    def get(self, key: str, max_bytes: int | None = None) -> bytes | None:
        """The bytes of a file, or None where there is none.

        Raises:
            DamageError: the file is larger than `max_bytes`.
        """
        path = self.folder / key
        with clear_os_errors(path):
            try:
                size = path.stat().st_size
                if max_bytes is not None and size > max_bytes:
                    raise DamageError(f"{path}: expected at most {max_bytes} bytes, got {size}; this is no series")
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a file durably if there is none of that name; False where there is one."""
        with clear_os_errors(self.folder / key):
            return write_new(self.folder / key, data)

    def put(self, key: str, data: bytes) -> None:
        """Write a file durably, over what is there."""
        with clear_os_errors(self.folder / key):
            replace_file(self.folder / key, data)

    def delete(self, key: str) -> None:
        """Remove a file; nothing where it is not there."""
        with clear_os_errors(self.folder / key):
            (self.folder / key).unlink(missing_ok=True)
            sync_folder(self.folder)


def records_at(path: str | Path) -> Records:
    """The records at a path or a URL."""
    if "://" in str(path):
        from storage.remote import open_place

        return open_place(str(path))
    return FolderRecords(Path(path))


@dataclass(frozen=True)
class SeriesRecord:
    """What the members of a series share.

    Attributes:
        suffix: of the members' names: `.zarr` or `.h5`.
        shared: the manifest's identity without what is of one member, and its `chunk_rows`.
        format_version: of the series; the members have their own.
    """

    suffix: str
    shared: Mapping[str, Any]
    format_version: str = SERIES_VERSION

    def to_bytes(self) -> bytes:
        """One line of JSON, its own sha256 in it."""
        return signed({"format": SERIES_FORMAT, **vars(self)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "SeriesRecord":
        """The record of its bytes.

        Raises:
            FormatVersionError: a newer format version.
            DamageError: a bit of it was changed, or it is another record.
        """
        value = checked_record(data, where)
        version = str(value.get("format_version"))
        if value.pop("format", None) != SERIES_FORMAT:
            raise DamageError(f"{where}: expected the format {SERIES_FORMAT!r}, got another; this is no series")
        if version.split(".", maxsplit=1)[0] != SERIES_VERSION.split(".", maxsplit=1)[0]:
            raise FormatVersionError(
                f"{where}: expected format version {SERIES_VERSION}, got {version}; install a newer release"
            )
        try:
            record = cls(**{name: value[name] for name in ("suffix", "shared", "format_version")})
        except KeyError as error:
            raise DamageError(f"{where}: expected a series record, got none of {error}; take another copy") from error
        if record.suffix not in SUFFIXES or not isinstance(record.shared, Mapping):
            raise DamageError(f"{where}: expected members in {' or '.join(SUFFIXES)}, got others; take another copy")
        return record


@dataclass(frozen=True)
class CoveredFile:
    """A file of the corpus, as it was when its member was made.

    Attributes:
        name: below the corpus's path, or of the file itself.
        num_bytes: its size.
        version: what else tells whether it was written since, such as a time or an ETag.
    """

    name: str
    num_bytes: int
    version: str


@dataclass(frozen=True)
class FilesRecord:
    """Which files of the corpus a member covers.

    Attributes:
        member: its number, from 0.
        files: in the order of their rows.
        num_rows: rows of the member; at 0 the files hold nothing new, and there is no store.
        left_out: samples of the files that an earlier one made superfluous, as half-open ranges of their places.
        dedupe: by what samples were compared: `key`, `digest`, or None where they were not.
    """

    member: int
    files: tuple[CoveredFile, ...]
    num_rows: int
    left_out: tuple[tuple[int, int], ...] = ()
    dedupe: str | None = None

    @property
    def num_left_out(self) -> int:
        """Samples that were left out."""
        return sum(stop - start for start, stop in self.left_out)

    @property
    def num_samples(self) -> int:
        """Samples in the files, those that were left out among them."""
        return self.num_rows + self.num_left_out

    def to_bytes(self) -> bytes:
        """One line of JSON, its own sha256 in it."""
        return signed(vars(self) | {"files": [[file.name, file.num_bytes, file.version] for file in self.files]})

    @classmethod
    def from_bytes(cls, data: bytes, where: str, member: int) -> "FilesRecord":
        """The record of its bytes.

        Raises:
            DamageError: a bit of it was changed, or it is another member's, or names files elsewhere.
        """
        value = checked_record(data, where)
        try:
            value["files"] = tuple(CoveredFile(str(name), int(size), str(at)) for name, size, at in value["files"])
            value["left_out"] = tuple((int(start), int(stop)) for start, stop in value["left_out"])
            record = cls(**value)
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(f"{where}: expected a record of files, got {error}; take another copy") from error
        edges = [edge for pair in record.left_out for edge in pair]
        if record.member != member or record.num_rows < 0 or edges != sorted(set(edges)) or (edges and edges[0] < 0):
            raise DamageError(f"{where}: expected the files of member {member}, got others; take another copy")
        for file in record.files:
            if file.name.startswith("/") or ".." in file.name.split("/") or "\0" in file.name:
                raise DamageError(
                    f"{where}: expected files of the corpus, got {file.name!r}, which is elsewhere; this is no series"
                )
        return record


def member_name(member: int, suffix: str) -> str:
    """Name of a member's store.

    Example:
        >>> member_name(3, ".zarr")
        '000003.zarr'
    """
    return f"{member:06d}{suffix}"


def files_name(member: int) -> str:
    """Name of the record of a member's files.

    Example:
        >>> files_name(3)
        '000003.files.json'
    """
    return f"{member:06d}.files.json"


def keys_name(member: int) -> str:
    """Name of the hashes of a member's keys, where samples are compared by them."""
    return f"{member:06d}.keys.npy"


def join_path(path: str | Path, name: str) -> str:
    """What lies in a folder, or below a URL."""
    text = str(path)
    return f"{text.rstrip('/')}/{name}" if "://" in text else str(Path(text) / name)


def read_series_record(records: Records, path: str | Path) -> SeriesRecord | None:
    """What the members share, or None where no series is there."""
    data = records.get(SERIES, MAX_RECORD_BYTES)
    return None if data is None else SeriesRecord.from_bytes(data, join_path(path, SERIES))


def read_files_record(records: Records, path: str | Path, member: int) -> FilesRecord | None:
    """The files of a member, or None where there is no such member."""
    name = files_name(member)
    data = records.get(name, MAX_RECORD_BYTES)
    return None if data is None else FilesRecord.from_bytes(data, join_path(path, name), member)


def shared_facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest shares with those of all members of its series, as a JSON object."""
    value = manifest.identity() | {"chunk_rows": manifest.chunk_rows}
    for name in OF_A_MEMBER:
        del value[name]
    value["corpus"] = {name: entry for name, entry in value["corpus"].items() if name not in OF_A_MEMBERS_CORPUS}
    return value


def series_digest(digests: list[str]) -> str:
    """Identity of what the first members of a series say, given the content digest of each."""
    return sha256("".join(f"{line}\n" for line in (SERIES_FORMAT, *digests)).encode())


def left_out_ranges(positions: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending places as half-open ranges."""
    return tuple(to_ranges(positions))


def left_out_places(record: FilesRecord) -> list[int]:
    """Ascending places, among the samples of a member's files, of those that were left out."""
    return from_ranges(record.left_out)
