"""Heads: logits from hidden states, and which models have one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from studenttrain.heads import Head, find_head, head_difference, unwrap
from studenttrain.models import build_model


def test_logits_are_scaled_before_they_are_capped() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_CW, bias_C = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    hidden_NPW = torch.randn(2, 4, 3, generator=generator)
    plain = hidden_NPW @ weight_CW.T + bias_C
    torch.testing.assert_close(Head(weight_CW, bias_C).logits(hidden_NPW), plain)
    found = Head(weight_CW, bias_C, 0.5, 2.0).logits(hidden_NPW)
    torch.testing.assert_close(found, 2 * torch.tanh(0.5 * plain / 2))
    assert float(found.detach().abs().max()) < 2


def test_a_cut_head_gives_the_first_logits() -> None:
    head = Head(torch.randn(5, 3), torch.randn(5), 0.5, 2.0)
    cut, hidden_RW = head.cut(4), torch.randn(6, 3)
    assert (cut.num_classes, cut.width) == (4, 3)
    torch.testing.assert_close(cut.logits(hidden_RW), head.logits(hidden_RW)[:, :4])
    assert Head(torch.randn(5, 3)).cut(2).bias_C is None
    assert head.cut(5) is head


@pytest.mark.parametrize("num_classes", [0, 6])
def test_a_head_is_not_cut_to_what_it_does_not_have(num_classes: int) -> None:
    message = f"head: expected 1 to 5 classes, which it has, got {num_classes}; give a model of that many"
    with pytest.raises(ValueError, match=message):
        Head(torch.randn(5, 3)).cut(num_classes)


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        ("mlp:12-7-5,dropout=0.5", torch.randn(3, 12)),
        ("mlp:12-5", torch.randn(3, 12)),
        ("cnn:3-4-8-5", torch.randn(3, 3, 6, 6)),
        ("gpt:1x16,vocab=9", torch.randint(9, (3, 6))),
    ],
)
def test_built_in_models_are_their_head_on_their_hidden_states(spec: str, inputs: Tensor) -> None:
    model: Any = build_model(spec).eval()
    found = find_head(model)
    assert found is not None
    assert head_difference(found, inputs) < 1e-6
    torch.testing.assert_close(model(inputs, hidden_only=True), model.hidden(inputs))
    assert any(found.output_head().weight_CW is parameter for parameter in model.parameters())


def test_a_head_is_found_behind_what_is_put_around_a_model() -> None:
    model = build_model("mlp:4-3-2")
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = model
    wrapped: list[Any] = [model, torch.compile(model, backend="eager"), parallel]
    wrapped.append(torch.compile(parallel, backend="eager"))
    for wrapper in wrapped:
        assert unwrap(wrapper) is model
        found: Any = find_head(wrapper)
        assert found is model


class Layers(nn.Module):
    """Has layers of the names of the two methods."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output_head = nn.Linear(4, 3), nn.Linear(3, 2)


def test_a_model_without_the_methods_or_that_says_so_has_no_head() -> None:
    assert find_head(nn.Linear(4, 2)) is None
    assert find_head(Layers()) is None
    model: Any = build_model("mlp:4-3-2")
    model.has_head = False
    assert find_head(model) is None
