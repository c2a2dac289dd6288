"""The device's arithmetic is that of the reference in storage.encodings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage.arrays import Array
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import uniforms
from storage.encodings.statistics import to_float16
from teacherdump import sparsify as module
from teacherdump.sparsify import (
    HAS_NAN,
    HAS_POSITIVE_INF,
    HIDDEN_NOT_FINITE,
    NO_CLASS,
    REFUSAL,
    TeacherRows,
    build_sparsify,
    copy_to_host,
)

TEMPERATURES = (0.5, 1.0, 3.0, 20.0)

# Few different values, so that there are ties, at the border of k too; and -inf, as padded classes have it.
tied = st.sampled_from([-3.0, -1.5, -1.0, -0.0, 0.0, 0.25, 2.0, 7.0, -np.inf])
plain = st.floats(-100, 100, width=32)
wide = st.floats(-1e6, 1e6, width=32)


@st.composite
def logits(draw: st.DrawFn) -> Array:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 40)))
    values: Array = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([tied, plain, wide]))))
    values[np.isneginf(values).all(axis=1), 0] = 1.0
    return values


def on_device(logits_NC: Array, encoding: Encoding, device: str = "cpu") -> dict[str, Array]:
    found = build_sparsify(encoding, TEMPERATURES)(TeacherRows(torch.from_numpy(logits_NC).to(device)))
    return copy_to_host(found).wait()


def assert_meets_reference(found: dict[str, Array], logits_NC: Array, encoding: Encoding) -> None:
    expected = encoding.encode(logits_NC, TEMPERATURES)
    assert set(found) == {*expected, REFUSAL}
    assert not found[REFUSAL].any()
    for name, values in expected.items():
        got = found[name]
        assert got.shape == values.shape
        if got.dtype == np.uint8:
            assert np.abs(got.astype(int) - values.astype(int)).max() <= 1
        elif name in ("ids", "max_logit", "value_range", "values"):
            np.testing.assert_array_equal(got, values)
        elif name == "entropy":
            np.testing.assert_allclose(got.astype(np.float32), values.astype(np.float32), rtol=2e-3, atol=1e-6)
        else:  # lse, log_tail
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, values, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("values", ["float16", "float32", "uint8"])
@given(data=st.data(), logits_NC=logits())
@settings(deadline=None, max_examples=60)
def test_what_is_kept_equals_the_reference(values: str, data: st.DataObject, logits_NC: Array) -> None:
    k = data.draw(st.integers(1, logits_NC.shape[1]))
    for encoding in (Dense(values), TopK(k, values)):  # type: ignore[arg-type]
        assert_meets_reference(on_device(logits_NC, encoding), logits_NC, encoding)


def test_ties_at_the_border_of_k_go_to_the_lower_id() -> None:
    logits_NC = np.array([[1, 3, 1, 3, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]], np.float32)
    assert on_device(logits_NC, TopK(4))["ids"].tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


def test_minus_zero_ties_with_zero() -> None:
    logits_NC = np.array([[-0.0, 0.0, -1.0, -0.0]], np.float32)
    assert on_device(logits_NC, TopK(3))["ids"].tolist() == [[0, 1, 3]]


def test_many_classes_in_many_passes_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NC = np.random.default_rng(0).normal(size=(37, 301)).astype(np.float32) * 5
    whole = on_device(logits_NC, TopK(7))
    assert_meets_reference(whole, logits_NC, TopK(7))
    monkeypatch.setitem(module.PASS_VALUES, "cpu", 301 * 5)
    parts = on_device(logits_NC, TopK(7))
    for name, values in whole.items():
        np.testing.assert_array_equal(parts[name], values)


def test_a_tail_of_almost_nothing_keeps_its_digits() -> None:
    logits_NC = np.array([[0.0, -30.0, -60.0, -61.0]], np.float32)
    encoding = TopK(2, "float32")
    assert_meets_reference(on_device(logits_NC, encoding), logits_NC, encoding)


def test_a_tail_of_padded_classes_only_is_empty() -> None:
    found = on_device(np.array([[2.0, 1.0, -np.inf, -np.inf]], np.float32), TopK(2))
    assert np.isneginf(found["log_tail"]).all()
    assert found["ids"].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        ([1.0, np.nan, 2.0], HAS_NAN),
        ([1.0, np.inf, 2.0], HAS_POSITIVE_INF),
        ([np.nan, np.inf, 2.0], HAS_NAN),
        ([-np.inf, -np.inf, -np.inf], NO_CLASS),
        ([-np.inf, -np.inf, 0.0], 0),
    ],
)
@pytest.mark.parametrize("encoding", [Dense(), Dense("uint8"), TopK(2)])
def test_rows_without_a_distribution_are_refused_and_leave_the_others_alone(
    encoding: Encoding, row: list[float], refusal: int
) -> None:
    good = np.array([[0.5, -1.0, 2.0]], np.float32)
    found = on_device(np.concatenate([good, np.array([row], np.float32), good]), encoding)
    assert found[REFUSAL].tolist() == [0, refusal, 0]
    for name, values in on_device(good, encoding).items():
        np.testing.assert_array_equal(found[name][[0, 2]], np.repeat(values, 2, axis=0))


def test_the_log_probability_of_a_hard_target_is_kept_and_nan_where_it_is_unknown() -> None:
    logits_NC = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, -1e30, 0.0]], np.float32)
    hard_targets_N = torch.tensor([1, -1, 1], dtype=torch.int32)
    found = build_sparsify(Dense(), (1.0, 4.0))(TeacherRows(torch.from_numpy(logits_NC), hard_targets_N))
    expected = to_float16(np.array([2 - np.log(np.exp([1.0, 2.0, 4.0]).sum()), np.nan, -1e30]))
    np.testing.assert_array_equal(found["hard_target_logprob"].numpy(), expected)


def test_the_mass_of_kept_entries_and_tail_is_one_at_every_declared_temperature() -> None:
    logits_NC = np.random.default_rng(1).normal(size=(20, 50)).astype(np.float32) * 4
    found = on_device(logits_NC, TopK(5, "float32"))
    for column, temperature in enumerate(TEMPERATURES):
        kept = np.exp(found["values"].astype(np.float64) / temperature - found["lse"][:, column, None]).sum(1)
        np.testing.assert_allclose(kept + np.exp(found["log_tail"][:, column]), 1, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", [Dense(), Dense("uint8"), TopK(1), TopK(50), TopK(1000, "float32")])
def test_cuda_meets_the_reference(encoding: Encoding) -> None:
    generator = np.random.default_rng(2)
    logits_NC = generator.normal(size=(300, 1000)).astype(np.float32) * 5
    logits_NC[::3] = np.round(logits_NC[::3])  # ties
    logits_NC[1::3, 900:] = -np.inf
    assert_meets_reference(on_device(logits_NC, encoding, "cuda"), logits_NC, encoding)


@given(logits_NC=logits(), draws=st.integers(1, 255), temperature=st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=100)
def test_draws_equal_the_reference(logits_NC: Array, draws: int, temperature: float) -> None:
    encoding, uniform_N = Sample(draws, seed=5), uniforms(5, np.arange(len(logits_NC)))
    rows = TeacherRows(torch.from_numpy(logits_NC), uniform_N=torch.from_numpy(uniform_N))
    found = copy_to_host(build_sparsify(encoding, (temperature,))(rows)).wait()
    expected = encoding.encode(logits_NC, (temperature,), uniform_N=uniform_N)
    assert set(found) == {*expected, REFUSAL}
    for name in ("ids", "counts"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_draws_are_the_same_whatever_rows_go_with_them() -> None:
    logits_NC = np.random.default_rng(6).normal(size=(64, 300)).astype(np.float32) * 4
    uniform_N = uniforms(1, np.arange(64))
    sparsify = build_sparsify(Sample(40, seed=1), (1.0,))

    def drawn(start: int, stop: int) -> dict[str, Array]:
        rows = TeacherRows(torch.from_numpy(logits_NC[start:stop]), uniform_N=torch.from_numpy(uniform_N[start:stop]))
        return copy_to_host(sparsify(rows)).wait()

    whole, parts = drawn(0, 64), [drawn(0, 1), drawn(1, 30), drawn(30, 64)]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("values", ["float16", "float32"])
def test_hidden_states_are_kept_as_they_come_beside_the_statistics_of_the_logits(values: str) -> None:
    generator = np.random.default_rng(7)
    logits_NC = generator.normal(size=(5, 9)).astype(np.float32)
    hidden_NW = generator.normal(size=(5, 4)).astype(np.float32)
    encoding = Hidden(4, values)  # type: ignore[arg-type]
    rows = TeacherRows(torch.from_numpy(logits_NC), hidden_NW=torch.from_numpy(hidden_NW))
    found = copy_to_host(build_sparsify(encoding, (1.0, 2.0))(rows)).wait()
    expected = encoding.encode(logits_NC, (1.0, 2.0), hidden_NW=hidden_NW)
    np.testing.assert_array_equal(found["hidden"], expected["hidden"])
    np.testing.assert_allclose(found["lse"], expected["lse"], rtol=5e-7)


def test_a_hidden_state_that_float16_does_not_hold_is_refused() -> None:
    hidden_NW = torch.tensor([[1.0, 2.0], [1e6, 0.0]])
    rows = TeacherRows(torch.zeros(2, 3), hidden_NW=hidden_NW)
    assert build_sparsify(Hidden(2), (1.0,))(rows)[REFUSAL].tolist() == [0, HIDDEN_NOT_FINITE]
    assert build_sparsify(Hidden(2, "float32"), (1.0,))(rows)[REFUSAL].tolist() == [0, 0]


@pytest.mark.parametrize("k", [1, 7, 64])
def test_tails_hold_to_a_thousandth_down_to_a_mass_of_1e_7(k: int) -> None:
    generator = np.random.default_rng(8)
    logits_NC = generator.normal(size=(32, 1000)).astype(np.float32)
    # the rest of row r has a mass of about 10^-(r / 4)
    top = np.sort(logits_NC, axis=1)[:, -k:].mean(axis=1, keepdims=True)
    boost = top + np.linspace(0, 18, 32)[:, None].astype(np.float32)
    np.put_along_axis(logits_NC, np.argsort(-logits_NC, axis=1)[:, :k], boost.astype(np.float32), axis=1)
    found = on_device(logits_NC, TopK(k))
    expected = TopK(k).encode(logits_NC, TEMPERATURES)
    column = TEMPERATURES.index(1.0)
    assert np.exp(expected["log_tail"][:, column].min()) < 1e-5
    np.testing.assert_allclose(np.exp(found["log_tail"]), np.exp(expected["log_tail"]), rtol=1e-3)


def test_a_tail_too_small_for_the_sum_of_float32_exponentials_is_still_exact() -> None:
    logits_NC = np.array([[0.0, -150.0, -151.0, -400.0]], np.float32)
    found = on_device(logits_NC, TopK(1))
    expected = TopK(1).encode(logits_NC, TEMPERATURES)
    np.testing.assert_allclose(found["log_tail"], expected["log_tail"], rtol=1e-6)
