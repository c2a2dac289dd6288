"""How far the batch gradient of an encoding's loss is from that of full KD.

Legend: N sequences, P positions, R = N * P flat rows, C vocabulary entries, W width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studenttrain.chunked import chunked_losses
from studenttrain.gpt import GPT
from studenttrain.targets import DenseTargets, SoftTargets


@dataclass(frozen=True)
class Gradient:
    """Of a mean loss, with respect to the student's weights.

    Attributes:
        parts: one tensor for each weight; the head's is the last.
        loss: the mean, nats.
    """

    parts: tuple[Tensor, ...]
    loss: float

    def __add__(self, other: "Gradient") -> "Gradient":
        """Of the sum of both losses."""
        parts = tuple(mine + theirs for mine, theirs in zip(self.parts, other.parts, strict=True))
        return Gradient(parts, self.loss + other.loss)


@dataclass(frozen=True)
class Distortion:
    """How far one gradient is from another.

    Attributes:
        angle: between them, degrees.
        relative_error: length of their difference over that of the true one.
        head_angle: the angle between their parts of the head, degrees.
        body_angle: and between the other parts: what reaches the weights through the hidden states.
    """

    angle: float
    relative_error: float
    head_angle: float
    body_angle: float


def batch_gradient(student: GPT, sequences_NQ: Tensor, targets: SoftTargets, loss: str) -> Gradient:
    """The gradient of the mean over a batch, by the loss that `studenttrain fit` trains with."""
    hidden_RW = student.hidden(sequences_NQ[:, :-1]).flatten(0, 1)
    soft_R, _ = chunked_losses(student.output_head(), hidden_RW, targets, loss, weights=(1.0, 0.0))
    mean = soft_R.mean()
    return Gradient(torch.autograd.grad(mean, list(student.parameters())), mean.item())


def full_gradient(student: GPT, sequences_NQ: Tensor, logits_RC: Tensor) -> Gradient:
    """The gradient of full KD: forward KL at T = 1 to the teacher's float32 logits."""
    return batch_gradient(student, sequences_NQ, DenseTargets.of_logits(logits_RC, 1.0), "kl")


def distortion(found: Gradient, true: Gradient) -> Distortion:
    """How far a gradient is from the true one."""
    error = sum(_dot(mine - theirs, mine - theirs) for mine, theirs in zip(found.parts, true.parts, strict=True))
    length = sum(_dot(part, part) for part in true.parts)
    return Distortion(
        angle=_angle(found.parts, true.parts),
        relative_error=math.sqrt(error / length),
        head_angle=_angle(found.parts[-1:], true.parts[-1:]),
        body_angle=_angle(found.parts[:-1], true.parts[:-1]),
    )


def _angle(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> float:
    """Degrees, from the sine and the cosine: the arc cosine alone loses small angles."""
    lengths = [math.sqrt(sum(_dot(part, part) for part in parts)) for parts in (found, true)]
    if min(lengths) == 0:
        return 90.0
    plus, minus = (
        math.sqrt(sum(_square(a, lengths[0], b, sign * lengths[1]) for a, b in zip(found, true, strict=True)))
        for sign in (1, -1)
    )
    return math.degrees(2 * math.atan2(minus, plus))


def _square(first: Tensor, first_length: float, second: Tensor, second_length: float) -> float:
    """Squared length of the sum of two unit vectors' parts."""
    total = first / first_length + second / second_length
    return _dot(total, total)


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first.double() * second.double()).sum())
