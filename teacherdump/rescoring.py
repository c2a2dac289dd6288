"""What a teacher says of rows of which more is wanted than an encoding keeps: all logits, in parts that fit.

Legend: R flat rows, C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.encodings import Encoding, Hidden
from teacherdump.dump import Job
from teacherdump.teacher import CHUNK_VALUES, Said


def speak(job: Job, inputs: Tensor, keeps_hidden: bool) -> Iterator[Said]:
    """What the teacher says of a batch, as in a dump, with its hidden states where they are wanted."""
    inputs = inputs.to(job.teacher.device)
    if job.manifest.sequences is None:
        return job.teacher.speak(inputs, keeps_hidden)
    return job.teacher.speak_tokens(inputs, job.manifest.num_classes, keeps_hidden)


def parts_of(said: Said, num_classes: int) -> Iterator[Said]:
    """What a teacher said, in parts of which copies in float64 fit."""
    most = CHUNK_VALUES.get(said.logits_RC.device.type, CHUNK_VALUES["cpu"])
    step = max(1, most // num_classes)
    for start in range(0, len(said.logits_RC), step):
        hidden_RW = None if said.hidden_RW is None else said.hidden_RW[start : start + step]
        yield Said(said.logits_RC[start : start + step], hidden_RW)


def is_given(said: Said, encoding: Encoding) -> NDArray[np.bool_]:
    """Which rows are as a store keeps them: logits without NaN and +inf, hidden states finite as they are stored."""
    largest_R = said.logits_RC.amax(1)
    is_given_R = largest_R.isfinite()
    if isinstance(encoding, Hidden):
        assert said.hidden_RW is not None
        stored_RW = said.hidden_RW.to(torch.float16 if encoding.values == "float16" else torch.float32)
        is_given_R = is_given_R & stored_RW.isfinite().all(1)
    given: NDArray[np.bool_] = is_given_R.cpu().numpy()
    return given
