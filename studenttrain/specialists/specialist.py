"""A trained specialist, and all of them in the folder of `studenttrain specialists fit`.

Legend: N rows, M = the specialist's own classes + 1.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from storage.backends.files import clear_os_errors, replace_file
from storage.errors import DamageError, PathError, StudentError
from storage.untrusted import is_count, parse_json
from studenttrain.ending import RESULT
from studenttrain.export import WEIGHTS, StudentCard, load_student
from studenttrain.specialists.collapse import OwnClasses, raise_dustbin
from studenttrain.specialists.plan import load_plan

Phase = Literal["hard", "soft"]
PHASES: tuple[Phase, ...] = ("hard", "soft")  # in the order in which they follow each other
PLAN = "plan.json"
PHASES_FILE = "fit.json"
FORMAT = "logitstore-specialists-fit"
FORMAT_VERSION = 1
ADVICE = "run the same studenttrain specialists fit again"


@dataclass(frozen=True, eq=False)
class Specialist:
    """A specialist, as it is used.

    Attributes:
        classes: its own, ascending.
        model: gives logits (N, M), the dustbin last, as they were trained.
        dustbin_shift: log of the oversampling of its own rows, which is added to the dustbin's logit.
        card: what it is, and how its input is made.
    """

    classes: tuple[int, ...]
    model: nn.Module
    dustbin_shift: float
    card: StudentCard

    @classmethod
    def of(cls, model: nn.Module, card: StudentCard, where: str) -> Self:
        """The specialist of a model and its card.

        Raises:
            StudentError: it is a student of all classes, or its card can't be.
        """
        own = own_classes(card, where)
        return cls(own.classes, model, own.dustbin_shift, card)

    def logprobs(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (N, M) of the own classes and of all others together, the oversampling made good."""
        return raise_dustbin(self.model(inputs), self.dustbin_shift).log_softmax(1)


def own_classes(card: StudentCard, where: str) -> OwnClasses:
    """What a card says of a specialist's classes.

    Raises:
        StudentError: it is of a student of all classes, or can't be.
    """
    value: Any = card.specialist
    if value is None:
        raise StudentError(f"{where}: expected a specialist, got a student of all classes; give another folder")
    try:
        classes, num_classes, shift = value["classes"], value["num_classes"], value["dustbin_shift"]
        ascending = all(map(is_count, classes)) and all(one < two for one, two in pairwise(classes))
        holds = ascending and is_count(num_classes) and 0 < len(classes) == card.num_classes - 1
        if not (holds and classes[-1] < num_classes and len(classes) < num_classes and math.isfinite(shift)):
            raise ValueError
        return OwnClasses(tuple(classes), num_classes, float(shift))
    except (ValueError, KeyError, TypeError):
        raise StudentError(f"{where}: expected the card of a specialist, got a damaged one; {ADVICE}") from None


def phase_folder(out: Path, number: int, phase: Phase) -> Path:
    """Where a phase of a specialist lies."""
    return out / f"specialist-{number:02d}" / phase


def load_specialists(folder: str | Path, phase: Phase | None = None) -> list[Specialist]:
    """The specialists of a folder, on the CPU in evaluation mode, in the order of their plan.

    Args:
        folder: of `studenttrain specialists fit`.
        phase: as they were after it; None is the last one that was asked for.

    Raises:
        PathError: it is no such folder.
        StudentError: one of them is not finished, or can't be used; the message names it.
    """
    out = Path(folder)
    if not (out / PLAN).is_file():
        raise PathError(
            f"specialists '{out}': expected the folder of studenttrain specialists fit, got one without {PLAN}; give "
            "its --out"
        )
    plan = load_plan(out / PLAN)
    phase = (read_phases(out) or PHASES[:1])[-1] if phase is None else phase
    found = []
    for number, classes in enumerate(plan.specialists):
        where, at = f"specialist {number} of '{out}'", phase_folder(out, number, phase)
        if not ((at / RESULT).is_file() and (at / WEIGHTS).is_file()):
            got = "one that has not ended" if at.exists() else "none"
            raise StudentError(f"{where}: expected a finished run in '{at}', got {got}; {ADVICE}")
        specialist = Specialist.of(*load_student(at), where)
        if specialist.classes != classes:
            raise StudentError(f"{where}: expected the classes of its plan, got others; {ADVICE}, with another --out")
        found.append(specialist)
    return found


def read_phases(out: Path) -> tuple[Phase, ...]:
    """The phases that were asked for in a folder, in order; none where nothing was.

    Raises:
        StudentError: the file that says it is damaged.
    """
    path = out / PHASES_FILE
    if not path.is_file():
        return ()
    try:
        with clear_os_errors(path):
            value: Any = parse_json(path.read_bytes(), str(path))
        if value["format"] != FORMAT or value["version"] > FORMAT_VERSION:
            raise ValueError("another format")
        return tuple(phase for phase in PHASES if phase in value["phases"])
    except (DamageError, ValueError, KeyError, TypeError) as error:
        raise StudentError(
            f"{path}: expected the phases of specialists, got something else ({error}); {ADVICE}"
        ) from None


def write_phases(out: Path, phases: tuple[Phase, ...]) -> None:
    """Note that phases were asked for, beside those that were before."""
    known = (*read_phases(out), *phases)
    value = {"format": FORMAT, "version": FORMAT_VERSION, "phases": [phase for phase in PHASES if phase in known]}
    with clear_os_errors(out):
        replace_file(out / PHASES_FILE, (json.dumps(value) + "\n").encode())
