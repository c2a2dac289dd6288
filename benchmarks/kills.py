"""Kill -9 at random moments, resuming each time: what comes out must be what an undisturbed run gives.

    python -m benchmarks.kills --what zarr --kills 50
    python -m benchmarks.kills --what h5 --kills 50

A run is killed at a random moment after it began to work, now and then while it still starts. When it comes to its end
before the kills are used up, its result is compared and another one is begun, until they are.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import write_result
from storage.errors import PathError
from storage.reader import open_store
from studenttrain.models import build_model

NUM_ROWS, NUM_INPUTS, NUM_CLASSES = 3000, 64, 100
STARTING_SHARE = 0.15  # of the kills fall while python starts and the model loads

# Slow enough that kills fall between batches, into writes, seals and the final record; it says when it is at work.
TEACHER = """
import pathlib, time
from studenttrain.models import MLP

class Slow(MLP):
    def forward(self, inputs):
        pathlib.Path("working").touch()
        time.sleep(0.01)
        return super().forward(inputs)

def make():
    return Slow((64, 128, 100))
"""


@dataclass(frozen=True)
class Subject:
    """What is killed.

    Attributes:
        command: what runs it, in the folder; run again, it goes on.
        is_done: whether it has come to its end.
        outcome: what must be the same whatever happened on the way.
        clear: takes away what it made, so that it begins anew.
    """

    command: list[str]
    is_done: Callable[[], bool]
    outcome: Callable[[], str]
    clear: Callable[[], None]


def dump_subject(folder: Path, suffix: str) -> Subject:
    """`teacherdump run` of a small corpus with a slow teacher."""
    torch.manual_seed(0)
    (folder / "slow_teacher.py").write_text(TEACHER)
    torch.save(build_model(f"mlp:{NUM_INPUTS}-128-{NUM_CLASSES}").state_dict(), folder / "teacher.pt")
    np.save(folder / "corpus.npy", np.random.default_rng(0).normal(size=(NUM_ROWS, NUM_INPUTS)).astype(np.float32))
    out = folder / f"out.{suffix}"

    def is_done() -> bool:
        try:
            with open_store(out) as store:
                return store.finalized
        except PathError:  # killed before there was a manifest
            return False

    def outcome() -> str:
        with open_store(out) as store:
            assert store.content_digest is not None
            return store.content_digest

    def clear() -> None:
        for path in folder.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    command = [sys.executable, "-c", "from teacherdump.cli import main; main()", "run", "--quiet", "--device", "cpu"]
    command += ["--model", "teacher.pt", "--arch", "slow_teacher:make", "--data", "corpus.npy", "--out", out.name]
    command += ["--batch-size", "16", "--shard-rows", "64", "--encoding", "topk", "--k", "10"]
    return Subject(command, is_done, outcome, clear)


def start(subject: Subject, folder: Path) -> "subprocess.Popen[bytes]":
    """The command as a process of its own."""
    (folder / "working").unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(subject.command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_until_at_work(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait until the process does its work, or ends."""
    while process.poll() is None and not (folder / "working").exists():
        time.sleep(0.002)


def check_end(process: "subprocess.Popen[bytes]") -> None:
    """Refuse a run that ended in any way but well, or by our kill."""
    _, stderr = process.communicate()
    if process.returncode not in (0, -9):
        raise SystemExit(f"a run failed with code {process.returncode}:\n{stderr.decode()}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["zarr", "h5"], required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject = dump_subject(folder, args.what)
        process = start(subject, folder)
        wait_until_at_work(process, folder)
        begun = time.perf_counter()
        check_end(process)
        work_s = time.perf_counter() - begun
        expected = subject.outcome()
        print(f"undisturbed: {work_s:.1f} s of work, {expected}", flush=True)
        subject.clear()
        num_kills = num_same = num_runs = 0
        # a run that is killed loses the shard in work, so that it comes on by less than the mean of its moments
        longest_s = 4 * work_s / args.kills
        while num_kills < args.kills or not subject.is_done():
            process, num_runs = start(subject, folder), num_runs + 1
            if num_kills < args.kills:
                if moments.random() < STARTING_SHARE:
                    time.sleep(moments.uniform(0, 1.5))
                else:
                    wait_until_at_work(process, folder)
                    time.sleep(moments.uniform(0, longest_s))
                if process.poll() is None:
                    process.kill()
                    num_kills += 1
            check_end(process)
            if subject.is_done():
                if subject.outcome() != expected:
                    raise SystemExit(f"after {num_kills} kills: expected {expected}, got {subject.outcome()}")
                num_same += 1
                print(f"{num_kills} kills: the same", flush=True)
                if num_kills < args.kills:
                    subject.clear()
    write_result(
        f"kills_{args.what}",
        {
            "what": args.what,
            "kills": num_kills,
            "runs": num_runs,
            "finished_and_the_same": num_same,
            "undisturbed_work_s": round(work_s, 2),
            "longest_moment_s": round(longest_s, 3),
            "content_digest": expected,
        },
    )


if __name__ == "__main__":
    main()
