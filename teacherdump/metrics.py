"""Figures of a run for Prometheus, over HTTP: only where a port is asked for, and prometheus-client is installed."""

import importlib
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from storage.errors import PathError
from teacherdump.report import ShardReport
from teacherdump.stages import Queues

LOCAL = "127.0.0.1"
RECENT_SHARDS = 8  # that the busy share is taken over: minutes, as shards go
PREFIX = "logitstore_dump"


class Metrics:
    """What serves the figures of a run for as long as it lasts. A context manager.

    The device's busy share is the teacher's time over the wall time of the last shards: on CUDA the time that events on
    the device measured, elsewhere the wall time of the stage. With several workers it is their mean.

    Args:
        port: 0 takes a free one.
        host: address of this machine that it listens at.
        rows_ahead: rows that the run has before it.
        queues: what waits between the stages of this process.
        num_in_flight: shards that were begun and are not sealed yet.

    Raises:
        PathError: prometheus-client is not installed, or the port can't be had.
    """

    def __init__(self, port: int, host: str, rows_ahead: int, queues: Queues, num_in_flight: Callable[[], int]) -> None:
        try:
            client: Any = importlib.import_module("prometheus_client")
        except ImportError:
            raise PathError(
                "metrics: expected prometheus-client, got none; install it: pip install 'logitstore[metrics]'"
            ) from None
        self._recent: deque[tuple[float, float, str]] = deque(maxlen=RECENT_SHARDS)
        self._start = time.perf_counter()
        self._rows_ahead, self._num_rows = rows_ahead, 0
        registry = client.CollectorRegistry()
        self._rows = client.Counter(f"{PREFIX}_rows", "Rows sealed by this run.", registry=registry)
        self._refused = client.Counter(f"{PREFIX}_refused_rows", "Of these, rows without targets.", registry=registry)
        self._bytes = client.Counter(f"{PREFIX}_bytes", "Bytes of the sealed shards.", registry=registry)
        self._shards = client.Counter(f"{PREFIX}_shards", "Shards sealed by this run.", registry=registry)
        self._seconds = client.Counter(
            f"{PREFIX}_stage_seconds", "Time of each stage; stages run at once.", ["stage"], registry=registry
        )
        for stage in ("read", "teacher", "write"):
            self._seconds.labels(stage=stage)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "rows_left": ("Rows that this run has before it.", lambda: self._rows_ahead - self._num_rows),
            "read_ahead_batches": ("Batches that are read and wait for the teacher.", lambda: queues.num_read_ahead),
            "write_behind_shards": ("Shards that wait to be written.", lambda: queues.num_write_behind),
            "shards_in_flight": ("Shards that were begun and are not sealed yet.", num_in_flight),
            "device_busy_share": ("The teacher's time over wall time, in the last shards.", self.busy_share),
        }
        for name, (text, read) in gauges.items():
            client.Gauge(f"{PREFIX}_{name}", text, registry=registry).set_function(read)
        try:
            self._server, self._thread = _serve(client, port, host, registry)
        except (OSError, OverflowError) as error:
            raise PathError(
                f"metrics: expected a port that is free, got {host}:{port}: {error}; give another --metrics-port, "
                "or 0 for any"
            ) from error

    @property
    def address(self) -> str:
        """Where the figures are."""
        host, port = self._server.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def add(self, report: ShardReport) -> None:
        """Count a shard that is sealed."""
        self._num_rows += report.num_rows
        self._rows.inc(report.num_rows)
        self._refused.inc(report.num_refused)
        self._bytes.inc(report.num_bytes)
        self._shards.inc()
        for stage in ("read", "teacher", "write"):
            self._seconds.labels(stage=stage).inc(getattr(report, f"seconds_{stage}"))
        if len(self._recent) == RECENT_SHARDS:
            self._start = self._recent[0][0]
        self._recent.append((time.perf_counter(), report.seconds_teacher, report.worker))

    def busy_share(self) -> float:
        """Share of the time, 0 to 1, that the device was at work for the last shards; 0 before the first."""
        recent = list(self._recent)
        if not recent:
            return 0.0
        wall_s = max(recent[-1][0] - self._start, 1e-9) * len({worker for _, _, worker in recent})
        return min(1.0, sum(seconds for _, seconds, _ in recent) / wall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _serve(client: Any, port: int, host: str, registry: Any) -> tuple[Any, threading.Thread]:
    server, thread = client.start_http_server(port, host, registry)
    return server, thread
