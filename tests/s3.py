"""A real S3 server on loopback: moto in a process of its own, with its environment, for as long as a test asks.

`python -m tests.s3` starts one and prints its port.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"
SECRET = "SecretThatIsNowhere"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "KeyThatIsNowhere",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "LOGITSTORE_RETRY_S": "20",
}
FAULTS = "/_faults"
_unique = itertools.count()


@dataclass
class S3Server:
    """A server that runs.

    Attributes:
        endpoint: its address, `http://127.0.0.1:PORT`.
        process: it, to be stopped and continued by signals.
    """

    endpoint: str
    process: "subprocess.Popen[str]"
    environment: dict[str, str] = field(default_factory=dict)

    def url(self, path: str) -> str:
        """`s3://bucket/UNIQUE/path`: nothing is there yet."""
        return f"s3://{BUCKET}/{os.getpid()}-{next(_unique)}/{path}"

    def http(self, url: str) -> str:
        """The address under which the same object is read over HTTP, by anyone."""
        return url.replace("s3://", self.endpoint + "/", 1)

    def ask(self, **faults: Any) -> dict[str, Any]:
        """Set what the next requests meet: `cut=N`, `fail=N` with `status=S`, `slow_s=X`; gives the counts so far.

        `method`, `contains` and `every=N` choose the requests; `is_new=True` forgets what was asked for before.
        """
        body = json.dumps(faults).encode()
        with urllib.request.urlopen(self.endpoint + FAULTS, body, timeout=20) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    @contextlib.contextmanager
    def stopped(self, seconds: float) -> Iterator[None]:
        """Stop the server in the background, and continue it after that long."""
        self.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(seconds, self.process.send_signal, [signal.SIGCONT])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.process.send_signal(signal.SIGCONT)


def start_server() -> S3Server:
    """Start a server on a free port, with the bucket made."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.s3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdout is not None
    endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
    server = S3Server(endpoint, process, ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint})
    request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT", headers={"x-amz-acl": "public-read"})
    urllib.request.urlopen(request, timeout=20).close()
    return server


def stop_server(server: S3Server) -> None:
    """End a server."""
    server.process.send_signal(signal.SIGCONT)
    server.process.kill()
    with server.process:
        pass


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for all tests of a process."""
    server = start_server()
    yield server
    stop_server(server)


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[S3Server]:
    """The server, with the environment that leads to it."""
    with pytest.MonkeyPatch.context() as environment:  # its own: a test may undo the one that it asks for
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
            environment.delenv(name)
        for name, value in s3_server.environment.items():
            environment.setenv(name, value)
        yield s3_server
        s3_server.ask(is_new=True)  # else the choice of one test is that of the next


class Faults:
    """Wraps the server: requests that ask for a condition go one at a time, and some meet what was asked for."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._lock, self._conditions = app, threading.Lock(), threading.Lock()
        self._plan: dict[str, Any] = {}
        self._counts = {"requests": 0, "chosen": 0, "cut": 0, "failed": 0, "bytes": 0}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == FAULTS:
            return self._configure(environ, start_response)
        fault = self._next(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault == "fail":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status = int(self._plan.get("status", 503))
            body = b"<Error><Code>SlowDown</Code></Error>"
            start_response(f"{status} Asked For", [("Content-Length", str(len(body)))])
            return [body]
        if fault == "slow":
            time.sleep(float(self._plan["slow_s"]))
        if "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ:
            with self._conditions:  # moto looks and writes in two steps
                return self._app(environ, start_response)
        answer = self._app(environ, start_response)
        return _cut(answer) if fault == "cut" else self._counted(answer, environ["REQUEST_METHOD"])

    def _counted(self, body: Iterable[bytes], method: str) -> Iterator[bytes]:
        for data in body:
            if method == "GET":
                with self._lock:
                    self._counts["bytes"] += len(data)
            yield data

    def _configure(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            asked = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            self._plan = asked if asked.pop("is_new", False) else self._plan | asked
            body = json.dumps(self._counts).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def _next(self, method: str, path: str) -> str | None:
        """What this request meets."""
        with self._lock:
            plan = self._plan
            self._counts["requests"] += 1
            if plan.get("method", method) != method or plan.get("contains", "") not in path:
                return None
            self._counts["chosen"] += 1
            if self._counts["chosen"] % plan.get("every", 1):
                return None
            if plan.get("fail", 0) > 0:
                plan["fail"] -= 1
                self._counts["failed"] += 1
                return "fail"
            if method == "GET" and plan.get("cut", 0) > 0:
                plan["cut"] -= 1
                self._counts["cut"] += 1
                return "cut"
            return "slow" if plan.get("slow_s", 0) else None


def _cut(body: Iterable[bytes]) -> Iterator[bytes]:
    """Half of a body, then the connection breaks."""
    data = b"".join(body)
    yield data[: len(data) // 2]
    raise ConnectionAbortedError("cut off, as asked for")


def serve() -> None:
    """Serve until the one that started this process is gone."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement

        def log(self, *_: object) -> None:
            pass

    server = make_server(
        "127.0.0.1", 0, Faults(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=Handler
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()  # ends with the parent
    os._exit(0)


if __name__ == "__main__":
    serve()
