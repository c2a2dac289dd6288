"""Specialists side by side on Dask workers: one task each, which goes on from its checkpoint where its worker died."""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from storage.console import progress
from storage.errors import PathError, StoreError, StudentError
from storage.interruption import Interrupted, stop_requests
from storage.scheduler import check_scheduler, no_answer
from studenttrain.specialists.config import SpecialistsConfig
from studenttrain.specialists.fitting import train_one
from studenttrain.specialists.plan import SpecialistsPlan

CONNECT_S = 20.0  # until a scheduler must have answered, and have a worker
CLOSE_S = 5.0  # that a cluster is given to close itself
POLL_S = 0.1


def train_on_workers(
    config: SpecialistsConfig,
    plan: SpecialistsPlan,
    numbers: Sequence[int],
    say: Callable[[str], None],
    quiet: bool = False,
) -> None:
    """Train some specialists on workers of this machine, or of the scheduler that the options name.

    Args:
        config: of all, its paths absolute.
        plan: of all.
        numbers: of those that are trained.
        say: told of each that has ended.
        quiet: show no progress.

    Raises:
        StoreError: a specialist can't be trained, its worker died again and again, or no scheduler answers.
        Interrupted: SIGINT or SIGTERM came; what was done is kept.
    """
    with (
        stop_requests() as request,
        _client(config, len(numbers)) as client,
        progress(len(numbers), "specialists", "training", quiet=quiet) as bar,
    ):
        names = {
            client.submit(
                train_here, config, plan, number, pure=False, key=f"specialist-{number}-{uuid.uuid4()}"
            ): number
            for number in numbers
        }
        pending = list(names)
        while pending:
            time.sleep(POLL_S)
            if request.signal:
                left = len(pending)
                raise Interrupted(
                    f"stopped with {left} of {len(numbers)} specialists not done; what they did is in {config.out}, up "
                    "to their last checkpoints: to go on, run the same command",
                    request.signal,
                )
            for future in [future for future in pending if future.done()]:
                pending.remove(future)
                check_future(future, names[future])
                say(f"specialist {names[future]} has ended, {len(pending)} left")
                bar.advance(1)


def train_here(config: SpecialistsConfig, plan: SpecialistsPlan, number: int) -> str | None:
    """Train a specialist in the worker's process.

    Returns:
        What the user can mend, or None: not every error survives the way to another process.
    """
    from distributed import get_worker

    worker = get_worker()
    if worker.state.nthreads != 1:
        return (
            f"worker '{worker.address}': expected one thread, since two trainings in a process would share their "
            f"random numbers, got {worker.state.nthreads}; start it with dask worker --nthreads 1"
        )
    if config.workers is not None:
        training = dict(config.training)
        training["device"] = device_of(str(training.get("device", "auto")), worker.name)
        config = replace(config, training=training)
    try:
        train_one(config, plan, number)
    except (StoreError, ValueError) as error:
        return str(error)
    return None


def device_of(device: str, worker: Any) -> str:
    """The device of a worker of this machine: they are dealt out where there are several."""
    import torch

    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{int(worker) % count}" if count > 1 and isinstance(worker, int) else device


def check_future(future: Any, number: int) -> None:
    """Raise what kept a specialist from its end.

    Raises:
        StudentError: an error of its own, or its worker died too often.
    """
    from distributed import KilledWorker

    where = f"specialist {number}"
    try:
        error = future.result()
    except KilledWorker:
        raise StudentError(
            f"{where}: expected a worker that lives until it has ended, got several that died of it; is there memory "
            "enough? Give fewer --workers, or run without to see what happens"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise StudentError(f"{where}: expected it to end, got {reason}; run without --workers to see more") from error
    if error is not None:
        raise StudentError(f"{where}: {error}")


@contextlib.contextmanager
def _client(config: SpecialistsConfig, most: int) -> Iterator[Any]:
    """A client of the workers; those of this machine end with it.

    Raises:
        PathError: no scheduler answers, or it has no worker.
    """
    from distributed import Client

    with _cluster(config, most) as cluster:
        if isinstance(cluster, str):
            check_scheduler(cluster, CONNECT_S)
        try:
            client = Client(cluster, timeout=CONNECT_S, set_as_default=False)
        except (TimeoutError, OSError, ValueError) as error:
            raise no_answer(cluster, CONNECT_S) from error
        try:
            if isinstance(cluster, str):
                _wait_for_one(client, cluster)
            yield client
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                client.close(timeout=CLOSE_S)


def _wait_for_one(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError as error:
        raise PathError(
            f"scheduler '{address}': expected a worker, got none in {CONNECT_S:.0f} s; start some: dask worker "
            f"{address} --nthreads 1"
        ) from error


@contextlib.contextmanager
def _cluster(config: SpecialistsConfig, most: int) -> Iterator[Any]:
    """What a client connects to: an address, or a cluster of this machine."""
    if config.scheduler is not None:
        yield config.scheduler
        return
    assert config.workers is not None
    import dask
    from distributed import LocalCluster

    count = min(config.workers, most)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environ = "distributed.nanny.pre-spawn-environ"  # before torch is loaded; dask's own choice is one thread
    settings: dict[str, Any] = {f"{environ}.{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    # Else the cluster gives up a worker that is not there 15 s after a death.
    settings["distributed.deploy.lost-worker-timeout"] = "1000 days"
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            scheduler_port=0,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # a nanny that kills at a share of the memory would look like a worker that dies
            silence_logs=logging.CRITICAL,
        )
        try:
            yield cluster
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                cluster.close(timeout=CLOSE_S)
