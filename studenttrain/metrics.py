"""What a run measured, step by step: JSON lines, and TensorBoard beside them.

`metrics.jsonl` holds one object a line, in the order of the steps: `{"kind": "train", "step": 1, ...}` for every
optimizer step and `{"kind": "validation", "step": ...}` for every validation. A run that goes on from a checkpoint cuts
the file at the checkpoint's step first, so that each step stands in it once.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard.summary import scalar

from storage.backends.files import clear_os_errors
from storage.errors import StudentError
from studenttrain.checkpoint import write_durably
from studenttrain.checks import Objective
from studenttrain.distributed import World

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FLUSH_S = 1.0
FLUSH_STEPS = 50  # steps whose losses stay on the device, so that it need not wait for the host at each

Kind = Literal["train", "validation"]
Figures = Mapping[str, float | int | None]


class MetricsLog:
    """The metrics of a run, open for appending. A context manager.

    Args:
        folder: the run's folder.
        step: steps already done: what was written of later ones is cut off.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        self.validated: set[int] = set()

        def keep(file: BinaryIO) -> None:
            for line in read_metrics(self.path):
                if line["step"] <= step:
                    file.write(_line(line).encode())
                    if line["kind"] == "validation":
                        self.validated.add(line["step"])

        with clear_os_errors(self.path):
            write_durably(self.path, keep)
            self._file = self.path.open("a", encoding="utf-8")
            self._curves = Curves(folder / TENSORBOARD, purge_step=step + 1 if step else None)

    def write(self, kind: Kind, step: int, figures: Figures) -> None:
        """Append one line: numbers, or None for what was not measured."""
        with clear_os_errors(self.path):
            self._file.write(_line({"kind": kind, "step": step, **figures}))
        if kind == "validation":
            self.validated.add(step)

    def plot(self, kind: Kind, step: int, figures: Figures) -> None:
        """Draw the figures that are there at a step of TensorBoard's curves."""
        for name, value in figures.items():
            if value is not None:
                self._curves.add(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Make every line durable, as a checkpoint of this step is about to say that they are there."""
        with clear_os_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._curves.flush()

    def close(self) -> None:
        """Give files back."""
        try:
            with clear_os_errors(self.path):
                self._file.close()
        finally:
            self._curves.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Curves:
    """Curves for TensorBoard, written at once.

    torch's own writer has a thread, which prints a traceback where the disk is full.

    Args:
        folder: of TensorBoard's files; this one is added to them.
        purge_step: TensorBoard forgets what other files say from this step on; None forgets nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        with clear_os_errors(self.path):
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._write(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def _write(self, event: Event) -> None:
        with clear_os_errors(self.path):
            self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Hand all points to the operating system."""
        with clear_os_errors(self.path):
            self._file.flush()

    def close(self) -> None:
        """Give the file back."""
        with clear_os_errors(self.path):
            self._file.close()


class StepLog:
    """Losses of the last steps, kept on the device until there are enough of them to fetch.

    Args:
        metrics: where they go; None on the ranks that write nothing.
        world: the ranks whose losses are added up; each calls `flush` at the same steps.
        objective: tells which parts of the loss there are.
    """

    def __init__(self, metrics: MetricsLog | None, world: World, objective: Objective) -> None:
        self._metrics, self._world, self._objective = metrics, world, objective
        self._pending: list[tuple[int, int, float, Tensor]] = []
        self.last_loss = math.nan
        self._flushed_s = time.monotonic()

    def add(self, step: int, epoch: int, lr: float, losses: Tensor) -> None:
        """Take a step's losses.

        Args:
            step: from 1.
            epoch: from 0.
            lr: its learning rate.
            losses: (3,) on the device: this rank's share of the soft loss and of the hard one, and the gradient's norm.
        """
        self._pending.append((step, epoch, lr, losses))
        # a rank alone need not keep in step with others, so it may look at the clock
        is_late = self._world.size == 1 and time.monotonic() - self._flushed_s >= FLUSH_S
        if is_late or len(self._pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Fetch what is there and write it.

        Raises:
            StudentError: a loss is not finite; steps before it are written.
        """
        if not self._pending:
            return
        losses = self._world.sum(torch.stack([entry[3] for entry in self._pending]).double().cpu()).tolist()
        pending, self._pending, self._flushed_s = self._pending, [], time.monotonic()
        figures: dict[str, float | int | None] = {}
        for (step, epoch, lr, _), (soft, hard, norm) in zip(pending, losses, strict=True):
            alpha = self._objective.alpha
            loss = (alpha * soft if alpha > 0 else 0.0) + ((1 - alpha) * hard if alpha < 1 else 0.0)
            if not math.isfinite(loss):
                raise StudentError(
                    f"step {step}: expected a finite loss, got {loss}; give a lower --lr, clip the gradient with "
                    "--clip-norm 1, or warm up with --warmup-steps, and give a new --out, since a run keeps its options"
                )
            self.last_loss = loss
            norm /= self._world.size
            figures = {
                "epoch": epoch,
                "lr": lr,
                "loss": loss,
                "soft_loss": soft if self._objective.is_soft else None,
                "hard_loss": hard if self._objective.is_hard else None,
                "grad_norm": norm if norm > 0 and math.isfinite(norm) else None,
            }
            if self._metrics is not None:
                self._metrics.write("train", step, figures)
        if self._metrics is not None:
            self._metrics.plot("train", pending[-1][0], figures)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, up to the first that a kill left unfinished; nothing where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                return
            if not line.endswith("\n"):
                return
            yield value


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"
