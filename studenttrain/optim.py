"""What moves the weights: AdamW or SGD, and an average of the weights over the steps."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

OptimizerName = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


def build_optimizer(
    model: nn.Module, name: OptimizerName, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters.

    Weight decay falls on matrices and kernels only: biases and the scales of norms, which have one dimension, keep
    theirs.

    Args:
        model: the student.
        name: `adamw`, or `sgd` with Nesterov momentum where `momentum` is above 0.
        lr: learning rate of the first step.
        momentum: of SGD, in [0, 1); AdamW keeps its betas of 0.9 and 0.999.
        weight_decay: decoupled for AdamW, added to the gradient for SGD.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights, as a model of its own; buffers are copied, not averaged.

    The decay starts low and rises to `decay`, as min(decay, (1 + n) / (10 + n)) after n steps, so that a short run is
    not held back by the weights that it began with.

    Source: the rising decay is that of TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """

    @torch.no_grad()
    def average(
        averages: tuple[Tensor, ...] | list[Tensor],
        currents: tuple[Tensor, ...] | list[Tensor],
        num_averaged: Tensor | int,
    ) -> None:
        count = float(num_averaged)
        weight = 1.0 - min(decay, (1.0 + count) / (10.0 + count))
        _lerp(averages, currents, weight)

    return AveragedModel(model, multi_avg_fn=average)


def _lerp(averages: Sequence[Tensor], currents: Sequence[Tensor], weight: float) -> None:
    for average, current in zip(averages, currents, strict=True):
        if average.is_floating_point():
            average.lerp_(current, weight)
        else:
            average.copy_(current)
