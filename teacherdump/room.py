"""A full disk: the run waits for room, says so, and goes on by itself."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from storage.console import format_bytes, format_duration
from storage.errors import OutOfSpaceError

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
LOOK_EVERY_S = 0.1  # how late a run that waits notices that it is to stop
ENOUGH_MORE = 1 << 20  # bytes by which the room must have grown, where less is free than what is to be written

Say = Callable[[str], object]


class Room:
    """How a run waits for room, and since when it does.

    Args:
        path: of the store, or its URL.
        hours: that it waits at most from the first refusal on; 0 does not wait at all.
        say: told once when the wait begins, and once when it ends.
        sleep: lets so many seconds pass.
    """

    def __init__(
        self,
        path: str,
        hours: float,
        say: Say,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._path, self._hours, self._say, self._sleep = path, hours, say, sleep
        self._waited_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._free: int | None = None
        self.is_waiting = False

    def keep_trying(self, write: Callable[[], T], num_bytes: int, is_stopped: Callable[[], bool]) -> T:
        """What a write gives, once there is room for it.

        Args:
            write: may be called again after it failed.
            num_bytes: that it takes at most.
            is_stopped: asked all the while.

        Raises:
            OutOfSpaceError: there is still no room, and the time is over or someone stopped.
        """
        while True:
            try:
                result = write()
            except OutOfSpaceError as error:
                self.wait(error, num_bytes, is_stopped)
            else:
                self.found()
                return result

    def wait(self, error: OutOfSpaceError, num_bytes: int, is_stopped: Callable[[], bool]) -> None:
        """Let time pass until a write that failed may be tried again.

        Raises:
            OutOfSpaceError: the same, where the time is over or someone stopped.
        """
        if not self.is_waiting:
            if not self._hours:
                raise error
            self.is_waiting, self._waited_s, self._pause_s = True, 0.0, FIRST_PAUSE_S
            free = free_bytes(self._path)
            there = "" if free is None else f", {format_bytes(free)} are free"
            self._say(
                f"waiting: {self._path} is full: what is written next takes up to {format_bytes(num_bytes)}{there}; "
                f"free space, and the run goes on by itself; it waits {format_duration(self._hours * 3600)}"
            )
        self._free = free_bytes(self._path)
        while True:
            self._pass(error, is_stopped)
            free = free_bytes(self._path)
            # A quota, or another machine's disk, can't be asked: then only a further attempt tells.
            if free is None or free >= num_bytes or free >= (self._free or 0) + ENOUGH_MORE:
                return

    def found(self) -> None:
        """A write has found room."""
        if self.is_waiting:
            self.is_waiting = False
            self._say(f"going on: there is room again, after {format_duration(self._waited_s)}")

    def _pass(self, error: OutOfSpaceError, is_stopped: Callable[[], bool]) -> None:
        """One pause, the next one twice as long."""
        end = min(self._pause_s, max(0.0, self._hours * 3600 - self._waited_s))
        if not end:
            raise error
        passed = 0.0
        while passed < end:
            if is_stopped():
                raise error
            step = min(LOOK_EVERY_S, end - passed)
            self._sleep(step)
            passed += step
        self._waited_s += passed
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def free_bytes(path: str) -> int | None:
    """Bytes that are free where a local path is, or would be; None where that can't be asked."""
    if "://" in path:
        return None
    folder = Path(path).absolute()
    with contextlib.suppress(OSError):
        while not folder.is_dir():
            folder = folder.parent
        return shutil.disk_usage(folder).free
    return None
