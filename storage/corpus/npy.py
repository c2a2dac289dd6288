"""One array in the bytes of a `.npy` file."""

import io
import math
from typing import Any

import numpy as np

from storage.corpus.labels import one_line
from storage.corpus.protocol import Array, SampleError


def npy_header(raw: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, type, and the offset of the first value of a `.npy` file of numbers.

    Raises:
        SampleError: it is none, or its values are no numbers of at most 64 bits.
    """
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    except Exception as error:  # numpy evaluates the header as a literal, which raises nearly anything
        raise SampleError(
            f"expected a .npy file, got another or a damaged one ({one_line(error)}); replace it"
        ) from error
    if dtype.hasobject:
        raise SampleError("expected numbers, got pickled Python objects, which are not read; save numbers")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise SampleError(f"expected numbers of at most 64 bits, got {dtype}; save the sample as numbers")
    return shape, is_fortran, dtype, stream.tell()


def decode_npy(raw: bytes) -> Array:
    """The array of a `.npy` file's bytes, little-endian and in C order; nothing is ever unpickled.

    Raises:
        SampleError: it is none, cut off, or its values are no numbers.
    """
    shape, is_fortran, dtype, start = npy_header(raw)
    num_bytes = math.prod(shape) * dtype.itemsize
    if not shape or min(shape) < 1:
        raise SampleError(f"expected an array with values, got shape {shape}; save it with at least one axis")
    if len(raw) - start != num_bytes:
        raise SampleError(f"expected {num_bytes} bytes for the shape {shape}, got {len(raw) - start}; replace the file")
    values = np.frombuffer(raw, dtype, offset=start)
    values = values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)
    return np.ascontiguousarray(values, dtype.newbyteorder("<"))
