"""The hidden encoding: the teacher's last hidden state of a row, and once a store the head that makes logits of it.

Legend: N rows, C classes, W width of the hidden state.

z = cap(scale (W h + b)), cap(x) = soft_cap tanh(x / soft_cap). Any temperature, any divergence, at 2 W bytes a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from storage.arrays import Array, Arrays, ArraySpec, float_array
from storage.encodings.protocol import check_temperature
from storage.encodings.statistics import logsumexp, statistics

HiddenType = Literal["float16", "float32"]


@dataclass(frozen=True, eq=False)
class HeadArrays:
    """The head's weights as they are stored.

    Attributes:
        weight_CW: float16 or float32.
        bias_C: of the same type, or None.
    """

    weight_CW: Array  # noqa: N815
    bias_C: Array | None  # noqa: N815


@dataclass(frozen=True)
class Hidden:
    """Keep the hidden state h of every row, and the head once.

    Attributes:
        width: W, at least 1.
        values: how h is stored: `float16` (within 2^-11 relative) or `float32`.
        scale: that the head's product is multiplied by.
        soft_cap: what the logits are capped at by a tanh, above 0; None caps nothing.
        has_bias: whether the head has one.
        head_sha256: of the bytes of the head's record, and of the bias's after it.
    """

    name: ClassVar[str] = "hidden"
    losses: ClassVar[frozenset[str]] = frozenset({"kl", "reverse-kl", "jsd", "mse"})

    width: int
    values: HiddenType = "float16"
    scale: float = 1.0
    soft_cap: float | None = None
    has_bias: bool = False
    head_sha256: str = ""

    def __post_init__(self) -> None:
        if self.values not in get_args(HiddenType):
            raise ValueError(f"values: expected float16 or float32 with hidden, got {self.values!r}")
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")
        if not 0 < abs(self.scale) < float("inf"):
            raise ValueError(f"scale: expected a finite number other than 0, got {self.scale}")
        if self.soft_cap is not None and not 0 < self.soft_cap < float("inf"):
            raise ValueError(f"soft_cap: expected a number above 0, got {self.soft_cap}")

    @property
    def error_bound(self) -> str:
        """How far what is read may be from what the teacher said."""
        if self.values == "float32":
            return "hidden states are exact to float32, and logits to the rounding of one product"
        return (
            "an entry of a hidden state is within 2^-11 of itself, or within 2^-25 where it is below 2^-14; a logit is "
            "off by at most |scale| 2^-11 sum |w| |h|, and as much less as the soft cap flattens it"
        )

    def to_json(self) -> dict[str, Any]:
        """The encoding as a JSON object."""
        return {"name": self.name, **vars(self)}

    def check(self, num_classes: int, temperatures: Sequence[float]) -> None:
        """Nothing: any number of classes, any temperature."""
        del num_classes, temperatures

    def arrays(self, num_classes: int, num_temperatures: int) -> tuple[ArraySpec, ...]:
        """`hidden` (N, W)."""
        del num_classes, num_temperatures
        return (float_array("hidden", self.values, self.width),)

    def exact_temperatures(self, temperatures: Sequence[float]) -> tuple[float, ...] | None:
        """None: any temperature is exact, since every logit can be computed."""
        del temperatures
        return None

    def encode(
        self,
        logits_NC: Array,
        temperatures: Sequence[float],
        *,
        uniform_N: NDArray[np.float64] | None = None,
        hidden_NW: Array | None = None,
    ) -> dict[str, Array]:
        """Statistics of finite float32 logits, and the hidden states that they were made from."""
        del uniform_N
        if hidden_NW is None:
            raise ValueError("hidden_NW: expected the hidden states of the rows, got none")
        with np.errstate(over="ignore"):  # what float16 can't hold is inf then: such a row has no targets
            hidden_NW = np.asarray(hidden_NW).astype(self.values)
        return statistics(logits_NC, temperatures) | {"hidden": hidden_NW}

    def logits(self, arrays: Arrays, head: HeadArrays) -> NDArray[np.float32]:
        """The teacher's logits (N, C), float32, computed in float32: for a few rows at a time."""
        logits_NC: Array = arrays["hidden"].astype(np.float32) @ head.weight_CW.astype(np.float32).T
        if head.bias_C is not None:
            logits_NC += head.bias_C.astype(np.float32)
        logits_NC *= np.float32(self.scale)
        if self.soft_cap is not None:
            logits_NC = np.tanh(logits_NC / np.float32(self.soft_cap)) * np.float32(self.soft_cap)
        return logits_NC

    def logprobs(
        self, arrays: Arrays, temperature: float, temperatures: Sequence[float], head: HeadArrays | None = None
    ) -> Array:
        """Log-probabilities (N, C) at any temperature, float32.

        Raises:
            ValueError: no head was given.
        """
        check_temperature(self, temperature, temperatures)
        if head is None:
            raise ValueError(
                "head: expected the store's head beside hidden states, got none; take it from Store.head()"
            )
        scaled_NC = self.logits(arrays, head).astype(np.float64) / temperature
        return (scaled_NC - logsumexp(scaled_NC)[:, None]).astype(np.float32)
