"""What the driver makes of workers that die, leave, or find the disk full: over a team that is only told of."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from storage.console import progress
from storage.errors import OutOfSpaceError, PathError, StoreError
from storage.layout import Layout
from teacherdump.cluster_bisect import Piece
from teacherdump.cluster_drive import MOST_DEATHS, Drive
from teacherdump.cluster_team import Came, Done, Event, Left, Team, WorkerDiedError, checked, no_worker
from teacherdump.cluster_work import Failure
from teacherdump.room import Room

Answer = Callable[[str, Any], list[Event]]
SEALED = SimpleNamespace(num_rows=4)


class ToldTeam(Team):
    """Workers whose every answer to a task is told by a function of the worker and the piece, None of a check."""

    def __init__(self, answer: Answer, *names: str) -> None:
        super().__init__(client=None, num_readers=None, names={name: name for name in names})
        self.answer, self.given = answer, list[tuple[str, Any]]()

    def submit(self, call: Any, *args: Any, address: str) -> tuple[str, Any]:
        del call
        piece = args[1] if len(args) > 1 else None
        key = str(len(self.given))
        self.given.append((address, piece))
        for event in self.answer(address, piece):
            self.events.put(Done(key, event.value, event.error) if isinstance(event, Done) else event)
        return key, SimpleNamespace(cancel=lambda: None, release=lambda: None)

    def came(self, address: str) -> bool:
        self.names[address] = address
        return True

    def stop(self, run: str) -> None:
        del run

    def next_events(self, timeout_s: float) -> list[Event]:
        del timeout_s
        return [] if self.events.empty() else [self.events.get()]


def drive(team: ToldTeam, num_shards: int = 3, hours: float = 1.0) -> tuple[list[Any], list[str]]:
    """What was reported and said, once the driver is through."""
    reports, lines = list[Any](), list[str]()
    with progress(4 * num_shards, "rows", "dumping", quiet=True) as bar:
        loop = Drive(
            team,
            corpus=SimpleNamespace(part=lambda *_: None),
            layout=Layout(4 * num_shards, 4, 2),
            row_bytes=1,
            say=lines.append,
            plan=SimpleNamespace(run="this"),  # type: ignore[arg-type]
            card=None,  # type: ignore[arg-type]
            shards=iter(range(num_shards)),
            bar=bar,
            on_report=reports.append,
            room=Room("/nowhere", hours, lines.append, sleep=lambda _: None),
        )
        loop.run(set(team.names), lambda: False)
    return reports, lines


def test_a_full_disk_is_waited_out_and_the_shard_done_again() -> None:
    full = [Done("", Failure(OutOfSpaceError("disk full")))]
    answers = iter([full, full])
    reports, lines = drive(ToldTeam(lambda *_: list(next(answers, [Done("", SEALED)])), "a"))
    assert len(reports) == 3
    assert [line[:8] for line in lines] == ["waiting:", "going on"]


def test_a_full_disk_ends_the_run_where_nobody_waits() -> None:
    with pytest.raises(OutOfSpaceError, match="disk full"):
        drive(ToldTeam(lambda *_: [Done("", Failure(OutOfSpaceError("disk full")))], "a"), hours=0)


def test_a_worker_that_leaves_as_it_said_is_no_suspicion() -> None:
    gone: Iterator[list[Event]] = iter([[Left("a", is_expected=True), Came("b")]])
    team = ToldTeam(lambda _, piece: list(next(gone, [Done("", piece and SEALED)])), "a")
    reports, lines = drive(team)
    assert (len(reports), lines) == (3, [])
    assert not any(piece is not None and piece.is_alone for _, piece in team.given)


def test_a_worker_that_comes_is_checked_before_it_is_given_a_shard_and_left_out_if_it_fails() -> None:
    def answer(address: str, piece: Piece | None) -> list[Event]:
        if piece is None:
            return [Done("", Failure(PathError("sees nothing")) if address == "bad" else None)]
        return [Came("bad"), Came("good"), Done("", SEALED)] if piece.shard == 0 else [Done("", SEALED)]

    team = ToldTeam(answer, "a")
    reports, lines = drive(team, num_shards=20)
    assert len(reports) == 20
    assert lines == ["worker bad is not used: sees nothing"]
    assert {address for address, piece in team.given if piece is not None} >= {"a", "good"}
    assert ("bad", None) in team.given
    assert not any(address == "bad" and piece is not None for address, piece in team.given)


def test_a_run_ends_where_no_worker_that_is_there_may_work() -> None:
    def answer(_: str, piece: Piece | None) -> list[Event]:
        if piece is None:
            return [Done("", Failure(PathError("sees nothing")))]
        return [Left("a", is_expected=True), Came("b")]

    with pytest.raises(PathError, match="sees nothing"):
        drive(ToldTeam(answer, "a"))


def test_workers_that_die_one_after_the_other_end_the_run() -> None:
    number = iter(range(1, 1000))
    team = ToldTeam(lambda address, _: [Left(address, is_expected=False), Came(f"{next(number)}")], "0")
    with pytest.raises(
        WorkerDiedError, match="workers: expected some that live, got 9 workers that died one after the"
    ):
        drive(team)
    assert len(team.given) == MOST_DEATHS + 3  # two shards, and the check of each worker that came


def test_workers_that_can_not_be_started_again_end_the_run() -> None:
    team = ToldTeam(lambda address, _: [Left(address, is_expected=True)], "a")
    team.num_revived = MOST_DEATHS + 1
    with pytest.raises(WorkerDiedError, match="workers: expected them to start again, got some that died each time"):
        drive(team)


def test_an_error_names_the_worker_that_met_it() -> None:
    with pytest.raises(StoreError, match=r"^bad luck \[worker 3\]$"):
        checked(Done("", Failure(StoreError("bad luck"))), "3")
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        checked(Done("", error=RuntimeError("a bug")), "3")
    assert "start some: dask worker tcp://HOST:PORT" in str(no_worker())
