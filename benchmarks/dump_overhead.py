"""What storing costs a dump: rows/s of `teacherdump run` over rows/s of the bare loop.

    python -m benchmarks.dump_overhead --rows 4096 --repeats 5

The bare loop reads the same batches ahead with the same threads and runs the same teacher, a convnet of about 50 MFLOP
a sample over 1,000 classes, and stores nothing. Both alternate in one process, so that a slow moment of the machine
hits either; the ratio is that of the medians. The ratio of the processor time beside it says what the work costs on a
machine that is busy with other things too. Rows are counted from the first batch to the last seal, without the loading
of the teacher before and the check of the whole store behind.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import write_result
from storage.console import progress
from storage.writer import StoreWriter
from studenttrain.models import build_model
from teacherdump.config import DumpConfig
from teacherdump.dump import Job, dump, read_ahead
from teacherdump.source import open_source, prepare

ARCH = "cnn:3-64-96-192-1000"  # 53 MFLOP on 32 x 32 pixels
SIDE = 32


def mflop_a_sample(sizes: list[int], side: int) -> float:
    """Floating-point operations of the convolutions and the head, two a multiply-add."""
    total = 0
    for index, (num_in, num_out) in enumerate(itertools.pairwise(sizes[:-1])):
        total += 2 * 9 * num_in * num_out * (side // 2**index) ** 2
    return (total + 2 * sizes[-2] * sizes[-1]) / 1e6


def bare(job: Job) -> None:
    """The loop that stores nothing."""
    with read_ahead(job, range(job.manifest.layout.num_shards)) as ahead:
        for read in ahead.until(lambda: False):
            job.teacher(read.inputs.to(job.teacher.device, non_blocking=True))
    if job.teacher.device.type == "cuda":
        torch.cuda.synchronize()


def store(job: Job, writer: StoreWriter) -> None:
    """The loop that seals every shard."""
    with progress(None, "rows", "dumping", quiet=True) as bar:
        dump(job, writer, writer.owed_shards(), bar, lambda: False, lambda _: None)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a call, on the wall's clock and of all cores' time."""
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arch", default=ARCH)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoding", default="dense", choices=["dense", "topk"])
    parser.add_argument("--out", choices=["zarr", "h5"], default="zarr")
    parser.add_argument("--folder", type=Path, help="where the stores go; default: a temporary folder")
    args = parser.parse_args()
    sizes = [int(size) for size in args.arch.removeprefix("cnn:").split("-")]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        torch.save(build_model(args.arch).state_dict(), folder / "teacher.pt")
        images = np.random.default_rng(0).random((args.rows, sizes[0], args.side, args.side), np.float32)
        np.save(folder / "corpus.npy", images)
        config = DumpConfig(
            models=(str(folder / "teacher.pt"),),
            arch=args.arch,
            data=str(folder / "corpus.npy"),
            out=str(folder / "unused"),
            encoding=args.encoding,
            k=50 if args.encoding == "topk" else None,
            device=args.device,
        )
        job = prepare(open_source(config), lambda _: None)
        bare(job)
        seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "dump": []}
        for repeat in range(args.repeats):
            seconds["bare"].append(timed(lambda: bare(job)))
            with StoreWriter.open(folder / f"{repeat}.{args.out}", job.manifest) as writer:
                seconds["dump"].append(timed(partial(store, job, writer)))
    wall, cpu = ({kind: statistics.median(pair[i] for pair in seconds[kind]) for kind in seconds} for i in (0, 1))
    figures = {
        "arch": args.arch,
        "mflop_a_sample": round(mflop_a_sample(sizes, args.side), 1),
        "encoding": args.encoding,
        "out": args.out,
        "rows": args.rows,
        "batch_size": job.batch_size,
        "shard_rows": job.manifest.shard_rows,
        "device": job.manifest.provenance["device"],
        "threads": torch.get_num_threads(),
        "bare_rows_per_s": round(args.rows / wall["bare"]),
        "dump_rows_per_s": round(args.rows / wall["dump"]),
        "ratio": round(wall["bare"] / wall["dump"], 3),
        "ratio_of_processor_time": round(cpu["bare"] / cpu["dump"], 3),
        "wall_and_processor_s": {
            kind: [[round(value, 2) for value in pair] for pair in pairs] for kind, pairs in seconds.items()
        },
    }
    print(json.dumps(figures, indent=2))
    write_result(f"dump_overhead_{args.encoding}", figures)


if __name__ == "__main__":
    main()
