"""Hidden states and a head: the teacher's logits within the stated bound, at any temperature."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.arrays import Array
from storage.encodings import HeadArrays, Hidden, encoding_from_json
from storage.encodings.hidden import HiddenType
from storage.encodings.statistics import logsumexp
from storage.scan import recompute
from storage.scan.recompute import logit_blocks, logit_bound, max_and_lse, top1_classes
from tests.storage.soft_targets import head_of, hidden_encoding

HIDDEN_TYPES: tuple[HiddenType, ...] = ("float16", "float32")
number = st.floats(-100, 100, width=16) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1e-6, -1e-7])
hidden_states = st.integers(1, 9).flatmap(lambda rows: hnp.arrays(np.float32, (rows, 4), elements=number))
options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([1.0, 0.125, -2.0]),
        "soft_cap": st.none() | st.sampled_from([1.0, 30.0]),
        "has_bias": st.booleans(),
        "values": st.sampled_from(HIDDEN_TYPES),
    }
)


def exact_logits(encoding: Hidden, hidden_RW: Array, head: HeadArrays) -> Array:
    """The formula in float64."""
    logits_RC: Array = hidden_RW.astype(np.float64) @ head.weight_CW.astype(np.float64).T
    logits_RC = encoding.scale * (logits_RC + (0 if head.bias_C is None else head.bias_C.astype(np.float64)))
    return logits_RC if encoding.soft_cap is None else encoding.soft_cap * np.tanh(logits_RC / encoding.soft_cap)


@given(hidden_states, options)
def test_logits_are_within_the_bound(hidden_RW: Array, fields: dict[str, Any]) -> None:
    encoding, head = hidden_encoding(7, **fields), head_of(7, 4, fields["has_bias"])
    truth_RC = exact_logits(encoding, hidden_RW, head)
    arrays = encoding.encode(truth_RC.astype(np.float32), (1.0,), hidden_NW=hidden_RW)
    found_RC = encoding.logits(arrays, head)
    assert found_RC.dtype == np.float32
    size_RC = abs(hidden_RW.astype(np.float64)) @ abs(head.weight_CW.astype(np.float64)).T
    unit = 2.0**-11 if fields["values"] == "float16" else 0.0
    small = 2.0**-25 * abs(head.weight_CW.astype(np.float64)).sum(axis=1) if unit else 0.0
    sums = 8 * 2.0**-24 * (size_RC + (0 if head.bias_C is None else abs(head.bias_C.astype(np.float64))))
    rounding = 2.0**-20 if encoding.soft_cap is None else 2.0**-20 * (1 + encoding.soft_cap)
    bound_RC = abs(encoding.scale) * (unit * size_RC + small + sums) + rounding
    assert (abs(found_RC - truth_RC) <= bound_RC).all()


@given(hidden_states, options, st.sampled_from([0.5, 1.0, 3.0]))
def test_log_probabilities_are_the_teachers_at_any_temperature(
    hidden_RW: Array, fields: dict[str, Any], temperature: float
) -> None:
    encoding, head = hidden_encoding(7, **fields), head_of(7, 4, fields["has_bias"])
    truth_RC = exact_logits(encoding, hidden_RW, head) / temperature
    arrays = encoding.encode((truth_RC * temperature).astype(np.float32), (1.0,), hidden_NW=hidden_RW)
    found_RC = encoding.logprobs(arrays, temperature, (1.0,), head).astype(np.float64)
    np.testing.assert_allclose(np.exp(found_RC).sum(axis=1), 1, rtol=1e-5)
    bound_R = logit_bound(encoding, head, arrays["hidden"], {"precision": "fp32"}) / temperature
    assert (abs(found_RC - (truth_RC - logsumexp(truth_RC)[:, None])) <= 2 * bound_R[:, None] + 1e-4).all()


@given(hidden_states, options, st.sampled_from(["fp32", "fp16", "bf16", None]), st.integers(0, 2**32))
def test_what_is_recomputed_is_within_the_bound_of_what_a_teacher_of_that_precision_said(
    hidden_RW: Array, fields: dict[str, Any], precision: str | None, seed: int
) -> None:
    """The teacher's every rounding is taken at its worst, and of either sign."""
    encoding, head = hidden_encoding(7, **fields), head_of(7, 4, fields["has_bias"])
    unit = recompute.UNITS.get(str(precision), recompute.UNITS["bf16"])
    generator = np.random.default_rng(seed)

    def rounded(values: Array) -> Array:
        return values * (1 + unit * generator.choice([-1, 1], values.shape))

    logits_RC = rounded(rounded(hidden_RW) @ rounded(head.weight_CW.astype(np.float64)).T)
    logits_RC += 0 if head.bias_C is None else rounded(head.bias_C.astype(np.float64))
    logits_RC = encoding.scale * logits_RC
    if encoding.soft_cap is not None:
        logits_RC = rounded(encoding.soft_cap * np.tanh(rounded(logits_RC / encoding.soft_cap)))
    arrays = encoding.encode(logits_RC.astype(np.float32), (0.5, 2.0), hidden_NW=hidden_RW)
    max_R, lse_RT = max_and_lse(encoding, head, arrays["hidden"], (0.5, 2.0))
    bound_R = logit_bound(encoding, head, arrays["hidden"], {"precision": precision}) + 1e-4
    assert (abs(max_R - arrays["max_logit"]) <= bound_R + 2.0**-23 * abs(max_R)).all()
    for column, temperature in enumerate((0.5, 2.0)):
        absolute_R = lse_RT[:, column] + max_R / temperature
        stored_R = arrays["lse"][:, column] + arrays["max_logit"].astype(np.float64) / temperature
        assert (abs(absolute_R - stored_R) <= bound_R / temperature + 1e-4).all()


