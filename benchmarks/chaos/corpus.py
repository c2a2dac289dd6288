"""A corpus of small pictures in which some are broken, some poison the teacher, and one kills it."""

import io
import random
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.chaos.teacher import DEADLY_RGB, IMAGE_SIZE, NUM_CLASSES, POISON_RGB

BROKEN = ("truncated", "not an image", "empty")
SAMPLES_A_TAR = 250


@dataclass(frozen=True)
class Samples:
    """What the corpus is made of, whatever form it takes.

    Attributes:
        files: bytes by name, `c3/000017.png`, in order; the folder is the class.
        kinds: of each sample that is refused, by the stem of its name: one of `BROKEN`, `poison` or `deadly`.
    """

    files: Mapping[str, bytes]
    kinds: Mapping[str, str]


def make_samples(num_samples: int, num_broken: int, num_poison: int, generator: random.Random) -> Samples:
    """Random pictures with a class each; the deadly one is anywhere.

    Args:
        num_samples: in all.
        num_broken: of these, files that can't be decoded.
        num_poison: of these, pictures for which the teacher gives NaN.
        generator: of everything.
    """
    chosen = generator.sample(range(num_samples), num_broken + num_poison + 1)
    kind_of = {number: BROKEN[place % len(BROKEN)] for place, number in enumerate(chosen[:num_broken])}
    kind_of |= dict.fromkeys(chosen[num_broken:-1], "poison") | {chosen[-1]: "deadly"}
    pixels = np.random.default_rng(generator.randrange(1 << 32))
    files, kinds = {}, {}
    for number in range(num_samples):
        image = Image.fromarray(pixels.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
        kind, suffix = kind_of.get(number), "jpg" if generator.random() < 0.5 else "png"
        stem = f"{number:06d}"
        if kind in ("poison", "deadly"):
            image = Image.new("RGB", image.size, POISON_RGB if kind == "poison" else DEADLY_RGB)
            suffix = "png"  # JPEG would not keep the colour
        if kind is not None:
            kinds[stem] = kind
        files[f"c{number % NUM_CLASSES}/{stem}.{suffix}"] = _bytes(image, suffix, kind, generator)
    return Samples(files, kinds)


def _bytes(image: Image.Image, suffix: str, kind: str | None, generator: random.Random) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if suffix == "jpg" else "PNG")
    data = buffer.getvalue()
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "not an image":
        return generator.randbytes(len(data))
    return b"" if kind == "empty" else data


def write_folder(samples: Samples, folder: Path) -> None:
    """The corpus as a folder of images, a folder for each class."""
    for name, data in samples.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tars(samples: Samples, folder: Path) -> None:
    """The corpus as tar files with a `.cls` for each sample."""
    folder.mkdir(parents=True)
    named = list(samples.files.items())
    for start in range(0, len(named), SAMPLES_A_TAR):
        with tarfile.open(folder / f"train-{start // SAMPLES_A_TAR:04d}.tar", "w") as tar:
            for name, data in named[start : start + SAMPLES_A_TAR]:
                label, stem = name[1 : name.index("/")], Path(name).stem
                _add(tar, Path(name).name, data)
                _add(tar, f"{stem}.cls", label.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
