"""Images of CIFAR-100 as tensors: read, normalised, cropped and mirrored at random.

Legend: N images, H height, W width.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from storage.corpus import open_corpus

MEAN = (0.507, 0.487, 0.441)
STD = (0.267, 0.256, 0.276)
NUM_PADDED = 4


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """All images of a Parquet file, uint8 (N, 3, H, W), and their classes, int64 (N,)."""
    corpus = open_corpus(str(path))
    assert corpus.hard_targets is not None
    images = np.stack([corpus.decode(corpus.read_raw(row)) for row in range(corpus.num_samples)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(corpus.hard_targets).long()


def normalise(images: Tensor) -> Tensor:
    """What a model is given: float32, ((x / 255) - mean) / std, as `--mean` and `--std` of `teacherdump run` say it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def pad(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) with four more pixels at each side, mirrored ones."""
    sides = (NUM_PADDED, NUM_PADDED)
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), sides, sides), mode="reflect"))


def crop_and_flip(padded: Tensor, generator: torch.Generator) -> Tensor:
    """Of each padded image a random part of the size that it had before, half of them mirrored."""
    num_images, _, height, width = padded.shape
    size = (height - 2 * NUM_PADDED, width - 2 * NUM_PADDED)
    top, left = torch.randint(0, 2 * NUM_PADDED + 1, (2, num_images, 1), generator=generator)
    flip = torch.randint(0, 2, (num_images, 1), generator=generator).bool()
    rows = (torch.arange(size[0]) + top).unsqueeze(2)
    columns = torch.where(flip, torch.arange(size[1] - 1, -1, -1), torch.arange(size[1])) + left
    chosen = padded.permute(0, 2, 3, 1)[torch.arange(num_images).view(-1, 1, 1), rows, columns.unsqueeze(1)]
    return chosen.permute(0, 3, 1, 2)
