"""A generalist and its specialists as one classifier.

Legend: N rows, C classes, M specialists, K a specialist's classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from storage.errors import MismatchError, StudentError
from studenttrain.checks import check_class_names
from studenttrain.export import StudentCard, load_student
from studenttrain.specialists.fusion import DEFAULT_TOLERANCE, FusedResult, fuse
from studenttrain.specialists.plan import SpecialistsPlan, load_plan
from studenttrain.specialists.specialist import PHASES, PLAN, Phase, Specialist, load_specialists


@dataclass(frozen=True, eq=False)
class Fused:
    """What generalist and specialists say of some rows.

    Attributes:
        logprobs_NC: of all together, float64.
        generalist_NC: of the generalist alone.
        active_NM: bool, which specialists were active.
        said: of each specialist its log-probabilities (N, K + 1), the dustbin last; NaN in rows that it did not see.
        result: how the fusion went.
    """

    logprobs_NC: Tensor  # noqa: N815 - array names carry their shape
    generalist_NC: Tensor  # noqa: N815
    active_NM: Tensor  # noqa: N815
    said: tuple[Tensor, ...]
    result: FusedResult


class FusedClassifier:
    """A generalist and its specialists as one classifier: a specialist sees the rows that it is active for, no others.

    Active are those that have one of the classes that the generalist finds likeliest.

    Args:
        specialists: at least one; their models are moved to the device.
        num_classes: of the generalist.
        generalist: gives logits (N, C); None where its log-probabilities are given, such as stored ones.
        active_top: how many of the generalist's likeliest classes make a specialist active, at least 1.
        tolerance: of the fusion, as `fuse` takes it.
        device: of the models.

    Raises:
        ValueError: an option is out of range.
        StudentError: the specialists are of other classes, or take different inputs.
    """

    def __init__(
        self,
        specialists: Sequence[Specialist],
        num_classes: int,
        generalist: nn.Module | None = None,
        *,
        active_top: int = 1,
        tolerance: float = DEFAULT_TOLERANCE,
        device: torch.device | str = "cpu",
    ) -> None:
        if not specialists:
            raise ValueError("specialists: expected at least one, got none")
        if not 1 <= active_top <= num_classes:
            raise ValueError(f"active_top: expected 1 to the {num_classes} classes, got {active_top}")
        if not 0 < tolerance < float("inf"):
            raise ValueError(f"tolerance: expected a number above 0, got {tolerance}")
        self.device = torch.device(device)
        self.num_classes, self.active_top, self.tolerance = num_classes, active_top, tolerance
        self.generalist = None if generalist is None else generalist.to(self.device).eval()
        self.specialists = tuple(replace(it, model=it.model.to(self.device).eval()) for it in specialists)
        self._member_MC = torch.zeros(len(specialists), num_classes, dtype=torch.bool)
        for number, specialist in enumerate(self.specialists):
            if specialist.classes[-1] >= num_classes:
                raise StudentError(
                    f"specialist {number}: expected classes below the generalist's {num_classes}, got class "
                    f"{specialist.classes[-1]}; give the specialists of this generalist"
                )
            self._member_MC[number, list(specialist.classes)] = True
            _check_input(specialist.card, self.specialists[0].card, f"specialist {number}", "specialist 0")
        self._member_MC = self._member_MC.to(self.device)

    @classmethod
    def load(
        cls, folder: str | Path, generalist: str | Path | None = None, *, phase: Phase | None = None, **options: Any
    ) -> Self:
        """The classifier of a folder of `studenttrain specialists fit`.

        Args:
            folder: of the specialists.
            generalist: a run's folder, a `.safetensors` file with its card beside it, or a checkpoint; None where its
                log-probabilities will be given.
            phase: which of the specialists; None is the last.
            **options: as the class takes them.

        Raises:
            StoreError: something is not there, or they don't fit each other.
        """
        plan, specialists = load_folder(folder, phase)
        if generalist is None:
            return cls(specialists, plan.num_classes, **options)
        model, _ = load_generalist(generalist, plan, specialists)
        return cls(specialists, plan.num_classes, model, **options)

    @torch.inference_mode()
    def logprobs(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (N, C), float64, of inputs.

        Raises:
            ValueError: there is no generalist: give its log-probabilities to `fuse`.
            StudentError: as `fuse` raises it.
        """
        return self.fuse(inputs).logprobs_NC

    @torch.inference_mode()
    def fuse(self, inputs: Tensor, generalist_NC: Tensor | None = None, *, every_row: bool = False) -> Fused:
        """What all together say of inputs, and what each says.

        Args:
            inputs: (N, ...), as the models take them.
            generalist_NC: the generalist's log-probabilities; None runs it.
            every_row: let each specialist see all rows, though it is active for some.

        Raises:
            ValueError: neither is there a generalist, nor are log-probabilities given.
            StudentError: a model's output is no distribution, or the fusion does not come to its tolerance.
        """
        inputs = inputs.to(self.device)
        if generalist_NC is None:
            if self.generalist is None:
                raise ValueError(
                    "generalist_NC: expected log-probabilities, since there is no generalist to run, got none; give one"
                )
            generalist_NC = self.generalist(inputs)[:, : self.num_classes].double().log_softmax(1)
        generalist_NC = generalist_NC.to(self.device)
        active_NM = self.active(generalist_NC)
        said = []
        for number, specialist in enumerate(self.specialists):
            said_NK = torch.full(
                (len(inputs), len(specialist.classes) + 1), torch.nan, dtype=torch.float64, device=self.device
            )
            rows = torch.arange(len(inputs), device=self.device) if every_row else active_NM[:, number].nonzero()[:, 0]
            if len(rows):
                said_NK[rows] = specialist.logprobs(inputs[rows]).double()
            said.append(said_NK)
        classes = [specialist.classes for specialist in self.specialists]
        result = fuse(generalist_NC, list(zip(classes, said, strict=True)), active_NM, self.tolerance)
        return Fused(result.logprobs_NC, generalist_NC, active_NM, tuple(said), result)

    def active(self, generalist_NC: Tensor) -> Tensor:
        """Which specialists are active, bool (N, M): those with one of the generalist's likeliest classes."""
        if self.active_top == 1:
            top_NT = generalist_NC.argmax(1, keepdim=True)
        else:
            top_NT = generalist_NC.argsort(dim=1, descending=True, stable=True)[:, : self.active_top]
        return self._member_MC[:, top_NT].any(2).T


