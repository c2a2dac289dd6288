"""Benchmark (a): rows/s of a dump over rows/s of a bare loop that stores nothing.

    python -m benchmarks.dump_overhead

The bare loop reads the same batches, a few ahead as the dump does, and runs the same teacher, a convnet of about 50
MFLOP a sample. Both run in one process, turn about, and the ratio is that of the medians. The dump's time is its whole
loop: reading, teacher, sparsifying, writing and sealing every shard, and finalizing the store.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.result import write_result
from storage.console import progress
from storage.writer import StoreWriter
from studenttrain.models import build_model
from teacherdump.config import DumpConfig
from teacherdump.dump import Job, dump, read_ahead
from teacherdump.source import open_source, prepare

ARCH = "cnn:3-42-116-182-1000"
SHAPE = (3, 32, 32)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = build_model(ARCH)
        torch.save(model.state_dict(), folder / "teacher.pt")
        np.save(folder / "corpus.npy", np.random.default_rng(0).random((args.rows, *SHAPE), np.float32))
        results = {
            name: measure(folder, options, args)
            for name, options in {
                "dense float16": {"encoding": "dense"},
                "topk 32": {"encoding": "topk", "k": 32},
            }.items()
        }
    figures = {"mflop_per_sample": round(count_flops(model) / 1e6, 1), "rows": args.rows, "repeats": args.repeats}
    write_result("dump_overhead", figures | {"device": args.device, "batch_size": args.batch_size} | results)


def count_flops(model: torch.nn.Module) -> int:
    """Floating point operations of one sample, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.zeros(1, *SHAPE))
    return int(counter.get_total_flops())


def measure(folder: Path, options: Mapping[str, object], args: argparse.Namespace) -> dict[str, float]:
    """Rows a second of both, medians, and their ratio."""
    bare, dumped = [], []
    for repeat in range(args.repeats + 1):
        config = DumpConfig(
            models=(str(folder / "teacher.pt"),), data=str(folder / "corpus.npy"), arch=ARCH, device=args.device,
            batch_size=args.batch_size, out=str(folder / f"{options['encoding']}-{repeat}.zarr"), **options,  # type: ignore[arg-type]
        )  # fmt: skip
        job = prepare(open_source(config), lambda _: None)
        seconds = bare_loop(job), dump_all(job, config.out)
        if repeat:  # the first turn warms up
            bare.append(args.rows / seconds[0])
            dumped.append(args.rows / seconds[1])
    ratio = statistics.median(dumped) / statistics.median(bare)
    print(f"{options}: bare {statistics.median(bare):.0f} rows/s, dump {statistics.median(dumped):.0f}, {ratio:.3f}")
    return {
        "bare_rows_per_s": round(statistics.median(bare), 1),
        "dump_rows_per_s": round(statistics.median(dumped), 1),
        "ratio": round(ratio, 3),
    }


def bare_loop(job: Job) -> float:
    """Seconds to read every batch and run the teacher on it."""
    start = time.perf_counter()
    with read_ahead(job, range(job.manifest.layout.num_shards)) as ahead:
        for read in ahead.until(lambda: False):
            job.teacher(read.inputs.to(job.teacher.device, non_blocking=True))
    if job.teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def dump_all(job: Job, out: str) -> float:
    """Seconds to dump and finalize a store."""
    start = time.perf_counter()
    with StoreWriter.open(out, job.manifest) as writer, progress(None, "rows", "", quiet=True) as bar:
        dump(job, writer, writer.owed_shards(), bar, lambda: False, lambda _: None)
        writer.finalize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
