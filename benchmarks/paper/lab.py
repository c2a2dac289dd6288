"""What all experiments on MNIST share: where things lie, the one store, and students trained and tried by commands."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.paper.arguments import settings_from
from benchmarks.paper.idx import FILES, TEST_IMAGES, TRAIN_IMAGES
from benchmarks.paper.steps import Steps

TEACHER = "mlp:784-1200-1200-10"
DUMP = ("--encoding", "dense", "--values", "float32")


@dataclass(frozen=True)
class Settings:
    """What a run of the experiments is asked to do.

    Attributes:
        mnist: folder of the four IDX files.
        run: folder of everything that is made.
        seeds: of how many seeds each student is trained, from 0 on.
        threads: of each command.
        teacher_epochs: passes of the teacher over the training images.
        large_epochs: of the students of 800 units.
        middle_epochs: of the students of 300 units.
        small_epochs: of the students of 30 units.
        omitted_epochs: of the students without 3s.
        two_class_epochs: of the students of 7s and 8s, which see a fifth of the images in each.
        few_rows: of the 3 % of the data.
        few_steps: optimizer steps on them.
        members: of the ensemble.
        member_rows: that its members, and what is distilled from it, are trained on.
        member_steps: their optimizer steps.
        batch_size: rows of a batch.
        precision: of the students' matrix products.
    """

    mnist: Path
    run: Path
    seeds: int = 3
    threads: int = 1
    teacher_epochs: int = 100
    large_epochs: int = 30
    middle_epochs: int = 10
    small_epochs: int = 25
    omitted_epochs: int = 10
    two_class_epochs: int = 20
    few_rows: int = 1800
    few_steps: int = 2000
    members: int = 10
    member_rows: int = 12_000
    member_steps: int = 2000
    batch_size: int = 128
    precision: str = "bf16"


@dataclass(frozen=True)
class Tried:
    """Test errors of one thing, over its seeds."""

    errors: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean number of errors."""
        return statistics.mean(self.errors)


class Lab:
    """The run folder, and what is done in it.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        places = {"RUN": settings.run, "MNIST": settings.mnist}
        self.steps = Steps(settings.run / "steps", settings.threads, places)

    @property
    def train_images(self) -> Path:
        """The IDX file of the training images."""
        return self.settings.mnist / TRAIN_IMAGES

    @property
    def test_images(self) -> Path:
        """The IDX file of the test images."""
        return self.settings.mnist / TEST_IMAGES

    @cached_property
    def weights(self) -> Path:
        """The teacher's weights, trained by now."""
        settings, out = self.settings, self.settings.run / "teacher.pt"
        self.steps.call(
            "teacher", "-m", "benchmarks.paper.train_teacher", "--mnist", settings.mnist, "--out", out,
            "--epochs", settings.teacher_epochs, "--threads", settings.threads,
        )  # fmt: skip
        return out

    @cached_property
    def store(self) -> Path:
        """The teacher's targets for the training images: the one store of all experiments."""
        return self.dump("train", self.weights, TEACHER, self.train_images)

    @cached_property
    def teacher_errors(self) -> int:
        """Of the teacher on the test images."""
        return self.store_errors("test", self.dump("test", self.weights, TEACHER, self.test_images))

    def dump(self, name: str, weights: Path, arch: str, images: Path) -> Path:
        """The store of a model's targets for some images, `RUN/NAME.zarr`."""
        out = self.settings.run / f"{name}.zarr"
        self.steps.call(
            f"dump-{name}", "teacherdump", "run", "--model", weights, "--arch", arch, "--data", images, *DUMP,
            "--out", out,
        )  # fmt: skip
        return out

    def store_errors(self, name: str, store: Path) -> int:
        """In how many rows of a store the top-1 is not the hard target."""
        agreement = json.loads(self.steps.call(f"stats-{name}", "logitstore", "stats", store, "--json"))["agreement"]
        return int(agreement["num_rows"] - agreement["num_agreed"])

    def part(self, name: str, store: Path, rows: tuple[int, int]) -> Path:
        """Some rows of a store, `RUN/NAME.zarr`."""
        out = self.settings.run / f"{name}.zarr"
        self.steps.call(f"copy-{name}", "logitstore", "copy", store, out, "--rows", f"{rows[0]}:{rows[1]}")
        return out

    def fit(
        self,
        name: str,
        student: str,
        temperature: float | None,
        seed: int,
        *options: object,
        targets: Path | None = None,
    ) -> Path:
        """The folder of a student, trained by now.

        Args:
            name: of its folder in `RUN/students`.
            student: its architecture.
            temperature: of the soft targets, or None for hard targets alone.
            seed: of its weights and its order of rows.
            options: further ones of `studenttrain fit`.
            targets: another store than the one of the teacher.
        """
        out = self.settings.run / "students" / name
        target = ("--alpha", 0) if temperature is None else ("--temperature", f"{temperature:g}")
        self.steps.call(
            f"fit-{name}", "studenttrain", "fit", "--targets", targets or self.store, "--data", self.train_images,
            "--student", student, "--out", out, *target, "--seed", seed, "--batch-size", self.settings.batch_size,
            "--precision", self.settings.precision, *options, "--quiet",
        )  # fmt: skip
        return out

    def errors(self, name: str, student: Path, images: Path | None = None) -> int:
        """Errors of a student, on the test images unless others are given.

        Args:
            name: of the step.
            student: its folder.
            images: an IDX file with its classes beside it.
        """
        found = json.loads(
            self.steps.call(
                f"eval-{name}", "studenttrain", "eval", "--checkpoint", student, "--data", images or self.test_images,
                "--json",
            )
        )  # fmt: skip
        print(f"{name}: {found['num_errors']} errors of {found['num_samples']}", flush=True)
        return int(found["num_errors"])

    def students(
        self,
        name: str,
        student: str,
        temperature: float | None,
        *options: object,
        targets: Sequence[Path] | None = None,
    ) -> Tried:
        """Test errors of one student, over the seeds.

        Args:
            name: of the student; the seed is appended.
            student: its architecture.
            temperature: of the soft targets, or None for hard targets alone.
            options: further ones of `studenttrain fit`.
            targets: a store for each seed, instead of the one of the teacher.
        """
        found = []
        for seed in range(self.settings.seeds):
            named, store = f"{name}-seed{seed}", targets[seed] if targets is not None else None
            found.append(self.errors(named, self.fit(named, student, temperature, seed, *options, targets=store)))
        return Tried(tuple(found))


def lab_of(doc: str | None, arguments: Sequence[str] | None = None) -> Lab:
    """The lab that a script's arguments ask for.

    Args:
        doc: of the script, shown by `--help`.
        arguments: instead of the command's own.
    """
    return Lab(settings_from(Settings, doc, arguments, {"mnist": FILES}))


def show(figures: dict[str, Any]) -> None:
    """Print an experiment's figures as JSON."""
    print(json.dumps(figures, indent=2), flush=True)
