"""`logitstore combine`: several teachers' stores to the store of their ensemble."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from storage.console import command_errors, format_bytes, format_count, printable, progress
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.scan import CombineResult

# Written out, so that `logitstore --help` loads no numpy.
COMBINES = ("mean-probs", "mean-logits")
VALUES = ("float16", "float32", "uint8")
COMPRESSORS = ("none", "zstd")
NUM_PASSES = 3


@click.command("combine")
@click.argument("sources", nargs=-1, required=True, metavar="STORE STORE ...")
@click.option("--out", required=True, metavar="PATH", help="Where the new store shall be: NAME.zarr or NAME.h5.")
@click.option(
    "--combine",
    type=click.Choice(COMBINES),
    default="mean-probs",
    show_default=True,
    help="The mean of probabilities at T = 1 (arithmetic), or of logits (geometric).",
)
@click.option("--k", type=int, metavar="N", help="Entries that topk keeps; by default as many as the tolerance allows.")
@click.option(
    "--tolerance",
    type=float,
    metavar="P",
    help="How far a kept probability of topk may be off; by default it is exact, or refused.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    metavar="T",
    help="Declare a temperature; repeat for more. Default: those that every store declares; topk and sample: 1.",
)
@click.option("--values", type=click.Choice(VALUES), help="How a logit is stored; default: as in the coarsest store.")
@click.option("--compressor", type=click.Choice(COMPRESSORS), help="Default: that of the first store.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--threads", type=click.IntRange(1), help="Threads; by default one for each core.")
def combine_command(
    sources: Sequence[str],
    out: str,
    as_json: bool,
    threads: int | None,
    temperatures: tuple[float, ...],
    **options: Any,
) -> None:
    """Make the store of an ensemble of stores over the same rows. Run again, it goes on where it stopped."""
    with command_errors(is_resumed=True):
        from storage.scan import CombineOptions, combine

        chosen = CombineOptions(temperatures=temperatures, **options)
        with progress(_num_rows(sources), "rows", "combining") as bar:
            result = combine(sources, out, chosen, num_workers=threads, progress=bar.advance)
        for note in result.notes:
            click.echo(printable(f"note: {note}"), err=True)
        click.echo(json.dumps(asdict(result), indent=2) if as_json else printable(_text(result)))


def _num_rows(sources: Sequence[str]) -> int | None:
    """Rows of all passes; None where a store can't be opened, which the passes say."""
    from storage.reader import open_store

    total: int | None = None
    with contextlib.suppress(StoreError), open_store(sources[0]) as store:
        total = NUM_PASSES * store.num_sealed_rows
    return total


def _text(result: "CombineResult") -> str:
    refused = f", {format_count(result.num_quarantined)} without targets" if result.num_quarantined else ""
    encoding = dict(result.encoding)
    kept = " ".join([encoding.pop("name"), *(f"{name}={value}" for name, value in encoding.items() if name != "seed")])
    return (
        f"{result.path}: {format_count(result.num_rows)} rows{refused}, {kept}, {format_bytes(result.num_bytes)} "
        f"({format_bytes(result.source_bytes)} in {len(result.source_digests)} stores)\n"
        f"content digest {result.content_digest}"
    )
