"""`studenttrain specialists fit`: the options of each training are those of `studenttrain fit`."""

from typing import Any

import click

from storage.console import command_errors, printable

# Further options of a training, as `FitConfig` has them; none has a default here.
TRAINING: tuple[tuple[str, Any, str], ...] = (
    ("--init", str, "Weights to begin with, the generalist's: .safetensors or a run's folder.  [random]"),
    ("--batch-size", int, "Rows of a batch.  [128]"),
    ("--lr", float, "Highest learning rate, in each phase.  [0.001]"),
    ("--seed", int, "Of the rows that are drawn, their order, and dropout.  [0]"),
    ("--optimizer", str, "adamw or sgd.  [adamw]"),
    ("--momentum", float, "Of sgd.  [0.9]"),
    ("--weight-decay", float, "Of matrices and kernels.  [0]"),
    ("--schedule", str, "cosine or constant, in each phase.  [cosine]"),
    ("--warmup-steps", int, "Optimizer steps of linear warm-up, in each phase.  [0]"),
    ("--clip-norm", float, "Largest norm of the gradient.  [no clipping]"),
    ("--accumulate", int, "Batches of one optimizer step.  [1]"),
    ("--precision", str, "fp32, bf16 or fp16 (CUDA only).  [fp32]"),
    ("--ema", float, "Decay of averaged weights, which are then the result.  [no average]"),
    ("--device", str, "auto, cpu, cuda or cuda:N.  [auto]"),
    ("--checkpoint-every", str, "Steps (500) or time (90s, 10m, 2h) between checkpoints.  [60s]"),
    ("--corpus-kind", str, "Of --data.  [found from what is there]"),
    ("--labels", str, "Hard targets of --data, a file.  [found beside it]"),
    ("--array", str, "Array in --data, where it holds several."),
    ("--image-column", str, "Column of Parquet files that holds the images.  [found]"),
    ("--label-column", str, "Column of Parquet files that holds the classes.  [found]"),
    ("--val-data", str, "Corpus with hard targets: each specialist is tried on its own classes in it."),
    ("--val-labels", str, "Hard targets of --val-data, a file."),
    ("--cache", str, "Folder in which pieces of stores at URLs are kept."),
    ("--cache-size", str, "Of --cache, such as 500MB.  [10GB]"),
    ("--readers", int, "Threads that read samples, for each training.  [one a core, at most 8]"),
)


def _with_training(command: Any) -> Any:
    for name, kind, text in reversed(TRAINING):
        command = click.option(name, type=kind, default=None, help=text)(command)
    return click.option("--compile", is_flag=True, default=None, help="Put the models through torch.compile.")(command)


@click.command("fit")
@click.option("--targets", required=True, help="Store of the generalist's soft targets, finalized.")
@click.option("--data", required=True, help="Corpus that the store was made from.")
@click.option("--plan", required=True, help="Plan of the specialists, plan.json.")
@click.option("--student", required=True, help="Model of all classes, whose last layer is replaced: as in fit.")
@click.option("--out", required=True, help="Folder of all; give the same one again to go on.")
@click.option("--epochs", type=int, help="Passes over a specialist's rows, on hard targets; or --steps, or neither.")
@click.option("--steps", type=int, help="Optimizer steps on hard targets.")
@click.option("--soft-epochs", type=int, help="Passes on the generalist's soft targets, after that.  [none]")
@click.option("--alpha", type=float, help="Weight of the soft targets in these.  [0.9; 1 without hard targets]")
@click.option("--temperature", type=float, help="Of the soft loss.  [1, at which specialists are used]")
@click.option("--own-share", type=float, help="Of the rows of an epoch: of the specialist's own classes.  [0.5]")
@click.option("--specialist", "specialists", type=int, multiple=True, help="Only this one; repeatable.  [all]")
@click.option("--workers", type=int, help="Processes of this machine that train side by side.  [one after the other]")
@click.option("--scheduler", help="Address of a Dask scheduler, whose workers train.")
@_with_training
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and the result only.")
def fit_command(quiet: bool, specialists: tuple[int, ...], **options: Any) -> None:
    """Train specialists: own classes and a dustbin, half of the rows own ones, from the generalist's weights."""
    with command_errors(is_resumed=True):
        from studenttrain.specialists.config import SpecialistsConfig
        from studenttrain.specialists.fitting import fit_specialists

        given = {name: value for name, value in options.items() if value is not None}
        names = [name.removeprefix("--").replace("-", "_") for name, _, _ in TRAINING]
        training = {name: given.pop(name) for name in [*names, "compile"] if name in given}
        config = SpecialistsConfig(**given, specialists=specialists, training=training)
        click.echo(printable(str(fit_specialists(config, quiet=quiet))))
