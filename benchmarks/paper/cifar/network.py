"""The network of the CIFAR-100 experiments: `--arch benchmarks.paper.cifar.network:make`, and `--student` likewise.

Legend: N batch, C classes, H height, W width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studenttrain.heads import Head
from studenttrain.models import ConvBlock


class Residual(nn.Module):
    """An image plus what two blocks make of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvBlock(width, width)
        self.second = ConvBlock(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Activations (N, width, H, W)."""
        outputs: Tensor = inputs + self.second(self.first(inputs))
        return outputs


class Network(nn.Module):
    """A residual network of seven convolutions for images of 32 x 32: 1.8 M weights, 66 M multiplications an image.

    The first convolution halves the image, so that no other works on 32 x 32: on a CPU that is where the time goes.

    Args:
        num_classes: logits.
        widths: filters behind the stem and of the two residual parts.
    """

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (32, 128, 256)) -> None:
        super().__init__()
        stem, middle, last = widths
        self.stem = nn.Conv2d(3, stem, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        self.to_middle = ConvBlock(stem, middle)
        self.middle = Residual(middle)
        self.to_last = ConvBlock(middle, last)
        self.last = Residual(last)
        self.head = nn.Linear(last, num_classes)

    def forward(self, inputs: Tensor, hidden_only: bool = False) -> Tensor:
        """Logits (N, C) of images (N, 3, H, W); or the hidden states (N, W) before them."""
        hidden = self.hidden(inputs)
        if hidden_only:
            return hidden
        logits: Tensor = self.head(hidden)
        return logits

    def hidden(self, inputs: Tensor) -> Tensor:
        """The largest of each filter over the image, (N, W)."""
        images = inputs.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        hidden = F.relu(self.norm(self.stem(images)))
        hidden = self.middle(F.max_pool2d(self.to_middle(hidden), 2))
        hidden = self.last(F.max_pool2d(self.to_last(hidden), 2))
        largest: Tensor = hidden.amax((2, 3))
        return largest

    def output_head(self) -> Head:
        """The last layer."""
        return Head(self.head.weight, self.head.bias)


def make(num_classes: int = 100) -> nn.Module:
    """The generalist's network, with random weights from torch's generator."""
    return Network(num_classes)
