"""A folder of pieces of remote objects, which several processes may share.

A piece is named by the digest of its object, as the seal has it, and by its place in it: what it holds can never
change, so that nothing is ever out of date. What is read back is checked where it is used, by the checksum of each
chunk, and a piece that does not hold is dropped and fetched again.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.backends.files import clear_os_errors
from storage.errors import OutOfSpaceError, PathError

PIECE_BYTES = 512 << 10  # of an object, from its start on
IN_USE_S = 3600.0  # a piece that somebody used since is not evicted
TOUCH_S = 60.0  # between two marks of use
FULL_S = 30.0  # that a cache which was found full is not looked through again
LOCK, COUNT = "lock", "count"
DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class CacheSettings:
    """Where a cache lies, and how large it may grow.

    Attributes:
        folder: made where it is not there; nothing else may lie in it.
        max_bytes: of its pieces, at least 1.
    """

    folder: str
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"cache_size: expected at least 1 byte, got {self.max_bytes}")


class ByteCache:
    """A cache that is open.

    A student comes by every piece once an epoch, in a new order each time. Were the least recently used piece thrown
    out for each new one, a store that is larger than the cache would go through it from end to end and find next to
    nothing. So what is there stays, and what finds no room is not kept: of a store twice as large as the cache, half is
    found. Only pieces that nobody used for an hour, of another store then, make room.

    Args:
        settings: where and how large.

    Raises:
        PathError: the folder can't be used, or holds something else.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.folder, self.max_bytes = Path(settings.folder), settings.max_bytes
        self._full_until = 0.0
        self._coming: dict[tuple[str, int], threading.Event] = {}
        self._claiming = threading.Lock()
        with clear_os_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            strange = [path.name for path in self.folder.iterdir() if not _is_ours(path.name)]
            if strange:
                raise PathError(
                    f"{self.folder}: expected an empty folder, or a cache, got {strange[0]!r} in it; give "
                    "another folder"
                )
            with self._locked() as file:
                for left in self.folder.glob("*.partial"):  # of a writer that was killed: whoever writes holds the lock
                    left.unlink(missing_ok=True)
                self._set_count(file, sum(size for _, size, _ in self._pieces()))

    def get(self, digest: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of an object, if they are kept as one piece."""
        path = self._path(digest, start)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read() if status.st_size == stop - start else b""
        except OSError:
            return None
        if len(data) != stop - start:
            self.drop(digest, start)
            return None
        if time.time() - status.st_mtime > TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(path)
        return data

    def put(self, digest: str, start: int, data: bytes) -> bool:
        """Keep a piece, if there is room; whether it is kept."""
        path = self._path(digest, start)
        if path is None or path.exists() or time.monotonic() < self._full_until:
            return path is not None and path.exists()
        try:
            with self._locked() as file:
                count = self._count(file)
                if count + len(data) > self.max_bytes:
                    count = self._evicted(len(data))
                    self._set_count(file, count)
                if count + len(data) > self.max_bytes:
                    self._full_until = time.monotonic() + FULL_S
                    return False
                self._set_count(file, count + len(data))
                self._write(path, data)
        except (OSError, OutOfSpaceError):  # a cache that can't be written is only a slower one
            self._full_until = time.monotonic() + FULL_S
            return False
        return True

    def claim(self, digest: str, start: int) -> threading.Event | None:
        """Say that a piece is being fetched; what to wait for where another thread is fetching it already."""
        with self._claiming:
            there = self._coming.get((digest, start))
            if there is None:
                self._coming[digest, start] = threading.Event()
            return there

    def release(self, digest: str, start: int) -> None:
        """Say that a claimed piece is there, or won't come."""
        with self._claiming:
            self._coming.pop((digest, start)).set()

    def has_room(self) -> bool:
        """Whether a piece may be kept, as far as is known."""
        return time.monotonic() >= self._full_until

    def drop(self, digest: str, start: int) -> None:
        """Remove a piece that does not hold."""
        path = self._path(digest, start)
        if path is None:
            return
        with contextlib.suppress(OSError), self._locked() as file:
            size = path.stat().st_size
            path.unlink()
            self._set_count(file, max(0, self._count(file) - size))

    def num_bytes(self) -> int:
        """Bytes of all pieces, counted anew."""
        return sum(size for _, size, _ in self._pieces())

    def _path(self, digest: str, start: int) -> Path | None:
        """The file of a piece; None for a digest that is none, since it may come from anyone."""
        return self.folder / f"{digest}-{start}" if DIGEST.fullmatch(digest) else None

    def _write(self, path: Path, data: bytes) -> None:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                file.write(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _pieces(self) -> list[tuple[Path, int, float]]:
        """Path, size and time of last use of each piece."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name not in (LOCK, COUNT) and not entry.name.endswith(".partial"):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    found.append((Path(entry.path), status.st_size, status.st_mtime))
        return found

    def _evicted(self, wanted: int) -> int:
        """Remove pieces that are not in use until there is room; gives the bytes that are left."""
        pieces = self._pieces()
        count, old = sum(size for _, size, _ in pieces), time.time() - IN_USE_S
        for path, size, used in sorted(pieces, key=lambda piece: piece[2]):
            if count + wanted <= self.max_bytes or used > old:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                count -= size
        return count

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file of the count, for one process or thread at a time."""
        with (self.folder / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            descriptor = os.open(self.folder / COUNT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                yield descriptor
            finally:
                os.close(descriptor)

    def _count(self, descriptor: int) -> int:
        """Bytes of all pieces as they were counted last."""
        try:
            return int(os.pread(descriptor, 32, 0))
        except ValueError:
            return self.num_bytes()

    def _set_count(self, descriptor: int, count: int) -> None:
        os.pwrite(descriptor, f"{count:<20d}".encode(), 0)


def _is_ours(name: str) -> bool:
    return name in (LOCK, COUNT) or re.fullmatch(r"[0-9a-f]{32}-\d+(\.[0-9a-f]{32}\.partial)?", name) is not None
