"""Benchmark (b): the time of the loss, forward and backward, on soft targets over hard targets only: at most 1.10.

    python -m benchmarks.loss_step

One head and the hidden states of a batch; what is timed is all that a step does with them: the product with the head,
the losses, and the gradients of the hidden states and of the head. In turns, a round each:

- `hard`: hard targets only, through the same chunked head: what the others are measured against;
- `topk`: the tail bucket on 64 kept entries; `sample`: the cross entropy of 64 draws; `mixed`: topk and hard targets,
  half of each; `mixed_t2`: the same at a temperature of 2, where the hard targets need a softmax of their own;
- `hidden`: the full KL to a teacher of the same width, whose logits are computed too;
- `topk_recomputed`: topk where the weights of the losses are not said beforehand, so that chunks are computed twice;
- `topk_checkpoint`: the same with nothing but torch.utils.checkpoint, a chunk of rows at a time;
- `topk_plain` and `hard_plain`: all logits at once.

The student's model is not in it: with one, the ratios are nearer to 1. Prints one JSON object: medians, and the medians
of the ratios of a round, `cpu_over_hard` of the processor time of all threads.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.result import write_result
from studenttrain.chunked import chunked_losses
from studenttrain.heads import Head
from studenttrain.loss import hard_loss, rows_at_once, soft_loss
from studenttrain.targets import HiddenTargets, SampleTargets, SoftTargets, TopKTargets, take_rows

TARGET = 1.10


def random_topk(num_rows: int, num_classes: int, k: int, temperature: float, device: torch.device) -> TopKTargets:
    """Distinct random ids, and probabilities that fall off as a language model's do; a tenth is left to the tail."""
    shift_R1 = torch.randint(num_classes, (num_rows, 1), device=device)
    ids_RK = (torch.randperm(num_classes, device=device)[:k] + shift_R1) % num_classes
    logprobs_K = (-1.2 * torch.arange(1, k + 1, device=device).log()).log_softmax(0) + torch.tensor(0.9).log()
    valid_R = torch.ones(num_rows, dtype=torch.bool, device=device)
    log_tail_R = torch.full((num_rows,), 0.1, device=device).log()
    return TopKTargets(ids_RK, logprobs_K.expand(num_rows, k).contiguous(), log_tail_R, valid_R, temperature)


def seconds(step: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Wall time of a forward and a backward pass, and processor time of all threads."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    step().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def ratios(times: dict[str, list[tuple[float, float]]], name: str, clock: int) -> list[float]:
    """The times of a step over those of hard targets only, round by round."""
    return [taken[clock] / hard[clock] for taken, hard in zip(times[name], times["hard"], strict=True)]


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=64, help="kept entries, and draws")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, num_rows, num_classes = torch.device(args.device), args.positions, args.vocabulary
    hidden_RW = torch.randn(num_rows, args.width, device=device, requires_grad=True)
    head = Head((0.02 * torch.randn(num_classes, args.width, device=device)).requires_grad_())
    hard_R = torch.randint(num_classes, (num_rows,), device=device)
    topk = random_topk(num_rows, num_classes, args.k, 1.0, device)
    topk_t2 = random_topk(num_rows, num_classes, args.k, 2.0, device)
    draws_RK = torch.full((num_rows, args.k), 1 / args.k, device=device)
    sample = SampleTargets(topk.ids_NK.sort(1).values, draws_RK, topk.valid_N, 1.0)
    teacher_RW = torch.randn(num_rows, args.width, device=device)
    hidden = HiddenTargets(teacher_RW, Head(head.weight_CW.detach().clone()), topk.valid_N, 1.0)
    chunk_rows = rows_at_once(num_classes, device)

    def chunked(
        targets: SoftTargets | None,
        name: str | None,
        hard_targets_R: Tensor | None,
        weights: tuple[float, float] | None,
    ) -> Callable[[], Tensor]:
        def step() -> Tensor:
            soft_R, hard_R = chunked_losses(head, hidden_RW, targets, name, hard_targets_R, weights=weights)
            factors = (1.0, 1.0) if weights is None else weights
            loss: Tensor = (factors[0] * soft_R.sum() + factors[1] * hard_R.sum()) / num_rows
            return loss

        return step

    def checkpointed() -> Tensor:
        def of_rows(hidden_nW: Tensor, targets: TopKTargets) -> Tensor:
            return soft_loss("tail-bucket", head.logits(hidden_nW), targets).sum()

        total: Tensor = hidden_RW.new_zeros(())
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            part: Tensor = checkpoint(of_rows, hidden_RW[rows], take_rows(topk, rows), use_reentrant=False)
            total = total + part
        return total.div(num_rows)

    steps: dict[str, Callable[[], Tensor]] = {
        "hard": chunked(None, None, hard_R, (0.0, 1.0)),
        "topk": chunked(topk, "tail-bucket", None, (1.0, 0.0)),
        "sample": chunked(sample, "sampled-ce", None, (1.0, 0.0)),
        "mixed": chunked(topk, "tail-bucket", hard_R, (0.5, 0.5)),
        "mixed_t2": chunked(topk_t2, "tail-bucket", hard_R, (0.5, 0.5)),
        "hidden": chunked(hidden, "kl", None, (1.0, 0.0)),
        "topk_recomputed": chunked(topk, "tail-bucket", None, None),
        "topk_checkpoint": checkpointed,
        "topk_plain": lambda: soft_loss("tail-bucket", head.logits(hidden_RW), topk).mean(),
        "hard_plain": lambda: hard_loss(head.logits(hidden_RW), hard_R).mean(),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(args.rounds + 1):
        for name, step in steps.items():
            hidden_RW.grad = head.weight_CW.grad = None
            taken = seconds(step, device)
            if index:  # the first round warms up
                times[name].append(taken)
    figures = {
        "positions": num_rows,
        "vocabulary": num_classes,
        "width": args.width,
        "k": args.k,
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch_threads": args.threads,
        "chunk_rows": chunk_rows,
        "seconds": {name: round(statistics.median(wall for wall, _ in taken), 4) for name, taken in times.items()},
        "over_hard": {name: round(statistics.median(ratios(times, name, 0)), 3) for name in steps},
        "cpu_over_hard": {name: round(statistics.median(ratios(times, name, 1)), 3) for name in steps},
        "topk_ratios": [round(value, 3) for value in ratios(times, "topk", 0)],
        "target": TARGET,
    }
    print(json.dumps(figures))
    write_result("loss_step", figures)


if __name__ == "__main__":
    main()
