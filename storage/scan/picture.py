"""A picture of a store's figures: one page, PNG or self-contained HTML."""

import html
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.backends.files import clear_os_errors, replace_file
from storage.console import format_count
from storage.errors import PathError
from storage.scan.figures import Stats, class_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_CLASSES = 30
LISTED_CLASSES = 1000
FEWEST_PLACES = 8
NAME_CHARACTERS = 26
SUFFIXES = (".png", ".html", ".htm")
BLUE, PALE, RED, GREY, INK = "#2f6690", "#a9c6dc", "#b8483b", "#8a8a8a", "#262626"
SEQUENCE = ("#2f6690", "#d08a2e", "#5b8c5a", "#8b5a8c", "#b8483b", "#4f9da6")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "logitstore",
    "text.parse_math": False,
}


def write_picture(stats: Stats, path: str | Path) -> None:
    """Write the figures as a picture: `.png`, or `.html` with the picture and its figures in one file.

    Args:
        stats: what `stats` gave.
        path: where to; the suffix names the kind. A file that is there is replaced.

    Raises:
        ValueError: another suffix.
        PathError: matplotlib is not installed.
    """
    path = Path(path)
    check_picture_path(path)
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a class name in a script the font lacks
        figure = _draw(stats)
        if path.suffix.lower() == ".png":
            save_png(figure, path, dpi=150)
            return
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    with clear_os_errors(path):
        replace_file(path, _page(stats, drawing.getvalue()).encode())


def save_png(figure: "Figure", path: Path, dpi: int) -> None:
    """Write a figure on white; what was there stays until the new one is whole.

    Args:
        figure: of matplotlib.
        path: where to.
        dpi: dots an inch.

    Raises:
        OutOfSpaceError: there is no room.
        PathError: the path can't be written.
    """
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=dpi, facecolor="white")
    with clear_os_errors(path):
        replace_file(path, drawing.getvalue())


