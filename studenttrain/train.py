"""The training loop: a student learns from stored soft targets, from wherever it stands to the end of the run."""

import contextlib
import itertools
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from storage.console import format_count, progress
from storage.encodings import Hidden
from storage.interruption import Interrupted, StopRequest, stop_requests
from storage.layout import from_ranges
from storage.series import Series
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from studenttrain.checks import check_same_data, check_same_run, check_same_store, data_identity, open_targets
from studenttrain.config import FitConfig, parse_interval
from studenttrain.distributed import World, join_world
from studenttrain.ending import FitResult, end_run, ended_run
from studenttrain.epoch_start import EpochStart, count_steps, is_over
from studenttrain.epochs import EpochLog, Replay, load_replay
from studenttrain.evaluate import evaluate
from studenttrain.figures import EvalFigures
from studenttrain.heads import Head
from studenttrain.learner import Learner, build_learner
from studenttrain.loss import target_arrays
from studenttrain.metrics import MetricsLog, StepLog
from studenttrain.precision import check_precision
from studenttrain.preparation import (
    Prepared,
    build_student,
    hold_folder,
    look_at_data,
    prepare,
    with_all_rows,
)
from studenttrain.schedule import learning_rate
from studenttrain.specialists.collapse import Corrected
from studenttrain.specialists.specialty import Specialty
from studenttrain.step import BatchLoader, Counts, LearningBatch, count_rows, load_batch, train_step
from studenttrain.stream import StudentBatch, TargetStream
from studenttrain.targets import target_head

# The end of an epoch is no reason to write again what was written so short a time ago.
LEAST_SAVE_S = 5.0


@dataclass(frozen=True)
class Run:
    """What stays the same while a student learns.

    Attributes:
        config: the options.
        prepared: what is read.
        world: this rank of how many.
        folder: where the run writes.
        data: what identifies the objective and the data beside the store, for the checkpoint.
        quiet: whether nothing is printed.
        replay: the run whose epochs are seen again, or None.
    """

    config: FitConfig
    prepared: Prepared
    world: World
    folder: Path
    data: Mapping[str, Any]
    quiet: bool
    replay: Replay | None = None


def fit(config: FitConfig, quiet: bool = False, specialty: Specialty | None = None) -> FitResult:
    """Train a student on a store, or go on with a run that was begun with the same options.

    Under `torchrun` every rank calls it; the first one writes and speaks.

    Args:
        config: what is trained, on what, and how.
        quiet: print nothing but warnings.
        specialty: what a specialist is to learn; None trains a student of all classes.

    Returns:
        What came of it. Where the run had ended before, that, at once.

    Raises:
        StoreError: something that the user can mend; the message says how.
        ValueError: options that contradict each other, or that would be ignored.
        Interrupted: SIGINT or SIGTERM stopped the run, and a checkpoint was written.
    """
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(config.device))
        check_precision(config.precision, world.device)
        quiet = quiet or not world.is_main
        world.main_first(lambda: stack.enter_context(hold_folder(config.out)))
        folder = Path(config.out)
        path = folder / CHECKPOINT
        checkpoint = load_checkpoint(path) if path.is_file() else None
        store = stack.enter_context(open_targets(config.targets, config.cache_settings))
        if checkpoint is not None:
            check_same_run(checkpoint["config"], config)
            check_same_store(checkpoint["card"]["store"], store)
            if (ended := ended_run(folder, checkpoint["step"])) is not None:
                return ended
        replay = load_replay(config, store, quiet)
        prepared, begins = prepare(config, store, stack), checkpoint is None
        prepared = prepared if specialty is None else specialty.narrow(prepared, config.seed)
        torch.manual_seed(config.seed)
        if specialty is None:
            student = build_student(config, store, prepared.preprocess.shape, begins)
        else:
            student = specialty.build(config, prepared, begins)
        begun_with = student if config.init is not None and Path(config.init).exists() else None
        data = data_identity(prepared.objective, prepared.own_hard_targets, begun_with, prepared.card.specialist)
        if checkpoint is not None:
            check_same_data(checkpoint["data"], data, config)
        if specialty is None or not specialty.is_checked:
            world.main_first(lambda: look_at_data(prepared, quiet))

        run = Run(config, prepared, world, folder, data, quiet, replay)
        learner = build_learner(student, config, world, store.manifest.num_classes)
        stream = stack.enter_context(open_stream(run))
        if checkpoint is not None:
            learner.restore(checkpoint, world, path)
            stream.restore(checkpoint["stream"])
        metrics = stack.enter_context(MetricsLog(folder, learner.step)) if world.is_main else None
        figures = train(run, learner, stream, metrics)
        return end_run(config, with_all_rows(prepared), world, folder, learner, figures)


