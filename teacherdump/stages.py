"""Two threads round the device's loop: one makes its input ahead, one takes its output away. Both are bounded."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

POLL_S = 0.1  # how late a thread that waits notices that it is to end


class _End:
    """Behind the last item."""


class ReadAhead(Generic[T]):
    """The items of an iterator, made in a thread, at most `depth` ahead of who takes them. A context manager.

    What making them raises is raised where they are taken. Leaving the context ends the thread and drops what is ahead.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End | BaseException] = queue.Queue(depth)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._make, name="read-ahead", daemon=True)

    def _make(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_End())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the items are taken
            self._put(error)

    def _put(self, item: T | _End | BaseException) -> bool:
        while not self._leaving.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    @property
    def num_waiting(self) -> int:
        """Items that are made and not taken yet."""
        return self._queue.qsize()

    def until(self, is_stopped: Callable[[], bool]) -> Iterator[T]:
        """The items in order, up to the last one or until someone stops."""
        while not is_stopped():
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()


class WriteBehind(Generic[T]):
    """Calls a function with each item in a thread, in order, at most `depth` items behind. A context manager.

    What the function raises is raised from the next `put` or `check`, or on leaving; items behind it are dropped.
    Leaving waits for the items that were put, also where an error or an interruption leaves.
    """

    def __init__(self, write: Callable[[T], object], depth: int) -> None:
        self._write = write
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)

    def _run(self) -> None:
        while not isinstance(item := self._queue.get(), _End):
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:  # noqa: BLE001 - it is raised again where the items come from
                    self._error = error

    @property
    def num_waiting(self) -> int:
        """Items that wait behind the one in work."""
        return self._queue.qsize()

    @property
    def failed(self) -> bool:
        """Whether the function raised something."""
        return self._error is not None

    def check(self) -> None:
        """Raise what the function raised, if it did."""
        if self._error is not None:
            raise self._error

    def put(self, item: T) -> None:
        """Hand over an item; waits where `depth` items are waiting already."""
        self.check()
        self._queue.put(item)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(_End())
        self._thread.join()
        if error is None:
            self.check()


@dataclass
class Queues:
    """What waits between the stages of a dump: the dump says where, who watches asks how much.

    Attributes:
        ahead: of the teacher; None where nothing is read.
        behind: of the teacher; None where nothing is written.
    """

    ahead: ReadAhead[Any] | None = None
    behind: WriteBehind[Any] | None = None

    @property
    def num_read_ahead(self) -> int:
        """Batches that wait for the teacher."""
        return 0 if self.ahead is None else self.ahead.num_waiting

    @property
    def num_write_behind(self) -> int:
        """Shards that wait to be written."""
        return 0 if self.behind is None else self.behind.num_waiting
