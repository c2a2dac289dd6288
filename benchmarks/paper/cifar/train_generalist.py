"""Train the generalist of the specialists' experiment on CIFAR-100, with crops and flips, in bfloat16 on a CPU.

    python -m benchmarks.paper.cifar.train_generalist --cifar DIR --out RUN/generalist.safetensors

Cuts the training rows into those to learn from and those held out (`RUN/train.parquet`, `RUN/held.parquet`), writes the
weights (for `--arch benchmarks.paper.cifar.network:make`) and JSON figures beside them. A checkpoint an epoch: the same
command goes on after a kill. Inputs are what `teacherdump run --mean 0.507,0.487,0.441 --std 0.267,0.256,0.276` gives.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.cifar.corpora import split_cifar
from benchmarks.paper.cifar.images import crop_and_flip, normalise, pad, read_images
from benchmarks.paper.cifar.network import make


def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Part of the images whose largest logit is their class."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        right = sum(
            int((model(normalise(x)).argmax(1) == y).sum())
            for x, y in zip(images.split(500), classes.split(500), strict=True)
        )
    model.train()
    return right / len(images)


def learning_rate(step: int, num_steps: int, num_warmup: float, peak: float) -> float:
    """Up in a straight line for the steps of the warm-up, then down to 0."""
    return peak * min((step + 1) / num_warmup, (num_steps - step - 1) / (num_steps - num_warmup))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder of train-*.parquet and test-0.parquet")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go, .safetensors")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.15, help="the highest, after the warm-up")
    parser.add_argument("--warmup-epochs", type=float, default=3.2)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train the generalist; where its weights are, say what is known of them."""
    args = parse_arguments()
    described = args.out.with_suffix(".json")
    if args.out.exists():
        print(json.dumps(json.loads(described.read_text())))
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    run = args.out.parent
    split_cifar(args.cifar, run)
    images, classes = read_images(run / "train.parquet")
    held, held_classes = read_images(run / "held.parquet")
    model = make()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    figures = train(model, images, classes, (held, held_classes), args)
    test, test_classes = read_images(args.cifar / "test-0.parquet")
    figures["train_accuracy"] = accuracy(model, images, classes)
    figures["held_accuracy"] = accuracy(model, held, held_classes)
    figures["test_accuracy"] = accuracy(model, test, test_classes)
    settings = ("epochs", "batch_size", "lr", "warmup_epochs", "weight_decay", "seed", "threads")
    figures |= {name: getattr(args, name) for name in settings}
    described.write_text(json.dumps(figures, indent=1) + "\n")
    unfinished = args.out.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, unfinished)
    unfinished.replace(args.out)
    print(json.dumps(figures))


def train(
    model: nn.Module, images: Tensor, classes: Tensor, held: tuple[Tensor, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Train a model, from its checkpoint where it has one; give its curve, and seconds by the clock and of the CPU."""
    padded = pad(images)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    checkpoint = args.out.with_suffix(".ckpt")
    done: dict[str, Any] = {"curve": [], "seconds": 0.0, "cpu_s": 0.0}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = {name: saved.get(name, value) for name, value in done.items()}
    for epoch in range(len(done["curve"]), args.epochs):
        start, cpu_start = time.perf_counter(), time.process_time()
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        loss = train_epoch(model, optimizer, padded, classes, epoch, generator, args)
        held_accuracy = accuracy(model, *held)
        done["seconds"] += time.perf_counter() - start
        done["cpu_s"] += time.process_time() - cpu_start
        done["curve"].append({"loss": round(loss, 4), "held_accuracy": held_accuracy})
        said = f"epoch {epoch + 1}: loss {loss:.3f}, held out {held_accuracy:.4f}"
        print(f"{said}, {done['seconds']:.0f} s, {done['cpu_s']:.0f} s of the CPU", file=sys.stderr, flush=True)
        unfinished = checkpoint.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **done}, unfinished)
        unfinished.replace(checkpoint)
    return done


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    padded: Tensor,
    classes: Tensor,
    epoch: int,
    generator: torch.Generator,
    args: argparse.Namespace,
) -> float:
    """See every image once, but for what is no whole batch; give the mean loss."""
    num_batches = len(padded) // args.batch_size
    order = torch.randperm(len(padded), generator=generator)[: num_batches * args.batch_size]
    losses = []
    for step, index in enumerate(order.split(args.batch_size), epoch * num_batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.epochs * num_batches, args.warmup_epochs * num_batches, args.lr)
        batch = normalise(crop_and_flip(padded[index], generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), classes[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
