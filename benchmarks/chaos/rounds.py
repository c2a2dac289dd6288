"""Rounds: one store each, dumped while things go wrong, and compared with what an undisturbed run gives."""

import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos.check import problems
from benchmarks.chaos.disk import LimitedFiles, SmallDisk, make_disk
from benchmarks.chaos.faults import AT_THE_PROXY, KILLS, MOST, Tally, proxy_fault
from benchmarks.chaos.processes import Crew, Driver, environment
from benchmarks.chaos.proxy import CALM
from benchmarks.chaos.world import BUCKET, Data, World
from storage.reader import open_store
from storage.records import MANIFEST
from storage.remote import open_place

STEP_S = 0.05
ORPHANS_S = 20.0
STARTING_SHARE = 0.2  # of the kills that fall on a driver that still starts: most shall hit one that is at work
MOST_ARMED = 8  # faults at the proxy that may wait for a victim or be under way at once
FULL_S = (2.0, 5.0)
FULL_WORDS = "is full: what is written next"  # what a run says when it waits for a disk
ON_RUNS = (*KILLS, "disk-full")  # kinds that are meant for a run at work
NO_ROOM = "expected room"  # what it says when it ends for want of it


@dataclass(frozen=True)
class Round:
    """What is dumped, by whom, and what goes wrong.

    Attributes:
        name: of the round.
        data: a folder of images, tar files, or these on S3.
        num_workers: of all drivers together; 0 dumps in the driver itself.
        num_drivers: that are started on the one store.
        by_hand: the workers are processes of their own, and the driver is given their scheduler.
        is_local: the store is on a disk that gets full, instead of on S3.
        share: of the faults of a round, how many this one gets: without the proxy each takes long.
    """

    name: str
    data: Data = "folder"
    num_workers: int = 4
    num_drivers: int = 1
    by_hand: bool = False
    is_local: bool = False
    share: float = 1.0

    def kinds(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Relative frequency of each kind of fault: of those of the proxy, and of those of processes and disks."""
        kinds = dict(KILLS) if self.num_workers else {"driver-killed": KILLS["driver-killed"]}
        if self.by_hand:
            kinds |= {"worker-left": 2, "worker-joined": 2}
        if self.is_local:
            return {}, kinds | {"disk-full": 15.0}
        return AT_THE_PROXY, kinds


@dataclass(frozen=True)
class Pace:
    """How often something goes wrong.

    Attributes:
        request_s: seconds between two faults at the proxy, on average.
        process_s: seconds between two kills, or what else happens to processes and disks, on average.
        patience_s: seconds that a round may take after its last fault.
    """

    request_s: float = 0.15
    process_s: float = 5.0
    patience_s: float = 120.0


ROUNDS = (
    Round("full-disk", is_local=True, share=0.25),
    Round("workers"),
    Round("by-hand", data="tars", by_hand=True),
    Round("remote-corpus", data="remote-tars"),
    Round("two-drivers", num_drivers=2),
)


@dataclass
class Outcome:
    """What came of a round.

    Attributes:
        name: of the round.
        tally: faults that hit something.
        seconds: that it took.
        num_starts: drivers started.
        num_refused: of these, that ended by being refused beside another driver.
        num_stopped: of these, that ended because there was no room to begin.
        num_deaths: workers of which a driver said that they died: killed, or dead of the deadly sample.
        content_digest: of the store.
        num_quarantined: rows of it.
        problems: all that does not hold.
    """

    name: str
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    num_starts: int = 0
    num_refused: int = 0
    num_stopped: int = 0
    num_deaths: int = 0
    content_digest: str | None = None
    num_quarantined: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Clock:
    """When the next fault of some kinds is due."""

    every_s: float
    kinds: Mapping[str, float]
    next_at: float


class Play:
    """A round under way."""

    def __init__(self, world: World, what: Round, number: int, generator: random.Random) -> None:
        self.world, self.what, self.generator = world, what, generator
        self.outcome = Outcome(what.name)
        self.folder = world.folder / f"round-{number}-{what.name}"
        self.folder.mkdir()
        self.out = f"s3://{BUCKET}/round-{number}/out.zarr"
        self.drivers: list[Driver] = []
        self.crew: Crew | None = None
        self.disk: SmallDisk | LimitedFiles | None = None
        self.full_until: float | None = None
        self.num_full_words = 0

    def run(self, num_faults: int, ends_at: float, pace: Pace) -> Outcome:
        """Dump, disturbed by faults until there are enough or it is time; then in peace until the end; then compare.

        Args:
            num_faults: that must hit something, in this round.
            ends_at: monotonic seconds at which nothing more goes wrong.
            pace: how often that is, and how long the rest may take.
        """
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            env = environment(f"http://127.0.0.1:{self.world.proxy.port}", CHAOS_PAUSE_S=str(self.world.pause_s))
            if self.what.by_hand:
                self.crew = stack.enter_context(Crew(self.what.num_workers, env, self.folder))
            if self.what.is_local:
                self.disk = stack.enter_context(make_disk(self.folder / "disk", self.world.may_mount))
                self.out = str(self.disk.folder / "out.zarr")
            for number in range(self.what.num_drivers):
                driver = Driver(f"driver-{number}", self._command(), env, self.folder / f"driver-{number}.log")
                stack.callback(driver.close)
                self.drivers.append(driver)
                driver.start()
            self._disturb(num_faults, ends_at, pace)
            self.outcome.seconds = time.monotonic() - begun
            self._close()
            if not self.outcome.problems:
                self._compare()
        return self.outcome

    def _command(self) -> list[str]:
        command = [*self.world.options(), "--data", self.world.data(self.what.data), "--out", self.out]
        if self.crew is not None:
            return [*command, "--scheduler", self.crew.address]
        each = self.what.num_workers // self.what.num_drivers
        return [*command, "--workers", str(each)] if each else command

    def _disturb(self, num_faults: int, ends_at: float, pace: Pace) -> None:
        """The loop: look after the drivers, and break something now and then."""
        tally, running = self.outcome.tally, list(self.drivers)
        clocks = [
            _Clock(every_s, kinds, time.monotonic() + self.generator.uniform(0, every_s))
            for every_s, kinds in zip((pace.request_s, pace.process_s), self.what.kinds(), strict=True)
            if kinds
        ]
        while running and not self.outcome.problems:
            time.sleep(STEP_S)
            now = time.monotonic()
            self._hear()
            self._look_after_the_disk(now)
            running = [driver for driver in running if not self._is_done(driver)]
            if now > ends_at + pace.patience_s:
                self.outcome.problems.append(
                    f"{self.what.name}: expected the end within {pace.patience_s:.0f} s after the last fault, got none"
                )
            for clock in clocks if now < ends_at and running else ():
                if now > clock.next_at and tally.num_faults + tally.num_armed < num_faults:
                    clock.next_at = now + self.generator.uniform(0, 2 * clock.every_s)
                    self._break_something(clock.kinds, self.generator.choice(running))

    def _break_something(self, kinds: Mapping[str, float], driver: Driver) -> None:
        kind, tally = self.generator.choices(list(kinds), list(kinds.values()))[0], self.outcome.tally
        if tally.faults[kind] >= MOST.get(kind, tally.faults[kind] + 1):
            return
        if (
            not driver.is_at_work
            and (kind == "disk-full" or self.generator.random() > STARTING_SHARE)
            and kind in ON_RUNS
        ):
            return
        if kind == "driver-killed":
            tally.add(kind, driver.kill())
        elif kind == "worker-killed":
            tally.add(kind, self._kill_worker(driver))
        elif kind in ("worker-left", "worker-joined"):
            tally.add(kind, self._change_crew(kind))
        elif kind == "disk-full":
            self._fill(driver)
        elif tally.num_armed < MOST_ARMED:
            number = tally.arm(kind)
            self.world.proxy.say({"id": number, **proxy_fault(kind, self.generator)})

    def _kill_worker(self, driver: Driver) -> int:
        workers = driver.workers() if self.crew is None else [psutil.Process(one.pid) for one in self.crew.alive()]
        if not workers:
            return 0
        with contextlib.suppress(psutil.NoSuchProcess):
            self.generator.choice(workers).kill()
            return 1
        return 0

    def _change_crew(self, kind: str) -> int:
        """A worker that is taken away in good order, or one more."""
        assert self.crew is not None
        alive = self.crew.alive()
        if kind == "worker-joined":
            if len(alive) >= 2 * self.what.num_workers:
                return 0
            self.crew.join()
            return 1
        if len(alive) < 2:
            return 0
        self.generator.choice(alive).send_signal(signal.SIGTERM)
        return 1

    def _fill(self, driver: Driver) -> None:
        """Fill the disk for some seconds; it counts once the run says that it met it."""
        if self.disk is None or self.full_until is not None:
            return
        if not (Path(self.out) / MANIFEST).exists():  # a run that can't even begin a store ends at once, and says why
            return
        self.num_full_words = driver.said().count(FULL_WORDS)
        self.full_until = time.monotonic() + self.generator.uniform(*FULL_S)
        self.disk.fill(driver)

    def _look_after_the_disk(self, now: float) -> None:
        if self.disk is None or self.full_until is None or now < self.full_until:
            return
        (driver,) = self.drivers
        self.disk.free(driver)
        self.full_until = None
        self.outcome.tally.add("disk-full", driver.said().count(FULL_WORDS) > self.num_full_words)

    def _hear(self) -> None:
        for said in self.world.proxy.heard():
            self.outcome.tally.heard(said["id"], said["hits"])
        if self.crew is not None:  # nobody else starts a worker that died
            for _ in range(self.what.num_workers - len(self.crew.alive())):
                self.crew.join()

    def _is_done(self, driver: Driver) -> bool:
        """Whether a driver came to its end; one that was killed is started again."""
        code = driver.code()
        if code is None or code == 0:
            return code == 0
        if code == -signal.SIGKILL:
            driver.wait_for_workers(ORPHANS_S)
            driver.start()
        elif code == 1 and NO_ROOM in driver.said().splitlines()[-1]:  # before it began to dump: then it stops cleanly
            self.outcome.num_stopped += 1
            driver.start()
        elif code == 1 and self.what.num_drivers > 1:  # refused beside the other; it must come through alone
            self.outcome.num_refused += 1
            driver.start()
        else:
            self.outcome.problems.append(
                f"{self.what.name}: expected {driver.name} to come to its end, got exit code {code}; "
                f"its last words: {driver.said()[-400:]!r}"
            )
        return False

    def _close(self) -> None:
        """Wait for the faults that are under way, and look at what the drivers left behind."""
        self.world.proxy.say(CALM)
        deadline = time.monotonic() + 20
        while self.outcome.tally.num_armed and time.monotonic() < deadline:
            time.sleep(STEP_S)
            self._hear()
        for driver in self.drivers:
            self.outcome.num_starts += driver.num_starts
            self.outcome.num_deaths += len(re.findall(r"^worker .* died", driver.said(), re.MULTILINE))
            if driver.num_orphans:
                self.outcome.problems.append(
                    f"{self.what.name}: expected the workers of a killed driver to end within {ORPHANS_S:.0f} s, got "
                    f"{driver.num_orphans} that stayed"
                )
            if "Traceback" in driver.said():
                self.outcome.problems.append(f"{self.what.name}: expected no traceback, got one in {driver.log}")

    def _compare(self) -> None:
        reference = self.world.references[self.what.data]
        keys = None if self.what.is_local else frozenset(self._keys())
        self.outcome.problems += problems(self.out, reference, keys)
        with open_store(self.out) as store:
            self.outcome.content_digest = store.content_digest
            self.outcome.num_quarantined = len(store.quarantine())

    def _keys(self) -> Iterator[str]:
        """All objects of the store on S3, asked of the server itself."""
        for entry in open_place(self.out).list():
            yield entry.key
