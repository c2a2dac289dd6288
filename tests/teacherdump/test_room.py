"""A full disk: the run waits, says so once, and goes on by itself, or stops as it did before."""

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.encodings import HeadArrays, Hidden
from storage.errors import OutOfSpaceError
from storage.interruption import Interrupted
from storage.reader import open_store
from teacherdump import dump as dump_module
from teacherdump import room as room_module
from teacherdump.config import DumpConfig
from teacherdump.room import Room, free_bytes
from teacherdump.run import run
from tests.contracts.small import small_manifest

Build = Callable[..., DumpConfig]


def never() -> bool:
    return False


class Disk:
    """A write that fails a number of times, and the pauses between."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures, self.calls, self.slept, self.said = num_failures, 0, 0.0, list[str]()

    def write(self) -> str:
        self.calls += 1
        if self.calls <= self.num_failures:
            raise OutOfSpaceError("x.zarr: expected room on the disk, got none")
        return "written"

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def room(self, hours: float = 1.0, path: str = "s3://bucket/x.zarr") -> Room:
        return Room(path, hours, self.said.append, self.sleep)


def test_a_write_is_tried_again_in_longer_and_longer_pauses_until_there_is_room() -> None:
    disk = Disk(7)
    assert disk.room().keep_trying(disk.write, 1_000_000, never) == "written"
    assert disk.slept == pytest.approx(1 + 2 + 4 + 8 + 16 + 30 + 30)
    assert disk.said == [
        (
            "waiting: s3://bucket/x.zarr is full: what is written next takes up to 1 MB; free space, and the run "
            "goes on by itself; it waits 1 h 00 min"
        ),
        "going on: there is room again, after 1 min 31 s",
    ]


def test_a_write_that_finds_no_room_in_time_fails_as_it_did() -> None:
    disk = Disk(10**6)
    with pytest.raises(OutOfSpaceError, match="expected room on the disk, got none"):
        disk.room(0.1).keep_trying(disk.write, 1000, never)
    assert disk.slept == pytest.approx(360)
    assert len(disk.said) == 1


def test_nobody_waits_where_no_waiting_was_asked_for() -> None:
    disk = Disk(1)
    with pytest.raises(OutOfSpaceError):
        disk.room(0).keep_trying(disk.write, 1000, never)
    assert (disk.slept, disk.said) == (0, [])


def test_a_stop_ends_the_waiting() -> None:
    disk = Disk(10**6)
    with pytest.raises(OutOfSpaceError):
        disk.room().keep_trying(disk.write, 1000, lambda: disk.slept > 5)
    assert disk.slept < 6


def test_the_time_begins_anew_with_each_full_disk() -> None:
    disk = Disk(5)
    room = disk.room(40 / 3600)
    room.keep_trying(disk.write, 1000, never)
    disk.calls = 0
    room.keep_trying(disk.write, 1000, never)
    assert len(disk.said) == 4


def test_a_local_disk_is_asked_before_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, free = Disk(1), [100]

    def sleep(seconds: float) -> None:
        disk.sleep(seconds)
        free[0] = 5000 if disk.slept > 20 else 100

    monkeypatch.setattr(room_module, "free_bytes", lambda _: free[0])
    room = Room(str(tmp_path / "x.zarr"), 1, disk.said.append, sleep)
    assert room.keep_trying(disk.write, 1000, never) == "written"
    assert disk.calls == 2  # not once while there were 100 bytes
    assert "takes up to 1 kB, 100 B are free" in disk.said[0]


def test_what_is_free_is_known_of_local_paths_alone(tmp_path: Path) -> None:
    assert (free_bytes(str(tmp_path / "not" / "yet" / "x.zarr")) or 0) > 0
    assert free_bytes("s3://bucket/x.zarr") is None


# Runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(room_module, "LOOK_EVERY_S", 0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("suffix", "first"), [("zarr", 90), ("h5", 20)])
def test_a_run_waits_for_room_and_gives_the_same_store(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, first: int
) -> None:
    undisturbed = run(config(out=str(tmp_path / f"a.{suffix}"))).content_digest
    sync, calls, said = os.fsync, [0], list[str]()

    def full(descriptor: int) -> None:
        calls[0] += 1
        if first < calls[0] < first + 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run(config(out=str(tmp_path / f"b.{suffix}")), said.append).content_digest == undisturbed
    assert [text.split(":")[0] for text in said][:2] == ["waiting", "going on"]


@pytest.mark.usefixtures("quick")
def test_a_real_limit_is_waited_out(config: Build, tmp_path: Path) -> None:
    options, said = config(run_log="none", values="float32", shard_rows=64), list[str]()
    undisturbed = run(config(out=str(tmp_path / "a.zarr"), values="float32", shard_rows=64)).content_digest
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(config(run_log="none", values="float32", shard_rows=64, limit_samples=64))

    def lift(text: str) -> None:
        said.append(text)
        if text.startswith("waiting"):
            threading.Timer(0.3, resource.setrlimit, (resource.RLIMIT_FSIZE, before)).start()

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        result = run(options, lift)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert result.content_digest == undisturbed
    assert [text.split(":")[0] for text in said][-2:] == ["waiting", "going on"]


def test_a_signal_ends_the_waiting_and_the_run(config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = dump_module.write_shard, [0]

    def full(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 2:
            raise OutOfSpaceError("full")
        return write(*args)

    def interrupt(text: str) -> None:
        if text.startswith("waiting"):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(dump_module, "write_shard", full)
    start = time.perf_counter()
    with pytest.raises(Interrupted, match="interrupted while the disk was full: 64 of 200 rows are sealed") as stop:
        run(config(), interrupt)
    assert stop.value.exit_code == 143
    assert time.perf_counter() - start < 10


def test_an_error_elsewhere_does_not_wait_for_room(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()

    def full(*_: Any) -> Any:
        raise OutOfSpaceError("full")

    def note(text: str) -> None:
        if text.startswith("waiting"):
            waiting.set()

    def fail(*_: Any) -> None:
        waiting.wait(10)
        raise OSError(errno.EIO, "broken")

    looks = [0]

    def second_fails(*args: Any) -> None:
        looks[0] += 1
        if looks[0] == 2:
            fail(*args)

    monkeypatch.setattr(dump_module, "write_shard", full)
    monkeypatch.setattr(dump_module, "_look_at", second_fails)
    start = time.perf_counter()
    with pytest.raises(OSError, match="broken"):
        run(config(), note)
    assert time.perf_counter() - start < 10


@pytest.mark.usefixtures("quick")
def test_finalizing_waits_for_room_too(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.writer import StoreWriter

    finalize, calls, said = StoreWriter.finalize, [0], list[str]()

    def full(*args: Any, **options: Any) -> str:
        calls[0] += 1
        if calls[0] < 3:
            raise OutOfSpaceError("full")
        return finalize(*args, **options)

    monkeypatch.setattr(StoreWriter, "finalize", full)
    assert run(config(), said.append).content_digest is not None
    assert [text.split(":")[0] for text in said] == ["waiting", "going on"]


def test_hours_that_can_not_be_waited_are_refused(config: Build) -> None:
    with pytest.raises(ValueError, match=r"wait_for_room: expected hours, 0 or more, got -1"):
        config(wait_for_room=-1.0)


@pytest.mark.parametrize("name", ["out.zarr", "out.h5"])
def test_a_store_that_found_no_room_for_its_head_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import numpy as np

    from storage.head import head_digest, head_records
    from storage.writer import StoreWriter

    head = HeadArrays(np.ones((7, 4), np.float32), None)
    hidden = small_manifest(encoding=Hidden(4, "float16", head_sha256=head_digest(head)), num_classes=7)
    sync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from storage import writer

    real = head_records
    monkeypatch.setattr(writer, "head_records", lambda found: (monkeypatch.setattr(os, "fsync", full), real(found))[1])
    with pytest.raises(OutOfSpaceError):
        StoreWriter.open(tmp_path / name, hidden, head)
    monkeypatch.setattr(os, "fsync", sync)
    assert list(tmp_path.iterdir()) == []
    assert calls[0] > 0
    with StoreWriter.open(tmp_path / name, small_manifest(num_classes=7)) as begun:
        assert begun.owed_shards()
    with open_store(tmp_path / name) as store:
        assert store.manifest.num_classes == 7
