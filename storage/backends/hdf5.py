"""A store as one HDF5 file.

HDF5 has no way to survive a kill in the middle of a write, so while a dump runs its shards are small HDF5 files of
their own in `NAME.h5.parts/`, each written aside, made durable and renamed, with the records beside them. Finalizing
copies them into one file, which carries the digest of all its bytes in its user block. The parts go when it is there.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from storage.arrays import Array, ArraySpec
from storage.backends.files import (
    clear_os_errors,
    file_digest,
    make_folder,
    sync_file,
    sync_folder,
    write_new,
)
from storage.backends.hdf5_plain import check_shape, plain_dataset, record_bytes, swollen_chunk
from storage.backends.sink import Sink
from storage.backends.zarr3 import list_seal_files, lock_beside, read_record, seal_name
from storage.errors import DamageError, PathError
from storage.head import HEAD_BIAS, HEAD_FOLDER, HEAD_WEIGHT
from storage.manifest import Manifest
from storage.records import MANIFEST
from storage.untrusted import is_count, open_inside, parse_json, refuse_links

USER_BLOCK_BYTES = 512
USER_BLOCK_START = b'{"format": "logit-store"'
LIBVER = ("v110", "v110")  # superblock, headers and indices with checksums of their own
GZIP_LEVEL, TIGHT_GZIP_LEVEL = 1, 9


class Hdf5Backend:
    """One HDF5 file when final, a folder of parts before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path.with_name(path.name + ".parts")
        self._manifest: Manifest | None = None
        self._specs: dict[str, ArraySpec] = {}
        self._file: h5py.File | None = None
        self._is_ours = False
        self._seal_records: dict[str, bytes] | None = None
        self._opening = threading.Lock()

    @property
    def location(self) -> str:
        """The path of the final file."""
        return str(self.path)

    def exists(self) -> bool:
        """Whether the file or its parts are there."""
        with clear_os_errors(self.path):
            return self.path.exists() or self.parts.exists()

    def create(self, manifest: Manifest) -> None:
        """Make the folder of parts."""
        if self.path.exists():
            raise PathError(f"{self.path}: expected nothing, or a logit store, got something else; give another path")
        left = list(self.parts.iterdir()) if self.parts.exists() else []
        if any(path.suffix != ".partial" and path.name != HEAD_FOLDER for path in left):
            raise PathError(f"{self.parts}: expected nothing, or parts of a logit store; give another path")
        refuse_links(self.parts, self.parts / HEAD_FOLDER)
        if (self.parts / HEAD_FOLDER).is_dir():
            shutil.rmtree(self.parts / HEAD_FOLDER)  # of a creation that was cut off, maybe with another teacher
        with clear_os_errors(self.path):
            make_folder(self.parts)
        self.attach(manifest)

    def attach(self, manifest: Manifest) -> None:
        """Take shapes and types from the manifest."""
        self._manifest = manifest
        self._specs = {spec.name: spec for spec in manifest.arrays}

    def _final(self) -> h5py.File | None:
        """The final file, opened once; None while there are only parts."""
        with self._opening:
            if self._file is None and self.path.exists():
                self._file = self._open_final()
            return self._file

    def _open_final(self) -> h5py.File:
        is_folder = self.path.is_dir()
        if not is_folder:
            with clear_os_errors(self.path), self.path.open("rb") as raw:  # an error of its own for each reason
                self._is_ours = raw.read(len(USER_BLOCK_START)) == USER_BLOCK_START
        if is_folder or not (self._is_ours or h5py.is_hdf5(self.path)):
            raise PathError(f"{self.path}: expected an HDF5 file, got something else; give another path")
        try:
            return h5py.File(self.path, "r", locking=False)  # final: nobody writes it
        except (OSError, RuntimeError) as error:
            raise DamageError(
                f"{self.path}: expected an HDF5 file that opens, got {error}; take another copy"
            ) from error

    def put_record(self, name: str, data: bytes) -> bool:
        """Write a record file among the parts."""
        if self.path.exists():
            return False
        refuse_links(self.parts, (self.parts / name).parent)
        with clear_os_errors(self.path):
            return write_new(self.parts / name, data)

    def get_record(self, name: str) -> bytes | None:
        """A record of the final file, or among the parts."""
        file = self._final()
        if file is None:
            data = read_record(self.parts, name)
            file = self._final() if data is None else None  # it may have been finalized just now
            if file is None:
                return data
        try:
            if name.startswith("seals/"):
                return self._seals(file).get(name)
            if not self._is_ours and f"records/{name}" not in file:
                return None
            return record_bytes(file, name, self.path)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DamageError(
                f"{self.path}: expected a readable record {name!r}, got {error}; take another copy"
            ) from error

    def _seals(self, file: h5py.File) -> dict[str, bytes]:
        """All seal records of the final file by name, read once."""
        if self._seal_records is None:
            lines = record_bytes(file, "seals", self.path).splitlines()
            self._seal_records = {seal_name(_shard_of(line)): line + b"\n" for line in lines}
        return self._seal_records

    def list_seals(self) -> list[int]:
        """Shards that are sealed."""
        file = self._final()
        if file is None:
            seals = list_seal_files(self.parts / "seals")
            file = self._final()  # it may have been finalized just now
            if file is None:
                return seals
        try:
            return sorted(int(name[6:-5]) for name in self._seals(file))
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DamageError(f"{self.path}: expected readable seals, got {error}; take another copy") from error

    def lock_shard(self, shard: int) -> AbstractContextManager[None]:
        """A file lock beside the seal, among the parts."""
        refuse_links(self.parts, (self.parts / seal_name(shard)).parent)
        return lock_beside(self.parts / seal_name(shard))

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Write one part aside, make it durable and rename it."""
        assert self._manifest is not None
        path = self._part(shard)
        refuse_links(self.parts, path)
        with clear_os_errors(self.path):
            make_folder(path.parent)
            for left in path.parent.glob(f"{path.name}.*.partial"):
                left.unlink(missing_ok=True)
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
            try:
                with _new_file(partial) as (file, _):
                    for name, values in arrays.items():
                        dataset = self._create_dataset(file, self._specs[name], len(values))
                        dataset[...] = values
                sync_file(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            sync_folder(path.parent)

    def _create_dataset(self, file: h5py.File, spec: ArraySpec, num_rows: int) -> h5py.Dataset:
        assert self._manifest is not None
        options: dict[str, Any] = {
            "fletcher32": True,
            "fillvalue": spec.fill_value,
            "track_times": False,
        }
        if self._manifest.compressor == "zstd":  # HDF5 ships no zstd: its own gzip, after the same byte shuffle
            options |= {
                "compression": "gzip",
                "compression_opts": TIGHT_GZIP_LEVEL if self._manifest.is_packed_tightly else GZIP_LEVEL,
                "shuffle": True,
            }
        chunks = (min(self._manifest.chunk_rows, num_rows), *spec.row_shape)
        shape = (num_rows, *spec.row_shape)
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        return file.create_dataset(spec.name, shape=shape, dtype=dtype, chunks=chunks, **options)

    def _part(self, shard: int) -> Path:
        return self.parts / "shards" / f"{shard:08d}.h5"

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), HDF5 checking each chunk."""
        values = self._read(name, shard, start, stop)
        if out is None:
            return values
        out[...] = values
        return out

    def _read(self, name: str, shard: int, start: int, stop: int) -> Array:
        assert self._manifest is not None
        file = self._final()
        if file is not None:
            return self._read_from(file, name, shard, start, stop, 0)
        first, _ = self._manifest.layout.shard_bounds(shard)
        path = self._part(shard)
        try:
            os.close(open_inside(self.parts, path))
            with h5py.File(path, "r", locking=False) as part:
                return self._read_from(part, name, shard, start - first, stop - first, first)
        except (OSError, RuntimeError) as error:
            file = self._final()
            if file is not None:  # it was finalized just now
                return self._read_from(file, name, shard, start, stop, 0)
            raise DamageError.in_shard(self.path, name, shard, None, f"a part that opens, got {error}") from error

    def _read_from(self, file: h5py.File, name: str, shard: int, start: int, stop: int, offset: int) -> Array:
        spec = self._specs[name]
        try:
            dataset = plain_dataset(file, name, self.path)
            wrong = check_shape(dataset, spec) or swollen_chunk(dataset, start, stop)
            if not wrong and stop > len(dataset):
                wrong = f"{stop} rows, got {len(dataset)}"
            if wrong:
                raise DamageError.in_shard(self.path, name, shard, None, wrong)
            result: Array = dataset[start:stop]
            return result
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            chunk = self._bad_chunk(file, name, shard, offset)
            raise DamageError.in_shard(self.path, name, shard, chunk, "its checksum to hold, got another") from error

    def _bad_chunk(self, file: h5py.File, name: str, shard: int, offset: int) -> int | None:
        """The first chunk of a shard that can't be read."""
        assert self._manifest is not None
        layout = self._manifest.layout
        for chunk in range(layout.num_chunks(shard)):
            start, stop = layout.chunk_bounds(shard, chunk)
            try:
                file[name][start - offset : stop - offset]
            except (OSError, RuntimeError, KeyError, ValueError, TypeError):
                return chunk
        return None

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Nothing: parts go when the store is final, and the final file has one digest for all its bytes."""
        del shard
        return {}

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """Nothing: parts have their metadata inside, and so has the final file."""
        return {}

    def num_bytes(self) -> int:
        """Bytes of the file, or of all parts."""
        if self.path.exists():
            return self.path.stat().st_size
        return sum(Path(folder, name).lstat().st_size for folder, _, files in os.walk(self.parts) for name in files)

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Copy all sealed parts into one file, put its digest into the user block, rename it, remove the parts."""
        if not self.path.exists():
            with clear_os_errors(self.path):
                self._pack(records, sorted(sealed))
        if self.parts.exists():  # also those that a kill between the rename and here left
            shutil.rmtree(self.parts, ignore_errors=True)

    def _pack(self, records: Mapping[str, bytes], shards: list[int]) -> None:
        assert self._manifest is not None
        partial = self.parts / f"{uuid.uuid4().hex}.partial"  # goes with the parts, if this is killed
        for left in self.parts.glob("*.partial"):
            left.unlink(missing_ok=True)
        try:
            with _new_file(partial, userblock_size=USER_BLOCK_BYTES) as (file, sink):
                for spec in self._specs.values():
                    self._create_dataset(file, spec, self._manifest.num_rows)
                for shard in shards:
                    start, stop = self._manifest.layout.shard_bounds(shard)
                    for name in self._specs:
                        file[name][start:stop] = self.read(name, shard, start, stop)
                        sink.check()
                seals = b"".join(read_record(self.parts, seal_name(shard)) or b"" for shard in shards)
                for name in (MANIFEST, HEAD_WEIGHT, HEAD_BIAS):
                    data = read_record(self.parts, name)
                    if data is not None:
                        _create_record(file, name, data)
                for name, last in {**records, "seals": seals}.items():
                    _create_record(file, name, last)
            with partial.open("r+b") as raw:
                raw.write(_user_block(file_digest(partial, USER_BLOCK_BYTES)))
            sync_file(partial)
            partial.replace(self.path)
            sync_folder(self.path.parent)
        finally:
            partial.unlink(missing_ok=True)

    def check_final(self) -> None:
        """Check the whole file against the digest in its user block."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            block = file.read(USER_BLOCK_BYTES)
        if block != _user_block(file_digest(self.path, USER_BLOCK_BYTES)):
            raise DamageError(
                f"{self.path}: expected the digest of the whole file to hold, got another; take another copy"
            )

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._seal_records = None


@contextmanager
def _new_file(path: Path, **options: Any) -> Iterator[tuple[h5py.File, Sink]]:
    """A new HDF5 file, and what tells whether it could be written so far."""
    with Sink(path) as sink:
        try:
            with h5py.File(sink, "w", libver=LIBVER, **options) as file:
                yield file, sink
        except (OSError, RuntimeError):
            sink.check()  # the cause, if HDF5 stumbled over what was dropped
            raise
        sink.check()


def _shard_of(line: bytes) -> int:
    """The shard of a seal record, which is checked when it is used."""
    try:
        shard = parse_json(line, "seals")["shard"]
    except DamageError as error:
        raise ValueError(str(error)) from None
    if not is_count(shard):
        raise ValueError(f"expected a shard, got {shard!r}")
    return int(shard)


def _create_record(file: h5py.File, name: str, data: bytes) -> None:
    values = np.frombuffer(data, np.uint8)
    options: dict[str, Any] = {"fletcher32": True, "chunks": (min(len(values), 1 << 20),)} if len(values) else {}
    file.create_dataset(f"records/{name}", data=values, track_times=False, **options)


def _user_block(digest: Mapping[str, Any]) -> bytes:
    """One JSON line, padded with zeros to the user block's size."""
    line = json.dumps({"format": "logit-store", "user_block": USER_BLOCK_BYTES, **digest}) + "\n"
    return line.encode().ljust(USER_BLOCK_BYTES, b"\0")
