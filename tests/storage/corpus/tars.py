"""Small tars of samples, honest and not."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tests.builders import image_bytes, random_pixels

Members = Iterable[tuple[str, bytes]]


def npy_bytes(values: np.ndarray) -> bytes:
    """A `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of plain files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image_members(start: int, stop: int, labels: Sequence[int] | None = None, size: int = 8) -> list[tuple[str, bytes]]:
    """Samples `000000.png`, ... of random pixels, each with its class where there are labels."""
    members = []
    for number in range(start, stop):
        pixels = random_pixels(size, size, 3, seed=number)
        members.append((f"{number:06d}.png", image_bytes(pixels)))
        if labels is not None:
            members.append((f"{number:06d}.cls", str(labels[number]).encode()))
    return members


def write_tars(folder: Path, counts: Sequence[int] = (4, 3, 5), num_classes: int = 3, size: int = 8) -> Path:
    """A folder of `train-000.tar`, ... of images with classes."""
    labels = np.random.default_rng(3).integers(0, num_classes, sum(counts)).tolist()
    start = 0
    for number, count in enumerate(counts):
        members = image_members(start, start + count, labels, size)
        write_tar(folder / f"train-{number:03d}.tar", members)
        start += count
    return folder
