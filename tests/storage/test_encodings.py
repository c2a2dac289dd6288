"""What an encoding keeps is within the bound that it states."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.arrays import Array, smallest_uint
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK, check_temperature, encoding_from_json
from storage.encodings.dense import loaded_values
from storage.encodings.statistics import logsumexp
from storage.encodings.values import ValueType
from storage.errors import MismatchError

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
VALUE_TYPES: tuple[ValueType, ...] = ("float16", "float32", "uint8")

logit = st.floats(-1e5, 1e5, width=32) | st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0])
logits = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=logit)
)


def log_softmax(values_NC: Array) -> Array:
    values: Array = values_NC - logsumexp(values_NC)[..., None]
    return values


def bound_of(values_NK: Array, value_type: ValueType) -> Array:
    """The stated error of a centred logit, with a little for the arithmetic itself."""
    size = abs(values_NK.astype(np.float64))
    if value_type == "float32":
        return size * 0
    if value_type == "float16":
        return np.where(size > 65504, size - 65504 + 32, np.maximum(size * 2.0**-11, 2.0**-25))
    return np.broadcast_to(size.max(axis=1, keepdims=True) * (1 / 510 + 2.0**-22) + 1e-37, size.shape)


@given(logits, st.sampled_from(VALUE_TYPES))
def test_dense_values_are_within_the_bound(logits_NC: Array, value_type: ValueType) -> None:
    arrays = Dense(value_type).encode(logits_NC, TEMPERATURES)
    truth_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    found_NC = loaded_values(arrays)
    assert (abs(found_NC.astype(np.float64) - truth_NC) <= bound_of(truth_NC, value_type)).all()
    assert (found_NC.max(axis=1) == 0).all()


@given(logits)
def test_statistics_are_those_of_float64(logits_NC: Array) -> None:
    arrays = Dense().encode(logits_NC, TEMPERATURES)
    centred_NC = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(arrays["max_logit"], logits_NC.max(axis=1))
    for column, temperature in enumerate(TEMPERATURES):
        np.testing.assert_allclose(
            arrays["lse"][:, column],
            logsumexp(centred_NC / temperature),
            rtol=2e-3 * (abs(centred_NC).max() > 1e3) + 1e-5,
            atol=1e-6,
        )
    assert (arrays["lse"] >= 0).all()
    logprobs_NC = log_softmax(centred_NC)
    entropy_N = -(np.exp(logprobs_NC) * logprobs_NC).sum(axis=1)
    np.testing.assert_allclose(arrays["entropy"], entropy_N, rtol=5e-3, atol=5e-3)


@given(logits, st.sampled_from(VALUE_TYPES), st.sampled_from(TEMPERATURES), st.integers(1, 12))
def test_rows_sum_to_one_and_are_the_teachers(logits_NC: Array, values: ValueType, temperature: float, k: int) -> None:
    num_classes = logits_NC.shape[1]
    truth_NC = log_softmax((logits_NC - logits_NC.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    error_N = bound_of(logits_NC - logits_NC.max(axis=1, keepdims=True), values).max(axis=1) / temperature
    for encoding in (Dense(values), TopK(min(k, num_classes), values)):
        arrays = encoding.encode(logits_NC, TEMPERATURES)
        found = encoding.logprobs(arrays, temperature, TEMPERATURES).astype(np.float64)
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
        expected = truth_NC
        if isinstance(encoding, TopK):
            kept = np.take_along_axis(truth_NC, arrays["ids"].astype(np.int64), axis=1)
            rest = truth_NC.copy()
            np.put_along_axis(rest, arrays["ids"].astype(np.int64), -np.inf, axis=1)
            expected = np.concatenate([kept, logsumexp(rest)[:, None]], axis=1)
        finite = np.isfinite(expected)
        assert (np.isfinite(found) == finite).all()
        expected, found = np.where(finite, expected, 0), np.where(finite, found, 0)
        assert (abs(found - expected) <= 2 * error_N[:, None] + 1e-5 + 2e-6 * abs(expected)).all()


@given(logits, st.integers(1, 12))
def test_topk_keeps_the_largest_with_ties_to_the_lower_id(logits_NC: Array, k: int) -> None:
    k = min(k, logits_NC.shape[1])
    ids_NK = TopK(k).encode(logits_NC, (1.0,))["ids"]
    centred_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)  # logits that differ by less are stored alike
    for row, ids_K in zip(centred_NC.tolist(), ids_NK.tolist(), strict=True):
        assert ids_K == sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]


@given(logits, st.sampled_from(VALUE_TYPES[:2]))
def test_a_smaller_k_is_a_prefix_whose_tail_takes_in_what_was_dropped(logits_NC: Array, values: ValueType) -> None:
    num_classes = logits_NC.shape[1]
    large = TopK(num_classes, values).encode(logits_NC, TEMPERATURES)
    exact_NC = (logits_NC - logits_NC.max(axis=1, keepdims=True)).astype(np.float64)
    for k in range(1, num_classes):
        small = TopK(k, values).encode(logits_NC, TEMPERATURES)
        np.testing.assert_array_equal(small["ids"], large["ids"][:, :k])
        np.testing.assert_array_equal(small["values"], large["values"][:, :k])
        dropped = np.take_along_axis(exact_NC, large["ids"][:, k:].astype(np.int64), axis=1)
        for column, temperature in enumerate(TEMPERATURES):
            tail = np.logaddexp(
                large["log_tail"][:, column].astype(np.float64),
                logsumexp(dropped / temperature) - logsumexp(exact_NC / temperature),
            )
            np.testing.assert_allclose(small["log_tail"][:, column], tail, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("tail", [2.5e-3, 4.5e-5, 1e-7, 1e-9, 1e-30])
def test_the_tail_is_exact_where_one_minus_the_kept_mass_is_not(tail: float, temperature: float) -> None:
    """The two tails of the formulas' warning: from float16 values, 1 - sum is off by about 4 % and 200 %."""
    generator = np.random.default_rng(0)
    kept = generator.normal(0, 1.5, (200, 8))
    rest = generator.normal(0, 0.5, (200, 992))
    shift = logsumexp(kept) + np.log(tail / (1 - tail)) - logsumexp(rest)
    logits_NC = (np.concatenate([kept, rest + shift[:, None]], axis=1) * temperature).astype(np.float32)
    arrays = TopK(8).encode(logits_NC, (temperature,))
    truth = np.sort(log_softmax(logits_NC.astype(np.float64) / temperature), axis=1)[:, :-8]
    relative = np.expm1(arrays["log_tail"][:, 0].astype(np.float64) - logsumexp(truth))
    assert abs(relative).max() < 1e-4
    naive = 1 - np.exp(arrays["values"].astype(np.float64) / temperature - arrays["lse"]).sum(axis=1)
    assert abs(naive / np.exp(logsumexp(truth)) - 1).max() > 0.01


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_padded_entries_of_minus_infinity_stay_without_mass(values: ValueType) -> None:
    logits_NC = np.array([[1.0, -np.inf, 3.0, -np.inf], [-np.inf, -np.inf, -np.inf, 0.0]], np.float32)
    dense = Dense(values)
    arrays = dense.encode(logits_NC, (1.0,))
    if values == "uint8":  # as the bound says: -inf reads as -R, which is 0 in the second row
        assert arrays["values"].tolist() == [[255, 255, 0, 255], [0, 0, 0, 0]]
        assert arrays["value_range"].tolist() == [2, 0]
    else:
        assert np.isneginf(arrays["values"]).tolist() == np.isneginf(logits_NC).tolist()
        found = np.exp(dense.logprobs(arrays, 1.0, (1.0,)))
        np.testing.assert_allclose(found[1], [0, 0, 0, 1])
        topk = TopK(2, values)
        arrays = topk.encode(logits_NC, (1.0,))
        assert arrays["ids"].tolist() == [[2, 0], [3, 0]]
        assert np.isneginf(arrays["log_tail"]).all()
        np.testing.assert_allclose(np.exp(topk.logprobs(arrays, 1.0, (1.0,)))[1], [1, 0, 0])


