"""The specialists' experiment by the real commands: one generalist, dumped once; everything else from its store."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.arguments import settings_from
from benchmarks.paper.cifar.images import MEAN, STD
from benchmarks.paper.cifar.superclasses import agreement, superclasses
from benchmarks.paper.steps import Steps

NETWORK = "benchmarks.paper.cifar.network:make"
PHASES = ("hard", "soft")
TRIED = ("held", "seen", "test")
NUM_SUPERCLASSES = 20
# What a student learns: a store, and how its targets count.
STUDENTS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "fused": ("fused.zarr", ("--alpha", 1, "--temperature", 1)),
    "generalist": ("transfer.zarr", ("--alpha", 1, "--temperature", 1)),
    "hard": ("transfer.zarr", ("--alpha", 0)),
}


@dataclass(frozen=True)
class Settings:
    """What a run of the experiment is asked to do. All but the first four were chosen by the held-out rows.

    Attributes:
        cifar: folder of train-*.parquet and test-0.parquet.
        run: folder of everything that is made.
        threads: of each command.
        seeds: of how many seeds each student is trained, from 0 on.
        generalist_epochs: passes of the generalist over the training rows.
        copies: transfer rows for each training row.
        num_specialists: clusters that are looked for.
        classes_each: of each specialist.
        epochs: of each specialist on hard targets.
        soft_epochs: after that, on the generalist's soft targets and hard ones.
        alpha: weight of the soft targets there.
        lr: of the specialists, in each phase.
        warmup_steps: of specialists and students.
        student_lr: of the student that everything is distilled into.
        student_epochs: of it, over the transfer rows.
    """

    cifar: Path
    run: Path
    threads: int = 1
    seeds: int = 1
    generalist_epochs: int = 12
    copies: int = 2
    num_specialists: int = 10
    classes_each: int = 12
    epochs: int = 1
    soft_epochs: int = 1
    alpha: float = 0.5
    lr: float = 0.02
    warmup_steps: int = 20
    student_lr: float = 0.02
    student_epochs: int = 1

    @property
    def sgd(self) -> tuple[object, ...]:
        """How specialists and students are trained."""
        return (
            "--optimizer", "sgd", "--weight-decay", 5e-4, "--warmup-steps", self.warmup_steps, "--precision", "bf16",
            "--readers", self.threads,
        )  # fmt: skip


def settings_of(doc: str | None, arguments: Sequence[str] | None = None) -> Settings:
    """The settings that a script's arguments ask for.

    Args:
        doc: of the script, shown by `--help`.
        arguments: instead of the command's own.
    """
    return settings_from(Settings, doc, arguments, {"cifar": ("train-0.parquet", "test-0.parquet")})


def run_all(settings: Settings, pictures: Path) -> dict[str, Any]:
    """The figures of the whole experiment; what was done before is not done again.

    Args:
        settings: of the run.
        pictures: folder that a picture of the clusters goes to.
    """
    run, steps = settings.run, steps_of(settings)
    trained = steps.call(
        "generalist", "-m", "benchmarks.paper.cifar.train_generalist", "--cifar", settings.cifar,
        "--out", run / "generalist.safetensors", "--epochs", settings.generalist_epochs, "--threads", settings.threads,
    )  # fmt: skip
    steps.used.clear()  # the generalist may have been trained before, by its own command: it keeps its own time
    steps.call(
        "corpora", "-m", "benchmarks.paper.cifar.corpora", "--cifar", settings.cifar, "--run", run,
        "--copies", settings.copies,
    )  # fmt: skip
    for name in ("transfer", *TRIED):
        dump(steps, settings, name)
    figures: dict[str, Any] = {"generalist": json.loads(trained)}
    figures["clusters"] = find_clusters(steps, settings)
    shutil.copyfile(run / "clusters.png", pictures / "paper-cifar-clusters.png")
    figures["phases"] = train_specialists(steps, settings)
    figures["dustbin"] = look_at_dustbins(steps, settings)
    figures["students"] = train_students(steps, settings)
    figures["settings"] = {name: value for name, value in asdict(settings).items() if name not in ("cifar", "run")}
    return figures | {"time": steps.times()}


def steps_of(settings: Settings) -> Steps:
    """The record of what was done in the run's folder."""
    return Steps(settings.run / "steps", settings.threads, {"RUN": settings.run, "CIFAR": settings.cifar})


def corpus(settings: Settings, name: str) -> Path:
    """The Parquet file of one of the corpora."""
    return settings.cifar / "test-0.parquet" if name == "test" else settings.run / f"{name}.parquet"


def dump(steps: Steps, settings: Settings, name: str) -> None:
    """The generalist's targets for a corpus, `RUN/NAME.zarr`; it is not run again."""
    steps.call(
        f"dump-{name}", "teacherdump", "run", "--model", settings.run / "generalist.safetensors", "--arch", NETWORK,
        "--data", corpus(settings, name), "--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD)),
        "--encoding", "dense", "--values", "float16", "--precision", "bf16", "--readers", settings.threads, "--quiet",
        "--out", settings.run / f"{name}.zarr",
    )  # fmt: skip


