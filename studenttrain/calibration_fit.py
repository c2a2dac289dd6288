"""The temperature and the biases that calibrate logits: pure functions of logits that are gone through several times.

Legend: R distributions, C classes, K kept entries, G temperatures that are tried together.

A calibrated student says softmax(z / T + b).

Sources: Guo et al. 2017 (arXiv:1706.04599), section 4.2, temperature scaling; Saerens, Latinne and Decaestecker 2002,
equation 4, posteriors under other priors; Sinkhorn 1967, alternate scaling of rows and columns, which the step
b += log(prior / mass) is; Huber 1964, the penalty; Hinton, Vinyals and Dean 2015, section 3, biases of classes that a
transfer set lacks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import StudentError

Blocks = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Gives blocks of rows anew each time it is called: `logits` (R, C), and for a temperature what `Loss` says."""

SLICE_VALUES = 1 << 20  # logits that are exponentiated together
TOLERANCE = 1e-4  # of the prior, that a class's mean mass may be off by
MAX_PASSES = 300
MAX_STEP = 4.0  # that a bias moves in a Newton step: farther off, the potential is not the parabola that it sees
MAX_HESSIAN_CLASSES = 4096  # 134 MB as float64; of more classes each step is the surrogate's
MAX_SLACK = 3.0
LEAST_MASS = 1e-30
MOST_STEP = 100.0  # of the surrogate: from the least mass to any share
MAX_LOG2_TEMPERATURE = 6.0
COARSE_STEPS, FINE_STEPS = 12, 8
TEMPERATURE_TOLERANCE = 1e-3  # of log2 T: the loss is flat around the best, so that float32 tells no finer


@dataclass(frozen=True)
class BiasFit:
    """Biases, and how well they do.

    Attributes:
        bias_C: added to each class's logit, float64; their median is 0, since only their differences matter.
        num_passes: over the logits.
        error: the largest difference of a class's mean mass from the prior, over the prior.
    """

    bias_C: NDArray[np.float64]  # noqa: N815
    num_passes: int
    error: float


@dataclass(frozen=True)
class TemperatureFit:
    """A temperature, and the loss that it makes smaller.

    Attributes:
        temperature: from 1/64 to 64.
        before: mean loss at T = 1, nats.
        after: mean loss at the temperature.
    """

    temperature: float
    before: float
    after: float


def sampling_slack(prior_C: NDArray[np.float64], slack: float, *counts: int) -> NDArray[np.float64]:
    """So many standard deviations of each share among as many samples as were counted, float64 (C,).

    Args:
        prior_C: the shares.
        slack: standard deviations, at least 0.
        counts: samples of which each side of the comparison is a mean; none where a side is no sample.
    """
    deviation_C: NDArray[np.float64] = np.sqrt(prior_C * (1 - prior_C) * sum(1 / count for count in counts))
    return slack * deviation_C


@dataclass(frozen=True)
class _Potential:
    """F(b) = mean lse(z / T + b) - prior b, which is convex and least where the mean mass meets the prior."""

    value: float
    mass_C: NDArray[np.float64]  # noqa: N815
    hessian_CC: NDArray[np.float64] | None  # noqa: N815


