"""The two commands as a user meets them: processes, exit codes, signals, and one line for an error."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from storage.reader import open_store
from storage.records import FINAL
from studenttrain.models import build_model
from teacherdump.cli import main

ARCH = "mlp:12-16-5"
SLOW_MODELS = """
import pathlib, time, torch

class Slow(torch.nn.Linear):
    def forward(self, inputs):
        pathlib.Path("working").touch()
        time.sleep(0.03)
        return super().forward(inputs)

def make():
    return Slow(12, 5)
"""


def heed_interrupts() -> None:
    """As for a command in the foreground: the tests themselves may run in a background job, where SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def dump_in(folder: Path, *options: str, **popen: Any) -> subprocess.Popen[str]:
    """A process that dumps the folder's corpus: 200 rows in shards of 16, 30 ms a batch of 8."""
    command = [
        sys.executable,
        "-c",
        "from teacherdump.cli import main; main()",
        "run",
        "--model",
        "slow.pt",
        "--arch",
        "slow_models:make",
    ]
    command += ["--data", "corpus.npy", "--batch-size", "8", "--shard-rows", "16", "--device", "cpu", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    popen.setdefault("preexec_fn", heed_interrupts)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True, **popen)


@pytest.fixture
def folder(tmp_path: Path, rows: np.ndarray[Any, Any]) -> Path:
    (tmp_path / "slow_models.py").write_text(SLOW_MODELS)
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(12, 5).state_dict(), tmp_path / "slow.pt")
    np.save(tmp_path / "corpus.npy", rows)
    return tmp_path


