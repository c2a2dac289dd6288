"""What many workers bring and cost: rows/s with one and two, the time of a shard, and a driver of 100,000 shards.

    python -m benchmarks.cluster_scale
    python -m benchmarks.cluster_scale --parts scale overhead --rows 4000 --shards 100

- `scale`: a teacher that keeps one core busy, in one process with one thread, and on one and two workers.
- `overhead`: a teacher that does nothing over many small shards, in one process and on one worker.
- `turns`: a teacher that sleeps, as the host does while a device works, beside a writer that sleeps: two shards in
  flight, which take turns with the teacher, and one.
- `driver`: a corpus of 10^9 rows of one byte, cut into more and more shards. The workers' task is a double that seals
  nothing and gives back the report of a shard, so that it is the driver, with the scheduler in its process, that is
  measured; all else is as in a dump. Each in a process of its own, for its memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result import write_result
from storage.records import Seal
from storage.writer import StoreWriter
from teacherdump import cluster, cluster_drive, cluster_team
from teacherdump.cluster_bisect import Piece
from teacherdump.cluster_local import open_team
from teacherdump.cluster_work import Plan
from teacherdump.config import DumpConfig
from teacherdump.report import ShardReport
from teacherdump.room import Room
from teacherdump.run import run
from teacherdump.source import open_source

PARTS = ("scale", "overhead", "turns", "driver")
NUM_CORPUS_ROWS = 10**9
SLEEP_S = 0.05  # of a batch in the teacher, and of a shard in the writer, in `turns`

TEACHERS = f"""
import time, torch

class Busy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(24)], torch.nn.Linear(512, 10))

    def forward(self, inputs):
        return self.layers(inputs)

class Idle(torch.nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs)

class Asleep(Idle):
    def forward(self, inputs):
        time.sleep({SLEEP_S})
        return super().forward(inputs)

def busy():
    return Busy()

def idle():
    return Idle(1, 2)

def asleep():
    import storage.backends.zarr3 as zarr3
    write = zarr3.ZarrBackend.write_shard
    def slow(self, *arguments):
        time.sleep({SLEEP_S})
        return write(self, *arguments)
    if write.__name__ != "slow":
        zarr3.ZarrBackend.write_shard = slow
    return Asleep(1, 2)
