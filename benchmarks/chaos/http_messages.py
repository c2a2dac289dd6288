"""Whole HTTP/1.1 messages, as far as a proxy needs them: the head as it came, the body in one piece."""

import asyncio
from dataclasses import dataclass

MOST_HEAD_BYTES = 1 << 16
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
BODILESS = (204, 304)


@dataclass(frozen=True)
class Message:
    """A request or an answer.

    Attributes:
        start: its first line.
        headers: names in lower case; a name that comes twice keeps its last value, which S3's never do.
        body: without the framing of chunks.
    """

    start: str
    headers: dict[str, str]
    body: bytes

    @property
    def method(self) -> str:
        """Of a request: `GET`, `PUT`, ..."""
        return self.start.split(" ", 1)[0]

    @property
    def target(self) -> str:
        """Of a request: path and query."""
        return self.start.split(" ")[1]

    def to_bytes(self, is_bodiless: bool = False) -> bytes:
        """The message with its body in one piece, on a connection that stays open.

        Args:
            is_bodiless: the answer to a HEAD, whose length is that of a body that is not sent.
        """
        headers = {name: value for name, value in self.headers.items() if name not in ("connection", "expect")}
        if not is_bodiless:
            headers.pop("transfer-encoding", None)
            headers["content-length"] = str(len(self.body))
        lines = [self.start, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
    """The next request of a connection; None where the client closed it."""
    head = await _read_head(reader)
    if head is None:
        return None
    start, headers = head
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(CONTINUE)
        await writer.drain()
    return Message(start, headers, await _read_body(reader, headers, until_end=False))


async def read_answer(reader: asyncio.StreamReader, method: str) -> Message:
    """The answer to a request of this method.

    Raises:
        ConnectionError: the server closed the connection first.
    """
    head = await _read_head(reader)
    if head is None:
        raise ConnectionError("expected an answer, got the end of the connection")
    start, headers = head
    if method == "HEAD" or int(start.split(" ")[1]) in BODILESS:
        return Message(start, headers, b"")
    return Message(start, headers, await _read_body(reader, headers, until_end=True))


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise ConnectionError("expected a whole head, got a part of one") from error
    start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return start, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str], until_end: bool) -> bytes:
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return await _read_chunks(reader)
        if "content-length" in headers:
            return await reader.readexactly(int(headers["content-length"]))
        return await reader.read() if until_end else b""
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("expected a whole body, got a part of one") from error


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not size:
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
            return b"".join(parts)
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
