"""The dump on workers: of this machine, and on a cluster whose processes were started by hand."""

import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from storage.arrays import STATUS_OK, STATUS_UNDECODABLE
from storage.errors import DamageError, PathError, RemoteError, StoreError
from storage.reader import open_store
from teacherdump.cluster import absolute, card_of
from teacherdump.cluster_bisect import Piece
from teacherdump.cluster_local import cuda_devices
from teacherdump.cluster_work import Failure, Plan, TeacherSpec, check_worker
from teacherdump.config import DumpConfig
from teacherdump.preview import preview
from teacherdump.run import run
from teacherdump.source import open_source
from tests.s3 import S3Server

NUM_ROWS = 96
KILLER, NAN = 37, 70  # rows that are marked

# What it does with a marked sample depends on the name of a file; the rows are those of a linear model in any case.
TEACHERS = """
import os, pathlib, time, torch

class Odd(torch.nn.Linear):
    def forward(self, inputs):
        folder = pathlib.Path(__file__).parent
        with (folder / "processes").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        limit = time.monotonic() + 60
        while (folder / "waiting").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        if (inputs[:, 0] == 666).any() and (folder / "killing").exists():
            os._exit(1)
        return super().forward(inputs)

def make():
    return Odd(12, 5)
"""

Config = Callable[..., DumpConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of code, and a corpus with a marked row and one that makes NaN."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "odd_teachers.py").write_text(TEACHERS)
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(12, 5).state_dict(), folder / "teacher.pt")
    rows = np.random.default_rng(0).normal(size=(NUM_ROWS, 12)).astype(np.float32) * 2
    rows[KILLER, 0], rows[NAN] = 666, np.nan
    np.save(folder / "corpus.npy", rows)
    np.save(folder / "labels.npy", np.arange(NUM_ROWS) % 5)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A dump of the corpus in shards of 8 rows, run in the folder."""
    monkeypatch.chdir(folder)

    def build(**options: Any) -> DumpConfig:
        defaults: dict[str, Any] = {"models": ("teacher.pt",), "arch": "odd_teachers:make", "data": "corpus.npy"}
        defaults |= {"labels": "labels.npy", "out": str(tmp_path / "out.zarr"), "device": "cpu", "batch_size": 4}
        return DumpConfig(**{**defaults, "shard_rows": 8, "chunk_rows": 4, "readers": 1, **options})

    return build


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    """The content digest of a run in one process."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        options: dict[str, Any] = {"models": ("teacher.pt",), "arch": "odd_teachers:make", "data": "corpus.npy"}
        options |= {"labels": "labels.npy", "out": str(folder / "one.zarr"), "device": "cpu", "batch_size": 4}
        digest = run(DumpConfig(**options, shard_rows=8, chunk_rows=4)).content_digest
    finally:
        os.chdir(here)
    assert digest is not None
    return digest


class Cluster:
    """A scheduler and workers, each a process of its own, started by hand."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.processes: list[subprocess.Popen[bytes]] = []
        self.file = folder / "scheduler.json"
        self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        while not self.file.exists():
            time.sleep(0.05)
        self.address = str(__import__("json").loads(self.file.read_text())["address"])

    def _start(self, name: str, *options: str, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"distributed.cli.{name}", "--scheduler-file", str(self.file), *options]
        env = {**os.environ, **self.environment, "OMP_NUM_THREADS": "1"}
        with (self.folder / "cluster.log").open("ab") as log:
            self.processes.append(subprocess.Popen(command, cwd=cwd or self.folder, env=env, stdout=log, stderr=log))
        return self.processes[-1]

    def add_worker(self, cwd: Path | None = None) -> "subprocess.Popen[bytes]":
        return self._start("dask_worker", "--no-dashboard", "--nthreads", "2", "--no-nanny", cwd=cwd)

    def wait_for(self, num_workers: int) -> None:
        """Until just so many workers are there."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == num_workers)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@pytest.fixture(scope="module")
def cluster(folder: Path, s3_server: S3Server) -> Iterator[Cluster]:
    """A cluster of one worker, which has the credentials of an object store; tests add more workers."""
    cluster = Cluster(folder, s3_server.environment)
    cluster.add_worker()
    yield cluster
    cluster.close()


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    limit = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < limit, "expected it within a minute, got nothing"
        time.sleep(0.02)


def processes_that_scored(folder: Path) -> set[int]:
    path = folder / "processes"
    return {int(line) for line in path.read_text().split()} if path.exists() else set()


