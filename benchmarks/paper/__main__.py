"""Every MNIST experiment of the founding paper, from one store, and one table: the paper's figures beside ours.

    python -m benchmarks.paper --mnist DIR --run RUN

A run that was stopped goes on with the same command; each step's time is kept, so that they sum up. Writes
`benchmarks/results/paper.json` and the pictures beside it, prints the table, and puts it into `docs/paper.md`.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), sections 2 to 4 and 6. Section 5, on specialists, is
`python -m benchmarks.paper.cifar`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.paper import ensemble, few, omitted, sizes, students, teacher, temperature
from benchmarks.paper.lab import Lab, lab_of
from benchmarks.paper.table import PAGE, table_of, write_into
from benchmarks.result import RESULTS, write_result

PLACES = ("mnist", "run")  # settings that are left out of the result file


def run_all(lab: Lab, pictures: Path) -> dict[str, Any]:
    """The figures of all experiments, and the time that they took.

    Args:
        lab: to run them in.
        pictures: folder that they are drawn in.
    """
    figures: dict[str, Any] = {"temperature": temperature.run(pictures / "paper-temperature.png")}
    for part in (teacher, students, sizes, omitted, few, ensemble):
        figures[part.__name__.rpartition(".")[2]] = part.run(lab)
    sizes.draw(figures["sizes"], pictures / "paper-sizes.png")
    settings = {name: value for name, value in asdict(lab.settings).items() if name not in PLACES}
    return figures | {"settings": settings, "time": lab.steps.times()}


def main() -> None:
    """Run what is not there yet, and write the table."""
    lab = lab_of(__doc__)
    figures = run_all(lab, RESULTS)
    path = write_result("paper", figures)
    path.write_text(lab.steps.said(path.read_text()))  # where things lay is nobody else's business
    table = table_of(figures)
    write_into(PAGE, table)
    print(table)


if __name__ == "__main__":
    main()
