"""A disk that can be filled and emptied: a small tmpfs where one may be mounted, else a limit on the size of files."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.chaos.processes import Driver

TMPFS_BYTES = 64 << 20
BALLAST = "ballast"


class SmallDisk:
    """A tmpfs of its own; a file of zeros fills it, so that writing fails with ENOSPC."""

    kind = "tmpfs, ENOSPC"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, driver: Driver) -> None:
        """Leave no room at all."""
        del driver
        with (self.folder / BALLAST).open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self, driver: Driver) -> None:
        """Give the room back."""
        del driver
        (self.folder / BALLAST).unlink(missing_ok=True)


class LimitedFiles:
    """An ordinary folder; a limit that the kernel holds the driver and its workers to makes writing fail with EFBIG."""

    kind = "RLIMIT_FSIZE, EFBIG"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, driver: Driver) -> None:
        """Let no file grow beyond one byte."""
        _limit_files(driver.processes(), 1)

    def free(self, driver: Driver) -> None:
        """Let files grow again."""
        _limit_files(driver.processes(), resource.RLIM_INFINITY)


def _limit_files(processes: list[psutil.Process], num_bytes: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, PermissionError):
            hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
            process.rlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


@contextlib.contextmanager
def make_disk(folder: Path, may_mount: bool = True) -> Iterator[SmallDisk | LimitedFiles]:
    """A folder that can be filled."""
    folder.mkdir(parents=True)
    if not may_mount or not _mounts(folder):
        yield LimitedFiles(folder)
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mounts(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
