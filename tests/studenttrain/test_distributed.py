"""Two ranks on the CPU, as `torchrun` starts them, learn what one learns."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from storage.errors import StudentError
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint
from studenttrain.config import FitConfig
from studenttrain.distributed import World, choose_device, join_world
from studenttrain.train import fit
from tests.studenttrain.runs import command, final_state, make_ground, metric_lines, write_blobs

ALONE = World(0, 1, torch.device("cpu"))
PLAIN = "mlp:8-16-4"


def run_ranks(config: FitConfig, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """`studenttrain fit` on so many ranks: torchrun's environment, without its second of start-up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "studenttrain.cli", *command(config)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=200) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]


def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    # 100 rows in batches of 33: uneven slices, and a last batch of one row, of which the second rank gets none
    ground = make_ground(tmp_path, num_samples=100, refused=(5, 50))
    val = write_blobs(tmp_path / "val.npz", 70, seed=3)
    options = {"batch_size": 33, "student": PLAIN, "accumulate": 3, "clip_norm": 0.5, "ema": 0.9, "val_data": str(val)}
    one, two = ground.config("one", **options), ground.config("two", **options)
    fit(one, quiet=True)
    first, second = run_ranks(two)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "4 steps, 196 rows seen" in first.stdout
    assert second.stdout == ""
    for name, value in final_state(one).items():
        torch.testing.assert_close(final_state(two)[name], value, rtol=1e-4, atol=1e-5)
    for kind in ("train", "validation"):
        for mine, theirs in zip(metric_lines(one, kind), metric_lines(two, kind), strict=True):
            assert mine.keys() == theirs.keys()
            numbers = {name: value for name, value in mine.items() if isinstance(value, float | int)}
            assert len(numbers) >= 6
            assert numbers == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-3)
    checkpoint = load_checkpoint(Path(two.out) / CHECKPOINT)
    assert len(checkpoint["random"]) == 2
    # the ranks share one run: it has ended for one process too
    assert fit(two, quiet=True).already_ended


def test_an_error_on_the_first_rank_ends_the_others(tmp_path: Path) -> None:
    ground = make_ground(tmp_path)
    val = write_blobs(tmp_path / "corpus.npz", 96, seed=7)
    assert val == ground.data
    first, second = run_ranks(ground.config())
    assert (first.returncode, second.returncode) == (1, 1)
    assert "row 0 ('0')" in first.stderr
    assert len(first.stderr.splitlines()) == len(second.stderr.splitlines()) == 1, first.stderr + second.stderr
    assert "rank 1: expected rank 0 to go on, got an error there; see its message" in second.stderr


def test_alone_there_is_nothing_to_wait_for() -> None:
    values = torch.arange(3)
    assert ALONE.sum(values) is values
    assert ALONE.sum_numbers([1, 2]) == [1, 2]
    assert ALONE.gather(values) == [values]
    assert ALONE.from_main("said") == "said"
    done = []
    ALONE.main_first(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(StudentError, match="mine"):
        ALONE.main_first(fail)


def fail() -> None:
    raise StudentError("mine")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match="device: expected"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected cuda, one for each of 2 ranks, got cuda:1; give --device cuda"):
        join_world("cuda:1").__enter__()
