"""A store as a Zarr v3 group on a local disk: a sharded array for each thing kept.

Writing goes through zarr-python. Reading a run of chunks goes around it: the shard's index is parsed and the chunks are
read straight into the result, with the same checks, since zarr-python's own reading costs five times as much. A test
holds both to the same answers.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from storage.arrays import Array, ArraySpec
from storage.backends.chunks import CRC_BYTES, FileSource, ShardChunks
from storage.backends.files import (
    READ_BYTES,
    clear_os_errors,
    file_digest,
    make_folder,
    only_one,
    replace_file,
    sync_folder,
    write_new,
)
from storage.backends.mapped import MappedShard
from storage.backends.zarr_objects import (
    GROUP,
    begun_keys,
    metadata_bytes,
    metadata_keys,
    seal_name,
    sealed_in,
    shard_bytes,
    shard_key,
    zstd_codec,
)
from storage.errors import DamageError, PathError
from storage.head import HEAD_FOLDER
from storage.manifest import FORMAT_NAME, Manifest
from storage.untrusted import check_record_size, open_inside, parse_json, record_limit, refuse_links

__all__ = [
    "CRC_BYTES",
    "GROUP",
    "ZarrBackend",
    "list_seal_files",
    "lock_beside",
    "read_record",
    "seal_name",
    "zstd_codec",
]

# A store of up to this stays mapped: its pages then count as the process's memory, which the kernel may take back.
MAX_MAPPED_BYTES = 512 << 20
MAX_MAPPED_SHARDS = 256  # each holds an open file


class ZarrBackend:
    """A Zarr v3 group in a local folder, records as plain files beside the arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._specs: dict[str, ArraySpec] = {}
        self._manifest: Manifest | None = None
        self._index = lru_cache(maxsize=256)(self._read_index)
        self._mapped = lru_cache(maxsize=MAX_MAPPED_SHARDS)(self._map_shard)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.path)

    def exists(self) -> bool:
        """Whether there is anything at the path."""
        with clear_os_errors(self.path):
            return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    def create(self, manifest: Manifest) -> None:
        """Write the group's and the arrays' metadata, as zarr-python makes it, each file durably and whole."""
        if self.exists() and not self._begun(manifest):
            raise PathError(f"{self.path}: expected nothing, or a logit store, got something else; give another path")
        if (self.path / HEAD_FOLDER).is_dir():
            _remove(self.path / HEAD_FOLDER)  # of a creation that was cut off, maybe with another teacher
        with clear_os_errors(self.path):
            make_folder(Path(os.path.realpath(self.path)))  # also the target of a link
            for key, data in metadata_bytes(manifest).items():
                refuse_links(self.path, (self.path / key).parent)
                replace_file(self.path / key, data)
        self.attach(manifest)

    def _begun(self, manifest: Manifest) -> bool:
        """Whether the path holds nothing but the metadata of a logit store: a creation that was cut off."""
        if not self.path.is_dir():
            return False
        legal = {Path(key) for key in begun_keys(manifest)}
        found = {path.relative_to(self.path) for path in self.path.rglob("*") if not path.is_dir()}
        found = {path for path in found if path.suffix != ".partial"}
        if not found:
            return all(path.parent == self.path and path.suffix == ".partial" for path in self.path.iterdir())
        try:
            attributes = parse_json(read_record(self.path, GROUP) or b"", GROUP)["attributes"]
            return found <= legal and bool(attributes["format"] == FORMAT_NAME)
        except (DamageError, KeyError, TypeError):
            return False

    def attach(self, manifest: Manifest) -> None:
        """Take shapes and types from the manifest."""
        self._manifest = manifest
        self._specs = {spec.name: spec for spec in manifest.arrays}

    def put_record(self, name: str, data: bytes) -> bool:
        """Write a record file durably, if there is none."""
        refuse_links(self.path, (self.path / name).parent)
        with clear_os_errors(self.path):
            return write_new(self.path / name, data)

    def get_record(self, name: str) -> bytes | None:
        """A record file's bytes, or None."""
        return read_record(self.path, name)

    def list_seals(self) -> list[int]:
        """Shards that have a seal file."""
        return list_seal_files(self.path / "seals")

    def lock_shard(self, shard: int) -> AbstractContextManager[None]:
        """A file lock beside the seal."""
        refuse_links(self.path, (self.path / seal_name(shard)).parent)
        return lock_beside(self.path / seal_name(shard))

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Write the shard's files, as zarr-python makes them of the manifest, whatever metadata lies on the disk."""
        assert self._manifest is not None
        for name in arrays:
            refuse_links(self.path, self._shard_path(name, shard).parent)
            self._remove_partials(name, shard)
        folders: dict[Path, None] = {}
        for key, data in shard_bytes(self._manifest, shard, arrays).items():
            self.write_object(key, (data,))
            folders |= dict.fromkeys(self.path / folder for folder in Path(key).parents)
        with clear_os_errors(self.path):
            for folder in folders:  # also those that a killed writer made
                sync_folder(folder)

    def _remove_partials(self, name: str, shard: int) -> None:
        """Remove what a killed writer of this shard left half written."""
        path = self._shard_path(name, shard)
        if path.parent.is_dir():
            for partial in path.parent.glob(f"{path.name}.*.partial"):
                partial.unlink(missing_ok=True)

    def _shard_path(self, name: str, shard: int) -> Path:
        return self.path / shard_key(self._specs[name], shard)

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), read around zarr-python, straight into the result where the chunks are not compressed."""
        assert self._manifest is not None
        spec = self._specs[name]
        first, _ = self._manifest.layout.shard_bounds(shard)
        if out is None:
            out = np.empty((stop - start, *spec.row_shape), np.dtype(spec.dtype).newbyteorder("<"))
        if start == stop:
            return out
        chunks = ShardChunks(self.path, self._manifest, spec, shard)
        try:
            with os.fdopen(open_inside(self.path, self._shard_path(name, shard)), "rb") as file:
                status = os.fstat(file.fileno())
                index = self._index(name, shard, status.st_size, (status.st_ino, status.st_mtime_ns))
                chunks.read_rows(FileSource(file.fileno()), index, start - first, stop - first, out)
        except FileNotFoundError:
            raise DamageError.in_shard(self.path, name, shard, None, "its object, got none") from None
        except OSError as error:
            try:
                with clear_os_errors(self.path):
                    raise
            except OSError:
                expected = f"bytes that can be read, got {error}"
                raise DamageError.in_shard(self.path, name, shard, None, expected) from error
        return out

    def map_shard(self, name: str, shard: int) -> MappedShard | None:
        """An array's part of a shard, mapped; None where it can't be, or the store is too large to stay mapped."""
        return self._mapped(name, shard)

    def _map_shard(self, name: str, shard: int) -> MappedShard | None:
        assert self._manifest is not None
        if self._manifest.num_rows * self._manifest.row_bytes > MAX_MAPPED_BYTES:
            return None
        path = self._shard_path(name, shard)
        refuse_links(self.path, path)
        chunks = ShardChunks(self.path, self._manifest, self._specs[name], shard)
        try:
            status = path.stat()
            index = self._index(name, shard, status.st_size, (status.st_ino, status.st_mtime_ns))
            return MappedShard(path, index, None if self._manifest.compressor == "none" else chunks.decompress)
        except (OSError, ValueError):  # `read` says what is wrong
            return None

    def _read_index(self, name: str, shard: int, num_bytes: int, _version: tuple[int, int]) -> Array:
        """Offset and length of every chunk of a shard, its checksum checked."""
        assert self._manifest is not None
        chunks = ShardChunks(self.path, self._manifest, self._specs[name], shard)
        with os.fdopen(open_inside(self.path, self._shard_path(name, shard)), "rb") as file:
            return chunks.index(FileSource(file.fileno()), num_bytes)

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Digests of a shard's files."""
        found = {}
        for name in sorted(self._specs):
            path = self._shard_path(name, shard)
            try:
                found[path.relative_to(self.path).as_posix()] = file_digest(path, root=self.path)
            except FileNotFoundError:
                raise DamageError.in_shard(self.path, name, shard, None, "its object, got none") from None
        return found

    def read_object(self, key: str, max_bytes: int) -> Iterator[bytes]:
        """An object's bytes as they lie, some at a time; FileNotFoundError where there is none.

        Raises:
            DamageError: it is larger than that.
        """
        with os.fdopen(open_inside(self.path, self.path / key), "rb") as file:
            check_record_size(os.fstat(file.fileno()).st_size, f"{self.path}: {key}", max_bytes)
            while data := file.read(READ_BYTES):
                yield data

    def write_object(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write an object durably as it shall lie, over what is there."""
        path = self.path / key
        refuse_links(self.path, path.parent)
        with clear_os_errors(self.path):
            replace_file(path, pieces)

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """Digests of the group's and the arrays' `zarr.json`."""
        assert self._manifest is not None
        found = {}
        for key in metadata_keys(self._manifest):
            try:
                found[key] = file_digest(self.path / key, root=self.path)
            except FileNotFoundError:
                raise DamageError(f"{self.path}: expected {key}, got none; take another copy of the store") from None
        return found

    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(Path(folder, name).lstat().st_size for folder, _, files in os.walk(self.path) for name in files)

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Remove what killed writers left half written or without a seal, then write the last records."""
        with clear_os_errors(self.path):
            for partial in self.path.rglob("*.partial"):
                partial.unlink(missing_ok=True)
            for name in self._specs:
                folder = self.path / name / "c"
                refuse_links(self.path, folder)
                for entry in folder.iterdir() if folder.is_dir() else ():
                    if entry.name.isdigit() and int(entry.name) not in sealed:
                        _remove(entry)
        for name, data in records.items():
            self.put_record(name, data)

    def check_final(self) -> None:
        """Nothing: every file has a digest of its own."""

    def close(self) -> None:
        """Forget the chunk indices and the maps."""
        self._index.cache_clear()
        self._mapped.cache_clear()


def read_record(folder: Path, name: str) -> bytes | None:
    """A record file's bytes, or None where there is none."""
    with clear_os_errors(folder):
        try:
            descriptor = open_inside(folder, folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with os.fdopen(descriptor, "rb") as file:
            check_record_size(os.fstat(descriptor).st_size, f"{folder / name}", record_limit(name))
            return file.read()


def list_seal_files(folder: Path) -> list[int]:
    """Shards that have a seal file in a folder, ascending."""
    with clear_os_errors(folder):
        try:
            names = [path.name for path in folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sealed_in(names)


def lock_beside(seal: Path) -> AbstractContextManager[None]:
    """Let one writer at a time write the shard of a seal record."""
    return only_one(seal.with_name(f"{seal.name}.lock.partial"), seal)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
