"""Where the workers of a run are: a cluster of this machine that ends with the run, or one that is there already."""

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage.scheduler import check_scheduler, no_answer
from teacherdump.cluster_team import SHARDS_IN_FLIGHT, Team, WorkerDiedError, clear_of_the_scheduler
from teacherdump.config import DumpConfig
from teacherdump.source import MOST_READERS

CONNECT_S = 20.0  # until a scheduler must have answered
CLOSE_S = 5.0  # that a cluster is given to close itself
MOST_DEATHS_AT_START = 3  # a worker, before all of them are there
START_LOOK_S = 0.05
TORNADO_LOG = "tornado.application"


@contextlib.contextmanager
def open_team(config: DumpConfig, say: Callable[[str], object]) -> Iterator[Team]:
    """The workers of a run: `workers` processes of this machine, or those of the cluster at `scheduler`.

    Leaving it ends the workers of this machine, and leaves those of another cluster alone.

    Raises:
        StoreError: no scheduler answers, or it has no worker.
        ValueError: more workers than CUDA devices.
    """
    with _cluster(config) as cluster, _client(cluster) as client:
        _say_where_to_look(client, say)
        num_readers = config.readers
        if config.workers is not None and num_readers is None:
            num_readers = min(MOST_READERS, threads_of_a_worker(config.workers))
        team = Team(client, num_readers, revive=functools.partial(_revive, cluster))
        with clear_of_the_scheduler():
            team.watch()
        try:
            yield team
        finally:
            team.unwatch()


def threads_of_a_worker(num_workers: int) -> int:
    """Cores of this machine that each of some workers gets."""
    return max(1, len(os.sched_getaffinity(0)) // num_workers)


@contextlib.contextmanager
def _cluster(config: DumpConfig) -> Iterator[Any]:
    """What a client connects to: an address, or a cluster of this machine."""
    if config.scheduler is not None:
        yield config.scheduler
        return
    assert config.workers is not None
    devices = devices_of_workers(config)
    import dask
    from distributed import Nanny, Scheduler
    from distributed.deploy.spec import SpecCluster

    threads = threads_of_a_worker(config.workers)
    options = {"nthreads": SHARDS_IN_FLIGHT, "host": "127.0.0.1", "memory_limit": 0, "dashboard": False}
    options |= {"silence_logs": logging.CRITICAL, "preload": ["teacherdump.cluster_work"]}
    spec = {
        number: {
            "cls": Nanny,
            "options": options | {"env": {"CUDA_VISIBLE_DEVICES": devices[number]} if devices else {}},
        }
        for number in range(config.workers)
    }
    # One death brings a task back at once. No limit of memory: what a worker holds is bounded by the dump itself, and
    # a nanny that kills at a share of the memory would look like a sample that kills.
    scheduler = {"host": "127.0.0.1", "port": 0, "allowed_failures": 0, "dashboard_address": "127.0.0.1:0"}
    scheduler |= {"dashboard": True}
    environ = "distributed.nanny.pre-spawn-environ"  # before torch is loaded; dask's own choice is one thread
    settings: dict[str, Any] = {f"{environ}.{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    # Else the cluster gives up a worker that is not there 15 s after a death: also one that died again just then.
    settings["distributed.deploy.lost-worker-timeout"] = "1000 days"
    with dask.config.set(settings):
        # begun without workers: else the death of one as it starts would end the others too
        cluster = SpecCluster({}, scheduler={"cls": Scheduler, "options": scheduler}, silence_logs=logging.CRITICAL)
        try:
            with _quiet(TORNADO_LOG):  # where the loop puts the traceback of a start that failed
                _start(cluster, spec)
                yield cluster
        finally:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                cluster.close(timeout=CLOSE_S)


def _start(cluster: Any, spec: dict[int, dict[str, Any]]) -> None:
    """Start workers, and wait until all are there; one that dies before it is there is started again.

    Raises:
        WorkerDiedError: too many did.
    """
    num_deaths = 0
    cluster.worker_spec.update(spec)
    cluster.scale(len(spec))
    while len(cluster.scheduler_info["workers"]) < len(spec):
        time.sleep(START_LOOK_S)
        num_deaths += _revive(cluster)
        if num_deaths > MOST_DEATHS_AT_START * len(spec):
            raise WorkerDiedError(
                f"workers: expected them to start, got {num_deaths} that died before they were there; is there memory "
                "enough for all? Give fewer --workers, or run without to see what happens"
            )


@contextlib.contextmanager
def _quiet(log: str) -> Iterator[None]:
    """Let a log say nothing for a while."""
    logger = logging.getLogger(log)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _revive(cluster: Any) -> int:
    """Start the workers of this machine anew that nobody looks after any more: killed while they were started again."""
    if isinstance(cluster, str):  # of another machine: that is not ours
        return 0
    from distributed import Status

    gone = [name for name, nanny in cluster.workers.items() if nanny.status in (Status.closed, Status.failed)]
    for name in gone:
        del cluster.workers[name]
    if gone:
        cluster.scale(len(cluster.worker_spec))
    return len(gone)


@contextlib.contextmanager
def _client(cluster: Any) -> Iterator[Any]:
    from distributed import Client

    if isinstance(cluster, str):
        check_scheduler(cluster, CONNECT_S)
    try:
        client = Client(cluster, timeout=CONNECT_S, set_as_default=False)
    except (TimeoutError, OSError, ValueError) as error:
        raise no_answer(cluster, CONNECT_S) from error
    try:
        yield client
    finally:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            client.close(timeout=CLOSE_S)


def _say_where_to_look(client: Any, say: Callable[[str], object]) -> None:
    """The dashboard's address, or how to get one."""
    link = str(client.dashboard_link)
    if importlib.util.find_spec("bokeh") is not None:
        say(f"dashboard: {link}")
    else:
        pages = f"{link.removesuffix('status')}info/main/workers.html"
        say(f"workers: {pages} (for Dask's dashboard install bokeh beside the scheduler)")


def devices_of_workers(config: DumpConfig) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the devices that workers of this machine take, one each; none on the CPU.

    Raises:
        ValueError: more workers than CUDA devices.
    """
    devices = cuda_devices(config)
    if devices and config.workers is not None and config.workers > len(devices):
        raise ValueError(
            f"workers: expected at most {len(devices)}, one for each CUDA device, got {config.workers}; give fewer, or "
            "--device cpu"
        )
    return devices


def cuda_devices(config: DumpConfig) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the devices of this machine that a run may use; none where it runs on the CPU.

    They are counted in a process of its own, so that the driver stays without them.

    Raises:
        ValueError: CUDA is asked for, and there is no device.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if config.device == "cpu" or given == "" or not any(Path("/dev").glob("nvidia*")):
        if config.device == "cuda":
            raise ValueError("device: expected CUDA devices of this machine, got none; use --device cpu or auto")
        return []
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    count = int(answer.stdout) if answer.returncode == 0 else 0
    names = given.split(",") if given else [str(number) for number in range(count)]
    if config.device == "cuda" and not count:
        raise ValueError("device: expected CUDA devices of this machine, got none; use --device cpu or auto")
    return names[:count]
