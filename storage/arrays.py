"""What arrays a store holds: their names, types and shapes, rows first.

Legend: N rows, C classes, T temperatures, K kept entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]

STATUS_OK = 0
STATUS_UNDECODABLE = 1
STATUS_NOT_FINITE = 2
STATUS_UNWRITTEN = 255


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, without its rows.

    Attributes:
        name: name of the array in the store.
        dtype: numpy name of its little-endian type, such as `float16`.
        row_shape: shape of one row, `()` for a scalar.
        fill_value: what an unwritten row reads as: NaN for floats, 255 for the status, else 0.
    """

    name: str
    dtype: str
    row_shape: tuple[int, ...] = ()
    fill_value: int | float = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row_shape, dtype=np.int64))

    def full(self, num_rows: int) -> Array:
        """An array of `num_rows` unwritten rows."""
        return np.full((num_rows, *self.row_shape), self.fill_value, dtype=np.dtype(self.dtype))


def float_array(name: str, dtype: str, *row_shape: int) -> ArraySpec:
    """A spec of floats, filled with NaN so that an unwritten row can't be read as a legal one."""
    return ArraySpec(name, dtype, row_shape, float("nan"))


def smallest_uint(largest: int) -> str:
    """Name of the smallest unsigned type that holds `largest`.

    Example:
        >>> smallest_uint(999)
        'uint16'
    """
    return str(np.min_scalar_type(largest))


def common_arrays(num_temperatures: int, has_hard_targets: bool) -> tuple[ArraySpec, ...]:
    """The arrays that every store holds, whatever its encoding."""
    specs = [
        ArraySpec("sample_digest", "uint64"),
        ArraySpec("status", "uint8", (), STATUS_UNWRITTEN),
        float_array("max_logit", "float32"),
        float_array("lse", "float32", num_temperatures),
        float_array("entropy", "float16"),
    ]
    if has_hard_targets:
        specs += [
            ArraySpec("hard_target", "int32", (), -1),
            float_array("hard_target_logprob", "float16"),
        ]
    return tuple(specs)
