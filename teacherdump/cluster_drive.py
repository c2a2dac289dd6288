"""The driver's loop: who gets which shard, and what becomes of the shards of a worker that died."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from storage.console import Pass, format_count, format_plural
from storage.corpus import Corpus
from storage.errors import OutOfSpaceError
from storage.layout import Layout
from teacherdump.cluster_bisect import Piece, Suspects
from teacherdump.cluster_team import (
    SHARDS_IN_FLIGHT,
    Came,
    Done,
    Event,
    Left,
    Team,
    WorkerDiedError,
    checked,
    is_death,
)
from teacherdump.cluster_work import Card, Dropped, Failure, Plan, check_worker, dump_part, score_part
from teacherdump.report import ShardReport
from teacherdump.room import Room
from teacherdump.source import Say

GRACE_S = 5.0  # that shards in flight are given to end once a run is stopped
WAIT_S = 0.2  # for something to happen, before the driver looks whether it is to stop
NOTE_EVERY_S = 60.0  # while there is no worker
MOST_DEATHS = 8  # one after the other, with nothing done between them, beside two a worker


@dataclass(eq=False)
class Flight:
    """A task that is on a worker: a piece of work, or the check of the worker itself."""

    key: str
    future: Any  # of distributed
    address: str
    piece: Piece | None


@dataclass
class Drive:
    """The driver's loop, and what it knows of the tasks in flight."""

    team: Team
    corpus: Corpus
    layout: Layout
    row_bytes: int
    say: Say
    plan: Plan
    card: Card
    shards: Iterator[int]
    bar: Pass
    on_report: Callable[[ShardReport], object]
    room: Room
    suspects: Suspects = field(default_factory=Suspects)
    again: deque[Piece] = field(default_factory=deque)  # pieces that were not done, by no fault of theirs
    flights: dict[str, Flight] = field(default_factory=dict)
    fit: dict[str, list[Flight]] = field(default_factory=dict)  # in flight on each worker that may work
    refusal: Failure | None = None  # of the last worker that may not
    num_deaths: int = 0  # since anything was done
    full: OutOfSpaceError | None = None  # what a worker met that had no room for its shard
    noted: float = field(default_factory=time.monotonic)

    def run(self, fit: set[str], is_stopped: Callable[[], bool]) -> None:
        """Hand out shards until none is left, or someone stops; workers that are not `fit` are checked first."""
        fit = fit & set(self.team.names)  # some may have died since they were checked: of the pilot, say
        self.fit = {address: [] for address in fit}
        for address in set(self.team.names) - fit:
            self._check(address)
        while not is_stopped():
            if self.fit:
                self.noted = time.monotonic()
            self._wait_for_room(is_stopped)
            self._fill()
            if not any(flight.piece for flight in self.flights.values()) and not self._is_waiting_for_workers():
                return
            for event in self.team.next_events(WAIT_S):
                self._handle(event)
        limit = time.monotonic() + GRACE_S
        self.team.stop(self.plan.run)
        while any(flight.piece for flight in self.flights.values()) and time.monotonic() < limit:
            for event in self.team.next_events(WAIT_S):
                self._handle(event)

    def drop(self) -> None:
        """Let go of what is in flight; what a worker seals all the same harms nobody."""
        if self.flights:
            self.team.stop(self.plan.run)
            self.team.client.cancel([flight.future for flight in self.flights.values()])

    def _wait_for_room(self, is_stopped: Callable[[], bool]) -> None:
        """Hand out nothing while the disk is full; what did not fit is done again.

        Raises:
            OutOfSpaceError: there is still no room, and the time is over.
        """
        error, self.full = self.full, None
        if error is not None:
            start, stop = self.layout.shard_bounds(0)
            self.room.wait(error, (stop - start) * self.row_bytes, is_stopped)

    # What is handed out

    def _fill(self) -> None:
        """Give every worker what it has room for; a suspicious piece gets a worker for itself."""
        num_waiting = self.suspects.num_waiting
        for address in sorted(self.fit, key=lambda address: len(self.fit[address])):
            load = self.fit[address]
            if any(flight.piece is not None and flight.piece.is_alone for flight in load):
                continue
            if num_waiting:
                num_waiting -= 1
                if not load and (piece := self.suspects.next_piece()) is not None:
                    self._submit(address, piece)
                continue  # else it runs dry, to have nothing but that piece
            while len(load) < SHARDS_IN_FLIGHT and (piece := self._next_piece()) is not None:
                self._submit(address, piece)

    def _next_piece(self) -> Piece | None:
        if self.again:
            return self.again.popleft()
        shard = next(self.shards, None)
        return None if shard is None else Piece(shard, *self.layout.shard_bounds(shard))

    def _submit(self, address: str, piece: Piece) -> None:
        part = self.corpus.part(*self.layout.shard_bounds(piece.shard))
        call = dump_part if piece.is_whole else score_part
        key, future = self.team.submit(call, self.plan, piece, part, address=address)
        flight = self.flights[key] = Flight(key, future, address, piece)
        self.fit[address].append(flight)

    def _is_waiting_for_workers(self) -> bool:
        """Whether there is work, and nobody who may do it.

        Raises:
            StoreError: somebody is there, but none may work.
        """
        if self.fit and not self.suspects.num_waiting:
            return False
        if self.team.num_revived > MOST_DEATHS:
            raise WorkerDiedError(
                "workers: expected them to start again, got some that died each time before they were there; is there "
                "memory enough for all? Give fewer --workers; what is sealed stays"
            )
        if not self.fit and not self.flights and self.team.names and self.refusal is not None:
            raise self.refusal.error
        if not self.fit and not self.suspects.num_waiting and not self.again:
            piece = self._next_piece()
            if piece is None:
                return False
            self.again.append(piece)
        if time.monotonic() - self.noted > NOTE_EVERY_S:
            self.noted = time.monotonic()
            self.say("waiting for a worker: there is none that can be used")
        return True

    # What happens

    def _handle(self, event: Event) -> None:
        if isinstance(event, Came):
            if self.team.came(event.address):
                self._check(event.address)
        elif isinstance(event, Left):
            self._left(event.address, event.is_expected)
        elif (flight := self.flights.get(event.key)) is not None:
            if event.error is not None and is_death(event.error):
                from distributed import KilledWorker

                if isinstance(event.error, KilledWorker):
                    self._left(flight.address, is_expected=False)
                else:  # lost on its way, with the connection to the scheduler
                    self._forget(flight)
                    self._put_back(flight)
            else:
                self._forget(flight)
                self._came_back(flight, event)

    def _check(self, address: str) -> None:
        key, future = self.team.submit(check_worker, self.card, address=address)
        self.flights[key] = Flight(key, future, address, None)

    def _came_back(self, flight: Flight, event: Done) -> None:
        name, piece = self.team.name(flight.address), flight.piece
        if piece is None:
            self._checked(flight, event)
            return
        if isinstance(event.value, Failure) and isinstance(event.value.error, OutOfSpaceError):
            self.full = event.value.error
            self._put_back(flight)
            return
        value = checked(event, name)
        if isinstance(value, Dropped):
            return
        self.num_deaths = 0
        for line in self.suspects.done(piece):
            self.say(line)
        if piece.is_whole:
            self.bar.advance(value.num_rows)
            self.room.found()
            self.on_report(value)

    def _checked(self, flight: Flight, event: Done) -> None:
        """A worker that came was looked at."""
        if isinstance(event.value, Failure):
            self.refusal = event.value
            self.say(f"worker {self.team.name(flight.address)} is not used: {event.value.error}")
            return
        checked(event, self.team.name(flight.address))
        if flight.address in self.team.names:
            self.fit[flight.address] = []

    def _left(self, address: str, is_expected: bool) -> None:
        """A worker is gone: another one does what it had."""
        if address not in self.team.names:
            return
        name = self.team.name(address)
        del self.team.names[address]
        flights = [flight for flight in self.flights.values() if flight.address == address]
        self.fit.pop(address, None)
        for flight in flights:
            del self.flights[flight.key]
            flight.future.cancel()
        pieces = [flight.piece for flight in flights if flight.piece is not None]
        if is_expected:
            for flight in flights:
                self._put_back(flight)
            return
        if flights:
            self.num_deaths += 1
            had = " and ".join(_describe(piece) for piece in pieces)
            self.say(f"worker {name} died" + (f"; it had {had}" if had else ""))
        for line in self.suspects.died(pieces):
            self.say(line)
        if self.num_deaths > MOST_DEATHS + 2 * len(self.fit):
            raise WorkerDiedError(
                f"workers: expected some that live, got {format_plural(self.num_deaths, 'worker')} that died one after "
                "the other with nothing done between them; look into the log of the workers, or run without --workers "
                "to see what happens; what is sealed stays"
            )

    def _forget(self, flight: Flight) -> None:
        del self.flights[flight.key]
        if flight.address in self.fit and flight in self.fit[flight.address]:
            self.fit[flight.address].remove(flight)
        flight.future.release()

    def _put_back(self, flight: Flight) -> None:
        if flight.piece is None:
            return
        if flight.piece.is_alone:
            self.suspects.put_back(flight.piece)
        else:
            self.again.append(flight.piece)


def _describe(piece: Piece) -> str:
    if piece.is_whole:
        return f"shard {format_count(piece.shard)}"
    return f"rows {format_count(piece.start)} to {format_count(piece.stop - 1)} of shard {format_count(piece.shard)}"
