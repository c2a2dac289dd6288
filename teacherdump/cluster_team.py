"""The workers of a run: a cluster of this machine, or one that is there already; who comes, who goes, who may work.

distributed is imported only where a cluster is opened. The driver's thread looks at one queue: what tasks gave, and
which workers came and went. No state that matters lies in the scheduler: when it dies, the seals are what is left.
"""

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from storage.errors import StoreError
from teacherdump.cluster_work import Failure, stop_run

SHARDS_IN_FLIGHT = 2  # of a worker: one is read or written while the other is in the teacher
FIRST_WORKER_S = 60.0  # until a worker must be there
LOOK_EVERY_S = 5.0  # how often the list of workers is asked for, should an event have been lost
TOPIC = "all"  # of the scheduler's events: workers and clients that come and go
NUM_TRIES = 2  # of a task that is no shard, when its worker dies


class WorkerDiedError(StoreError):
    """The workers that ran something died: look into their logs."""


@dataclass(frozen=True)
class Done:
    """What a task gave, or what it raised."""

    key: str
    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Came:
    """A worker is there now."""

    address: str


@dataclass(frozen=True)
class Left:
    """A worker is gone; `is_expected` where it, or its cluster, said so before."""

    address: str
    is_expected: bool


Event = Done | Came | Left


@dataclass
class Team:
    """The workers of one run.

    Attributes:
        client: of the scheduler, as distributed has it.
        num_readers: threads that decode samples in a worker; None leaves it to the worker.
        revive: starts workers anew that are gone for good, where that is for the run to do; says how many.
        events: what happened, in order.
        names: of the workers that are there, by address.
        num_revived: workers that were started anew since one came.
    """

    client: Any
    num_readers: int | None
    revive: Callable[[], int] = lambda: 0
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    names: dict[str, str] = field(default_factory=dict)
    num_revived: int = 0
    _num_tasks: int = 0
    _looked: float = 0.0

    def watch(self) -> None:
        """Begin to note who comes and goes, from those on who are there."""

        def note(event: tuple[float, dict[str, Any]]) -> None:
            message = event[1]
            if message.get("action") == "add-worker":
                self.events.put(Came(message["worker"]))
            elif message.get("action") == "remove-worker":
                self.events.put(Left(message["worker"], bool(message.get("expected"))))

        self.client.subscribe_topic(TOPIC, note)
        self.look()

    def unwatch(self) -> None:
        """End that: a scheduler grumbles at who listens and goes."""
        with contextlib.suppress(Exception):  # it may be gone itself
            self.client.unsubscribe_topic(TOPIC)

    def look(self) -> None:
        """Put into the events who came and went unseen."""
        self._looked = time.monotonic()
        self.num_revived += self.revive()
        there = self.client.scheduler_info(n_workers=-1)["workers"]
        for address in set(self.names) - set(there):
            self.events.put(Left(address, is_expected=False))
        for address in there:
            if address not in self.names:
                self.events.put(Came(address))

    def name(self, address: str) -> str:
        """How a person knows a worker."""
        name = self.names.get(address, address)
        return name if name == address else f"{name} ({address})"

    def came(self, address: str) -> bool:
        """Take a worker into the list; False where it is in it, or gone again."""
        if address in self.names:
            return False
        worker = self.client.scheduler_info(n_workers=-1)["workers"].get(address)
        if worker is None:
            return False
        self.names[address], self.num_revived = str(worker["name"]), 0
        return True

    def submit(self, call: Callable[..., object], *args: object, address: str) -> tuple[str, Any]:
        """A task on one worker, and on no other; what it gives comes as an event with this key."""
        self._num_tasks += 1
        key = f"logitstore-{self.client.id}", self._num_tasks
        future = self.client.submit(call, *args, key=key, workers=[address], pure=False)

        async def fetch() -> None:
            try:
                value = await self.client.gather(future, asynchronous=True)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the driver looks at it
                self.events.put(Done(str(key), error=error))
            else:
                self.events.put(Done(str(key), value))

        asyncio.run_coroutine_threadsafe(fetch(), self.client.loop.asyncio_loop)
        return str(key), future

    def stop(self, run: str) -> None:
        """Tell the workers to drop the shards of a run that are in work; waits for nobody."""

        async def tell() -> None:
            with contextlib.suppress(Exception):  # a worker that is gone needs no word
                await self.client.run(stop_run, run, on_error="ignore")

        asyncio.run_coroutine_threadsafe(tell(), self.client.loop.asyncio_loop)

    def next_events(self, timeout_s: float) -> list[Event]:
        """What happened since, what tasks gave first; waits for something at most so long.

        Raises:
            StoreError: the scheduler is gone.
        """
        found: list[Event] = []
        with contextlib.suppress(queue.Empty):
            found.append(self.events.get(timeout=timeout_s))
            while True:
                found.append(self.events.get_nowait())
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            with clear_of_the_scheduler():
                self.look()
        if self.client.status not in ("running", "connecting"):
            raise scheduler_is_gone()
        return sorted(found, key=lambda event: not isinstance(event, Done))

    def ask(self, call: Callable[..., object], *args: object, is_stopped: Callable[[], bool] = lambda: False) -> Any:
        """What a task gives on any worker; on another one where the first dies; None once someone stops.

        Raises:
            StoreError: what the task could not do.
            WorkerDiedError: every worker that ran it died.
        """
        for _ in range(NUM_TRIES):
            address = self.wait_for_one()
            key, future = self.submit(call, *args, address=address)
            value, is_dead = self._wait_for(key, address, is_stopped)
            future.release()
            if not is_dead:
                return value
        raise WorkerDiedError(
            f"worker {self.name(address)}: expected it to live through {call.__name__}, got {NUM_TRIES} that died; "
            "look into the log of the workers, or run without --workers to see what happens"
        )

    def wait_for_one(self) -> str:
        """The address of a worker, once there is one.

        Raises:
            StoreError: there is none for a minute.
        """
        limit = time.monotonic() + FIRST_WORKER_S
        while not self.names:
            self.wait(0.2)
            if time.monotonic() > limit:
                raise no_worker()
        return next(iter(self.names))

    def wait(self, timeout_s: float) -> list[Event]:
        """What `next_events` gives, the list of workers brought up to date with it."""
        events = self.next_events(timeout_s)
        for event in events:
            if isinstance(event, Came):
                self.came(event.address)
            elif isinstance(event, Left):
                self.names.pop(event.address, None)
        return events

    def _wait_for(self, key: str, address: str, is_stopped: Callable[[], bool]) -> tuple[Any, bool]:
        """What a task gave, and whether its worker died instead."""
        while not is_stopped():
            for event in self.wait(0.2):
                if isinstance(event, Done) and event.key == key:
                    if event.error is not None and is_death(event.error):
                        return None, True
                    return checked(event, self.name(address)), False
            if address not in self.names:
                return None, True
        return None, False


