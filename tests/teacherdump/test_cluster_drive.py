"""The driver's loop over a team that is only told of: what a real one does too seldom to wait for."""

from types import SimpleNamespace
from typing import Any

import pytest

from storage.console import progress
from storage.layout import Layout
from teacherdump.cluster_drive import Drive
from teacherdump.cluster_team import Done, Team


class ToldTeam(Team):
    """Workers that do at once what they are given, if they are there."""

    def __init__(self, *names: str) -> None:
        super().__init__(client=None, num_readers=None, names={name: name for name in names})
        self.given: list[tuple[str, str]] = []

    def submit(self, call: Any, *args: Any, address: str) -> tuple[str, Any]:
        del args
        key = str(len(self.given))
        self.given.append((call.__name__, address))
        if address in self.names:
            value = None if call.__name__ == "check_worker" else SimpleNamespace(num_rows=4)
            self.events.put(Done(key, value))
        return key, SimpleNamespace(cancel=lambda: None, release=lambda: None)

    def stop(self, run: str) -> None:
        pass

    def next_events(self, timeout_s: float) -> list[Any]:
        del timeout_s
        if self.events.empty():
            pytest.fail("expected something to happen, got a driver that waits for nobody")
        return [self.events.get()]


def test_a_worker_that_died_since_it_was_checked_is_given_nothing() -> None:
    team = ToldTeam("new")
    reports: list[Any] = []
    with progress(8, "rows", "dumping", quiet=True) as bar:
        drive = Drive(
            team,
            corpus=SimpleNamespace(part=lambda *_: None),
            layout=Layout(8, 4, 2),
            row_bytes=1,
            say=lambda _: None,
            plan=SimpleNamespace(run="this"),  # type: ignore[arg-type]
            card=None,  # type: ignore[arg-type]
            shards=iter(range(2)),
            bar=bar,
            on_report=reports.append,
            room=SimpleNamespace(found=lambda: None),  # type: ignore[arg-type]
        )
        drive.run({"dead"}, lambda: False)
    assert team.given == [("check_worker", "new"), ("dump_part", "new"), ("dump_part", "new")]
    assert len(reports) == 2
