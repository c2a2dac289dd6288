"""A small decoder, `gpt:LAYERSxWIDTH`: the built-in language model of teachers and students.

Legend: N batch, P positions, C vocabulary entries, W width, H heads, D width of a head.

RMSNorm without gains before each part (the layer behind it has them), rotary positions, squared ReLU, no biases, the
head not tied to the embedding. Positions are given, not counted: a sequence may hold several documents, each begins at
position 0, and none sees another. As nothing is learnt for a position, no sequence is too long.

Sources: Radford et al. 2019 (GPT-2: the initialisation), Su et al. 2021 (arXiv:2104.09864, rotary positions), Zhang and
Sennrich 2019 (arXiv:1910.07467, RMSNorm), So et al. 2021 (arXiv:2109.08668, squared ReLU).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studenttrain.heads import Head

HEAD_WIDTH = 64  # of which a model has as many as fit, where the heads are not given
ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02


class Attention(nn.Module):
    """Causal attention of several heads with rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, states_NPW: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
        """What each position gathers from those that it sees, (N, P, W); `mask` None is causal over all."""
        num_rows, num_positions, width = states_NPW.shape
        heads = self.query_key_value(states_NPW).view(num_rows, num_positions, 3 * self.num_heads, -1)
        query_key, value = heads.split((2 * self.num_heads, self.num_heads), 2)
        query, key = _rotate(query_key, turn).to(value.dtype).transpose(1, 2).chunk(2, 1)
        gathered = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        output: Tensor = self.output(gathered.transpose(1, 2).reshape(num_rows, num_positions, width))
        return output


class FeedForward(nn.Module):
    """Two layers, four times as wide between them, with a squared ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, states_NPW: Tensor) -> Tensor:
        """Of each position by itself, (N, P, W)."""
        positive = F.relu(self.up(states_NPW))
        output: Tensor = self.down(positive * positive)  # backward of .square() takes longer
        return output


class Block(nn.Module):
    """Attention, then the layers of each position, both added to what came in."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.feed_forward = FeedForward(width)

    def forward(self, states_NPW: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
        """The states behind it, (N, P, W)."""
        gathered = self.attention(self.attention_norm(states_NPW), turn, mask)
        states_NPW = states_NPW + F.dropout(gathered, self.dropout, self.training)
        output = self.feed_forward(self.feed_forward_norm(states_NPW))
        return states_NPW + F.dropout(output, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder over token ids.

    Its weights are named `embedding.weight`, `blocks.0.attention.query_key_value.weight`, ..., `head.weight`.

    Args:
        num_layers: blocks.
        width: numbers of a state, W.
        num_classes: vocabulary entries, C.
        num_heads: heads of each attention, of an even width; None is as many of 64 as fit.
        dropout: probability of dropping a number of the embedding and of what each part adds, in [0, 1); attention
            itself drops nothing, so that it stays on the fast path.

    Raises:
        ValueError: the width is odd, or the heads do not divide it into even parts.
    """

    def __init__(
        self, num_layers: int, width: int, num_classes: int, num_heads: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width: expected an even number, got {width}; use {width + 1}")
        num_heads = fitting_heads(width) if num_heads is None else num_heads
        if width % (2 * num_heads):
            raise ValueError(
                f"heads: expected a number that divides width {width} into even parts, got {num_heads}; "
                f"use heads={fitting_heads(width)}"
            )
        self.width, self.num_heads, self.dropout = width, num_heads, dropout
        self.embedding = nn.Embedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(width, num_classes, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; those that add to the residual stream are smaller, the more of them there are."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / (math.sqrt(2 * len(self.blocks)) if adds else 1))

    def forward(self, token_ids: Tensor, position_ids: Tensor | None = None, hidden_only: bool = False) -> Tensor:
        """Logits (N, P, C) of the next token, or the states (N, P, W) that the head makes them of.

        Args:
            token_ids: int64 (N, P), below C.
            position_ids: int64 (N, P); a 0 begins a document, which sees nothing before it. None: every row is one.
            hidden_only: whether the states are returned.
        """
        hidden_NPW = self.hidden(token_ids, position_ids)
        if hidden_only:
            return hidden_NPW
        logits_NPC: Tensor = self.head(hidden_NPW)
        return logits_NPC

    def hidden(self, token_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """States (N, P, W) behind the last norm."""
        mask = None if position_ids is None else document_mask(position_ids)
        if position_ids is None:
            position_ids = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
        turn = _turn(position_ids, self.width // self.num_heads)
        states_NPW = F.dropout(self.embedding(token_ids), self.dropout, self.training)
        for block in self.blocks:
            states_NPW = block(states_NPW, turn, mask)
        normed: Tensor = self.norm(states_NPW)
        return normed

    def output_head(self) -> Head:
        """The last layer."""
        return Head(self.head.weight)


def fitting_heads(width: int) -> int:
    """Heads of about 64 that divide a width into even parts; 1 where none does."""
    return next((count for count in range(width // HEAD_WIDTH, 0, -1) if width % (2 * count) == 0), 1)


def document_mask(position_ids_NP: Tensor) -> Tensor:
    """Which position sees which, (N, 1, P, P), the seen one last: itself, and what stands before it in its document."""
    document_NP = (position_ids_NP == 0).cumsum(1)
    same = document_NP[:, None, :, None] == document_NP[:, None, None, :]
    place = torch.arange(position_ids_NP.shape[1], device=position_ids_NP.device)
    return same & (place[:, None] >= place[None, :])


def _turn(position_ids_NP: Tensor, head_width: int) -> Tensor:
    """Cosine and sine (N, P, 1, D / 2, 2) by which a position turns each pair, float32 whatever the model is in."""
    exponent = torch.arange(0, head_width, 2, device=position_ids_NP.device, dtype=torch.float32) / head_width
    angle = position_ids_NP[:, :, None, None].float() * ROTARY_BASE**-exponent
    return torch.stack((angle.cos(), angle.sin()), -1)


def _rotate(heads_NPHD: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbouring numbers by the angle of its position, in float32.

    As a product of complex numbers it takes a sixth of the time on a CPU; what compiles or exports a model has none.
    """
    pairs = heads_NPHD.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        return _turn_pairs(pairs, turn).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)


def _turn_pairs(pairs: Tensor, turn: Tensor) -> Tensor:
    """The product of complex numbers, (..., 2) both, written out."""
    (first, second), (cosine, sine) = pairs.unbind(-1), turn.unbind(-1)
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
