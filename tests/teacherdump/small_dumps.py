"""Small dumps of a sharp teacher, each made once: of classes, and of sequences."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studenttrain.models import build_model
from teacherdump.config import DumpConfig
from teacherdump.run import run

ARCHS = {"classes": "mlp:12-16-300", "sequences": "gpt:1x16,heads=2,vocab=300"}
REFUSED = [5, 70]  # rows of the corpus of classes to which the teacher gives no finite logits

Dump = Callable[..., Path]


def save_teacher(path: Path, kind: str, seed: int = 3) -> Path:
    """Weights of a teacher that is as sharp as a trained one."""
    torch.manual_seed(seed)
    model = build_model(ARCHS[kind])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    torch.save(model.state_dict(), path)
    return path


def source_options(folder: Path, kind: str) -> dict[str, Any]:
    """Options that name a teacher and a corpus in a folder, which are written there.

    `classes`: 100 rows of 300 classes, two of them refused. `sequences`: 44 of 16 positions over 290 tokens, some with
    several documents; the teacher's output is padded to 300.
    """
    generator = np.random.default_rng(0)
    options: dict[str, Any] = {"models": (str(save_teacher(folder / "teacher.pt", kind)),), "arch": ARCHS[kind]}
    options |= {"device": "cpu", "batch_size": 7}
    if kind == "classes":
        rows = generator.normal(size=(100, 12)).astype(np.float32) * 2
        rows[REFUSED] = np.inf
        np.save(folder / "corpus.npy", rows)
        np.save(folder / "labels.npy", np.arange(100) % 300 - 1)
        return options | {"data": str(folder / "corpus.npy"), "labels": str(folder / "labels.npy")}
    np.save(folder / "tokens.npy", generator.integers(0, 290, 700).astype(np.uint16))
    np.save(folder / "starts.npy", np.array([0, 50, 333]))
    options |= {"data": str(folder / "tokens.npy"), "boundaries": str(folder / "starts.npy"), "vocab_size": 290}
    return options


def dumper(folder: Path, kind: str) -> Dump:
    """What dumps with options, once for each."""
    options = source_options(folder, kind) | {"shard_rows": 48, "temperatures": (1.0, 2.0)}
    if kind == "sequences":
        options["sequence_length"] = 16

    @functools.cache
    def dump(**more: Any) -> Path:
        path = folder / f"{len(list(folder.glob('*.zarr')))}.zarr"
        run(DumpConfig(**{**options, "out": str(path), **more}))
        return path

    return dump
