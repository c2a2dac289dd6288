"""The table of the paper beside ours, from the figures of a result file; no figure in it is written by hand.

python -m benchmarks.paper.table                 # prints it, and puts it into docs/paper.md
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "paper.md"
BEGIN, END = "<!-- table: python -m benchmarks.paper.table -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: was tried.
        paper: its figure there.
        ours: ours.
        aim: what was asked for, or nothing.
        met: whether it was; None without an aim.
    """

    what: str
    paper: str
    ours: str
    aim: str = ""
    met: bool | None = None


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean, and smallest and largest of several values, as in `141 (140-142)`.

    Example:
        >>> spread([140, 142, 141])
        '141 (140-142)'
    """
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), statistics.mean(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low}-{high})"


def share_closed(worse: float, ours: float, better: float) -> float:
    """Which share of the gap from `worse` to `better` is closed by `ours`.

    Example:
        >>> share_closed(worse=140, ours=90, better=60)
        0.625
    """
    return (worse - ours) / (worse - better)


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, a line for each row."""
    met = {None: "", True: "yes", False: "**no**"}
    cells = [(row.what, row.paper, row.ours, row.aim, met[row.met]) for row in rows]
    return markdown_table(["", "the paper", "ours", "aim", "met"], cells)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines) + "\n"


def put_into(text: str, table: str, begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """A page with the table between its two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    before, begin, rest = text.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise ValueError(f"docs/paper.md: expected the marks {begin_mark!r} and {end_mark!r}, got none; put them back")
    return f"{before}{begin_mark}\n\n{table}\n{end_mark}{after}"


def table_of(figures: Mapping[str, Any]) -> str:
    """The table of a result's figures; an experiment that is not in them has no rows."""
    from benchmarks.paper import ensemble, few, omitted, sizes, students, teacher, temperature

    parts = (temperature, teacher, students, sizes, omitted, few, ensemble)
    named = [(part.__name__.rpartition(".")[2], part) for part in parts]
    return markdown([row for name, part in named if name in figures for row in part.rows(figures[name])])


def main() -> None:
    """Print the table, and put it into the page."""
    table = table_of(json.loads((RESULTS / "paper.json").read_text())["figures"])
    write_into(PAGE, table)
    print(table)


def write_into(page: Path, table: str) -> None:
    """Put the table into a page, where that is there."""
    if page.exists():
        page.write_text(put_into(page.read_text(), table))


if __name__ == "__main__":
    main()
