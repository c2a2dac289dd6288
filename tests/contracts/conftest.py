"""Fixtures of the contract suite."""

import os

import pytest


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk; what outlives a loss of power is told by the order of calls, in `test_durable.py`."""

    def no_wait(_: int) -> None:
        pass

    monkeypatch.setattr(os, "fsync", no_wait)
