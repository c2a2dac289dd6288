"""Fixtures of the trainer's tests."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from tests.studenttrain.runs import Ground, make_ground


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny students are quickest on one thread, and tests that run side by side don't fight for cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    """A corpus of blobs and a finalized float32 dense store of it, T = 1 and 4."""
    return make_ground(tmp_path)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that start in a moment, since torch is imported already where they are forked from."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studenttrain.cli", "studenttrain.train"])
    context.Process(target=len, args=("",)).start()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the second or two that drawing takes, where the report is not what is tested."""
    monkeypatch.setattr("studenttrain.ending.write_report", lambda folder, _: folder / "report.html")


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that tracing a program takes, in each of many small runs."""
    monkeypatch.setattr("torch.export.export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not in a test")))