def load_folder(folder: str | Path, phase: Phase | None) -> tuple[SpecialistsPlan, list[Specialist]]:
    """The plan and the specialists of a folder of `studenttrain specialists fit`.

    Raises:
        StoreError: they are not there, not finished, or can't be used.
        ValueError: there is no such phase.
    """
    if phase is not None and phase not in PHASES:
        raise ValueError(f"phase: expected {' or '.join(PHASES)}, got {phase!r}")
    specialists = load_specialists(folder, phase)
    return load_plan(Path(folder) / PLAN), specialists


def load_generalist(
    path: str | Path, plan: SpecialistsPlan, specialists: Sequence[Specialist]
) -> tuple[nn.Module, StudentCard]:
    """The generalist of a run, and its card.

    Raises:
        StudentError: it can't be used, or takes another input than the specialists.
        MismatchError: it is of other classes than the plan.
    """
    model, card = load_student(Path(path))
    where = f"generalist '{path}'"
    if card.sequences is not None or card.specialist is not None:
        what = "a language model" if card.sequences is not None else "a specialist"
        raise StudentError(f"{where}: expected a model of all classes, got {what}; give the generalist")
    if card.num_classes != plan.num_classes:
        raise MismatchError(
            f"{where}: expected the plan's {plan.num_classes} classes, got {card.num_classes}; give the generalist "
            "that the specialists were made for"
        )
    check_class_names(where, card.class_names, plan.class_names, "the plan of the specialists")
    _check_input(card, specialists[0].card, where, "the specialists")
    return model, card


def _check_input(card: StudentCard, expected: StudentCard, where: str, whose: str) -> None:
    """Refuse a model that sees a sample otherwise than another one."""
    if dict(card.preprocess) != dict(expected.preprocess) or card.input_shape != expected.input_shape:
        raise StudentError(
            f"{where}: expected an input of {list(expected.input_shape)}, preprocessed as that of {whose}, got "
            f"{list(card.input_shape)}, or another preprocessing; give models of one input"
        )