def wait_until_at_work(folder: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if (folder / "working").exists() or process.poll() is not None:
            return
        time.sleep(0.03)


def wait_for_a_seal(folder: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if any((folder / "out.zarr" / "seals").glob("*.json")) or process.poll() is not None:
            return
        time.sleep(0.01)


def finish(folder: Path, out: str) -> str:
    """Go on to the end; the content digest."""
    stdout, stderr = dump_in(folder, "--out", out).communicate(timeout=120)
    with open_store(folder / out) as store:
        assert store.content_digest is not None, stderr
        assert store.content_digest in stdout
        return store.content_digest


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_resume_after_kills_gives_the_same_store(folder: Path, suffix: str) -> None:
    undisturbed = finish(folder, f"undisturbed.{suffix}")
    moments = random.Random(suffix)
    for _ in range(4):
        (folder / "working").unlink(missing_ok=True)
        process = dump_in(folder, "--out", f"out.{suffix}")
        wait_until_at_work(folder, process)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.communicate()
    assert finish(folder, f"out.{suffix}") == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_seals_whole_shards_and_says_how_to_go_on(folder: Path, number: int, code: int) -> None:
    process = dump_in(folder, "--out", "out.zarr")
    wait_for_a_seal(folder, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    with open_store(folder / "out.zarr") as store:
        num_sealed_rows = store.num_sealed_rows
        assert num_sealed_rows < 200
        for shard in store.sealed_shards():
            store.check_shard(shard)
    assert stdout == ""
    assert stderr.startswith(f"interrupted: {num_sealed_rows} of 200 rows are sealed in out.zarr; run the same command")
    assert stderr.count("\n") == 1
    finish(folder, "out.zarr")


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    process = dump_in(folder, "--out", "out.zarr")
    wait_until_at_work(folder, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    finish(folder, "out.zarr")


def test_a_signal_while_the_teacher_is_loaded_ends_it(folder: Path) -> None:
    (folder / "slow_models.py").write_text("import pathlib, time\npathlib.Path('working').touch()\ntime.sleep(60)\n")
    process = dump_in(folder, "--out", "out.zarr")
    wait_until_at_work(folder, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted; run the same command again to go on\n")
    assert not (folder / "out.zarr").exists()


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_a_disk_that_takes_no_more_is_one_line_and_nothing_is_lost(folder: Path, suffix: str) -> None:
    out = f"out.{suffix}"
    process = dump_in(folder, "--out", out, "--limit-samples", "32")
    process.communicate(timeout=60)
    assert process.returncode == 0

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    process = dump_in(folder, "--out", out, "--wait-for-room", "0", "--run-log", "none", preexec_fn=no_room)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    *notes, error = stderr.splitlines()
    assert len(notes) == 1
    assert error.startswith(f"error: {out}: expected room on the disk, got none")
    with open_store(folder / out) as store:
        assert store.num_sealed_rows == 32
    finish(folder, out)


# One line for an error


@pytest.fixture
def invoke(weights: Path, corpus: Path, tmp_path: Path) -> Callable[..., Result]:
    """The command in this process, with options beside those that it needs; None takes one of these away."""

    def call(*extra: str, command: str = "run", **needed: str | None) -> Result:
        options = {
            "model": str(weights),
            "arch": ARCH,
            "data": str(corpus),
            "out": str(tmp_path / "out.zarr"),
            **needed,
        }
        words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        return CliRunner().invoke(main, [command, *words, "--device", "cpu", *extra], catch_exceptions=False)

    return call


Invoke = Callable[..., Result]


def test_a_run_prints_what_it_did_last(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke()
    assert result.exit_code == 0
    did, store, digest = result.stdout.splitlines()
    assert did.startswith("dumped 200 rows in ")
    assert did.endswith("rows/s)")
    assert store.startswith(f"{tmp_path / 'out.zarr'}: 200 of 200 rows sealed, 0 refused, ")
    assert digest == f"content digest {json.loads((tmp_path / 'out.zarr' / FINAL).read_text())['content_digest']}"
    assert invoke().stdout.splitlines() == ["nothing to do: the store is finished", store, digest]


def test_every_option_reaches_the_store(invoke: Invoke, images: Path, saving: dict[str, Any], tmp_path: Path) -> None:
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:1-4-2")
    options = "--encoding topk --k 1 --temperature 5 --temperature 2.5 --values uint8 --precision bf16 --batch-size 7"
    options += " --image-size 6x4 --resize stretch --interpolation nearest --channels 1 --scale 0.5 --mean 1 --std 2,"
    options = (
        options.removesuffix(",")
        + " --shard-rows 24 --chunk-rows 8 --compressor none --readers 2 --corpus-kind images -q"
    )
    result = invoke(*options.split(), model=str(path), arch="cnn:1-4-2", data=str(images))
    assert result.exit_code == 0
    assert result.stderr == ""
    manifest = json.loads((tmp_path / "out.zarr" / "manifest.json").read_text())
    assert manifest["encoding"] == {"name": "topk", "k": 1, "values": "uint8"}
    assert manifest["temperatures"] == [2.5, 5.0]
    assert (manifest["shard_rows"], manifest["chunk_rows"], manifest["compressor"]) == (24, 8, "none")
    assert manifest["teacher"]["precision"] == "bf16"
    assert manifest["provenance"]["batch_size"] == 7
    assert manifest["preprocess"] == {
        "version": 1,
        "kind": "image",
        "shape": [1, 6, 4],
        "resize": "stretch",
        "shorter_side": None,
        "interpolation": "nearest",
        "scale": 0.5,
        "mean": [1.0],
        "std": [2.0],
    }


def test_topk_is_compressed_unless_asked_otherwise(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("--encoding", "topk", "--k", "2").exit_code == 0
    assert json.loads((tmp_path / "out.zarr" / "manifest.json").read_text())["compressor"] == "zstd"


@pytest.mark.parametrize(
    ("extra", "needed", "code", "message"),
    [
        ([], {"model": "missing.pt"}, 1, "teacher 'missing.pt': expected a model file, got nothing there; check"),
        ([], {"arch": None}, 1, "expected --arch beside a file that holds weights only"),
        ([], {"data": "nowhere"}, 1, "nowhere': expected a file or folder, got nothing there; check the path"),
        ([], {"arch": "mlp:12-20-5"}, 1, "expected 'layers.0.weight' of shape"),
        (["--k", "3"], {}, 2, "k: expected none with dense"),
        (["--encoding", "topk"], {}, 2, "k: expected how many entries topk keeps, got none; give --k N"),
        (["--encoding", "topk", "--k", "6"], {}, 2, r"k: expected at most the number of classes \(5\), got 6"),
        (["--combine", "mean-probs"], {}, 2, "combine: expected several models, got one"),
        (["--precision", "fp16"], {}, 2, "precision: expected fp32 or bf16 on cpu, got fp16"),
        (["--image-size", "8"], {}, 2, "image_size: expected a corpus of images, got arrays; leave it out"),
        (["--limit-bytes", "1kB"], {}, 2, "limit_bytes: expected room for one shard"),
        (["--temperature", "0"], {}, 2, "temperatures: expected numbers above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_an_exit_code(
    invoke: Invoke, extra: list[str], needed: dict[str, str | None], code: int, message: str
) -> None:
    result = invoke(*extra, **needed)
    assert result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--encoding", "wave"], "'wave' is not one of 'dense', 'topk', 'sample', 'hidden'"),
        (["--batch-size", "many"], "expected auto or a number of at least 1, got 'many'"),
        (["--limit-bytes", "10 elephants"], "expected bytes such as 500MB or 2GiB"),
        (["--image-size", "8x8x3"], "expected pixels such as 224"),
        (["--mean", "a,b"], "expected numbers such as 0.485,0.456,0.406"),
        (["--channels", "2"], "'2' is not one of '1', '3'"),
        (["--out", ""], "expected a path, got nothing"),
        (["--nonsense"], "No such option"),
    ],
)
def test_an_option_that_can_not_be_read_is_a_usage_error(invoke: Invoke, extra: list[str], message: str) -> None:
    result = invoke(*extra)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_plan_is_printed_for_people_and_for_machines(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("--limit-samples", "70", "--shard-rows", "64", command="plan")
    assert result.exit_code == 0
    assert "rows        200, 5 classes" in result.stdout
    assert "to do       128 rows in 2 shards, about" in result.stdout
    plan = json.loads(invoke("--json", command="plan").stdout)
    assert (plan["num_rows"], plan["num_classes"], plan["num_new_rows"]) == (200, 5, 200)
    assert not (tmp_path / "out.zarr").exists()


def test_a_refused_sample_is_counted_in_what_a_run_prints(
    invoke: Invoke, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")
    broken = sorted(images.rglob("*.jpg"))[5]
    broken.write_bytes(broken.read_bytes()[:200])
    result = invoke(model=str(path), arch="cnn:3-4-2", data=str(images))
    assert result.exit_code == 0
    assert "40 of 40 rows sealed, 1 refused (logitstore info " in result.stdout


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from teacherdump.cli import main\nfor words in (['--help'], ['run', '--help'], ['plan', '-h']):\n"
    )
    code += "    try: main(words)\n    except SystemExit: pass\n"
    code += "assert not {'torch', 'zarr', 'h5py'} & set(sys.modules), set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--trust-pickle" in done.stdout


def test_a_finished_store_is_left_alone_in_a_process_without_torch(
    weights: Path, corpus: Path, tmp_path: Path, invoke: Invoke
) -> None:
    assert invoke().exit_code == 0
    words = ["run", "--model", str(weights), "--arch", ARCH, "--data", str(corpus), "--out", str(tmp_path / "out.zarr")]
    code = f"import sys; from teacherdump.cli import main\ntry: main({[*words, '--device', 'cpu']!r})\n"
    code += "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: the store is finished" in done.stdout


def test_a_store_is_dumped_from_a_program_without_its_code(
    invoke: Invoke, saving: dict[str, Any], tmp_path: Path
) -> None:
    program = saving["program"](tmp_path / "program.pt2", build_model(ARCH).eval(), torch.zeros(4, 12))
    assert invoke(model=str(program), arch=None).exit_code == 0
