"""Train the MNIST teacher of the founding paper: 784-1200-1200-10 with dropout, weight constraint and jitter.

    python -m benchmarks.paper.train_teacher --mnist DIR --out teacher.pt --epochs 100

Writes the weights (a plain state dict, for `--arch mlp:784-1200-1200-10`) and prints a JSON line of figures. Every ten
epochs it leaves where it stands in `teacher.pt.resume`, from which the same command goes on.
Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 3, which reports 67 test errors. The constraint is
that of Hinton et al. 2012 (arXiv:1207.0580): the weights that come into a unit have at most a given length.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.paper.idx import TEST_CLASSES, TEST_IMAGES, TRAIN_CLASSES, TRAIN_IMAGES, jitter, read_split
from studenttrain.models import MLP

UNITS = (784, 1200, 1200, 10)


@torch.no_grad()
def constrain(model: MLP, max_norm: float) -> None:
    """Shorten the weights that come into each unit to `max_norm`, where they are longer."""
    for weights in model.parameters():
        if weights.dim() > 1:  # not a bias
            weights.mul_((max_norm / weights.norm(dim=1, keepdim=True)).clamp_(max=1))


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
    """Train the teacher, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--input-dropout", type=float, default=0.1)
    parser.add_argument("--max-norm", type=float, default=2.0, help="of the weights that come into a unit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, classes = read_split(args.mnist / TRAIN_IMAGES, args.mnist / TRAIN_CLASSES)
    test_images, test_classes = read_split(args.mnist / TEST_IMAGES, args.mnist / TEST_CLASSES)

    model = MLP(UNITS, dropout=args.dropout, input_dropout=args.input_dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    num_steps = args.epochs * -(-len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    resume = args.out.with_name(f"{args.out.name}.resume")
    for epoch in range(_restore(resume, parts, generator), args.epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(args.batch_size):
            batch = jitter(images[index], generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), classes[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            constrain(model, args.max_norm)
            schedule.step()
        if (epoch + 1) % 10 == 0:
            _save(resume, parts, generator, epoch + 1)
            errors = count_errors(model, test_images, test_classes)
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {errors} test errors", flush=True)
    torch.save(model.state_dict(), args.out)
    resume.unlink(missing_ok=True)
    norms = [float(weights.detach().norm(dim=1).median()) for weights in model.parameters() if weights.dim() > 1]
    figures = {"num_errors": count_errors(model, test_images, test_classes), "epochs": args.epochs}
    print(json.dumps(figures | {"median_norms": [round(norm, 3) for norm in norms]}), flush=True)


def _save(path: Path, parts: dict[str, Any], generator: torch.Generator, epoch: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"epoch": epoch, "generator": generator.get_state(), "dropout": torch.get_rng_state()}
    partial = path.with_name(f"{path.name}.partial")
    torch.save(state, partial)
    partial.replace(path)


def _restore(path: Path, parts: dict[str, Any], generator: torch.Generator) -> int:
    """The epoch to go on with, everything put back; 0 where nothing was left."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["dropout"])
    return int(state["epoch"])


if __name__ == "__main__":
    main()
