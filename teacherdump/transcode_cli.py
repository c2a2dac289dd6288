"""`logitstore transcode`: found by `logitstore` through an entry point, since storage knows nothing of torch."""

from typing import Any

import click

from storage.console import command_errors, format_bytes, format_count, progress

# Written out, so that `logitstore --help` loads no numpy.
ENCODINGS = ("dense", "topk", "sample", "hidden")
VALUES = ("float16", "float32", "uint8")
COMPRESSORS = ("none", "zstd")


@click.command("transcode")
@click.argument("source")
@click.argument("target")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="Of the new store; by default as it was.")
@click.option("--k", type=int, metavar="N", help="Entries that topk keeps.")
@click.option("--draws", type=int, metavar="N", help="Draws that sample takes of a row, 1 to 255.")
@click.option("--seed", type=int, metavar="N", help="Of the draws; default: 0.")
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    metavar="T",
    help="Declare a temperature; repeat for more. Default: those of the source, and for sample 1.",
)
@click.option(
    "--values",
    type=click.Choice(VALUES),
    help="How a logit, or a hidden state, is stored; default: as it was, or float16 in another encoding.",
)
@click.option("--compressor", type=click.Choice(COMPRESSORS), help="Default: zstd for topk and sample, else none.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N.")
def transcode_command(source: str, target: str, **options: Any) -> None:
    """Write a finalized store to TARGET in a smaller encoding, without the teacher. Run again, it goes on."""
    with command_errors(is_resumed=True):
        from storage.reader import open_one_store
        from teacherdump.transcode import TranscodeOptions, transcode

        chosen = TranscodeOptions(**options)
        with open_one_store(source) as store:
            num_rows = store.num_sealed_rows
        with progress(2 * num_rows, "rows", "transcoding") as bar:
            result = transcode(source, target, chosen, progress=bar.advance)
        for note in result.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(
            f"{result.path}: {format_count(result.num_rows)} rows, {format_bytes(result.num_bytes)} "
            f"({format_bytes(result.source_bytes)} before)\n"
            f"content digest {result.content_digest}, made of {result.source_digest}"
        )
