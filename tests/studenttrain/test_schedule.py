"""The learning rate of each step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studenttrain.schedule import learning_rate


def test_cosine_begins_at_the_highest_rate_and_would_end_at_zero() -> None:
    assert learning_rate(0.5, "cosine", 0, 100) == 0.5
    assert learning_rate(0.5, "cosine", 50, 100) == pytest.approx(0.25)
    assert learning_rate(0.5, "cosine", 100, 100) == pytest.approx(0.0)


def test_constant_stays() -> None:
    assert {learning_rate(0.5, "constant", step, 100) for step in range(100)} == {0.5}


def test_the_warm_up_is_linear_and_ends_at_the_highest_rate() -> None:
    rates = [learning_rate(1.0, "constant", step, 100, 4) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@given(st.integers(1, 500), st.integers(0, 100), st.data())
def test_the_rate_stays_between_zero_and_the_highest(total: int, warmup: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    for schedule in ("cosine", "constant"):
        rate = learning_rate(0.1, schedule, step, total, min(warmup, total - 1))
        assert 0 <= rate <= 0.1
        assert math.isfinite(rate)
