"""The last layer of a model apart from the rest of it: hidden states to logits.

Legend: N batch, P positions, R rows (N, or N x P), C classes or vocabulary entries, W hidden width.

Whoever has the hidden states and the head can compute logits in chunks, and never holds all of them. A model offers
this by having two methods, `hidden` and `output_head`; nothing has to be inherited.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer, a scale and a soft cap: z = soft_cap * tanh(scale * (W h + b) / soft_cap).

    Attributes:
        weight_CW: one row a class.
        bias_C: or None.
        scale: factor of W h + b.
        soft_cap: what no logit exceeds, above 0; None leaves the logits as they are.
    """

    weight_CW: Tensor  # noqa: N815 - array names carry their shape
    bias_C: Tensor | None = None  # noqa: N815
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def num_classes(self) -> int:
        """Classes of its logits."""
        return self.weight_CW.shape[0]

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return self.weight_CW.shape[1]

    def logits(self, hidden_RW: Tensor) -> Tensor:
        """Logits (..., C) of hidden states (..., W), in their dtype, or in that of autocast."""
        logits_RC = F.linear(hidden_RW, self.weight_CW, self.bias_C)
        if self.scale != 1:
            logits_RC = logits_RC * self.scale
        if self.soft_cap is not None:
            logits_RC = torch.tanh(logits_RC / self.soft_cap) * self.soft_cap
        return logits_RC

    def cut(self, num_classes: int | None) -> Self:
        """The head of the first classes alone: what pads a vocabulary lies behind it. None cuts nothing off.

        Raises:
            ValueError: it has fewer.
        """
        if num_classes is None:
            return self
        if not 1 <= num_classes <= self.num_classes:
            raise ValueError(
                f"head: expected 1 to {self.num_classes} classes, which it has, got {num_classes}; "
                "give a model of that many"
            )
        if num_classes == self.num_classes:
            return self
        bias_C = None if self.bias_C is None else self.bias_C[:num_classes]
        return type(self)(self.weight_CW[:num_classes], bias_C, self.scale, self.soft_cap)


@runtime_checkable
class HasHead(Protocol):
    """A model whose `forward(...)` equals `output_head().logits(hidden(...))`.

    Its `forward` takes `hidden_only=True` to return the hidden states, so that a wrapper that knows nothing but
    `forward`, such as DistributedDataParallel, still sees one.
    """

    def hidden(self, *inputs: Any, **options: Any) -> Tensor:
        """Hidden states (N, W), or (N, P, W) of a language model, as they reach the head."""

    def output_head(self) -> Head:
        """The head with the model's own weights: gradients reach them."""


def find_head(model: nn.Module) -> HasHead | None:
    """The model that has a head inside what `torch.compile` and DistributedDataParallel put around it, or None.

    A model that has the methods and knows that they do not say the same as `forward` has `has_head` False.
    """
    model = unwrap(model)
    methods = (getattr(model, "hidden", None), getattr(model, "output_head", None))
    is_called = all(callable(method) and not isinstance(method, nn.Module) for method in methods)
    return model if is_called and isinstance(model, HasHead) and getattr(model, "has_head", True) else None


def unwrap(model: nn.Module) -> nn.Module:
    """A model without `torch.compile` and DistributedDataParallel."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors of one shape, over the largest of the expected."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def head_difference(model: HasHead, *inputs: Tensor) -> float:
    """How far a model's head on its hidden states is from its logits, over the largest logit."""
    with torch.no_grad():
        found = model.output_head().logits(model.hidden(*inputs))
        expected: Any = model(*inputs) if callable(model) else None
    return float("inf") if found.shape != expected.shape else relative_difference(found, expected)


@contextlib.contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, and leave its modes and the random numbers alone."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
