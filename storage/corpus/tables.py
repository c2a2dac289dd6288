"""One array of a `.npy`, `.npz`, HDF5 or Zarr v3 file, and the hard targets beside it."""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from storage.corpus.labels import MAX_MEMORY_BYTES, NPY_MAGIC, one_line
from storage.corpus.protocol import Array
from storage.errors import CorpusError
from storage.remote import Place, open_place

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
ZARR_METADATA = "zarr.json"

# Bytes that hold the header of any `.npy` that is read.
_HEADER_BYTES = 1 << 16

# Names of arrays that hold hard targets, where they lie beside the samples.
LABEL_NAMES = ("y", "labels", "targets", "hard_targets")

# What zarr-python, h5py and their codecs raise on what they can't read.
READ_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError)


class Table(Protocol):
    """An array on disk or in memory, rows first: what numpy, h5py and zarr have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def dtype(self) -> Any:
        """Type of its values."""

    def __getitem__(self, rows: slice) -> Any: ...


def open_table(path: Path | str, array: str | None, where: str) -> tuple[Table, Array | None]:
    """The array of samples at a path, and the array of hard targets that lies beside it or None.

    Args:
        path: the URL of a `.npy`; or a `.npy`, `.npz`, HDF5, or the folder of a Zarr v3 array or group.
        array: its name in the file or group; None takes the only one that is not named as one of `LABEL_NAMES`.
        where: for messages.

    Raises:
        CorpusError: there is no such array, or it can't be read.
        ValueError: `array` for a file without names.
    """
    if isinstance(path, str):
        if array is not None:
            raise ValueError(f"array: expected a file of several arrays for {array!r}, got a .npy; leave it out")
        return _open_by_url(path, where), None
    if path.is_dir():
        return _open_zarr(path, array, where)
    with path.open("rb") as file:
        magic = file.read(len(NPY_MAGIC))
    if magic == NPY_MAGIC or path.suffix.lower() == ".npy":
        if array is not None:
            raise ValueError(f"array: expected a file of several arrays for {array!r}, got a .npy; leave it out")
        return _open_npy(path, where), None
    if magic.startswith(b"PK") or path.suffix.lower() == ".npz":
        return _open_npz(path, array, where)
    return _open_hdf5(path, array, where)


def pickled(where: str) -> CorpusError:
    """What to say about an array of objects."""
    return CorpusError(
        f"{where}: expected numbers, got an array of pickled Python objects or of strings, which is not read; save the "
        "samples as one array of numbers"
    )


def _open_npy(path: Path, where: str) -> Array:
    with path.open("rb") as file:
        shape, dtype = _read_npy_header(file, where)
        num_bytes = math.prod(shape) * dtype.itemsize
        expected = file.tell() + num_bytes
    if path.stat().st_size < expected:
        raise CorpusError(
            f"{where}: expected {expected} bytes for the shape {shape}, got {path.stat().st_size}; the file is "
            "truncated, take another copy"
        )
    if num_bytes == 0:
        return np.empty(shape, dtype)  # nothing can be mapped
    values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


@dataclass(frozen=True)
class RemoteArray:
    """The array of a `.npy` behind a URL: rows are read when they are asked for."""

    place: Place
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    def __getitem__(self, rows: slice) -> Array:
        first, stop, _ = rows.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = self.place.get_range("", self.start + first * row_bytes, self.start + max(first, stop) * row_bytes)
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])


def _open_by_url(url: str, where: str) -> RemoteArray:
    """The array of a `.npy` behind a URL.

    Raises:
        CorpusError: there is none, it is damaged, or in Fortran order.
    """
    place = open_place(url)
    size = place.size("")
    if size is None:
        raise CorpusError(f"{where}: expected a .npy file, got nothing there; check the URL")
    stream = io.BytesIO(place.get_range("", 0, min(size, _HEADER_BYTES)))
    shape, dtype, is_fortran = _read_npy_order(stream, where)
    if is_fortran and len(shape) > 1:
        raise CorpusError(
            f"{where}: expected an array in C order, whose rows lie behind each other, got one in Fortran order; save "
            "numpy.ascontiguousarray of it"
        )
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise CorpusError(
            f"{where}: expected {expected} bytes for the shape {shape}, got {size}; the file is truncated, take "
            "another copy"
        )
    return RemoteArray(place, shape, dtype, stream.tell())


def _read_npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy stream, which is left at its first value.

    Raises:
        CorpusError: it is no .npy file, or holds objects.
    """
    shape, dtype, _ = _read_npy_order(file, where)
    return shape, dtype


def _read_npy_order(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape and type, and whether in Fortran order, of a .npy stream, which is left at its first value."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise CorpusError(
            f"{where}: expected a whole .npy array, got a damaged one ({one_line(error)}); take another copy"
        ) from error
    if dtype.hasobject:
        raise pickled(where)
    return shape, dtype, is_fortran


