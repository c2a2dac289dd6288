"""The headers of a tar, read one by one through a window: nothing is extracted, and no name in it opens a file.

Source: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax); the GNU tar manual, "Basic Tar Format", for long names, sparse
files and numbers in base 256.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from storage.errors import CorpusError

BLOCK = 512

_END = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX = frozenset((b"x", b"X"))
_PAX_GLOBAL = b"g"

# Bytes of the largest long name or pax header that is read: names of files end at 4 KiB on any system.
_MAX_EXTENSION = 1 << 20

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: its path, as it stands there.
        is_file: whether it is a plain file; else a folder, link, device or sparse file.
        start: offset of its first byte.
        size: its bytes.
    """

    name: bytes
    is_file: bool
    start: int
    size: int


class Window:
    """Bytes of a file that is read from its start to its end with jumps; what lies between jumps may stay unread.

    Args:
        read: gives bytes [start, stop).
        size: of the file.
        near: bytes that are read at once where little is jumped over.
        far: bytes that are read at once behind a jump over more than `near`.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, near: int, far: int) -> None:
        self._read, self.size, self._near, self._far = read, size, near, far
        self._start, self._data = 0, b""

    def get(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count); fewer where the file ends."""
        stop = min(start + count, self.size)
        offset = start - self._start
        if offset < 0 or stop > self._start + len(self._data):
            jumped = start - self._start - len(self._data)
            ahead = self._near if jumped <= self._near else self._far
            self._data = self._read(start, min(max(start + ahead, stop), self.size)) if start < stop else b""
            self._start, offset = start, 0
        return self._data[offset : offset + max(0, stop - start)]


class _Extension:
    """What the headers before a member say of it."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.is_sparse = False


def read_members(window: Window, where: str) -> Iterator[Member]:
    """The members of a tar in order.

    Args:
        window: on the whole file.
        where: for messages, such as `corpus file 'PATH'`.

    Raises:
        CorpusError: it is compressed, no tar, damaged, or cut off; the message says at which byte.
    """
    offset, extension, num_members = 0, _Extension(), 0
    while offset < window.size:
        header = window.get(offset, BLOCK)
        if header == _END:
            return
        kind, size = _check_header(header, offset, num_members, where)
        start = offset + BLOCK
        if kind == _SPARSE:
            start = _behind_sparse_headers(window, header, start)
        if kind not in (*_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            size = size if extension.size is None else extension.size
        stop = start if kind in _WITHOUT_DATA else start + size
        if stop > window.size:
            raise _damaged(
                where, offset, num_members, f"{stop - start} bytes of a member", f"{max(0, window.size - start)} bytes"
            )
        if kind in _PAX or kind in (_PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            if size > _MAX_EXTENSION:
                raise _damaged(where, offset, num_members, f"at most {_MAX_EXTENSION} bytes of a long name", f"{size}")
            if kind != _PAX_GLOBAL:  # what belongs to all members says nothing of names and sizes
                _extend(extension, kind, window.get(start, size), where, offset, num_members)
        else:
            name = _name(header) if extension.name is None else extension.name
            is_file = kind in _REGULAR and not extension.is_sparse and not name.endswith(b"/")
            yield Member(name, is_file, start, stop - start)
            extension, num_members = _Extension(), num_members + 1
        offset = stop + -stop % BLOCK


def _check_header(header: bytes, offset: int, num_members: int, where: str) -> tuple[bytes, int]:
    """Type and size of a header.

    Raises:
        CorpusError: it is none.
    """
    if offset == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise CorpusError(
                    f"{where}: expected a plain .tar, whose members are read where they lie, got one that is packed "
                    f"with {name}; unpack it to a .tar"
                )
    if len(header) < BLOCK:
        raise _damaged(where, offset, num_members, f"a header of {BLOCK} bytes", f"{len(header)} bytes")
    size, told = _number(header[124:136]), _number(header[148:156])
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    if told != unsigned:
        signed = unsigned - 256 * sum(byte > 127 for at, byte in enumerate(header) if not 148 <= at < 156)
        if told != signed:  # some old programs summed signed bytes
            raise _damaged(where, offset, num_members, "a header whose checksum holds", "another")
    if size is None or size < 0:
        raise _damaged(where, offset, num_members, "the size of a member", "no number")
    return header[156:157], size


def _number(field: bytes) -> int | None:
    """A number in octal digits, or in base 256; None where it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _name(header: bytes) -> bytes:
    """The path in a header."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _extend(extension: _Extension, kind: bytes, data: bytes, where: str, offset: int, num_members: int) -> None:
    """Take what a long name or a pax header says of the next member."""
    if kind == _LONG_NAME:
        extension.name = data.split(b"\0", 1)[0]
    if kind not in _PAX:
        return
    while data.rstrip(b"\0"):
        length, space, _ = data.partition(b" ")
        count = int(length) if space and length.isdigit() and len(length) < 8 else 0
        key, equals, value = data[len(length) + 1 : count - 1].partition(b"=")
        if not equals or data[count - 1 : count] != b"\n":
            raise _damaged(where, offset, num_members, "a pax header of 'LENGTH KEY=VALUE' lines", "another")
        if key == b"path":
            extension.name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise _damaged(where, offset, num_members, "a number of bytes in a pax header", "another text")
            extension.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            extension.is_sparse = True
        data = data[count:]


def _behind_sparse_headers(window: Window, header: bytes, start: int) -> int:
    """Where the data of an old GNU sparse member begins, behind the blocks that say where its holes are."""
    is_extended = header[482]
    while is_extended and start < window.size:
        is_extended = window.get(start, BLOCK)[504:505] not in (b"\0", b"")
        start += BLOCK
    return start


def _damaged(where: str, offset: int, num_members: int, expected: str, got: str) -> CorpusError:
    whole = f"; the {num_members} members before it are whole" if num_members else ""
    advice = f", and 'truncate -s {offset} FILE' keeps them alone" if num_members else ""
    return CorpusError(
        f"{where}: expected {expected} at byte {offset}, got {got}: it is no tar, damaged or cut off{whole}; "
        f"take another copy{advice}"
    )
