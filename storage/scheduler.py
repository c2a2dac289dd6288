"""Whether a Dask scheduler answers at an address, found before Dask talks to it."""

import socket
import struct
import time
from urllib.parse import urlsplit

from storage.errors import PathError

POLL_S = 0.2
GREETING = struct.Struct("<Q")  # what each side of Dask's TCP begins with: bytes of the message that follows
MOST_GREETING_BYTES = 1 << 20


def check_scheduler(address: str, limit_s: float) -> None:
    """Refuse what is no scheduler before Dask talks to it, which would wait for it without end, or trust its lengths.

    Args:
        address: such as `tcp://host:8786`.
        limit_s: until it must have answered, in seconds.

    Raises:
        PathError: nothing answers there, or something else does; or Dask has no certificates for TLS.
    """
    import dask

    parts = urlsplit(address)
    if parts.scheme == "tls" and dask.config.get("distributed.comm.tls.ca-file", None) is None:
        raise PathError(
            f"scheduler '{address}': expected certificates in Dask's configuration (distributed.comm.tls), got none; "
            "see docs/clusters.md"
        )
    if parts.scheme != "tcp":
        return
    limit = time.monotonic() + limit_s
    while True:
        try:
            if _greets((str(parts.hostname), int(parts.port or 0)), limit):
                return
        except OSError as error:
            if time.monotonic() + POLL_S >= limit:
                raise no_answer(address, limit_s) from error
        else:
            raise no_answer(address, limit_s)
        time.sleep(POLL_S)


def no_answer(cluster: object, limit_s: float) -> PathError:
    """The error of a scheduler that does not answer."""
    return PathError(
        f"scheduler '{cluster}': expected a Dask scheduler that answers, got none in {limit_s:.0f} s; check the "
        "address, or start one: dask scheduler"
    )


def _greets(address: tuple[str, int], limit: float) -> bool:
    """Whether who answers there begins as a scheduler does: with the length of a short message."""
    with socket.create_connection(address, max(POLL_S, limit - time.monotonic())) as connection:
        received = b""
        while len(received) < GREETING.size:
            connection.settimeout(max(POLL_S, limit - time.monotonic()))
            part = connection.recv(GREETING.size - len(received))
            if not part:
                return False
            received += part
    return int(GREETING.unpack(received)[0]) < MOST_GREETING_BYTES
