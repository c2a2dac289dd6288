"""What a run would do, without writing anything."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import get_num_threads, set_num_threads

from storage.console import format_bytes, format_count, format_duration, format_rate
from storage.errors import MismatchError
from storage.reader import open_store
from teacherdump.cluster_local import devices_of_workers, threads_of_a_worker
from teacherdump.config import DumpConfig
from teacherdump.dump import Job, read_one, sparsified
from teacherdump.pilot import Pilot, PilotOptions, run_pilot
from teacherdump.plan import Limits, batches, estimate
from teacherdump.source import MOST_READERS, Say, open_source, prepare
from teacherdump.sparsify import build_sparsify, copy_to_host

TIMED_S = 3.0  # seconds that batches are timed for, at least one of them


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        path: of the store.
        num_rows: rows of the store.
        num_sealed_rows: of these, sealed already.
        num_new_rows: rows that this run would add within its limits.
        num_shards: shards of the store.
        num_new_shards: shards that this run would add.
        shard_rows: rows of a shard.
        chunk_rows: rows of a chunk.
        row_bytes: bytes of a row before compression.
        num_bytes: bytes of the whole store before compression.
        num_classes: classes of the teacher.
        batch_size: rows of a forward pass.
        device: where the teacher runs.
        rows_per_s: rows a second, reading and teacher, timed on the first batches owed; None where nothing is owed.
            With several workers: what one of them does with its share of the cores, times the workers.
        hours: time that this run would take; None where nothing is owed.
        finalized: whether the store is finished.
        pilot: every encoding tried on some rows; None where no pilot was asked for.
        num_workers: processes that dump at the same time.
    """

    path: str
    num_rows: int
    num_sealed_rows: int
    num_new_rows: int
    num_shards: int
    num_new_shards: int
    shard_rows: int
    chunk_rows: int
    row_bytes: int
    num_bytes: int
    num_classes: int
    batch_size: int
    device: str
    rows_per_s: float | None
    hours: float | None
    finalized: bool
    pilot: Pilot | None = None
    num_workers: int = 1

    def to_json(self) -> dict[str, Any]:
        """Every figure by name."""
        return asdict(self)

    def summary(self) -> str:
        """The same in some lines for a person, and the pilot's table behind them."""
        return "\n".join([self._lines(), *([] if self.pilot is None else ["", self.pilot.table()])])

    def _lines(self) -> str:
        lines = [
            f"store       {self.path}",
            f"rows        {format_count(self.num_rows)}, {format_count(self.num_classes)} classes",
            f"bytes       {format_count(self.row_bytes)} a row, {format_bytes(self.num_bytes)} in all, uncompressed",
            f"shards      {self.num_shards} of {format_count(self.shard_rows)} rows, in chunks of {self.chunk_rows}",
            f"batch size  {self.batch_size} on {self.device}",
            f"sealed      {format_count(self.num_sealed_rows)} rows" + (", finished" if self.finalized else ""),
        ]
        if self.rows_per_s is None or self.hours is None:
            return "\n".join([*lines, "to do       nothing" if self.finalized else "to do       finalize"])
        shards = "1 shard" if self.num_new_shards == 1 else f"{format_count(self.num_new_shards)} shards"
        what = f"{format_count(self.num_new_rows)} rows in {shards}"
        took = f"{format_duration(self.hours * 3600)} at {format_rate(self.rows_per_s, 'rows')}"
        took += f" with {self.num_workers} workers" if self.num_workers > 1 else ""
        return "\n".join([*lines, f"to do       {what}, about {took}"])


