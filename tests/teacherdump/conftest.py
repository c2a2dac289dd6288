"""Small real teachers and corpora."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from studenttrain.models import build_model
from teacherdump.config import DumpConfig

NUM_INPUTS = 12
NUM_CLASSES = 5
ARCH = f"mlp:{NUM_INPUTS}-16-{NUM_CLASSES}"


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def save_weights(path: Path, arch: str = ARCH, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    torch.save(build_model(arch).state_dict(), path)
    return path


def save_program(path: Path, module: nn.Module, inputs_N: torch.Tensor, dynamic: Any = "batch") -> Path:
    """Export a module; `dynamic` None fixes the batch."""
    shapes = None if dynamic is None else ({0: torch.export.Dim(dynamic) if isinstance(dynamic, str) else dynamic},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (inputs_N,), dynamic_shapes=shapes), path)
    return path


def save_script(path: Path, module: nn.Module, traced_with: torch.Tensor | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if traced_with is None:
            torch.jit.script(module).save(str(path))
        else:
            torch.jit.trace(module, traced_with, check_trace=False).save(str(path))
    return path


@pytest.fixture
def saving() -> dict[str, Callable[..., Path]]:
    """How to save a teacher: `weights`, `program`, `script`."""
    return {"weights": save_weights, "program": save_program, "script": save_script}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_weights(tmp_path / "teacher.pt")


@pytest.fixture
def rows() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(200, NUM_INPUTS)).astype(np.float32) * 2


@pytest.fixture
def corpus(tmp_path: Path, rows: np.ndarray[Any, Any]) -> Path:
    """200 rows of 12 numbers with hard targets, 7 of them unknown."""
    hard_targets = np.arange(len(rows)) % NUM_CLASSES
    hard_targets[::30] = -1
    np.savez(tmp_path / "corpus.npz", x=rows)
    np.save(tmp_path / "labels.npy", hard_targets)
    return tmp_path / "corpus.npz"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 PNG and JPEG files of 8 x 8 pixels in two classes."""
    generator = np.random.default_rng(1)
    for index in range(40):
        folder = tmp_path / "images" / ("cat" if index < 20 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.{'png' if index % 2 else 'jpg'}")
    return tmp_path / "images"


@pytest.fixture
def config(weights: Path, corpus: Path, tmp_path: Path) -> Callable[..., DumpConfig]:
    """A dump of the corpus in shards of 32 rows and batches of 10, with any option changed."""

    def build(**options: Any) -> DumpConfig:
        defaults: dict[str, Any] = {
            "models": (str(weights),),
            "arch": ARCH,
            "data": str(corpus),
            "labels": str(tmp_path / "labels.npy"),
            "out": str(tmp_path / "out.zarr"),
            "device": "cpu",
            "batch_size": 10,
            "shard_rows": 32,
            "chunk_rows": 16,
        }
        return DumpConfig(**{**defaults, **options})

    return build
