"""The whole road with the real commands: a teacher's soft targets into a store, a student out of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from studenttrain.models import MLP

NUM_TRAIN = 1000
SIZES = (64, 32, 10)


def call(*words: object, folder: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """One of the three commands, run in a folder."""
    command = [str(Path(sys.executable).with_name(str(words[0]))), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as two arrays with hard targets, and a teacher that was trained a little."""
    folder = tmp_path_factory.mktemp("ground")
    digits = load_digits()
    pixels, classes = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    np.savez(folder / "train.npz", x=pixels[:NUM_TRAIN], y=classes[:NUM_TRAIN])
    np.savez(folder / "test.npz", x=pixels[NUM_TRAIN:], y=classes[NUM_TRAIN:])
    torch.manual_seed(0)
    model = MLP(SIZES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    inputs, targets = torch.from_numpy(pixels[:NUM_TRAIN]), torch.from_numpy(classes[:NUM_TRAIN])
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder


@pytest.mark.parametrize(
    ("suffix", "encoding"),
    [
        ("zarr", ["--encoding", "dense"]),
        ("h5", ["--encoding", "topk", "--k", "4", "--temperature", "1", "--temperature", "3"]),
    ],
)
def test_a_student_learns_from_the_store_alone(ground: Path, tmp_path: Path, suffix: str, encoding: list[str]) -> None:
    teacher = tmp_path / "weights.pt"
    teacher.write_bytes((ground / "weights.pt").read_bytes())
    for split in ("train", "test"):
        call(
            "teacherdump", "run", "--model", teacher, "--arch", "mlp:64-32-10", "--data", ground / f"{split}.npz",
            *encoding, "--out", f"{split}.{suffix}", folder=tmp_path,
        )  # fmt: skip
    teacher.unlink()
    said = call(
        "studenttrain", "fit", "--targets", f"train.{suffix}", "--data", ground / "train.npz", "--student",
        "mlp:64-48-10", "--epochs", "20", "--batch-size", "50", "--lr", "3e-3", "--out", "run", folder=tmp_path,
    )  # fmt: skip
    assert "the stored top-1 meets the hard target in 9" in said.stdout + said.stderr
    figures = json.loads(
        call(
            "studenttrain", "eval", "--checkpoint", "run", "--data", ground / "test.npz", "--targets",
            f"test.{suffix}", "--json", folder=tmp_path,
        ).stdout
    )  # fmt: skip
    assert set(figures) == {"top1", "agreement", "nll", "ece", "num_errors", "num_samples"}
    assert figures["num_samples"] == 797
    assert figures["agreement"] > 0.9
    assert figures["top1"] > 0.85
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "student.safetensors", "student.pt2", "student.json", "report.html", "metrics.jsonl", "checkpoint.pt",
    }  # fmt: skip
    info = json.loads(call("logitstore", "info", f"train.{suffix}", "--json", folder=tmp_path).stdout)
    assert info["num_rows"] == info["num_sealed_rows"] == NUM_TRAIN
    call("logitstore", "verify", f"train.{suffix}", folder=tmp_path)


def test_both_backends_and_a_converted_copy_have_one_content_digest(ground: Path, tmp_path: Path) -> None:
    options = ("--model", ground / "weights.pt", "--arch", "mlp:64-32-10", "--data", ground / "train.npz")
    for name in ("a.zarr", "b.h5"):
        call("teacherdump", "run", *options, "--out", name, folder=tmp_path)
    call("logitstore", "convert", "a.zarr", "c.h5", folder=tmp_path)
    call("logitstore", "convert", "b.h5", "d.zarr", "--compressor", "zstd", folder=tmp_path)
    digests = {
        json.loads(call("logitstore", "info", name, "--json", folder=tmp_path).stdout)["content_digest"]
        for name in ("a.zarr", "b.h5", "c.h5", "d.zarr")
    }
    assert len(digests) == 1


def test_a_student_trains_on_what_is_sealed_and_goes_on_with_the_grown_store(ground: Path, tmp_path: Path) -> None:
    options = ("--model", ground / "weights.pt", "--arch", "mlp:64-32-10", "--data", ground / "train.npz")
    run = ("teacherdump", "run", *options, "--shard-rows", "128", "--out", "logits.zarr")
    fit = ("studenttrain", "fit", "--targets", "logits.zarr", "--data", ground / "train.npz", "--student", "mlp:64-10")
    call(*run, "--limit-samples", "256", folder=tmp_path)
    said = call(*fit, "--epochs", "2", "--out", "early", folder=tmp_path)
    assert "256" in said.stdout + said.stderr
    call(*run, folder=tmp_path)
    said = call(*fit, "--epochs", "2", "--out", "late", folder=tmp_path)
    assert "1,000 rows" in said.stdout + said.stderr
