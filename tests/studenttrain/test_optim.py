"""Optimizers and the average of the weights."""

import copy

import pytest
import torch
from torch import nn

from studenttrain.models import MLP
from studenttrain.optim import build_ema, build_optimizer


def test_weight_decay_falls_on_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = build_optimizer(model, "adamw", 0.1, 0.9, 0.5).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.5, [2]),
        (0.0, [1, 1, 1]),
    ]


def test_frozen_weights_are_left_out() -> None:
    model = MLP([2, 3, 2])
    model.layers[0].requires_grad_(False)
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_sgd_without_momentum_is_plain_descent() -> None:
    model = MLP([2, 2])
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, "sgd", 0.1, 0.0, 0.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.allclose(model.state_dict()["layers.0.bias"], before["layers.0.bias"] - 0.1)


def test_the_average_follows_its_recursion_with_a_rising_decay() -> None:
    model = MLP([1, 1])
    ema = build_ema(model, 0.5)
    expected = None
    for step in range(12):
        with torch.no_grad():
            model.layers[0].weight.fill_(float(step))  # type: ignore[operator]
        ema.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert ema.module.state_dict()["layers.0.weight"].item() == pytest.approx(expected)


def test_the_average_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = build_ema(model, 0.9)
    for step in range(3):
        model(torch.randn(8, 2) + step)
        ema.update_parameters(model)
    assert torch.equal(ema.module.running_mean, model.running_mean)  # type: ignore[arg-type]
    assert ema.module.num_batches_tracked == 3
