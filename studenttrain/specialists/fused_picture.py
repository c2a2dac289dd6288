"""A picture of an evaluation: what the fusion changed by the number of specialists, and what each one is worth."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import StudentError
from storage.scan.picture import save_png
from studenttrain.specialists.fused_figures import CountLine, FusedFigures, SpecialistLine
from studenttrain.specialists.fused_text import names_of
from studenttrain.specialists.plan_picture import GREY, INK, STYLE, check_plan_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER, LOSS = "#b8bec6", "#2f6db3", "#c0562b"
MOST_SPECIALISTS = 80  # that get a line in the picture, those with the most rows
MOST_COUNTS = 9  # bars, the last one for all numbers above


def write_fused_picture(path: str | Path, figures: FusedFigures, class_names: tuple[str, ...] | None) -> None:
    """Draw the figures of an evaluation; a file there is replaced.

    Args:
        path: where to, `.png`.
        figures: with hard targets.
        class_names: in class order, or None.

    Raises:
        StudentError: there were no hard targets.
        ValueError: another suffix.
        PathError: there is no such folder, or matplotlib is not installed.
    """
    path = Path(path)
    check_plan_picture(path)
    if figures.fused.top1 is None:
        raise StudentError(
            f"{path}: expected hard targets to draw what is right, got none; give --labels, or leave --picture out"
        )
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines = sorted((it for it in figures.specialists if it.num_own), key=lambda it: -it.num_own)[:MOST_SPECIALISTS]
    lines.sort(key=lambda it: it.number)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a class name in a script the font lacks
        height = max(4.2, 1.6 + 0.24 * len(lines))
        figure = Figure(figsize=(12, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _draw_counts(left, figures.by_covering)
        _draw_specialists(right, lines, class_names)
        assert figures.generalist.top1 is not None
        figure.suptitle(
            f"top-1 {100 * figures.generalist.top1:.2f} % before, {100 * figures.fused.top1:.2f} % after the fusion",
            x=0.01,
            ha="left",
            weight="bold",
        )
        save_png(figure, path, dpi=130)


def together(lines: Sequence[CountLine]) -> list[tuple[str, CountLine]]:
    """The lines with their labels; those behind the most that are drawn as one."""
    shown = [(str(line.num_specialists), line) for line in lines]
    if len(shown) <= MOST_COUNTS:
        return shown
    rest = lines[MOST_COUNTS - 1 :]
    sums = [
        sum(getattr(line, name) for line in rest)
        for name in ("num_rows", "num_known", "num_changed", "right_before", "right_after")
    ]
    label = f"{rest[0].num_specialists}+"
    return [*shown[: MOST_COUNTS - 1], (label, CountLine(rest[0].num_specialists, *sums))]


def _draw_counts(axes: "Axes", lines: Sequence[CountLine]) -> None:
    shown = together(lines)
    values = [100 * (line.relative_change or 0) for _, line in shown]
    axes.bar(range(len(shown)), values, color=[LOSS if value < 0 else AFTER for value in values], width=0.6)
    axes.axhline(0, color=GREY, linewidth=0.8)
    for place, ((_, line), value) in enumerate(zip(shown, values, strict=True)):
        axes.annotate(
            f"{value:+.1f} %\n{line.change:+,}",
            (place, value),
            xytext=(0, 3 if value >= 0 else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if value >= 0 else "top",
            size=8,
        )
    axes.set_xticks(range(len(shown)), [f"{label}\n{line.num_rows:,}" for label, line in shown], size=8)
    axes.set_xlabel("specialists that have the true class, and rows with so many")
    axes.set_ylabel("relative change of the accuracy, %,\nand rows more that are right")
    axes.set_title("What the fusion changed", loc="left", size=10, weight="bold")
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_specialists(axes: "Axes", lines: Sequence[SpecialistLine], class_names: tuple[str, ...] | None) -> None:
    for place, line in enumerate(lines):
        before, after = 100 * (line.own_before or 0), 100 * (line.own_after or 0)
        axes.plot([before, after], [place, place], color=AFTER if after >= before else LOSS, linewidth=1.5, zorder=1)
    places = range(len(lines))
    axes.scatter(
        [100 * (it.own_before or 0) for it in lines], places, s=64, color=BEFORE, edgecolor=INK, label="generalist"
    )
    axes.scatter([100 * (it.own_after or 0) for it in lines], places, s=22, color=AFTER, label="specialist", zorder=2)
    names = [f"{line.number}  {names_of(line.classes, class_names)}" for line in lines]
    axes.set_yticks(places, names, size=7)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("own rows right among its own classes, %")
    axes.set_title("What each specialist is worth", loc="left", size=10, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    if lines:
        axes.legend(loc="best", fontsize=8, frameon=False)
