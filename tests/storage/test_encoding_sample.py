"""Systematic draws: within one of what is expected, unbiased, and a function of seed, row and position alone."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.arrays import Array
from storage.encodings import Sample, encoding_from_json
from storage.encodings.sample import systematic_counts, uniforms
from storage.encodings.statistics import logsumexp
from storage.errors import MismatchError

logit = st.floats(-1e4, 1e4, width=32) | st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0, -math.inf])
logits = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=logit)
)
uniform = st.sampled_from([0.0, 0.5, 1 - 2.0**-53, 2.0**-53]) | st.floats(0, 1, exclude_max=True)
draws = st.integers(1, 255)
temperatures = st.sampled_from([0.5, 1.0, 4.0])


def with_a_class(logits_NC: Array) -> Array:
    """Rows of -inf alone are no distribution: their first class gets 0."""
    logits_NC = logits_NC.copy()
    logits_NC[np.isneginf(logits_NC).all(axis=1), 0] = 0
    return logits_NC


def probs_of(logits_NC: Array, temperature: float) -> Array:
    values_NC = (logits_NC - logits_NC.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    probs_NC: Array = np.exp(values_NC - logsumexp(values_NC)[:, None])
    return probs_NC


def counts_by_class(arrays: dict[str, Array], num_classes: int) -> Array:
    """Counts (N, C) of stored ids and counts."""
    counts_NC = np.zeros((len(arrays["ids"]), num_classes), np.int64)
    np.add.at(counts_NC, (np.arange(len(counts_NC))[:, None], arrays["ids"]), arrays["counts"])
    return counts_NC


@given(logits, draws, temperatures, st.data())
def test_counts_are_within_one_of_what_is_expected_and_sum_to_the_draws(
    logits_NC: Array, num_draws: int, temperature: float, data: st.DataObject
) -> None:
    logits_NC = with_a_class(logits_NC)
    uniform_N = np.array(data.draw(st.lists(uniform, min_size=len(logits_NC), max_size=len(logits_NC))))
    arrays = Sample(num_draws).encode(logits_NC, (temperature,), uniform_N=uniform_N)
    ids_ND, counts_ND = arrays["ids"], arrays["counts"].astype(np.int64)
    assert (counts_ND.sum(axis=1) == num_draws).all()
    assert ids_ND.shape == (len(logits_NC), min(num_draws, logits_NC.shape[1]))
    drawn_ND = counts_ND > 0
    assert (drawn_ND[:, :-1] | ~drawn_ND[:, 1:]).all()
    assert (ids_ND[~drawn_ND] == 0).all()
    assert ((ids_ND[:, 1:] > ids_ND[:, :-1]) | ~drawn_ND[:, 1:]).all()
    counts_NC = counts_by_class(arrays, logits_NC.shape[1])
    probs_NC = probs_of(logits_NC, temperature)
    assert (abs(counts_NC - num_draws * probs_NC) < 1 + 1e-9).all()
    assert (counts_NC[probs_NC == 0] == 0).all()


@given(logits, draws, temperatures)
def test_the_mean_over_u_is_what_is_expected(logits_NC: Array, num_draws: int, temperature: float) -> None:
    """A count is one of two whole numbers, and which of them changes at two places of u: so any grid tells the mean."""
    values_NC = with_a_class(logits_NC)
    values_NC = values_NC - values_NC.max(axis=1, keepdims=True)
    num_steps = 512
    steps = (np.arange(num_steps) + 0.5) / num_steps
    counts = [systematic_counts(values_NC, temperature, np.full(len(values_NC), u), num_draws) for u in steps]
    mean_NC = np.mean(counts, axis=0)
    assert (abs(mean_NC - num_draws * probs_of(values_NC, temperature)) <= 2 / num_steps + 1e-9).all()


def test_shares_are_unbiased() -> None:
    """A test that raises a false alarm at most once in 10^6 seeds.

    Counts lie in an interval of length 1, so by Hoeffding the mean of R of them is off by t or more with a probability
    of at most 2 exp(-2 R t^2), whatever the distribution; there are C classes in each of two distributions.
    """
    num_rows, num_classes, false_alarm = 20_000, 20, 1e-6
    bound = math.sqrt(math.log(2 * 2 * num_classes / false_alarm) / (2 * num_rows))
    assert bound < 0.022
    uniform_N = uniforms(2026, np.arange(num_rows))
    for logits_C in (np.zeros(num_classes), np.random.default_rng(0).normal(0, 2, num_classes)):
        logits_NC = np.broadcast_to(logits_C.astype(np.float32), (num_rows, num_classes))
        arrays = Sample(7).encode(logits_NC, (1.0,), uniform_N=uniform_N)
        mean_C = counts_by_class(arrays, num_classes).mean(axis=0)
        assert (abs(mean_C - 7 * probs_of(logits_NC[:1], 1.0)[0]) < bound).all()


def test_draws_vary_three_times_less_than_independent_ones() -> None:
    logits_C = np.random.default_rng(1).normal(0, 2, 1000)
    logits_NC = np.broadcast_to(logits_C.astype(np.float32), (2000, 1000))
    arrays = Sample(50).encode(logits_NC, (1.0,), uniform_N=uniforms(3, np.arange(2000)))
    probs_C = probs_of(logits_NC[:1], 1.0)[0]
    variance = ((counts_by_class(arrays, 1000) / 50 - probs_C) ** 2).sum(axis=1).mean()
    independent = (probs_C * (1 - probs_C)).sum() / 50
    assert independent / variance > 1.3  # the more so, the more mass lies in classes that come up more than once
    often = probs_C * 50 > 1
    variance = ((counts_by_class(arrays, 1000) / 50 - probs_C)[:, often] ** 2).sum(axis=1).mean()
    assert (probs_C * (1 - probs_C))[often].sum() / 50 / variance > 3


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_draws_are_the_same_whatever_the_batch(sizes: list[int], seed: int, num_positions: int) -> None:
    num_rows, encoding = sum(sizes), Sample(9, seed)
    logits_RC = np.random.default_rng(0).normal(0, 3, (num_rows * num_positions, 30)).astype(np.float32)
    rows_N = np.arange(10**6, 10**6 + num_rows)
    whole = encoding.encode(logits_RC, (1.0,), uniform_N=uniforms(seed, rows_N, num_positions))
    start, parts = 0, []
    for size in sizes:
        flat = slice(start * num_positions, (start + size) * num_positions)
        uniform_R = uniforms(seed, rows_N[start : start + size], num_positions)
        parts.append(encoding.encode(logits_RC[flat], (1.0,), uniform_N=uniform_R))
        start += size
    for name in ("ids", "counts"):
        assert np.concatenate([part[name] for part in parts]).tobytes() == whole[name].tobytes()


def test_random_numbers_are_those_that_they_have_always_been() -> None:
    assert uniforms(5, np.array([7]), 6).tolist() == [
        3305914267571449506 // 2**11 * 2.0**-53,
        13307219014231895429 // 2**11 * 2.0**-53,
        15867447016329292082 // 2**11 * 2.0**-53,
        1917169793472025260 // 2**11 * 2.0**-53,
        11909970843071548987 // 2**11 * 2.0**-53,
        5082809696259149560 // 2**11 * 2.0**-53,
    ]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 20))
def test_random_numbers_depend_on_seed_row_and_position_alone(seed: int, row: int, num_positions: int) -> None:
    found = uniforms(seed, np.array([row, row + 1]), num_positions).reshape(2, num_positions)
    assert ((found >= 0) & (found < 1)).all()
    assert found[0, :1].tolist() == uniforms(seed, np.array([row])).tolist()
    assert found[1].tolist() == uniforms(seed, np.array([row + 1]), num_positions).tolist()
    assert found[0, 0] != found[1, 0]
    assert found[0, 0] != uniforms(seed ^ 1, np.array([row]))[0]


def test_a_sure_teacher_gives_one_id_that_came_up_every_time() -> None:
    logits_NC = np.array([[-np.inf, -np.inf, 5, -np.inf], [0, 1000, 0, 0]], np.float32)
    arrays = Sample(255).encode(logits_NC, (1.0,), uniform_N=np.array([0.0, 0.999]))
    assert arrays["ids"].tolist() == [[2, 0, 0, 0], [1, 0, 0, 0]]
    assert arrays["counts"].tolist() == [[255, 0, 0, 0], [255, 0, 0, 0]]
    one = Sample(3).encode(np.zeros((1, 1), np.float32), (1.0,), uniform_N=np.zeros(1))
    assert (one["ids"].tolist(), one["counts"].tolist()) == ([[0]], [[3]])


def test_log_probabilities_are_those_of_the_shares() -> None:
    encoding = Sample(4)
    logits_NC = np.log(np.array([[0.5, 0.25, 0.25, 1e-30]], np.float32))
    arrays = encoding.encode(logits_NC, (1.0,), uniform_N=np.array([0.5]))
    np.testing.assert_allclose(np.exp(encoding.logprobs(arrays, 1.0, (1.0,))), [[0.5, 0.25, 0.25, 0]])
    with pytest.raises(
        MismatchError, match=r"expected one that the store declares \(1\), got 2; a sample store is exact"
    ):
        encoding.logprobs(arrays, 2.0, (1.0,))
    assert encoding.exact_temperatures((3.0,)) == (3.0,)
    assert encoding.losses == {"sampled-ce"}
    assert "within 1 / 4 of its probability" in encoding.error_bound


def test_what_can_not_be_is_refused() -> None:
    for num_draws in (0, 256):
        with pytest.raises(
            ValueError, match=f"draws: expected 1 to 255, which a count of one byte holds, got {num_draws}"
        ):
            Sample(num_draws)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed: expected 0 to 2\^64 - 1, got {seed}"):
            Sample(1, seed)
    with pytest.raises(
        ValueError, match="temperatures: expected one for sample, which draws at it, got 2; declare the"
    ):
        Sample(1).check(5, (1.0, 2.0))
    with pytest.raises(ValueError, match="uniform_N: expected a random number for each row, got none; take them from"):
        Sample(1).encode(np.zeros((1, 3), np.float32), (1.0,))


def test_it_comes_back_from_json() -> None:
    encoding = Sample(50, 2**64 - 1)
    assert encoding.to_json() == {"name": "sample", "draws": 50, "seed": 2**64 - 1}
    assert encoding_from_json(encoding.to_json()) == encoding
