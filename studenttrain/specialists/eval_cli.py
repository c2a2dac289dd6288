"""`studenttrain specialists eval`: a generalist with its specialists on a corpus."""

import json
from pathlib import Path
from typing import Any

import click

from storage.console import command_errors, printable


@click.command("eval")
@click.option("--specialists", required=True, help="Folder of studenttrain specialists fit.")
@click.option("--data", required=True, help="Corpus to try them on.")
@click.option("--targets", help="Store that the generalist made from this corpus; this or --generalist.")
@click.option("--generalist", help="A run's folder, a .safetensors file with its card beside it, or a checkpoint.")
@click.option("--labels", help="Hard targets of the corpus, a file.  [found beside it; else the store's]")
@click.option("--phase", help="Which specialists: hard or soft.  [the last that they were trained in]")
@click.option("--active-top", type=int, help="A specialist is active for one of so many likeliest classes.  [1]")
@click.option("--tolerance", type=float, help="Largest gradient that the fusion of a row may leave.  [1e-8]")
@click.option("--every-row", is_flag=True, help="Show each specialist all rows; the fusion stays what it is.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw what changed: a .png; needs [report].")
@click.option("--corpus-kind", help="Of --data.  [found from what is there]")
@click.option("--array", help="Array in the corpus, where it holds several.")
@click.option("--image-column", help="Column of Parquet files that holds the images.  [found]")
@click.option("--label-column", help="Column of Parquet files that holds the classes.  [found]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--batch-size", type=int, help="Samples of a batch.  [512]")
@click.option("--readers", type=int, help="Threads that read samples.  [one a core, at most 8]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def eval_command(picture: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Try a generalist with its specialists on a corpus, beside the generalist alone."""
    with command_errors():
        from studenttrain.specialists.evaluation import TryOptions, try_specialists
        from studenttrain.specialists.fused_picture import write_fused_picture
        from studenttrain.specialists.fused_text import evaluated_text
        from studenttrain.specialists.plan import load_plan
        from studenttrain.specialists.plan_picture import check_plan_picture
        from studenttrain.specialists.specialist import PLAN

        options = TryOptions(**{name: value for name, value in given.items() if value is not None})
        if picture is not None:
            check_plan_picture(picture)
        figures = try_specialists(options, quiet=quiet or as_json)
        class_names = load_plan(Path(options.specialists) / PLAN).class_names
        click.echo(printable(json.dumps(figures.to_json()) if as_json else evaluated_text(figures, class_names)))
        if picture is not None:
            write_fused_picture(picture, figures, class_names)
