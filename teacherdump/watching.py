"""Who watches a run: its log, its figures for Prometheus, and the share of rows that it may refuse."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from storage.console import format_count
from storage.errors import AlarmError
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from teacherdump.config import DumpConfig
from teacherdump.metrics import LOCAL, Metrics
from teacherdump.report import ShardReport
from teacherdump.run_log import RunLog, log_path
from teacherdump.stages import Queues

if TYPE_CHECKING:
    from teacherdump.shard import EncodedShard

LEAST_ROWS = 100  # of a run before it is judged by its share of refused rows
SHOWN_REASONS = 3

Say = Callable[[str], object]


class RefusalLimit:
    """How many of the rows of a run may be refused; shards are counted once, in whatever order they come.

    Args:
        share: of the rows, 0 to 1; None for any.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._shards: set[int] = set()
        self._num_rows = self._num_refused = 0
        self._first: list[QuarantineEntry] = []

    def take(self, shard: int, num_rows: int, quarantine: Sequence[QuarantineEntry]) -> None:
        """Count a shard.

        Raises:
            AlarmError: too many rows are refused.
        """
        if self._share is None or shard in self._shards:
            return
        self._shards.add(shard)
        self._num_rows += num_rows
        self._num_refused += len(quarantine)
        self._first += quarantine[: SHOWN_REASONS - len(self._first)]
        if self._num_rows >= LEAST_ROWS and self._num_refused > self._share * self._num_rows:
            reasons = "; ".join(f"row {entry.row} ({entry.key!r}): {entry.reason}" for entry in self._first)
            raise AlarmError(
                f"--max-quarantined {self._share:g}: expected at most {self._share:.2%} of the rows refused, got "
                f"{format_count(self._num_refused)} of {format_count(self._num_rows)}, the first of them {reasons}; "
                "mend what they have in common and run the same command again, or allow more; refused rows that are "
                "sealed already are tried again by --retry-quarantined, once the store is finished"
            )


class Watch:
    """What is told of each shard.

    Attributes:
        limit: of refused rows.
        log: of the run.
        queues: what waits between the stages of this process.
        num_begun: shards that the readers have come to.
        num_sealed: shards that are sealed.
        num_rows: rows in them.
        num_refused: of these, rows without targets.
    """

    def __init__(self, limit: RefusalLimit, log: RunLog) -> None:
        self.limit, self.log, self.queues = limit, log, Queues()
        self.num_begun = self.num_sealed = self.num_rows = self.num_refused = 0
        self._start = time.perf_counter()
        self.metrics: Metrics | None = None

    def before_write(self, shard: "EncodedShard") -> None:
        """A shard is about to be written.

        Raises:
            AlarmError: with it too many rows are refused.
        """
        self.limit.take(shard.shard, len(shard.arrays["status"]), shard.quarantine)

    def add(self, report: ShardReport) -> None:
        """A shard is sealed.

        Raises:
            AlarmError: too many rows are refused.
        """
        self.num_sealed += 1
        self.num_rows += report.num_rows
        self.num_refused += report.num_refused
        self.log.shard(report)
        if self.metrics is not None:
            self.metrics.add(report)
        self.limit.take(report.seal.shard, report.num_rows, report.seal.quarantine)

    def telling(self, say: Say) -> Say:
        """What tells a person about the room on the disk, and puts into the log that the run waits, or goes on."""

        def tell(text: str) -> None:
            say(text)
            self.log.event(text.partition(":")[0])

        return tell

    def end(self, outcome: str, **figures: Any) -> None:
        """The run ends; what the figures say beside its rows, where it is not None."""
        seconds = time.perf_counter() - self._start
        self.log.end(
            outcome,
            rows=self.num_rows,
            refused=self.num_refused,
            shards=self.num_sealed,
            seconds=round(seconds, 3),
            rows_per_s=round(self.num_rows / max(seconds, 1e-9), 3),
            **{name: value for name, value in figures.items() if value is not None},
        )


@contextlib.contextmanager
def watching(config: DumpConfig, manifest: Manifest, num_shards: int, num_rows: int, say: Say) -> Iterator[Watch]:
    """Watch a run that has so many shards and rows before it.

    Raises:
        PathError: the figures can't be served.
    """
    log = RunLog(log_path(config), say, waits=config.run_log is None)
    watch = Watch(RefusalLimit(config.max_quarantined), log)
    with contextlib.ExitStack() as stack:
        if config.metrics_port is not None:
            host = config.metrics_host or LOCAL
            watch.metrics = stack.enter_context(
                Metrics(config.metrics_port, host, num_rows, watch.queues, lambda: watch.num_begun - watch.num_sealed)
            )
            say(f"metrics: {watch.metrics.address}")
        log.start(config, manifest, num_shards, num_rows)
        yield watch
