"""What high temperatures do to the soft loss: it matches logits, and T^2 keeps its gradients as large as hard ones.

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2 and 2.1, equations 2 to 4.
"""

import itertools

import pytest
import torch
from torch import Tensor

from studenttrain.loss import hard_loss, soft_loss
from tests.studenttrain.soft_targets import double_dense, double_topk, gradient, random_logits

NUM_CLASSES = 7


def logits(seed: int, scale: float = 3.0) -> Tensor:
    """Random logits in float64, each row's mean removed."""
    values = torch.from_numpy(random_logits(seed=seed, num_classes=NUM_CLASSES, scale=scale))
    return values - values.mean(1, keepdim=True)


def soft_gradient(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Gradient with respect to the student's logits, by autograd through the loss that `fit` uses."""
    every_class = double_topk(teacher, NUM_CLASSES, temperature)
    targets = every_class if name == "tail-bucket" else double_dense(teacher, temperature)
    return gradient(lambda z: soft_loss(name, z, targets), student)


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "tail-bucket"])
def test_at_high_temperature_the_gradient_is_the_difference_of_the_logits_over_their_number(name: str) -> None:
    # equation 4: dC/dz -> (z - v) / (N T^2), C without the factor T^2, which the loss of `fit` has
    student, teacher = logits(1), logits(2)
    matching = (student - teacher) / NUM_CLASSES
    errors = [
        float((soft_gradient(name, student, teacher, temperature) - matching).abs().max() / matching.abs().max())
        for temperature in (10.0, 100.0, 1000.0)
    ]
    assert errors[2] < 0.01
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # what is left falls as 1 / T


def test_without_centred_logits_their_means_are_removed_first() -> None:
    student, teacher = logits(1) + 5, logits(2) - 3
    matching = ((student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))) / NUM_CLASSES
    torch.testing.assert_close(soft_gradient("kl", student, teacher, 1e4), matching, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["kl", "reverse-kl"])
def test_the_gradient_of_logit_matching_is_its_own_limit_at_any_temperature(name: str) -> None:
    student, teacher = logits(3), logits(4)
    at_limit = soft_gradient("mse", student, teacher, 2.0)
    torch.testing.assert_close(at_limit, (student - teacher) / NUM_CLASSES, atol=1e-12, rtol=0)
    torch.testing.assert_close(soft_gradient(name, student, teacher, 1e5), at_limit, atol=1e-3, rtol=0)


def test_at_low_temperature_logits_far_below_the_others_are_hardly_matched() -> None:
    # "distillation pays much less attention to matching logits that are much more negative than the average"
    teacher = torch.tensor([[4.0, 3.0, -8.0, 1.0]]).double()
    student = teacher + torch.tensor([[0.0, 0.5, 0.5, 0.0]]).double()  # as wrong about the third as about the second
    ratios = []
    for temperature in (1.0, 50.0):
        found = soft_gradient("kl", student, teacher, temperature).abs()[0]
        ratios.append(float(found[2] / found[1]))
    assert ratios[0] < 0.01
    assert ratios[1] > 0.5


def test_gradients_fall_as_one_over_the_temperature_squared_and_the_factor_takes_that_back() -> None:
    student, teacher = logits(5, scale=1.0), logits(6, scale=1.0)
    temperatures = (5.0, 10.0, 20.0, 40.0)
    scaled = [float(soft_gradient("kl", student, teacher, temperature).norm()) for temperature in temperatures]
    bare = [size / temperature**2 for size, temperature in zip(scaled, temperatures, strict=True)]
    assert max(scaled) / min(scaled) < 1.25
    for first, second in itertools.pairwise(bare):
        assert first / second == pytest.approx(4, rel=0.15)  # the temperature is doubled


def test_soft_and_hard_targets_keep_their_shares_while_the_temperature_changes() -> None:
    student, teacher = logits(7), logits(8)
    classes = teacher.argmax(1)
    hard = float(gradient(lambda z: hard_loss(z, classes), student).norm())
    shares = [
        float(soft_gradient("kl", student, teacher, temperature).norm()) / hard for temperature in (8.0, 20.0, 100.0)
    ]
    assert max(shares) / min(shares) < 1.6  # without the factor (100 / 8)^2 = 156
