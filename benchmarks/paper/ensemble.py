"""An ensemble of ten small nets, combined from ten stores, and what one student of the same size keeps of its gain.

    python -m benchmarks.paper.ensemble --mnist DIR --run RUN

The members, 784-300-300-10 from hard targets alone, differ in their seeds and are trained on a fifth of the training
images, so that there is a gain to measure. Each labels the training and the test images once; `logitstore combine`
makes the ensemble's stores. The student has the members' architecture, rows and steps. What a member makes is what a
student makes from hard targets at equal steps.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 4 and table 1: 58.9 % of the test frames right, 61.1 %
by the ensemble, 60.8 % by the distilled model.
"""

from pathlib import Path
from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.table import Row, share_closed, spread

MEMBER = "mlp:784-300-300-10"
TEMPERATURE = 20.0
AIM = 0.8


def run(lab: Lab) -> dict[str, Any]:
    """Test errors of the members, of their ensemble, and of the students distilled from it."""
    num_rows, steps = lab.settings.member_rows, ("--steps", lab.settings.member_steps)
    part = lab.part("member-rows", lab.store, (0, num_rows))
    named = [f"member-{number}" for number in range(lab.settings.members)]
    members = [lab.fit(name, MEMBER, None, number, *steps, targets=part) for number, name in enumerate(named)]
    alone = [lab.errors(name, member) for name, member in zip(named, members, strict=True)]
    together = lab.store_errors("ensemble-test", combine(lab, "test", lab.test_images, members))
    transfer = lab.part("ensemble-rows", combine(lab, "train", lab.train_images, members), (0, num_rows))
    stores = [transfer] * lab.settings.seeds
    student = lab.students("ensemble-student", MEMBER, TEMPERATURE, "--alpha", 1, *steps, targets=stores)
    mean = sum(alone) / len(alone)
    return {
        "rows": num_rows,
        "steps": lab.settings.member_steps,
        "members": alone,
        "ensemble": together,
        "student": student.errors,
        "gain_kept": round(share_closed(mean, student.mean, together), 3),
    }


def combine(lab: Lab, split: str, images: Path, members: list[Path]) -> Path:
    """The ensemble's store for some images, from a dump of each member."""
    stores = [lab.dump(f"{member.name}-{split}", member / "student.safetensors", MEMBER, images) for member in members]
    out = lab.settings.run / f"ensemble-{split}.zarr"
    lab.steps.call(f"combine-{split}", "logitstore", "combine", *stores, "--out", out)
    return out


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    kept = figures["gain_kept"]
    return [
        Row(f"one of {len(figures['members'])} nets, test errors", "58.9 % right", spread(figures["members"])),
        Row("their ensemble", "61.1 % right", str(figures["ensemble"])),
        Row("one net distilled from it", "60.8 % right", spread(figures["student"])),
        Row(
            "gain of the ensemble that the distilled net keeps",
            f"{share_closed(58.9, 60.8, 61.1):.0%}",
            f"{kept:.0%}",
            f"more than {AIM:.0%}",
            kept > AIM,
        ),
    ]


def main() -> None:
    """Train them, or show what is there."""
    show(run(lab_of(__doc__)))


if __name__ == "__main__":
    main()