def _open_npz(path: Path, array: str | None, where: str) -> tuple[Array, Array | None]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            name, labels = _choose(members, array, where)
            values = _read_member(archive, name, where)
            return values, None if labels is None else _read_member(archive, labels, where)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CorpusError(
            f"{where}: expected a whole .npz file, got a truncated or damaged one ({one_line(error)}); "
            "take another copy"
        ) from error


def _read_member(archive: zipfile.ZipFile, name: str, where: str) -> Array:
    where = f"{where}: array {name!r}"
    size = archive.getinfo(f"{name}.npy").file_size
    if size > MAX_MEMORY_BYTES:
        raise CorpusError(
            f"{where}: expected at most {MAX_MEMORY_BYTES} bytes, since a .npz is read into memory, got {size}; "
            "save it as .npy, which is not"
        )
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _read_npy_header(file, where)
        if math.prod(shape) * dtype.itemsize > size:
            raise CorpusError(f"{where}: expected the shape {shape} in it, got {size} bytes; take another copy")
    with archive.open(f"{name}.npy") as file:
        values: Array = np.lib.format.read_array(file, allow_pickle=False)
    return values


def _open_hdf5(path: Path, array: str | None, where: str) -> tuple[Table, Array | None]:
    import h5py

    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise CorpusError(
            f"{where}: expected a whole HDF5 file, got a truncated or damaged one ({one_line(error)}); "
            "take another copy"
        ) from error
    try:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name, labels = _choose(sorted(names), array, where)
        beside = None if labels is None else file[labels][()]
        return file[name], beside
    except CorpusError:
        file.close()
        raise
    except READ_ERRORS as error:
        file.close()
        raise CorpusError(
            f"{where}: expected a whole HDF5 file, got a damaged one ({one_line(error)}); take another copy"
        ) from error


def _open_zarr(path: Path, array: str | None, where: str) -> tuple[Table, Array | None]:
    if not (path / ZARR_METADATA).is_file():
        raise CorpusError(f"{where}: expected a Zarr v3 array or group, got a folder without {ZARR_METADATA}; give one")
    import zarr

    name, labels = "", None
    if _node_type(path, where) != "array":
        name, labels = _choose(_zarr_arrays(path, where), array, where)
    elif array is not None:
        raise ValueError(f"array: expected a group of arrays for {array!r}, got one array; leave it out")
    try:
        values = zarr.open_array(path / name, mode="r", zarr_format=3)
        beside = None if labels is None else np.asarray(zarr.open_array(path / labels, mode="r", zarr_format=3)[:])
    except READ_ERRORS as error:
        raise _damaged_zarr(where, error) from error
    return values, beside


def _damaged_zarr(where: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{where}: expected a Zarr v3 array that opens, got a damaged one ({one_line(error)}); take another copy"
    )


def _node_type(folder: Path, where: str) -> str | None:
    """`array` or `group`, or None where a folder is neither."""
    try:
        value = json.loads((folder / ZARR_METADATA).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged_zarr(where, error) from error
    node_type = value.get("node_type") if isinstance(value, dict) else None
    return node_type if isinstance(node_type, str) else None


def _zarr_arrays(path: Path, where: str) -> list[str]:
    """Names of the arrays in a group and its groups, without looking into the arrays."""
    names = []
    for folder, subfolders, _ in os.walk(path):
        groups = []
        for name in sorted(subfolders):
            node = Path(folder, name)
            node_type = _node_type(node, where)
            if node_type == "array":
                names.append(node.relative_to(path).as_posix())
            elif node_type == "group":
                groups.append(name)
        subfolders[:] = groups
    return sorted(names)


def _choose(names: Sequence[str], array: str | None, where: str) -> tuple[str, str | None]:
    """The array of samples, and the array of hard targets beside it, by their names.

    Raises:
        CorpusError: there is no such array, or several could be meant.
    """
    listed = ", ".join(map(repr, names[:6])) or "none"
    if array is not None:
        chosen = array.strip("/")
        if chosen not in names:
            raise CorpusError(f"{where}: expected an array {array!r}, got {listed}; give the name of one of them")
    else:
        candidates = [name for name in names if PurePosixPath(name).name not in LABEL_NAMES]
        if len(candidates) != 1:
            raise CorpusError(
                f"{where}: expected one array of samples, got {listed}; say which: --array NAME"
                if names
                else f"{where}: expected an array of samples, got none; give a file that holds one"
            )
        chosen = candidates[0]
    parent = PurePosixPath(chosen).parent
    labels = [str(name) for name in (str(parent / label) for label in LABEL_NAMES) if name in names and name != chosen]
    if len(labels) > 1:
        raise CorpusError(
            f"{where}: expected one array of hard targets, got {', '.join(map(repr, labels))}; "
            "give the right ones as a file: --labels FILE"
        )
    return chosen, labels[0] if labels else None
