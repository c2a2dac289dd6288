"""Which temperature suits which size of student: many students of one store, none of which needs the teacher.

    python -m benchmarks.paper.sizes --mnist DIR --run RUN

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3: with 300 units or more in each layer all
temperatures above 8 do alike; with 30 units, 2.5 to 4 work significantly better than higher or lower ones.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.lab import Lab, lab_of, show
from benchmarks.paper.table import Row, spread
from benchmarks.result import RESULTS

TEMPERATURES = {300: (8.0, 20.0, 40.0), 30: (1.0, 2.5, 4.0, 20.0)}
LR = {300: 1e-3, 30: 3e-3}  # so few units take more steps, or larger ones, before the temperature matters
BEST_OF_30 = ("2.5", "4")
ALIKE = 0.1  # of the mean: temperatures above 8 differ by less


def run(lab: Lab) -> dict[str, Any]:
    """Test errors by units and temperature, hard targets alone beside them; every seed of each."""
    epochs = {300: lab.settings.middle_epochs, 30: lab.settings.small_epochs}

    def of(units: int, temperature: float | None) -> Sequence[int]:
        name = f"{units}-hard" if temperature is None else f"{units}-t{temperature:g}"
        options = ("--epochs", epochs[units], "--lr", LR[units])
        return lab.students(name, f"mlp:784-{units}-{units}-10", temperature, *options).errors

    found = {
        str(units): {"hard": of(units, None)} | {f"{temperature:g}": of(units, temperature) for temperature in row}
        for units, row in TEMPERATURES.items()
    }
    return {"errors": found, "epochs": {str(units): count for units, count in epochs.items()}}


def above_8(counts: Mapping[str, Sequence[int]]) -> list[float]:
    """Mean errors at each temperature of 8 and more."""
    return [statistics.mean(of) for name, of in counts.items() if name != "hard" and float(name) >= 8]


def difference_above_8(counts: Mapping[str, Sequence[int]]) -> float:
    """How far the means at 8 and more lie apart, over their mean."""
    means = above_8(counts)
    return (max(means) - min(means)) / statistics.mean(means)


def best_temperature(counts: Mapping[str, Sequence[int]]) -> str:
    """The temperature with the fewest errors in the mean."""
    return min((name for name in counts if name != "hard"), key=lambda name: statistics.mean(counts[name]))


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    large, small = figures["errors"]["300"], figures["errors"]["30"]

    def said(counts: Mapping[str, Sequence[int]]) -> str:
        return "; ".join(f"{'hard' if t == 'hard' else f'T = {t}'}: {spread(of)}" for t, of in counts.items())

    return [
        Row(
            "300 units a layer, test errors by temperature",
            "all above 8 alike",
            said(large),
            f"T >= 8 within {ALIKE:.0%}",
            difference_above_8(large) <= ALIKE,
        ),
        Row(
            "30 units a layer",
            "2.5 to 4 best",
            said(small),
            "2.5 or 4 best",
            best_temperature(small) in BEST_OF_30,
        ),
    ]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Errors over temperature, a panel for each size; each seed a point, hard targets a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(TEMPERATURES), figsize=(9, 3.4), layout="constrained")
    for panel, (units, counts) in zip(panels, figures["errors"].items(), strict=True):
        soft = {float(name): of for name, of in counts.items() if name != "hard"}
        for temperature, of in soft.items():
            panel.plot([temperature] * len(of), of, "o", color="0.6", markersize=4)
        panel.plot(list(soft), [statistics.mean(of) for of in soft.values()], color="tab:blue", label="soft targets")
        panel.axhline(statistics.mean(counts["hard"]), color="tab:orange", linestyle="--", label="hard targets")
        panel.set(xscale="log", title=f"{units} units a layer", xlabel="temperature", ylabel="test errors of 10,000")
        panel.set_xticks(list(soft), [f"{temperature:g}" for temperature in soft])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train them, or show what is there, and draw the picture."""
    figures = run(lab_of(__doc__))
    draw(figures, RESULTS / "paper-sizes.png")
    show(figures)


if __name__ == "__main__":
    main()
