"""The processes of the harness: the server, its proxy, drivers with their workers, workers started by hand."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
START_S = 60.0
PROGRAM = "from teacherdump.cli import main; main()"
START = "--- start"  # what a log has before each start's output
AT_WORK = re.compile("^(workers|dashboard): http", re.MULTILINE)  # what a driver says once its cluster is there
WORKER = re.compile(r"multiprocessing\.spawn")  # what a worker of a local cluster is started with


class Spoken:
    """A process that is told by lines of JSON, and answers in them; its first line is the port on which it listens."""

    def __init__(self, module: str, *words: object, log: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m", module, *map(str, words)]
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        try:
            self.port = int(self._lines.get(timeout=START_S))
        except queue.Empty:
            self.close()
            raise TimeoutError(f"{module}: expected its port within {START_S:.0f} s, got nothing; see {log}") from None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

    def say(self, value: Mapping[str, Any]) -> None:
        """Tell it something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def heard(self) -> Iterator[Any]:
        """What it has said since it was last asked."""
        while not self._lines.empty():
            yield self._lines.get()

    def close(self) -> list[Any]:
        """End it, and give what it said last."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reading.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        return list(self.heard())


@dataclass(eq=False)
class Driver:
    """`teacherdump run` as a process, started again by the same command after it was killed.

    Attributes:
        name: of its log.
        command: its options.
        env: its environment.
        log: all that it printed, of every start.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    num_starts: int = 0
    num_orphans: int = 0
    _process: "subprocess.Popen[bytes] | None" = None
    _pump: threading.Thread | None = None
    _left: list[psutil.Process] = field(default_factory=list)

    def start(self) -> None:
        """Start it; its output goes into its log through a pipe, so that a limit on files can't touch it."""
        self.num_starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "run", *self.command],
            cwd=ROOT,
            env=dict(self.env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._pump = threading.Thread(target=self._copy, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    def _copy(self, output: Any) -> None:
        with output, self.log.open("ab") as log:
            log.write(f"{START} {self.num_starts}\n".encode())
            for line in output:
                log.write(line)
                log.flush()

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def is_at_work(self) -> bool:
        """Whether it has workers, since it was started last."""
        return AT_WORK.search(self.said().rpartition(START)[2]) is not None

    def processes(self) -> list[psutil.Process]:
        """Itself and all below it, as of now."""
        assert self._process is not None
        try:
            this = psutil.Process(self._process.pid)
            return [this, *this.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """The workers of its local cluster, as of now."""
        return [process for process in self.processes()[1:] if _is_worker(process)]

    def kill(self) -> bool:
        """Kill it with SIGKILL; whether it was alive. Its workers are to end by themselves."""
        assert self._process is not None
        self._left = self.processes()[1:]
        if self._process.poll() is not None:
            return False
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return True

    def wait_for_workers(self, within_s: float) -> None:
        """Wait until the workers of a killed one are gone; those that stay are counted, and killed."""
        _, alive = psutil.wait_procs(self._left, within_s)
        self.num_orphans += len(alive)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._left = []

    def close(self) -> None:
        """End it and all below it, whatever they do."""
        if self._process is None:
            return
        for process in reversed(self.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        if self._pump is not None:
            self._pump.join(5)

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _is_worker(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
        return process.status() != psutil.STATUS_ZOMBIE and WORKER.search(words) is not None
    except psutil.NoSuchProcess:
        return False


class Crew:
    """A scheduler and workers started by hand, each a process of its own that nobody looks after."""

    def __init__(self, num_workers: int, env: Mapping[str, str], folder: Path) -> None:
        self._env, self._folder, self._num_started = dict(env), folder, 0
        self._file = folder / "scheduler.json"
        self._logs: list[Any] = []
        self._scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.workers: list[subprocess.Popen[bytes]] = []
        for _ in range(num_workers):
            self.join()
        deadline = time.monotonic() + START_S
        while not self._file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"dask scheduler: expected {self._file} within {START_S:.0f} s, got none")
            time.sleep(0.05)
        self.address: str = json.loads(self._file.read_text())["address"]

    def _start(self, what: str, *words: str) -> "subprocess.Popen[bytes]":
        self._num_started += 1
        log = (self._folder / f"{what}-{self._num_started}.log").open("ab")
        self._logs.append(log)
        command = [sys.executable, "-m", "distributed.cli.dask_" + what, "--scheduler-file", str(self._file), *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )

    def join(self) -> None:
        """Start one more worker."""
        words = ["--no-nanny", "--nthreads", "2", "--host", "127.0.0.1", "--no-dashboard"]
        words += ["--local-directory", str(self._folder)]
        self.workers.append(self._start("worker", *words))

    def alive(self) -> "list[subprocess.Popen[bytes]]":
        """The workers that run, as of now."""
        return [worker for worker in self.workers if worker.poll() is None]

    def close(self) -> None:
        """End them all."""
        for process in (*self.workers, self._scheduler):
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self._logs:
            log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """The environment in which processes find the S3 server at an endpoint, and the teacher's code."""
    return {
        **os.environ,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "chaos",
        "AWS_SECRET_ACCESS_KEY": "chaos-secret",
        "AWS_REGION": "us-east-1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **more,
    }
