"""What a language model is to those who run it: token ids and positions in, logits out, documents kept apart.

Legend: N batch, P positions, C classes (the vocabulary), V columns of a model's logits, C or more.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.heads import relative_difference, unwrap

POSITION_NAMES = ("position_ids", "positions")
NUM_PROBE_POSITIONS = 12
# What a document may change in the logits of another, over the largest logit: rounding, which is far below what one
# that is seen changes.
MAX_LEAK = {torch.float32: 1e-3, torch.float64: 1e-3}
MAX_HALF_LEAK = 3e-2


class NoLogitsError(ValueError):
    """A model gave something that is no logits (N, P, V): its text stands behind `expected ..., got`."""


RunsSequences = Callable[[Tensor, Tensor], Tensor]
"""Token ids (N, P) and position ids (N, P), int64, to logits (N, P, V)."""


def is_language_model_spec(spec: str) -> bool:
    """Whether a spec names a language model by itself; `package.module:callable` may be one and does not say."""
    return spec.startswith(("gpt:", "hf:"))


def takes_position_ids(model: nn.Module) -> bool:
    """Whether a model's `forward` takes positions beside token ids, by its signature.

    It does with an argument called `position_ids...` or `positions...`, and with a second one that has no default.
    """
    return _position_argument(model) is not None


def _position_argument(model: nn.Module) -> tuple[bool, str] | None:
    """Whether the argument that positions are given by is the second by place, and its name."""
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        arguments = cast("Any", model.forward).schema.arguments[1:]  # behind self
        given = [(argument.name, argument.has_default_value(), True) for argument in arguments]
    else:
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        given = [
            (name, parameter.default is not parameter.empty, parameter.kind is not parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind not in variable
        ]
    for place, (name, has_default, has_place) in enumerate(given):
        is_second = place == 1 and has_place
        if place and (name.startswith(POSITION_NAMES) or (is_second and not has_default)):
            return is_second, name
    return None


def sequence_output(
    model: nn.Module, token_ids_NP: Tensor, position_ids_NP: Tensor | None = None, **options: Any
) -> Any:
    """What a model gives for token ids: positions are left out where it takes none, or may do without.

    Args:
        model: may be compiled, or in DistributedDataParallel.
        token_ids_NP: int64.
        position_ids_NP: int64; None where each row is one document.
        options: of its `forward`, such as `hidden_only=True`.
    """
    argument = None if position_ids_NP is None else _position_argument(model)
    if argument is None:
        return model(token_ids_NP, **options)
    is_second, name = argument
    if is_second:  # an exported program takes what it was exported with by place only
        return model(token_ids_NP, position_ids_NP, **options)
    return model(token_ids_NP, **{name: position_ids_NP}, **options)


def sequence_logits(model: nn.Module, token_ids_NP: Tensor, position_ids_NP: Tensor | None = None) -> Tensor:
    """Logits (N, P, V) of a language model: its output, or what that has under `logits`.

    Raises:
        NoLogitsError: it gives something else; the message says what.
    """
    output = sequence_output(model, token_ids_NP, position_ids_NP)
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        raise NoLogitsError(f"a {type(output).__name__}")
    if output.ndim != 3 or output.shape[:2] != token_ids_NP.shape or not output.dtype.is_floating_point:
        raise NoLogitsError(f"shape {tuple(output.shape)} of {str(output.dtype).removeprefix('torch.')}")
    return output


def document_leak(
    run: RunsSequences, num_classes: int, device: torch.device, num_positions: int = NUM_PROBE_POSITIONS
) -> float:
    """How much the logits of a document change with what stands before it, over the largest; 0 where it is not seen.

    Two documents are packed into one row; in the other the second stands alone, with something behind it. What a later
    token changes counts too.

    Args:
        run: the model.
        num_classes: token ids are below it.
        device: of the model.
        num_positions: of a row, at least 4.
    """
    first = num_positions // 2
    generator = torch.Generator().manual_seed(0)
    tokens_P = torch.randint(num_classes, (num_positions,), generator=generator)
    packed_P = torch.cat((torch.arange(first), torch.arange(num_positions - first)))
    token_ids_NP = torch.stack((tokens_P, tokens_P.roll(-first))).to(device)
    position_ids_NP = torch.stack((packed_P, packed_P.roll(-first))).to(device)
    with torch.no_grad():
        logits_NPV = run(token_ids_NP, position_ids_NP)
    return relative_difference(logits_NPV[0, first:], logits_NPV[1, : num_positions - first])


def keeps_documents_apart(
    run: RunsSequences, num_classes: int, device: torch.device, num_positions: int = NUM_PROBE_POSITIONS
) -> bool:
    """Whether no document of a packed row sees another, as far as two of them tell; arguments of `document_leak`."""
    dtypes = []

    def noting(token_ids_NP: Tensor, position_ids_NP: Tensor) -> Tensor:
        logits_NPV = run(token_ids_NP, position_ids_NP)
        dtypes.append(logits_NPV.dtype)
        return logits_NPV

    leak = document_leak(noting, num_classes, device, num_positions)
    return leak <= MAX_LEAK.get(dtypes[0], MAX_HALF_LEAK)


def say_documents_leak(where: str) -> str:
    """The message for a model that does not keep documents apart."""
    return (
        f"{where}: expected a model in which no document of a packed sequence sees another, by the position_ids that "
        "it is given, got one whose logits change with the document before; heed position_ids (a 0 begins a document), "
        "or give a corpus without document boundaries"
    )


def check_documents(model: nn.Module, where: str, num_classes: int, num_positions: int = NUM_PROBE_POSITIONS) -> None:
    """Try a model on two documents in one row.

    Args:
        model: in evaluation mode.
        where: how an error names it.
        num_classes: token ids are below it.
        num_positions: of the row, at least 4.

    Raises:
        StudentError: one sees the other.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if not takes_position_ids(model) or not keeps_documents_apart(
        lambda token_ids_NP, position_ids_NP: sequence_logits(model, token_ids_NP, position_ids_NP),
        num_classes,
        device,
        num_positions,
    ):
        raise StudentError(say_documents_leak(where))
