"""Files that arrive, a dump that follows them, a student that trains meanwhile, both killed at random; then the replay.

    python -m benchmarks.follow --seconds 30

Tars of small images arrive one after the other, some of them slowly. `teacherdump run --follow` and `studenttrain fit`
run beside each other, each killed (-9) at random moments and started again, until the time is over; then both come to
their end. What must hold: every store of the series is just what an undisturbed run over the same files gives; and
`studenttrain fit --replay` on the finished series comes to the same weights and saw the same rows.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.result import write_result
from storage.corpus import list_files
from storage.errors import StoreError
from storage.reader import Store, open_store
from storage.scan import verify
from storage.series import Series
from storage.series_records import FilesRecord
from studenttrain.checkpoint import load_checkpoint
from studenttrain.epochs import EPOCHS as EPOCHS_SEEN
from studenttrain.epochs import read_epochs
from studenttrain.models import build_model
from teacherdump.config import DumpConfig
from teacherdump.run import Preparation, run_source
from teacherdump.source import open_data, open_source

SIDE, NUM_CLASSES, ROWS_A_FILE = 8, 10, 60
STUDENT = "mlp:192-32-10,dropout=0.1"
EPOCHS = 12
STARTING_SHARE = 0.15  # of the kills fall while python starts
LONGEST_WORK_S = 2.5  # of a process that is going to be killed
LONGEST_START_S = 30.0

# Slow enough that kills fall into work.
TEACHER = """
import pathlib
import time
from studenttrain.models import MLP

class Slow(MLP):
    def forward(self, inputs):
        pathlib.Path("working").touch()
        time.sleep(0.02)
        return super().forward(inputs)

def make():
    return Slow((192, 32, 10))
"""


def tar_bytes(number: int) -> bytes:
    """A tar of images with their classes."""
    generator, stream = np.random.default_rng(number), BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for place in range(ROWS_A_FILE):
            picture = BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(picture, "PNG")
            key = f"{number:04d}-{place:03d}"
            hard = str(int(generator.integers(NUM_CLASSES))).encode()
            for name, data in ((f"{key}.png", picture.getvalue()), (f"{key}.cls", hard)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return stream.getvalue()


def arrive(incoming: Path, seconds: float, num_files: int) -> None:
    """Let files arrive over some time: every third is written in place, in pieces; the others are renamed into it."""
    for number in range(num_files):
        data, path = tar_bytes(number), incoming / f"train-{number:04d}.tar"
        if number % 3 == 2:
            with path.open("wb") as file:
                for start in range(0, len(data), len(data) // 4 + 1):
                    file.write(data[start : start + len(data) // 4 + 1])
                    file.flush()
                    time.sleep(0.05)
        else:
            partial = incoming / f"train-{number:04d}.tar.part"
            partial.write_bytes(data)
            partial.rename(path)
        time.sleep(seconds / num_files)


@dataclass
class Subject:
    """A command that is killed and started again, until it may come to its end.

    Attributes:
        words: the command; run again, it goes on.
        folder: where it runs.
        marker: a file that it writes to when it is at work.
        chance: when it is killed.
        num_kills: that met it alive.
        num_starts: of it.
        outputs: what each of its processes printed.
    """

    words: Sequence[str]
    folder: Path
    marker: Path
    chance: random.Random
    num_kills: int = 0
    num_starts: int = 0
    outputs: list[str] = field(default_factory=list)

    def run(self, seconds: float, last_words: Sequence[str] = ()) -> None:
        """Disturb it for so long, then let it end.

        Raises:
            SystemExit: it failed by itself.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._start(self.words, is_killed=True):
                return
        self._start([*self.words, *last_words], is_killed=False)

    def _start(self, words: Sequence[str], is_killed: bool) -> bool:
        """Run it, to its end or to some time after it began to work; whether it ended by itself."""
        start = time.time()
        self.num_starts += 1
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(Path.cwd())}
        process = subprocess.Popen(
            words, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=self._life(process, start) if is_killed else None)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            self.num_kills += 1
            self.outputs.append(output)
            return False
        self.outputs.append(output)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{output}")
        return True

    def _life(self, process: "subprocess.Popen[str]", start: float) -> float:
        """Seconds that it has left to live, once it is at work, or now and then while it still starts."""
        if self.chance.random() < STARTING_SHARE:
            return self.chance.uniform(0.0, 2.0)
        while time.time() - start < LONGEST_START_S and process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if self.marker.stat().st_mtime > start:
                    break
            time.sleep(0.02)
        return self.chance.uniform(0.0, LONGEST_WORK_S)


def dump_words(python: str, out: str) -> list[str]:
    """The dump that follows."""
    words = [
        python,
        "-c",
        "from teacherdump.cli import main; main()",
        "run",
        "--model",
        "teacher.pt",
        "--arch",
        "slow_teacher:make",
    ]
    words += ["--data", "incoming", "--out", out, "--device", "cpu", "--batch-size", "16", "--shard-rows", "32"]
    words += ["--chunk-rows", "16", "--encoding", "topk", "--k", "4", "--member-rows", "240", "--follow"]
    return [*words, "--settle", "0.5", "--poll", "0.2", "--dedupe", "key", "-q"]


