"""Generalist, plan, specialists, fusion, and one student of all of them, by the real commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from storage.cli import main as logitstore
from studenttrain.cli import main as studenttrain
from studenttrain.models import MLP
from teacherdump.cli import main as teacherdump

NUM_TRAIN = 600
SPEC = "mlp:64-16-10"
PROGRAMS = {"teacherdump": teacherdump, "studenttrain": studenttrain, "logitstore": logitstore}


def call(*words: object) -> str:
    """One of the three commands; what it printed."""
    done = CliRunner().invoke(PROGRAMS[str(words[0])], [str(word) for word in words[1:]], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits as two arrays with hard targets, and a generalist that was trained a little. The working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.export.export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not in a test")))
    monkeypatch.setattr("studenttrain.ending.write_report", lambda folder, _: folder / "report.html")
    digits = load_digits()
    pixels, classes = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    np.savez("train.npz", x=pixels[:NUM_TRAIN], y=classes[:NUM_TRAIN])
    np.savez("test.npz", x=pixels[NUM_TRAIN:1200], y=classes[NUM_TRAIN:1200])
    torch.manual_seed(0)
    model = MLP((64, 16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.from_numpy(pixels[:NUM_TRAIN]), torch.from_numpy(classes[:NUM_TRAIN])
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(model.state_dict(), "generalist.safetensors")
    return tmp_path


def test_one_student_learns_what_generalist_and_specialists_say_together(ground: Path) -> None:
    for split in ("train", "test"):
        call(
            "teacherdump", "run", "--model", "generalist.safetensors", "--arch", SPEC, "--data", f"{split}.npz",
            "--temperature", 1, "--out", f"{split}.zarr", "--device", "cpu", "-q",
        )  # fmt: skip
    call(
        "studenttrain", "specialists", "plan", "--targets", "train.zarr", "--num-specialists", 3, "--classes-each", 4,
        "--out", "plan.json", "-q",
    )  # fmt: skip
    call(
        "studenttrain", "specialists", "fit", "--targets", "train.zarr", "--data", "train.npz", "--plan", "plan.json",
        "--student", SPEC, "--init", "generalist.safetensors", "--epochs", 1, "--soft-epochs", 1, "--lr", "1e-3",
        "--device", "cpu", "--out", "all", "-q",
    )  # fmt: skip
    figures = json.loads(
        call(
            "studenttrain", "specialists", "eval", "--specialists", "all", "--data", "test.npz", "--targets",
            "test.zarr", "--device", "cpu", "--json",
        )
    )  # fmt: skip
    assert figures["fused"]["num_samples"] == 600
    assert figures["fused"]["top1"] > 0.7
    assert figures["num_changed"] < 150
    call(
        "studenttrain", "specialists", "fuse", "--specialists", "all", "--data", "train.npz", "--targets", "train.zarr",
        "--out", "fused.zarr", "--device", "cpu", "-q",
    )  # fmt: skip
    assert "nothing is damaged" in call("logitstore", "verify", "fused.zarr")
    call(
        "studenttrain", "fit", "--targets", "fused.zarr", "--data", "train.npz", "--student", SPEC, "--epochs", 15,
        "--lr", "1e-2", "--device", "cpu", "--out", "whole", "-q",
    )  # fmt: skip
    said = call("studenttrain", "eval", "--checkpoint", "whole", "--data", "test.npz", "--device", "cpu", "--json")
    assert json.loads(said)["top1"] > 0.7
    assert (ground / "whole" / "student.safetensors").is_file()
