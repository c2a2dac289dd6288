"""Benchmark (e): the memory of a dump and of a fit does not grow with the rows.

    python -m benchmarks.memory

Runs the real commands over a corpus and over one of ten times its rows, and compares their peaks. A peak is the largest
resident set of the process, sampled every 10 ms, without the pages of mapped files: those belong to the page cache and
go when anyone else wants the room. Both dumps have shards of one size: by default a small corpus has smaller ones, and
a dump holds a few shards, whatever the number of rows.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.result import write_result
from studenttrain.models import MLP

SIZES = (64, 64, 100)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="of the smaller corpus")
    parser.add_argument("--factor", type=int, default=10)
    args = parser.parse_args()
    figures: dict[str, object] = {"rows": args.rows, "factor": args.factor}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(MLP(SIZES).state_dict(), folder / "teacher.pt")
        peaks: dict[str, list[int]] = {"run": [], "fit": []}
        for rows in (args.rows, args.rows * args.factor):
            write_corpus(folder / f"{rows}.npy", rows)
            peaks["run"].append(peak_of(run_command(folder, rows)))
            peaks["fit"].append(peak_of(fit_command(folder, rows)))
    for what, (small, large) in peaks.items():
        figures[what] = {"peak_bytes": [small, large], "ratio": round(large / small, 3)}
        print(
            f"{what}: {small / 1e6:.0f} MB at {args.rows:,} rows, {large / 1e6:.0f} MB at {args.factor} times as many"
        )
    write_result("memory", figures)


def write_corpus(path: Path, rows: int) -> None:
    """Random samples, written a block at a time."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, SIZES[0]))
    for start in range(0, rows, 10_000):
        block = array[start : start + 10_000]
        block[...] = np.random.default_rng(start).standard_normal(block.shape, np.float32)
    array.flush()


def run_command(folder: Path, rows: int) -> list[str]:
    """The dump of a corpus."""
    arch = "mlp:" + "-".join(map(str, SIZES))
    command = f"teacherdump run --model {folder}/teacher.pt --arch {arch} --data {folder}/{rows}.npy"
    return f"{command} --encoding dense --batch-size 1024 --shard-rows 32768 --out {folder}/{rows}.zarr".split()


def fit_command(folder: Path, rows: int) -> list[str]:
    """A pass over its store."""
    command = f"studenttrain fit --targets {folder}/{rows}.zarr --data {folder}/{rows}.npy --student mlp:64-64-100"
    return f"{command} --epochs 1 --batch-size 1024 --out {folder}/student-{rows}".split()


def peak_of(command: list[str]) -> int:
    """Largest resident set of a command, bytes, without mapped files."""
    words = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            memory = watched.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return peak


if __name__ == "__main__":
    main()
