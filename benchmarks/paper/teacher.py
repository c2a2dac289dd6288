"""The teacher 784-1200-1200-10 with dropout, weight constraint and jitter, and the one store of its soft targets.

    python -m benchmarks.paper.teacher --mnist DIR --run RUN

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3: 67 test errors.
"""

from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.table import Row

PAPER = 67


def run(lab: Lab) -> dict[str, Any]:
    """Test errors of the teacher, and of the top-1 that it stored for the training images."""
    return {
        "errors": lab.teacher_errors,
        "training_errors": lab.store_errors("train", lab.store),
        "epochs": lab.settings.teacher_epochs,
    }


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    return [Row("teacher 784-1200-1200-10, test errors", str(PAPER), str(figures["errors"]))]


def main() -> None:
    """Train it, or show what is there."""
    show(run(lab_of(__doc__)))


if __name__ == "__main__":
    main()
