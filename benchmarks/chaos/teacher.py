"""A teacher that is cheap, slow on request, and dies of one sample: `--arch benchmarks.chaos.teacher:make`.

Two environment variables change how long it takes and whether it dies, never what it says: `CHAOS_PAUSE_S` seconds for
each batch, and `CHAOS_SPARE`, with which the deadly sample does nothing.
"""

import os
import signal
import time

import torch
from torch import Tensor, nn

NUM_CLASSES = 10
IMAGE_SIZE = 8
POISON_RGB = (255, 0, 0)  # a picture of nothing but this colour makes the teacher give NaN
DEADLY_RGB = (0, 255, 0)  # and one of this ends the process that runs it
ARCH = "benchmarks.chaos.teacher:make"


class Fragile(nn.Module):
    """One linear layer over the pixels, and two colours that it can't stand."""

    def __init__(self, pause_s: float, kills: bool) -> None:
        super().__init__()
        self.pause_s, self.kills = pause_s, kills
        self.linear = nn.Linear(3 * IMAGE_SIZE * IMAGE_SIZE, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, C) of pictures (N, 3, H, W) with values from 0 to 1."""
        if self.pause_s:
            time.sleep(self.pause_s)
        if self.kills and bool(_is_all(inputs, DEADLY_RGB).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        logits: Tensor = self.linear(inputs.flatten(1))
        return logits.masked_fill(_is_all(inputs, POISON_RGB)[:, None], float("nan"))


def _is_all(inputs: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """Of each picture, whether it is of this colour and nothing else."""
    wanted = (torch.tensor(colour, dtype=inputs.dtype, device=inputs.device) / 255).view(1, 3, 1, 1)
    return (inputs == wanted).flatten(1).all(dim=1)


def make() -> Fragile:
    """The teacher as the environment asks for it."""
    return Fragile(float(os.environ.get("CHAOS_PAUSE_S", "0")), "CHAOS_SPARE" not in os.environ)
