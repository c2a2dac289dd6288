"""What an encoding is, and the check of a temperature that all of them share."""

from collections.abc import Sequence
from typing import Any, Protocol

from storage.arrays import Array, Arrays, ArraySpec
from storage.errors import MismatchError


class Encoding(Protocol):
    """What a store keeps of the teacher's distribution in a row."""

    @property
    def name(self) -> str:
        """`dense`, `topk`, `sample` or `hidden`."""

    @property
    def losses(self) -> frozenset[str]:
        """Names of the losses that may be computed from it."""

    @property
    def error_bound(self) -> str:
        """One sentence: how far what is read may be from what the teacher said."""

    def to_json(self) -> dict[str, Any]:
        """The encoding as a JSON object, the inverse of `encoding_from_json`."""

    def check(self, num_classes: int, temperatures: Sequence[float]) -> None:
        """Refuse classes or declared temperatures that the encoding does not fit.

        Raises:
            ValueError: it does not fit them.
        """

    def arrays(self, num_classes: int, num_temperatures: int) -> tuple[ArraySpec, ...]:
        """The arrays that the encoding adds to a store, of one distribution a row.

        Raises:
            ValueError: the encoding does not fit that many classes.
        """

    def exact_temperatures(self, temperatures: Sequence[float]) -> tuple[float, ...] | None:
        """The temperatures at which a row is exact: those declared, or None for any."""

    def encode(
        self,
        logits_NC: Array,
        temperatures: Sequence[float],
        *,
        uniform_N: Array | None = None,
        hidden_NW: Array | None = None,
    ) -> dict[str, Array]:
        """All stored floats of finite float32 logits, statistics included: the reference that the device must meet.

        Args:
            logits_NC: of the teacher.
            temperatures: that are declared.
            uniform_N: random numbers of the rows, for an encoding that draws.
            hidden_NW: hidden states of the rows, for an encoding that keeps them.

        Raises:
            ValueError: what the encoding needs beside the logits was not given.
        """

    def logprobs(self, arrays: Arrays, temperature: float, temperatures: Sequence[float]) -> Array:
        """Log-probabilities at a temperature, float32, natural log.

        dense: shape (N, C). topk: shape (N, K + 1), the kept entries in stored order, then the tail. sample: shape
        (N, D), the drawn ids in stored order. hidden: shape (N, C); it takes the store's head as a fourth argument.

        Raises:
            MismatchError: the temperature is not exact on this encoding.
        """


def check_temperature(encoding: Encoding, temperature: float, temperatures: Sequence[float]) -> None:
    """Refuse a temperature that is not exact on an encoding.

    Raises:
        MismatchError: the temperature was not declared when the store was made, and the encoding needs it.
        ValueError: the temperature is not positive.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    exact = encoding.exact_temperatures(temperatures)
    if exact is not None and temperature not in exact:
        declared = ", ".join(f"{value:g}" for value in exact)
        raise MismatchError(
            f"temperature: expected one that the store declares ({declared}), got {temperature:g}; a {encoding.name} "
            "store is exact at these only: use one of them, or dump again with that temperature"
        )
