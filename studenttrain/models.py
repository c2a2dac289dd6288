"""Built-in architectures and the one-line specs that name them.

Legend: N batch, C classes, H height, W width.

`mlp:784-1200-1200-10` and `cnn:1-32-64-10` are built here, `timm:NAME` where timm is installed, and
`package.module:callable` is imported, from the current folder too. `teacherdump --arch` reads the same specs.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """A fully connected ReLU network on flattened input.

    Args:
        sizes: units of every layer, input first and classes last.
        dropout: probability of dropping a hidden unit while training, in [0, 1).
        input_dropout: probability of dropping an input while training, in [0, 1).

    Source: the architecture of Hinton, Vinyals and Dean 2015, section 3.
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0, input_dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.layers = nn.ModuleList(
            nn.Linear(num_in, num_out) for num_in, num_out in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of shape (N, C) for inputs of shape (N, ...), flattened to (N, sizes[0])."""
        hidden = inputs.flatten(1)
        hidden = F.dropout(hidden, self.input_dropout, self.training)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index != last:
                hidden = F.dropout(F.relu(hidden), self.dropout, self.training)
        return hidden
