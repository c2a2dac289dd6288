"""What a run of `studenttrain specialists fit` is asked to do: one frozen value, checked when it is built."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.urls import is_url
from studenttrain.config import FitConfig, check_not_empty
from studenttrain.specialists.sampling import DEFAULT_OWN_SHARE
from studenttrain.specialists.specialist import Phase, phase_folder

PATHS = ("init", "labels", "val_data", "val_labels", "cache")


@dataclass(frozen=True)
class SpecialistsConfig:
    """What specialists are trained, on what, and how.

    Attributes:
        targets: path of the generalist's store.
        data: path of the corpus that it was made from.
        plan: path of the plan.
        student: spec of a model of all classes, whose last layer is replaced.
        out: folder of all.
        epochs: passes over a specialist's rows in the phase `hard`; this or `steps`, or neither for no such phase.
        steps: optimizer steps of it.
        soft_epochs: passes of the phase `soft`, which goes on from it; None leaves it out.
        alpha: weight of the soft targets in the phase `soft`, in (0, 1]; None is as in `fit`.
        temperature: of the phase `soft`; None is 1, at which specialists are used.
        own_share: of the rows of an epoch that are of the own classes, above 0 and below 1.
        specialists: numbers of those that are trained; none for all.
        workers: processes of this machine that train them side by side; None trains one after the other, in this one.
        scheduler: address of a Dask scheduler whose workers do it.
        training: further options of `FitConfig`, for both phases.

    Raises:
        ValueError: an option is out of range, contradicts another, or would be ignored.
    """

    targets: str
    data: str
    plan: str
    student: str
    out: str
    epochs: int | None = None
    steps: int | None = None
    soft_epochs: int | None = None
    alpha: float | None = None
    temperature: float | None = None
    own_share: float = DEFAULT_OWN_SHARE
    specialists: tuple[int, ...] = ()
    workers: int | None = None
    scheduler: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_not_empty("plan", self.plan)
        check_not_empty("scheduler", self.scheduler)
        if not self.phases:
            raise ValueError("epochs, steps, soft_epochs: expected one of them, got none; say how long to train")
        if not 0 < self.own_share < 1:
            raise ValueError(f"own_share: expected a number between 0 and 1, got {self.own_share:g}")
        for name in ("alpha", "temperature"):
            if getattr(self, name) is not None and self.soft_epochs is None:
                raise ValueError(f"{name}: expected --soft-epochs beside it, got none; leave it out, or give them")
        if self.alpha == 0:
            raise ValueError("alpha: expected a number above 0, up to 1, got 0; leave --soft-epochs out instead")
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("workers, scheduler: expected one of them, got both; leave one out")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("torchrun: expected one process, got ranks; give --workers or --scheduler instead")
        for phase in self.phases:
            self.run(0, phase)  # built to be checked

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What each specialist goes through, in order."""
        hard: tuple[Phase, ...] = () if self.epochs is None and self.steps is None else ("hard",)
        return hard if self.soft_epochs is None else (*hard, "soft")

    def run(self, number: int, phase: Phase) -> FitConfig:
        """The options of a phase of a specialist, which is a run of `fit` in a folder of its own."""
        place = {"targets": self.targets, "data": self.data, "student": self.student, "cache_size": None}
        place["out"] = str(phase_folder(Path(self.out), number, phase))
        if phase == "hard":
            how: dict[str, Any] = {"epochs": self.epochs, "steps": self.steps, "alpha": 0.0}
        else:
            temperature = 1.0 if self.temperature is None else self.temperature
            how = {"epochs": self.soft_epochs, "alpha": self.alpha, "temperature": temperature}
            if "hard" in self.phases:
                how["init"] = str(phase_folder(Path(self.out), number, "hard"))
        return FitConfig(**{**place, **self.training, **how})

    def absolute(self) -> "SpecialistsConfig":
        """The same for a process in another folder."""

        def at(path: Any) -> Any:
            return path if path is None or is_url(path) else os.path.abspath(path)  # noqa: PTH100 - keeps links

        paths = {name: at(getattr(self, name)) for name in ("targets", "data", "plan", "out")}
        training = {name: at(value) if name in PATHS else value for name, value in self.training.items()}
        return replace(self, **paths, training=training)
