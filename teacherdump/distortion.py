"""What an encoding gives up: a teacher's distributions against what a reader of the store gets of them.

Legend: R flat rows, C classes, K kept entries or places of drawn ids.

What a reader gets is a distribution over all classes: of `dense` and `hidden` the softmax of what is stored; of `topk`
the kept entries, and the mass of the rest spread evenly over the other classes, about which it knows nothing more; of
`sample` the shares of the draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import Arrays
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.dense import loaded_values
from studenttrain.heads import Head

Rows = NDArray[np.float64]

SMALLEST_REST = 1e-12  # of a mass below this nothing is lost: it is what sums of float64 are off by


@dataclass(frozen=True)
class Truth:
    """A teacher's distributions at one temperature, float64.

    Attributes:
        temperature: above 0.
        logprobs_RC: natural log.
        probs_RC: their exp.
        negentropy_R: sum of p log p.
        square_R: sum of p^2.
    """

    temperature: float
    logprobs_RC: Tensor  # noqa: N815
    probs_RC: Tensor  # noqa: N815
    negentropy_R: Tensor  # noqa: N815
    square_R: Tensor  # noqa: N815

    @classmethod
    def of(cls, logits_RC: Tensor, temperature: float) -> "Truth":
        """Of finite logits, of which some classes may be -inf."""
        logprobs_RC = (logits_RC.double() / temperature).log_softmax(1)
        probs_RC = logprobs_RC.exp()
        return cls(temperature, logprobs_RC, probs_RC, -torch.special.entr(probs_RC).sum(1), probs_RC.square().sum(1))


@dataclass(frozen=True)
class Read:
    """What a reader gets at one temperature, float64: some classes, and what is spread evenly over the others.

    Attributes:
        ids_RK: int64, each class of a row once where its probability is above 0; None where every class is there.
        logprobs_RK: of these.
        log_rest_R: log of the mass of the others; None where every class is there, and of draws, which say nothing of
            the others.
    """

    ids_RK: Tensor | None  # noqa: N815
    logprobs_RK: Tensor  # noqa: N815
    log_rest_R: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class Lost:
    """What was given up in each row at one temperature.

    Attributes:
        kl_R: KL(teacher || what is read), nats; NaN for draws: what was not drawn would make it infinite.
        kept_R: the teacher's mass on the classes that are told apart; NaN for draws.
        error_R: squared length of what is read less the teacher's probabilities: of the error of the gradient that a
            student's logits get, where it spreads its own probability evenly over what is not told apart.
        gradient_R: squared length of the teacher's probabilities less even ones: of the gradient of a student that
            knows nothing.
    """

    kl_R: Rows  # noqa: N815
    kept_R: Rows  # noqa: N815
    error_R: Rows  # noqa: N815
    gradient_R: Rows  # noqa: N815


def read_back(
    encoding: Encoding, flat: Arrays, temperature: float, temperatures: Sequence[float], head: Head | None, like: Tensor
) -> Read:
    """What a reader gets of stored rows.

    Args:
        encoding: of the store.
        flat: its arrays (R, ...).
        temperature: one at which the encoding is exact.
        temperatures: that the store declares.
        head: of a hidden store, on the device; else None.
        like: a tensor on the device to work on.
    """
    device = like.device
    if isinstance(encoding, Dense):
        values_RC = torch.from_numpy(loaded_values(flat)).to(device)
        return Read(None, (values_RC.double() / temperature).log_softmax(1), None)
    if isinstance(encoding, Hidden):
        assert head is not None
        logits_RC = head.logits(torch.from_numpy(np.ascontiguousarray(flat["hidden"])).to(device).float())
        return Read(None, (logits_RC.double() / temperature).log_softmax(1), None)
    ids_RK = torch.from_numpy(flat["ids"].astype(np.int64)).to(device)
    logprobs = torch.from_numpy(encoding.logprobs(flat, temperature, temperatures)).to(device).double()
    if isinstance(encoding, Sample):
        return Read(ids_RK, logprobs, None)
    assert isinstance(encoding, TopK)
    return Read(ids_RK, logprobs[:, :-1], logprobs[:, -1])


def lost(truth: Truth, read: Read) -> Lost:
    """What a reader misses of a teacher's distributions."""
    kl_R, kept_R, error_R = _of_all(truth, read) if read.ids_RK is None else _of_some(truth, read)
    gradient_R = truth.square_R - 1 / truth.probs_RC.shape[1]
    return Lost(*(values.clamp(min=0).cpu().numpy() for values in (kl_R, kept_R, error_R, gradient_R)))


def _of_all(truth: Truth, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """KL, kept mass and squared error, where every class is read."""
    probs_RC = truth.probs_RC
    kl_R = torch.where(probs_RC > 0, probs_RC * (truth.logprobs_RC - read.logprobs_RK), 0.0).sum(1)
    return kl_R, torch.ones_like(kl_R), (read.logprobs_RK.exp() - probs_RC).square_().sum(1)


def _of_some(truth: Truth, read: Read) -> tuple[Tensor, Tensor, Tensor]:
    """The same where some classes are read: sums over the others are those over all, less those over the former."""
    assert read.ids_RK is not None
    is_class = read.logprobs_RK > -torch.inf  # what stands behind the last drawn id is none
    probs_RK = torch.where(is_class, truth.probs_RC.gather(1, read.ids_RK), 0.0)
    num_rest_R = truth.probs_RC.shape[1] - is_class.sum(1)
    rest_R = (1 - probs_RK.sum(1)).clamp(min=0)
    square_R = truth.square_R - probs_RK.square().sum(1)
    within_R = (read.logprobs_RK.exp() - probs_RK).square().sum(1)
    if read.log_rest_R is None:
        unknown_R = torch.full_like(rest_R, torch.nan)
        return unknown_R, unknown_R, within_R + square_R
    even_R = read.log_rest_R.exp() / num_rest_R.clamp(min=1)
    error_R = within_R + square_R - 2 * even_R * rest_R + even_R.square() * num_rest_R
    logprobs_RK = truth.logprobs_RC.gather(1, read.ids_RK)
    kept_kl_R = torch.where(probs_RK > 0, probs_RK * (logprobs_RK - read.logprobs_RK), 0.0).sum(1)
    negentropy_R = truth.negentropy_R + torch.special.entr(probs_RK).sum(1)
    rest_kl_R = negentropy_R - rest_R * (read.log_rest_R - num_rest_R.clamp(min=1).log())
    return kept_kl_R + torch.where(rest_R > SMALLEST_REST, rest_kl_R, 0.0), 1 - rest_R, error_R
