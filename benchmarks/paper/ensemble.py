"""Ensembles of ten small nets, combined from ten stores, and what one student of the same size keeps of their gain.

    python -m benchmarks.paper.ensemble --mnist DIR --run RUN

The members are 784-300-300-10, from hard targets alone. Each labels the training and the test images once, and
`logitstore combine` makes the stores of their ensemble. The student has the members' architecture and steps; what a
member makes is what a student makes from hard targets. Two settings:

- `same_rows`: all members and the student learn from the same fifth of the training images; members differ in their
  seeds alone, as in the paper.
- `own_rows`: each member learns from 3 % of the training images of its own, and the student from all of these images
  together, without a label.

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 4 and table 1: 58.9 % of the test frames right, 61.1 %
by the ensemble, 60.8 % by the distilled model, at T = 2.
"""

from pathlib import Path
from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.table import Row, share_closed, spread

MEMBER = "mlp:784-300-300-10"
AIM = 0.8


def run(lab: Lab) -> dict[str, Any]:
    """Test errors of the members, of their ensemble, and of the students distilled from it, in both settings."""
    count, num_rows, own = lab.settings.members, lab.settings.member_rows, lab.settings.few_rows
    together = lab.part("member-rows", lab.store, (0, num_rows))
    same = [together] * count
    apart = [lab.part(f"own-rows-{number}", lab.store, (number * own, (number + 1) * own)) for number in range(count)]
    return {
        "steps": lab.settings.member_steps,
        "same_rows": tried(lab, "", same, num_rows, temperature=20.0),
        "own_rows": tried(lab, "own-", apart, count * own, temperature=2.0),
    }


def tried(lab: Lab, prefix: str, stores: list[Path], num_rows: int, temperature: float) -> dict[str, Any]:
    """Test errors of an ensemble in one setting.

    Args:
        lab: where it is trained.
        prefix: of every name.
        stores: what each member learns from.
        num_rows: from the first row on, that the student learns from.
        temperature: of the student's soft targets.
    """
    steps = ("--steps", lab.settings.member_steps)
    named = [f"{prefix}member-{number}" for number in range(len(stores))]
    members = [
        lab.fit(name, MEMBER, None, number, *steps, targets=store)
        for number, (name, store) in enumerate(zip(named, stores, strict=True))
    ]
    alone = [lab.errors(name, member) for name, member in zip(named, members, strict=True)]
    together = lab.store_errors(f"{prefix}ensemble-test", combine(lab, prefix, "test", members))
    transfer = lab.part(f"{prefix}ensemble-rows", combine(lab, prefix, "train", members), (0, num_rows))
    student = lab.students(
        f"{prefix}ensemble-student", MEMBER, temperature, "--alpha", 1, *steps, targets=[transfer] * lab.settings.seeds
    )
    return {
        "rows": num_rows,
        "temperature": temperature,
        "members": alone,
        "ensemble": together,
        "student": student.errors,
        "gain_kept": round(share_closed(sum(alone) / len(alone), student.mean, together), 3),
    }


def combine(lab: Lab, prefix: str, split: str, members: list[Path]) -> Path:
    """The ensemble's store for the training or the test images, from a dump of each member."""
    images = lab.train_images if split == "train" else lab.test_images
    stores = [lab.dump(f"{member.name}-{split}", member / "student.safetensors", MEMBER, images) for member in members]
    out = lab.settings.run / f"{prefix}ensemble-{split}.zarr"
    lab.steps.call(f"combine-{prefix}{split}", "logitstore", "combine", *stores, "--out", out)
    return out


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    table = []
    for name, said in (("same_rows", "the same {:,} images"), ("own_rows", "3 % of the images each, {:,} together")):
        found = figures[name]
        kept = found["gain_kept"]
        count, where = len(found["members"]), said.format(found["rows"])
        table += [
            Row(f"one of {count} nets on {where}, test errors", "58.9 % right", spread(found["members"])),
            Row("their ensemble", "61.1 % right", str(found["ensemble"])),
            Row(f"one net distilled from it, T = {found['temperature']:g}", "60.8 % right", spread(found["student"])),
            Row(
                "gain of the ensemble that the distilled net keeps",
                f"{share_closed(58.9, 60.8, 61.1):.0%}",
                f"{kept:.0%}" if kept >= 0 else "none",
                f"more than {AIM:.0%}",
                kept > AIM,
            ),
        ]
    return table


def main() -> None:
    """Train them, or show what is there."""
    show(run(lab_of(__doc__)))


if __name__ == "__main__":
    main()
