"""`studenttrain calibrate`: the command's options; the work is in `calibration.py`."""

import json
from typing import Any

import click

from storage.console import command_errors

CORPUS_KINDS = "images (a folder), idx, arrays, webdataset or parquet; found from what is there"


@click.command("calibrate")
@click.option("--checkpoint", required=True, help="Folder of a run, a .safetensors file, or a checkpoint.")
@click.option(
    "--data",
    required=True,
    help="Corpus, its labels unread: of match, samples as the student will meet them; of shift, those it learned from.",
)
@click.option("--out", required=True, help="Folder of the calibrated student.")
@click.option(
    "--prior",
    help="Share of each class: a store, whose mean soft targets it is, uniform, or a .json file.  [biases stay]",
)
@click.option(
    "--method",
    help="match: biases with which the mean mass over --data meets the prior; shift: from it to the prior.  [match]",
)
@click.option(
    "--slack",
    type=float,
    help="Of match: standard deviations of a share that a class may miss its own by, for each unit of its bias.  "
    "[0 where the prior is of these very samples, else 1]",
)
@click.option(
    "--temperature",
    help="Fit one number, before the biases: none, labels (of --data) or targets (those of --targets).  [none]",
)
@click.option(
    "--targets",
    help="Store made from --data: for --temperature targets, and for shift of a student that learned some of its rows.",
)
@click.option("--labels", help="Hard targets of --data, a file, for --temperature labels.  [found beside it]")
@click.option("--corpus-kind", help=f"{CORPUS_KINDS}.")
@click.option("--array", help="Array in the corpus, where it holds several.")
@click.option("--image-column", help="Column of Parquet files that holds the images.  [found]")
@click.option("--label-column", help="Column of Parquet files that holds the classes.  [found]")
@click.option("--tokenizer", help="Of a corpus of text: a tokenizers JSON file, a Hugging Face folder, or bytes.")
@click.option("--token-dtype", help="Of the ids in a .bin, such as uint16.")
@click.option("--boundaries", help="Where documents begin among the tokens: offsets, .npy.")
@click.option("--separator", type=int, help="The token that ends a document.")
@click.option("--text-field", help="Field of a JSONL line, or column, that holds the text.  [text]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--batch-size", type=int, help="Samples of a batch.  [512]")
@click.option("--readers", type=int, help="Threads that read samples.  [one a core, at most 8]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what the student's card says of the calibration.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def calibrate_command(as_json: bool, quiet: bool, **options: Any) -> None:
    """Give each class its share, and fit a temperature, in the last layer of a trained student; without labels."""
    with command_errors():
        from studenttrain.calibration import calibrate
        from studenttrain.calibration_config import CalibrationConfig

        config = CalibrationConfig(**{name: value for name, value in options.items() if value is not None})
        result = calibrate(config, quiet=quiet or as_json)
        click.echo(json.dumps(result.to_json()) if as_json else str(result))
