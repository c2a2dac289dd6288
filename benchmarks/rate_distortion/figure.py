"""The picture of `benchmarks.rate_distortion`; run by itself, it is drawn again from the result file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS

STYLES: Mapping[str, tuple[str, str]] = {  # colour and marker of each line
    "dense, full KL": ("black", "s"),
    "hidden float16, full KL": ("tab:purple", "*"),
    "topk float16, tail bucket": ("tab:blue", "o"),
    "topk uint8, tail bucket": ("tab:cyan", "v"),
    "sample, sampled cross entropy": ("tab:green", "D"),
    "topk float16, truncated": ("tab:orange", "^"),
    "topk float16, renormalised": ("tab:red", "x"),
}
LABELLED: Mapping[
    str, tuple[int, int]
] = {  # where sizes stand, in points from the mark; the other lines have the same k
    "dense, full KL": (-18, -3),
    "topk float16, tail bucket": (0, -11),
    "sample, sampled cross entropy": (0, -12),
    "topk float16, renormalised": (0, 6),
}
ROWS = (("angle", "angle to full KD, degrees"), ("relative_error", "error over length of full KD"))


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Angle and relative error over bytes a token, a column for each student.

    Args:
        figures: of the result file.
        path: of the PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    points = figures["points"]
    titles = {name: _title(name, student) for name, student in figures["students"].items()}
    figure, panels = plt.subplots(2, len(titles), figsize=(12, 8.4), sharex=True, sharey="row", layout="constrained")
    for row, (name, label) in enumerate(ROWS):
        for column, (student, title) in enumerate(titles.items()):
            panel = panels[row][column]
            for line, (colour, marker) in STYLES.items():
                chosen = [point for point in points if point["line"] == line]
                x, y = ([point["bytes_a_token"] for point in chosen], [point[student][name] for point in chosen])
                panel.plot(x, y, marker=marker, color=colour, label=line, markersize=6, linewidth=1.4)
                if line in LABELLED:
                    for point, *place in zip(chosen, x, y, strict=True):
                        panel.annotate(
                            point["size"],
                            place,
                            LABELLED[line],
                            textcoords="offset points",
                            ha="center",
                            fontsize=7,
                            color=colour,
                        )
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.grid(True, which="major", color="0.88")
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_title(title, fontsize=10)
            else:
                panel.set_xlabel("bytes a token on the disk, compressed, statistics included")
            if column == 0:
                panel.set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _title(name: str, student: Mapping[str, Any]) -> str:
    steps = student["recipe"]["sampled_steps"] + student["recipe"]["whole_steps"]
    return f"{name} student: {steps:,} steps, KL to the teacher {student['kl_to_teacher']:.2f} nats"


if __name__ == "__main__":
    draw(json.loads((RESULTS / "rate_distortion.json").read_text())["figures"], RESULTS / "rate_distortion.png")
