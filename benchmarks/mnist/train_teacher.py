"""Train the MNIST teacher of the founding paper: 784-1200-1200-10 with dropout and jitter of two pixels.

    python -m benchmarks.mnist.train_teacher --mnist DIR --out teacher.pt --epochs 300

Writes the weights (a plain state dict, for `--arch mlp:784-1200-1200-10`) and a JSON line of figures beside them.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3, which reports 67 test errors.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from studenttrain.models import MLP


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    num_dims = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def jitter(images_NHW: torch.Tensor, generator: torch.Generator, num_pixels: int = 2) -> torch.Tensor:
    """The images, each moved by up to `num_pixels` in x and y, zeros moving in."""
    num_images, height, width = images_NHW.shape
    padded = F.pad(images_NHW, (num_pixels,) * 4)
    shift = torch.randint(0, 2 * num_pixels + 1, (2, num_images, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).unsqueeze(2)
    columns = (torch.arange(width) + shift[1]).unsqueeze(1)
    return padded[torch.arange(num_images).view(-1, 1, 1), rows, columns]


def count_errors(model: MLP, images: torch.Tensor, classes: torch.Tensor) -> int:
    """How many top-1 predictions are wrong."""
    model.eval()
    with torch.inference_mode():
        wrong = sum(
            int((model(x).argmax(1) != y).sum()) for x, y in zip(images.split(2000), classes.split(2000), strict=True)
        )
    model.train()
    return wrong


def main() -> None:
    """Train the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--input-dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.from_numpy(read_idx(args.mnist / "train-images-idx3-ubyte.gz").copy()).float().div_(255)
    classes = torch.from_numpy(read_idx(args.mnist / "train-labels-idx1-ubyte.gz").copy()).long()
    test_images = torch.from_numpy(read_idx(args.mnist / "t10k-images-idx3-ubyte.gz").copy()).float().div_(255)
    test_classes = torch.from_numpy(read_idx(args.mnist / "t10k-labels-idx1-ubyte.gz").copy()).long()

    model = MLP([784, 1200, 1200, 10], dropout=args.dropout, input_dropout=args.input_dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    num_steps = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(args.batch_size):
            batch = jitter(images[index], generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), classes[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            errors = count_errors(model, test_images, test_classes)
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {errors} test errors, {seconds:.0f} s", flush=True)
            torch.save(model.state_dict(), args.out)
    figures = {"epochs": args.epochs, "test_errors": errors, "seconds": round(seconds), "threads": args.threads}
    figures |= {"seed": args.seed, "precision": args.precision}
    args.out.with_suffix(".json").write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