def check_picture_path(path: Path) -> None:
    """Refuse a picture that can't be written, before the long pass that it is drawn from.

    Raises:
        ValueError: another suffix than `.png` or `.html`.
        PathError: there is no such folder, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"picture: expected a path that ends in .png or .html, got {path.name!r}; rename it")
    if not path.absolute().parent.is_dir():
        raise PathError(f"{path}: expected a folder to write into, got none; make {path.parent} first")
    if importlib.util.find_spec("matplotlib") is None:
        raise PathError(
            f"{path}: expected matplotlib to draw it, got none; install it: pip install 'logitstore[report]'"
        )


def _draw(stats: Stats) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_bars = min(stats.num_classes, SHOWN_CLASSES)
    height = max(8.0 if stats.kept_mass else 6.4, 1.9 + 0.205 * num_bars)
    engine = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, rect=(0, 0, 1, 1 - 0.62 / height))
    figure = Figure(figsize=(11, height), layout=engine)
    figure.text(0.012, 1 - 0.16 / height, _clip(Path(stats.path).name, 80), size=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.43 / height, _subtitle(stats), size=9, color="#555555", va="top")
    heights = (1.0, 1.0, 1.25) if stats.kept_mass else (1.0, 1.0)
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1.2, 1), height_ratios=heights)
    _draw_classes(figure.add_subplot(grid[:, 0]), stats)
    _draw_entropy(figure.add_subplot(grid[0, 1]), stats)
    if stats.kept_mass:
        _draw_tails(figure.add_subplot(grid[1, 1]), stats)
    _draw_bytes(figure.add_subplot(grid[-1, 1]), stats)
    return figure


def _subtitle(stats: Stats) -> str:
    what = "rows" if stats.sequences is None else f"sequences of {format_count(stats.num_positions)}"
    classes = f"{format_count(stats.num_classes)} " + ("classes" if stats.sequences is None else "token ids")
    parts = [f"{format_count(stats.num_sealed_rows)} {what}", classes]
    if stats.num_sealed_rows < stats.num_rows:
        parts[0] = f"{format_count(stats.num_sealed_rows)} of {format_count(stats.num_rows)} {what} sealed"
    if stats.num_tokens is not None:
        parts.insert(1, f"{format_count(stats.num_tokens)} tokens counted")
    refused = format_count(stats.num_refused) + ("" if stats.sequences is None else " rows")
    parts.append(f"{refused} without targets")
    if stats.agreement is not None and stats.agreement.num_rows:
        share = stats.agreement.num_agreed / stats.agreement.num_rows
        parts.append(f"top-1 is the {_hard_target(stats)} in {100 * share:.2f} %")
    total, per = sum(_costs(stats).values()), _unit(stats)
    parts.append(f"{total:,.0f} bytes a {per}" if total >= 100 else f"{total:,.1f} bytes a {per}")
    return "   ·   ".join(parts)


def _unit(stats: Stats) -> str:
    """What a figure is of: a row, or a token."""
    return stats.counted.removesuffix("s")


def _hard_target(stats: Stats) -> str:
    return "hard target" if stats.sequences is None else "next token"


def _costs(stats: Stats) -> dict[str, float]:
    """Bytes of each array a row or a token; of sequences without one token, a row."""
    return stats.bytes_per_row if stats.bytes_per_token is None else stats.bytes_per_token


def _clip(text: str, num_characters: int = NAME_CHARACTERS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= num_characters else text[: num_characters - 1] + "…"


def _draw_classes(axes: "Axes", stats: Stats) -> None:
    """Rows by top-1 class: all of them in class order, or the most frequent and a line about the rest."""
    counts = np.array(stats.top1_counts)
    every = stats.num_classes <= SHOWN_CLASSES
    shown = np.arange(stats.num_classes) if every else np.argsort(-counts, kind="stable")[:SHOWN_CLASSES]
    places = np.arange(len(shown))
    axes.barh(places, counts[shown], height=0.72, color=PALE if stats.agreement else BLUE)
    if stats.agreement is not None:
        agreed = np.array(stats.agreement.agreed_counts)[shown]
        axes.barh(places, agreed, height=0.72, color=BLUE)
    has_marks = stats.class_mass is not None and stats.sequences is None
    if stats.class_mass is not None and has_marks:
        mass = np.array(stats.class_mass.mean)[shown] * counts.sum()
        axes.plot(mass, places, "|", color=INK, markersize=7, markeredgewidth=1.4)
    axes.set_yticks(places, [_clip(class_label(stats, int(index))) for index in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(shown), FEWEST_PLACES) - 0.4, -0.6)  # two bars as tall as the page are no picture
    axes.set_xlabel(stats.counted)
    _plain_counts(axes, "x")
    title = "Top-1 class" if stats.sequences is None else "Top-1 token id"
    title = title if every else f"{title}, the {SHOWN_CLASSES} most frequent"
    marks = [] if stats.agreement is None else [f"dark: it is the {_hard_target(stats)}"]
    marks += ["mark: mean mass"] if has_marks else []
    axes.set_title(title + (f" ({'; '.join(marks)})" if marks else ""))
    if not every:
        rest = np.delete(counts, shown)
        share = 100 * rest.sum() / max(1, counts.sum())
        text = (
            f"the other {format_count(len(rest))} {'classes' if stats.sequences is None else 'ids'}: "
            f"{format_count(int(rest.sum()))} {stats.counted} ({share:.0f} %),\n"
            f"{format_count(int(rest.min()))} to {format_count(int(rest.max()))} each, "
            f"{format_count(int((rest == 0).sum()))} of them none"
        )
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3}
        axes.text(0.99, 0.01, text, transform=axes.transAxes, ha="right", va="bottom", color="#555555", bbox=box)


def _draw_entropy(axes: "Axes", stats: Stats) -> None:
    edges, counts = np.array(stats.entropy.edges), np.array(stats.entropy.counts)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.set_xlim(0, edges[-1])
    if counts.max(initial=0) > 20 * max(1, int(np.median(counts[counts > 0])) if counts.any() else 1):
        axes.set_yscale("log")  # a sure teacher puts nearly all rows into the first bin
        axes.set_ylim(bottom=0.7)
        axes.set_ylabel(f"{stats.counted} (log)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    else:
        _plain_counts(axes, "y")
        axes.set_ylabel(stats.counted)
    axes.set_xlabel(f"entropy at T = 1 (nats; log {format_count(stats.num_classes)} = {edges[-1]:.2f})")
    axes.set_title("How unsure the teacher is")
    if not math.isnan(stats.entropy.mean):
        axes.axvline(stats.entropy.mean, color=RED, linewidth=1.2)
        left = stats.entropy.mean > edges[-1] / 2
        axes.annotate(
            f"mean {stats.entropy.mean:.3g}",
            (stats.entropy.mean, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if left else 5, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=RED,
        )


def _draw_tails(axes: "Axes", stats: Stats) -> None:
    """For each temperature, the share of the rows whose tail is at most so large."""
    from matplotlib.ticker import LogLocator

    lowest = 0.1
    for index, kept in enumerate(stats.kept_mass):
        edges, counts = np.array(kept.tail_edges), np.array(kept.tail_counts)
        share = 100 * np.cumsum(counts) / counts.sum()
        label = f"T = {kept.temperature:g}, keeps {_mass(kept.mean)} in the mean"
        axes.plot(edges, share, color=SEQUENCE[index % len(SEQUENCE)], linewidth=1.6, label=label)
        lowest = min(lowest, float(edges[np.searchsorted(share, 2.0)]))
    axes.set_xscale("log")
    axes.set_xlim(max(1e-6, 10.0 ** math.floor(math.log10(lowest))), 1)
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4f}".rstrip("0").rstrip(".") + " %")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("tail mass at most (log)")
    axes.set_ylabel(f"% of {stats.counted}")
    axes.set_title("What the kept entries leave")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _mass(mass: float) -> str:
    """A mass near one, with as many nines as it has."""
    if mass >= 1:
        return "100 %"
    digits = min(8, max(1, 1 - math.floor(math.log10(100 * (1 - mass)))))
    return f"{100 * mass:.{digits}f} %"


def _draw_bytes(axes: "Axes", stats: Stats) -> None:
    pairs = sorted(_costs(stats).items(), key=lambda pair: -pair[1])
    places = np.arange(len(pairs))
    axes.barh(places, [count for _, count in pairs], height=0.72, color=BLUE)
    largest = max(count for _, count in pairs) or 1.0
    for place, (_, count) in zip(places, pairs, strict=True):
        axes.text(count + 0.012 * largest, float(place), f"{count:,.1f}", va="center", size=8, color="#555555")
    axes.set_yticks(places, [name for name, _ in pairs])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlim(0, largest * 1.14)
    axes.set_xlabel(f"bytes a {_unit(stats)}, as stored")
    axes.set_title(f"What a {_unit(stats)} costs")


def _plain_counts(axes: "Axes", which: str) -> None:
    """Ticks at whole numbers, with thousands apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #262626; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
