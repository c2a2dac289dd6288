"""What a tar of samples holds: which members make up a sample, and where the bytes lie that it is known by.

Source: the convention of the webdataset library: members that share their path up to the first dot of the base name are
one sample, and what stands behind that dot says what a member is.

Legend: N samples of one tar.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from storage.corpus.protocol import SampleKind
from storage.corpus.tar_members import Member, Window, read_members
from storage.errors import CorpusError

IMAGE_EXTENSIONS = frozenset((b"jpg", b"jpeg", b"png", b"webp"))
ARRAY_EXTENSION = b"npy"
CLASS_EXTENSION = b"cls"
JSON_EXTENSION = b"json"

# Where a JSON member says the class.
JSON_FIELDS = ("label", "cls")

# What is not there: the class of a sample that names none.
NO_CLASS = -2

# A class number takes fewer bytes than that, and the JSON beside an image does too; what is larger is not read.
_MAX_CLASS_BYTES, _MAX_JSON_BYTES = 64, 1 << 20


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one tar, in order.

    Attributes:
        names: their keys, one behind the other.
        ends: where each key ends in `names`, int64 (N,).
        starts: offset of each sample's bytes in the tar, int64 (N,).
        sizes: bytes of each sample, int64 (N,).
        sample_kind: `image` or `array`; of an empty table `image`.
        num_ignored: members that belong to no sample.
        example: name of one of these, or nothing.
        classes_N: int32 (N,), `NO_CLASS` where a sample names none; None where it was not asked for.
    """

    names: bytes = field(repr=False)
    ends: NDArray[np.int64] = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    sample_kind: SampleKind
    num_ignored: int
    example: bytes
    classes_N: NDArray[np.int32] | None = field(repr=False)  # noqa: N815

    @property
    def num_samples(self) -> int:
        """Samples in the tar."""
        return len(self.ends)

    @property
    def num_bytes(self) -> int:
        """What the table takes in memory."""
        return len(self.names) + 24 * len(self.ends)

    def key(self, index: int) -> str:
        """A sample's key; what can't be shown of it is escaped."""
        start = int(self.ends[index - 1]) if index else 0
        return shown(self.names[start : int(self.ends[index])])

    def digest(self) -> bytes:
        """sha256 of all but the classes."""
        state = sha256(self.sample_kind.encode())
        for part in (self.names, *(values.astype("<i8").tobytes() for values in (self.ends, self.starts, self.sizes))):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return state.digest()

    def cut(self, start: int, stop: int) -> "SampleTable":
        """Samples [start, stop), without their classes."""
        first = int(self.ends[start - 1]) if start else 0
        names = self.names[first : int(self.ends[stop - 1])]
        rows = slice(start, stop)
        return SampleTable(
            names, self.ends[rows] - first, self.starts[rows], self.sizes[rows], self.sample_kind, 0, b"", None
        )


def shown(name: bytes) -> str:
    """A name as text; bytes that are no UTF-8 and letters that can't be printed are escaped."""
    text = name.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """A member's path as the key of its sample and what it is; None where it belongs to no sample.

    Example:
        >>> split_name(b"./dog/0001.left.JPG"), split_name(b"dog/.hidden.jpg")
        ((b'dog/0001', b'left.jpg'), None)
    """
    while name.startswith(b"./"):
        name = name[2:]
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot or name.startswith(b"/") or b".." in folder.split(b"/"):
        return None
    return folder + slash + stem, extension.lower()


