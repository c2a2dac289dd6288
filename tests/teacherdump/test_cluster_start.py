"""Workers of this machine that die while they start: killed, or for want of memory."""

import contextlib
import threading
from collections.abc import Iterator

import psutil
import pytest

from teacherdump.cluster_local import open_team
from teacherdump.cluster_team import WorkerDiedError
from teacherdump.config import DumpConfig


@contextlib.contextmanager
def killed_as_they_start(num_kills: int) -> Iterator[list[int]]:
    """Kill so many workers of this process, each as soon as it is seen."""
    done, killed = threading.Event(), list[int]()

    def kill() -> None:
        while not done.wait(0.02) and len(killed) < num_kills:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.pid not in killed and "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
                        break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def config() -> DumpConfig:
    return DumpConfig(models=("teacher.pt",), data="corpus", out="out.zarr", workers=2, device="cpu")


def test_a_worker_that_is_killed_as_it_starts_is_started_again() -> None:
    with killed_as_they_start(3) as killed, open_team(config(), lambda _: None) as team:
        assert len(killed) == 3
        assert len(team.client.scheduler_info(n_workers=-1)["workers"]) == 2


def test_workers_that_always_die_as_they_start_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherdump.cluster_local.MOST_DEATHS_AT_START", 0)
    with (
        killed_as_they_start(1),
        pytest.raises(WorkerDiedError, match="workers: expected them to start, got 1 that died before they were there"),
        open_team(config(), lambda _: None),
    ):
        pytest.fail("expected no team")
