"""`logitstore diff`: whether two stores say the same, and if not, where they differ."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from storage.console import command_errors, format_count, format_plural, printable, progress
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.scan.difference import DiffResult, Field, Ranges
    from storage.scan.difference_rows import ArrayDifference, RowFigures

SHOWN_FIELDS = 20
SHOWN_RANGES = 5
SHOWN_CHARACTERS = 40


@click.command("diff")
@click.argument("first", metavar="STORE")
@click.argument("second", metavar="STORE")
@click.option("--temperature", type=float, metavar="T", help="Of the divergence; default: 1, where both have it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--threads", type=click.IntRange(1), help="Threads; by default one for each core.")
def diff_command(first: str, second: str, temperature: float | None, as_json: bool, threads: int | None) -> None:
    """Say whether two stores say the same, and where they differ; exit 1 where they do."""
    with command_errors():
        from storage.scan import diff

        with progress(_num_rows(first, second), "rows", "comparing") as bar:
            result = diff(first, second, temperature=temperature, num_workers=threads, progress=bar.advance)
        if as_json:
            click.echo(json.dumps(result.to_json(), indent=2, allow_nan=False))
        else:
            click.echo(printable("\n".join(_lines(result))))
        if not result.same:
            raise SystemExit(1)


def _num_rows(first: str, second: str) -> int | None:
    """Rows to compare, at most; None where a store can't be opened, which the pass says."""
    from storage.reader import open_store

    total: int | None = None
    with contextlib.suppress(StoreError), open_store(first) as one, open_store(second) as two:
        total = min(one.num_sealed_rows, two.num_sealed_rows)
    return total


def _lines(result: "DiffResult") -> Iterator[str]:
    if result.same:
        yield f"{result.first} and {result.second} say the same: {format_plural(result.num_rows, 'row')}"
    else:
        yield f"{result.first} and {result.second} differ"
    yield from _fields("identity", result.identity)
    yield from _fields("packing", result.packing)
    if result.provenance:
        names = ", ".join(field.name.partition(".")[2] or field.name for field in result.provenance)
        yield f"  provenance  {_brief(names, 2 * SHOWN_CHARACTERS)}"
    rows = [f"{format_count(result.num_rows)} in both"]
    rows += [f"{_ranges(result.only_first)} only in {result.first}"] if result.only_first else []
    rows += [f"{_ranges(result.only_second)} only in {result.second}"] if result.only_second else []
    yield f"  rows        {', '.join(rows)}"
    if not result.same:
        yield from _rows(result.rows)
        yield from _arrays(result)


def _rows(rows: "RowFigures") -> Iterator[str]:
    said = [
        _counted(rows.num_differing, rows.first_differing, "differ"),
        _counted(rows.num_other_samples, rows.first_other_sample, "of another sample"),
        _counted(rows.num_other_status, rows.first_other_status, "of another status"),
    ]
    yield f"              {', '.join(text for text in said if text) or 'none differs'}"
    yield f"  compared    {format_plural(rows.num_compared, 'row')} with targets of the same sample in both"
    if rows.num_distributions:
        share = 100 * rows.num_top1_agreed / rows.num_distributions
        counted = f"{format_count(rows.num_top1_agreed)} of {format_count(rows.num_distributions)}"
        yield f"  top-1       agrees in {share:.2f} % ({counted})"
    found = rows.divergence
    if found is not None and rows.num_distributions:
        infinite = f"{format_count(found.num_infinite)} infinite"
        figures = f"{found.mean:.4g} nats in the mean, {found.max:.4g} at most" if found.mean is not None else infinite
        row = "" if found.max_row is None else f" (row {found.max_row})"
        more = f", {infinite}" if found.num_infinite and found.mean is not None else ""
        yield f"  KL          {figures}{row}{more}, at T = {found.temperature:g}, over {found.over}"


def _arrays(result: "DiffResult") -> Iterator[str]:
    alike = [array.name for array in result.arrays if not array.num_rows]
    for array in result.arrays:
        if array.num_rows:
            yield f"  {array.name:<20} {_array(array)}"
    if alike:
        yield f"  the same    {', '.join(alike)}"
    for names, path in ((result.only_in_first, result.first), (result.only_in_second, result.second)):
        if names:
            yield f"  not compared, as {path} alone has such: {', '.join(names)}"


def _array(array: "ArrayDifference") -> str:
    text = f"differs in {format_plural(array.num_rows, 'row')} (row {array.first_row} first)"
    if array.max_abs is not None and array.mean_abs is not None:
        text += f": {array.max_abs:.4g} at most, {array.mean_abs:.4g} in the mean"
    if array.num_not_finite:
        text += f", {format_plural(array.num_not_finite, 'number')} not finite in one alone"
    return text


def _counted(count: int, first: int | None, what: str) -> str:
    return f"{format_count(count)} {what} (row {first} first)" if count else ""


def _fields(label: str, found: "Sequence[Field]") -> Iterator[str]:
    for index, field in enumerate(found[:SHOWN_FIELDS]):
        yield f"  {'' if index else label:<10}  {field.name}: {_value(field.first)} | {_value(field.second)}"
    if len(found) > SHOWN_FIELDS:
        yield f"              and {len(found) - SHOWN_FIELDS} more: --json gives all"


def _value(value: Any) -> str:
    return "none" if value is None else _brief(json.dumps(value), SHOWN_CHARACTERS)


def _brief(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _ranges(ranges: "Ranges") -> str:
    shown = ", ".join(f"{start} to {stop - 1}" for start, stop in ranges[:SHOWN_RANGES])
    return f"{shown} and {len(ranges) - SHOWN_RANGES} more ranges" if len(ranges) > SHOWN_RANGES else shown
