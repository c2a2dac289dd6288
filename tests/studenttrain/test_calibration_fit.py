"""Biases and temperatures by themselves: they are those that formulas and searches by other ways give."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import StudentError
from studenttrain import calibration_fit
from studenttrain.calibration_fit import (
    TOLERANCE,
    Blocks,
    fit_temperature,
    match_biases,
    mean_mass,
    sampling_slack,
    shift_biases,
)
from studenttrain.calibration_logits import Spool

Array = NDArray[np.float64]


def blocks_of(logits_RC: Tensor, size: int = 64, **others: Tensor) -> Blocks:
    """Rows as a spool gives them."""
    values = {"logits": logits_RC, **others}

    def blocks() -> list[Mapping[str, Tensor]]:
        return [
            {name: value[start : start + size] for name, value in values.items()}
            for start in range(0, len(logits_RC), size)
        ]

    return blocks


def random_logits(num_rows: int, num_classes: int, scale: float, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num_rows, num_classes)) * scale).float()


def random_prior(num_classes: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 2.0))


def plain_mass(logits_RC: Tensor, bias_C: Array, temperature: float = 1.0) -> Array:
    scaled = logits_RC.double() / temperature + torch.from_numpy(bias_C)
    mass_C: Array = scaled.softmax(1).mean(0).numpy()
    return mass_C


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize(("num_classes", "scale"), [(2, 1.0), (5, 3.0), (10, 30.0), (50, 8.0)])
def test_the_mean_mass_meets_the_prior(num_classes: int, scale: float, temperature: float) -> None:
    logits_RC, prior_C = random_logits(400, num_classes, scale), random_prior(num_classes)
    fit = match_biases(blocks_of(logits_RC), prior_C, temperature)
    assert abs(plain_mass(logits_RC, fit.bias_C, temperature) / prior_C - 1).max() <= TOLERANCE + 1e-5
    assert fit.error <= TOLERANCE
    assert np.median(fit.bias_C) == pytest.approx(0, abs=1e-12)
    assert fit.num_passes < 40


@pytest.mark.parametrize("gap", [5.0, 30.0, 90.0])
def test_a_class_that_a_sure_student_never_answers_gets_its_share(gap: float) -> None:
    """The logit of class 0 is lower by the gap everywhere; its rows differ from the others all the same."""
    logits_RC = random_logits(1000, 6, 6.0)
    fit_before = match_biases(blocks_of(logits_RC), np.full(6, 1 / 6))
    lowered_RC = logits_RC - gap * torch.eye(6)[0]
    fit = match_biases(blocks_of(lowered_RC), np.full(6, 1 / 6))
    expected_C = fit_before.bias_C + gap * np.eye(6)[0]
    np.testing.assert_allclose(fit.bias_C - fit.bias_C[1], expected_C - expected_C[1], atol=5e-3)
    assert fit.num_passes < 40


def test_biases_are_found_again_that_made_the_prior() -> None:
    logits_RC = random_logits(500, 8, 4.0)
    made_C = np.random.default_rng(3).normal(size=8) * 3
    fit = match_biases(blocks_of(logits_RC), plain_mass(logits_RC, made_C))
    np.testing.assert_allclose(fit.bias_C, made_C - np.median(made_C), atol=2e-3)


@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_the_surrogates_steps_alone_find_what_newtons_do(slack: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RC, prior_C = random_logits(300, 6, 2.0), random_prior(6)
    slack_C = sampling_slack(prior_C, slack, 300)
    fit = match_biases(blocks_of(logits_RC), prior_C, 1.0, slack_C)
    monkeypatch.setattr(calibration_fit, "MAX_HESSIAN_CLASSES", 5)
    slow = match_biases(blocks_of(logits_RC), prior_C, 1.0, slack_C)
    np.testing.assert_allclose(slow.bias_C, fit.bias_C, atol=2e-3)
    assert slow.num_passes > fit.num_passes


def test_a_newton_step_that_climbs_is_replaced_by_the_surrogates(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RC, prior_C = random_logits(300, 6, 2.0), random_prior(6)
    expected_C = match_biases(blocks_of(logits_RC), prior_C).bias_C
    monkeypatch.setattr(calibration_fit, "_newton_step", lambda hessian_CC, *_: np.linspace(-9, 9, len(hessian_CC)))
    np.testing.assert_allclose(match_biases(blocks_of(logits_RC), prior_C).bias_C, expected_C, atol=2e-3)


@pytest.mark.parametrize("gap", [0.0, 20.0])
def test_with_slack_a_class_misses_its_share_by_its_bias_and_three_times_the_slack_at_most(gap: float) -> None:
    logits_RC = random_logits(500, 6, 5.0) - gap * torch.eye(6)[0]
    prior_C = random_prior(6)
    slack_C = sampling_slack(prior_C, 1.0, 500)
    fit = match_biases(blocks_of(logits_RC), prior_C, 1.0, slack_C)
    missed_C = prior_C - plain_mass(logits_RC, fit.bias_C)
    assert fit.error == pytest.approx(abs(missed_C / prior_C).max(), abs=1e-4)
    offsets = np.linspace(-30, 30, 60001)  # of the constant that the median took off
    pulls = slack_C * (fit.bias_C + offsets[:, None])
    pulls /= np.sqrt(1 + ((fit.bias_C + offsets[:, None]) / 3) ** 2)
    assert abs(pulls - missed_C).max(axis=1).min() < 2e-4
    assert (abs(missed_C) <= 3 * slack_C + 1e-4).all()
    assert fit.num_passes < 20


def test_slack_keeps_the_noise_of_a_small_sample_out_of_the_biases() -> None:
    """A sure student that is right, on a sample whose shares are off by chance: there is nothing to mend."""
    generator = np.random.default_rng(0)
    hard_N = generator.integers(0, 10, 1000)
    logits_NC = torch.from_numpy(12 * np.eye(10)[hard_N] + generator.normal(size=(1000, 10)) * 3).float()
    prior_C = np.full(10, 0.1)
    exact = match_biases(blocks_of(logits_NC), prior_C)
    slack = match_biases(blocks_of(logits_NC), prior_C, 1.0, sampling_slack(prior_C, 1.0, 1000))
    assert abs(slack.bias_C).max() < abs(exact.bias_C).max() / 2


def test_the_slack_of_two_samples_is_that_of_their_difference() -> None:
    prior_C = np.array([0.5, 0.1, 0.4])
    np.testing.assert_allclose(sampling_slack(prior_C, 2.0, 100), 2 * np.sqrt(prior_C * (1 - prior_C) / 100))
    np.testing.assert_allclose(sampling_slack(prior_C, 1.0, 100, 300)[0], 0.5 * np.sqrt(1 / 100 + 1 / 300))
    assert not sampling_slack(prior_C, 0.0, 100).any()


def test_a_prior_that_is_not_met_in_time_is_refused() -> None:
    with pytest.raises(
        StudentError, match=r"mean mass within 0.01 % of the prior, got class \d off by .* after 2 passes; give --data"
    ):
        match_biases(blocks_of(random_logits(300, 6, 9.0)), random_prior(6), max_passes=2)


def test_nothing_is_added_where_the_prior_is_met_already() -> None:
    logits_RC = random_logits(200, 4, 1.0)
    fit = match_biases(blocks_of(logits_RC), plain_mass(logits_RC, np.zeros(4)))
    assert fit.num_passes == 1
    assert not fit.bias_C.any()


def test_of_rows_that_are_all_alike_both_methods_give_the_same() -> None:
    logits_RC, prior_C = random_logits(1, 7, 3.0).repeat(20, 1), random_prior(7)
    blocks = blocks_of(logits_RC)
    shifted_C = shift_biases(mean_mass(blocks, np.zeros(7)), prior_C)
    np.testing.assert_allclose(match_biases(blocks, prior_C).bias_C, shifted_C, atol=1e-3)


def test_shift_turns_bayes_answers_under_one_prior_into_those_under_another() -> None:
    """Three Gaussians of known densities: answers of the old prior, shifted, are Bayes' answers of the new one."""
    generator = np.random.default_rng(0)
    old_C, new_C, centres_C = np.array([0.6, 0.35, 0.05]), np.array([0.2, 0.3, 0.5]), np.array([0.0, 1.0, 2.5])
    points_N = centres_C[generator.choice(3, 200_000, p=old_C)] + generator.normal(size=200_000)
    density_NC = np.exp(-0.5 * (points_N[:, None] - centres_C) ** 2)
    logits_NC = torch.from_numpy(np.log(density_NC * old_C)).float()
    bias_C = shift_biases(mean_mass(blocks_of(logits_NC, 4096), np.zeros(3)), new_C)
    answers_NC = (logits_NC.double() + torch.from_numpy(bias_C)).softmax(1).numpy()
    right_NC = density_NC * new_C / (density_NC * new_C).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers_NC, right_NC, atol=5e-3)


