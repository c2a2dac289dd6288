"""A store as a Zarr v3 group on a local disk: a sharded array for each thing kept.

Writing goes through zarr-python. Reading a run of chunks goes around it: the shard's index is parsed and the chunks are
read straight into the result, with the same checks, since zarr-python's own reading costs five times as much. A test
holds both to the same answers.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from storage.arrays import Array, ArraySpec
from storage.backends.files import (
    clear_os_errors,
    file_digest,
    make_folder,
    only_one,
    replace_file,
    sync_file,
    sync_folder,
    write_new,
)
from storage.backends.mapped import MappedShard
from storage.errors import DamageError, PathError
from storage.head import HEAD_BIAS, HEAD_FOLDER, HEAD_WEIGHT
from storage.manifest import FORMAT_NAME, Manifest

GROUP = "zarr.json"
NO_CHUNK = np.iinfo(np.uint64).max
CRC_BYTES = 4
BLOSC_HEADER_BYTES = 16
CACHED_BYTES = 512 << 10  # read at a time and checked before the next, while it is in the second-level cache
# A store of up to this stays mapped: its pages then count as the process's memory, which the kernel may take back.
MAX_MAPPED_BYTES = 512 << 20
MAX_MAPPED_SHARDS = 256  # each holds an open file
MAX_PIECES = 512  # buffers of one scattered read; the kernel takes at most 1,024
SEAL_DIGITS = 8


def seal_name(shard: int) -> str:
    """Name of the seal record of a shard."""
    return f"seals/{shard:0{SEAL_DIGITS}d}.json"


def zstd_codec(dtype: str, tight: bool = False) -> BloscCodec:
    """What a chunk of a type is compressed by where the compressor is `zstd`.

    Args:
        dtype: of the array.
        tight: whether to save the last bytes, at a hundredth of the speed. At the highest level zstd finds more in ids
            as they are than in their bytes apart: the same few follow one another.
    """
    kind, itemsize = np.dtype(dtype).kind, np.dtype(dtype).itemsize
    is_shuffled = itemsize > 1 and not (tight and kind == "u")
    shuffle: Literal["shuffle", "noshuffle"] = "shuffle" if is_shuffled else "noshuffle"
    return BloscCodec(cname="zstd", clevel=9 if tight else 3, shuffle=shuffle, typesize=itemsize)


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
            shutil.rmtree(self.path / HEAD_FOLDER)  # of a creation that was cut off, maybe with another teacher
        metadata: dict[str, Buffer] = {}
        attributes = {"format": FORMAT_NAME, "format_version": manifest.format_version}
        group = zarr.create_group(MemoryStore(metadata), zarr_format=3, attributes=attributes)
        for spec in manifest.arrays:
            self._create_array(group, spec, manifest)
        with clear_os_errors(self.path):
            make_folder(Path(os.path.realpath(self.path)))  # also the target of a link
            for key in sorted(metadata, key=lambda key: (key != GROUP, key)):  # first what tells that it is a store
                replace_file(self.path / key, metadata[key].to_bytes())
        self.attach(manifest)

    def _begun(self, manifest: Manifest) -> bool:
        """Whether the path holds nothing but the metadata of a logit store: a creation that was cut off."""
        if not self.path.is_dir():
            return False
        legal = {Path(GROUP), *(Path(spec.name, GROUP) for spec in manifest.arrays), Path(HEAD_WEIGHT), Path(HEAD_BIAS)}
        found = {path.relative_to(self.path) for path in self.path.rglob("*") if not path.is_dir()}
        found = {path for path in found if path.suffix != ".partial"}
        if not found:
            return all(path.parent == self.path and path.suffix == ".partial" for path in self.path.iterdir())
        try:
            attributes = json.loads((self.path / GROUP).read_bytes())["attributes"]
            return found <= legal and attributes["format"] == FORMAT_NAME
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _create_array(self, group: zarr.Group, spec: ArraySpec, manifest: Manifest) -> None:
        codecs: list[Any] = [Crc32cCodec()]
        if manifest.compressor == "zstd":
            codecs.insert(0, zstd_codec(spec.dtype, manifest.is_packed_tightly))
        group.create_array(
            spec.name,
            shape=(manifest.num_rows, *spec.row_shape),
            dtype=np.dtype(spec.dtype),
            chunks=(manifest.chunk_rows, *spec.row_shape),
            shards=(manifest.shard_rows, *spec.row_shape),
            compressors=codecs,
            fill_value=spec.fill_value,
            dimension_names=[
                "row",
                *(f"{spec.name}_{axis}" for axis in range(len(spec.row_shape))),
            ],
            config={"write_empty_chunks": True},
        )

    def attach(self, manifest: Manifest) -> None:
        """Take shapes and types from the manifest."""
        self._manifest = manifest
        self._specs = {spec.name: spec for spec in manifest.arrays}

    def put_record(self, name: str, data: bytes) -> bool:
        """Write a record file durably, if there is none."""
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
        return lock_beside(self.path / seal_name(shard))

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Write the shard through zarr-python, then make its files durable."""
        assert self._manifest is not None
        start, stop = self._manifest.layout.shard_bounds(shard)
        with clear_os_errors(self.path):
            group = zarr.open_group(self.path, mode="r+", zarr_format=3, use_consolidated=False)
            folders: dict[Path, None] = {}
            for name, values in arrays.items():
                self._remove_partials(name, shard)
                array = group[name]
                assert isinstance(array, zarr.Array)
                array.with_config({"write_empty_chunks": True})[start:stop] = values
                path = self._shard_path(name, shard)
                sync_file(path)
                folders |= dict.fromkeys(self.path / folder for folder in path.relative_to(self.path).parents)
            for folder in folders:
                sync_folder(folder)

    def _remove_partials(self, name: str, shard: int) -> None:
        """Remove what a killed writer of this shard left half written."""
        path = self._shard_path(name, shard)
        if path.parent.is_dir():
            for partial in path.parent.glob(f"{path.name}.*.partial"):
                partial.unlink(missing_ok=True)

    def _shard_path(self, name: str, shard: int) -> Path:
        zeros = ["0"] * len(self._specs[name].row_shape)
        return self.path.joinpath(name, "c", str(shard), *zeros)

    def read(self, name: str, shard: int, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows [start, stop), read around zarr-python, straight into the result where the chunks are not compressed."""
        assert self._manifest is not None
        spec, chunk_rows = self._specs[name], self._manifest.chunk_rows
        first, _ = self._manifest.layout.shard_bounds(shard)
        low, high = start - first, stop - first
        if out is None:
            out = np.empty((stop - start, *spec.row_shape), np.dtype(spec.dtype).newbyteorder("<"))
        if low == high:
            return out
        # whole chunks go straight into the result, the ragged ends (the store's last chunk too) through a buffer
        whole_low, whole_high = -(-low // chunk_rows), high // chunk_rows
        try:
            with self._shard_path(name, shard).open("rb") as file:
                if whole_low < whole_high:
                    whole = out[whole_low * chunk_rows - low : whole_high * chunk_rows - low]
                    self._read_chunks(file.fileno(), name, shard, whole_low, whole.reshape(whole_high - whole_low, -1))
                for chunk in {low // chunk_rows, (high - 1) // chunk_rows} - set(range(whole_low, whole_high)):
                    buffer = np.empty((chunk_rows, *spec.row_shape), out.dtype)
                    self._read_chunks(file.fileno(), name, shard, chunk, buffer.reshape(1, -1))
                    begin, end = max(low, chunk * chunk_rows), min(high, (chunk + 1) * chunk_rows)
                    out[begin - low : end - low] = buffer[begin - chunk * chunk_rows : end - chunk * chunk_rows]
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

        def decompress(chunk: int, payload: Array, out: Array) -> None:
            self._decompress(payload, out, name, shard, chunk)

        try:
            status = path.stat()
            index = self._index(name, shard, status.st_size, (status.st_ino, status.st_mtime_ns))
            return MappedShard(path, index, None if self._manifest.compressor == "none" else decompress)
        except (OSError, ValueError):  # `read` says what is wrong
            return None

    def _read_chunks(self, descriptor: int, name: str, shard: int, low: int, values: Array) -> None:
        """Fill `values` (chunks, values of a chunk) with chunks low, low + 1, ... of a shard."""
        assert self._manifest is not None
        rows = values.view(np.uint8)
        status = os.fstat(descriptor)
        version = (status.st_ino, status.st_mtime_ns)
        index = self._index(name, shard, status.st_size, version)[low : low + len(rows)]
        for absent in np.flatnonzero(index[:, 0] == NO_CHUNK):
            raise DamageError.in_shard(self.path, name, shard, low + int(absent), "a chunk, got none")
        if self._manifest.compressor == "none":
            self._read_plain(descriptor, name, shard, low, rows, index)
            return
        for position, (offset, length) in enumerate(index.tolist()):
            data = os.pread(descriptor, length, offset)
            payload = self._checked(np.frombuffer(data, np.uint8), name, shard, low + position, length)
            self._decompress(payload, rows[position], name, shard, low + position)

    def _decompress(self, payload: Array, row: Array, name: str, shard: int, chunk: int) -> None:
        """Decompress a chunk into its place; its header must claim just as many bytes as the place has."""
        whole = len(payload) >= BLOSC_HEADER_BYTES
        claimed = (int(payload[4:8].view("<u4")[0]), int(payload[12:16].view("<u4")[0])) if whole else None
        if claimed != (len(row), len(payload)):
            expected = f"{len(row)} bytes compressed into {len(payload)}, got {claimed}"
            raise DamageError.in_shard(self.path, name, shard, chunk, expected)
        try:
            numcodecs.blosc.decompress(payload, row)
        except (RuntimeError, ValueError) as error:
            raise DamageError.in_shard(
                self.path, name, shard, chunk, f"a chunk that decompresses, got {error}"
            ) from error

    def _read_plain(self, descriptor: int, name: str, shard: int, low: int, rows: Array, index: Array) -> None:
        """Read uncompressed chunks with scattered reads, checksums apart, and check each while it is in the cache."""
        stored_bytes = rows.shape[1] + CRC_BYTES
        for other in np.flatnonzero(index[:, 1] != stored_bytes):
            raise DamageError.in_shard(
                self.path, name, shard, low + int(other), f"{stored_bytes} bytes, got another length"
            )
        checksums = np.empty(len(rows), "<u4")
        crc_bytes = checksums.view(np.uint8).reshape(-1, CRC_BYTES)
        batch = min(MAX_PIECES // 2, max(1, CACHED_BYTES // stored_bytes))
        breaks = np.flatnonzero(np.diff(index[:, 0]) != stored_bytes) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            for begin in range(0, len(run), batch):
                part = run[begin : begin + batch].tolist()
                pieces = [buffer for position in part for buffer in (rows[position].data, crc_bytes[position].data)]
                where = (self.path, name, shard, low + part[0])
                _read_fully(descriptor, pieces, int(index[part[0], 0]), len(part) * stored_bytes, where)
                for position in part:
                    if google_crc32c.value(rows[position]) != checksums[position]:
                        raise DamageError.in_shard(
                            self.path, name, shard, low + position, "its checksum to hold, got another"
                        )

    def _checked(self, data: Array, name: str, shard: int, chunk: int, length: int) -> Array:
        """The bytes before a chunk's trailing crc32c, checked."""
        if len(data) != length or length < CRC_BYTES:
            raise DamageError.in_shard(self.path, name, shard, chunk, f"{length} bytes, got {len(data)}")
        payload = data[:-CRC_BYTES]
        if google_crc32c.value(payload) != int(data[-CRC_BYTES:].view("<u4")[0]):
            raise DamageError.in_shard(self.path, name, shard, chunk, "its checksum to hold, got another")
        return payload

    def _read_index(self, name: str, shard: int, num_bytes: int, _version: tuple[int, int]) -> Array:
        """Offset and length of every chunk of a shard, uint64 (chunks, 2), the index's own checksum checked."""
        assert self._manifest is not None
        num_chunks = self._manifest.shard_rows // self._manifest.chunk_rows
        index_bytes = num_chunks * 16 + CRC_BYTES
        if num_bytes < index_bytes:
            raise DamageError.in_shard(
                self.path,
                name,
                shard,
                None,
                f"at least {index_bytes} bytes, got {num_bytes}",
            )
        with self._shard_path(name, shard).open("rb") as file:
            data = np.frombuffer(os.pread(file.fileno(), index_bytes, num_bytes - index_bytes), np.uint8)
        if len(data) != index_bytes or google_crc32c.value(data[:-CRC_BYTES]) != int(data[-CRC_BYTES:].view("<u4")[0]):
            raise DamageError.in_shard(
                self.path,
                name,
                shard,
                None,
                "the checksum of its chunk index to hold, got another",
            )
        index: Array = data[:-CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        present = index[index[:, 0] != NO_CHUNK]
        ends = present[:, 0] + present[:, 1]
        if (ends > num_bytes).any() or (ends < present[:, 0]).any():
            raise DamageError.in_shard(self.path, name, shard, None, "chunks inside its object, got others")
        return index

    def shard_objects(self, shard: int) -> dict[str, dict[str, Any]]:
        """Digests of a shard's files."""
        found = {}
        for name in sorted(self._specs):
            path = self._shard_path(name, shard)
            try:
                found[path.relative_to(self.path).as_posix()] = file_digest(path)
            except FileNotFoundError:
                raise DamageError.in_shard(self.path, name, shard, None, "its object, got none") from None
        return found

    def metadata_objects(self) -> dict[str, dict[str, Any]]:
        """Digests of the group's and the arrays' `zarr.json`."""
        paths = [
            self.path / "zarr.json",
            *(self.path / name / "zarr.json" for name in sorted(self._specs)),
        ]
        found = {}
        for path in paths:
            key = path.relative_to(self.path).as_posix()
            try:
                found[key] = file_digest(path)
            except FileNotFoundError:
                raise DamageError(f"{self.path}: expected {key}, got none; take another copy of the store") from None
        return found

    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(Path(folder, name).stat().st_size for folder, _, files in os.walk(self.path) for name in files)

    def seal_writing(self, records: Mapping[str, bytes], sealed: Collection[int]) -> None:
        """Remove what killed writers left half written or without a seal, then write the last records."""
        with clear_os_errors(self.path):
            for partial in self.path.rglob("*.partial"):
                partial.unlink(missing_ok=True)
            for name in self._specs:
                folder = self.path / name / "c"
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
            return (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def list_seal_files(folder: Path) -> list[int]:
    """Shards that have a seal file in a folder, ascending."""
    with clear_os_errors(folder):
        try:
            names = [path.name for path in folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
    found = (re.fullmatch(rf"([0-9]{{{SEAL_DIGITS},}})\.json", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def lock_beside(seal: Path) -> AbstractContextManager[None]:
    """Let one writer at a time write the shard of a seal record."""
    return only_one(seal.with_name(f"{seal.name}.lock.partial"), seal)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_fully(
    descriptor: int,
    pieces: list[memoryview],
    offset: int,
    expected: int,
    where: tuple[Path, str, int, int],
) -> None:
    """Read `expected` bytes at `offset` into the pieces, in order."""
    got = os.preadv(descriptor, pieces, offset)
    while 0 < got < expected:  # a short read: go on behind it, into what is not filled yet
        rest, skip = [], got
        for piece in pieces:
            if skip < len(piece):
                rest.append(piece[skip:])
            skip = max(0, skip - len(piece))
        more = os.preadv(descriptor, rest, offset + got)
        if more == 0:
            break
        got += more
    if got != expected:
        raise DamageError.in_shard(*where, f"{expected} bytes, got {got}")