def train(  # noqa: C901 - the loop is to be read in one piece
    run: Run, learner: Learner, stream: TargetStream, metrics: MetricsLog | None
) -> EvalFigures | None:
    """The loop.

    Returns:
        Figures of the last validation; None without validation.

    Raises:
        Interrupted: SIGINT or SIGTERM came, and a checkpoint was written.
        StudentError: a loss is not finite.
    """
    config, world, objective = run.config, run.world, run.prepared.objective
    hard_targets = run.prepared.own_hard_targets
    log = StepLog(metrics, world, objective)
    saver = Saver(run, learner, stream, metrics, log)
    figures = None

    head, own = prepared_head(run), run.prepared.own

    def load_one(batch: StudentBatch) -> LearningBatch:
        return load_batch(batch, run.prepared.store.manifest, objective, hard_targets, world.device, head, own)

    load = BatchLoader(load_one, stream.ready)
    epochs = EpochLog(run.folder, stream.epoch) if world.is_main else None
    begin = EpochStart(config, run.prepared, world, run.replay, epochs).begin
    begin(learner.step, stream)  # refuses a warm-up that would not end, before anything is written
    if not run.quiet:
        click.echo(describe_start(run, learner, stream), err=True)
    if learner.step == 0:
        saver.save()  # so that the folder says from the first moment which run it belongs to
    with (
        stop_requests() as request,
        progress(rows_left(run, learner, stream), "rows", "training", quiet=run.quiet) as bar,
    ):
        while True:
            ended = is_over(config, learner.step, stream.epoch)
            if run.prepared.validation is not None and learner.step and (stream.batch == 0 or ended):
                figures = validate(run, learner, metrics, saver, request, ended) or figures
            if ended:
                return figures
            begin(learner.step, stream)
            epoch, total_steps = stream.epoch, count_steps(config, learner.step, stream)
            with closing_batches(stream) as batches:
                for group in groups(batches, config.accumulate):
                    # all ranks must save, and stop, after the same step: what they wish is added up with their counts
                    mine = count_rows(group, objective, hard_targets)
                    sums = [mine.rows, mine.hard, int(saver.is_due()), request.signal if world.is_main else 0]
                    *counted, is_due, signal = world.sum_numbers(sums)
                    counts = Counts(*counted)
                    lr = learning_rate(config.lr, config.schedule, learner.step, total_steps, config.warmup_steps)
                    losses = train_step(
                        learner, group, load, objective, counts, world,
                        lr=lr, precision=config.precision, clip_norm=config.clip_norm,
                    )  # fmt: skip
                    learner.num_rows_seen += counts.rows
                    log.add(learner.step, epoch, lr, losses)
                    bar.advance(sum(len(batch.rows_N) for batch in group) * world.size)
                    bar.note(f"epoch {epoch + 1}, loss {log.last_loss:.4g}")
                    if signal or (request.signal and world.size == 1):
                        saver.save()
                        raise interrupted(config, learner.step, signal or request.signal)
                    if is_due:
                        saver.save()
                    if is_over(config, learner.step, stream.epoch):
                        break
            ended = is_over(config, learner.step, stream.epoch)
            if ended or world.from_main(saver.seconds() > LEAST_SAVE_S):
                saver.save()


class Saver:
    """Writes a run's checkpoints, and knows when the last one was.

    Args:
        run: what stays the same.
        learner: what changes from step to step.
        stream: where the student stands in the rows.
        metrics: made durable before each checkpoint; None on the ranks that write nothing.
        log: flushed before each checkpoint, so that none is written after a loss that is not finite.
    """

    def __init__(
        self, run: Run, learner: Learner, stream: TargetStream, metrics: MetricsLog | None, log: StepLog
    ) -> None:
        self._run, self._learner, self._stream, self._metrics, self._log = run, learner, stream, metrics, log
        self._interval = parse_interval(run.config.checkpoint_every)
        self._step, self._time = learner.step, time.monotonic()

    def seconds(self) -> float:
        """Since the last checkpoint."""
        return time.monotonic() - self._time

    def is_due(self) -> bool:
        """Whether the step that comes ends the interval; the main rank alone decides."""
        return self._run.world.is_main and self._interval.is_over(self._learner.step + 1 - self._step, self.seconds())

    def save(self) -> None:
        """Write a checkpoint. Every rank calls it after the same step."""
        self._log.flush()
        state = self._learner.state(self._run.world)
        if self._run.world.is_main:
            if self._metrics is not None:
                self._metrics.sync()
            fixed = {
                "stream": self._stream.state(),
                "config": self._run.config.to_json(),
                "card": self._run.prepared.card.to_json(),
                "data": dict(self._run.data),
            }
            save_checkpoint(self._run.folder / CHECKPOINT, state | fixed)
        self._step, self._time = self._learner.step, time.monotonic()