def of_teacher(logits_RC: Tensor, temperature: float) -> Tensor:
    """sum_c p(c) z(c) under the answers at a temperature."""
    return ((logits_RC.double() / temperature).softmax(1) * logits_RC.double()).sum(1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.7, 20.0])
def test_the_temperature_is_found_that_the_targets_were_made_with(temperature: float) -> None:
    logits_RC = random_logits(300, 6, 3.0)
    expected_R = of_teacher(logits_RC, temperature)
    expected_R[::7] = torch.nan  # rows without a target
    fit = fit_temperature(blocks_of(logits_RC, expected=expected_R))
    assert fit.temperature == pytest.approx(temperature, rel=2e-3)
    assert fit.after <= fit.before + 1e-9


def test_a_tail_in_one_bucket_leads_to_the_same_temperature() -> None:
    logits_RC = random_logits(300, 6, 3.0)
    probs_RC = (logits_RC.double() / 2.7).softmax(1)
    ids_RK = logits_RC.topk(2, 1).indices
    expected_R = (probs_RC.gather(1, ids_RK) * logits_RC.double().gather(1, ids_RK)).sum(1)
    tail_R = 1 - probs_RC.gather(1, ids_RK).sum(1)
    fit = fit_temperature(blocks_of(logits_RC, expected=expected_R, tail=tail_R, ids=ids_RK.int()))
    assert fit.temperature == pytest.approx(2.7, rel=2e-3)