def checked(event: Done, worker: str) -> Any:
    """What a task gave.

    Raises:
        StoreError: what it could not do, with the worker's name; any other error as it is.
    """
    if event.error is not None:
        raise event.error
    if isinstance(event.value, Failure):
        error = event.value.error
        error.args = (f"{error} [worker {worker}]", *error.args[1:])
        raise error
    return event.value


def is_death(error: BaseException) -> bool:
    """Whether a task came to nothing because its worker, not the task, did."""
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError, FuturesCancelledError

    return isinstance(
        error, (KilledWorker, FutureCancelledError, FuturesCancelledError, asyncio.CancelledError, KeyError)
    )


@contextlib.contextmanager
def clear_of_the_scheduler() -> Iterator[None]:
    """Say in one line that the scheduler does not answer."""
    try:
        yield
    except (TimeoutError, OSError) as error:
        raise scheduler_is_gone() from error


def scheduler_is_gone() -> StoreError:
    """What to say when a scheduler is lost in the middle of a run."""
    return StoreError(
        "scheduler: expected it to answer, got nothing: it has ended, or can't be reached; what is sealed stays: run "
        "the same command again"
    )


def no_worker() -> StoreError:
    """What to say of a cluster without workers."""
    return StoreError(
        f"scheduler: expected a worker within {FIRST_WORKER_S:.0f} s, got none; start some: dask worker "
        "tcp://HOST:PORT --nworkers 1 --nthreads 2"
    )