def start_driver(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """The command, in the folder."""
    command = [sys.executable, "-c", "from teacherdump.cli import main; main()", "run", "--model", "teacher.pt"]
    command += ["--arch", "odd_teachers:make", "--data", "corpus.npy", "--labels", "labels.npy", "--device", "cpu"]
    command += ["--batch-size", "4", "--shard-rows", "8", "--chunk-rows", "4", *options]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    # As in the foreground: tests may run in a background job, where SIGINT is ignored.
    heed: Any = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)  # noqa: PLW1509


# On a cluster that was started by hand


@pytest.mark.slow
def test_one_two_and_four_workers_give_what_one_process_gives(
    cluster: Cluster, config: Config, undisturbed: str, tmp_path: Path
) -> None:
    for num_workers in (1, 2, 4):
        while len(cluster.processes) < 1 + num_workers:
            cluster.add_worker()
        cluster.wait_for(num_workers)
        (cluster.folder / "processes").unlink(missing_ok=True)
        out, lines = str(tmp_path / f"{num_workers}.zarr"), list[str]()
        result = run(config(out=out, scheduler=cluster.address), say=lines.append)
        assert result.content_digest == undisturbed
        assert result.num_refused == 1
        workers = processes_that_scored(cluster.folder)
        assert os.getpid() not in workers
        assert len(workers) == num_workers
        assert re.match("(workers|dashboard): http://127.0.0.1:", lines[0])


@pytest.mark.slow
def test_workers_may_come_and_go_in_the_middle(cluster: Cluster, config: Config, folder: Path, tmp_path: Path) -> None:
    small = {"shard_rows": 2, "chunk_rows": 2, "batch_size": 1}
    expected = run(config(out=str(tmp_path / "whole.zarr"), **small)).content_digest
    lines = list[str]()
    with ThreadPoolExecutor(1) as pool:
        driver = pool.submit(run, config(scheduler=cluster.address, **small), lines.append)
        try:
            wait_until(lambda: any((tmp_path / "out.zarr" / "seals").glob("*.json")) or driver.done())
            (folder / "waiting").touch()
            (folder / "processes").unlink()
            killed, ended = cluster.processes[-2:]
            joined = cluster.add_worker()
            wait_until(lambda: {joined.pid, killed.pid} <= processes_that_scored(folder) or driver.done())
            with pytest.raises(PathError, match="another teacherdump run is writing this store"):
                run(config(**small))
            killed.kill()
            ended.terminate()
            cluster.wait_for(3)
        finally:
            (folder / "waiting").unlink()
        assert driver.result().content_digest == expected
    assert any("worker tcp://127.0.0.1" in line and "died; it had shard" in line for line in lines), lines


@pytest.mark.slow
def test_two_drivers_of_one_remote_store_both_end_with_the_one_correct_store(
    cluster: Cluster, s3: S3Server, config: Config, undisturbed: str
) -> None:
    out = s3.url("out.zarr")
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, config(out=out, scheduler=cluster.address)) for _ in range(2)]
        assert {driver.result().content_digest for driver in runs} == {undisturbed}
    with open_store(out) as store:
        for shard in store.sealed_shards():
            store.check_shard(shard)


