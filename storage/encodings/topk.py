"""The top-k encoding: the k largest logits of a row, and the exact mass of the rest at each declared temperature.

Legend: N rows, C classes, K kept entries, T temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from storage.arrays import Array, Arrays, ArraySpec, float_array, smallest_uint
from storage.encodings.dense import loaded_values, stored_values
from storage.encodings.protocol import check_temperature
from storage.encodings.statistics import centred, logsumexp, statistics
from storage.encodings.values import ValueType


@dataclass(frozen=True)
class TopK:
    """Keep ids and v = z - max z of the k largest logits, sorted downward, ties to the lower id.

    Attributes:
        k: kept entries a row, from 1 to the number of classes.
        values: how v is stored: `float16`, `float32` or `uint8`.
    """

    name: ClassVar[str] = "topk"
    losses: ClassVar[frozenset[str]] = frozenset({"tail-bucket", "reverse-kl", "jsd", "truncated", "renormalised"})

    k: int
    values: ValueType = "float16"

    def __post_init__(self) -> None:
        if self.values not in get_args(ValueType):
            raise ValueError(f"values: expected one of {', '.join(get_args(ValueType))}, got {self.values!r}")
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")

    @property
    def error_bound(self) -> str:
        """How far what is read may be from what the teacher said."""
        kept = {
            "float32": "a kept centred logit is exact to float32",
            "float16": "a kept centred logit is within 2^-11 of itself, or within 2^-25 where it is below 2^-14, and "
            "one under -65504 reads as -65504",
            "uint8": "a kept centred logit is within its row's value_range / 510",
        }[self.values]
        return f"{kept}; log_tail is exact to float32 at each declared temperature"

    def to_json(self) -> dict[str, Any]:
        """The encoding as a JSON object."""
        return {"name": self.name, "k": self.k, "values": self.values}

    def check(self, num_classes: int, temperatures: Sequence[float]) -> None:
        """At most as many entries as there are classes."""
        del temperatures
        if self.k > num_classes:
            raise ValueError(
                f"k: expected at most the number of classes ({num_classes}), got {self.k}; use a smaller k"
            )

    def arrays(self, num_classes: int, num_temperatures: int) -> tuple[ArraySpec, ...]:
        """`ids` (N, K), `values` (N, K), `log_tail` (N, T), and `value_range` (N,) for uint8."""
        self.check(num_classes, ())
        ids = ArraySpec("ids", smallest_uint(num_classes - 1), (self.k,))
        log_tail = float_array("log_tail", "float32", num_temperatures)
        if self.values == "uint8":
            values = ArraySpec("values", "uint8", (self.k,))
            return (ids, values, float_array("value_range", "float32"), log_tail)
        return (ids, float_array("values", self.values, self.k), log_tail)

    def exact_temperatures(self, temperatures: Sequence[float]) -> tuple[float, ...] | None:
        """The declared temperatures: at any other the tail's mass is not known."""
        return tuple(temperatures)

    def encode(
        self,
        logits_NC: Array,
        temperatures: Sequence[float],
        *,
        uniform_N: Array | None = None,
        hidden_NW: Array | None = None,
    ) -> dict[str, Array]:
        """Statistics, ids, values and log-tails of finite float32 logits.

        The tail is reduced over the entries that are not kept, never as one minus the kept mass.
        """
        del uniform_N, hidden_NW
        values_NC, _ = centred(logits_NC)
        order_NC = np.argsort(-values_NC, axis=1, kind="stable")
        ids_NK, rest_NR = order_NC[:, : self.k], order_NC[:, self.k :]
        tail_NR = np.take_along_axis(values_NC, rest_NR, axis=1).astype(np.float64)
        lse_NT = np.stack(
            [logsumexp(values_NC.astype(np.float64) / value) for value in temperatures],
            axis=1,
        )
        tails = np.stack([logsumexp(tail_NR / value) for value in temperatures], axis=1) - lse_NT
        kept = stored_values(np.take_along_axis(values_NC, ids_NK, axis=1), self.values)
        ids = ids_NK.astype(smallest_uint(values_NC.shape[1] - 1))
        return statistics(logits_NC, temperatures) | kept | {"ids": ids, "log_tail": tails.astype(np.float32)}

    def logprobs(self, arrays: Arrays, temperature: float, temperatures: Sequence[float]) -> Array:
        """Log-probabilities (N, K + 1) at a declared temperature: the kept entries, then the tail; rows sum to one.

        log p(i) = v_i / T - lse - Z and log tail = log_tail - Z, Z = logaddexp(logsumexp_kept, log_tail).
        """
        check_temperature(self, temperature, temperatures)
        column = list(temperatures).index(temperature)
        scaled_NK = loaded_values(arrays).astype(np.float64) / temperature - arrays["lse"][:, column, None]
        buckets = np.concatenate([scaled_NK, arrays["log_tail"][:, column, None].astype(np.float64)], axis=1)
        return (buckets - logsumexp(buckets)[:, None]).astype(np.float32)