class _Builder:
    """The samples of a tar while its members come in."""

    def __init__(self, where: str, read: Callable[[int, int], bytes] | None) -> None:
        self._where, self._read = where, read
        self._images: dict[bytes, tuple[int, int]] = {}
        self._arrays: dict[bytes, tuple[int, int]] = {}
        self._classes: dict[bytes, int] = {}
        self._others: dict[bytes, int] = {}
        self._num_strange, self._example = 0, b""

    def add(self, member: Member) -> None:
        """Take the next member.

        Raises:
            CorpusError: it is a second image, array or class of its sample, or no class number.
        """
        found = split_name(member.name) if member.is_file else None
        if found is None:
            self._ignore(member.name)
            return
        key, extension = found
        if extension in IMAGE_EXTENSIONS:
            self._put(self._images, key, member, "image")
        elif extension == ARRAY_EXTENSION:
            self._put(self._arrays, key, member, "array")
        elif extension in (CLASS_EXTENSION, JSON_EXTENSION):
            self._others[key] = self._others.get(key, 0) + 1
            self._take_class(key, extension, member)
        else:
            self._others[key] = self._others.get(key, 0) + 1
            self._example = self._example or member.name

    def _ignore(self, name: bytes) -> None:
        self._num_strange += not name.endswith(b"/")
        self._example = self._example or name

    def _put(self, samples: dict[bytes, tuple[int, int]], key: bytes, member: Member, what: str) -> None:
        if key in samples:
            raise CorpusError(
                f"{self._where}: expected one {what} a sample, got a second one for {shown(key)!r}: "
                f"{shown(member.name)!r}; give each sample a name of its own up to the first dot"
            )
        samples[key] = member.start, member.size

    def _take_class(self, key: bytes, extension: bytes, member: Member) -> None:
        """Read the class that a member names, if it does; that of a `.cls` goes before that of a JSON."""
        if self._read is None:
            return
        if extension == JSON_EXTENSION:
            number = None
            if member.size <= _MAX_JSON_BYTES:
                number = _class_of_json(self._read(member.start, member.size))
            if number is not None and -1 <= number < 2**31:
                self._classes.setdefault(key, number)
            return
        text = self._read(member.start, member.size) if member.size <= _MAX_CLASS_BYTES else b"a long text"
        digits = text.strip()
        is_number = digits.removeprefix(b"-").isdigit() and len(digits) <= 10
        if not is_number or not -1 <= int(digits) < 2**31:
            raise CorpusError(
                f"{self._where}: expected a class number from 0 (-1 for unknown) in {shown(member.name)!r}, got "
                f"{shown(digits)!r}; mend it, or ignore the classes: --labels none"
            )
        self._classes[key] = int(digits)

    def table(self) -> SampleTable:
        """The samples, in the order of the members that are their images or arrays.

        Raises:
            CorpusError: some are images and others arrays.
        """
        samples, kind = (self._images, "image") if self._images else (self._arrays, "array")
        stray = next((key for key in self._arrays if key not in self._images), None) if self._images else None
        if stray is not None:
            raise CorpusError(
                f"{self._where}: expected samples of one kind, got images ({shown(next(iter(self._images)))!r}) and "
                f"arrays ({shown(stray)!r}); give tars of one kind"
            )
        names = list(samples)
        places = np.array(list(samples.values()), np.int64).reshape(-1, 2)
        classes_N = None
        if self._read is not None:
            classes_N = np.array([self._classes.get(name, NO_CLASS) for name in names], np.int32)
        num_ignored = self._num_strange + sum(count for key, count in self._others.items() if key not in samples)
        return SampleTable(
            names=b"".join(names),
            ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            starts=places[:, 0].copy(),
            sizes=places[:, 1].copy(),
            sample_kind="array" if kind == "array" and samples else "image",
            num_ignored=num_ignored,
            example=self._example,
            classes_N=classes_N,
        )


def _class_of_json(raw: bytes) -> int | None:
    """The class that a JSON object names; None where it names none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    for name in JSON_FIELDS if isinstance(value, dict) else ():
        number = value.get(name)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def index_tar(window: Window, where: str, wants_classes: bool) -> SampleTable:
    """The samples of a tar; only headers are read, and the classes where they are wanted.

    Args:
        window: on the whole tar.
        where: for messages, such as `corpus file 'PATH'`.
        wants_classes: whether classes are read.

    Raises:
        CorpusError: it is no plain tar, is damaged or cut off, or its members do not make samples.
    """
    builder = _Builder(where, window.get if wants_classes else None)
    for member in read_members(window, where):
        builder.add(member)
    return builder.table()
