"""A folder tree of images: a sample a file, a class a top folder where there are folders."""

import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 - importing registers them

from storage.corpus.access import Files, files_in
from storage.corpus.files import IMAGE_SUFFIXES, SPLITS, choose_files, find_files, walk_files
from storage.corpus.labels import NO_LABELS, one_line, read_labels
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.patterns import is_pattern
from storage.corpus.protocol import SampleError, SampleKind, check_range, check_row
from storage.errors import CorpusError

# Pixels of the largest image that is decoded: Pillow's own limit, 256 MiB at three bytes a pixel.
MAX_PIXELS = 89_478_485

# Their plugins are imported above, so that Pillow does not import all of its others to look for them.
_FORMATS = ("JPEG", "PNG", "WEBP")
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


@dataclass(frozen=True, eq=False)
class ImageCorpus:
    """A folder of images. About 40 bytes of index a sample, so that a million of them are 40 MB.

    A sample's key is its path below the folder or URL, with `/` between its parts; its bytes are those of the file.
    """

    kind: ClassVar[str] = "images"
    sample_kind: ClassVar[SampleKind] = "image"

    path: Path | str
    class_names: tuple[str, ...] | None
    hard_targets: NDArray[np.int32] | None = field(repr=False)
    fingerprint: str
    num_ignored: int
    names: bytes = field(repr=False)
    ends: NDArray[np.int64] = field(repr=False)
    files: Files = field(repr=False)

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
        return self.files.read(os.fsdecode(self._name(row)))

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


def open_images(path: Path | str, labels: str | Path | None = None, files: Sequence[str] | None = None) -> ImageCorpus:
    """The images below a folder or URL, sorted by their path; with the labels `none` its folders are no classes.

    Only names and sizes are looked at. Hidden files and folders are left out; other files are counted.

    Args:
        path: the folder.
        labels: a file of hard targets, or `none` for none; None takes the folders as classes.
        files: names of the images that are taken, in this order; the classes stay those of all that are there.

    Raises:
        CorpusError: no images, images both in the folder and in folders, links that leave it, or unusable labels.
    """
    where = f"corpus '{path}'"
    if isinstance(path, Path) and not path.is_dir():
        what = "a file" if path.exists() else "a pattern"
        raise CorpusError(f"{where}: expected a folder of images, got {what}; give the folder")
    if isinstance(path, str) and is_pattern(path):
        raise CorpusError(f"{where}: expected the URL of a folder of images, got a pattern; give the folder")
    found = find_files(path, IMAGE_SUFFIXES)
    if not found.entries:
        got = describe_files(path) if isinstance(path, Path) else f"{found.num_ignored} other object(s)"
        raise CorpusError(
            f"{where}: expected images ({', '.join(IMAGE_SUFFIXES)}), got {got}; give a folder that holds images"
        )
    chosen = choose_files(found, files, where).entries
    names = [os.fsencode(entry.name) for entry in chosen]
    class_names, hard_targets = None, None
    if labels != NO_LABELS:
        class_names = _classes([os.fsencode(entry.name) for entry in found.entries], path, where)
        hard_targets = None if class_names is None else _class_of_each(names, class_names)
    if labels is not None and labels != NO_LABELS:
        if class_names is not None:
            raise CorpusError(
                f"{where}: expected its folders to say the classes, got labels '{labels}' as well; "
                "leave --labels out, or put the images into one folder"
            )
        hard_targets = read_labels(labels, len(names))
    ends = np.cumsum([len(name) for name in names], dtype="<i8")
    sizes = np.array([entry.num_bytes for entry in chosen], "<i8")
    state = sha256(json.dumps({"kind": "images", "num_samples": len(names)}).encode())
    for part in (ends.tobytes(), b"".join(names), sizes.tobytes()):
        state.update(part)
    shown = None if class_names is None else tuple(name.decode("utf-8", "backslashreplace") for name in class_names)
    return ImageCorpus(
        path, shown, hard_targets, state.hexdigest(), found.num_ignored, b"".join(names), ends, files_in(path)
    )


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


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _classes(names: Sequence[bytes], path: Path | str, where: str) -> list[bytes] | None:
    """Names of the top folders, sorted; None for a flat folder."""
    tops = sorted({name.partition(b"/")[0] for name in names if b"/" in name})
    if not tops:
        return None
    shown = [top.decode("utf-8", "backslashreplace") for top in tops]
    flat = next((name for name in names if b"/" not in name), None)
    if flat is not None:
        raise CorpusError(
            f"{where}: expected images in folders, one a class, or all in the one folder, got both "
            f"({flat.decode('utf-8', 'backslashreplace')!r} beside the folder {shown[0]!r}); move them into folders"
        )
    if all(name.lower() in SPLITS for name in shown) and all(name.count(b"/") > 1 for name in names):
        raise CorpusError(
            f"{where}: expected a folder for each class, got the splits {', '.join(map(repr, shown))}; "
            f"give one of them: '{path}/{shown[0]}'"
        )
    return tops


def _class_of_each(names: Sequence[bytes], class_names: Sequence[bytes]) -> NDArray[np.int32]:
    """The number of each image's top folder."""
    index = {top: number for number, top in enumerate(class_names)}
    return np.fromiter((index[name.partition(b"/")[0]] for name in names), np.int32, len(names))
