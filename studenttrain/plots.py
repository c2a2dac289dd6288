"""The figures of a report, each one SVG file's bytes.

Legend: T temperatures, B buckets of classes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from studenttrain.figures import CalibrationBin

TEACHER, STUDENT, INK, GRID = "#2f5d8a", "#d9822b", "#333333", "#e3e3e3"
MAX_POINTS = 600

STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "studenttrain",  # the same figure has the same bytes
}


def draw(width: float, height: float, paint: Callable[[Figure], None]) -> bytes:
    """The SVG of a figure of that many inches. No state of pyplot is touched."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A curve of at most `MAX_POINTS` points: means over runs of equal length."""
    steps_P, values_P = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(steps_P) <= MAX_POINTS:
        return steps_P, values_P
    edges = np.linspace(0, len(steps_P), MAX_POINTS + 1).astype(np.int64)
    lengths = np.diff(edges)
    return (np.add.reduceat(steps_P, edges[:-1]) / lengths, np.add.reduceat(values_P, edges[:-1]) / lengths)


def loss_curve(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The training loss, and its soft and hard parts where there are both, by step."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure, "optimizer step", "loss, nats")
        parts = [
            ("loss", "loss", INK),
            ("soft_loss", "soft part, times T²", TEACHER),
            ("hard_loss", "hard part", STUDENT),
        ]
        drawn = 0
        for name, label, colour in parts:
            kept = [line for line in lines if line.get(name) is not None]
            if kept and (name == "loss" or all(lines[0].get(part) is not None for part in ("soft_loss", "hard_loss"))):
                steps, values = thinned([line["step"] for line in kept], [line[name] for line in kept])
                axes.plot(steps, values, color=colour, linewidth=1.4 if name == "loss" else 0.9, label=label)
                drawn += 1
                if (values > 0).all() and values.max() > 20 * values.min():
                    axes.set_yscale("log")
        if drawn > 1:
            axes.legend()

    return draw(6.2, 2.9, paint)


def rate_curve(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The learning rate by step."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure, "optimizer step", "learning rate")
        axes.plot(*thinned([line["step"] for line in lines], [line["lr"] for line in lines]), color=INK, linewidth=1.4)
        axes.set_ylim(bottom=0)

    return draw(6.2, 2.9, paint)


def validation_curve(lines: Sequence[Mapping[str, Any]], name: str, label: str, teacher: float | None) -> bytes:
    """One figure of the validations by step, 100 minus it where it is a share, and the teacher's as a line."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure, "optimizer step", label)
        kept = [line for line in lines if line.get(name) is not None]
        values = [100 * (1 - line[name]) for line in kept]
        axes.plot([line["step"] for line in kept], values, color=STUDENT, marker="o", markersize=3, label="student")
        if teacher is not None:
            axes.axhline(100 * (1 - teacher), color=TEACHER, linewidth=1.2, linestyle="--", label="teacher")
            axes.legend()
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return draw(6.2, 2.9, paint)


def reliability(student: Sequence[CalibrationBin], teacher: Sequence[CalibrationBin] | None) -> bytes:
    """Accuracy over confidence, bin by bin, and how many samples each bin holds."""

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        sides = [("student", student, STUDENT, "o")] + ([("teacher", teacher, TEACHER, "s")] if teacher else [])
        width = 0.05 / len(sides)
        for side, (label, bins, colour, marker) in enumerate(sides):
            confidence = np.array([entry.confidence for entry in bins])
            upper.plot(
                confidence,
                [e.accuracy for e in bins],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                label=label,
            )
            lower.bar(confidence + side * width, [entry.count for entry in bins], width=width, color=colour)
        upper.set(ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.02))
        lower.set(xlabel="mean top-1 probability of the bin", ylabel="samples", yscale="log")
        for axes in (upper, lower):
            axes.grid(visible=True)
        upper.legend(loc="upper left")

    return draw(4.6, 4.4, paint)


def distributions(
    temperatures: Sequence[float], labels: Sequence[str], teacher_TB: NDArray[Any], student_TB: NDArray[Any]
) -> bytes:
    """What teacher and student say of one sample at each temperature, bars side by side."""

    def paint(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(temperatures), sharey=True))
        places = np.arange(len(labels))
        for panel, temperature, teacher_B, student_B in zip(panels, temperatures, teacher_TB, student_TB, strict=True):
            panel.bar(places - 0.2, teacher_B, width=0.4, color=TEACHER, label="teacher, stored")
            panel.bar(places + 0.2, student_B, width=0.4, color=STUDENT, label="student")
            panel.set_title(f"T = {temperature:g}")
            panel.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
            panel.tick_params(axis="x", labelsize=7, length=0)
            panel.grid(visible=True, axis="y")
        panels[0].set(ylabel="probability", ylim=(0, 1))
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)  # beside the bars, not on them

    return draw(max(3.0, 2.05 * len(temperatures)) + 1.0, 2.3, paint)


def _axes(figure: Figure, xlabel: str, ylabel: str) -> Axes:
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=True)
    return axes
