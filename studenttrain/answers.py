"""What a student says of a batch, as flat rows of logits: of a sample one, of a sequence one a position.

Legend: N batch, P positions, Q = P + 1 tokens, R flat rows: N, or N * P, C classes or vocabulary entries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from studenttrain.heads import find_head
from studenttrain.language import sequence_logits, sequence_output

CHUNK_VALUES = {"cpu": 1 << 23, "cuda": 1 << 28}  # logits of a language model that are in memory together


def language_inputs(samples_N2Q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token ids (N, P) that a model reads, and their position ids, or None where each row is one document.

    The last token of a sample is a target only.
    """
    token_ids_NP, position_ids_NP = samples_N2Q[:, 0, :-1], samples_N2Q[:, 1, :-1]
    return token_ids_NP, None if is_one_document(position_ids_NP) else position_ids_NP


def is_one_document(position_ids_NP: Tensor) -> bool:
    """Whether no document begins inside a row."""
    return bool((position_ids_NP[:, 1:] != 0).all())


def sequence_targets(samples_N2Q: Tensor) -> Tensor:
    """The hard target of each position (R,), the next token, -1 where it is of another document."""
    next_NP = samples_N2Q[:, 0, 1:]
    return torch.where(samples_N2Q[:, 1, 1:] != 0, next_NP, -1).flatten()


def answers(model: nn.Module, inputs: Tensor, num_classes: int | None = None) -> Iterator[Tensor]:
    """Logits of some flat rows after the other, all rows of the batch in order.

    Args:
        model: the student, on the device.
        inputs: float (N, ...), or int64 (N, 2, Q) of sequences.
        num_classes: of which there are logits; what pads a vocabulary behind them is cut off. None keeps all.
    """
    if inputs.dtype.is_floating_point:
        yield model(inputs)
        return
    token_ids_NP, position_ids_NP = language_inputs(inputs)
    owner = find_head(model)
    if owner is None:
        yield sequence_logits(model, token_ids_NP, position_ids_NP).flatten(0, 1)[:, :num_classes]
        return
    hidden_RW = sequence_output(model, token_ids_NP, position_ids_NP, hidden_only=True).flatten(0, 1)
    head = owner.output_head().cut(num_classes)
    step = max(1, CHUNK_VALUES.get(inputs.device.type, CHUNK_VALUES["cpu"]) // head.num_classes)
    for start in range(0, len(hidden_RW), step):
        yield head.logits(hidden_RW[start : start + step])
