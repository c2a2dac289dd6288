"""What is read of an HDF5 file that somebody else may have made: plain datasets of numbers, in the file itself.

HDF5 can do much more than a store needs: links into other files, data in other files, filters that are loaded as code,
objects that refer to others. None of these is followed.
"""

import math
import zlib
from collections.abc import Iterator
from typing import Any

import h5py

from storage.arrays import ArraySpec
from storage.errors import DamageError
from storage.manifest import MOST_CHUNK_BYTES
from storage.untrusted import record_limit

# In the order in which they are applied, each at most once: all of them are a part of HDF5, and no code is loaded.
FILTERS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32)
MOST_SEAL_BYTES = 1 << 30  # of all seals of a file, which are read at once
DEFLATE_RATIO = 1032  # a stream of deflate can't become larger than so many times itself
INFLATED_BYTES = 1 << 30  # up to which HDF5 may be left to find out how large a chunk becomes
CHECKSUM_BYTES = 4  # behind a chunk


def plain_dataset(file: h5py.File, name: str, where: object) -> h5py.Dataset:
    """A dataset of whole numbers or floats whose bytes are in the file itself.

    Raises:
        DamageError: it is something else.
        KeyError: there is nothing of that name.
    """
    found: Any = file
    for part in name.split("/"):
        link = found.get(part, getlink=True)
        if link is None:
            raise KeyError(f"no {name!r}")
        if not isinstance(link, h5py.HardLink):
            raise _is_not_plain(where, name, "a link, which is not followed")
        found = found[part]
        if not isinstance(found, h5py.Group | h5py.Dataset):
            raise _is_not_plain(where, name, "something else")
    if not isinstance(found, h5py.Dataset):
        raise _is_not_plain(where, name, "a group")
    for what in _oddities(found):
        raise _is_not_plain(where, name, what)
    return found


def _oddities(dataset: h5py.Dataset) -> Iterator[str]:
    """What of a dataset is no business of a store."""
    made, kind = dataset.id.get_create_plist(), dataset.id.get_type()
    if made.get_layout() == h5py.h5d.VIRTUAL:
        yield "one made of other datasets"
    elif made.get_external_count():
        yield "one whose bytes are in another file"
    elif kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        yield "values that are no numbers"
    elif kind.committed():
        yield "a type that is named elsewhere"
    filters = [made.get_filter(place)[0] for place in range(made.get_nfilters())]
    if filters != [code for code in FILTERS if code in filters]:
        yield f"filters {filters}, which would be loaded from elsewhere, or undone twice"


def record_bytes(file: h5py.File, name: str, where: object) -> bytes:
    """The bytes of a record, whose size is looked at before it is read.

    Raises:
        DamageError: it is too large, or no plain bytes.
        KeyError: there is none.
    """
    dataset = plain_dataset(file, f"records/{name}", where)
    most = MOST_SEAL_BYTES if name == "seals" else record_limit(name)
    stored = dataset.id.get_storage_size()
    if dataset.dtype != "uint8" or dataset.ndim != 1 or dataset.size > min(most, stored):
        raise DamageError(
            f"{where}: records/{name}: expected at most {most} bytes that are there, got {dataset.dtype} "
            f"{dataset.shape}, {stored} bytes stored; take another copy of the store"
        )
    return bytes(dataset[()].tobytes())


def check_shape(dataset: h5py.Dataset, spec: ArraySpec) -> str:
    """What of an array's dataset is otherwise than the manifest says; empty where it is as it should be."""
    if dataset.shape[1:] != spec.row_shape or dataset.dtype != spec.dtype:
        return "the manifest's shape and type, got another"
    chunks = dataset.chunks
    if chunks is not None and (
        chunks[1:] != spec.row_shape or math.prod(chunks) * dataset.dtype.itemsize > MOST_CHUNK_BYTES
    ):
        return f"chunks of whole rows, of at most {MOST_CHUNK_BYTES:,} bytes, got {chunks}"
    return ""


def swollen_chunk(dataset: h5py.Dataset, start: int, stop: int) -> str:
    """What is wrong with a chunk of rows [start, stop) that would become larger than a chunk; empty where none would.

    HDF5 itself finds out when it has the whole of it in memory.
    """
    if dataset.chunks is None or dataset.compression != "gzip":
        return ""
    rows, size = dataset.chunks[0], math.prod(dataset.chunks) * dataset.dtype.itemsize
    beside = [0] * (dataset.ndim - 1)
    for first in range(start - start % rows, stop, rows):
        stored = dataset.id.get_chunk_info_by_coord((first, *beside)).size
        if stored > size + size // 100 + 64:
            return f"at most {size} bytes in the chunk of row {first}, got {stored}"
        if stored * DEFLATE_RATIO > INFLATED_BYTES and _inflated(dataset, (first, *beside), size) > size:
            return f"{size} bytes in the chunk of row {first} once it is decompressed, got more"
    return ""


def _inflated(dataset: h5py.Dataset, corner: tuple[int, ...], most: int) -> int:
    """Bytes that a chunk becomes, counted up to just above `most` and kept nowhere."""
    mask, data = dataset.id.read_direct_chunk(corner)
    stream, total = zlib.decompressobj(), 0
    rest = data[:-CHECKSUM_BYTES] if dataset.fletcher32 else data
    if mask:  # a filter was left out for this chunk: then HDF5 does not decompress it, or not check it
        return most + 1
    try:
        while rest and total <= most:
            total += len(stream.decompress(rest, 1 << 20))
            rest = stream.unconsumed_tail
    except zlib.error:
        return total  # which reading it will find too
    return total


def _is_not_plain(where: object, name: str, what: str) -> DamageError:
    return DamageError(
        f"{where}: {name}: expected a plain dataset of numbers, got {what}; take the store from somebody you trust"
    )