@pytest.mark.slow
def test_hdf5_is_written_by_many_workers_too(
    cluster: Cluster, config: Config, undisturbed: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.h5")
    assert run(config(out=out, scheduler=cluster.address)).content_digest == undisturbed


def test_a_worker_that_does_not_see_the_corpus_is_named_before_anything_runs(
    cluster: Cluster, config: Config, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus.npy").write_bytes((folder / "corpus.npy").read_bytes())
    os.chdir(tmp_path)
    here = {"models": (str(folder / "teacher.pt"),), "labels": str(folder / "labels.npy")}
    (tmp_path / "corpus.npy").rename(tmp_path / "mine.npy")
    with pytest.raises(StoreError, match=r"corpus '/proc/self/cwd/mine.npy': .* \[worker tcp://127.0.0.1:\d+\]"):
        run(config(scheduler=cluster.address, data="/proc/self/cwd/mine.npy", **here))
    assert not (tmp_path / "out.zarr").exists()


def test_a_worker_that_does_not_see_the_store_is_named_before_anything_runs(
    cluster: Cluster, config: Config, folder: Path, tmp_path: Path
) -> None:
    os.chdir(tmp_path)
    options = {"models": (str(folder / "teacher.pt"),), "labels": str(folder / "labels.npy")}
    options |= {"data": str(folder / "corpus.npy"), "out": "/proc/self/cwd/mine.zarr"}
    with pytest.raises(
        PathError, match=r"'/proc/self/cwd/mine.zarr': expected the store that the run writes, got nothing .* \[worker "
    ):
        run(config(scheduler=cluster.address, **options))
    assert not (tmp_path / "mine.zarr").exists()


def test_a_driver_that_is_killed_goes_on_from_the_seals(
    cluster: Cluster, config: Config, undisturbed: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.zarr"
    driver = start_driver(folder, "--out", str(out), "--scheduler", cluster.address)
    wait_until(lambda: any((out / "seals").glob("*.json")) or driver.poll() is not None)
    driver.kill()
    driver.communicate()
    with contextlib.suppress(PathError), open_store(out) as store:
        assert not store.finalized
    lines: list[str] = []
    assert run(config(scheduler=cluster.address), say=lines.append).content_digest == undisturbed
    assert any(line.startswith("going on: ") for line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_driver_with_whole_shards(
    cluster: Cluster, folder: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out.zarr"
    driver = start_driver(folder, "--out", str(out), "--scheduler", cluster.address)
    wait_until(lambda: any((out / "seals").glob("*.json")) or driver.poll() is not None)
    driver.send_signal(number)
    _, stderr = driver.communicate(timeout=60)
    with open_store(out) as store:
        if store.finalized:
            pytest.skip("it was done before the signal came")
        assert (driver.returncode, stderr.splitlines()[-1][:12]) == (code, "interrupted:")
        assert "run the same command again to go on" in stderr
        for shard in store.sealed_shards():
            store.check_shard(shard)


def test_a_scheduler_that_is_not_there_is_said_in_one_line(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherdump.cluster_local.CONNECT_S", 0.3)
    with pytest.raises(PathError, match=r"scheduler 'tcp://127.0.0.1:1': expected a Dask scheduler that answers, got"):
        run(config(scheduler="tcp://127.0.0.1:1"))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_server_that_is_no_scheduler_is_said_in_one_line(
    config: Config, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr("teacherdump.cluster_local.CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken = stack.enter_context(server.accept()[0])
                    taken.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(PathError, match=f"scheduler '{address}': expected a Dask scheduler that answers, got"):
            run(config(scheduler=address))
        server.shutdown(socket.SHUT_RDWR)


def test_a_scheduler_behind_tls_needs_certificates_in_the_configuration(config: Config) -> None:
    message = r"scheduler 'tls://127.0.0.1:1': expected certificates in Dask's configuration .*, got none"
    with pytest.raises(PathError, match=message):
        run(config(scheduler="tls://127.0.0.1:1"))


# On workers of this machine


@pytest.mark.slow
def test_a_sample_that_kills_its_workers_is_quarantined_and_all_others_are_as_without_it(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    small = {"shard_rows": 2, "chunk_rows": 2, "batch_size": 2}
    (folder / "killing").touch()
    lines: list[str] = []
    try:
        result = run(config(workers=2, out=str(tmp_path / "two.zarr"), **small), say=lines.append)
    finally:
        (folder / "killing").unlink()
    assert result.content_digest is not None
    assert result.num_refused == 2
    assert any(f"row {KILLER}: the worker that ran this sample died" in line for line in lines), lines
    whole = str(tmp_path / "whole.zarr")
    run(config(out=whole, **small))
    with open_store(tmp_path / "two.zarr") as found, open_store(whole) as expected:
        for name in (spec.name for spec in expected.manifest.arrays):
            left, right = found.read([name], 0, NUM_ROWS)[name], expected.read([name], 0, NUM_ROWS)[name]
            others = np.arange(NUM_ROWS) != KILLER
            np.testing.assert_array_equal(left[others], right[others], name)
        status = found.read(["status", "sample_digest"], 0, NUM_ROWS)
        assert status["status"][KILLER] == STATUS_UNDECODABLE
        assert status["sample_digest"][KILLER] == 0
        assert (status["status"] == STATUS_OK).sum() == NUM_ROWS - 2
        reasons = {entry.row: entry.reason for entry in found.quarantine()}
        assert "the worker that ran this sample died, " in reasons[KILLER]


def test_workers_of_this_machine_end_with_their_driver(folder: Path, tmp_path: Path) -> None:
    (folder / "processes").unlink(missing_ok=True)
    driver = start_driver(folder, "--out", str(tmp_path / "out.zarr"), "--workers", "1")
    wait_until(lambda: bool(processes_that_scored(folder)) or driver.poll() is not None)
    (worker,) = processes_that_scored(folder)
    assert psutil.Process(driver.pid) in psutil.Process(worker).parents()
    driver.kill()
    driver.communicate()
    wait_until(lambda: not psutil.pid_exists(worker), 20)


# Without a cluster


def card_parts(config: DumpConfig) -> tuple[Any, TeacherSpec]:
    source = open_source(config)
    spec = TeacherSpec(
        (absolute("teacher.pt"),), config.arch, None, "cpu", "fp32", False, False, str(source.identity["digest"])
    )
    return source, spec


def failure_of(card: Any) -> str:
    answer: Any = check_worker(card)
    assert isinstance(answer, Failure)
    return str(answer.error)


def test_a_worker_says_what_it_does_not_see(config: Config) -> None:
    source, spec = card_parts(config())
    card = card_of(source, spec)
    assert check_worker(card) is None
    (name, version), *others = card.versions
    wrong = replace(card, versions=((name, "0.0.1"), *others))
    assert f"{name}: expected version 0.0.1, as the run has it, got {version}; install that" in failure_of(wrong)
    wrong = replace(card, teacher=replace(spec, digest="0" * 64))
    assert "expected the one that the run was begun with (000000000000), got another file" in failure_of(wrong)
    wrong = replace(card, teacher=replace(spec, models=("/nowhere/teacher.pt",)))
    assert "teacher '/nowhere/teacher.pt': expected a model file, got nothing there" in failure_of(wrong)
    wrong = replace(card, samples=(replace(card.samples[1], digest=5),))
    assert f"row {card.samples[1].row}: expected the sample that the run sees, got another one" in failure_of(wrong)
    wrong = replace(card, out="/nowhere/out.zarr", manifest_sha256="0")
    assert "store '/nowhere/out.zarr': expected the store that the run writes, got nothing there" in failure_of(wrong)


def test_a_worker_refuses_another_store_under_the_same_path(config: Config) -> None:
    source, spec = card_parts(config())
    run(config(limit_samples=1))
    card = replace(card_of(source, spec), out=config().out, manifest_sha256="0" * 64)
    assert "expected the store that the run writes, got another one there" in failure_of(card)


def test_tasks_are_small_and_carry_no_credentials(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.setenv(name, "SecretThatIsNowhere")
    source, spec = card_parts(config())
    plan = Plan("run", spec, "s3://bucket/out.zarr", "0" * 64, 4, None, ("constant",))
    task = pickle.dumps((plan, Piece(3, 24, 32), source.corpus.part(24, 32)))
    assert b"SecretThatIsNowhere" not in task + pickle.dumps(card_of(source, spec))
    assert len(task) < 4096


def test_more_workers_than_devices_and_devices_that_are_not_there_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacherdump.cluster_local.cuda_devices", lambda _: ["0", "3"])
    with pytest.raises(ValueError, match="workers: expected at most 2, one for each CUDA device, got 3; give fewer"):
        run(config(workers=3, device="auto"))
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected CUDA devices of this machine, got none"):
            cuda_devices(config(workers=1, device="cuda"))


def test_a_plan_reckons_with_the_workers_of_this_machine_only(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherdump.preview.TIMED_S", 0.01)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    one, two = preview(config()), preview(config(workers=2))
    assert (one.num_workers, two.num_workers) == (1, 2)
    assert two.summary().endswith(" with 2 workers")
    assert "workers" not in one.summary()
    with pytest.raises(ValueError, match="scheduler: expected none with plan, which times the teacher on this machine"):
        preview(config(scheduler="tcp://a:1"))


@pytest.mark.parametrize(
    "error", [DamageError("bad", shard=3, array="values", chunk=1), RemoteError("away"), PathError("no")]
)
def test_an_error_comes_back_from_a_worker_as_it_was(error: StoreError) -> None:
    again = pickle.loads(pickle.dumps(Failure(error))).error
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"workers": 2, "scheduler": "tcp://a:1"}, "workers: expected none beside a scheduler"),
        ({"scheduler": "a:1"}, "scheduler: expected an address such as tcp://host:8786, got 'a:1'"),
        ({"scheduler": "tcp://a"}, "scheduler: expected an address such as tcp://host:8786, got 'tcp://a'"),
        ({"workers": 2, "device": "cuda:1"}, "device: expected auto, cpu or cuda with several workers"),
    ],
)
def test_options_of_workers_that_contradict_each_other_are_refused(
    config: Config, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)
