"""A kill at any moment leaves every sealed shard readable, and the finished store equal to an undisturbed one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from storage.backends import backend_for
from storage.errors import PathError
from storage.reader import Store, open_store
from storage.records import MANIFEST
from storage.writer import StoreWriter
from tests.contracts.small import (
    ENCODINGS,
    assert_same,
    compressor_of,
    expected_rows,
    make_backend,
    names_of,
    path_of,
    small_manifest,
    write,
)

ROOT = Path(__file__).parents[2]
NUM_ROWS = 96  # 12 shards

WRITER = """
import os, random, signal, sys, threading, time
from pathlib import Path
from tests.contracts.small import *
kind, path, patience, shards = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
os.fsync = lambda descriptor: None  # a kill loses nothing that the kernel has
manifest = small_manifest(num_rows=96, compressor=compressor_of(kind))
def kill():
    time.sleep(patience)
    os.kill(os.getpid(), signal.SIGKILL)
if patience >= 0:
    threading.Thread(target=kill, daemon=True).start()
with StoreWriter.open(path, manifest) as writer:
    print("open", flush=True)
    for shard in map(int, shards) if shards else writer.owed_shards():
        write(writer, shard)
    if not shards:
        print(writer.finalize(), flush=True)
"""


def start_writer(kind: str, path: Path, patience_s: float = -1, *shards: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, kind, str(path), str(patience_s), *map(str, shards)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def undisturbed(**fields: object) -> str:
    with StoreWriter.on(make_backend("memory", Path())(), small_manifest(**fields)) as writer:
        write(writer)
        return writer.finalize()


def check_sealed(path: Path) -> int:
    """How many shards are sealed, each of them whole."""
    with Store(backend_for(path)) as store:
        rows = expected_rows(store.manifest, 0, store.layout.num_rows)
        for shard in store.sealed_shards():
            seal = store.check_shard(shard)
            found = store.read(names_of(store.manifest), seal.start, seal.stop)
            assert_same(found, {name: values[seal.start : seal.stop] for name, values in rows.items()})
        return len(store.sealed_shards())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr-zstd", "hdf5-none"])
def test_kills_at_random_moments_change_nothing(kind: str, tmp_path: Path) -> None:
    path = path_of(kind, tmp_path)
    generator = random.Random(5)
    num_kills = 0
    for _ in range(200):
        with start_writer(kind, path, generator.uniform(0, 0.15)) as process:
            output = process.communicate()[0]
        if backend_for(path).get_record(MANIFEST) is not None:
            check_sealed(path)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        num_kills += 1
        if num_kills == 5:  # enough; now to the end
            with start_writer(kind, path) as process:
                output = process.communicate()[0]
            break
    assert num_kills >= 1
    assert output.split()[-1] == undisturbed(num_rows=NUM_ROWS)
    with open_store(path) as store:
        store.backend.check_final()
        assert check_sealed(path) == 12
    assert not list(tmp_path.rglob("*.partial"))
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


LITTLE: dict[str, Any] = {"num_rows": 12, "has_hard_targets": False, "encoding": ENCODINGS["dense-float16"]}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it and mend."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stride"), [("zarr-none", 13), ("hdf5-zstd", 3)])
def test_a_kill_before_any_one_system_call_changes_nothing(kind: str, stride: int, tmp_path: Path) -> None:
    """Each file that is opened, renamed, linked or removed in turn is where the process stops."""
    expected = undisturbed(**LITTLE)
    num_calls = 0
    last_call = -1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_calls
        if not is_watching or event not in ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if str(tmp_path) not in str(arguments[0]):
            return
        num_calls += 1
        if num_calls > last_call >= 0:
            raise Killed

    is_watching = False
    sys.addaudithook(audit)
    try:
        for number in range(400):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            num_calls, last_call, is_watching = 0, number * stride, True
            try:
                run_once(kind, folder)
                is_watching = False
                break
            except Killed:
                is_watching = False
            path = path_of(kind, folder)
            if backend_for(path).get_record(MANIFEST) is not None:
                check_sealed(path)
            assert run_once(kind, folder) == expected
            assert check_sealed(path) == 2
            assert not list(folder.rglob("*.partial"))
        else:
            raise AssertionError("expected a run that comes through, got none")
        assert number > 5
    finally:
        is_watching = False


def run_once(kind: str, folder: Path) -> str:
    with StoreWriter.open(path_of(kind, folder), small_manifest(**LITTLE, compressor=compressor_of(kind))) as writer:
        write(writer)
        return writer.finalize()


@pytest.mark.parametrize("kind", ["zarr-none", "hdf5-zstd"])
def test_two_processes_write_different_shards_at_once(kind: str, tmp_path: Path) -> None:
    path = path_of(kind, tmp_path)
    with start_writer(kind, path, -1, *range(0, 12, 2)) as even, start_writer(kind, path, -1, *range(1, 12, 2)) as odd:
        even.communicate()
        odd.communicate()
    assert (even.returncode, odd.returncode) == (0, 0)
    assert check_sealed(path) == 12
    with StoreWriter.open(path, small_manifest(num_rows=NUM_ROWS, compressor=compressor_of(kind))) as writer:
        assert writer.finalize() == undisturbed(num_rows=NUM_ROWS)


@pytest.mark.parametrize("kind", ["zarr-zstd", "hdf5-none"])
def test_the_same_run_started_twice_at_once_gives_the_same_store(kind: str, tmp_path: Path) -> None:
    path = path_of(kind, tmp_path)
    with start_writer(kind, path) as first, start_writer(kind, path) as second:
        first.communicate()
        second.communicate()
    assert 0 in (first.returncode, second.returncode)
    with open_store(path) as store:
        assert store.content_digest == undisturbed(num_rows=NUM_ROWS)
    assert check_sealed(path) == 12


def test_a_killed_writer_holds_up_nobody(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    with start_writer("zarr-none", path, -1, *([0] * 3)) as process:
        process.wait()
    lock = path / "seals" / "00000001.json.lock.partial"
    lock.write_bytes(b"")  # what a kill leaves
    began = time.monotonic()
    with StoreWriter.open(path, small_manifest(num_rows=NUM_ROWS)) as writer:
        write(writer, 1)
        assert writer.sealed_shards() == (0, 1)
    assert time.monotonic() - began < 5
    assert not lock.exists()


def test_an_interrupted_creation_is_done_again(tmp_path: Path) -> None:
    manifest = small_manifest()
    whole = tmp_path / "whole.zarr"
    backend_for(whole).create(manifest)
    keys = sorted(path.relative_to(whole) for path in whole.rglob("zarr.json"))
    keys.sort(key=lambda key: len(key.parts))
    for number in range(len(keys) + 1):
        path = tmp_path / f"{number}.zarr"
        path.mkdir()
        for key in keys[:number]:
            (path / key).parent.mkdir(exist_ok=True)
            (path / key).write_bytes((whole / key).read_bytes())
        (path / "zarr.json.0123.partial").write_bytes(b"{")
        with pytest.raises(PathError, match="got something without a manifest"):
            open_store(path)
        with StoreWriter.open(path, manifest) as writer:
            write(writer)
            writer.finalize()
            assert writer.store.check_shard(2).stop == 22


def test_an_interrupted_creation_of_parts_is_done_again(tmp_path: Path) -> None:
    parts = tmp_path / "store.h5.parts"
    parts.mkdir()
    (parts / "manifest.json.0123.partial").write_bytes(b"{")
    with pytest.raises(PathError, match="got something without a manifest"):
        open_store(tmp_path / "store.h5")
    with StoreWriter.open(tmp_path / "store.h5", small_manifest()) as writer:
        write(writer)
        writer.finalize()
