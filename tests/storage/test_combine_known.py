"""What topk and sample stores know together: every bound holds, and where it is 0 the ensemble itself is stored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.arrays import Array
from storage.encodings import Sample, TopK
from storage.encodings.sample import uniforms
from storage.encodings.statistics import entropy, logsumexp
from storage.scan.ensemble import Known, joined_draws, known_entries, mean_logits

ROUNDING = 1e-6  # of stored float32 values, as a probability


def mean_of(logits_MRC: Array) -> Array:
    """The mean of the members' probabilities (R, C)."""
    logprobs = [logits_RC.astype(np.float64) - logsumexp(logits_RC)[:, None] for logits_RC in logits_MRC]
    mean_RC: Array = np.exp(logprobs).mean(axis=0)
    return mean_RC


def known_of(logits_MRC: Array, ks: list[int]) -> Known:
    parts = [
        TopK(k, "float32").encode(logits_RC.astype(np.float32), (1.0,))
        for k, logits_RC in zip(ks, logits_MRC, strict=True)
    ]
    return known_entries(parts, [0] * len(ks), logits_MRC.shape[2])


@st.composite
def members(draw: st.DrawFn) -> tuple[Array, list[int]]:
    num_members, num_classes = draw(st.integers(2, 4)), draw(st.integers(2, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shared, own = draw(st.sampled_from([0.0, 1.0, 6.0])), draw(st.sampled_from([0.0, 0.3, 2.0, 8.0]))
    logits_MRC = shared * generator.normal(size=(1, 9, num_classes))
    logits_MRC = logits_MRC + own * generator.normal(size=(num_members, 9, num_classes))
    if draw(st.booleans()):
        logits_MRC = np.round(logits_MRC)  # ties
    return logits_MRC.astype(np.float32), [draw(st.integers(1, num_classes)) for _ in range(num_members)]


@settings(max_examples=40, deadline=None)
@given(members())
def test_every_probability_and_entropy_is_where_the_bounds_say(given_members: tuple[Array, list[int]]) -> None:
    logits_MRC, ks = given_members
    known, mean_RC = known_of(logits_MRC, ks), mean_of(logits_MRC)
    is_entry_RE = known.probs_RE >= 0
    true_RE = np.take_along_axis(mean_RC, known.ids_RE, axis=1)
    assert (known.probs_RE <= true_RE + ROUNDING)[is_entry_RE].all()
    assert (true_RE <= known.probs_RE + known.unknown_RE + ROUNDING)[is_entry_RE].all()
    total_R = np.where(is_entry_RE, known.probs_RE, 0).sum(axis=1) + known.tail_R
    np.testing.assert_allclose(total_R, 1, atol=ROUNDING)
    for row, ids_E in enumerate(known.ids_RE):
        unseen_C = np.setdiff1d(np.arange(mean_RC.shape[1]), ids_E)
        assert mean_RC[row, unseen_C].max(initial=0) <= known.unseen_R[row] + ROUNDING
    true_R = np.where(mean_RC > 0, -mean_RC * np.log(np.maximum(mean_RC, 1e-300)), 0).sum(axis=1)
    assert (np.abs(known.entropy_R - true_R) <= known.entropy_within_R + 1e-5).all()


@settings(max_examples=40, deadline=None)
@given(members())
def test_no_row_is_further_off_than_it_says_and_one_that_is_not_is_the_ensembles_own(
    given_members: tuple[Array, list[int]],
) -> None:
    logits_MRC, ks = given_members
    known, mean_RC = known_of(logits_MRC, ks), mean_of(logits_MRC)
    num_classes = mean_RC.shape[1]
    off_RK = known.off_by(min(ks))
    for k in range(1, min(ks) + 1):
        stored = known.arrays(k, "float32", num_classes)
        direct = TopK(k, "float32").encode(mean_logits_of(logits_MRC), (1.0,))
        kept_RK = np.take_along_axis(mean_RC, stored["ids"].astype(np.int64), axis=1)
        said_RK = np.exp(stored["values"].astype(np.float64) - stored["lse"])
        off_R = off_RK[:, k - 1]
        assert (np.abs(said_RK - kept_RK).max(axis=1) <= off_R + ROUNDING).all()
        others_RC = mean_RC.copy()
        np.put_along_axis(others_RC, stored["ids"].astype(np.int64), 0, axis=1)
        assert (others_RC.max(axis=1) - said_RK[:, -1] <= off_R + ROUNDING).all()
        exact = off_R == 0
        # what is equal but for rounding may stand in either order
        np.testing.assert_allclose(
            said_RK[exact], np.exp(direct["values"].astype(np.float64) - direct["lse"])[exact], atol=ROUNDING
        )
        np.testing.assert_allclose(stored["max_logit"][exact], direct["max_logit"][exact], atol=1e-5)
        np.testing.assert_allclose(np.exp(stored["log_tail"][exact]), np.exp(direct["log_tail"][exact]), atol=ROUNDING)


def mean_logits_of(logits_MRC: Array) -> Array:
    with np.errstate(divide="ignore"):
        logits_RC: Array = np.log(mean_of(logits_MRC)).astype(np.float32)
    return logits_RC


def test_stores_that_keep_all_classes_know_all() -> None:
    logits_MRC = np.random.default_rng(0).normal(size=(3, 20, 6)).astype(np.float32)
    known = known_of(logits_MRC, [6, 6, 6])
    assert (known.off_by(6) == 0).all()
    assert known.entropy_within_R.max() < 1e-9
    np.testing.assert_allclose(known.entropy_R, entropy(mean_logits_of(logits_MRC)).astype(float), atol=2e-3)


def test_equal_teachers_know_as_much_together_as_one_alone() -> None:
    logits_RC = np.random.default_rng(0).normal(0, 2, (20, 30)).astype(np.float32)
    known = known_of(np.stack([logits_RC, logits_RC]), [5, 5])
    assert (known.off_by(5) == 0).all()
    np.testing.assert_array_equal(known.arrays(5, "float32", 30)["ids"], TopK(5).encode(logits_RC, (1.0,))["ids"])


def test_teachers_that_keep_nothing_in_common_are_off_by_what_the_other_might_add() -> None:
    first_C, second_C = np.log([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.3, 0.5]]).astype(np.float32)
    known = known_of(np.stack([first_C, second_C])[:, None], [1, 1])
    assert known.ids_RE.tolist() == [[0, 3]]
    np.testing.assert_allclose(known.probs_RE, [[0.25, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(known.unknown_RE, [[0.25, 0.25]], rtol=1e-6)  # it may be the other's second best, too
    np.testing.assert_allclose(known.unseen_R, [0.5], rtol=1e-6)
    np.testing.assert_allclose(known.off_by(1), [[0.25]], rtol=1e-6)


def test_classes_without_probability_are_kept_as_such() -> None:
    logits_MRC = np.array([[[0.0, -np.inf, -np.inf]], [[0.0, -np.inf, -np.inf]]], np.float32)
    known = known_of(logits_MRC, [2, 3])
    stored = known.arrays(2, "float32", 3)
    assert stored["values"].tolist() == [[0, -np.inf]]
    assert stored["log_tail"].tolist() == [[-np.inf]]
    assert known.off_by(2).tolist() == [[0, 0]]


@pytest.mark.parametrize("draws", [1, 7, 50])
@pytest.mark.parametrize("num_classes", [3, 40])
def test_draws_add_up_and_their_statistics_are_where_the_bounds_say(draws: int, num_classes: int) -> None:
    logits_MRC = np.random.default_rng(draws).normal(0, 2, (3, 50, num_classes)).astype(np.float32)
    parts = [
        Sample(draws, seed).encode(logits_RC, (1.0,), uniform_N=uniforms(seed, np.arange(50)))
        for seed, logits_RC in enumerate(logits_MRC)
    ]
    total = Sample(3 * draws)
    joined = joined_draws(parts, draws, num_classes, total.num_places(num_classes))
    counts_RC = np.zeros((50, num_classes), np.int64)
    for part in parts:
        np.add.at(counts_RC, (np.arange(50)[:, None], part["ids"].astype(int)), part["counts"].astype(int))
    found_RC = np.zeros_like(counts_RC)
    for row, (ids_D, counts_D) in enumerate(zip(joined["ids"], joined["counts"], strict=True)):
        there = counts_D > 0
        assert (np.diff(ids_D[there].astype(int)) > 0).all()
        assert (ids_D[~there] == 0).all()
        assert not there[int(there.sum()) :].any()
        found_RC[row, ids_D[there]] = counts_D[there]
    np.testing.assert_array_equal(found_RC, counts_RC)
    mean_RC = mean_of(logits_MRC)
    assert (np.abs(found_RC / (3 * draws) - mean_RC) < 1 / draws).all()
    half = np.log(3) / 2
    assert (np.abs(joined["max_logit"] - np.log(mean_RC.max(axis=1))) <= half + 1e-5).all()
    np.testing.assert_allclose(joined["max_logit"], -joined["lse"][:, 0])
    true_R = -(mean_RC * np.log(mean_RC)).sum(axis=1)
    assert (np.abs(joined["entropy"] - true_R) <= half + 2e-3).all()


def test_draws_of_the_mean_are_unbiased() -> None:
    logits_MRC = np.random.default_rng(3).normal(0, 1, (2, 1, 5)).astype(np.float32)
    many = np.repeat(logits_MRC, 2000, axis=1)
    parts = [
        Sample(4, seed).encode(logits_RC, (1.0,), uniform_N=uniforms(seed, np.arange(2000)))
        for seed, logits_RC in enumerate(many)
    ]
    joined = joined_draws(parts, 4, 5, 5)
    share_C = np.zeros(5)
    np.add.at(share_C, joined["ids"].astype(int), joined["counts"] / 8)
    np.testing.assert_allclose(share_C / 2000, mean_of(logits_MRC)[0], atol=0.01)


def test_mean_logits_leave_no_class_that_each_member_excludes_in_turn() -> None:
    values = np.array([[0.0, -np.inf]], np.float32), np.array([[-np.inf, 0.0]], np.float32)
    parts = [{"values": it, "max_logit": np.zeros(1, np.float32)} for it in values]
    assert mean_logits(parts, "mean-logits").tolist() == [[-np.inf, -np.inf]]
    np.testing.assert_allclose(mean_logits(parts, "mean-probs"), [[np.log(0.5)] * 2])