def preview(config: DumpConfig, say: Say = lambda _: None, pilot: PilotOptions | None = None) -> Preview:
    """What `run` would do with the same options; loads the teacher and times it, and writes nothing.

    Args:
        config: the options.
        say: told of what a person should know, a line each.
        pilot: of a pilot; None makes none.

    Raises:
        StoreError: what `run` would raise before its first row.
        ValueError: options that contradict what is there.
    """
    if config.scheduler is not None:
        raise ValueError(
            f"scheduler: expected none with plan, which times the teacher on this machine, got {config.scheduler}; "
            "leave it out, and divide the hours by the workers of the cluster"
        )
    source = open_source(config)
    owed, num_sealed_rows, finalized = None, 0, False
    if source.existing is not None:
        with open_store(config.out) as store:
            sealed, num_sealed_rows, finalized = set(store.sealed_shards()), store.num_sealed_rows, store.finalized
        if not sealed:
            source = replace(source, existing=None)  # `run` begins it anew
    if source.existing is not None:
        there = source.existing
        differences = there.differences(source.manifest(there.num_classes, there.provenance))
        if differences:
            raise MismatchError(
                f"{config.out}: expected a run that goes on with this store, got other settings: "
                f"{'; '.join(differences[:3])}; use the same settings, or give --out another path"
            )
        owed = [] if finalized else [shard for shard in range(there.layout.num_shards) if shard not in sealed]
    job = prepare(source, say)
    manifest, layout = job.manifest, job.manifest.layout
    if owed is None:
        owed = list(range(layout.num_shards))
    rows_per_s = _rows_per_s(job, config, owed[0]) if owed else None
    limits = Limits(config.limit_samples, config.limit_hours, config.limit_bytes)
    planned = estimate(layout, owed, limits, manifest.row_bytes, rows_per_s)
    tried = None
    if pilot is not None:
        tried = run_pilot(job, config, pilot, rows_per_s or _rows_per_s(job, config, 0))
    return Preview(
        path=config.out,
        num_rows=layout.num_rows,
        num_sealed_rows=num_sealed_rows,
        num_new_rows=planned.num_rows,
        num_shards=layout.num_shards,
        num_new_shards=planned.num_shards,
        shard_rows=layout.shard_rows,
        chunk_rows=layout.chunk_rows,
        row_bytes=manifest.row_bytes,
        num_bytes=manifest.row_bytes * layout.num_rows,
        num_classes=manifest.num_classes,
        batch_size=job.batch_size,
        device=str(manifest.provenance["device"]),
        rows_per_s=rows_per_s,
        hours=None if planned.seconds is None else planned.seconds / 3600,
        finalized=finalized,
        pilot=tried,
        num_workers=config.workers or 1,
    )


def _rows_per_s(job: Job, config: DumpConfig, shard: int) -> float:
    """Rows a second of all workers together; of the process itself where there are none."""
    if config.workers is None:
        return time_batches(job, shard, TIMED_S)
    devices, num_threads, before = devices_of_workers(config), threads_of_a_worker(config.workers), get_num_threads()
    num_readers = config.readers or min(MOST_READERS, num_threads)
    set_num_threads(num_threads)  # as a worker has them
    try:
        rows_per_s = time_batches(replace(job, num_readers=num_readers), shard, TIMED_S)
    finally:
        set_num_threads(before)
    at_once = config.workers if devices else min(config.workers, len(os.sched_getaffinity(0)))
    return rows_per_s * at_once


def time_batches(job: Job, shard: int, least_s: float) -> float:
    """Rows a second of reading and teacher: of both on a CPU, whose cores they share, of the slower one on CUDA."""
    sparsify = build_sparsify(job.manifest.encoding, job.manifest.temperatures)
    bounds = batches(*job.manifest.layout.shard_bounds(shard), job.batch_size)
    read_s = teacher_s = 0.0
    num_rows, position = -1, 0
    with ThreadPoolExecutor(job.num_readers) as pool:
        while num_rows <= 0 or read_s + teacher_s < least_s:
            start, stop = bounds[position % len(bounds)]
            begin = time.perf_counter()
            read = read_one(job, shard, start, stop, pool)
            between = time.perf_counter()
            copy_to_host(sparsified(job, read, sparsify)).wait()
            end = time.perf_counter()
            position += 1
            if num_rows < 0:  # the first batch pays for what is done once
                num_rows = 0
                continue
            num_rows, read_s, teacher_s = num_rows + stop - start, read_s + between - begin, teacher_s + end - between
    on_cuda = job.teacher.device.type == "cuda"
    return num_rows / (max(read_s, teacher_s) if on_cuda else read_s + teacher_s)
