"""`teacherdump`: run a teacher over a corpus once, and store what it says of every sample."""

import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from storage.console import command_errors, parse_size, progress
from storage.encodings.values import ValueType
from storage.manifest import Compressor
from teacherdump.config import (
    ALARMS,
    ALL_ALARMS,
    COMBINES,
    ENCODINGS,
    PRECISIONS,
    DumpConfig,
    Interpolation,
    Resize,
)

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitstore")
def main() -> None:
    """Run a teacher over a corpus once, and store its soft targets."""


def _read_by(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """What a text option means."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return read


def _parse_path(text: str) -> str:
    if not text:
        raise ValueError("expected a path, got nothing")
    return text


def _parse_pixels(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"expected pixels such as 224, or height x width such as 224x320, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"expected numbers such as 0.485,0.456,0.406, got {text!r}") from None


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"expected auto or a number of at least 1, got {text!r}")
    return int(text)


def _choice(literal: Any) -> click.Choice[str]:
    return click.Choice(get_args(literal))


_OPTIONS = (
    click.option("--model", "models", multiple=True, required=True, metavar="FILE",
                 help="torch.export program, TorchScript archive, weights with --arch, or hf:DIR. Repeat for an "
                 "ensemble."),
    click.option("--data", required=True, callback=_read_by(_parse_path), metavar="PATH",
                 help="Corpus: a folder of images, an IDX file, a .npy, .npz, HDF5 or Zarr array, .tar or .parquet "
                 "files (a folder or a pattern); with --sequence-length token ids (.npy, .bin) or text (.txt, .jsonl, "
                 ".parquet). Or a URL."),
    click.option("--out", required=True, callback=_read_by(_parse_path), metavar="PATH",
                 help="Store: x.zarr, or x.h5 for HDF5."),
    click.option("--arch", metavar="SPEC",
                 help="What weights belong to: mlp:784-1200-10, cnn:3-32-64-10, gpt:6x192, timm:NAME, hf:DIR or "
                 "package.module:callable."),
    click.option("--combine", type=click.Choice(COMBINES),
                 help="How an ensemble speaks: the mean of probabilities (default) or of logits."),
    click.option("--encoding", type=click.Choice(ENCODINGS), default="dense", show_default=True,
                 help="Keep every class; the k largest and the exact mass of the rest; random draws; or the last "
                 "hidden state, and the head once."),
    click.option("--k", type=int, metavar="N", help="Entries that topk keeps."),
    click.option("--draws", type=int, metavar="N", help="Draws that sample takes of a row, 1 to 255."),
    click.option("--seed", type=int, metavar="N", help="Of the draws; default: 0."),
    click.option("--temperature", "temperatures", type=float, multiple=True, metavar="T",
                 help="Declare a temperature; repeat for more. topk and sample are exact at these only; sample takes "
                 "one. Default: 1, 2, 4; for tokens and for sample 1."),
    click.option("--values", type=_choice(ValueType),
                 help="How a logit, or a hidden state, is stored; default: float16."),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda or cuda:N."),
    click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True,
                 help="Of the teacher's matrix products; part of what the store is. fp16 on CUDA only."),
    click.option("--batch-size", callback=_read_by(_parse_batch_size), default="auto", show_default=True,
                 metavar="auto|N", help="Rows of a forward pass."),
    click.option("--compile", "compile", is_flag=True, help="Put the teacher through torch.compile."),
    click.option("--limit-samples", type=int, metavar="N", help="Stop this run after N rows, in whole shards."),
    click.option("--limit-hours", type=float, metavar="H", help="Stop this run before H hours are over."),
    click.option("--limit-bytes", callback=_read_by(parse_size), metavar="SIZE",
                 help="Stop this run before it has written SIZE, such as 10GB."),
    click.option("--corpus-kind", metavar="KIND", help="images, idx, arrays, tokens, text, webdataset or parquet, "
                 "where it can't be told."),
    click.option("--sequence-length", type=int, metavar="P",
                 help="Positions of a sequence of tokens that the teacher reads."),
    click.option("--tokenizer", metavar="FILE|DIR|bytes",
                 help="Makes tokens of text: a tokenizers JSON file, a Hugging Face folder, or bytes."),
    click.option("--token-dtype", metavar="TYPE", help="Of the ids in a .bin, such as uint16."),
    click.option("--boundaries", metavar="FILE", help="Where documents begin among the tokens: offsets, .npy."),
    click.option("--separator", type=int, metavar="ID", help="The token that ends a document."),
    click.option("--text-field", metavar="NAME", help="Field of a JSONL line, or column, that holds the text; "
                 "default: text."),
    click.option("--vocab-size", type=int, metavar="N", help="Entries of the vocabulary, where no tokenizer says it."),
    click.option("--store-tokens/--no-store-tokens", default=True,
                 help="Keep the tokens beside the targets, so that a student needs no corpus; default: yes."),
    click.option("--labels", metavar="FILE|none",
                 help="Hard targets, .npy or IDX, instead of what the corpus brings; none: its classes are not used."),
    click.option("--array", metavar="NAME", help="Which array, where --data holds several."),
    click.option("--image-column", metavar="NAME", help="Which column of Parquet files holds the images."),
    click.option("--label-column", metavar="NAME", help="Which column of Parquet files holds the classes."),
    click.option("--image-size", callback=_read_by(_parse_pixels), metavar="N|HxW",
                 help="Pixels that the teacher takes."),
    click.option("--resize", type=_choice(Resize),
                 help="To --image-size: the shorter side and a centre crop (default), or stretch."),
    click.option("--shorter-side", type=int, metavar="N", help="Pixels of the shorter side before the crop."),
    click.option("--interpolation", type=_choice(Interpolation), help="Of a resize; bilinear by default."),
    click.option("--channels", type=click.Choice(["1", "3"]), callback=_read_by(int),
                 help="Grey or RGB; default: as in the corpus."),
    click.option("--scale", type=float, metavar="X", help="Factor of every value; 1/255 for images by default."),
    click.option("--mean", callback=_read_by(_parse_numbers), metavar="A,B,C",
                 help="Subtracted after the scale, a number a channel."),
    click.option("--std", callback=_read_by(_parse_numbers), metavar="A,B,C",
                 help="Divided by after that, a number a channel."),
    click.option("--shard-rows", type=int, metavar="N", help="Rows of a shard: what a kill loses at most."),
    click.option("--chunk-rows", type=int, metavar="N", help="Rows of a chunk: what a reader takes at a time."),
    click.option("--compressor", type=_choice(Compressor), help="Default: zstd for topk, none for dense."),
    click.option("--readers", type=int, metavar="N", help="Threads that read samples; default: one a core, at most 8."),
    click.option("--workers", type=int, metavar="N",
                 help="Dump in N processes of this machine, one CUDA device each where there are such."),
    click.option("--scheduler", metavar="ADDRESS", help="Dump on the workers of a Dask cluster: tcp://HOST:PORT."),
    click.option("--trust-pickle", is_flag=True, help="Load a pickled module, which may run any code."),
    click.option("--run-log", metavar="PATH|none",
                 help="A line of JSON for each shard; default: beside a local store, OUT.log.jsonl."),
    click.option("--metrics-port", type=int, metavar="N", help="Give figures to Prometheus there; 0: any free port."),
    click.option("--metrics-host", metavar="ADDRESS", help="Listen there; default: 127.0.0.1, this machine alone."),
    click.option("--no-alarm", "no_alarms", multiple=True, type=click.Choice((*ALARMS, ALL_ALARMS)),
                 help="Go on though this looks broken; repeat for more."),
    click.option("--max-quarantined", type=float, metavar="SHARE",
                 help="Stop once more than this share of at least 100 rows is refused, 0 to 1; default: any."),
    click.option("--wait-for-room", type=float, default=1.0, show_default=True, metavar="HOURS",
                 help="Wait on a full disk for so long; 0: stop at once."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes."),
)  # fmt: skip


# What `audit` takes of these: it finds the rest in the store.
_OF_AUDIT = (
    "models", "data", "arch", "combine", "device", "batch_size", "compile", "corpus_kind", "tokenizer", "token_dtype",
    "boundaries", "separator", "text_field", "vocab_size", "labels", "array", "image_column", "label_column",
    "readers", "trust_pickle", "quiet",
)  # fmt: skip


OF_FOLLOW = ("settle", "poll", "idle", "member_rows", "suffix", "dedupe")


def _dump_options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def _audit_options(command: F) -> F:
    for option in reversed(_OPTIONS):
        alone = option(lambda: None)
        if alone.__click_params__[0].name in _OF_AUDIT:  # type: ignore[attr-defined]
            command = option(command)
    return command


@main.command("run")
@_dump_options
@click.option(
    "--retry-quarantined",
    callback=_read_by(_parse_path),
    metavar="OLD",
    help="Make --out a new version of this finished store, its refused rows tried again.",
)
@click.option(
    "--follow",
    "is_following",
    is_flag=True,
    help="Dump files as they arrive, each time into the next store of a series in the folder --out.",
)
@click.option(
    "--settle",
    type=float,
    metavar="S",
    help="With --follow: seconds for which a file must not have changed; default: 10.",
)
@click.option("--poll", type=float, metavar="S", help="With --follow: seconds between two looks; default: 10.")
@click.option(
    "--idle",
    type=float,
    metavar="S",
    help="With --follow: end after so many seconds without anything new; default: never.",
)
@click.option(
    "--member-rows",
    type=int,
    metavar="N",
    help="With --follow: rows of a store at most, in whole files; default: 131,072.",
)
@click.option(
    "--member-format",
    "suffix",
    type=click.Choice(["zarr", "h5"]),
    callback=_read_by(lambda text: f".{text}"),
    help="With --follow: of the stores; default: zarr.",
)
@click.option(
    "--dedupe",
    type=click.Choice(["key", "digest"]),
    help="With --follow: leave out samples whose key, or whose bytes, an earlier one has.",
)
def run_command(quiet: bool, **options: Any) -> None:
    """Run the teacher over the corpus and store its soft targets.

    Run the same command again to go on where it stopped. A run that would change what the store holds is refused.
    """
    with command_errors(is_resumed=True):
        is_following = options.pop("is_following")
        following = {name: options.pop(name) for name in OF_FOLLOW}
        given = {name: value for name, value in following.items() if value is not None}
        config, say = DumpConfig(**options), _silence if quiet else _note
        if is_following:
            from teacherdump.follow import follow
            from teacherdump.follow_options import FollowOptions

            click.echo(follow(config, FollowOptions(**given), say, quiet).summary())
            return
        for name, value in given.items():
            option = "member_format" if name == "suffix" else name
            raise ValueError(
                f"{option}: expected --follow beside it, got {value} alone; give --follow, or leave it out"
            )
        from teacherdump.run import run

        click.echo(run(config, say, quiet).summary())


@main.command("plan")
@_dump_options
@click.option(
    "--pilot-rows",
    type=int,
    metavar="N",
    help="Rows that the teacher scores to try the encodings on; 0: none. Default: 256, or about 4,096 positions.",
)
@click.option(
    "--student-epochs",
    type=float,
    default=1.0,
    show_default=True,
    metavar="E",
    help="Epochs of a student run, for when a store has paid for itself.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def plan_command(quiet: bool, as_json: bool, pilot_rows: int | None, student_epochs: float, **options: Any) -> None:
    """Say what `run` would do with the same options, and what each encoding would cost and give up; write nothing."""
    with command_errors():
        config = DumpConfig(**options)
        from teacherdump.pilot import PilotOptions
        from teacherdump.preview import preview

        pilot = None if pilot_rows == 0 else PilotOptions(pilot_rows, student_epochs)
        plan = preview(config, _silence if quiet else _note, pilot)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan.summary())


@main.command("audit")
@_audit_options
@click.option("--targets", required=True, callback=_read_by(_parse_path), metavar="PATH", help="The store.")
@click.option("--rows", type=int, default=64, show_default=True, metavar="N", help="Rows that are scored again.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the choice of rows.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help="Of the teacher's matrix products; default: the store's."
)
@click.option(
    "--tolerance",
    type=float,
    metavar="X",
    help="What a logit may be off by, a share of its row's largest; default: 1e-4, bf16 5e-2, fp16 1e-2.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def audit_command(
    targets: str, rows: int, seed: int, tolerance: float | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Score random rows of a store again: whether they are faithful, and what the encoding gave up.

    Exits with 1 where they are not faithful.
    """
    with command_errors():
        from storage.reader import open_store
        from teacherdump.audit import AuditOptions, audit, config_for

        chosen = AuditOptions(rows, seed, tolerance)
        with open_store(targets) as store:
            config, num_rows = config_for(store.manifest, out=targets, **options), store.num_sealed_rows
        with progress(min(rows, num_rows), "rows", "auditing", quiet=quiet) as bar:
            result = audit(targets, config, chosen, bar)
        click.echo(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else result.summary())
        if not result.ok:
            raise SystemExit(1)


def _note(text: str) -> None:
    click.echo(text, err=True)


def _silence(text: str) -> None:
    del text
