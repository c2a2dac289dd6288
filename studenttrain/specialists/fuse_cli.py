"""`studenttrain specialists fuse`: what generalist and specialists say together, as a store."""

import contextlib
import json
from dataclasses import asdict
from typing import Any

import click

from storage.console import command_errors, printable, progress


@click.command("fuse")
@click.option("--specialists", required=True, help="Folder of studenttrain specialists fit.")
@click.option("--targets", required=True, help="The generalist's store, finalized: dense or hidden.")
@click.option("--data", required=True, help="Corpus that the store was made from.")
@click.option("--out", required=True, help="Where the new store shall be: NAME.zarr or NAME.h5.")
@click.option("--encoding", help="dense or topk.  [dense]")
@click.option("--k", type=int, help="Entries that topk keeps.")
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    help="Declare a temperature; repeat for more.  [those of the generalist's store]",
)
@click.option("--values", help="float16, float32 or uint8.  [as in a dense store, else float16]")
@click.option("--compressor", help="none or zstd.  [zstd with topk, else none]")
@click.option("--phase", help="Which specialists: hard or soft.  [the last that they were trained in]")
@click.option("--active-top", type=int, help="A specialist is active for one of so many likeliest classes.  [1]")
@click.option("--tolerance", type=float, help="Largest gradient that the fusion of a row may leave.  [1e-8]")
@click.option("--corpus-kind", help="Of --data.  [found from what is there]")
@click.option("--array", help="Array in the corpus, where it holds several.")
@click.option("--image-column", help="Column of Parquet files that holds the images.  [found]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--batch-size", type=int, help="Samples of a batch.  [512]")
@click.option("--readers", type=int, help="Threads that read samples.  [one a core, at most 8]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def fuse_command(as_json: bool, quiet: bool, temperatures: tuple[float, ...], **given: Any) -> None:
    """Write the store of a generalist and its specialists, to train a student from. Run again, it goes on."""
    with command_errors(is_resumed=True), contextlib.ExitStack() as stack:
        from studenttrain.specialists.fuse_options import FuseOptions
        from studenttrain.specialists.fuse_store import fuse_store
        from studenttrain.specialists.fused_text import fused_text

        chosen = {name: value for name, value in given.items() if value is not None}
        options = FuseOptions(temperatures=temperatures, **chosen)
        result = fuse_store(
            options,
            progress=lambda count: (
                stack.enter_context(progress(count, "rows", "fusing", quiet=quiet or as_json)).advance
            ),
        )
        stack.close()
        click.echo(json.dumps(asdict(result), indent=2) if as_json else printable(fused_text(result)))
