"""A run that is killed, or asked to stop, goes on to the weights that it would have come to."""

import contextlib
import os
import random
import signal
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.corpus import open_corpus
from storage.errors import MismatchError, OutOfSpaceError, PathError, StudentError
from storage.interruption import Interrupted, StopRequest
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint
from studenttrain.config import FitConfig
from studenttrain.metrics import StepLog
from studenttrain.preparation import hold_folder
from studenttrain.train import Saver, fit
from tests.studenttrain.runs import (
    STUDENT,
    Ground,
    assert_same_weights,
    command,
    final_state,
    make_ground,
    metric_lines,
    write_blobs,
    write_targets,
)

pytestmark = pytest.mark.usefixtures("no_report")


def start(processes: ForkServerContext, config: FitConfig) -> ForkServerProcess:
    # nothing of the tests can be imported there, so the command itself is what is handed over
    code = f"from studenttrain.cli import main; main({[*command(config), '--quiet']!r})"
    process = processes.Process(target=exec, args=(code, {}))
    process.start()
    return process


def kill_again_and_again(processes: ForkServerContext, config: FitConfig, num_kills: int, longest_s: float) -> int:
    """Kill a run so often at random moments, then let it end; the number of kills that met it alive."""
    chance, num_met = random.Random(0), 0
    for _ in range(num_kills):
        process = start(processes, config)
        process.join(chance.uniform(0.05, longest_s))
        num_met += process.exitcode is None
        process.kill()
        process.join()
    process = start(processes, config)
    process.join()
    assert process.exitcode == 0
    return num_met


def assert_same_run(one: FitConfig, two: FitConfig) -> None:
    """Two runs came to the same end: weights, optimizer, averages, metrics."""
    assert_same_weights(final_state(one), final_state(two))
    for kind in ("train", "validation"):
        assert metric_lines(one, kind) == metric_lines(two, kind)
    first, second = (load_checkpoint(Path(config.out) / CHECKPOINT) for config in (one, two))
    assert first["stream"] == second["stream"]
    assert first["num_rows_seen"] == second["num_rows_seen"]
    assert torch.equal(first["random"][0], second["random"][0])


@pytest.mark.slow
def test_a_run_killed_fifty_times_gives_the_same_weights(tmp_path: Path, processes: ForkServerContext) -> None:
    ground = make_ground(tmp_path, num_samples=480)
    val = write_blobs(tmp_path / "val.npz", 64, seed=3)
    options = {
        "epochs": 60,
        "checkpoint_every": "3",
        "ema": 0.9,
        "clip_norm": 1.0,
        "accumulate": 2,
        "val_data": str(val),
    }
    undisturbed, killed = (ground.config(name, **options) for name in ("undisturbed", "killed"))
    fit(undisturbed, quiet=True)
    num_met = kill_again_and_again(processes, killed, 50, 1.2)
    assert num_met >= 25
    assert_same_run(undisturbed, killed)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7, 12, 13])
