"""Requests to object storage, tried again until they are answered, and what can't be answered as one clear line."""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import OutOfSpaceError, RemoteError, StoreError
from storage.remote_environment import named_variables

RETRY_VARIABLE = "LOGITSTORE_RETRY_S"
DEFAULT_RETRY_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
QUIET_S = 5.0  # of trying again before a person is told
CREDENTIALS_S = 10.0  # that a service which hands out credentials is asked for, where there may be none
BUSY_STATUS = (408, 425, 429)
NO_SUCH_RANGE = "416 "
REFUSED_STATUS = ("401 ", "403 ")
METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")
FULL_STATUS = "507"
FULL_CODES = ("XMinioStorageFull", "StorageFull", "QuotaExceeded", "InsufficientCapacity")

Answer = TypeVar("Answer")
_log = logging.getLogger("logitstore.remote")
_jitter = random.SystemRandom()  # nobody's seed is touched


class LostObjectError(RemoteError):
    """An object that should be there is not, or is shorter than it should be: take another copy."""


def retry_s() -> float:
    """Seconds that a request is tried again for: of the environment, else 120.

    Raises:
        RemoteError: the environment names no number of seconds.
    """
    given = os.environ.get(RETRY_VARIABLE)
    try:
        seconds = DEFAULT_RETRY_S if given is None else float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RemoteError(f"{RETRY_VARIABLE}: expected a number of seconds, at least 0, got {given!r}; set another")
    return seconds


def retried(where: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gives, asked again after every failure that may pass.

    `FileNotFoundError` and an object that is there already or is another than was expected come through as they are:
    they are answers.

    Args:
        where: the URL, for messages.
        ask: one request, or some that can be made again.

    Raises:
        RemoteError: it was refused, or not answered in time.
        OutOfSpaceError: the storage is full.
    """
    begin, pause, said = time.monotonic(), FIRST_PAUSE_S, False
    patience = retry_s()
    while True:
        try:
            return ask()
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            if is_answer(error):
                raise
            waited = time.monotonic() - begin
            failure = _judged(error, where, waited, patience - pause)
        if isinstance(failure, StoreError):
            raise failure  # out here, so that it does not carry what the server said, which may repeat credentials
        if waited > QUIET_S and not said:
            _log.warning("%s: %s; trying again for up to %.0f s", where, failure, patience - waited)
            said = True
        time.sleep(pause * (0.5 + _jitter.random()))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _judged(error: Exception, where: str, waited: float, patience: float) -> StoreError | str:
    """What ends the trying, or why it goes on."""
    reason, may_pass = _reason(error)
    if may_pass is None:
        return OutOfSpaceError(
            f"{where}: expected room in the storage, got {reason}; free space and run the same command again"
        )
    if reason.startswith(NO_SUCH_RANGE):
        return LostObjectError(
            f"{where}: expected all bytes that were asked for, got fewer; the object is shorter than it should be: "
            "take another copy"
        )
    limit = min(patience, CREDENTIALS_S) if "credentials" in reason else patience
    if may_pass and waited <= limit:
        return reason
    tried = f" for {waited:.0f} s" if may_pass else ""
    return RemoteError(f"{where}: expected an answer, got {reason}{tried}; {_advice(error, reason, where)}")


def is_answer(error: Exception) -> bool:
    """Whether an error says how it stands with an object, not that something failed."""
    return type(error).__name__ in ("AlreadyExistsError", "PreconditionError", "NotModifiedError")


def _reason(error: Exception) -> tuple[str, bool | None]:
    """What went wrong in a few words that hold no secret; whether it may pass, None where there is no room."""
    kind, text = type(error).__name__, str(error)
    status = re.search(r"status code: (\d{3}) ([A-Za-z ]+)", text)
    code = re.search(r"<Code>([A-Za-z]{1,60})</Code>", text)
    said = f"{status[1]} {status[2].strip()}" if status else ""
    said += f" ({code[1]})" if code and status else ""
    if any(service in text for service in METADATA_SERVICES):
        return "no credentials", True
    if status and (status[1] == FULL_STATUS or (code and code[1] in FULL_CODES)):
        return said, None
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return said or "no permission", False
    if kind == "NotSupportedError":
        is_range = "range" in text.lower()
        return "a server that knows no ranges of bytes" if is_range else "a storage that can't do this", False
    if kind != "GenericError" and not isinstance(error, (OSError, TimeoutError)):
        return f"{kind}: {_first_line(text)}", False
    if status:
        return said, int(status[1]) >= 500 or int(status[1]) in BUSY_STATUS
    if "BareRedirect" in text:
        return "a redirect to another region", False
    if found := re.search(r"kind: (Connect|Timeout|Interrupted|Request|Decode)\b", text):
        words = {"Connect": "no connection", "Timeout": "a timeout", "Interrupted": "a connection that was cut off"}
        return words.get(found[1], "a request that failed"), found[1] != "Decode" or "Body" in text
    if "Missing" in text or "credential" in text.lower():
        return "no credentials", True
    return _first_line(text), True


def _first_line(text: str) -> str:
    """The first line of a message, without queries and users of addresses, at most 200 characters."""
    line = text.split("\n", 1)[0]
    line = re.sub(r"\?[^\s\"')]+", "?...", line)
    return re.sub(r"://[^/\s@]+@", "://...@", line)[:200]


def _advice(error: Exception, reason: str, where: str) -> str:
    if reason == "no credentials":
        return f"set the environment variables of the storage, such as {named_variables(where)}"
    is_refused = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    if is_refused or reason.startswith(REFUSED_STATUS):  # a listing that is refused has the class of any failure
        return "check the URL and the credentials in the environment"
    if "NoSuchBucket" in reason:
        return "make the bucket, or check the URL"
    if "region" in reason:
        return "set AWS_REGION to the bucket's"
    if "ranges" in reason:
        return "use a server that answers range requests, or copy it here first"
    return f"check the URL and the network, and run the same command again ({RETRY_VARIABLE} says how long to try)"
