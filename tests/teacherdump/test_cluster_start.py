"""Workers of this machine that die while they start: killed, or for want of memory."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from teacherdump.cluster import tried
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


class Fragile:
    """A corpus and a team whose workers die of some rows."""

    num_samples = 20
    path = "corpus"

    def __init__(self, deadly: set[int]) -> None:
        self.deadly, self.asked = deadly, list[range]()
        self.corpus = self
        self.preprocess = None
        self.config = config()

    def part(self, start: int, stop: int) -> range:
        return range(start, stop)

    def ask(self, *args: Any) -> str:
        part = args[3]
        self.asked.append(part)
        if self.deadly & set(part):
            raise WorkerDiedError("worker 0: expected it to live through try_teacher_on, got 2 that died")
        return "answer"


def test_a_teacher_that_dies_of_the_first_samples_is_tried_on_others() -> None:
    world: Any = Fragile({1})
    answer: Any = tried(world, world, world)
    assert answer == "answer"
    assert world.asked == [range(4), range(8, 12)]


def test_a_teacher_that_dies_of_all_samples_ends_the_run() -> None:
    world: Any = Fragile(set(range(20)))
    with pytest.raises(WorkerDiedError, match="expected it to live through try_teacher_on"):
        tried(world, world, world)
    assert world.asked == [range(4), range(8, 12), range(16, 20)]
