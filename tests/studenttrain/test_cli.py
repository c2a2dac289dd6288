"""The commands: what they print, and how they exit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from storage.corpus import open_corpus
from studenttrain.cli import main
from tests.studenttrain.runs import Ground, command, write_blobs, write_targets


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_fit_then_eval(ground: Ground) -> None:
    val = write_blobs(ground.folder / "val.npz", 50, seed=3)
    val_targets = write_targets(ground.folder / "val.zarr", open_corpus(val))
    config = ground.config(epochs=30, lr=0.01, student="mlp:8-16-4", val_data=str(val))
    done = call(*command(config))
    assert done.exit_code == 0, done.output
    assert "180 steps, 2,880 rows seen" in done.stdout
    assert "validation: top-1" in done.stdout
    for name in ("student.safetensors", "student.pt2", "report.html"):
        assert str(Path(config.out) / name) in done.stdout
    assert "the stored top-1 meets the hard target in" in done.stderr

    tried = call("eval", "--checkpoint", config.out, "--data", str(val), "--targets", str(val_targets), "--json")
    assert tried.exit_code == 0, tried.output
    value = json.loads(tried.stdout)
    assert set(value) == {"top1", "agreement", "nll", "ece", "num_errors", "num_samples"}
    assert value["num_samples"] == 50
    assert value["top1"] == pytest.approx(1 - value["num_errors"] / 50)
    assert value["agreement"] > 0.9
    result = json.loads((Path(config.out) / "result.json").read_text())
    assert value["num_errors"] == result["figures"]["num_errors"]

    plain = call("eval", "--checkpoint", config.out, "--data", str(val))
    assert "top-1" in plain.stdout
    assert "agreement" not in plain.stdout
    assert (
        json.loads(call("eval", "--checkpoint", config.out, "--data", str(val), "--json").stdout)["agreement"] is None
    )


def test_again_says_that_it_had_ended(ground: Ground) -> None:
    config = ground.config(steps=1)
    assert call(*command(config)).exit_code == 0
    again = call(*command(config))
    assert again.exit_code == 0
    assert again.stdout.startswith("had ended already: 1 steps")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--alpha", "2"], 2, "error: alpha: expected a number from 0 to 1, got 2.0"),
        (["--steps", "3"], 2, "error: epochs, steps: expected one of them, got both"),
        (["--student", "mlp:9-4"], 1, "use mlp:8-4"),
        (["--targets", "nowhere.zarr"], 1, "error: nowhere.zarr: expected a logit store, got no such path"),
        (["--data", "nowhere"], 1, "error: corpus"),
        (["--nonsense"], 2, "No such option"),
        (["--data", ""], 2, "error: data: expected some text, got none; is a variable of your shell empty?"),
        (["--targets", ""], 2, "error: targets: expected some text, got none"),
        (["--out", ""], 2, "error: out: expected some text, got none"),
        (["--epochs", "many"], 2, "'many' is not a valid integer"),
    ],
)
def test_bad_options_exit_with_one_line(ground: Ground, words: list[str], code: int, message: str) -> None:
    done = call(*command(ground.config()), *words)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.output
    if done.stderr.startswith("error:"):
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--checkpoint", "nowhere"], 1, "error: checkpoint 'nowhere': expected a file, got nothing there"),
        (["--checkpoint", ""], 2, "error: checkpoint: expected some text, got none"),
        (["--checkpoint", "x" * 300], 1, "expected a path in a folder, got File name too long"),
        (["--data", "nowhere"], 1, "error: corpus"),
        (["--data", ""], 2, "error: data: expected some text, got none"),
        (["--targets", "nowhere"], 1, "error: nowhere: expected a logit store"),
        (["--batch-size", "0"], 2, "error: batch_size: expected at least 1, got 0"),
        (["--device", "tpu"], 2, "error: device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_eval_refuses_in_one_line(ground: Ground, words: list[str], code: int, message: str, no_report: None) -> None:
    config = ground.config(steps=1)
    call(*command(config))
    given = ["eval", "--checkpoint", config.out, "--data", str(ground.data)]
    done = call(*given, *words)
    assert done.exit_code == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_eval_refuses_a_store_of_other_samples(ground: Ground, no_report: None) -> None:
    config = ground.config(steps=1)
    call(*command(config))
    val = write_blobs(ground.folder / "val.npz", 96, seed=3)
    done = call("eval", "--checkpoint", config.out, "--data", str(val), "--targets", str(ground.targets))
    assert done.exit_code == 1
    assert "row 0 ('0')" in done.stderr


def test_a_quiet_fit_prints_its_result_only(ground: Ground, no_report: None) -> None:
    for flag in ("--quiet", "-q"):
        done = call(*command(ground.config(flag.strip("-"), steps=1)), flag)
        assert done.stderr == ""
        assert done.stdout.startswith("1 steps, 16 rows seen")


def test_eval_names_what_to_give_instead_of_another_file(ground: Ground) -> None:
    config = ground.config(steps=1)
    assert call(*command(config), "-q").exit_code == 0
    program = str(Path(config.out) / "student.pt2")
    done = call("eval", "--checkpoint", program, "--data", str(ground.data))
    assert done.exit_code == 1
    assert "give the run's folder or its student.safetensors" in done.stderr
    assert "remove" not in done.stderr


def test_eval_asks_for_a_corpus_of_the_students_input(ground: Ground, no_report: None) -> None:
    config = ground.config(steps=1)
    assert call(*command(config), "-q").exit_code == 0
    np.savez(ground.folder / "narrow.npz", x=np.zeros((20, 7), np.float32))
    done = call("eval", "--checkpoint", config.out, "--data", str(ground.folder / "narrow.npz"))
    assert done.exit_code == 1
    assert done.stderr.endswith("got (7,); give --data a corpus with the student's input, 8\n")


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from studenttrain.cli import main; main(['fit', '--help'], standalone_mode=False); "
    code += "heavy = {'torch', 'numpy', 'zarr', 'h5py', 'dask', 'matplotlib'} & set(sys.modules); "
    code += "sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--temperature" in done.stdout


def test_fit_never_imports_the_teachers_code(ground: Ground) -> None:
    words = command(ground.config(steps=1))
    code = f"import sys; from studenttrain.cli import main; main({words!r}, standalone_mode=False); "
    code += "sys.exit(any(name.split('.')[0] == 'teacherdump' for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