svg {{ width: 100%; height: auto; }}
h2 {{ font-size: 1.05em; margin: 2em 0 .5em; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .2em 1.4em .2em 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.scroll {{ max-height: 30em; overflow: auto; }}
</style></head><body>
{drawing}
{tables}
</body></html>
"""


def _page(stats: Stats, drawing: str) -> str:
    counted, hard = stats.counted, _hard_target(stats)
    worst = f"worst {_unit(stats)}"
    tables = [_table("Kept mass", ("temperature", "mean", f"95 % of {counted} keep", worst), _kept_rows(stats))]
    tables.append(_table("Rows without targets", ("rows", "reason", "for example"), _refused_rows(stats)))
    title, name = ("Classes", "class") if stats.sequences is None else ("Token ids", "id")
    if stats.num_classes > LISTED_CLASSES:
        title += f", the {format_count(LISTED_CLASSES)} most frequent"
    tables.append(
        _table(title, (name, f"top-1 {counted}", f"{hard} {counted}", "both", *_mass_heads(stats)), _class_rows(stats))
    )
    drawing = drawing[drawing.index("<svg") :]
    return PAGE.format(title=html.escape(Path(stats.path).name), drawing=drawing, tables="\n".join(tables))


def _kept_rows(stats: Stats) -> list[tuple[Any, ...]]:
    return [(f"{kept.temperature:g}", _mass(kept.mean), _mass(kept.p5), _mass(kept.min)) for kept in stats.kept_mass]


def _refused_rows(stats: Stats) -> list[tuple[Any, ...]]:
    return [(format_count(item.num_rows), item.reason, f"row {item.row}: {item.key}") for item in stats.refused]


def _class_rows(stats: Stats) -> list[tuple[Any, ...]]:
    hard, both = (
        ((), ())
        if stats.agreement is None
        else (
            stats.agreement.hard_target_counts,
            stats.agreement.agreed_counts,
        )
    )
    rows, listed = [], range(stats.num_classes)
    if stats.num_classes > LISTED_CLASSES:
        listed = np.argsort(-np.array(stats.top1_counts), kind="stable")[:LISTED_CLASSES].tolist()
    for index in listed:
        known = (format_count(hard[index]), format_count(both[index])) if hard else ("", "")
        row = (class_label(stats, index), format_count(stats.top1_counts[index]), *known)
        rows.append((*row, *_mass_cells(stats, index)))
    return rows


def _mass_heads(stats: Stats) -> tuple[str, ...]:
    return () if stats.class_mass is None else ("mean mass at T = 1", f"in {stats.counted} of other top-1")


def _mass_cells(stats: Stats, index: int) -> tuple[str, ...]:
    mass = stats.class_mass
    if mass is None:
        return ()
    starved = " (starved)" if index in stats.starved_classes else ""
    elsewhere = mass.elsewhere[index]
    return (f"{100 * mass.mean[index]:.4g} %{starved}", "" if elsewhere is None else f"{100 * elsewhere:.3g} %")


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, or nothing where there are no rows; every cell is escaped, since names come from folders."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<h2>{html.escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
