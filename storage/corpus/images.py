"""A folder tree of images: a sample a file, a class a top folder where there are folders."""

import errno
import io
import json
import os
import re
import warnings
from array import array as compact_array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 - importing registers them

from storage.corpus.labels import NO_LABELS, one_line, read_labels
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import SampleError, SampleKind, check_range, check_row
from storage.errors import CorpusError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Pixels of the largest image that is decoded: Pillow's own limit, 256 MiB at three bytes a pixel.
MAX_PIXELS = 89_478_485

# Their plugins are imported above, so that Pillow does not import all of its others to look for them.
_FORMATS = ("JPEG", "PNG", "WEBP")
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """A folder of images. About 40 bytes of index a sample, so that a million of them are 40 MB.

    A sample's key is its path below the folder, with `/` between its parts; its bytes are those of the file.
    """

    kind: ClassVar[str] = "images"
    sample_kind: ClassVar[SampleKind] = "image"

    path: Path
    class_names: tuple[str, ...] | None
    hard_targets: NDArray[np.int32] | None = field(repr=False)
    fingerprint: str
    num_ignored: int
    names: bytes = field(repr=False)
    ends: NDArray[np.int64] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """Images in the folder."""
        return len(self.ends)

    def key(self, row: int) -> str:
        """Path below the folder; bytes of a name that are not UTF-8 are escaped."""
        return self._name(row).decode("utf-8", "backslashreplace")

    def _name(self, row: int) -> bytes:
        check_row(row, self.num_samples)
        start = int(self.ends[row - 1]) if row else 0
        return self.names[start : int(self.ends[row])]

    def read_raw(self, row: int) -> bytes:
        """The file's bytes."""
        name = os.fsdecode(self._name(row))
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            if error.errno in _MACHINE_ERRORS or not self.path.is_dir():
                raise CorpusError(
                    f"corpus '{self.path}': expected its files to open, got '{error.strerror}'; mend that and run the "
                    "same command again"
                ) from error
            raise SampleError(f"expected a file that can be read, got '{error.strerror}'; mend the file") from error

    def decode(self, raw: bytes) -> NDArray[np.uint8]:
        """The image of a file's bytes; see `decode_image`."""
        return decode_image(raw)

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers, with the names of these files only."""
        check_range(start, stop, self.num_samples)
        first = int(self.ends[start - 1]) if start else 0
        names = self.names[first : int(self.ends[stop - 1])]
        ends = self.ends[start:stop] - first
        return part_of(
            self, start, stop, replace(self, names=names, ends=ends, class_names=None, hard_targets=None), start
        )


def decode_image(raw: bytes) -> NDArray[np.uint8]:
    """The pixels of a JPEG, PNG or WebP file, uint8 (H, W, C), turned as its EXIF orientation says.

    C is 1 for black and white, grey and grey with alpha, else 3. Of 16 bits the upper 8 are kept. Alpha is dropped and
    the colour below it kept, and palettes and CMYK become RGB, as Pillow's `convert("RGB")` does it. Of an animation
    the first frame is taken.

    Raises:
        SampleError: the bytes are no such image, truncated or damaged, or it has more than `MAX_PIXELS`.
    """
    with _open_image(raw) as image:
        try:
            image.load()
            turn = _TURNS.get(_orientation(image))
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            else:
                image = image.convert("L" if _is_grey(image) else "RGB")
            if turn is not None:
                image = image.transpose(turn)
            pixels = np.asarray(image)
        except MemoryError:
            raise  # the machine's fault, not the sample's
        except Exception as error:  # Pillow raises nearly anything on damaged files
            raise SampleError(
                f"expected a whole image, got a truncated or damaged one ({one_line(error)}); replace the file"
            ) from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def image_shape(raw: bytes) -> tuple[int, int, int]:
    """Height, width and channels that an image decodes to, from its header.

    Raises:
        SampleError: the bytes are no image that can be decoded.
    """
    with _open_image(raw) as image:
        width, height = image.size
        if _orientation(image) in _SIDEWAYS:
            width, height = height, width
        return height, width, 1 if _is_grey(image) else 3


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")


def _open_image(raw: bytes) -> Image.Image:
    """An image whose header is read, and whose size is checked."""
    if _PIL_WARNINGS not in warnings.filters:
        # what Pillow warns of (odd EXIF, large images) is either harmless or said by the row's own error
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if not raw:
        raise SampleError("expected a JPEG, PNG or WebP file, got an empty file; replace the file")
    try:
        image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        width, height = image.size
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except Exception as error:  # its text names an address in memory, which is another one in every run
        raise SampleError(
            f"expected a JPEG, PNG or WebP file, got one that starts with {raw[:4].hex(' ')} and has no whole header; "
            "replace the file"
        ) from error
    if width * height > MAX_PIXELS:
        raise _too_large()
    return image


def _too_large() -> SampleError:
    return SampleError(f"expected at most {MAX_PIXELS} pixels, got more; make the image smaller")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF data is no reason to lose the image
        return 1


def open_images(path: Path, labels: str | Path | None = None) -> ImageCorpus:
    """The images below a folder, sorted by their path; with the labels `none` its folders are no classes.

    Only names and sizes are looked at. Hidden files and folders are left out; other files are counted.

    Raises:
        CorpusError: no images, images both in the folder and in folders, links that leave it, or unusable labels.
    """
    where = f"corpus '{path}'"
    if not path.is_dir():
        raise CorpusError(f"{where}: expected a folder of images, got a file; give the folder")
    found, num_ignored = _scan(path, where)
    if not found:
        raise CorpusError(
            f"{where}: expected images ({', '.join(IMAGE_SUFFIXES)}), got {describe_files(path)}; "
            "give a folder that holds images"
        )
    found.sort()
    ends = np.cumsum([len(name) for name, _ in found], dtype="<i8")
    names, sizes = b"".join(name for name, _ in found), compact_array("q", (size for _, size in found))
    class_names, hard_targets = (None, None) if labels == NO_LABELS else _classes(found, path, where)
    if labels is not None and labels != NO_LABELS:
        if class_names is not None:
            raise CorpusError(
                f"{where}: expected its folders to say the classes, got labels '{labels}' as well; "
                "leave --labels out, or put the images into one folder"
            )
        hard_targets = read_labels(labels, len(found))
    state = sha256(json.dumps({"kind": "images", "num_samples": len(found)}).encode())
    for part in (ends.tobytes(), names, np.frombuffer(sizes, np.int64).astype("<i8").tobytes()):
        state.update(part)
    return ImageCorpus(path, class_names, hard_targets, state.hexdigest(), num_ignored, names, ends)


def first_image(path: Path) -> str | None:
    """Name of some image below a folder, or None where there is none."""
    return next((entry.path for entry, _ in walk_files(path) if _is_image(entry.name)), None)


def describe_files(path: Path) -> str:
    """What a folder holds, by suffix, for an error message."""
    suffixes: Counter[str] = Counter()
    example = ""
    for entry, name in walk_files(path):
        suffixes[Path(entry.name).suffix.lower() or "no suffix"] += 1
        example = min(example or name, name)
    if not suffixes:
        return "an empty folder"
    counts = ", ".join(f"{count} of {suffix}" for suffix, count in suffixes.most_common(3))
    return f"{suffixes.total()} other file(s) ({counts}; for example {example!r})"


def walk_files(root: Path) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every visible entry below a folder that is not a folder, with its path below it; links are not followed."""
    pending = [(os.fspath(root), "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    yield entry, prefix + entry.name


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _scan(path: Path, where: str) -> tuple[list[tuple[bytes, int]], int]:
    """Name and size of every image, and the number of other files."""
    found: list[tuple[bytes, int]] = []
    num_ignored = 0
    for entry, name in walk_files(path):
        if entry.is_symlink():
            if not _is_image(name) and not entry.is_dir():
                num_ignored += 1
                continue
            check_link(entry, name, path, where)
        if _is_image(name) and entry.is_file():
            found.append((os.fsencode(name), entry.stat().st_size))
        else:
            num_ignored += 1
    return found, num_ignored


def check_link(entry: os.DirEntry[str], name: str, path: Path, where: str) -> None:
    """Refuse a link that leads out of the folder, to a folder, or nowhere."""
    target = Path(os.path.realpath(entry.path))
    if not target.is_relative_to(os.path.realpath(path)):
        raise CorpusError(
            f"{where}: expected links that stay inside the folder, got {name!r}, which leads to '{target}'; "
            "copy what it leads to"
        )
    if not target.is_file():
        what = "a folder, whose images would be there twice" if target.is_dir() else "nothing"
        raise CorpusError(f"{where}: expected links to files, got {name!r}, which leads to {what}; remove the link")


def _classes(
    found: list[tuple[bytes, int]], path: Path, where: str
) -> tuple[tuple[str, ...] | None, NDArray[np.int32] | None]:
    """Names of the top folders, sorted, and the class of each image; None for a flat folder."""
    tops = sorted({name.partition(b"/")[0] for name, _ in found if b"/" in name})
    if not tops:
        return None, None
    names = tuple(top.decode("utf-8", "backslashreplace") for top in tops)
    flat = next((name for name, _ in found if b"/" not in name), None)
    if flat is not None:
        raise CorpusError(
            f"{where}: expected images in folders, one a class, or all in the one folder, got both "
            f"({flat.decode('utf-8', 'backslashreplace')!r} beside the folder {names[0]!r}); move them into folders"
        )
    if all(name.lower() in _SPLITS for name in names) and all(name.count(b"/") > 1 for name, _ in found):
        raise CorpusError(
            f"{where}: expected a folder for each class, got the splits {', '.join(map(repr, names))}; "
            f"give one of them: '{path / names[0]}'"
        )
    index = {top: number for number, top in enumerate(tops)}
    return names, np.fromiter((index[name.partition(b"/")[0]] for name, _ in found), np.int32, len(found))
