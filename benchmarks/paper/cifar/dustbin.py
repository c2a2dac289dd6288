"""Whether the correction of the dustbin by the log of the oversampling is the best one, and how sure a dustbin is.

    python -m benchmarks.paper.cifar.dustbin --run RUN --data RUN/held.parquet --targets RUN/held.zarr --phase hard

Prints JSON: accuracy and NLL of the fusion with every dustbin's logit moved by some more, and, over the rows that
specialists are active for, what they give to their dustbin, what the generalist gives to the same classes, and how many
of the rows belong there.

Legend: N rows, C classes, K a specialist's classes and its dustbin.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper.cifar.images import normalise, read_images
from storage.reader import open_store
from studenttrain.specialists.fused import Fused, FusedClassifier
from studenttrain.specialists.fusion import fuse
from studenttrain.specialists.generalist import stored_logprobs

MOVES = (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
BATCH_ROWS = 500


def moved(said_NK: Tensor, by: float) -> Tensor:
    """Log-probabilities with the dustbin's logit moved by some more."""
    return torch.cat([said_NK[:, :-1], said_NK[:, -1:] + by], 1).log_softmax(1)


def measure(classifier: FusedClassifier, parts: list[Fused], hard_targets_N: Tensor) -> dict[str, Any]:
    """The figures of a corpus.

    Args:
        classifier: of all.
        parts: what was said of all rows, some at a time.
        hard_targets_N: of all rows.
    """
    generalist_NC = torch.cat([part.generalist_NC for part in parts])
    active_NM = torch.cat([part.active_NM for part in parts])
    said = [torch.cat(each) for each in zip(*(part.said for part in parts), strict=True)]
    classes = [specialist.classes for specialist in classifier.specialists]
    figures: dict[str, Any] = {"generalist": _figures(generalist_NC, hard_targets_N), "moved": {}}
    for by in MOVES:
        moved_said = [(own, moved(said_NK, by)) for own, said_NK in zip(classes, said, strict=True)]
        fused_NC = fuse(generalist_NC, moved_said, active_NM).logprobs_NC
        figures["moved"][f"{by:g}"] = _figures(fused_NC, hard_targets_N)
    fused_NC = torch.cat([part.logprobs_NC for part in parts])
    figures["change"] = change(generalist_NC, fused_NC, hard_targets_N)
    figures["dustbin"] = dustbin(classes, said, generalist_NC, active_NM, hard_targets_N)
    return figures


def change(before_NC: Tensor, after_NC: Tensor, hard_targets_N: Tensor) -> dict[str, float]:
    """Rows that became right and wrong, and by how much the NLL fell, with the standard error of each difference."""
    was_right_N, is_right_N = (found.argmax(1) == hard_targets_N for found in (before_NC, after_NC))
    gained, lost = int((is_right_N & ~was_right_N).sum()), int((was_right_N & ~is_right_N).sum())
    rows = torch.arange(len(hard_targets_N))
    fall_N = after_NC[rows, hard_targets_N] - before_NC[rows, hard_targets_N]
    return {
        "gained": gained,
        "lost": lost,
        "standard_error": round(math.sqrt(gained + lost), 1),
        "nll_fall": round(fall_N.mean().item(), 4),
        "nll_standard_error": round(fall_N.std().item() / math.sqrt(len(rows)), 4),
    }


def dustbin(
    classes: list[tuple[int, ...]], said: list[Tensor], generalist_NC: Tensor, active_NM: Tensor, hard_targets_N: Tensor
) -> dict[str, float]:
    """Mean probability of the dustbin and its NLL, of specialists and generalist, over the rows of active ones."""
    by_specialist, by_generalist, is_dustbin = [], [], []
    for number, (own, said_NK) in enumerate(zip(classes, said, strict=True)):
        active_N = active_NM[:, number]
        by_specialist.append(said_NK[active_N, -1].exp())
        by_generalist.append(1 - generalist_NC[active_N][:, list(own)].exp().sum(1))
        is_dustbin.append(~torch.isin(hard_targets_N[active_N], torch.tensor(own)))
    true = torch.cat(is_dustbin).double()
    figures = {"true": true.mean().item()}
    for name, found in (("specialists", by_specialist), ("generalist", by_generalist)):
        probs = torch.cat(found).double().clamp(1e-6, 1 - 1e-6)
        figures[name] = probs.mean().item()
        figures[f"nll_{name}"] = F.binary_cross_entropy(probs, true).item()
    return {name: round(value, 4) for name, value in figures.items()}


def _figures(logprobs_NC: Tensor, hard_targets_N: Tensor) -> dict[str, float]:
    top1 = (logprobs_NC.argmax(1) == hard_targets_N).double().mean().item()
    return {"top1": round(top1, 4), "nll": round(F.nll_loss(logprobs_NC, hard_targets_N).item(), 4)}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of the rows")
    parser.add_argument("--targets", type=Path, required=True, help="what the generalist says of them")
    parser.add_argument("--phase", choices=["hard", "soft"], required=True)
    args = parser.parse_args()

    classifier = FusedClassifier.load(args.run / "specialists", phase=args.phase)
    images, classes = read_images(args.data)
    parts = []
    with open_store(args.targets) as store:
        for start in range(0, len(images), BATCH_ROWS):
            stop = min(start + BATCH_ROWS, len(images))
            arrays = store.read(["values"], start, stop)
            generalist_NC = torch.from_numpy(stored_logprobs(store.manifest, arrays, None))
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(classifier.fuse(normalise(images[start:stop]), generalist_NC))
    print(json.dumps(measure(classifier, parts, classes)))


if __name__ == "__main__":
    main()
