"""Cut a text into characters, and train the character GPT that the students of `benchmarks.shakespeare.run` learn from.

    python -m benchmarks.shakespeare.train_teacher --text input.txt --run RUN [--minutes 10]

Writes into RUN: `train.npy` and `val.npy` (the last tenth), uint8 ids of the text's characters; `teacher.pt`, plain
weights for `--arch gpt:4x128`, those of the best validation loss; and a line of figures. The rate falls with the time
that has passed, so that a slower machine still ends a whole schedule, with fewer steps.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from studenttrain.gpt import GPT
from studenttrain.models import build_model

ARCH = "gpt:4x128,dropout=0.1"
LENGTH = 128
BATCH = 32
RATE = 2e-3
WARMUP_S = 10.0
EVERY = 500  # steps between two looks at the validation loss


def write_tokens(text: Path, run: Path) -> int:
    """The characters of a text as ids, in order of their code points; how many different ones there are."""
    characters = text.read_text(encoding="utf-8")
    names = sorted(set(characters))
    ids = np.array([names.index(character) for character in characters], np.uint8)
    cut = len(ids) * 9 // 10
    np.save(run / "train.npy", ids[:cut])
    np.save(run / "val.npy", ids[cut:])
    return len(names)


def pieces(ids: Tensor, starts: Tensor) -> Tensor:
    """Runs of LENGTH + 1 ids from some places."""
    return ids[starts[:, None] + torch.arange(LENGTH + 1)]


@torch.no_grad()
def validation_loss(model: GPT, ids: Tensor) -> float:
    """Mean cross entropy of the next character over all whole sequences, nats."""
    model.eval()
    samples = pieces(ids, torch.arange(0, len(ids) - LENGTH, LENGTH))
    total = sum(float(loss(model, part) * len(part)) for part in samples.split(128))
    model.train()
    return total / len(samples)


def loss(model: GPT, samples: Tensor) -> Tensor:
    """Mean cross entropy of the next character, nats."""
    logits_NPV = model(samples[:, :-1])
    return F.cross_entropy(logits_NPV.flatten(0, 1), samples[:, 1:].flatten())


def main() -> None:
    """Train the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one text, UTF-8")
    parser.add_argument("--run", type=Path, required=True, help="folder that everything goes to")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.run.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokens(options.text, options.run)
    train, val = (torch.from_numpy(np.load(options.run / f"{name}.npy")).long() for name in ("train", "val"))
    model = build_model(ARCH, vocabulary)
    assert isinstance(model, GPT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.1)
    begin, step, best = time.monotonic(), 0, math.inf
    while (share := (time.monotonic() - begin) / (60 * options.minutes)) < 1:
        rate = RATE * min(1.0, (time.monotonic() - begin) / WARMUP_S) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(model, pieces(train, torch.randint(len(train) - LENGTH, (BATCH,))))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % EVERY == 0:
            best = keep_best(model, val, best, options.run)
            print(
                f"{step} steps, {100 * share:.0f} % of the time, training loss {value:.3f}, best {best:.4f}", flush=True
            )
    best = keep_best(model, val, best, options.run)
    figures = {"arch": ARCH, "vocabulary": vocabulary, "steps": step, "val_loss": best, "minutes": options.minutes}
    (options.run / "teacher.json").write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


def keep_best(model: GPT, val: Tensor, best: float, run: Path) -> float:
    """Write the weights where the validation loss is the best so far; the best one."""
    found = validation_loss(model, val)
    if found < best:
        torch.save(model.state_dict(), run / "teacher.pt")
    return min(found, best)


if __name__ == "__main__":
    main()
