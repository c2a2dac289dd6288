"""Benchmark (b): peak memory of the loss over the student's logits alone, 4.98 GB as float32: at most 0.25.

    python -m benchmarks.loss_memory

8,192 positions over a vocabulary of 151,936. Each case runs in a process of its own: one forward and one backward pass
from the student's hidden states through its head to the loss, in chunks of rows. What counts is what the process takes
at its peak above what it has when the hidden states, the head and the targets are there; the gradients of both count.
On a CPU that is the resident set (VmHWM of Linux, reset before the pass), on CUDA what torch has allocated.

`topk`: the tail bucket on 64 kept entries; `sample`: 64 draws; `mixed_t2`: topk and hard targets at a temperature of 2;
`hidden`: the full KL to a teacher of the same width whose logits are computed from its hidden states; `hard`: hard
targets only. `topk_recomputed`: as topk, with chunks computed twice. `topk_plain` and `kl_plain` have all logits at
once, topk and dense targets, over an eighth of the positions and their logits.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_step import random_topk
from benchmarks.result import write_result
from studenttrain.chunked import chunked_losses
from studenttrain.heads import Head
from studenttrain.loss import soft_loss
from studenttrain.targets import DenseTargets, HiddenTargets, SampleTargets, SoftTargets

TARGET = 0.25
PLAIN_SHARE = 8
CASES = ("hard", "topk", "sample", "mixed_t2", "hidden", "topk_recomputed", "topk_plain", "kl_plain")


@dataclass(frozen=True)
class Sizes:
    """Of the student's output, and of what it is made from."""

    positions: int
    vocabulary: int
    width: int
    k: int


def loss_of(case: str, sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """The mean loss of a case, its inputs made."""
    torch.manual_seed(0)
    num_rows, num_classes = sizes.positions, sizes.vocabulary
    hidden_RW = torch.randn(num_rows, sizes.width, device=device, requires_grad=True)
    weight_CW = 0.1 * torch.randn(num_classes, sizes.width, device=device)
    head = Head(weight_CW.clone().requires_grad_())
    targets: SoftTargets
    if case == "kl_plain":
        dense_RC = torch.randn(num_rows, num_classes, device=device)
        targets = DenseTargets.of_logits(dense_RC, 1.0)
        return lambda: soft_loss("kl", head.logits(hidden_RW), targets).mean()
    temperature = 2.0 if case == "mixed_t2" else 1.0
    topk = random_topk(num_rows, num_classes, sizes.k, temperature, device)
    if case == "topk_plain":
        return lambda: soft_loss("tail-bucket", head.logits(hidden_RW), topk).mean()
    targets, name = topk, "tail-bucket"
    if case == "hidden":
        hidden_T = torch.randn(num_rows, sizes.width, device=device)
        targets, name = HiddenTargets(hidden_T, Head(weight_CW), topk.valid_N, 1.0), "kl"
    elif case == "sample":
        draws_RK = torch.full((num_rows, sizes.k), 1 / sizes.k, device=device)
        targets, name = SampleTargets(topk.ids_NK, draws_RK, topk.valid_N, 1.0), "sampled-ce"
    has_hard, has_soft = case in ("hard", "mixed_t2"), case != "hard"
    hard_R = torch.randint(num_classes, (num_rows,), device=device) if has_hard else None
    weights = (float(has_soft), float(has_hard))

    def chunked() -> Tensor:
        given = None if case == "topk_recomputed" else weights
        losses = chunked_losses(head, hidden_RW, targets if has_soft else None, name, hard_R, weights=given)
        return (weights[0] * losses[0] + weights[1] * losses[1]).mean()

    return chunked


def measure(case: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Peak bytes and seconds of a case."""
    loss = loss_of(case, sizes, device)
    start = time.perf_counter()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        loss().backward()
        peak = resident("VmHWM")
    logits_bytes = 4 * sizes.positions * sizes.vocabulary
    return {
        "positions": sizes.positions,
        "logits_bytes": logits_bytes,
        "peak_bytes": peak - before,
        "ratio": round((peak - before) / logits_bytes, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def resident(name: str) -> int:
    """A line of this process's status, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Measure each case in a process of its own, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--k", type=int, default=64, help="kept entries, and draws")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, help="of these alone, without a result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.case is not None:
        share = PLAIN_SHARE if args.case.endswith("_plain") else 1
        sizes = Sizes(args.positions // share, args.vocabulary, args.width, args.k)
        print(json.dumps(measure(args.case, sizes, device)))
        return
    cases = {}
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:], "--case", case]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        cases[case] = json.loads(said)
        print(f"{case}: {cases[case]['peak_bytes'] / 1e6:,.0f} MB, {cases[case]['ratio']} of the logits")
    figures = {
        "vocabulary": args.vocabulary,
        "width": args.width,
        "k": args.k,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch_threads": args.threads,
        "cases": cases,
        "target": TARGET,
    }
    write_result("loss_memory", figures)


if __name__ == "__main__":
    main()
