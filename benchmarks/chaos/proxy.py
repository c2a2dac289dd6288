"""A proxy before an S3 server that breaks requests on demand: `python -m benchmarks.chaos.proxy PORT PID`.

It listens on a free port of 127.0.0.1, says which in its first line, and hands requests on to PORT. Each line on
standard input arms a fault, such as `{"id": 7, "kind": "error", "requests": 2}`; when the fault is over, a line says
how many requests it really broke: `{"id": 7, "kind": "error", "hits": 2}`. A fault begins with the first request that
it fits, so that one which falls into a quiet moment waits for a victim, `patience_s` at most, or until
`{"kind": "calm"}` ends all such waiting. At the end of standard input the proxy ends.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.http_messages import MOST_HEAD_BYTES, Message, read_answer, read_request

PATIENCE_S = 30.0
CALM = {"kind": "calm"}
DRIP_PIECES = 8  # of a slow answer, so that it is slow in its middle too
ERRORS = {
    500: ("Internal Server Error", "InternalError"),
    503: ("Service Unavailable", "SlowDown"),
    507: ("Insufficient Storage", "InsufficientStorage"),
}

# Kinds that break a number of requests, and those that last for some seconds.
COUNTED = ("error", "late-error", "cut-answer", "cut-request", "lost-answer")
LASTING = ("slow", "full", "refuse", "stop")


class Cut(Exception):  # noqa: N818 - no error: how a connection is broken on purpose
    """The connection is to be broken, after some bytes."""

    def __init__(self, sent: bytes = b"") -> None:
        super().__init__()
        self.sent = sent


@dataclass(eq=False)
class Fault:
    """Something that goes wrong.

    Attributes:
        number: by which it is reported.
        kind: of `COUNTED` or `LASTING`.
        requests: how many a counted one breaks.
        seconds: how long a lasting one lasts; of a slow one also what a request takes longer, at most.
        status: of an error.
        spare: requests that pass after its first hit before another fault begins, so that work that goes a request at
            a time is not stopped for good.
        hits: requests that it broke.
    """

    number: int
    kind: str
    requests: int = 1
    seconds: float = 0.0
    status: int = 500
    spare: int = 0
    hits: int = 0
    ends_at: float | None = None

    def fits(self, request: Message) -> bool:
        """Whether a request is one that it breaks."""
        if self.kind == "cut-answer":
            return request.method == "GET"
        if self.kind in ("cut-request", "full"):
            return request.method == "PUT" and len(request.body) > 1
        if self.kind in ("lost-answer", "late-error"):
            return request.method in ("PUT", "DELETE")
        return True


@dataclass(eq=False)
class Proxy:
    """The proxy's state; everything happens on one event loop.

    Attributes:
        upstream: port of the server.
        server_pid: of the server, which `stop` stops.
        report: told of each fault that is over.
        faults: that are armed or under way.
        num_requests: all that came.
    """

    upstream: int
    server_pid: int
    report: Callable[[Fault], object]
    faults: list[Fault] = field(default_factory=list)
    num_requests: int = 0
    port: int = 0
    is_open: bool = True
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _num_waiting: int = 0
    _num_spared: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> None:
        """Listen, on the port that it had before if it had one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=MOST_HEAD_BYTES)
        self.port = listener.getsockname()[1]

    def arm(self, fault: Fault, patience_s: float = PATIENCE_S) -> None:
        """Have the next request that fits be broken; give up where none comes in time."""
        self.faults.append(fault)
        self._later(self._give_up(fault, patience_s))

    async def _give_up(self, fault: Fault, patience_s: float) -> None:
        await asyncio.sleep(patience_s)
        if fault in self.faults and fault.ends_at is None:
            self._over(fault)

    def calm(self) -> None:
        """Give up the faults that wait for a victim; those that last come to their end."""
        for fault in [fault for fault in self.faults if fault.ends_at is None]:
            self._over(fault)

    def close(self) -> None:
        """Give up all faults that are not over."""
        for fault in list(self.faults):
            self._over(fault)

    def _over(self, fault: Fault) -> None:
        if fault in self.faults:
            self.faults.remove(fault)
            self.report(fault)

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (request := await read_request(reader, writer)) is not None:
                self.num_requests += 1
                self._num_waiting += 1
                try:
                    await self._answer(request, writer)
                finally:
                    self._num_waiting -= 1
        except Cut as cut:
            with contextlib.suppress(ConnectionError):
                writer.write(cut.sent)
                await writer.drain()
                await asyncio.sleep(0.01 if cut.sent else 0)  # let the bytes out before the reset discards them
            _reset(writer)
        except (ConnectionError, asyncio.CancelledError):  # the client is gone, or the server is
            _reset(writer)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, request: Message, writer: asyncio.StreamWriter) -> None:
        fault = next((fault for fault in self.faults if self._takes(fault, request)), None)
        if fault is None:
            self._num_spared = max(0, self._num_spared - 1)
            writer.write(await self._asked(request))
            await writer.drain()
            return
        if not fault.hits:
            self._num_spared = fault.spare
        fault.hits += 1
        if fault.kind in COUNTED and fault.hits >= fault.requests:
            self._over(fault)
        await self._broken(fault, request, writer)

    def _takes(self, fault: Fault, request: Message) -> bool:
        """Whether a request is broken; a lasting fault begins with its first one."""
        if not fault.fits(request) or (not fault.hits and self._num_spared):
            return False
        if fault.kind in LASTING and fault.ends_at is None:
            fault.ends_at = asyncio.get_running_loop().time() + fault.seconds
            if fault.kind == "stop":  # before the request reaches it
                os.kill(self.server_pid, signal.SIGSTOP)
            self._later(self._last(fault))
        return True

    async def _last(self, fault: Fault) -> None:
        """See a lasting fault through."""
        if fault.kind == "refuse":
            await self._refuse(fault)
        elif fault.kind == "stop":
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                os.kill(self.server_pid, signal.SIGCONT)
        else:
            await asyncio.sleep(fault.seconds)
        self._over(fault)

    async def _refuse(self, fault: Fault) -> None:
        """Break every connection, and refuse new ones."""
        assert self._server is not None
        self._server.close()
        fault.hits = max(fault.hits, self._num_waiting)
        for writer in list(self._writers):
            _reset(writer)
        await asyncio.sleep(fault.seconds)
        await self.open()

    async def _broken(self, fault: Fault, request: Message, writer: asyncio.StreamWriter) -> None:
        kind = fault.kind
        if kind == "error" or kind == "full":
            writer.write(_error(507 if kind == "full" else fault.status, request))
        elif kind == "late-error":
            await self._asked(request)
            writer.write(_error(fault.status, request))
        elif kind == "cut-answer":
            answer = await self._asked(request)
            raise Cut(answer[: answer.find(b"\r\n\r\n") + 4 + _half_of_body(answer)])
        elif kind == "cut-request":
            await self._ask_half(request)
            raise Cut
        elif kind == "lost-answer":
            await self._asked(request)
            raise Cut
        elif kind == "slow":
            await self._drip(fault.seconds, request, writer)
        elif kind == "refuse":  # the reset has come, or comes at once
            raise Cut
        else:  # the server is stopped: it answers when it goes on
            writer.write(await self._asked(request))
        await writer.drain()

    async def _drip(self, seconds: float, request: Message, writer: asyncio.StreamWriter) -> None:
        """Answer in pieces, so that the whole takes a part of the time that the fault lasts."""
        answer = await self._asked(request)
        size = max(1, -(-len(answer) // DRIP_PIECES))
        for start in range(0, len(answer), size):
            await asyncio.sleep(min(seconds / 4, 1.0) / DRIP_PIECES)
            writer.write(answer[start : start + size])
            await writer.drain()

    async def _asked(self, request: Message) -> bytes:
        """The server's answer, as it goes to the client."""
        reader, upstream = await asyncio.open_connection("127.0.0.1", self.upstream, limit=MOST_HEAD_BYTES)
        try:
            upstream.write(request.to_bytes())
            await upstream.drain()
            answer = await read_answer(reader, request.method)
        finally:
            upstream.close()
        return answer.to_bytes(is_bodiless=request.method == "HEAD")

    async def _ask_half(self, request: Message) -> None:
        """Send the server half of a body, and nothing more."""
        whole = request.to_bytes()
        _, upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
        upstream.write(whole[: len(whole) - len(request.body) // 2 - 1])
        await upstream.drain()
        upstream.close()


def _half_of_body(answer: bytes) -> int:
    return (len(answer) - answer.find(b"\r\n\r\n") - 4) // 2


def _error(status: int, request: Message) -> bytes:
    phrase, code = ERRORS[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    message = Message(f"HTTP/1.1 {status} {phrase}", {"content-type": "application/xml"}, body)
    data = message.to_bytes()
    return data[: -len(body)] if request.method == "HEAD" else data


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection as a cable or a crash does: a reset, not an orderly end."""
    with contextlib.suppress(OSError, AttributeError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport = writer.transport
    if not transport.is_closing():
        transport.abort()


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)


async def run(upstream: int, server_pid: int) -> None:
    """Be the proxy until standard input ends."""
    loop = asyncio.get_running_loop()
    proxy = Proxy(
        upstream, server_pid, lambda fault: _say({"id": fault.number, "kind": fault.kind, "hits": fault.hits})
    )
    await proxy.open()
    _say(proxy.port)
    ended = asyncio.Event()

    def listen() -> None:
        for line in sys.stdin:
            value = json.loads(line)
            if value == CALM:
                loop.call_soon_threadsafe(proxy.calm)
                continue
            patience_s = value.pop("patience_s", PATIENCE_S)
            loop.call_soon_threadsafe(proxy.arm, Fault(value.pop("id"), **value), patience_s)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, daemon=True).start()
    await ended.wait()
    proxy.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(server_pid, signal.SIGCONT)
    _say({"requests": proxy.num_requests})


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))