def validate(
    run: Run, learner: Learner, metrics: MetricsLog | None, saver: Saver, request: StopRequest, ended: bool
) -> EvalFigures | None:
    """Try the student on the validation corpus and write the figures down; None where that was done before a restart.

    Raises:
        Interrupted: one rank alone was asked to stop, and a checkpoint was written.
    """
    validation = run.prepared.validation
    assert validation is not None
    known = run.world.from_main(metrics is not None and learner.step in metrics.validated)
    if known and not ended:
        return None

    def advance(count: int) -> None:
        del count
        if request.signal and run.world.size == 1:
            saver.save()
            raise interrupted(run.config, learner.step, request.signal)

    own = run.prepared.own
    figures = evaluate(
        learner.result if own is None else Corrected(learner.result, own),
        validation.corpus,
        run.prepared.preprocess,
        run.world,
        num_classes=run.prepared.card.num_classes,
        store=validation.store,
        precision=run.config.precision,
        readers=run.prepared.readers,
        advance=advance,
        hard_targets=validation.hard_targets,
    )
    if metrics is not None and not known:
        metrics.write("validation", learner.step, figures.to_json())
        metrics.plot("validation", learner.step, figures.to_json())
    if metrics is not None:
        metrics.sync()
    return figures


def open_stream(run: Run) -> TargetStream:
    """The student's stream of samples and of the arrays that the objective needs."""
    prepared = run.prepared
    return TargetStream(
        prepared.store,
        prepared.corpus,
        prepared.preprocess,
        run.config.batch_size,
        run.config.seed,
        rank=run.world.rank,
        world_size=run.world.size,
        arrays=target_arrays(prepared.store.manifest) if prepared.objective.is_soft else (),
        readers=prepared.readers,
        block_rows=None if run.replay is None else run.replay.block_rows,
        window_blocks=None if run.replay is None else run.replay.window_blocks,
        selection=prepared.selection,
    )


def prepared_head(run: Run) -> Head | None:
    """The teacher's head on the device, where its hidden states are stored and learned from."""
    encoding, arrays = run.prepared.store.manifest.encoding, run.prepared.store.head()
    if arrays is None or not isinstance(encoding, Hidden) or not run.prepared.objective.is_soft:
        return None
    return target_head(encoding, arrays, run.world.device)


def groups(batches: Iterator[StudentBatch], size: int) -> Iterator[list[StudentBatch]]:
    """Batches, so many at a time; the last group of an epoch may be smaller.

    Example:
        >>> list(groups(iter("abcde"), 2))
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    while group := list(itertools.islice(batches, size)):
        yield group


@contextlib.contextmanager
def closing_batches(stream: TargetStream) -> Iterator[Iterator[StudentBatch]]:
    """The rest of the stream's epoch, its reading ahead stopped at the end."""
    batches = iter(stream)
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


def rows_left(run: Run, learner: Learner, stream: TargetStream) -> int:
    """Rows that are still to be seen, if the other epochs are as long as this one."""
    config = run.config
    if is_over(config, learner.step, stream.epoch):
        return 0
    if config.steps is not None:
        steps_an_epoch = -(-stream.num_batches // config.accumulate)
        return (config.steps - learner.step) * stream.num_rows // steps_an_epoch
    return ((config.epochs or 0) - stream.epoch) * stream.num_rows - stream.batch * config.batch_size


def describe_start(run: Run, learner: Learner, stream: TargetStream) -> str:
    """What is about to be trained, in a line or two."""
    objective, store, config = run.prepared.objective, run.prepared.store, run.config
    parts = []
    if objective.is_soft:
        parts.append(f"{objective.alpha:g} x {objective.loss} at T = {objective.temperature:g}")
    if objective.is_hard:
        parts.append(f"{1 - objective.alpha:g} x hard targets")
    begin = "training" if learner.step == 0 else f"going on after step {format_count(learner.step)}:"
    rows = f"{format_count(stream.num_rows)} rows"
    order = stream.begin_epoch()
    shards, chosen_N = from_ranges(order.sealed), order.chosen_N
    num_sealed = sum(stop - start for start, stop in map(store.layout.shard_bounds, shards))
    if run.prepared.selection is not None:
        rows = f"{format_count(stream.num_rows)} of {format_count(num_sealed)} rows: "
        rows += run.prepared.selection.describe()
    refused = [entry.row for shard in shards for entry in store.seal(shard).quarantine]
    num_refused = len(refused) if chosen_N is None else sum(bool(chosen_N[row]) for row in refused)
    if num_refused:
        rows += f", {format_count(num_refused)} of them refused by the teacher's run"
    text = f"{begin} {config.student} on {rows} ({' + '.join(parts)}), {run.world.device}"
    if num_sealed < store.manifest.num_rows and not store.finalized:
        text += (
            f"\n{format_count(num_sealed)} of {format_count(store.manifest.num_rows)} rows are sealed so far; "
            "each epoch takes those that are sealed when it begins"
        )
    elif isinstance(store, Series) and run.replay is None:
        text += "\na series: each epoch takes the rows that are sealed when it begins"
    if run.replay is not None:
        text += f"\nas in the run '{run.replay.run}': each epoch takes the rows that it took there"
    return text


def interrupted(config: FitConfig, step: int, signal: int) -> Interrupted:
    """What to raise once a checkpoint is written."""
    return Interrupted(
        f"stopped after step {format_count(step)}; the checkpoint is in {config.out}: to go on, run the same command",
        signal,
    )