def test_a_run_that_stopped_after_any_step_goes_on_bit_for_bit(
    ground: Ground, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = write_blobs(ground.folder / "val.npz", 64, seed=3)
    options = {"epochs": 3, "ema": 0.9, "optimizer": "sgd", "val_data": str(val), "warmup_steps": 4}
    undisturbed, stopped = (ground.config(name, **options) for name in ("undisturbed", "stopped"))
    fit(undisturbed, quiet=True)
    message = f"stopped after step {steps}; the checkpoint is in .*: to go on, run the same command"
    with stop_after(steps, monkeypatch), pytest.raises(Interrupted, match=message):
        fit(stopped, quiet=True)
    assert load_checkpoint(Path(stopped.out) / CHECKPOINT)["step"] == steps
    assert fit(stopped, quiet=True).steps == 18
    assert_same_run(undisturbed, stopped)


@contextlib.contextmanager
def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C comes in a given step."""
    request, honest = StopRequest(), StepLog.add

    def add(self: StepLog, step: int, epoch: int, lr: float, losses: torch.Tensor) -> None:
        honest(self, step, epoch, lr, losses)
        request.signal = signal.SIGINT if step == steps else 0

    with monkeypatch.context() as patch:
        patch.setattr("studenttrain.train.stop_requests", lambda: contextlib.nullcontext(request))
        patch.setattr(StepLog, "add", add)
        yield


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_exits_with_its_code(
    ground: Ground, processes: ForkServerContext, number: int, code: int
) -> None:
    config = ground.config(steps=200_000, checkpoint_every="2h")
    process = start(processes, config)
    wait_until_it_trains(config)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    checkpoint = load_checkpoint(Path(config.out) / CHECKPOINT)
    assert checkpoint["step"] > 0
    assert metric_lines(config)[-1]["step"] == checkpoint["step"]


def wait_until_it_trains(config: FitConfig) -> None:
    path = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_in_a_validation_writes_a_checkpoint(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    val = write_blobs(ground.folder / "val.npz", 64, seed=3)
    undisturbed, stopped = (ground.config(name, val_data=str(val)) for name in ("undisturbed", "stopped"))
    fit(undisturbed, quiet=True)
    request = StopRequest()
    import studenttrain.train as module
    from studenttrain.evaluate import evaluate as honest

    def evaluate(*args: object, **options: object) -> object:
        request.signal = signal.SIGINT
        return honest(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "stop_requests", lambda: contextlib.nullcontext(request))
        patch.setattr(module, "evaluate", evaluate)
        with pytest.raises(Interrupted, match=r"stopped after step 6"):
            fit(stopped, quiet=True)
    assert metric_lines(stopped, "validation") == []
    fit(stopped, quiet=True)
    assert_same_run(undisturbed, stopped)


def interrupted_run(ground: Ground, monkeypatch: pytest.MonkeyPatch, steps: int = 3, **options: Any) -> FitConfig:
    config = ground.config(**options)
    with stop_after(steps, monkeypatch), pytest.raises(Interrupted):
        fit(config, quiet=True)
    return config


def test_other_options_are_refused_by_name(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_run(ground, monkeypatch)
    with pytest.raises(
        StudentError, match=r"expected the options that it was begun with, got others: --lr 0.001, not 0.5"
    ):
        fit(ground.config(lr=0.5), quiet=True)
    with pytest.raises(StudentError, match=rf"--student {STUDENT}, not mlp:8-4; give the same options to go on"):
        fit(ground.config(student="mlp:8-4"), quiet=True)


def test_paths_may_change_where_what_they_hold_does_not(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    config = interrupted_run(ground, monkeypatch)
    moved = ground.folder / "moved.zarr"
    ground.targets.rename(moved)
    again = ground.config(targets=str(moved), checkpoint_every="5")
    assert fit(again, quiet=True).steps == 12
    assert config.out == again.out


def test_another_store_is_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_run(ground, monkeypatch)
    other = write_targets(ground.folder / "other.zarr", open_corpus(ground.data), temperatures=(1.0, 8.0))
    with pytest.raises(MismatchError, match=r"expected the store that the run began with .* got another"):
        fit(ground.config(targets=str(other)), quiet=True)
    noise = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    same_manifest = write_targets(ground.folder / "noise.zarr", open_corpus(ground.data), logits=noise)
    with pytest.raises(MismatchError, match=r"expected the store that the run began with \(content_digest"):
        fit(ground.config(targets=str(same_manifest)), quiet=True)


def test_a_store_that_was_finalized_meanwhile_is_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = make_ground(tmp_path, finalize=False)
    config = interrupted_run(ground, monkeypatch)
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["card"]["store"]["content_digest"] is None
    write_targets(ground.targets, open_corpus(ground.data))
    assert fit(config, quiet=True).steps == 12
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["card"]["store"]["content_digest"] is not None


def test_other_hard_targets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = make_ground(tmp_path, labels=False)
    labels = np.random.default_rng(0).integers(0, 4, 96)
    for name in ("one", "two"):
        np.save(tmp_path / f"{name}.npy", labels)
        labels = labels[::-1].copy()
    interrupted_run(ground, monkeypatch, labels=str(tmp_path / "one.npy"))
    for options in ({"labels": str(tmp_path / "two.npy")}, {}):
        with pytest.raises(
            StudentError, match=r"expected the hard targets that it was begun with, got others, or none"
        ):
            fit(ground.config(**options), quiet=True)
    assert fit(ground.config(labels=str(tmp_path / "one.npy")), quiet=True).steps == 12


def test_other_weights_to_begin_with_are_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (ground.config(f"source{seed}", steps=1, seed=seed) for seed in (1, 2))
    fit(one, quiet=True)
    fit(two, quiet=True)
    config = interrupted_run(ground, monkeypatch, init=one.out)
    with pytest.raises(StudentError, match=r"expected the weights that it was begun with in '.*source2', got others"):
        fit(ground.config(init=two.out), quiet=True)
    Path(one.out).rename(ground.folder / "gone")
    assert fit(config, quiet=True).steps == 12


def test_a_damaged_checkpoint_is_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    config = interrupted_run(ground, monkeypatch)
    path = Path(config.out) / CHECKPOINT
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:  # between its files there is padding, where no bit matters
        content = max((archive.read(name) for name in archive.namelist()), key=len)
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StudentError, match=r"take another copy of it, or begin again in a new --out"):
        fit(config, quiet=True)


def test_another_student_behind_the_same_spec_is_refused(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    (tmp_path / "changing_student.py").write_text("from torch import nn\ndef build(): return nn.Linear(8, 4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "changing_student", raising=False)
    config = interrupted_run(ground, monkeypatch, student="changing_student:build")
    code = "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))\n"
    (tmp_path / "changing_student.py").write_text(code)
    monkeypatch.delitem(sys.modules, "changing_student")
    with pytest.raises(StudentError, match=r"expected weights of this student, got others"):
        fit(config, quiet=True)


def test_a_full_disk_at_a_checkpoint_leaves_the_old_one(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = ground.config("undisturbed")
    fit(undisturbed, quiet=True)
    config = ground.config("full", checkpoint_every="2")
    honest = Saver.save
    num_saves = 0

    def save(self: Saver) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 4:
            raise OutOfSpaceError(
                "checkpoint: expected room on the disk, got none; free space and run the same command"
            )
        honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save)
        with pytest.raises(OutOfSpaceError):
            fit(config, quiet=True)
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["step"] == 4
    fit(config, quiet=True)
    assert_same_run(undisturbed, config)


def test_two_runs_in_one_folder_are_refused(ground: Ground) -> None:
    config = ground.config(steps=1)
    with (
        hold_folder(config.out),
        pytest.raises(PathError, match=r"expected a folder that no other run writes to, got one in use"),
    ):
        fit(config, quiet=True)


def test_a_run_killed_before_its_end_was_written_ends_again(ground: Ground) -> None:
    config = ground.config(steps=3)
    first = fit(config, quiet=True)
    for name in ("result.json", "student.pt2"):
        (Path(config.out) / name).unlink()
    again = fit(config, quiet=True)
    assert not again.already_ended
    assert again.to_json() == first.to_json()
    assert (Path(config.out) / "student.pt2").is_file()