@pytest.mark.parametrize("has_bias", [False, True])
def test_classes_block_by_block_are_those_of_all_at_once(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "BLOCK_VALUES", 40)
    monkeypatch.setattr(recompute, "BLOCK_ROWS", 4)
    encoding, head = hidden_encoding(37, scale=0.5, soft_cap=9.0, has_bias=has_bias), head_of(37, 4, has_bias)
    hidden_RW = np.random.default_rng(0).normal(0, 1, (10, 4)).astype(np.float16)
    whole_RC = encoding.logits({"hidden": hidden_RW}, head)
    blocks = list(logit_blocks(encoding, head, hidden_RW))
    assert [first for first, _ in blocks] == list(range(0, 37, 4))
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks], axis=1), whole_RC, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(top1_classes(encoding, head, hidden_RW), whole_RC.argmax(axis=1))
    max_R, lse_RT = max_and_lse(encoding, head, hidden_RW, (1.0, 4.0))
    np.testing.assert_allclose(max_R, whole_RC.max(axis=1), rtol=1e-6)
    for column, temperature in enumerate((1.0, 4.0)):
        expected = logsumexp((whole_RC - whole_RC.max(axis=1, keepdims=True)) / temperature)
        np.testing.assert_allclose(lse_RT[:, column], expected, rtol=1e-5)


def test_of_equal_logits_the_lowest_class_is_top1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "BLOCK_VALUES", 6)
    head = HeadArrays(np.array([[0], [2], [1], [2], [2], [0]], np.float16), None)
    hidden_RW = np.array([[1], [-1], [0]], np.float16)
    assert top1_classes(Hidden(1), head, hidden_RW).tolist() == [1, 0, 0]


def test_a_hidden_state_that_float16_can_not_hold_becomes_infinite() -> None:
    arrays = Hidden(2).encode(np.zeros((1, 3), np.float32), (1.0,), hidden_NW=np.array([[1e5, 1]], np.float32))
    assert arrays["hidden"].tolist() == [[np.inf, 1]]


def test_what_can_not_be_is_refused() -> None:
    wrong: Any = "uint8"
    with pytest.raises(ValueError, match="values: expected float16 or float32 with hidden, got 'uint8'"):
        Hidden(4, wrong)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        Hidden(0)
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"scale: expected a finite number other than 0, got {scale}"):
            Hidden(4, scale=scale)
    for soft_cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"soft_cap: expected a number above 0, got {soft_cap}"):
            Hidden(4, soft_cap=soft_cap)
    with pytest.raises(ValueError, match="hidden_NW: expected the hidden states of the rows, got none"):
        Hidden(4).encode(np.zeros((1, 3), np.float32), (1.0,))
    with pytest.raises(
        ValueError, match=r"head: expected the store's head beside hidden states, got none; take it from"
    ):
        Hidden(4).logprobs({"hidden": np.zeros((1, 4), np.float16)}, 1.0, (1.0,))
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        Hidden(4).logprobs({"hidden": np.zeros((1, 4), np.float16)}, 0.0, (1.0,), head_of(3, 4))


def test_it_says_what_it_is() -> None:
    encoding = hidden_encoding(5, values="float32", scale=0.5, soft_cap=30.0, has_bias=True)
    assert encoding_from_json(encoding.to_json()) == encoding
    assert encoding.exact_temperatures((1.0,)) is None
    assert encoding.losses == {"kl", "reverse-kl", "jsd", "mse"}
    assert "exact to float32" in encoding.error_bound
    assert "2^-11" in Hidden(4).error_bound
    encoding.check(5, (1.0, 2.0))
