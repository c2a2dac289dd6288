"""The dense encoding: every class's centred logit. Any temperature, any divergence.

Legend: N rows, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from storage.arrays import Array, Arrays, ArraySpec, float_array
from storage.encodings.protocol import check_temperature
from storage.encodings.statistics import (
    centred,
    dequantise,
    logsumexp,
    quantise,
    statistics,
    to_float16,
)
from storage.encodings.values import ValueType


@dataclass(frozen=True)
class Dense:
    """Keep v = z - max z of every class.

    Attributes:
        values: how v is stored: `float16` (within 2^-11 relative), `float32` (exact) or `uint8` (within R / 510).
    """

    name: ClassVar[str] = "dense"
    losses: ClassVar[frozenset[str]] = frozenset({"kl", "reverse-kl", "jsd", "mse"})

    values: ValueType = "float16"

    def __post_init__(self) -> None:
        if self.values not in get_args(ValueType):
            raise ValueError(f"values: expected one of {', '.join(get_args(ValueType))}, got {self.values!r}")

    @property
    def error_bound(self) -> str:
        """How far a centred logit that is read may be from the teacher's."""
        return {
            "float32": "exact to float32",
            "float16": "a centred logit is within 2^-11 of itself, or within 2^-25 where it is below 2^-14, and one "
            "under -65504 reads as -65504",
            "uint8": "a centred logit is within its row's value_range / 510; -inf reads as -value_range",
        }[self.values]

    def to_json(self) -> dict[str, Any]:
        """The encoding as a JSON object."""
        return {"name": self.name, "values": self.values}

    def check(self, num_classes: int, temperatures: Sequence[float]) -> None:
        """Nothing: any number of classes, any temperatures."""
        del num_classes, temperatures

    def arrays(self, num_classes: int, num_temperatures: int) -> tuple[ArraySpec, ...]:
        """`values` (N, C), and `value_range` (N,) for uint8."""
        del num_temperatures
        if self.values == "uint8":
            return (
                ArraySpec("values", "uint8", (num_classes,)),
                float_array("value_range", "float32"),
            )
        return (float_array("values", self.values, num_classes),)

    def exact_temperatures(self, temperatures: Sequence[float]) -> tuple[float, ...] | None:
        """None: any temperature is exact, since every class is there."""
        del temperatures
        return None

    def encode(
        self,
        logits_NC: Array,
        temperatures: Sequence[float],
        *,
        uniform_N: Array | None = None,
        hidden_NW: Array | None = None,
    ) -> dict[str, Array]:
        """Statistics and values of finite float32 logits."""
        del uniform_N, hidden_NW
        values_NC, _ = centred(logits_NC)
        return statistics(logits_NC, temperatures) | stored_values(values_NC, self.values)

    def logprobs(self, arrays: Arrays, temperature: float, temperatures: Sequence[float]) -> Array:
        """Log-probabilities (N, C) at any temperature, float32, normalised over the stored values."""
        check_temperature(self, temperature, temperatures)
        scaled_NC = loaded_values(arrays).astype(np.float64) / temperature
        return (scaled_NC - logsumexp(scaled_NC)[:, None]).astype(np.float32)


def stored_values(values_NK: Array, value_type: ValueType) -> dict[str, Array]:
    """Centred float32 values as they are stored."""
    if value_type == "uint8":
        return quantise(values_NK)
    if value_type == "float16":
        return {"values": to_float16(values_NK)}
    return {"values": np.asarray(values_NK, np.float32)}


def loaded_values(arrays: Arrays) -> Array:
    """Centred float32 values of stored ones."""
    values_NK = arrays["values"]
    if values_NK.dtype == np.uint8:
        return dequantise(values_NK, arrays["value_range"])
    return values_NK.astype(np.float32)
