"""Hard targets from files: `.npy` or IDX, checked against the number of samples."""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from storage.corpus.protocol import Array
from storage.errors import CorpusError
from storage.urls import is_url

NPY_MAGIC = b"\x93NUMPY"
GZIP_MAGIC = b"\x1f\x8b"

# Instead of a path of labels: no hard targets, and no class names from the corpus's folders.
NO_LABELS = "none"

# Most bytes of an array that has to be held in memory because its file is compressed.
MAX_MEMORY_BYTES = 8 * 2**30

# No deflate stream unpacks to more than this many times its size.
_MAX_DEFLATE_RATIO = 1032


def read_labels(path: str | Path, num_samples: int) -> NDArray[np.int32]:
    """Hard targets (num_samples,) of a labels file.

    Args:
        path: `.npy` of integers, or an IDX file of unsigned bytes, plain or gzip.
        num_samples: samples that they belong to.

    Raises:
        CorpusError: there is no such file, or it does not hold one class number for each sample.
    """
    where = f"labels '{path}'"
    if is_url(path):
        raise CorpusError(f"{where}: expected a file on this machine, got a URL; copy it to this machine first")
    file = Path(path)
    if not file.is_file():
        raise CorpusError(f"{where}: expected a .npy or IDX file, got nothing there; check the path")
    with file.open("rb") as stream:
        magic = stream.read(len(NPY_MAGIC))
    if magic == NPY_MAGIC:
        try:
            values = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise CorpusError(f"{where}: expected a whole .npy file of integers, got {one_line(error)}") from error
    else:
        values = read_idx(file, where)
    return check_labels(values, where, num_samples)


def check_labels(values: Array, where: str, num_samples: int) -> NDArray[np.int32]:
    """Class numbers as int32 (num_samples,), -1 where unknown.

    Raises:
        CorpusError: they are not one integer of at least -1 for each sample.
    """
    if values.ndim != 1:
        raise CorpusError(
            f"{where}: expected one class number a sample, shape ({num_samples},), got shape {values.shape}; "
            "give class numbers, not one-hot rows"
        )
    if values.dtype.kind not in "iu":
        raise CorpusError(f"{where}: expected integers, got {values.dtype}; save the class numbers as integers")
    if len(values) != num_samples:
        raise CorpusError(
            f"{where}: expected {num_samples} labels, one a sample, got {len(values)}; give the labels of this corpus"
        )
    smallest, largest = int(values.min()), int(values.max())
    if smallest < -1 or largest > np.iinfo(np.int32).max:
        raise CorpusError(
            f"{where}: expected class numbers from 0 (-1 for unknown), got {smallest} to {largest}; "
            "number the classes from 0"
        )
    return np.ascontiguousarray(values, dtype=np.int32)


def is_gzip(path: Path) -> bool:
    """Whether a file starts as gzip does."""
    with path.open("rb") as stream:
        return stream.read(2) == GZIP_MAGIC


def read_idx(path: Path, where: str) -> NDArray[np.uint8]:
    """The whole array of an IDX file of unsigned bytes, plain or gzip, in memory.

    Source: the IDX format as described with the MNIST files: two zero bytes, a type, the number of dimensions, each
    dimension as a big-endian uint32, then the values in C order.

    Raises:
        CorpusError: it is not such a file, it is truncated, or it is too large to unpack in memory.
    """
    size = path.stat().st_size
    if not is_gzip(path):
        with path.open("rb") as stream:
            shape = read_idx_header(stream, where)
            check_idx_size(size, shape, where)
            return np.frombuffer(stream.read(), dtype=np.uint8).reshape(shape)
    try:
        with gzip.open(path, "rb") as stream:
            shape = read_idx_header(cast("IO[bytes]", stream), where)
            count = math.prod(shape)
            if count > MAX_MEMORY_BYTES:
                raise CorpusError(
                    f"{where}: expected at most {MAX_MEMORY_BYTES} bytes in a gzip file, which is unpacked in memory, "
                    f"got {count}; unpack it with gunzip first"
                )
            if count > size * _MAX_DEFLATE_RATIO:
                raise CorpusError(
                    f"{where}: expected {count} bytes of values, got a gzip file of {size} bytes, which can't hold "
                    "them; it is truncated or damaged, take another copy"
                )
            values = stream.read(count + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError(
            f"{where}: expected a whole gzip file, got a truncated or damaged one ({one_line(error)}); "
            "take another copy"
        ) from error
    header = 4 + 4 * len(shape)
    if len(values) != count:
        check_idx_size(header + len(values), shape, where)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def read_idx_header(stream: IO[bytes], where: str) -> tuple[int, ...]:
    """The dimensions of an IDX file of unsigned bytes; leaves the stream at its first value.

    Raises:
        CorpusError: the magic is not that of IDX, the values are not unsigned bytes, or the header is cut off.
    """
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[3] == 0:
        raise CorpusError(
            f"{where}: expected an IDX file, which starts with 00 00 08, got {magic.hex(' ') or 'an empty file'}; "
            "give the IDX file itself, plain or gzip"
        )
    if magic[2] != 0x08:
        raise CorpusError(
            f"{where}: expected IDX values of type 0x08, unsigned bytes, got type 0x{magic[2]:02x}; "
            "save them as .npy and use the kind arrays"
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise CorpusError(
            f"{where}: expected {magic[3]} dimensions, got a file that ends in its header; take another copy"
        )
    return tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))


def check_idx_size(num_bytes: int, shape: tuple[int, ...], where: str) -> None:
    """Refuse an IDX file that is shorter or longer than its header says.

    Raises:
        CorpusError: it is.
    """
    expected = 4 + 4 * len(shape) + math.prod(shape)
    if num_bytes < expected:
        raise CorpusError(
            f"{where}: expected {expected} bytes for the shape {shape}, got {num_bytes}; the file is truncated, "
            "take another copy"
        )
    if num_bytes > expected:
        raise CorpusError(
            f"{where}: expected {expected} bytes for the shape {shape}, got more; the file is damaged, "
            "take another copy"
        )


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is the same in every run."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 200 else text[:197] + "..."
