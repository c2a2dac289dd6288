"""Ctrl-C and SIGTERM, taken up between two steps, so that what is whole can be kept first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run stopped because it was asked to, what was whole kept.

    Attributes:
        signal: number of the signal that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal


class StopRequest:
    """Whether someone asked the run to stop.

    Attributes:
        signal: number of the signal, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0


class _Note:
    """A handler that notes a signal, in its own request and in those around it, and gives way to what was before."""

    def __init__(self, request: StopRequest, before: dict[signal.Signals, Any]) -> None:
        self._request, self._before = request, before

    @property
    def noted(self) -> int:
        """The signal that was noted, or 0."""
        return self._request.signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        handler: Any = self
        while isinstance(handler, _Note):
            handler._request.signal = handler._request.signal or number  # noqa: SLF001 - one of its own kind
            handler = handler._before[signal.Signals(number)]  # noqa: SLF001
        signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first SIGINT and the first SIGTERM instead of dying of them; a second one of its kind acts as ever.

    (`torchrun` hands Ctrl-C on as a SIGTERM of its own, so one of each may come.) One inside another knows what was
    noted before it, and passes on what it notes. Outside the main thread, where Python takes no signals, nothing is
    ever requested.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    noted = [handler.noted for handler in before.values() if isinstance(handler, _Note)]
    request.signal = next(filter(None, noted), 0)
    note = _Note(request, before)
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
