"""`logitstore copy`: take a store, or a part of it, to another place."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from storage.console import command_errors, format_bytes, format_count, printable, progress
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.scan import CopyResult, Selection


@click.command("copy")
@click.argument("source")
@click.argument("target")
@click.option("--rows", metavar="START:STOP", help="Take these rows alone, as a store of their own.")
@click.option(
    "--arrays",
    metavar="NAMES",
    help="Leave out the hard targets, or the stored tokens, where they are not among these names (a,b,c). The arrays "
    "that every such store has come along.",
)
@click.option("--k", type=int, help="Take so many entries of a topk store.")
@click.option("--threads", type=click.IntRange(1), help="Shards at once; by default one a core, 8 with a URL.")
def copy_command(
    source: str, target: str, rows: str | None, arrays: str | None, k: int | None, threads: int | None
) -> None:
    """Copy a store to TARGET, both a path or a URL. Run again, it goes on where it stopped."""
    with command_errors(is_resumed=True):
        from storage.scan import Selection, copy, parse_rows

        selection = Selection(
            rows=None if rows is None else parse_rows(rows),
            arrays=None if arrays is None else tuple(name.strip() for name in arrays.split(",") if name.strip()),
            k=k,
        )
        with _bar(source, selection) as (advance, moved):
            result = copy(source, target, selection, num_workers=threads, progress=advance, moved=moved)
        click.echo(printable(_text(source, result)))


@contextlib.contextmanager
def _bar(source: str, selection: "Selection") -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A progress bar: what counts rows, and what counts the bytes that are shown beside it."""
    from storage.reader import open_one_store
    from storage.scan import choose

    total: int | None = None
    with contextlib.suppress(StoreError, ValueError), open_one_store(source) as store:  # the copy itself says so
        chosen = choose(store, selection)
        is_cut = chosen is not None and (chosen.start, chosen.stop) != (0, store.manifest.num_rows)
        num_rows = chosen.stop - chosen.start if is_cut and chosen is not None else store.num_sealed_rows
        total = num_rows * (2 if store.finalized else 1)
    begun, total_moved = time.monotonic(), 0
    with progress(total, "rows", "copying") as bar:

        def moved(num_bytes: int) -> None:
            nonlocal total_moved
            total_moved += num_bytes
            rate = total_moved / max(time.monotonic() - begun, 1e-9)
            bar.note(f"{format_bytes(total_moved)}, {format_bytes(rate)}/s")

        yield bar.advance, moved


def _text(source: str, result: "CopyResult") -> str:
    counted = f"{format_count(result.num_sealed_rows)} rows"
    if result.num_sealed_rows < result.num_rows:
        counted = f"{format_count(result.num_sealed_rows)} of {format_count(result.num_rows)} rows"
    lines = [f"{result.path}: {counted}, {format_bytes(result.num_bytes)}"]
    if result.come_along:
        lines.append(f"every such store has {', '.join(result.come_along)} too: they came along")
    if result.content_digest is None:
        lines.append(f"not finalized, as {source} is not: run the same command again to take what is sealed since")
    elif result.is_whole:
        lines.append(f"content digest {result.content_digest}, as {source} has it")
    else:
        lines.append(f"content digest {result.content_digest}, of a part of {result.source_digest}")
    return "\n".join(lines)
