"""Generalist and specialists on CIFAR-100, from one dump: section 5 of the founding paper.

    python -m benchmarks.paper.cifar --cifar DIR --run RUN

Trains a generalist, stores what it says once, finds the classes that it confuses, trains specialists for them, fuses
all on test rows, and distils the whole back into one student: all by the real commands. A run that was stopped goes on
with the same command. Writes `benchmarks/results/paper_cifar.json` and pictures, and puts its tables into
`docs/paper.md`.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 5 and 6.
"""

from benchmarks.paper.cifar.experiment import run_all, settings_of, steps_of
from benchmarks.paper.cifar.report import draw, tables, write_into
from benchmarks.paper.table import PAGE
from benchmarks.result import RESULTS, write_result


def main() -> None:
    """Run what is not there yet, and write the tables."""
    settings = settings_of(__doc__)
    figures = run_all(settings, RESULTS)
    path = write_result("paper_cifar", figures)
    path.write_text(steps_of(settings).said(path.read_text()))  # where things lay is nobody else's business
    draw(figures, RESULTS / "paper-cifar.png")
    text = tables(figures)
    write_into(PAGE, text)
    print(text)


if __name__ == "__main__":
    main()
