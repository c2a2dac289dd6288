"""The run log: a line of JSON for each shard, and one at the start and at the end of a run.

It holds figures, settings and digests: no key of a sample, no path of a corpus, nothing that opens anything. A run that
can't write its log says so once, keeps the newest lines in memory, and goes on.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from storage.manifest import Manifest
from teacherdump.config import DumpConfig
from teacherdump.report import ShardReport

SUFFIX = ".log.jsonl"  # behind the path of a local store
NO_LOG = "none"
KEPT_LINES = 1000  # that could not be written yet
OF_MANIFEST = ("num_rows", "num_classes", "encoding", "temperatures", "teacher", "corpus", "preprocess", "compressor")
OF_CONFIG = (
    "device", "precision", "limit_samples", "limit_hours", "limit_bytes", "readers", "alarms", "max_quarantined",
    "wait_for_room",
)  # fmt: skip

Say = Callable[[str], object]


def log_path(config: DumpConfig) -> Path | None:
    """Where a run's log is: as it was asked for, else beside a local store; None for none.

    Example:
        >>> str(log_path(DumpConfig(("teacher.pt",), data="photos", out="x.zarr")))
        'x.zarr.log.jsonl'
    """
    if config.run_log == NO_LOG or (config.run_log is None and "://" in config.out):
        return None
    return Path(config.out.rstrip("/") + SUFFIX if config.run_log is None else config.run_log)


class RunLog:
    """What adds lines to a log. Lines are whole, or not there; those of earlier runs stay.

    The first line waits for the second, so that a run that seals nothing leaves no file behind; where the file is
    there, or was asked for by name, it does not wait.
    """

    def __init__(self, path: Path | None, say: Say, *, waits: bool = False) -> None:
        self._path, self._say = path, say
        self._waits = waits and path is not None and not path.exists()
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._has_failed = False
        self._last = time.perf_counter()

    def start(self, config: DumpConfig, manifest: Manifest, num_shards: int, num_rows: int) -> None:
        """A run begins; so many shards and rows are ahead of it."""
        value = manifest.to_json()
        settings = {name: value[name] for name in OF_MANIFEST}
        settings |= {name: getattr(config, name) for name in OF_CONFIG if getattr(config, name) is not None}
        settings |= {name: manifest.provenance.get(name) for name in ("batch_size", "compile", "versions")}
        self._last = time.perf_counter()
        self._add("start", {"shards_ahead": num_shards, "rows_ahead": num_rows, "settings": settings})

    def shard(self, report: ShardReport) -> None:
        """A shard is sealed; `rows_per_s` counts from the line before."""
        self._waits = False
        now = time.perf_counter()
        rate, self._last = report.num_rows / max(now - self._last, 1e-9), now
        entropy = report.mean_entropy
        self._add(
            "shard",
            {
                "shard": report.seal.shard,
                "start": report.seal.start,
                "stop": report.seal.stop,
                "rows": report.num_rows,
                "refused": report.num_refused,
                "bytes": report.num_bytes,
                "seconds_read": round(report.seconds_read, 4),
                "seconds_teacher": round(report.seconds_teacher, 4),
                "seconds_write": round(report.seconds_write, 4),
                "rows_per_s": round(rate, 3),
                "mean_entropy": None if entropy is None else round(entropy, 6),
                "worker": report.worker,
            },
        )

    def event(self, name: str, **figures: Any) -> None:
        """Something that is no shard, such as a pause."""
        self._add(name, figures)

    def end(self, outcome: str, **figures: Any) -> None:
        """The run ends: `finished`, `limit`, `interrupted` or `error`."""
        self._add("end", {"outcome": outcome, **figures})

    def _add(self, event: str, value: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"event": event, "time": now, **value}, allow_nan=False) + "\n")
        if self._path is None:
            self._lines.clear()
        elif not self._waits:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        try:
            append_whole(path, "".join(self._lines).encode())
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._say(f"note: the run log can't be written: {path}: {error.strerror or error}; going on without")
            return
        self._lines.clear()


def append_whole(path: Path, data: bytes) -> None:
    """Add lines to a file, all of them or none; what a kill left of a line is ended first.

    Raises:
        OSError: they can't be added; the file is as it was.
    """
    with path.open("ab+") as file:
        before = file.seek(0, 2)
        if before:
            file.seek(before - 1)
            if file.read(1) != b"\n":
                data = b"\n" + data
        try:
            file.write(data)
            file.flush()
        except OSError:
            file.truncate(before)
            raise
