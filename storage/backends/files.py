"""Durable files on a local disk: what a seal means is decided here."""

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from storage.errors import OutOfSpaceError, PathError
from storage.untrusted import NOT_FOLLOWED, open_inside

READ_BYTES = 8 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PATH = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def clear_os_errors(path: Path | str) -> Iterator[None]:
    """Turn a full disk, missing permissions and a path that can't be into errors that say what to do."""
    try:
        yield
    except OSError as error:
        # zarr and h5py wrap the cause now and then; its text still names it
        text = str(error).lower()
        if error.errno in NO_SPACE or "no space left" in text or "file too large" in text:
            raise OutOfSpaceError(
                f"{path}: expected room on the disk, got none; free space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PathError(
                f"{path}: expected a path that may be read and written, got {error.strerror}; choose another"
            ) from error
        if error.errno in NO_PATH:
            raise PathError(
                f"{path}: expected a path in a folder, got {error.strerror} at {error.filename!r}; choose another"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each name durable; nothing where it is there."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


@contextlib.contextmanager
def only_one(path: Path, done: Path) -> Iterator[None]:
    """Let one process or thread at a time through, and have the others wait; a killed one waits for nobody.

    Args:
        path: of the lock, a file made for it; it goes when `done` is there.
        done: what the one that comes through first leaves behind.
    """
    make_folder(path.parent)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | NOT_FOLLOWED, 0o666), "wb") as file:
        with contextlib.suppress(OSError):  # no locks on this file system: then one writer a shard is the caller's duty
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if done.exists():
                path.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a whole file durably, over what is there; of several pieces one after the other."""
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _write_durably(partial, data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, data: bytes) -> bool:
    """Write a whole file durably, if nothing of that name is there.

    Returns:
        False where the name is taken; the file that has it is left as it is.
    """
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _write_durably(partial, data)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():  # no hard links on this file system: a rename, with a gap between look and leap
                return False
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _write_durably(path: Path, data: bytes | Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for piece in (data,) if isinstance(data, bytes) else data:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def file_digest(path: Path, start: int = 0, root: Path | None = None) -> dict[str, Any]:
    """`num_bytes` and `xxh3_128` of a file from byte `start` on, as they lie on the disk.

    Args:
        path: of the file.
        start: first byte.
        root: a folder above it, below which no link is followed; None follows them all.

    Raises:
        DamageError: there is a link below the root, or it is no plain file.
    """
    state = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("rb") if root is None else os.fdopen(open_inside(root, path), "rb") as file:
        file.seek(start)
        while data := file.read(READ_BYTES):
            state.update(data)
            num_bytes += len(data)
    return {"num_bytes": num_bytes, "xxh3_128": state.hexdigest()}


def bytes_digest(data: bytes) -> dict[str, Any]:
    """`num_bytes` and `xxh3_128` of bytes in memory."""
    return {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
