"""Sequences as rows: what a language model's store keeps beside the soft targets, and how its positions are told apart.

Legend: N sequences, P positions, R = N * P flat positions.

A sequence of P + 1 tokens has P positions: position t holds the distribution of token t + 1 given the tokens up to t of
the same document. `position_ids` count the tokens of a document from 0, so token t + 1 begins another document, or is
what pads the last sequence, where its position is 0: such a target is masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from storage.arrays import Array, ArraySpec, smallest_uint


@dataclass(frozen=True)
class Sequences:
    """What makes the rows of a store sequences.

    Attributes:
        num_positions: distributions of a row, at least 1; its sample has one token more.
        has_tokens: whether the token ids and their positions are in the store, so that a student needs no corpus.
        tokenizer: fingerprint of the tokenizer, or None where the corpus came as ids alone.
        num_padded: entries of the teacher's output behind the vocabulary: they are no tokens, and cut off before
            anything is computed.
        extra: fields of a later minor version, kept as they are.

    Raises:
        ValueError: a count is out of range, or a field is of another type.
    """

    num_positions: int
    has_tokens: bool
    tokenizer: str | None
    num_padded: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.has_tokens, bool):
            raise ValueError(f"has_tokens: expected true or false, got {self.has_tokens!r}")  # noqa: TRY004
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer: expected a fingerprint or None, got {self.tokenizer!r}")
        if not isinstance(self.num_positions, int) or self.num_positions < 1:
            raise ValueError(f"num_positions: expected a whole number, at least 1, got {self.num_positions}")
        if not isinstance(self.num_padded, int) or self.num_padded < 0:
            raise ValueError(f"num_padded: expected a whole number, at least 0, got {self.num_padded}")

    def to_json(self) -> dict[str, Any]:
        """The sequences as a JSON object."""
        value = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "extra"}
        return value | dict(self.extra)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        known = [option.name for option in fields(cls) if option.name != "extra"]
        extra = {name: value[name] for name in value if name not in known}
        return cls(**{name: value[name] for name in known}, extra=extra)

    def arrays(self, num_classes: int) -> tuple[ArraySpec, ...]:
        """`token_ids` and `position_ids`, (N, P + 1), where the store has the tokens."""
        if not self.has_tokens:
            return ()
        return (
            ArraySpec("token_ids", smallest_uint(num_classes - 1), (self.num_positions + 1,)),
            ArraySpec("position_ids", smallest_uint(self.num_positions), (self.num_positions + 1,)),
        )


ROW_ARRAYS = frozenset({"status", "sample_digest", "hard_target", "token_ids", "position_ids"})


def at_positions(spec: ArraySpec, sequences: Sequences) -> ArraySpec:
    """An array of one distribution a row, as it is kept of every position: (N, ...) becomes (N, P, ...)."""
    if spec.name in ROW_ARRAYS:
        return spec
    return ArraySpec(spec.name, spec.dtype, (sequences.num_positions, *spec.row_shape), spec.fill_value)


def flatten_positions(sequences: Sequences | None, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays of a store with one distribution a row: (N, P, ...) becomes (R, ...), views; others are left out.

    Of a store without sequences, the arrays as they are.
    """
    if sequences is None:
        return dict(arrays)
    return {name: values.reshape(-1, *values.shape[2:]) for name, values in arrays.items() if name not in ROW_ARRAYS}


def target_mask(position_ids_NQ: Array) -> NDArray[np.bool_]:
    """Whether each position's target, the next token, belongs to its document: bool (N, P).

    Args:
        position_ids_NQ: (N, P + 1).
    """
    mask_NP: NDArray[np.bool_] = position_ids_NQ[:, 1:] != 0
    return mask_NP


def next_tokens(token_ids_NQ: Array, position_ids_NQ: Array) -> NDArray[np.int32]:
    """The hard target of each position, int32 (N, P): the next token, -1 where it is of another document.

    Args:
        token_ids_NQ: (N, P + 1).
        position_ids_NQ: (N, P + 1).
    """
    return np.where(target_mask(position_ids_NQ), token_ids_NQ[:, 1:].astype(np.int32), np.int32(-1))
