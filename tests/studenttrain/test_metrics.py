"""Metrics: each step once, whole lines, and losses fetched late but not lost."""

import json
import resource
from pathlib import Path

import pytest
import torch

from storage.errors import OutOfSpaceError, StudentError
from studenttrain.checks import Objective
from studenttrain.distributed import World
from studenttrain.metrics import FLUSH_STEPS, MetricsLog, StepLog, read_metrics

ALONE = World(0, 1, torch.device("cpu"))
MIXED = Objective("kl", 4.0, 0.75)


def test_going_on_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.write("train", step, {"loss": float(step)})
        metrics.write("validation", 5, {"top1": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    with MetricsLog(tmp_path, 3) as metrics:
        assert metrics.validated == set()
        metrics.write("train", 4, {"loss": -4.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]


def test_a_validation_of_the_checkpoints_step_is_known(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        metrics.write("validation", 3, {"top1": 0.5})
    with MetricsLog(tmp_path, 3) as metrics:
        assert metrics.validated == {3}


def test_a_line_that_a_kill_cut_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for rest in ('{"kind": "tra', '{"kind": "train", "step": 2}', "\0\0\0"):
        path.write_text('{"kind": "train", "step": 1}\n' + rest)
        assert [line["step"] for line in read_metrics(path)] == [1]
    assert list(read_metrics(tmp_path / "nothing")) == []


def test_losses_are_written_in_order_after_a_while(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        log = StepLog(metrics, ALONE, MIXED)
        for step in range(1, FLUSH_STEPS + 11):
            log.add(step, 0, 0.1, torch.tensor([2.0, 4.0, 0.0]))
        log.flush()
        metrics.sync()
        lines = list(read_metrics(metrics.path))
    assert [line["step"] for line in lines] == list(range(1, FLUSH_STEPS + 11))
    assert lines[0] == {
        "kind": "train",
        "step": 1,
        "epoch": 0,
        "lr": 0.1,
        "loss": 2.5,
        "soft_loss": 2.0,
        "hard_loss": 4.0,
        "grad_norm": None,
    }


def test_a_loss_that_is_not_finite_is_named_by_its_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as metrics:
        log = StepLog(metrics, ALONE, MIXED)
        log.add(1, 0, 0.1, torch.tensor([1.0, 1.0, 0.0]))
        log.add(2, 0, 0.1, torch.tensor([1.0, float("nan"), 0.0]))
        with pytest.raises(
            StudentError,
            match=r"step 2: expected a finite loss, got nan; give a lower --lr, .* and give a new --out, since a run",
        ):
            log.flush()
        metrics.sync()
        assert [line["step"] for line in read_metrics(metrics.path)] == [1]


def test_curves_are_read_by_tensorboard_and_purged_on_going_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    with MetricsLog(tmp_path, 0) as metrics:
        for step in range(1, 6):
            metrics.plot("train", step, {"loss": float(step), "grad_norm": None})
    with MetricsLog(tmp_path, 3) as metrics:
        metrics.plot("train", 4, {"loss": -4.0})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    points = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]


def test_a_full_disk_at_the_curves_is_an_error_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = MetricsLog(tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    message = r"tensorboard/events.*: expected room on the disk, got none; free space"
    try:
        with pytest.raises(OutOfSpaceError, match=message):
            metrics.plot("train", 1, {f"figure {index}": 1.0 for index in range(1000)})
        with pytest.raises(OutOfSpaceError, match=message):
            metrics.sync()
        with pytest.raises(OutOfSpaceError, match=message):
            metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == ""


def test_a_part_that_takes_no_part_can_not_spoil_the_loss(tmp_path: Path) -> None:
    log = StepLog(None, ALONE, Objective("kl", 4.0, 1.0))
    log.add(1, 0, 0.1, torch.tensor([3.0, float("nan"), 0.0]))
    log.flush()
    assert log.last_loss == 3.0
