"""`studenttrain`: train a student from stored soft targets, and try it."""

import json
from collections.abc import Callable
from typing import Any

import click

from storage.console import command_errors
from studenttrain.calibrate_cli import calibrate_command
from studenttrain.specialists.cli import specialists_group

CORPUS_HELP = "images (a folder), idx, arrays, webdataset or parquet; found from what is there"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitstore")
def main() -> None:
    """Train students from stored soft targets; the teacher is not needed any more."""


main.add_command(calibrate_command)
main.add_command(specialists_group)


def _options(*specs: tuple[str, Any, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options of one kind each: name, type and help; none of them has a default here, the library has."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for name, kind, text in reversed(specs):
            command = click.option(name, type=kind, default=None, help=text)(command)
        return command

    return add


TOKEN_OPTIONS = (
    (
        "--tokenizer",
        str,
        "Of a corpus of text, and of the student: a tokenizers JSON file, a Hugging Face folder, or bytes.",
    ),
    ("--token-dtype", str, "Of the ids in a .bin, such as uint16."),
    ("--boundaries", str, "Where documents begin among the tokens of --data: offsets, .npy."),
    ("--separator", int, "The token that ends a document."),
    ("--text-field", str, "Field of a JSONL line, or column, that holds the text.  [text]"),
)


@main.command()
@click.option("--targets", required=True, help="Store of soft targets.")
@click.option("--data", default=None, help="Corpus that the store was made from.  [the tokens that the store keeps]")
@click.option(
    "--student",
    required=True,
    help="mlp:784-800-800-10, cnn:3-32-64-10, gpt:4x128, timm:NAME, hf:DIR or package.module:callable.",
)
@click.option("--out", required=True, help="Folder of the run; give the same one again to go on.")
@_options(
    ("--epochs", int, "Passes over the sealed rows; this or --steps."),
    ("--steps", int, "Optimizer steps."),
    ("--batch-size", int, "Rows of a batch, over all ranks.  [128]"),
    ("--temperature", float, "Of the soft loss.  [the largest that the store declares]"),
    ("--alpha", float, "Weight of the soft targets, 1 - alpha that of the hard ones.  [0.9; 1 without hard targets]"),
    ("--loss", str, "auto, kl, reverse-kl, jsd, mse; on topk tail-bucket, reverse-kl, jsd; sampled-ce.  [auto]"),
    ("--lr", float, "Highest learning rate.  [0.001]"),
    ("--seed", int, "Of the first weights, the order of the rows and dropout.  [0]"),
    ("--optimizer", str, "adamw or sgd.  [adamw]"),
    ("--momentum", float, "Of sgd.  [0.9]"),
    ("--weight-decay", float, "Of matrices and kernels.  [0]"),
    ("--schedule", str, "cosine or constant.  [cosine]"),
    ("--warmup-steps", int, "Optimizer steps of linear warm-up.  [0]"),
    ("--clip-norm", float, "Largest norm of the gradient.  [no clipping]"),
    ("--accumulate", int, "Batches of one optimizer step.  [1]"),
    ("--precision", str, "fp32, bf16 or fp16 (CUDA only).  [fp32]"),
    ("--ema", float, "Decay of averaged weights, which are then the result.  [no average]"),
    ("--init", str, "Weights to begin with: .safetensors or a run's folder.  [random]"),
    ("--device", str, "auto, cpu, cuda or cuda:N.  [auto]"),
    ("--checkpoint-every", str, "Steps (500) or time (90s, 10m, 2h) between checkpoints.  [60s]"),
    ("--corpus-kind", str, f"{CORPUS_HELP}."),
    ("--labels", str, "Hard targets of --data, a file.  [found beside it]"),
    ("--array", str, "Array in --data, where it holds several."),
    ("--image-column", str, "Column of Parquet files that holds the images.  [found]"),
    ("--label-column", str, "Column of Parquet files that holds the classes.  [found]"),
    ("--val-data", str, "Corpus to validate on after each epoch."),
    ("--val-labels", str, "Hard targets of --val-data, a file."),
    ("--val-targets", str, "Store made from --val-data by the same teacher: agreement, and the teacher's calibration."),
    *TOKEN_OPTIONS,
    ("--cache", str, "Folder in which pieces of stores at URLs are kept, for later epochs and runs."),
    ("--cache-size", str, "Of --cache, such as 500MB.  [10GB]"),
    ("--replay", str, "Folder of a run: see again, in each epoch, just the shards that it saw."),
    ("--only-classes", str, "Learn from rows of these classes alone: numbers or names, such as 7,8."),
    ("--without-classes", str, "Learn from rows of all classes but these."),
    ("--readers", int, "Threads that read samples.  [one a core, at most 8]"),
)
@click.option("--compile", is_flag=True, default=None, help="Put the student through torch.compile.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and the result only.")
def fit(quiet: bool, **options: Any) -> None:
    """Train a student on a store, or go on where the same command stopped. Under torchrun: on several devices."""
    with command_errors(is_resumed=True):
        from studenttrain.config import FitConfig
        from studenttrain.distributed import is_main_rank
        from studenttrain.train import fit as train_student

        given = {name: value for name, value in options.items() if value is not None}
        config = FitConfig(**{"data": None, **given})
        result = train_student(config, quiet=quiet)
        if is_main_rank():
            click.echo(str(result))


@main.command("eval")
@click.option("--checkpoint", required=True, help="Folder of a run, a .safetensors file, or a checkpoint.")
@click.option("--data", default=None, help="Corpus to try the student on.  [the tokens that --targets keeps]")
@_options(
    ("--targets", str, "Store made from that corpus: agreement with the teacher."),
    *TOKEN_OPTIONS,
    ("--labels", str, "Hard targets of the corpus, a file.  [found beside it]"),
    ("--corpus-kind", str, f"{CORPUS_HELP}."),
    ("--array", str, "Array in the corpus, where it holds several."),
    ("--image-column", str, "Column of Parquet files that holds the images.  [found]"),
    ("--label-column", str, "Column of Parquet files that holds the classes.  [found]"),
    ("--device", str, "auto, cpu, cuda or cuda:N.  [auto]"),
    ("--batch-size", int, "Samples of a batch.  [512]"),
    ("--readers", int, "Threads that read samples.  [one a core, at most 8]"),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: top1, agreement, nll, ece, num_errors, num_samples.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def evaluate(as_json: bool, quiet: bool, **options: Any) -> None:
    """Try a student on a corpus: top-1, agreement with the teacher, NLL and calibration error."""
    with command_errors():
        from studenttrain.trial import try_student

        given = {name: value for name, value in options.items() if value is not None}
        figures = try_student(**given, quiet=quiet or as_json)
        click.echo(json.dumps(figures.to_json()) if as_json else str(figures))


if __name__ == "__main__":
    main()
