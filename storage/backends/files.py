"""Durable files on a local disk: what a seal means is decided here."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from storage.errors import OutOfSpaceError, PathError

READ_BYTES = 8 << 20


@contextlib.contextmanager
def clear_os_errors(path: Path | str) -> Iterator[None]:
    """Turn a full disk, a read-only folder and a missing path into errors that say what to do."""
    try:
        yield
    except OSError as error:
        # zarr and h5py wrap the cause now and then; its text still names it
        text = str(error).lower()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "no space left" in text:
            raise OutOfSpaceError(
                f"{path}: expected room on the disk, got none; free space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PathError(
                f"{path}: expected a place that can be written, got {error.strerror}; choose another"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            if path.exists():  # no hard links on this file system: a rename, with a gap between look and leap
                return False
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def file_digest(path: Path, start: int = 0) -> dict[str, Any]:
    """`num_bytes` and `xxh3_128` of a file from byte `start` on, as they lie on the disk."""
    state = xxhash.xxh3_128()
    num_bytes = 0
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(READ_BYTES):
            state.update(data)
            num_bytes += len(data)
    return {"num_bytes": num_bytes, "xxh3_128": state.hexdigest()}


def bytes_digest(data: bytes) -> dict[str, Any]:
    """`num_bytes` and `xxh3_128` of bytes in memory."""
    return {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
