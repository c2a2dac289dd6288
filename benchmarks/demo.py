"""The main job end to end on scikit-learn's digits, real scans of 8 x 8 pixels: `make demo`.

Trains a small convnet as the teacher, writes the digits as PNG files, then calls the commands that a user calls: the
teacher's soft targets into a store, a student out of it, and the same student from hard targets alone to compare.
Everything lies in `demo-run/`, which is made anew each time.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

NUM_TRAIN = 997
TEMPERATURE = 4
EPOCHS = 100
STUDENT = "mlp:64-128-10"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder of the demo; what is there goes")
    folder = parser.parse_args().out
    start = time.perf_counter()
    make_folder(folder)

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    say(f"1. Write {len(order):,} scanned digits as PNG files, a folder a class: {len(train)} train, {len(test)} test.")
    write_corpus(folder / "train", digits.images[train], digits.target[train])
    write_corpus(folder / "test", digits.images[test], digits.target[test])

    say("2. Train the teacher, a convnet on jittered digits, and save it as a torch.export program (about 15 seconds).")
    teacher = train_teacher(digits.images[train], digits.target[train])
    teacher_errors = count_errors(teacher, digits.images[test], digits.target[test])
    save_program(teacher, folder / "teacher.pt")

    say("3. Run the teacher once over each corpus and store its soft targets.")
    for corpus in ("train", "test"):
        call(
            f"teacherdump run --model {folder}/teacher.pt --data {folder}/{corpus} --encoding dense --values float32 "
            f"--out {folder}/{corpus}-logits.zarr"
        )
    call(f"logitstore info {folder}/train-logits.zarr")

    say("4. Train a student from the store. The teacher is not needed any more: remove it first.")
    (folder / "teacher.pt").unlink()
    fit = (
        f"studenttrain fit --targets {folder}/train-logits.zarr --data {folder}/train --student {STUDENT} "
        f"--epochs {EPOCHS} --batch-size 64 --lr 1e-2 --val-data {folder}/test --val-targets {folder}/test-logits.zarr"
    )
    call(f"{fit} --temperature {TEMPERATURE} --out {folder}/soft")

    say("5. Train the same student from the hard targets alone, to compare.")
    call(f"{fit} --alpha 0 --out {folder}/hard")

    say("6. Count the errors on the test digits.")
    hard, soft = evaluate(folder, "hard"), evaluate(folder, "soft")
    print_table(len(test), teacher_errors, hard, soft)
    print(f"\nThe student's report: {folder}/soft/report.html")
    print(f"It took {time.perf_counter() - start:.0f} s.")


def say(text: str) -> None:
    """Print a step's heading."""
    print(f"\n{text}", flush=True)


def call(command: str) -> str:
    """Show a command, run it, and give what it printed."""
    print(f"$ {command}", flush=True)
    words = shlex.split(command)
    words[0] = str(Path(sys.executable).with_name(words[0]))
    # one thread: models this small spend more time waiting for a second one than it saves
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"demo: `{command}` ended with exit code {done.returncode}")
    return done.stdout


def make_folder(folder: Path) -> None:
    """An empty folder; what an earlier demo left goes, anything else stays."""
    marker = folder / ".demo"
    if folder.exists():
        if any(folder.iterdir()) and not marker.exists():
            raise SystemExit(f"demo: expected {folder} to be of an earlier demo, got other files; give --out another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    marker.touch()


def write_corpus(folder: Path, images_NHW: NDArray[np.float64], classes_N: NDArray[np.int64]) -> None:
    """Write images of 0 to 16 as PNG files, a folder a class."""
    for row, (image, label) in enumerate(zip(images_NHW, classes_N, strict=True)):
        path = folder / str(label) / f"{row:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_bytes(image)).save(path)


def to_bytes(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness of 0 to 16 as bytes."""
    return np.rint(images * (255 / 16)).astype(np.uint8)


def to_inputs(images_NHW: NDArray[np.float64]) -> Tensor:
    """Images as a model reads them from the PNG files: float32 (N, 1, H, W), from 0 to 1."""
    return torch.from_numpy(to_bytes(images_NHW)).float().div(255).unsqueeze(1)


def train_teacher(images_NHW: NDArray[np.float64], classes_N: NDArray[np.int64], epochs: int = 60) -> nn.Module:
    """A convnet with dropout, trained on digits that are moved by up to one pixel."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs, classes = to_inputs(images_NHW), torch.from_numpy(classes_N)
    model = nn.Sequential(
        *convolution(1, 32), *convolution(32, 64), nn.MaxPool2d(2), *convolution(64, 64),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(inputs) // 64))
    for _ in range(epochs):
        for index in torch.randperm(len(inputs)).split(64):
            loss = F.cross_entropy(model(jitter(inputs[index])), classes[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def convolution(num_in: int, num_out: int) -> list[nn.Module]:
    """A 3 x 3 convolution, batch norm and ReLU."""
    return [nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU()]


def jitter(inputs_N1HW: Tensor) -> Tensor:
    """The inputs, each moved by up to one pixel in x and y, zeros moving in."""
    num_inputs, _, height, width = inputs_N1HW.shape
    padded = F.pad(inputs_N1HW, (1, 1, 1, 1))
    shift = torch.randint(0, 3, (2, num_inputs, 1))
    rows = (torch.arange(height) + shift[0]).unsqueeze(2)
    columns = (torch.arange(width) + shift[1]).unsqueeze(1)
    return padded[torch.arange(num_inputs).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def count_errors(model: nn.Module, images_NHW: NDArray[np.float64], classes_N: NDArray[np.int64]) -> int:
    """How many top-1 predictions are wrong."""
    with torch.inference_mode():
        top1 = model(to_inputs(images_NHW)).argmax(1).numpy()
    return int((top1 != classes_N).sum())


def save_program(model: nn.Module, path: Path) -> None:
    """Save a model as a torch.export program that takes any batch."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    with path.open("wb") as file:
        torch.export.save(program, file)


def evaluate(folder: Path, run: str) -> dict[str, float]:
    """Figures of a run on the test digits."""
    figures: dict[str, float] = json.loads(
        call(
            f"studenttrain eval --checkpoint {folder}/{run} --data {folder}/test "
            f"--targets {folder}/test-logits.zarr --json"
        )
    )
    return figures


def print_table(num_test: int, teacher_errors: int, hard: dict[str, float], soft: dict[str, float]) -> None:
    """One table: who made how many errors."""
    print(f"\n{'':32}{f'errors of {num_test}':>15}{'top-1':>9}{'agreement':>11}")
    print(f"{'teacher, convnet':32}{teacher_errors:>15}{1 - teacher_errors / num_test:>9.1%}{'':>11}")
    for name, figures in (("hard targets alone", hard), ("stored soft targets", soft)):
        line = f"{figures['num_errors']:>15}{figures['top1']:>9.1%}{figures['agreement']:>11.1%}"
        print(f"{f'student, {name}':32}{line}")


if __name__ == "__main__":
    main()