def fit_words(python: str, out: str, *more: str) -> list[str]:
    """The student."""
    words = [python, "-m", "studenttrain.cli", "fit", "--targets", "series", "--data", "incoming", "--out", out]
    words += ["--student", STUDENT, "--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu", "-q"]
    return [*words, "--checkpoint-every", "5", "--warmup-steps", "3", *more]


def wait_for_rows(series: Path, seconds: float) -> None:
    """Until something is sealed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            open_store(series).close()
        except StoreError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"{series}: nothing was sealed in {seconds:.0f} s")


def array_digests_of(store: Store) -> list[Mapping[str, str]]:
    """The digests of each shard's arrays."""
    return [store.seal(shard).arrays for shard in store.sealed_shards()]


def undisturbed(folder: Path, record: FilesRecord) -> list[Mapping[str, str]]:
    """What one run over a member's files gives, which nobody disturbs."""
    out = folder / "reference" / f"{record.member}.zarr"
    config = DumpConfig(
        models=(str(folder / "teacher.pt"),), arch=f"mlp:192-32-{NUM_CLASSES}", data=str(folder / "incoming"),
        out=str(out), device="cpu", batch_size=16, shard_rows=32, chunk_rows=16, encoding="topk", k=4,
        run_log="none",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        source = open_source(config, open_data(config, [file.name for file in record.files]))
        run_source(source, Preparation(config, print, stack).prepared, print, True)
        return array_digests_of(stack.enter_context(open_store(out)))


def main() -> None:
    """Run it, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for which both are disturbed")
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folder behind")
    parser.add_argument("--no-result", action="store_true", help="write no result file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="follow-"))
    try:
        figures = measure(folder, options.seconds, options.files, options.seed)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(json.dumps(figures, indent=2))
    if not options.no_result:
        write_result("follow", figures)
    if not all(figures[name] for name in ("equal_weights", "equal_epochs", "equal_stores", "verified", "all_rows")):
        raise SystemExit(1)


def measure(folder: Path, seconds: float, num_files: int, seed: int) -> dict[str, Any]:
    """What happened, and whether it all holds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (folder / "slow_teacher.py").write_text(TEACHER)
    torch.save(build_model(f"mlp:192-32-{NUM_CLASSES}").state_dict(), folder / "teacher.pt")
    incoming, series = folder / "incoming", folder / "series"
    incoming.mkdir()
    python = sys.executable
    dump = Subject(dump_words(python, "series"), folder, folder / "working", random.Random(seed))
    student = Subject(fit_words(python, "first"), folder, folder / "first" / EPOCHS_SEEN, random.Random(seed + 1))
    start = time.monotonic()
    failed: list[BaseException] = []

    def guarded(act: Any, *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                act(*args)
            except BaseException as error:  # noqa: BLE001 - raised again below
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    files = guarded(arrive, incoming, seconds * 0.8, num_files)
    dumping = guarded(dump.run, seconds, ["--idle", "1.5"])
    wait_for_rows(series, seconds)
    training = guarded(student.run, seconds - (time.monotonic() - start))
    for thread in (files, dumping, training):
        thread.join()
    if failed:
        raise failed[0]
    words = fit_words(python, "again", "--replay", "first")
    replay = Subject(words, folder, folder / "again" / EPOCHS_SEEN, random.Random(seed + 2))
    replay.run(seconds / 10)  # killed too, once or twice

    with open_store(series) as opened:
        assert isinstance(opened, Series)
        found = [array_digests_of(member) for member in opened.members]
        records, num_rows = opened.files, opened.num_sealed_rows
    equal_stores = [undisturbed(folder, record) for record in records] == found
    one, two = (load_checkpoint(folder / name / "checkpoint.pt") for name in ("first", "again"))
    seen = read_epochs(folder / "first" / "epochs.jsonl")
    return {
        "num_files": len(list_files(incoming, "webdataset")),
        "num_rows": num_rows,
        "num_members": len(records),
        "num_dump_kills": dump.num_kills,
        "num_student_kills": student.num_kills,
        "num_replay_kills": replay.num_kills,
        "num_epochs": len(seen),
        "num_different_epochs": len({epoch.sealed for epoch in seen}),
        "rows_of_first_epoch": seen[0].num_rows,
        "rows_of_last_epoch": seen[-1].num_rows,
        "num_steps": one["step"],
        "all_rows": num_rows == num_files * ROWS_A_FILE,
        "verified": verify(series).ok,
        "equal_stores": equal_stores,
        "equal_weights": all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"]),
        "equal_epochs": seen == read_epochs(folder / "again" / "epochs.jsonl"),
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    main()