def find_clusters(steps: Steps, settings: Settings) -> dict[str, Any]:
    """The specialists' classes, and, of as many clusters as there are superclasses, how they agree with these."""
    run = settings.run
    steps.call(
        "plan", "studenttrain", "specialists", "plan", "--targets", run / "transfer.zarr", "--out", run / "plan.json",
        "--num-specialists", settings.num_specialists, "--classes-each", settings.classes_each, "--quiet",
    )  # fmt: skip
    fine_N, coarse_N = labels(corpus(settings, "test"))
    superclass_C = superclasses(fine_N, coarse_N, int(fine_N.max()) + 1)
    plan = json.loads((run / "plan.json").read_text())
    figures: dict[str, Any] = {"specialists": described(plan, superclass_C)}
    for on in ("correlation", "covariance"):
        out = run / f"clusters-{on}.json"
        drawn = ("--picture", run / "clusters.png") if on == "correlation" else ()
        steps.call(
            f"clusters-{on}", "studenttrain", "specialists", "plan", "--targets", run / "transfer.zarr", "--out", out,
            "--num-specialists", NUM_SUPERCLASSES, "--on", on, "--quiet", *drawn,
        )  # fmt: skip
        figures[on] = described(json.loads(out.read_text()), superclass_C)
    return figures


def labels(path: Path) -> tuple[Any, Any]:
    """Classes and superclasses of all rows of a corpus."""
    import pyarrow.parquet as pq

    table: Any = pq.read_table(path, columns=["fine_label", "coarse_label"])
    return table.column("fine_label").to_numpy(), table.column("coarse_label").to_numpy()


def described(plan: Mapping[str, Any], superclass_C: Any) -> dict[str, Any]:
    """The sets of classes of a plan by their names, and how they agree with the superclasses."""
    names = plan["class_names"]
    return {
        "classes": [[names[label] for label in classes] for classes in plan["specialists"]],
        "num_uncovered": len(names) - len({label for classes in plan["specialists"] for label in classes}),
        "superclasses": asdict(agreement(plan["specialists"], superclass_C)),
    }


def train_specialists(steps: Steps, settings: Settings) -> dict[str, Any]:
    """All specialists, tried after each phase on held-out, seen and test rows."""
    run = settings.run
    common = (
        "studenttrain", "specialists", "fit", "--targets", run / "transfer.zarr",
        "--data", corpus(settings, "transfer"), "--plan", run / "plan.json",
        "--student", NETWORK, "--init", run / "generalist.safetensors", "--out", run / "specialists",
        "--epochs", settings.epochs, "--lr", settings.lr, *settings.sgd, "--quiet",
    )  # fmt: skip
    soft = ("--soft-epochs", settings.soft_epochs, "--alpha", settings.alpha, "--temperature", 1)
    figures = {}
    for phase, options in (("hard", ()), ("soft", soft)):
        steps.call(f"fit-{phase}", *common, *options)
        figures[phase] = {
            name: json.loads(
                steps.call(
                    f"eval-{phase}-{name}", "studenttrain", "specialists", "eval", "--specialists", run / "specialists",
                    "--phase", phase, "--data", corpus(settings, name), "--targets", run / f"{name}.zarr", "--json",
                    "--readers", settings.threads,
                )
            )
            for name in TRIED
        }  # fmt: skip
    return figures


def look_at_dustbins(steps: Steps, settings: Settings) -> dict[str, Any]:
    """What the fusion is with dustbins that are corrected by more or less, on held-out and test rows."""
    return {
        phase: {
            name: json.loads(
                steps.call(
                    f"dustbin-{phase}-{name}", "-m", "benchmarks.paper.cifar.dustbin", "--run", settings.run,
                    "--data", corpus(settings, name), "--targets", settings.run / f"{name}.zarr", "--phase", phase,
                )
            )
            for name in ("held", "test")
        }
        for phase in PHASES
    }  # fmt: skip


def train_students(steps: Steps, settings: Settings) -> dict[str, Any]:
    """Test accuracy of students from what all say together, from the generalist alone, and from hard targets.

    All begin with the generalist's weights and take as many steps: what hard targets alone do in these says how much of
    a gain is more training.
    """
    run = settings.run
    steps.call(
        "fuse", "studenttrain", "specialists", "fuse", "--specialists", run / "specialists",
        "--targets", run / "transfer.zarr", "--data", corpus(settings, "transfer"), "--out", run / "fused.zarr",
        "--readers", settings.threads, "--quiet",
    )  # fmt: skip
    return {kind: [try_student(steps, settings, kind, seed) for seed in range(settings.seeds)] for kind in STUDENTS}


def try_student(steps: Steps, settings: Settings, kind: str, seed: int) -> float:
    """Test accuracy of one student of a kind of `STUDENTS`."""
    store, target = STUDENTS[kind]
    name, out = f"{kind}-seed{seed}", settings.run / "students" / f"{kind}-seed{seed}"
    steps.call(
        f"fit-{name}", "studenttrain", "fit", "--targets", settings.run / store, "--data", corpus(settings, "transfer"),
        "--student", NETWORK, "--init", settings.run / "generalist.safetensors", "--out", out, *target, "--seed", seed,
        "--epochs", settings.student_epochs, "--lr", settings.student_lr, *settings.sgd, "--quiet",
    )  # fmt: skip
    tried = steps.call(
        f"eval-{name}", "studenttrain", "eval", "--checkpoint", out, "--data", corpus(settings, "test"),
        "--json", "--readers", settings.threads,
    )  # fmt: skip
    return float(json.loads(tried)["top1"])


def own_accuracy(evaluated: Mapping[str, Any], which: str) -> float:
    """Share of the rows of a specialist's own classes that are right among these, over all specialists.

    Args:
        evaluated: as `studenttrain specialists eval --json` prints it.
        which: `own_before` for the generalist, `own_after` for the specialists.
    """
    lines = [line for line in evaluated["specialists"] if line["num_own"]]
    weights = np.array([line["num_own"] for line in lines])
    return float(np.average([line[which] for line in lines], weights=weights))