def test_the_loss_of_labels_is_the_nll() -> None:
    logits_RC = random_logits(300, 5, 2.0)
    hard_R = (logits_RC / 2).softmax(1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    fit = fit_temperature(blocks_of(logits_RC, expected=logits_RC.double().gather(1, hard_R[:, None])[:, 0]))
    assert fit.before == pytest.approx(float(torch.nn.functional.cross_entropy(logits_RC, hard_R)), rel=1e-5)
    found = float(torch.nn.functional.cross_entropy(logits_RC / fit.temperature, hard_R))
    assert fit.after == pytest.approx(found, rel=1e-5)
    for factor in (0.98, 1.02):
        assert found <= float(torch.nn.functional.cross_entropy(logits_RC / (fit.temperature * factor), hard_R))


def right_logit(logits_RC: Tensor) -> Tensor:
    return logits_RC.double().amax(1)


def wrong_logit(logits_RC: Tensor) -> Tensor:
    return logits_RC.double().amin(1)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (right_logit, "got 1/64 as the best: it is never wrong; give data that it has not learned from"),
        (wrong_logit, "got 64 as the best: it says nothing of the targets; give the corpus that the targets belong to"),
        (lambda logits_RC: torch.full((len(logits_RC),), torch.nan), "expected samples with a target to fit it on"),
    ],
)
def test_targets_that_no_temperature_fits_are_refused(expected: Callable[[Tensor], Tensor], message: str) -> None:
    logits_RC = random_logits(100, 4, 3.0)
    with pytest.raises(StudentError, match=message):
        fit_temperature(blocks_of(logits_RC, expected=expected(logits_RC)))


def test_what_goes_to_the_disk_comes_back_as_it_was_and_leaves_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [
        {"logits": torch.randn(rows, 5, generator=generator), "ids": torch.arange(rows, dtype=torch.int32)[:, None]}
        for rows in (3, 0, 4, 1)
    ]
    with Spool(tmp_path, memory_bytes=100) as spool:
        for block in given:
            spool.add(block)
        assert spool.is_on_disk
        for _ in range(2):
            found = list(spool.blocks())
            assert len(found) == 4
            for one, two in zip(found, given, strict=True):
                assert one.keys() == two.keys()
                assert all(torch.equal(one[name], two[name]) for name in one)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_little_stays_in_memory(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.add({"logits": torch.ones(3, 5)})
        assert not spool.is_on_disk
        assert [len(block["logits"]) for block in spool.blocks()] == [3]
