"""A student as files that others use: weights, a `torch.export` program, and a card that says what they are."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from storage.backends.files import clear_os_errors
from storage.errors import StudentError
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint, write_durably
from studenttrain.language import takes_position_ids
from studenttrain.models import build_model
from studenttrain.specialists.head import cut_head

WEIGHTS = "student.safetensors"
PROGRAM = "student.pt2"
CARD = "student.json"
MAX_REASON = 160  # characters of another library's message


@dataclass(frozen=True)
class StudentCard:
    """What a student is, and what it needs to be used.

    Attributes:
        student: spec that builds it.
        input_shape: shape of one input, without its batch.
        num_classes: classes of its logits.
        class_names: names in class order, or None where they are not known.
        preprocess: how a sample becomes its input, as in the store's manifest.
        store: `digest` of what the store's manifest says, and the `content_digest` where it was finalized.
        sequences: of a language model, what the store says of its sequences: positions and tokenizer; else None.
        rows: which rows of the store it learned from, as `ClassSelection` says them; None where it was from all.
        calibration: what `studenttrain calibrate` folded into its last layer, and from what; None where it did not.
        specialist: of a specialist, whose logits are of its own classes and a dustbin, last: which these are, of how
            many, and what `Specialty.narrow` says of its rows; else None.
    """

    student: str
    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    preprocess: Mapping[str, Any]
    store: Mapping[str, Any]
    sequences: Mapping[str, Any] | None = None
    rows: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    specialist: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The card as a JSON object."""
        names = None if self.class_names is None else list(self.class_names)
        return asdict(self) | {"input_shape": list(self.input_shape), "class_names": names}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The card of a JSON object; KeyError where a field is missing."""
        names = value["class_names"]
        return cls(
            student=value["student"],
            input_shape=tuple(value["input_shape"]),
            num_classes=value["num_classes"],
            class_names=None if names is None else tuple(names),
            preprocess=value["preprocess"],
            store=value["store"],
            sequences=value.get("sequences"),
            rows=value.get("rows"),
            calibration=value.get("calibration"),
            specialist=value.get("specialist"),
        )


def build_carded(card: StudentCard) -> nn.Module:
    """The model of a card, with random weights.

    Raises:
        StudentError: it can't be built.
    """
    if card.specialist is not None:
        model = build_model(card.student, card.specialist["num_classes"], card.input_shape)
        return cut_head(model, card.specialist["classes"], card.input_shape, f"student '{card.student}'")
    if card.sequences is None:
        return build_model(card.student, card.num_classes, card.input_shape)
    return build_model(card.student, card.num_classes, num_positions=card.sequences["num_positions"])


def example_inputs(card: StudentCard, model: nn.Module) -> tuple[Tensor, ...]:
    """Inputs of zeros, of one sample: of a language model token ids (1, P), and position ids where it takes them."""
    if card.sequences is None:
        return (torch.zeros(1, *card.input_shape),)
    token_ids_NP = torch.zeros(1, card.sequences["num_positions"], dtype=torch.int64)
    positions = torch.arange(token_ids_NP.shape[1])[None]
    return (token_ids_NP, positions) if takes_position_ids(model) else (token_ids_NP,)


def export_student(folder: Path, model: nn.Module, card: StudentCard) -> str | None:
    """Write `student.safetensors`, `student.json` and `student.pt2` into a folder.

    Args:
        folder: the run's folder.
        model: the student, on the CPU; it is left in evaluation mode.
        card: what it is; the program is traced with zeros, and its batch stays free.

    Returns:
        Why there is no program, in one line, or None: a model that `torch.export` can't trace still has its weights.
    """
    model.eval()
    save_weights(folder / WEIGHTS, model)
    write_durably(folder / CARD, lambda file: file.write((json.dumps(card.to_json(), indent=2) + "\n").encode()))
    batch = torch.export.Dim("batch", min=1)
    # a batch of one would be traced as a constant
    inputs = tuple(value.repeat(2, *[1] * (value.ndim - 1)) for value in example_inputs(card, model))
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
        (folder / PROGRAM).unlink(missing_ok=True)
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    archive = io.BytesIO()  # a write that fails inside torch's archive writer would end the process
    torch.export.save(program, archive)
    write_durably(folder / PROGRAM, lambda file: file.write(archive.getbuffer()))
    return None


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's weights as safetensors, tensors that are tied only once."""
    partial = path.with_name(f".{path.name}.partial")
    with clear_os_errors(path):
        try:
            save_model(model, str(partial))
            data = partial.read_bytes()
        except SafetensorError as error:  # its words for what the system says
            if (code := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        finally:
            partial.unlink(missing_ok=True)
    write_durably(path, lambda file: file.write(data))


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill a model with the weights of a safetensors file.

    Raises:
        StudentError: the file is missing, damaged, or of another model.
    """
    try:
        fill_weights(path, model)
    except RuntimeError as error:
        raise StudentError(
            f"weights '{path}': expected weights of this student, got others ({say_difference(error)}); "
            "give the student's own"
        ) from error


def fill_weights(path: Path, model: nn.Module) -> None:
    """Do what `load_weights` does, and leave it to the caller to say whose weights were expected.

    Raises:
        StudentError: the file is missing or damaged.
        RuntimeError: its weights are of another model.
    """
    if not path.is_file():
        raise StudentError(f"weights '{path}': expected a .safetensors file, got nothing there; check the path")
    try:
        load_model(model, str(path))
    except SafetensorError as error:
        raise StudentError(
            f"weights '{path}': expected a whole .safetensors file, got a damaged or foreign one "
            f"({shorten(str(error), MAX_REASON)}); take another copy"
        ) from error


def say_difference(error: RuntimeError) -> str:
    """The first weight that does not fit, of torch's list of all of them."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return shorten(lines[min(1, len(lines) - 1)], MAX_REASON, placeholder=" ...")


def load_student(path: Path) -> tuple[nn.Module, StudentCard]:
    """A trained student on the CPU in evaluation mode, and its card: averaged weights where the run averaged.

    Args:
        path: folder of a run, a `.safetensors` file with its `student.json` beside it, or a checkpoint.

    Raises:
        StudentError: nothing is there, or it can't be used.
    """
    with clear_os_errors(path):
        if path.is_dir():
            path = path / (WEIGHTS if (path / WEIGHTS).is_file() else CHECKPOINT)
    if path.suffix == ".safetensors":
        card = load_card(path.with_name(CARD))
        model = build_carded(card)
        load_weights(path, model)
    else:
        checkpoint = load_checkpoint(path)
        card = StudentCard.from_json(checkpoint["card"])
        model = build_carded(card)
        load_state(path, model, checkpoint["ema"] or checkpoint["model"])
    return model.eval(), card


def load_card(path: Path) -> StudentCard:
    """The card in a file.

    Raises:
        StudentError: it is missing or damaged.
    """
    try:
        return StudentCard.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise StudentError(
            f"student '{path}': expected the card that `studenttrain fit` writes beside the weights, got none; "
            "keep both in one folder, or give the folder of the run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StudentError(
            f"student '{path}': expected a student's card, got a damaged file ({error}); take another copy"
        ) from error


def load_state(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Fill a model with the weights of a checkpoint.

    Raises:
        StudentError: they are of another model: the code behind the spec was changed.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StudentError(
            f"checkpoint '{path}': expected weights of this student, got others ({say_difference(error)}); "
            "bring back the code that the student was made of, or start a new run"
        ) from error
