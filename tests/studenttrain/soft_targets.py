"""Stores' arrays of random logits, exact float64 targets, and every loss by its formula, for autograd to go through."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.manifest import Manifest
from studenttrain.heads import Head
from studenttrain.loss import LOWEST_LOGIT, TOPK_LOSSES
from studenttrain.targets import (
    DenseTargets,
    HiddenTargets,
    SampleTargets,
    SoftTargets,
    TopKTargets,
    build_targets,
)

Array = NDArray[Any]
DENSE_LOSSES = ("kl", "reverse-kl", "jsd", "mse")
NUM_DRAWS = 12
ENCODINGS = (
    Dense("float32"),
    Dense("float16"),
    Dense("uint8"),
    TopK(3, "float32"),
    TopK(3),
    TopK(3, "uint8"),
    TopK(7),
    Sample(NUM_DRAWS, 1),
)


def random_logits(num_rows: int = 6, num_classes: int = 7, seed: int = 0, scale: float = 3.0) -> Array:
    """Logits in float32, as float64."""
    values = np.random.default_rng(seed).normal(size=(num_rows, num_classes)) * scale
    return values.astype(np.float32).astype(np.float64)


def manifest_of(encoding: Encoding, num_classes: int, temperatures: Sequence[float], **options: Any) -> Manifest:
    """A manifest of a store of an encoding."""
    empty: dict[str, Any] = {}
    return Manifest(
        num_rows=100,
        num_classes=num_classes,
        shard_rows=10,
        chunk_rows=10,
        encoding=encoding,
        temperatures=tuple(temperatures),
        teacher=empty,
        corpus=empty,
        preprocess=empty,
        class_names=None,
        has_hard_targets=False,
        compressor="none",
        provenance=empty,
        **options,
    )


def stored(encoding: Encoding, logits_NC: Array, temperature: float = 1.0) -> tuple[Manifest, dict[str, Array]]:
    """The arrays that a store keeps of logits; not of `hidden`, which keeps what they are made from."""
    options: dict[str, Any] = {}
    if isinstance(encoding, Sample):
        options["uniform_N"] = uniforms(encoding.seed, np.arange(len(logits_NC)))
    arrays = encoding.encode(logits_NC.astype(np.float32), (temperature,), **options)
    arrays["status"] = np.zeros(len(logits_NC), np.uint8)
    return manifest_of(encoding, logits_NC.shape[1], (temperature,)), arrays


def stored_hidden(hidden_NW: Array, head: Head) -> tuple[Manifest, dict[str, Array]]:
    """The arrays that a store keeps of hidden states, float32."""
    encoding = Hidden(head.width, "float32", head.scale, head.soft_cap, head.bias_C is not None)
    logits_NC = head.logits(torch.from_numpy(hidden_NW).float()).numpy()
    arrays = encoding.encode(logits_NC, (1.0,), hidden_NW=hidden_NW)
    arrays["status"] = np.zeros(len(hidden_NW), np.uint8)
    return manifest_of(encoding, head.num_classes, (1.0,)), arrays


def targets_of(encoding: Encoding, logits_NC: Array, temperature: float = 1.0) -> SoftTargets:
    """What a student gets of logits that were stored."""
    return build_targets(*stored(encoding, logits_NC, temperature), temperature)


def all_valid(num_rows: int) -> Tensor:
    """Every row has targets."""
    return torch.ones(num_rows, dtype=torch.bool)


def double_dense(teacher_NC: Tensor, temperature: float = 1.0) -> DenseTargets:
    """Exact float64 dense targets."""
    return DenseTargets(teacher_NC, all_valid(len(teacher_NC)), temperature)


def double_topk(teacher_NC: Tensor, k: int, temperature: float = 1.0) -> TopKTargets:
    """Exact float64 top-k targets, for gradients."""
    logprobs_NC = (teacher_NC / temperature).log_softmax(1)
    order = logprobs_NC.argsort(stable=True, dim=1, descending=True)
    rest = logprobs_NC.gather(1, order[:, k:])
    tail_N = rest.logsumexp(1) if rest.shape[1] else torch.full((len(rest),), -math.inf, dtype=rest.dtype)
    kept_NK = order[:, :k]
    return TopKTargets(kept_NK, logprobs_NC.gather(1, kept_NK), tail_N, all_valid(len(teacher_NC)), temperature)


def double_sample(teacher_NC: Tensor, temperature: float = 1.0) -> SampleTargets:
    """Draws, their shares in float64; of some rows fewer ids than places."""
    targets = targets_of(Sample(NUM_DRAWS, 1), teacher_NC.numpy(), temperature)
    assert isinstance(targets, SampleTargets)
    return replace(targets, probs_ND=(targets.probs_ND * NUM_DRAWS).round().double() / NUM_DRAWS)


def log_softmax(values: Array) -> Array:
    """Its textbook form, in float64."""
    shifted = values - values.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), with 0 log 0 = 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)


def reverse_kl(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """sum q log(q / p), where a p of 0 counts as that of the lowest logit."""
    logp = torch.where(p > 0, p.log(), LOWEST_LOGIT / temperature)
    return (torch.xlogy(q, q) - q * logp).sum(1)


def reference(name: str, teacher: Tensor, student: Tensor, k: int, temperature: float) -> Tensor:
    """The formula of a loss, in float64, by probabilities; top-k ones over the k largest."""
    if name == "mse":
        rows = []
        for z, v in zip(student, teacher, strict=True):
            difference = (z - v)[v > -math.inf]
            rows.append((difference - difference.mean()).square().sum() / (2 * len(difference)))
        return torch.stack(rows)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    order = teacher.argsort(stable=True, dim=1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    p_k, q_k = p[:, :k], q[:, :k]
    if name == "truncated":
        return temperature**2 * kl(p_k / p_k.sum(1, keepdim=True), q_k)
    if name == "renormalised":
        return temperature**2 * kl(p_k / p_k.sum(1, keepdim=True), q_k / q_k.sum(1, keepdim=True))
    if k < p.shape[1]:
        p, q = (torch.cat([values[:, :k], values[:, k:].sum(1, keepdim=True)], 1) for values in (p, q))
    if name in ("kl", "tail-bucket"):
        return temperature**2 * kl(p, q)
    if name == "reverse-kl":
        return temperature**2 * reverse_kl(p, q, temperature)
    assert name == "jsd"
    return temperature**2 * 0.5 * (kl(p, (p + q) / 2) + kl(q, (p + q) / 2))


def sampled_reference(targets: SampleTargets, student: Tensor) -> Tensor:
    """- sum p^ log q, in float64, times T^2."""
    q = (student / targets.temperature).softmax(1)
    shares = torch.zeros_like(q).scatter_add(1, targets.ids_ND, targets.probs_ND)
    return -(targets.temperature**2) * torch.xlogy(shares, q).sum(1)


@dataclass(frozen=True)
class Case:
    """Targets of rows, a loss on them, and its formula."""

    label: str
    name: str
    targets: SoftTargets
    reference: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"{self.label}-{self.name}-{self.targets.temperature:g}"


def cases(num_rows: int = 6, num_classes: int = 7) -> list[Case]:
    """Every loss on every kind of targets: also classes that are ruled out, no tail, and all classes kept."""
    teacher_NC = torch.from_numpy(random_logits(num_rows, num_classes, seed=3))
    ruled_out_NC = teacher_NC.clone()
    ruled_out_NC[::2, : num_classes - 3] = -math.inf  # of top 3 in such rows, the tail has no mass
    head = Head(torch.from_numpy(random_logits(num_classes, 4, seed=4)), None, 0.5, 5.0)
    hidden_NW = torch.from_numpy(random_logits(num_rows, 4, seed=5, scale=1.0))
    found = []

    def add(label: str, name: str, teacher_NC: Tensor, k: int, targets: SoftTargets) -> None:
        def formula(student: Tensor) -> Tensor:
            return reference(name, teacher_NC, student, k, targets.temperature)

        found.append(Case(label, name, targets, formula))

    for temperature in (1.0, 3.0):
        for name in DENSE_LOSSES:
            add("dense", name, teacher_NC, num_classes, double_dense(teacher_NC, temperature))
            add("ruled-out", name, ruled_out_NC, num_classes, double_dense(ruled_out_NC, temperature))
            hidden = HiddenTargets(hidden_NW, head, all_valid(num_rows), temperature)
            add("hidden", name, head.logits(hidden_NW), num_classes, hidden)
        for name in TOPK_LOSSES:
            add("topk", name, teacher_NC, 3, double_topk(teacher_NC, 3, temperature))
            add("no-tail", name, ruled_out_NC, 3, double_topk(ruled_out_NC, 3, temperature))
            add("all-kept", name, teacher_NC, num_classes, double_topk(teacher_NC, num_classes, temperature))
        sample = double_sample(teacher_NC, temperature)
        found.append(Case("sample", "sampled-ce", sample, partial(sampled_reference, sample)))
    return found


def gradient(loss: Callable[[Tensor], Tensor], logits_NC: Tensor) -> Tensor:
    """Of the sum over the rows, with respect to the logits."""
    logits_NC = logits_NC.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits_NC).sum(), logits_NC)
    return grad
