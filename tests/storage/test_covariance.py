"""`covariance`: mean and covariance of a store's distributions are those of a plain computation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.arrays import Array
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import systematic_counts
from storage.errors import DamageError, MismatchError, NotSealedError, StoreError
from storage.manifest import Manifest
from storage.reader import open_store
from storage.scan import copy
from storage.scan import covariance as module
from storage.scan.covariance import Covariance, covariance, covariance_bytes, free_memory
from tests.s3 import S3Server
from tests.series import write_series
from tests.storage.scan_stores import BLURRED, BROKEN, hard_targets_of, logits_of, manifest_of, write_store
from tests.storage.soft_targets import hidden_encoding, num_positions_of, sequences_of

ROWS = [row for row in range(22) if row not in (BLURRED, BROKEN)]


def probs_of(manifest: Manifest) -> Array:
    """What the teacher says at T = 1 in the rows with targets, of sequences where there is a target, float64 (R, C)."""
    logits_RC = logits_of(manifest).astype(np.float64)
    exps_RC = np.exp(logits_RC - logits_RC.max(axis=1, keepdims=True))
    probs_RC: Array = (exps_RC / exps_RC.sum(axis=1, keepdims=True))[is_counted(manifest)]
    return probs_RC


def is_counted(manifest: Manifest) -> Array:
    """Which distributions are counted."""
    rows = np.delete(np.arange(manifest.num_rows), [BLURRED, BROKEN])
    row_R: Array = np.repeat(np.isin(np.arange(manifest.num_rows), rows), num_positions_of(manifest))
    return row_R if manifest.sequences is None else row_R & (hard_targets_of(manifest) >= 0)


def kept_of(probs_RC: Array, k: int) -> Array:
    """The k largest of each row; 0 in the place of others."""
    least_R = np.sort(probs_RC, axis=1)[:, -k, None]
    kept_RC: Array = np.where(probs_RC >= least_R, probs_RC, 0)
    return kept_RC


def measured(path: str | Path, **options: Any) -> Covariance:
    with open_store(path) as store:
        return covariance(store, **options)


@pytest.mark.parametrize(
    ("encoding", "sequences", "suffix"),
    [
        (Dense("float32"), None, ".zarr"),
        (Dense("float16"), None, ".h5"),
        (Dense("uint8"), sequences_of(), ".zarr"),
        (hidden_encoding(5), None, ".zarr"),
        (hidden_encoding(5), sequences_of(), ".zarr"),
        (TopK(2, "float32"), sequences_of(), ".zarr"),
        (TopK(2, "float32"), None, ".zarr"),
        (TopK(5), None, ".h5"),
    ],
)
def test_it_is_that_of_a_plain_computation(tmp_path: Path, encoding: Encoding, sequences: Any, suffix: str) -> None:
    manifest = manifest_of(encoding=encoding, sequences=sequences)
    counted: list[int] = []
    found = measured(write_store(tmp_path / f"a{suffix}", manifest), progress=counted.append)
    probs_RC = probs_of(manifest)
    bound = {"float32": 3e-6, "float16": 1e-3, "uint8": 1e-2}[getattr(encoding, "values", "float32")]
    if isinstance(encoding, TopK):
        kept_RC = kept_of(probs_RC, encoding.k)
        assert found.mean_tail == pytest.approx((probs_RC - kept_RC).sum(axis=1).mean(), abs=bound)
        probs_RC = kept_RC
    else:
        assert found.mean_tail == 0
    assert found.num_distributions == len(probs_RC)
    assert sum(counted) == 22
    np.testing.assert_allclose(found.mean_C, probs_RC.mean(axis=0), atol=bound)
    np.testing.assert_allclose(found.covariance_CC, np.cov(probs_RC.T, bias=True), atol=bound)
    assert np.array_equal(found.covariance_CC, found.covariance_CC.T)
    assert found.biased_within == 0


def test_classes_count_by_hard_targets_and_by_the_top1_where_there_is_none(tmp_path: Path) -> None:
    manifest = manifest_of()
    found = measured(write_store(tmp_path / "a.zarr", manifest))
    target_N, top1_N = hard_targets_of(manifest)[ROWS], logits_of(manifest)[ROWS].argmax(axis=1)
    expected_N = np.where(target_N < 0, top1_N, target_N)
    assert (target_N < 0).any()
    np.testing.assert_array_equal(found.class_counts_C, np.bincount(expected_N, minlength=5))
    assert found.num_by_target == int((target_N >= 0).sum())


@pytest.mark.parametrize("encoding", [Dense(), TopK(3), Sample(9), hidden_encoding(5)])
def test_without_hard_targets_classes_count_by_the_top1(tmp_path: Path, encoding: Encoding) -> None:
    manifest = manifest_of(encoding=encoding, has_hard_targets=False)
    found = measured(write_store(tmp_path / "a.zarr", manifest))
    assert (found.num_by_target, int(found.class_counts_C.sum())) == (0, len(ROWS))
    if not isinstance(encoding, Sample):
        top1_N = logits_of(manifest)[ROWS].argmax(axis=1)
        np.testing.assert_array_equal(found.class_counts_C, np.bincount(top1_N, minlength=5))


@pytest.mark.parametrize("encoding", [TopK(3, "float32"), Sample(4)])
def test_pairs_of_kept_entries_add_up_to_what_a_product_with_zeros_says(
    tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(num_rows=40, num_classes=300, encoding=encoding)
    path = write_store(tmp_path / "a.zarr", manifest)
    pairs = measured(path)
    monkeypatch.setattr(module, "PAIR_CLASSES", 1000)
    spread = measured(path)
    np.testing.assert_allclose(pairs.covariance_CC, spread.covariance_CC, atol=1e-7)
    np.testing.assert_allclose(pairs.mean_C, spread.mean_C, atol=1e-7)


def test_the_mean_of_draws_is_unbiased_and_their_covariance_within_its_bound(tmp_path: Path) -> None:
    draws, num_classes = 6, 5
    probs_C = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
    uniform_N = (np.arange(20_000) + 0.5) / 20_000
    counts_NC = systematic_counts(np.log(probs_C)[None].repeat(20_000, axis=0), 1.0, uniform_N, draws)
    shares_NC = counts_NC / draws
    np.testing.assert_allclose(shares_NC.mean(axis=0), probs_C, atol=1e-3)
    off_CC = np.abs(shares_NC.T @ shares_NC / 20_000 - np.outer(probs_C, probs_C))
    manifest = manifest_of(num_classes=num_classes, encoding=Sample(draws))
    bound = measured(write_store(tmp_path / "a.zarr", manifest)).biased_within
    assert bound == 1 / 144
    assert 0.2 * bound < off_CC.max() <= bound + 1e-4


def test_the_matrix_is_cut_into_tiles_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(num_rows=60, num_classes=50, encoding=Dense("float32"))
    path = write_store(tmp_path / "a.zarr", manifest)
    whole = measured(path)
    monkeypatch.setattr(module, "TILE", 7)
    np.testing.assert_allclose(measured(path).covariance_CC, whole.covariance_CC, atol=1e-7)


def test_a_class_that_is_nearly_always_likely_loses_nothing(tmp_path: Path) -> None:
    """What varies by 1e-4 around 0.99 has a variance of 1e-8, which float32 sums of squares would drown."""
    manifest = manifest_of(num_rows=4000, num_classes=3, encoding=Dense("float32"), shard_rows=1000, chunk_rows=500)
    logits_NC = np.zeros((4000, 3), np.float32)
    logits_NC[:, 0] = 5.3 + 0.01 * np.random.default_rng(0).standard_normal(4000)
    probs_NC = np.exp(logits_NC.astype(np.float64))
    probs_NC /= probs_NC.sum(axis=1, keepdims=True)
    moments = module._Moments(manifest, "here")
    for first in range(0, 4000, 1000):
        part = probs_NC[first : first + 1000].astype(np.float32)
        moments.add(module._Part(1000, part, None, 0.0, np.zeros(1000, np.int64), 0))
    np.testing.assert_allclose(moments.result().covariance_CC, np.cov(probs_NC.T, bias=True), rtol=1e-3)


def test_a_second_pass_and_other_threads_say_the_same_to_the_last_bit(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(num_rows=100, num_classes=9))
    one, two = measured(path, num_workers=1), measured(path, num_workers=4)
    assert np.array_equal(one.covariance_CC, two.covariance_CC)
    assert np.array_equal(one.mean_C, two.mean_C)


def test_an_unfinished_store_gives_what_is_sealed(tmp_path: Path) -> None:
    manifest = manifest_of()
    found = measured(write_store(tmp_path / "a.zarr", manifest, shards=2, finalize=False))
    assert found.num_distributions == 16 - 2


def test_a_series_is_one_store(tmp_path: Path) -> None:
    found = measured(write_series(tmp_path / "series", (16, 24)))
    assert found.num_distributions == 40
    assert found.mean_C.sum() == pytest.approx(1, abs=1e-5)


def test_a_store_at_a_url_says_what_the_one_on_the_disk_says(tmp_path: Path, s3: S3Server) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(num_rows=60))
    url = s3.url("a.zarr")
    copy(path, url)
    assert np.array_equal(measured(url).covariance_CC, measured(path).covariance_CC)


def test_nothing_sealed_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=0, finalize=False)
    with pytest.raises(NotSealedError, match="expected rows with targets, got none that is sealed; resume the dump"):
        measured(path)


@pytest.mark.parametrize("encoding", [TopK(2), Sample(4)])
def test_kept_entries_at_other_temperatures_are_refused(tmp_path: Path, encoding: Encoding) -> None:
    manifest = manifest_of(encoding=encoding, temperatures=(4.0,))
    path = write_store(tmp_path / "a.zarr", manifest)
    with pytest.raises(MismatchError, match=r"expected \w+ targets that declare T = 1, .*got T = 4; take a dense"):
        measured(path)


def test_too_little_memory_is_refused_before_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    with pytest.raises(StoreError, match=r"expected .* of free memory for the covariance of 5 classes, got 1 kB; run"):
        measured(path)
    monkeypatch.setattr(module, "free_memory", lambda: None)
    assert measured(path).num_distributions == len(ROWS)


def test_the_memory_of_many_classes_is_stated() -> None:
    manifest = manifest_of(num_rows=10_000, num_classes=20_000, shard_rows=2048, chunk_rows=64)
    assert 4.8e9 < covariance_bytes(manifest, 2) < 5.3e9
    topk = manifest_of(num_rows=10_000, num_classes=20_000, encoding=TopK(50), shard_rows=2048, chunk_rows=64)
    assert 4.8e9 < covariance_bytes(topk, 2) < 5e9
    free = free_memory()
    assert free is None or free > 0


def test_a_row_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(encoding=TopK(2))
    path = write_store(tmp_path / "a.zarr", manifest)
    load = module._probabilities

    def hostile(*given: Any) -> tuple[Array, Array | None, float]:
        probs_RK, ids_RK, tail = load(*given)
        assert ids_RK is not None
        return probs_RK, ids_RK + 4, tail

    monkeypatch.setattr(module, "_probabilities", hostile)
    with pytest.raises(DamageError, match="expected classes below 5, got"):
        measured(path)
    moments = module._Moments(manifest, "here")
    moments.add(module._Part(1, np.full((1, 5), np.nan, np.float32), None, 0.0, np.zeros(1, np.int64), 0))
    with pytest.raises(DamageError, match="here: expected probabilities in every row with targets, got others"):
        moments.result()


def test_the_pass_takes_hidden_states_of_more_rows_than_a_batch(tmp_path: Path) -> None:
    encoding = hidden_encoding(40, width=6)
    assert isinstance(encoding, Hidden)
    manifest = manifest_of(num_rows=1300, num_classes=40, encoding=encoding, shard_rows=1300, chunk_rows=1300)
    found = measured(write_store(tmp_path / "a.zarr", manifest))
    np.testing.assert_allclose(found.covariance_CC, np.cov(probs_of(manifest).T, bias=True), atol=3e-3)
