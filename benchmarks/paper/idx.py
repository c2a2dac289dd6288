"""The four files of MNIST, read and jittered without the project's own reader."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_CLASSES = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_CLASSES = "t10k-labels-idx1-ubyte.gz"
FILES = (TRAIN_IMAGES, TRAIN_CLASSES, TEST_IMAGES, TEST_CLASSES)


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    num_dims = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def read_split(images: Path, classes: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 28, 28) in [0, 1] and their classes (N,)."""
    return (
        torch.from_numpy(read_idx(images).copy()).float().div_(255),
        torch.from_numpy(read_idx(classes).copy()).long(),
    )


def jitter(images_NHW: torch.Tensor, generator: torch.Generator, num_pixels: int = 2) -> torch.Tensor:
    """The images, each moved by up to `num_pixels` in x and y, zeros moving in."""
    num_images, height, width = images_NHW.shape
    padded = F.pad(images_NHW, (num_pixels,) * 4)
    shift = torch.randint(0, 2 * num_pixels + 1, (2, num_images, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).unsqueeze(2)
    columns = (torch.arange(width) + shift[1]).unsqueeze(1)
    return padded[torch.arange(num_images).view(-1, 1, 1), rows, columns]


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write unsigned bytes as a gzipped IDX file, the same bytes each time."""
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + np.ascontiguousarray(array, np.uint8).tobytes(), mtime=0))


def write_part(folder: Path, images: Path, classes: Path, wanted: Sequence[int]) -> Path:
    """The images of some classes as IDX files of their own; where those of the images lie.

    Args:
        folder: of the two files; made if it is missing.
        images: all images.
        classes: their classes.
        wanted: classes whose images are taken.
    """
    out = folder / images.name
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        of = read_idx(classes)
        is_wanted = np.isin(of, wanted)
        write_idx(folder / classes.name, of[is_wanted])
        write_idx(out, read_idx(images)[is_wanted])
    return out
