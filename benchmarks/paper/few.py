"""3 % of the training images: students from hard targets and from soft ones, on the same rows, at equal steps.

    python -m benchmarks.paper.few --mnist DIR --run RUN

Each seed has other rows: those of seed s begin at s x 1,800. `logitstore copy --rows` cuts them out of the one store.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 6, on speech: of 3 % of the data a model learns 44.5 %
of the test frames from hard targets and 57.0 % from soft ones; of all data 58.9 %.
"""

from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.students import STUDENT
from benchmarks.paper.table import Row, share_closed, spread

TEMPERATURE = 20.0
AIM = 0.65


def run(lab: Lab) -> dict[str, Any]:
    """Test errors of both students, over the seeds."""
    num_rows, steps = lab.settings.few_rows, ("--steps", lab.settings.few_steps)
    parts = [
        lab.part(f"few-seed{seed}", lab.store, (seed * num_rows, (seed + 1) * num_rows))
        for seed in range(lab.settings.seeds)
    ]
    hard = lab.students("few-hard", STUDENT, None, *steps, targets=parts)
    soft = lab.students("few-t20", STUDENT, TEMPERATURE, "--alpha", 1, *steps, targets=parts)
    return {
        "rows": lab.settings.few_rows,
        "steps": lab.settings.few_steps,
        "hard": hard.errors,
        "soft": soft.errors,
        "soft_over_hard": round(soft.mean / hard.mean, 3),
    }


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    ratio = figures["soft_over_hard"]
    closed = f"{share_closed(44.5, 57.0, 58.9):.0%} of the gap to all data"
    return [
        Row(f"{figures['rows']:,} images (3 %), hard targets, test errors", "44.5 % right", spread(figures["hard"])),
        Row("the same images, soft targets", f"57.0 % right: {closed}", spread(figures["soft"])),
        Row("errors of soft targets over those of hard ones", "0.77", f"{ratio:.2f}", f"at most {AIM}", ratio <= AIM),
    ]


def main() -> None:
    """Train them, or show what is there."""
    show(run(lab_of(__doc__)))


if __name__ == "__main__":
    main()