def test_huge_ranges_are_clipped_only_where_the_bound_says_so() -> None:
    logits_NC = np.array([[3e4, -3e4, -1e6, 0]], np.float32)
    assert Dense("float16").encode(logits_NC, (1.0,))["values"].tolist() == [[0, -60000, -65504, -30000]]
    wide_NC = np.array([[0, -1e30, -5e29]], np.float32)
    arrays = Dense("uint8").encode(wide_NC, (1.0,))
    assert arrays["values"].tolist() == [[0, 255, 128]]
    assert "-65504" in Dense("float16").error_bound
    assert "-65504" in TopK(1, "float16").error_bound
    assert "510" in Dense("uint8").error_bound
    assert "510" in TopK(1, "uint8").error_bound
    assert "exact" in Dense("float32").error_bound


@pytest.mark.parametrize("encoding", [Dense(), TopK(2)])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(encoding: Encoding, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got"):
        check_temperature(encoding, temperature, (1.0,))
    arrays = encoding.encode(np.zeros((1, 3), np.float32), (1.0,))
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got"):
        encoding.logprobs(arrays, temperature, (1.0,))


def test_an_undeclared_temperature_is_refused_by_topk_and_taken_by_dense() -> None:
    message = r"temperature: expected one that the store declares \(1, 4\), got 2; a topk store is exact at these only"
    arrays = TopK(2).encode(np.zeros((1, 3), np.float32), (1.0, 4.0))
    with pytest.raises(MismatchError, match=message):
        TopK(2).logprobs(arrays, 2.0, (1.0, 4.0))
    with pytest.raises(MismatchError, match=message):
        check_temperature(TopK(2), 2.0, (1.0, 4.0))
    check_temperature(Dense(), 2.0, (1.0, 4.0))
    assert Dense().exact_temperatures((1.0,)) is None


def test_options_that_can_not_be_are_refused() -> None:
    wrong: Any = "float64"
    with pytest.raises(ValueError, match="values: expected one of float16, float32, uint8, got 'float64'"):
        Dense(wrong)
    with pytest.raises(ValueError, match="values: expected one of float16, float32, uint8, got 'float64'"):
        TopK(1, wrong)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        TopK(0)


@pytest.mark.parametrize("encoding", [Dense("uint8"), TopK(7, "float32"), Sample(9, 5), Hidden(4)])
def test_an_encoding_comes_back_from_json(encoding: Encoding) -> None:
    assert encoding_from_json(encoding.to_json()) == encoding


EVERY: list[Encoding] = [Dense(value) for value in VALUE_TYPES]
EVERY += [TopK(3, value) for value in VALUE_TYPES]
EVERY += [Sample(7), Sample(255), Hidden(6), Hidden(6, "float32")]


@pytest.mark.parametrize("encoding", EVERY)
def test_encoded_arrays_are_those_that_are_declared(encoding: Encoding) -> None:
    generator = np.random.default_rng(0)
    temperatures = TEMPERATURES[:1] if isinstance(encoding, Sample) else TEMPERATURES
    logits_NC, hidden_NW = (generator.normal(size=(4, width)).astype(np.float32) for width in (300, 6))
    arrays = encoding.encode(logits_NC, temperatures, uniform_N=generator.random(4), hidden_NW=hidden_NW)
    specs = {spec.name: spec for spec in encoding.arrays(300, len(temperatures))}
    assert set(arrays) == set(specs) | {"max_logit", "lse", "entropy"}
    for name, spec in specs.items():
        assert (arrays[name].dtype, arrays[name].shape) == (np.dtype(spec.dtype), (4, *spec.row_shape))
        assert spec.row_bytes * 4 == arrays[name].nbytes


@pytest.mark.parametrize(("largest", "name"), [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65536, "uint32")])
def test_ids_take_the_smallest_type(largest: int, name: str) -> None:
    assert smallest_uint(largest) == name
