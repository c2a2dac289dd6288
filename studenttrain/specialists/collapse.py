"""The classes of a specialist: its own, and one dustbin, last, for all others; and targets of all classes, of these.

Legend: N rows, C classes of the generalist, K kept entries, M = the specialist's own classes + 1.

A specialist sees its own rows more often than they are, so what it learns of hard targets is true of the rows that it
sees: its dustbin is too small by the factor of the oversampling. Soft targets are true of each row however often it
comes. So the soft loss is of the logits with the dustbin raised as it is after training, and the hard loss of those
without: both then have the same logits for their minimum.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studenttrain.targets import DenseTargets, HiddenTargets, SampleTargets, SoftTargets, TopKTargets


@dataclass(frozen=True)
class OwnClasses:
    """The classes of a specialist.

    Attributes:
        classes: its own, ascending, fewer than all.
        num_classes: of the generalist.
        dustbin_shift: log of the oversampling of its own rows, which is added to the dustbin's logit after training.
    """

    classes: tuple[int, ...]
    num_classes: int
    dustbin_shift: float

    @property
    def num_outputs(self) -> int:
        """Own classes and the dustbin."""
        return len(self.classes) + 1

    @cached_property
    def numbers_C(self) -> Tensor:  # noqa: N802 - array names carry their shape
        """What each class is to the specialist, int64 (C,): its place among the own ones, or the dustbin."""
        numbers_C = torch.full((self.num_classes,), len(self.classes))
        numbers_C[list(self.classes)] = torch.arange(len(self.classes))
        return numbers_C

    def hard(self, hard_targets_N: Tensor) -> Tensor:
        """Hard targets among the own classes and the dustbin; -1 where unknown."""
        numbers_C = self.numbers_C.to(hard_targets_N.device)
        return torch.where(hard_targets_N < 0, -1, numbers_C[hard_targets_N.clamp(min=0)])

    def soft(self, targets: SoftTargets) -> SoftTargets:
        """Soft targets among the own classes and the dustbin, which has at T = 1 what all others have together there.

        Of dense logits and hidden states exact at every T: the dustbin's logit is the logsumexp of the others', and
        then all are divided by T. (Probabilities at T, added up, would make a dustbin that is too large at T = 1, where
        a specialist is used: of 7 equal classes by the factor 7^(T - 1).) Draws and top-k are taken at T = 1 alone;
        draws stay unbiased. Of top-k, where an own class may not be among the kept entries, what is not kept of the own
        classes can't be told from the dustbin: the buckets are the own classes that are kept, and everything else.
        """
        if isinstance(targets, HiddenTargets):
            targets = targets.dense()
        if isinstance(targets, DenseTargets):
            return self._dense(targets)
        assert targets.temperature == 1, "checked when the run begins"
        numbers = self.numbers_C.to(
            targets.ids_NK.device if isinstance(targets, TopKTargets) else targets.ids_ND.device
        )
        if isinstance(targets, SampleTargets):
            return SampleTargets(numbers[targets.ids_ND], targets.probs_ND, targets.valid_N, targets.temperature)
        return self._topk(targets, numbers[targets.ids_NK])

    def _dense(self, targets: DenseTargets) -> DenseTargets:
        logits_NC = targets.values_NC
        logits_NC = logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()
        own_M = torch.tensor(self.classes, device=logits_NC.device)
        rest_N1 = logits_NC.index_fill(1, own_M, -math.inf).logsumexp(1, keepdim=True)
        values_NM = torch.cat([logits_NC[:, own_M], rest_N1], 1)
        return DenseTargets(values_NM, targets.valid_N, targets.temperature)

    def _topk(self, targets: TopKTargets, numbers_NK: Tensor) -> TopKTargets:
        """Entries of other classes move to the tail; what is left of them points behind the logits, at a pad."""
        num_kept = numbers_NK.shape[1]
        is_own_NK = numbers_NK < len(self.classes)
        pads_K = self.num_outputs + torch.arange(num_kept, device=numbers_NK.device)
        others_NK = torch.where(is_own_NK, -math.inf, targets.logprobs_NK)
        return TopKTargets(
            ids_NK=torch.where(is_own_NK, numbers_NK, pads_K),
            logprobs_NK=torch.where(is_own_NK, targets.logprobs_NK, -math.inf),
            log_tail_N=torch.cat([others_NK, targets.log_tail_N[:, None]], 1).logsumexp(1),
            valid_N=targets.valid_N,
            temperature=targets.temperature,
        )

    def soft_logits(self, logits_NM: Tensor, targets: SoftTargets) -> Tensor:
        """The logits that the soft loss is of: with the dustbin raised, and behind them the pads of top-k, at -inf."""
        logits_NM = self.corrected(logits_NM)
        if isinstance(targets, TopKTargets):
            return F.pad(logits_NM, (0, targets.ids_NK.shape[1]), value=-math.inf)
        return logits_NM

    def corrected(self, logits_NM: Tensor) -> Tensor:
        """Logits with the dustbin raised by the log of the oversampling, float32 or better."""
        return raise_dustbin(logits_NM, self.dustbin_shift)


def raise_dustbin(logits_NM: Tensor, shift: float) -> Tensor:
    """Logits whose last column is raised, float32 or better."""
    if logits_NM.dtype != torch.float64:
        logits_NM = logits_NM.float()
    return torch.cat([logits_NM[:, :-1], logits_NM[:, -1:] + shift], 1)


class Corrected(nn.Module):
    """A specialist with its dustbin raised, as it is used."""

    def __init__(self, model: nn.Module, own: OwnClasses) -> None:
        super().__init__()
        self.model, self.own = model, own
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, M), corrected."""
        return self.own.corrected(self.model(inputs))
