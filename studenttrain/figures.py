"""What an evaluation measures: top-1, agreement with the teacher, NLL and calibration error, as running sums.

Legend: N batch, C classes, B bins of confidence.
"""

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from studenttrain.distributed import World

NUM_BINS = 15

# places in the sums of a tally
SAMPLES, REFUSED, KNOWN, ERRORS, NLL, STORED, AGREED = range(7)


@dataclass(frozen=True)
class CalibrationBin:
    """Samples whose top-1 probability lies in one bin.

    Attributes:
        confidence: mean top-1 probability, in [0, 1].
        accuracy: share of them whose top-1 is the hard target, in [0, 1].
        count: samples in the bin, at least 1.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class EvalFigures:
    """What an evaluation measured; None where the corpus or the store does not hold what a figure needs.

    Attributes:
        num_samples: samples that were evaluated.
        num_refused: samples that could not be decoded, and were left out.
        top1: share of the samples with a hard target whose top-1 is it.
        num_errors: samples with a hard target whose top-1 is another class.
        nll: mean negative log-probability of the hard target at T = 1, nats.
        ece: expected calibration error over 15 bins of equal width, in [0, 1].
        agreement: share of the samples with stored targets whose top-1 is the teacher's.
        bins: the bins of confidence that hold samples, in order.
    """

    num_samples: int
    num_refused: int
    top1: float | None
    num_errors: int | None
    nll: float | None
    ece: float | None
    agreement: float | None
    bins: tuple[CalibrationBin, ...] = ()

    def to_json(self) -> dict[str, float | int | None]:
        """The six figures that `studenttrain eval --json` prints."""
        names = ("top1", "agreement", "nll", "ece", "num_errors", "num_samples")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        parts = []
        if self.top1 is not None:
            parts.append(f"top-1 {100 * self.top1:.2f} % ({self.num_errors} errors of {self.num_samples})")
        if self.agreement is not None:
            parts.append(f"agreement with the teacher {100 * self.agreement:.2f} %")
        if self.nll is not None:
            parts.append(f"NLL {self.nll:.4f}")
        if self.ece is not None:
            parts.append(f"ECE {self.ece:.4f}")
        if self.num_refused:
            parts.append(f"{self.num_refused} samples refused")
        return ", ".join(parts) if parts else f"{self.num_samples} samples, no hard targets and no stored ones"


@dataclass
class Tally:
    """Running sums of an evaluation, float64, so that they can be added up over batches and over ranks.

    ECE is the mean over the samples of |accuracy - confidence| of their bin, with 15 bins (0, 1/15], ... of one width.

    Source: Guo et al. 2017 (arXiv:1706.04599), equations 2 and 3.

    Attributes:
        sums: (7,): samples, refused ones, those with a hard target, errors and NLL on these, samples with a stored
            top-1, those that agree with it.
        bins_B3: summed confidence, right answers, and count of each bin.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64))
    bins_B3: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, 3, dtype=torch.float64))  # noqa: N815

    def add(
        self, logits_NC: Tensor, hard_targets_N: Tensor | None = None, teacher_top1_N: Tensor | None = None
    ) -> None:
        """Count one batch.

        Args:
            logits_NC: the student's logits, float (N, C).
            hard_targets_N: true classes, -1 where unknown; None where the corpus has none.
            teacher_top1_N: the teacher's top-1, -1 where none is stored; None without a store.
        """
        logprobs_NC = logits_NC.detach().float().log_softmax(1).cpu()
        log_confidence_N, top1_N = logprobs_NC.max(1)
        self.sums[SAMPLES] += len(top1_N)
        if teacher_top1_N is not None:
            stored_N = teacher_top1_N >= 0
            self.sums[STORED] += stored_N.sum()
            self.sums[AGREED] += (stored_N & (top1_N == teacher_top1_N)).sum()
        if hard_targets_N is not None:
            nll_N = -logprobs_NC.gather(1, hard_targets_N.clamp(min=0)[:, None])[:, 0]
            self.add_answers(top1_N, log_confidence_N.exp(), nll_N, hard_targets_N)

    def add_answers(self, top1_N: Tensor, confidence_N: Tensor, nll_N: Tensor, hard_targets_N: Tensor) -> None:
        """Hold answers against hard targets where these are known: class, its probability, NLL of the hard target."""
        known_N = hard_targets_N >= 0
        right_N = (top1_N[known_N] == hard_targets_N[known_N]).double()
        self.sums[KNOWN] += len(right_N)
        self.sums[ERRORS] += len(right_N) - right_N.sum()
        self.sums[NLL] += nll_N[known_N].double().sum()
        confidence_N = confidence_N[known_N].double()
        bin_N = (confidence_N * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
        self.bins_B3.index_add_(0, bin_N, torch.stack([confidence_N, right_N, torch.ones_like(right_N)], 1))

    def add_refused(self, count: int) -> None:
        """Count samples that could not be decoded."""
        self.sums[REFUSED] += count

    def over(self, world: World) -> Self:
        """The tally of all ranks together."""
        return type(self)(world.sum(self.sums), world.sum(self.bins_B3))

    def figures(self) -> EvalFigures:
        """The figures of all that was counted."""
        num_samples, num_refused, num_known, num_errors, nll, num_stored, num_agreed = self.sums.tolist()
        bins = [(total, right, count) for total, right, count in self.bins_B3.tolist() if count]
        ece = sum(abs(right - total) for total, right, _ in bins)
        return EvalFigures(
            num_samples=int(num_samples),
            num_refused=int(num_refused),
            top1=1.0 - num_errors / num_known if num_known else None,
            num_errors=int(num_errors) if num_known else None,
            nll=nll / num_known if num_known and math.isfinite(nll) else None,
            ece=ece / num_known if num_known else None,
            agreement=num_agreed / num_stored if num_stored else None,
            bins=tuple(CalibrationBin(total / count, right / count, int(count)) for total, right, count in bins),
        )
