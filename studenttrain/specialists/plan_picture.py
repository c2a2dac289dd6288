"""A picture of a plan: the correlation of the classes, those of one specialist side by side.

Legend: C classes, P places of a picture, S specialists.
"""

import importlib.util
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.arrays import Array
from storage.console import format_count, format_plural
from storage.errors import PathError
from storage.scan.picture import save_png
from storage.urls import check_local
from studenttrain.specialists.plan import SpecialistsPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PLACES = 1000  # more classes than that are drawn as means of some next to each other
MOST_NAMES = 120  # that can still be read
MOST_NUMBERS = 60  # of specialists beside the matrix
NAME_CHARACTERS = 22
INK, GREY = "#262626", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
}


def check_plan_picture(path: str | Path) -> None:
    """Refuse a picture that can't be written, before the long pass that it is drawn from.

    Raises:
        ValueError: another suffix than `.png`, or a URL.
        PathError: there is no such folder, or matplotlib is not installed.
    """
    check_local("picture", str(path))
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"picture: expected a path that ends in .png, got {path.name!r}; rename it")
    if not path.absolute().parent.is_dir():
        raise PathError(f"{path}: expected a folder to write into, got none; make {path.parent} first")
    if importlib.util.find_spec("matplotlib") is None:
        raise PathError(
            f"{path}: expected matplotlib to draw it, got none; install it: pip install 'logitstore[report]'"
        )


def write_plan_picture(path: str | Path, plan: SpecialistsPlan, covariance_CC: Array) -> None:
    """Draw the correlation of the classes in the order of a plan, its specialists marked; a file there is replaced.

    Args:
        path: where to, `.png`.
        plan: the specialists.
        covariance_CC: of the classes' probabilities.

    Raises:
        ValueError: another suffix.
        PathError: there is no such folder, or matplotlib is not installed.
    """
    check_plan_picture(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    order, starts = class_order(plan)
    overlap = _overlaps(plan)
    side = min(14.0, max(6.0, 0.115 * min(len(order), MOST_NAMES)))
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a class name in a script the font lacks
        figure = Figure(figsize=(side + 1.6, side + 1 + (2 if overlap else 0)), layout="constrained")
        axes = figure.subplots(2 if overlap else 1, 1, squeeze=False, height_ratios=(side, 2) if overlap else None)
        _draw_correlation(axes[0, 0], plan, covariance_CC, order, starts)
        if overlap:
            _draw_members(axes[1, 0], plan, order)
        save_png(figure, Path(path), dpi=130)


def class_order(plan: SpecialistsPlan) -> tuple[Array, list[int]]:
    """The classes, those of each specialist together, and the place at which each specialist's begin.

    A class of several stands with the first of them; those of none come last, and their place is the last start.
    """
    seen: set[int] = set()
    order: list[int] = []
    starts = []
    for classes in (*plan.specialists, plan.uncovered):
        starts.append(len(order))
        order += [label for label in classes if label not in seen]
        seen.update(classes)
    return np.array(order), starts


def _overlaps(plan: SpecialistsPlan) -> bool:
    return sum(map(len, plan.specialists)) > plan.num_classes - len(plan.uncovered)


def caption(plan: SpecialistsPlan) -> str:
    """What the boxes are, and how many of the last classes are in none."""
    boxes = "boxes: the classes " + ("that a specialist is the first to have" if _overlaps(plan) else "of a specialist")
    count = len(plan.uncovered)
    return boxes + ("; the last one is in none" if count == 1 else f"; the last {count} are in none" if count else "")


def _draw_correlation(
    axes: "Axes", plan: SpecialistsPlan, covariance_CC: Array, order: Array, starts: list[int]
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["RdBu_r"].with_extremes(bad="#e4e4e4")
    step = -(-len(order) // MOST_PLACES)
    correlation_PP = ordered_correlation(covariance_CC, order, step)
    highest = float(np.nanpercentile(np.abs(correlation_PP), 99)) if np.isfinite(correlation_PP).any() else 1.0
    extent = (-0.5, len(order) - 0.5, len(order) - 0.5, -0.5)
    image = axes.imshow(correlation_PP, cmap=colours, vmin=-highest, vmax=highest, extent=extent, interpolation="none")
    for number, (start, stop) in enumerate(pairwise(starts)):
        if stop > start:
            axes.add_patch(
                Rectangle(
                    (start - 0.5, start - 0.5), stop - start, stop - start, fill=False, edgecolor=INK, linewidth=1
                )
            )
            if len(plan.specialists) <= MOST_NUMBERS:
                axes.text(len(order), (start + stop - 1) / 2, str(number), va="center", size=8, color=INK)
    if len(order) <= MOST_NAMES:
        names = [str(label) if plan.class_names is None else plan.class_names[label] for label in order]
        axes.set_yticks(range(len(order)), [_clip(name) for name in names], size=6)
        axes.set_xticks([])
    axes.set_title(
        f"{format_plural(len(plan.specialists), 'specialist')} for {format_count(plan.num_classes)} classes: "
        "how the generalist's probabilities correlate",
        loc="left",
        size=10,
        weight="bold",
    )
    axes.set_xlabel(caption(plan))
    axes.figure.colorbar(image, ax=axes, shrink=0.5, pad=0.04, label="correlation")


def ordered_correlation(covariance_CC: Array, order: Array, step: int) -> Array:
    """The correlation in an order of the classes, float32 (P, P); nan on the diagonal, and where a class does not vary.

    Args:
        covariance_CC: of the classes' probabilities.
        order: of the classes.
        step: classes of a place; of several the mean, in which each one's with itself is left out.
    """
    deviation_C = np.sqrt(np.maximum(np.diagonal(covariance_CC), 0)).astype(np.float64)
    deviation_C[deviation_C == 0] = np.nan
    num_places = -(-len(order) // step)
    found_PP = np.empty((num_places, num_places), np.float32)
    edges = np.arange(0, len(order), step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # places of nan alone
        for place in range(num_places):
            rows = np.arange(place * step, min((place + 1) * step, len(order)))
            correlation = covariance_CC[order[rows]][:, order] / deviation_C[order] / deviation_C[order[rows], None]
            correlation[np.arange(len(rows)), rows] = np.nan
            is_known = ~np.isnan(correlation)
            sums = np.add.reduceat(np.where(is_known, correlation, 0).sum(axis=0), edges)
            found_PP[place] = sums / np.add.reduceat(is_known.sum(axis=0), edges)
    return found_PP


def _draw_members(axes: "Axes", plan: SpecialistsPlan, order: Array) -> None:
    member_SC = np.zeros((len(plan.specialists), plan.num_classes), bool)
    for number, classes in enumerate(plan.specialists):
        member_SC[number, list(classes)] = True
    axes.imshow(member_SC[:, order], cmap="Greys", vmin=0, vmax=1.3, aspect="auto", interpolation="none")
    axes.set_xticks([])
    axes.set_ylabel("specialist")
    axes.set_xlabel("which classes each has, in the same order")


def _clip(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"
