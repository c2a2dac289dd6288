"""Students 784-800-800-10 of the one store: from hard targets alone, and from soft ones at T = 20, at equal steps.

    python -m benchmarks.paper.students --mnist DIR --run RUN

Neither has dropout or jitter.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3: 146 test errors, and 74.
"""

from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.table import Row, share_closed, spread

STUDENT = "mlp:784-800-800-10"
TEMPERATURE = 20.0
AIM = 0.6


def run(lab: Lab) -> dict[str, Any]:
    """Test errors of both students, over the seeds, and the share of the gap to the teacher that soft targets close."""
    epochs = ("--epochs", lab.settings.large_epochs)
    hard = lab.students("800-hard", STUDENT, None, *epochs)
    soft = lab.students("800-t20", STUDENT, TEMPERATURE, *epochs)
    return {
        "teacher_errors": lab.teacher_errors,
        "hard": hard.errors,
        "soft": soft.errors,
        "epochs": lab.settings.large_epochs,
        "gap_closed": round(share_closed(hard.mean, soft.mean, lab.teacher_errors), 3),
        "soft_over_hard": round(soft.mean / hard.mean, 3),
    }


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    closed = figures["gap_closed"]
    return [
        Row("student 784-800-800-10, hard targets", "146", spread(figures["hard"])),
        Row("the same from soft targets at T = 20", "74", spread(figures["soft"])),
        Row(
            "gap between hard student and teacher that the soft targets close",
            f"{share_closed(146, 74, 67):.0%}",
            f"{closed:.0%}",
            f"at least {AIM:.0%}",
            closed >= AIM,
        ),
    ]


def main() -> None:
    """Train them, or show what is there."""
    show(run(lab_of(__doc__)))


if __name__ == "__main__":
    main()