def mean_mass(blocks: Blocks, bias_C: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    """Mean of softmax(z / T + b) over all rows, float64 (C,)."""
    return _pass(blocks, bias_C, temperature, with_hessian=False).mass_C


def shift_biases(mass_C: NDArray[np.float64], prior_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Biases that turn a prior into another in closed form: b = log prior - log mass, less their median.

    Args:
        mass_C: the prior that the student learned: its mean mass over what it learned from, above 0.
        prior_C: the prior where it will be used, above 0.

    Source: Saerens, Latinne and Decaestecker 2002, equation 4.
    """
    return _centred(np.log(prior_C) - np.log(mass_C))


def match_biases(
    blocks: Blocks,
    prior_C: NDArray[np.float64],
    temperature: float = 1.0,
    slack_C: NDArray[np.float64] | None = None,
    max_passes: int = MAX_PASSES,
) -> BiasFit:
    """Biases with which the mean mass over all rows meets a prior within `TOLERANCE` of it, class by class.

    Such biases are there for any prior above 0, and but for a constant they are the only ones. A surrogate's step goes
    first, since it goes far in one where a class has next to no mass; then Newton's, cut to `MAX_STEP`, or the
    surrogate's again where that one does not descend: by itself it always does, but needs hundreds of passes of a sure
    student.

    Args:
        blocks: the logits.
        prior_C: of each class, above 0; they sum to one.
        temperature: that the logits are divided by.
        slack_C: how far a class may miss its share for a bias of 1, at most `MAX_SLACK` times as far for a large one:
            what pulls biases to 0 where the prior is not known any better. None is none.
        max_passes: over the logits.

    Raises:
        StudentError: the mass does not meet the prior after so many passes.
    """
    slack_C = np.zeros(len(prior_C)) if slack_C is None else slack_C
    with_hessian = len(prior_C) <= MAX_HESSIAN_CLASSES
    bias_C = np.zeros(len(prior_C))
    now = _pass(blocks, bias_C, temperature, with_hessian)
    missed_C, is_first = now.mass_C - prior_C, True
    for num_passes in range(1, max_passes + 1):
        if (abs(missed_C) <= TOLERANCE * prior_C).all():
            return BiasFit(_centred(bias_C), num_passes, float(abs(now.mass_C / prior_C - 1).max()))
        before = _penalised(now, bias_C, prior_C, slack_C)
        tried_C = tried = None
        if not is_first and now.hessian_CC is not None:
            tried_C = bias_C + _newton_step(now.hessian_CC, missed_C, bias_C, slack_C)
            tried = _pass(blocks, tried_C, temperature, with_hessian)
            if _penalised(tried, tried_C, prior_C, slack_C) > before + 1e-9 * (1 + abs(before)):
                tried = None
        if tried is None or tried_C is None:
            tried_C = bias_C + _surrogate_step(now.mass_C, prior_C, bias_C, slack_C)
            tried = _pass(blocks, tried_C, temperature, with_hessian)
        bias_C, now, is_first = tried_C, tried, False
        missed_C = now.mass_C - prior_C + _pull(bias_C, slack_C)
    worst = int(np.argmax(abs(missed_C / prior_C)))
    raise StudentError(
        f"biases: expected a mean mass within {100 * TOLERANCE:g} % of the prior, got class {worst} off by "
        f"{100 * abs(missed_C[worst] / prior_C[worst]):.3g} % after {max_passes} passes; give --data in which each "
        "class occurs, or use --method shift"
    )


def _pull(bias_C: NDArray[np.float64], slack_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each class may miss its share: slack times bias, and never more than `MAX_SLACK` times the slack."""
    pull_C: NDArray[np.float64] = slack_C * bias_C / np.sqrt(1 + (bias_C / MAX_SLACK) ** 2)
    return pull_C


def _penalised(
    now: _Potential, bias_C: NDArray[np.float64], prior_C: NDArray[np.float64], slack_C: NDArray[np.float64]
) -> float:
    """The potential and what `_pull` is the derivative of, a pseudo-Huber penalty."""
    penalty_C = slack_C * MAX_SLACK**2 * (np.sqrt(1 + (bias_C / MAX_SLACK) ** 2) - 1)
    return now.value - float(prior_C @ bias_C) + float(penalty_C.sum())


def _newton_step(
    hessian_CC: NDArray[np.float64],
    missed_C: NDArray[np.float64],
    bias_C: NDArray[np.float64],
    slack_C: NDArray[np.float64],
) -> NDArray[np.float64]:
    """- H^-1 g, cut to `MAX_STEP`; without slack a constant added to all biases changes nothing, and is held at 0."""
    num_classes = len(bias_C)
    hessian_CC = hessian_CC + (0.0 if slack_C.any() else 1 / num_classes**2)
    hessian_CC.flat[:: num_classes + 1] += 1e-10 / num_classes + slack_C * (1 + (bias_C / MAX_SLACK) ** 2) ** -1.5
    step_C = -np.linalg.solve(hessian_CC, missed_C).astype(np.float64)
    return step_C * min(1.0, MAX_STEP / max(float(abs(step_C).max()), MAX_STEP))


def _surrogate_step(
    mass_C: NDArray[np.float64],
    prior_C: NDArray[np.float64],
    bias_C: NDArray[np.float64],
    slack_C: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The step that is best for an upper bound of the potential, class by class: without slack, log(prior / mass).

    Since log(1 + x) <= x, F(b + d) <= F(b) + sum mass (e^d - 1) - prior d. With the penalty it is least where
    mass e^d - prior + pull(b + d) = 0, which rises with d, and is found by bisection.
    """
    mass_C = np.maximum(mass_C, LEAST_MASS)
    if not slack_C.any():
        exact_C: NDArray[np.float64] = np.log(prior_C / mass_C)
        return exact_C
    low_C, high_C = np.full(len(mass_C), -MOST_STEP), np.full(len(mass_C), MOST_STEP)
    for _ in range(60):
        middle_C = (low_C + high_C) / 2
        is_above_C = mass_C * np.exp(middle_C) - prior_C + _pull(bias_C + middle_C, slack_C) > 0
        low_C, high_C = np.where(is_above_C, low_C, middle_C), np.where(is_above_C, middle_C, high_C)
    step_C: NDArray[np.float64] = (low_C + high_C) / 2
    return step_C


def _centred(bias_C: NDArray[np.float64]) -> NDArray[np.float64]:
    centred_C: NDArray[np.float64] = bias_C - np.median(bias_C)
    return centred_C


def _pass(blocks: Blocks, bias_C: NDArray[np.float64], temperature: float, with_hessian: bool) -> _Potential:
    """Mean mass and mean lse over all rows, and the potential's second derivatives where they are asked for."""
    num_classes = len(bias_C)
    shift_C = torch.from_numpy(bias_C - bias_C.max()).float()
    mass_C = torch.zeros(num_classes, dtype=torch.float64)
    gram_CC = torch.zeros(num_classes, num_classes, dtype=torch.float64) if with_hessian else None
    num_rows, total = 0, 0.0
    for logits_RC in _logits(blocks, num_classes):
        scaled_RC = torch.add(shift_C, logits_RC, alpha=1 / temperature)
        lse_R = scaled_RC.logsumexp(1)
        probs_RC = scaled_RC.sub_(lse_R[:, None]).exp_()
        mass_C += probs_RC.sum(0, dtype=torch.float64)
        if gram_CC is not None:
            gram_CC += probs_RC.T @ probs_RC
        total += float(lse_R.sum(dtype=torch.float64))
        num_rows += len(logits_RC)
    mass_C /= num_rows
    hessian_CC = None if gram_CC is None else torch.diag(mass_C).sub_(gram_CC, alpha=1 / num_rows).numpy()
    return _Potential(total / num_rows + float(bias_C.max()), mass_C.numpy(), hessian_CC)


def _logits(blocks: Blocks, num_classes: int) -> Iterator[Tensor]:
    step = max(1, SLICE_VALUES // num_classes)
    for block in blocks():
        yield from block["logits"].split(step)


def fit_temperature(blocks: Blocks) -> TemperatureFit:
    """The temperature that makes the mean cross entropy least, found to about 0.1 %.

    Args:
        blocks: `logits` (R, C), and `expected` (R,): sum_c p(c) z(c) under the target p, NaN where there is none; of a
            hard target its logit. Where a target's tail is one bucket, `tail` (R,), its mass, and `ids` (R, K), the
            classes that are not in it; `expected` is then of these alone.

    Raises:
        StudentError: no row has a target, or the least is at no temperature in reach.
    """
    middle, span, steps = 0.0, MAX_LOG2_TEMPERATURE, COARSE_STEPS
    before = _mean_losses(blocks, [1.0])[0]
    while True:
        exponents = [middle + span * (2 * index / steps - 1) for index in range(steps + 1)]
        losses = _mean_losses(blocks, [2.0**exponent for exponent in exponents])
        best = min(range(steps + 1), key=losses.__getitem__)
        middle = exponents[best]
        if abs(middle) > MAX_LOG2_TEMPERATURE - TEMPERATURE_TOLERANCE:
            raise _no_temperature(middle > 0)
        span, steps = 2 * span / steps, FINE_STEPS
        if span < TEMPERATURE_TOLERANCE:
            return TemperatureFit(2.0**middle, before, losses[best])


def _no_temperature(is_high: bool) -> StudentError:
    got, advice = (
        ("64 as the best: it says nothing of the targets", "give the corpus that the targets belong to")
        if is_high
        else ("1/64 as the best: it is never wrong", "give data that it has not learned from")
    )
    return StudentError(
        f"temperature: expected one between 1/64 and 64 at which the student's loss is least, got {got}; {advice}, or "
        "leave --temperature out"
    )


def _mean_losses(blocks: Blocks, temperatures: Sequence[float]) -> list[float]:
    """The mean cross entropy at each of some temperatures."""
    sums_G, num_rows = torch.zeros(len(temperatures), dtype=torch.float64), 0
    for block in blocks():
        known_R = ~block["expected"].isnan()
        logits_RC = block["logits"][known_R]
        expected_R = block["expected"][known_R].double()
        num_rows += len(logits_RC)
        rest = block["tail"][known_R].double() if "tail" in block else None
        if rest is not None:
            kept_RC = torch.zeros_like(logits_RC, dtype=torch.bool)
            kept_RC.scatter_(1, block["ids"][known_R].long(), True)
            tail_logits_RC = logits_RC.masked_fill(kept_RC, -math.inf)
        for index, temperature in enumerate(temperatures):
            loss_R = (logits_RC / temperature).logsumexp(1).double() - expected_R / temperature
            if rest is not None:
                tail_lse_R = (tail_logits_RC / temperature).logsumexp(1).double()
                loss_R = loss_R - torch.where(rest > 0, rest * tail_lse_R, 0.0)
            sums_G[index] += loss_R.sum()
    if not num_rows:
        raise StudentError(
            "temperature: expected samples with a target to fit it on, got none; give a corpus with labels, or targets "
            "of which some are sealed, or leave --temperature out"
        )
    return (sums_G / num_rows).tolist()
