"""What a calibration found, as a student's card keeps it and as a person reads it.

Legend: C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.console import format_count
from studenttrain.calibration_prior import name_of
from studenttrain.export import PROGRAM, StudentCard

SMALL_BIAS = 0.5
SHOWN_CLASSES = 10
NAME_CHARACTERS = 24


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found and wrote.

    Attributes:
        out: folder of the calibrated student.
        card: of it; its `calibration` says all.
        note: of the prior, or None.
        files: names of what was written.
        no_program: why there is no program, or None.
        was_there: whether the folder held the same calibration before.
    """

    out: str
    card: StudentCard
    note: str | None
    files: tuple[str, ...]
    no_program: str | None
    was_there: bool

    @property
    def record(self) -> Mapping[str, Any]:
        """What the card says of the calibration."""
        assert self.card.calibration is not None
        return self.card.calibration

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object: the card's record, and where it lies."""
        return {"out": self.out, **self.record}

    def __str__(self) -> str:
        record, data = self.record, self.record["data"]
        again = "had been calibrated so already: " if self.was_there else ""
        num_used, num_refused = data["num_samples"] - data["num_refused"], data["num_refused"]
        lines = [f"{again}{format_count(num_used)} samples, {format_count(num_refused)} refused"]
        if record["temperature_from"] != "none":
            loss = record["loss"]
            lines.append(
                f"temperature {record['temperature']:.4g}: {loss['of']} {loss['before']:.4f} before, "
                f"{loss['after']:.4f} with it, nats"
            )
        if record["bias"] is not None:
            lines += _said_biases(self.card, record)
        lines += [f"export: {Path(self.out) / name}" for name in self.files]
        lines += [] if self.note is None else [self.note]
        lines += [] if self.no_program is None else [f"no {PROGRAM}: {self.no_program}"]
        return "\n".join(lines)


def _said_biases(card: StudentCard, record: Mapping[str, Any]) -> list[str]:
    """The biases that are not small, and the classes whose mean mass moved most."""
    bias_C = np.array(record["bias"])
    large = [int(index) for index in np.argsort(-abs(bias_C), kind="stable") if abs(bias_C[index]) > SMALL_BIAS]
    shown = [f"{name_of(card, index)} {bias_C[index]:+.2f}" for index in large[:SHOWN_CLASSES]]
    rest = np.delete(bias_C, large[:SHOWN_CLASSES])
    if len(rest):
        shown.append(f"the other {len(rest)} within {abs(rest).max():.2f} of 0")
    lines = [f"biases by {record['method']}: {', '.join(shown)}"]
    mass, fit = record["mass"], record["fit"]
    before_C, after_C, prior_C = (np.array(mass[name]) for name in ("before", "after", "prior"))
    moved = np.argsort(-abs(np.log(np.maximum(before_C, 1e-30) / prior_C)), kind="stable")[:SHOWN_CLASSES]
    lines.append(
        f"mean mass, before and with them, and the prior{'' if len(moved) == len(bias_C) else ', farthest off'}:"
    )
    lines += [
        f"  {name_of(card, int(index))[:24]:<24} {100 * before_C[index]:9.4f} %  {100 * after_C[index]:9.4f} %  "
        f"{100 * prior_C[index]:9.4f} %"
        for index in moved
    ]
    if fit["num_passes"] is not None:
        slack = "" if not fit["slack"] else f", with a slack of {fit['slack']:g} standard deviations"
        lines.append(f"met within {100 * fit['error']:.2g} % of each share after {fit['num_passes']} passes{slack}")
    return lines
