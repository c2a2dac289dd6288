"""Top-1, agreement, NLL and calibration error against sums written out."""

import math

import numpy as np
import pytest
import torch

from studenttrain.distributed import World
from studenttrain.figures import NUM_BINS, Tally


def random_case(num_rows: int = 500, num_classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_NC = 3 * torch.randn(num_rows, num_classes, generator=generator)
    hard_N = torch.randint(-1, num_classes, (num_rows,), generator=generator)
    teacher_N = torch.randint(-1, num_classes, (num_rows,), generator=generator)
    return logits_NC, hard_N, teacher_N


def test_figures_are_those_of_their_definitions() -> None:
    logits_NC, hard_N, teacher_N = random_case()
    tally = Tally()
    for piece in zip(logits_NC.split(64), hard_N.split(64), teacher_N.split(64), strict=True):
        tally.add(*piece)
    figures = tally.figures()
    probs = torch.softmax(logits_NC.double(), 1).numpy()
    hard, teacher = hard_N.numpy(), teacher_N.numpy()
    known, stored, top1 = hard >= 0, teacher >= 0, probs.argmax(1)
    right = top1[known] == hard[known]
    assert figures.num_samples == len(probs)
    assert figures.num_errors == (~right).sum()
    assert figures.top1 == pytest.approx(right.mean())
    assert figures.nll == pytest.approx(-np.log(probs[known, hard[known]]).mean(), rel=1e-5)
    assert figures.agreement == pytest.approx((top1[stored] == teacher[stored]).mean())
    confidence, ece = probs.max(1)[known], 0.0
    for index in range(NUM_BINS):
        inside = (confidence > index / NUM_BINS) & (confidence <= (index + 1) / NUM_BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert figures.ece == pytest.approx(ece, rel=1e-5)
    assert sum(entry.count for entry in figures.bins) == known.sum()


def test_batches_and_ranks_add_up_to_the_whole() -> None:
    logits_NC, hard_N, teacher_N = random_case()
    whole, one, two = Tally(), Tally(), Tally()
    whole.add(logits_NC, hard_N, teacher_N)
    one.add(logits_NC[:100], hard_N[:100], teacher_N[:100])
    two.add(logits_NC[100:], hard_N[100:], teacher_N[100:])
    summed = Tally(one.sums + two.sums, one.bins_B3 + two.bins_B3).figures()
    assert summed.num_errors == whole.figures().num_errors
    assert summed.ece == pytest.approx(whole.figures().ece)
    assert whole.over(World(0, 1, torch.device("cpu"))).figures() == whole.figures()


def test_what_can_not_be_measured_is_none() -> None:
    tally = Tally()
    tally.add(torch.randn(3, 2))
    tally.add_refused(2)
    figures = tally.figures()
    assert (figures.num_samples, figures.num_refused) == (3, 2)
    assert figures.to_json() == {
        "top1": None,
        "agreement": None,
        "nll": None,
        "ece": None,
        "num_errors": None,
        "num_samples": 3,
    }
    assert str(figures) == "2 samples refused"


def test_a_sure_student_that_is_right_is_calibrated() -> None:
    tally = Tally()
    tally.add(torch.tensor([[50.0, 0.0], [0.0, 50.0]]), torch.tensor([0, 1]))
    figures = tally.figures()
    assert (figures.top1, figures.num_errors) == (1.0, 0)
    assert figures.ece == pytest.approx(0.0, abs=1e-9)
    assert figures.nll is not None
    assert math.isclose(figures.nll, 0.0, abs_tol=1e-6)
