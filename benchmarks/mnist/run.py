"""The founding paper's MNIST experiment with the real commands, from one store.

    python -m benchmarks.mnist.train_teacher --mnist DIR --out RUN/teacher.pt --epochs 300
    python -m benchmarks.mnist.run --mnist DIR --run RUN

The teacher 784-1200-1200-10 labels the 60,000 training images once. From that store come students 784-800-800-10, from
hard targets alone and from soft targets at T = 20, without dropout or jitter, and students of 30 and 300 units a layer
at several temperatures. A run that was stopped goes on: `teacherdump run` and `studenttrain fit` see to that. Writes
`benchmarks/results/mnist.json` and a picture of errors over temperature beside it.

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3: the teacher makes 67 test errors, the student 146
from hard targets and 74 from soft ones; 300 units a layer do alike above T = 8, and 30 do best at T = 2.5 to 4.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import RESULTS, write_result

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
ARCH = "mlp:784-1200-1200-10"
LARGE = "mlp:784-800-800-10"


@dataclass(frozen=True)
class Student:
    """One student of the experiment.

    Attributes:
        units: of each of its two hidden layers.
        temperature: of the soft targets, or None for hard targets alone.
        seed: of its weights and its order of rows.
        epochs: passes over the training images.
    """

    units: int
    temperature: float | None
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        target = "hard" if self.temperature is None else f"t{self.temperature:g}"
        return f"{self.units}-{target}-seed{self.seed}-{self.epochs}"


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--run", type=Path, required=True, help="folder that holds teacher.pt; everything goes there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seeds-300", type=int, default=3, help="of the students of 300 units")
    parser.add_argument("--temperatures-30", type=float, nargs="+", default=[1, 2.5, 4, 8, 20])
    parser.add_argument("--epochs", type=int, default=40, help="of the students of 800 units")
    parser.add_argument("--epochs-30", type=int, default=50, help="of the students of 30 units")
    parser.add_argument("--epochs-300", type=int, default=15, help="of the students of 300 units")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()

    for split, images in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        call(
            "teacherdump", "run", "--model", args.run / "teacher.pt", "--arch", ARCH, "--data", args.mnist / images,
            "--encoding", "dense", "--values", "float32", "--out", args.run / f"{split}.zarr",
        )  # fmt: skip
    large = [Student(800, temperature, seed, args.epochs) for seed in range(args.seeds) for temperature in (None, 20.0)]
    temperatures = {30: tuple(args.temperatures_30), 300: (4.0, 8.0, 20.0)}
    epochs = {30: args.epochs_30, 300: args.epochs_300}
    small = [
        Student(units, temperature, seed, epochs[units])
        for units, row in temperatures.items()
        for temperature in row
        for seed in range(args.seeds_300 if units == 300 else args.seeds)
    ]
    errors = {student: train(student, args) for student in large + small}
    teacher = json.loads(call("logitstore", "stats", args.run / "test.zarr", "--json"))
    figures = summary(errors, teacher["agreement"]["num_rows"] - teacher["agreement"]["num_agreed"], args)
    write_result("mnist", figures)
    draw(figures, RESULTS / "mnist.png")
    print(json.dumps(figures, indent=2))


def train(student: Student, args: argparse.Namespace) -> int:
    """Test errors of one student, trained and evaluated by the real commands."""
    target = (
        ["--alpha", "0"] if student.temperature is None else ["--alpha", "0.9", "--temperature", student.temperature]
    )
    out = args.run / student.name
    call(
        "studenttrain", "fit", "--targets", args.run / "train.zarr", "--data", args.mnist / TRAIN_IMAGES,
        "--student", f"mlp:784-{student.units}-{student.units}-10", "--out", out, *target, "--seed", student.seed,
        "--epochs", student.epochs, "--batch-size", 128, "--lr", "1e-3", "--precision", args.precision,
    )  # fmt: skip
    figures = json.loads(
        call("studenttrain", "eval", "--checkpoint", out, "--data", args.mnist / TEST_IMAGES, "--json")
    )
    print(f"{student.name}: {figures['num_errors']} errors", flush=True)
    return int(figures["num_errors"])


def call(*words: object) -> str:
    """Run a command of the project, and give what it printed."""
    command = [str(Path(sys.executable).with_name(str(words[0]))), *map(str, words[1:])]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def summary(errors: dict[Student, int], teacher_errors: int, args: argparse.Namespace) -> dict[str, object]:
    """The figures that the result file keeps."""

    def of(units: int, temperature: float | None) -> list[int]:
        return [
            count for student, count in errors.items() if (student.units, student.temperature) == (units, temperature)
        ]

    hard, soft = of(800, None), of(800, 20.0)
    mean_hard, mean_soft = statistics.mean(hard), statistics.mean(soft)
    return {
        "test_samples": 10_000,
        "epochs": {"800": args.epochs, "300": args.epochs_300, "30": args.epochs_30},
        "precision": args.precision,
        "teacher_errors": teacher_errors,
        "hard_target_student_errors": hard,
        "soft_target_student_errors": soft,
        "soft_over_hard": round(mean_soft / mean_hard, 3),
        "gap_closed": round((mean_hard - mean_soft) / (mean_hard - teacher_errors), 3),
        "errors_by_units_and_temperature": {
            str(units): {f"{temperature:g}": of(units, temperature) for temperature in temperatures_of(errors, units)}
            for units in (30, 300)
        },
    }


def temperatures_of(errors: Iterable[Student], units: int) -> list[float]:
    """The temperatures at which students of some size were trained."""
    return sorted({student.temperature for student in errors if student.units == units and student.temperature})


def draw(figures: dict[str, object], path: Path) -> None:
    """Errors over temperature, a panel for each size of student."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = figures["errors_by_units_and_temperature"]
    assert isinstance(sizes, dict)
    figure, panels = plt.subplots(1, len(sizes), figsize=(8, 3.2), layout="constrained")
    for panel, (units, row) in zip(panels, sizes.items(), strict=True):
        for temperature, counts in row.items():
            panel.plot([float(temperature)] * len(counts), counts, "o", color="0.6", markersize=4)
        panel.plot([float(t) for t in row], [statistics.mean(c) for c in row.values()], color="tab:blue", label="mean")
        panel.set(xscale="log", title=f"{units} units a layer", xlabel="temperature", ylabel="test errors of 10,000")
        panel.set_xticks([float(t) for t in row], list(row))
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