"""


def write_teachers(folder: Path) -> None:
    """The teachers, as code with weights."""
    import torch

    (folder / "scale_teachers.py").write_text(TEACHERS)
    sys.path.insert(0, str(folder))
    import scale_teachers  # type: ignore[import-not-found]

    for name in ("busy", "idle"):
        torch.manual_seed(0)
        torch.save(getattr(scale_teachers, name)().state_dict(), folder / f"{name}.pt")


def config_of(folder: Path, teacher: str, data: str, **options: Any) -> DumpConfig:
    """A dump by one of the teachers, without what would judge what it says."""
    weights = "busy.pt" if teacher == "busy" else "idle.pt"
    return DumpConfig(
        models=(str(folder / weights),),
        arch=f"scale_teachers:{teacher}",
        data=str(folder / data),
        out=str(folder / f"{time.monotonic_ns()}.zarr"),
        device="cpu",
        no_alarms=("all",),
        run_log="none",
        readers=1,
        **options,
    )


def scale(folder: Path, num_rows: int) -> dict[str, float]:
    """Rows/s of a teacher that keeps a core busy."""
    np.save(folder / "wide.npy", np.random.default_rng(0).normal(size=(num_rows, 512)).astype(np.float32))
    found = {}
    for workers in (None, 1, 2):
        config = config_of(
            folder, "busy", "wide.npy", workers=workers, batch_size=64, shard_rows=max(64, num_rows // 32)
        )
        result = run(config)
        found["one_process" if workers is None else f"{workers}_workers"] = round(num_rows / result.seconds, 1)
    return {f"rows_per_s_{name}": rate for name, rate in found.items()} | {
        "2_workers_over_1": round(found["2_workers"] / found["1_workers"], 3)
    }


def overhead(folder: Path, num_shards: int) -> dict[str, float]:
    """Milliseconds of a shard of 16 rows of a teacher that does nothing."""
    np.save(folder / "small.npy", np.random.default_rng(0).normal(size=(16 * num_shards, 1)).astype(np.float32))
    found = {}
    for workers in (None, 1):
        config = config_of(folder, "idle", "small.npy", workers=workers, batch_size=16, shard_rows=16, chunk_rows=16)
        result = run(config)
        found["one_process" if workers is None else "1_worker"] = 1000 * result.seconds / num_shards
    found["more_on_a_worker"] = found["1_worker"] - found["one_process"]
    return {f"ms_a_shard_{name}": round(value, 2) for name, value in found.items()}


def turns(folder: Path) -> dict[str, float]:
    """Seconds of 24 shards whose teacher and whose writing both sleep, with two shards in flight and with one."""
    np.save(folder / "few.npy", np.random.default_rng(0).normal(size=(24, 1)).astype(np.float32))
    found = {}
    for in_flight in (1, 2):
        vars(cluster_drive)["SHARDS_IN_FLIGHT"] = in_flight
        config = config_of(folder, "asleep", "few.npy", workers=1, batch_size=1, shard_rows=1, chunk_rows=1)
        found[f"seconds_{in_flight}_in_flight"] = round(run(config).seconds, 2)
    vars(cluster_drive)["SHARDS_IN_FLIGHT"] = cluster_team.SHARDS_IN_FLIGHT
    return found | {"least_seconds_of_the_teacher": 24 * SLEEP_S}


def seal_nothing(plan: Plan, piece: Piece, part: object) -> ShardReport:
    """Stands for the dump of a shard: a report as it would be, of a shard that nobody wrote."""
    del part
    objects = {f"values/c/{piece.shard}/0": {"num_bytes": 1000, "xxh3_128": "0" * 32}}
    arrays = dict.fromkeys(("entropy", "lse", "max_logit", "sample_digest", "status", "values"), "0" * 64)
    seal = Seal(piece.shard, piece.start, piece.stop, plan.manifest_sha256, arrays, objects, ())
    return ShardReport(seal, 1000, 0.0, 0.0, 0.0, 0.5, "0")


class _Bar:
    def advance(self, count: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def drive(folder: Path, num_shards: int) -> dict[str, float]:
    """Seconds and memory of a driver of so many shards; in a process of its own."""
    sys.path.insert(0, str(folder))
    shard_rows = NUM_CORPUS_ROWS // num_shards
    config = config_of(folder, "idle", "big.npy", workers=2, batch_size=256, shard_rows=shard_rows)
    begin = time.perf_counter()
    source = open_source(config)
    opened = time.perf_counter()
    vars(cluster_drive)["dump_part"] = seal_nothing
    reports = set[int]()
    with open_team(config, lambda _: None) as team:
        job = cluster.prepare_on_workers(team, source, lambda _: None)
        with StoreWriter.open(config.out, job.manifest) as writer:
            for shard in range(0, num_shards, 2):
                (Path(config.out) / "seals").mkdir(exist_ok=True)
                (Path(config.out) / "seals" / f"{shard:08d}.json").touch()
            listing = time.perf_counter()
            assert len(writer.owed_shards()) == num_shards // 2
            listed = time.perf_counter()
            job = replace(job, manifest=writer.manifest)
            room = Room(config.out, 0, lambda _: None)
            cluster.dump_on_workers(
                job,
                writer,
                range(num_shards),
                _Bar(),
                lambda: False,
                lambda report: reports.add(report.seal.shard),
                room=room,
            )
            done = time.perf_counter()
    assert len(reports) == num_shards
    return {
        "shards": num_shards,
        "open_corpus_s": round(opened - begin, 2),
        "list_seals_s": round(listed - listing, 3),
        "hand_out_s": round(done - listed, 2),
        "ms_a_shard": round(1000 * (done - listed) / num_shards, 3),
        "driver_memory_mib": most_memory_mib(),
    }


def most_memory_mib() -> float:
    """What this process had at most, MiB; without what its parent had, which `getrusage` counts too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


def drive_apart(folder: Path, num_shards: int) -> dict[str, float]:
    """`drive` in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.cluster_scale import drive\n"
        "if __name__ == '__main__': print(json.dumps(drive(Path(sys.argv[1]), int(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, str(folder), str(num_shards)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def write_sparse(path: Path) -> None:
    """A `.npy` of 10^9 rows of one byte, which takes no room on the disk."""
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (NUM_CORPUS_ROWS, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + NUM_CORPUS_ROWS)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000, help="of `scale`")
    parser.add_argument("--shards", type=int, default=400, help="of `overhead`")
    parser.add_argument("--driver-shards", type=int, nargs="+", default=[10**3, 10**4, 10**5])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="by default all")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # one core for each process, also where it is alone
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_teachers(folder)
        write_sparse(folder / "big.npy")
        import torch

        torch.set_num_threads(1)
        parts: dict[str, Callable[[], Any]] = {
            "scale": lambda: scale(folder, args.rows),
            "overhead": lambda: overhead(folder, args.shards),
            "turns": lambda: turns(folder),
            "driver": lambda: [drive_apart(folder, num_shards) for num_shards in args.driver_shards],
        }
        for part in args.parts:
            figures = parts[part]()
            print(part, figures, flush=True)
            write_result(f"cluster_{part}", {part: figures})


if __name__ == "__main__":
    main()
