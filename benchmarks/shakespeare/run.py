"""One student from every encoding, from hard targets and with the teacher live, with the real commands.

    python -m benchmarks.shakespeare.train_teacher --text input.txt --run RUN
    python -m benchmarks.shakespeare.run --run RUN [--steps 600] [--seeds 3]

The teacher labels the text's first nine tenths once for each encoding. The same student learns from each at T = 1, for
the same number of steps: from the stored targets alone (`--alpha 1`), from hard targets alone (`--alpha 0`), and with
the teacher live, on the rows in the order of the dense store. (The order of a store depends on how it is cut into
shards, so other encodings see another one: that is part of the noise of a seed.) A table: bytes a token of the store,
validation loss, and the share of the gap between hard targets and the live teacher that is closed. A run that was
stopped goes on. Writes `benchmarks/results/shakespeare.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import write_result

ARCH = "gpt:4x128"
STUDENT = "gpt:2x64"
LENGTH = 128
BATCH, RATE = 32, 2e-3
HARD, LIVE = "hard targets", "live teacher"

ENCODINGS = {
    "dense": ("--encoding", "dense", "--compressor", "zstd"),
    "hidden": ("--encoding", "hidden", "--compressor", "zstd"),
    "topk-16": ("--encoding", "topk", "--k", "16"),
    "topk-4": ("--encoding", "topk", "--k", "4", "--values", "uint8"),
    "sample-60": ("--encoding", "sample", "--draws", "60"),
}


@dataclass(frozen=True)
class Student:
    """One way to teach the student.

    Attributes:
        name: for the table.
        targets: the store that it learns from.
        options: of `studenttrain fit`.
    """

    name: str
    targets: str
    options: tuple[str, ...]


STUDENTS = (
    Student(HARD, "dense", ("--alpha", "0")),
    Student(LIVE, "dense", ()),
    Student("dense float16", "dense", ("--alpha", "1")),
    Student("hidden float16", "hidden", ("--alpha", "1")),
    Student("topk 16, tail bucket", "topk-16", ("--alpha", "1")),
    Student("topk 4 uint8, tail bucket", "topk-4", ("--alpha", "1")),
    Student("topk 4 uint8, tail bucket 0.7, hard 0.3", "topk-4", ("--alpha", "0.7")),
    Student("sample, 60 draws", "sample-60", ("--alpha", "1")),
    Student("topk 4 uint8, renormalised", "topk-4", ("--alpha", "1", "--loss", "renormalised")),
)


def command(name: str, *words: str) -> str:
    """What a command of this project, or a module of its benchmarks, prints, on one thread, since two run at a time."""
    program = Path(sys.executable)
    begin = [str(program), "-m", name] if "." in name else [str(program.with_name(name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*begin, *words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(words)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def dump(run: Path, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Make a store, or find it finished; what `logitstore info` says of it."""
    path = run / f"{name}.zarr"
    command(
        "teacherdump", "run", "--model", str(run / "teacher.pt"), "--arch", ARCH, "--data", str(run / "train.npy"),
        "--sequence-length", str(LENGTH), "--vocab-size", str(vocabulary(run)), "--temperature", "1", "--device", "cpu",
        "--out", str(path), "-q", *words,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(command("logitstore", "info", str(path), "--json"))
    return found


def vocabulary(run: Path) -> int:
    """Characters of the text."""
    return int(json.loads((run / "teacher.json").read_text())["vocabulary"])


def validation_loss(run: Path, student: Student, seed: int, steps: int) -> float:
    """Teach one student, or find it taught; its loss on the last tenth of the text, nats a token."""
    name = student.name.replace(" ", "-").replace(",", "")
    out, targets = run / "students" / f"{name}-{steps}-seed{seed}", str(run / f"{student.targets}.zarr")
    words = ("--targets", targets, "--student", STUDENT, "--steps", str(steps), "--batch-size", str(BATCH),
             "--lr", str(RATE), "--seed", str(seed), "--out", str(out))  # fmt: skip
    if student.name == LIVE:
        if not (out / "student.safetensors").is_file():
            teacher = ("--teacher", str(run / "teacher.pt"), "--arch", ARCH)
            command("benchmarks.shakespeare.live", *teacher, *words)
    else:
        command("studenttrain", "fit", *words, "--device", "cpu", "-q", *student.options)
    figures = json.loads(
        command("studenttrain", "eval", "--checkpoint", str(out), "--data", str(run / "val.npy"), "--json")
    )
    print(f"{student.name}, seed {seed}: {figures['nll']:.4f}", file=sys.stderr, flush=True)
    return float(figures["nll"])


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the teacher; everything goes there")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="students that are taught at a time")
    options = parser.parse_args()
    stores = {name: dump(options.run, name, words) for name, words in ENCODINGS.items()}
    jobs = [(student, seed) for seed in range(options.seeds) for student in STUDENTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: validation_loss(options.run, job[0], job[1], options.steps), jobs))
    losses: dict[str, list[float]] = {student.name: [] for student in STUDENTS}
    for (student, _), value in zip(jobs, found, strict=True):
        losses[student.name].append(value)
    rows = [row(student, losses, stores) for student in STUDENTS]
    for line in rows:
        print_row(line)
    teacher = json.loads((options.run / "teacher.json").read_text())
    write_result("shakespeare", {"teacher": teacher, "student": STUDENT, "steps": options.steps, "rows": rows})


def row(student: Student, losses: dict[str, list[float]], stores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A line of the table; gaps are taken seed by seed."""
    mine, hard, live = losses[student.name], losses[HARD], losses[LIVE]
    info = stores[student.targets]
    is_stored = student.name not in (HARD, LIVE)
    num_tokens = info["num_rows"] * LENGTH
    closed = [(h - m) / (h - lv) for h, m, lv in zip(hard, mine, live, strict=True)]
    return {
        "name": student.name,
        "bytes_a_token": round(info["num_bytes"] / num_tokens, 2) if is_stored else None,
        "val_loss": [round(value, 4) for value in mine],
        "mean": round(statistics.mean(mine), 4),
        "gap_to_live": round(statistics.mean(m - lv for m, lv in zip(mine, live, strict=True)), 4),
        "gap_closed": round(statistics.mean(closed), 3),
        "gap_closed_by_seed": [round(value, 3) for value in closed],
    }


def print_row(line: dict[str, Any]) -> None:
    """A line of the table, for a person."""
    size = "" if line["bytes_a_token"] is None else f"{line['bytes_a_token']:8.1f}"
    losses = " ".join(f"{value:.4f}" for value in line["val_loss"])
    print(f"{line['name']:<40} {size:>8} {losses}  {line['gap_to_live']:+.4f} {100 * line['gap_closed']:6.1f} %")


if __name__ == "__main__":
    main()
