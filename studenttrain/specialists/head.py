"""A model of all classes whose last layer becomes one of a few of them and a dustbin.

Legend: C classes, W hidden width.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.heads import find_head, relative_difference, trying

MAX_DIFFERENCE = 1e-3  # of the own classes' logits before and after, over the largest


def cut_head(model: nn.Module, classes: Sequence[int], input_shape: Sequence[int], where: str) -> nn.Module:
    """The model with a last layer of the own classes, then one dustbin; nothing else is changed.

    The own classes keep their weights. The dustbin begins with the mean of the others' weights, and the mean of their
    biases plus the log of their number: the logarithm of what they have together where their logits are equal, and a
    lower bound of it elsewhere.

    Args:
        model: on the CPU, of logits (N, C); it is changed in place.
        classes: the own classes, ascending, fewer than C.
        input_shape: of one input.
        where: how an error names the model.

    Raises:
        StudentError: it has no linear layer whose rows are the classes.
    """
    inputs = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    with trying(model):
        before_NC: Tensor = model(inputs)
    num_classes = before_NC.shape[1]
    expected_NK = before_NC[:, list(classes)]
    for name, layer in reversed(_last_layers(model, num_classes)):
        changed = _with_layer(model, name, _cut(layer, classes))
        with contextlib.suppress(RuntimeError), trying(changed):
            if _says(changed(inputs), expected_NK):
                return changed
        _with_layer(model, name, layer)
    raise StudentError(
        f"{where}: expected a last layer that can be replaced, an nn.Linear of {num_classes} outputs that are the "
        "logits, got none; give a model that ends in one"
    )


def _last_layers(model: nn.Module, num_classes: int) -> list[tuple[str, nn.Linear]]:
    """The linear layers that may give the logits, by name; the one that a model names as its head alone."""
    owner = find_head(model)
    weight = None if owner is None else owner.output_head().weight_CW
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == num_classes
        and (weight is None or layer.weight is weight)
    ]


def _cut(layer: nn.Linear, classes: Sequence[int]) -> nn.Linear:
    """A layer of the own classes and the dustbin."""
    own = list(classes)
    others = [number for number in range(layer.out_features) if number not in set(own)]
    weight_CW = layer.weight.detach()
    bias_C = weight_CW.new_zeros(len(weight_CW)) if layer.bias is None else layer.bias.detach()
    cut = nn.Linear(layer.in_features, len(own) + 1, device=weight_CW.device, dtype=weight_CW.dtype)
    with torch.no_grad():
        cut.weight.copy_(torch.cat([weight_CW[own], weight_CW[others].mean(0, keepdim=True)]))
        dustbin = bias_C[others].mean() + math.log(len(others))
        cut.bias.copy_(torch.cat([bias_C[own], dustbin[None]]))
    return cut


def _with_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with another layer in a place; the layer itself where it is the whole model."""
    if not name:
        return layer
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
    return model


def _says(logits: Any, expected_NK: Tensor) -> bool:
    """Whether logits are of one class more, and of the own ones as expected."""
    if not isinstance(logits, Tensor) or logits.shape != (len(expected_NK), expected_NK.shape[1] + 1):
        return False
    return relative_difference(logits[:, :-1], expected_NK) <= MAX_DIFFERENCE
