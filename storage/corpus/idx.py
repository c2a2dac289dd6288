"""An IDX file of images, plain or gzip, as MNIST comes; its labels file is found by name."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.corpus.labels import NO_LABELS, check_idx_size, is_gzip, read_idx, read_idx_header, read_labels
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import SampleError, SampleKind, check_row
from storage.errors import CorpusError

_IDX_NAME = re.compile(r"[-.]idx\d?(-ubyte)?(\.gz)?$", re.IGNORECASE)
_LABELS_NAME = re.compile(r"labels|[-.]idx1", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class IdxCorpus:
    """The images of an IDX file: mapped from a plain file, in memory from a gzip file. A sample's key is its row."""

    kind: ClassVar[str] = "idx"
    sample_kind: ClassVar[SampleKind] = "image"
    class_names: ClassVar[None] = None
    num_ignored: ClassVar[int] = 0

    path: Path
    labels: str | Path | None
    hard_targets: NDArray[np.int32] | None = field(repr=False)
    fingerprint: str
    images_NHWC: NDArray[np.uint8] = field(repr=False)  # noqa: N815

    @property
    def num_samples(self) -> int:
        """Images in the file."""
        return len(self.images_NHWC)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.images_NHWC.shape[1:]))

    def key(self, row: int) -> str:
        """The row."""
        check_row(row, self.num_samples)
        return str(row)

    def read_raw(self, row: int) -> bytes:
        """The image's pixels in C order."""
        check_row(row, self.num_samples)
        return bytes(self.images_NHWC[row].tobytes())

    def decode(self, raw: bytes) -> NDArray[np.uint8]:
        """The pixels as (H, W, C)."""
        if len(raw) != self.row_bytes:
            raise SampleError(f"expected {self.row_bytes} bytes of an image, got {len(raw)}; take another copy")
        return np.frombuffer(raw, np.uint8).reshape(self.images_NHWC.shape[1:])

    def read_rows(self, rows_N: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images (N, H, W, C)."""
        return take_rows(self.images_NHWC, rows_N)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers; the whole is opened once a process that reads of it."""
        return part_of(self, start, stop)

    def __reduce__(self) -> tuple[Callable[..., "IdxCorpus"], tuple[Any, ...]]:
        return open_idx, (self.path, self.labels)


def open_idx(path: Path, labels: str | Path | None = None) -> IdxCorpus:
    """The images of an IDX file, or of the only one in a folder.

    Raises:
        CorpusError: it is no whole IDX file of images, there are several, or the labels do not fit.
    """
    if path.is_dir():
        path = _only_images(path)
    where = f"corpus '{path}'"
    if is_gzip(path):
        images = read_idx(path, where)
    else:
        with path.open("rb") as file:
            shape = read_idx_header(file, where)
            check_idx_size(path.stat().st_size, shape, where)
            offset = file.tell()
        # nothing can be mapped where there are no values
        images = np.asarray(np.memmap(path, np.uint8, "r", offset, shape)) if min(shape) else np.empty(shape, np.uint8)
    _check_shape(images.shape, path, where)
    images_NHWC = images[..., None] if images.ndim == 3 else images
    labels = _labels_beside(path) if labels is None else labels
    hard_targets = None if labels is None or labels == NO_LABELS else read_labels(labels, len(images))
    index = {"kind": "idx", "shape": list(images_NHWC.shape), "dtype": "uint8"}
    fingerprint = sha256(json.dumps(index).encode()).hexdigest()
    return IdxCorpus(path, labels, hard_targets, fingerprint, images_NHWC)


def idx_files(folder: Path) -> list[Path]:
    """The files in a folder that are IDX files by their names, sorted."""
    return sorted(path for path in folder.iterdir() if _IDX_NAME.search(path.name) and path.is_file())


def take_rows(values: NDArray[Any], rows_N: NDArray[np.int64]) -> NDArray[Any]:
    """Rows of an array: a view where they follow each other, else a copy."""
    if len(rows_N) and bool((np.diff(rows_N) == 1).all()):
        return values[int(rows_N[0]) : int(rows_N[-1]) + 1]
    return values[rows_N]


def _only_images(folder: Path) -> Path:
    """The one IDX file of images in a folder."""
    where = f"corpus '{folder}'"
    files = [path for path in idx_files(folder) if not _LABELS_NAME.search(path.name)]
    if not files:
        raise CorpusError(f"{where}: expected an IDX file of images, got none; give the path of the file")
    if len(files) > 1:
        names = " and ".join(repr(path.name) for path in files[:4])
        raise CorpusError(
            f"{where}: expected one IDX file of images, got {len(files)}: {names}; give one of them: '{files[0]}'"
        )
    return files[0]


def _check_shape(shape: tuple[int, ...], path: Path, where: str) -> None:
    if len(shape) == 1:
        beside = _images_beside(path)
        hint = f"give the images: '{beside}'" if beside else "give the file of images"
        raise CorpusError(f"{where}: expected images, got {shape[0]} labels; {hint}, and the labels as --labels")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise CorpusError(
            f"{where}: expected images of shape (N, H, W) or (N, H, W, C) with C 1 or 3, got {shape}; "
            "save them as .npy and use the kind arrays"
        )
    if shape[0] == 0 or min(shape) == 0:
        raise CorpusError(f"{where}: expected at least one image, got shape {shape}; give a file with samples")


def _labels_beside(path: Path) -> Path | None:
    """The labels file that belongs to a file of images by its name, of the same compression if there are two."""
    if "images" not in path.name:
        return None
    return _beside(path, path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))


def _images_beside(path: Path) -> Path | None:
    if "labels" not in path.name:
        return None
    name = path.name.replace("labels", "images")
    return _beside(path, name.replace("idx1", "idx3")) or _beside(path, name.replace("idx1", "idx4"))


def _beside(path: Path, name: str) -> Path | None:
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path.with_name(it) for it in (name, other) if it != path.name and path.with_name(it).is_file()), None)
