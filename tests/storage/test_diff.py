"""`diff`: two stores that say the same are found the same, and of two others each difference is named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from storage.arrays import Array
from storage.cli import main
from storage.encodings import Dense, Encoding, Hidden, TopK
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.reader import open_store
from storage.scan import DiffResult, convert, diff, difference
from storage.scan.difference_plan import common_arrays
from storage.scan.difference_rows import ArrayDifference
from tests.series import write_series
from tests.storage.members import Make, draws_with, maker, read_all, says, write_member
from tests.storage.scan_stores import manifest_of, write_store
from tests.storage.soft_targets import hidden_encoding, sequences_of


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("stores"))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def of_array(result: DiffResult, name: str) -> ArrayDifference:
    return next(array for array in result.arrays if array.name == name)


def probs(seed: int, temperature: float = 1.0, **fields: Any) -> Array:
    logits = says(manifest_of(**fields), seed).astype(np.float64) / temperature
    total: Array = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return total


# What is the same


@pytest.mark.parametrize("encoding", [Dense("float16"), Dense("uint8"), TopK(3), draws_with(1), hidden_encoding(5)])
def test_a_store_that_is_packed_otherwise_says_the_same(tmp_path: Path, encoding: Encoding) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=encoding))
    convert(source, tmp_path / "b.h5", "zstd")
    result = diff(source, tmp_path / "b.h5")
    assert result.same
    assert result.content_digests[0] == result.content_digests[1] is not None
    assert [field.name for field in result.packing] == ["compressor"]
    assert [field.name for field in result.provenance] == ["provenance.converted_from"]
    assert result.num_rows == 22
    assert result.rows.num_compared == result.rows.num_top1_agreed == 20
    assert run("diff", source, tmp_path / "b.h5").exit_code == 0


@pytest.mark.parametrize("encoding", [Dense("float32"), TopK(3), draws_with(1)])
def test_what_is_found_by_seals_alone_equals_what_is_found_row_by_row(
    make: Make, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequences in (None, sequences_of()):
        one = make(1, encoding, not_finite=(3,), sequences=sequences)
        logits = says(manifest_of(encoding=encoding, sequences=sequences), 1)
        logits[-3:] += np.arange(5, dtype=np.float32)  # in the last row: the shards before are the same
        two = make(1, encoding, not_finite=(3,), sequences=sequences, logits=logits)
        quick = (diff(one, one), diff(one, two))
        with monkeypatch.context() as patch:
            patch.setattr(difference, "_is_sealed_alike", lambda *_: False)
            assert (diff(one, one), diff(one, two)) == quick
        assert quick[0].same
        assert not quick[1].same


def test_a_store_that_is_cut_into_other_shards_says_the_same_of_each_row(make: Make) -> None:
    result = diff(make(1, Dense()), make(1, Dense(), shard_rows=6, chunk_rows=3))
    assert result.same
    assert [field.name for field in result.packing] == ["shard_rows", "chunk_rows"]
    assert result.content_digests[0] != result.content_digests[1]


def test_stores_that_are_not_finalized_are_compared_as_far_as_they_are(make: Make) -> None:
    begun = make(1, Dense(), finalize=False, shards=(0, 2))
    assert diff(begun, make(1, Dense(), finalize=False, shards=(0, 2), provenance={})).same
    result = diff(begun, make(1, Dense()))
    assert (result.same, result.only_first, result.only_second) == (False, (), ((8, 16),))
    assert result.num_rows == 14
    assert result.content_digests[0] is None
    other = diff(make(1, Dense(), finalize=False, shards=(1,)), begun)
    assert (other.num_rows, other.only_first, other.only_second) == (0, ((8, 16),), ((0, 8), (16, 22)))
    assert other.rows.num_compared == 0
    assert run("diff", begun, make(1, Dense(), finalize=False, shards=(1,))).exit_code == 1


def test_a_series_and_its_copy_say_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_series(tmp_path / name / "series", [16, 8])
    assert diff(tmp_path / "one" / "series", tmp_path / "two" / "series").same


# What differs


def test_other_numbers_are_counted_and_measured(make: Make) -> None:
    result = diff(make(1, Dense("float32")), make(2, Dense("float32")))
    one, two = read_all(make(1, Dense("float32"))), read_all(make(2, Dense("float32")))
    assert not result.same
    assert [field.name for field in result.identity] == ["teacher.digest"]
    off = np.abs(one["values"].astype(float) - two["values"])
    found = of_array(result, "values")
    assert (found.num_rows, found.first_row, found.num_not_finite) == (22, 0, 0)
    assert found.max_abs == pytest.approx(off.max())
    assert found.mean_abs == pytest.approx(off.mean())
    same = of_array(result, "sample_digest")
    assert (same.num_rows, same.first_row, same.max_abs, same.mean_abs) == (0, None, None, None)
    p, q = probs(1), probs(2)
    kl_N = (p * np.log(p / q)).sum(axis=1)
    assert result.rows.divergence is not None
    assert result.rows.divergence.mean == pytest.approx(kl_N.mean(), abs=1e-5)
    assert result.rows.divergence.max == pytest.approx(kl_N.max(), abs=1e-5)
    assert result.rows.divergence.max_row == kl_N.argmax()
    assert result.rows.num_top1_agreed == (p.argmax(axis=1) == q.argmax(axis=1)).sum()
    assert result.rows.num_differing == 22
    hot = diff(make(1, Dense("float32")), make(2, Dense("float32")), temperature=3).rows.divergence
    p, q = probs(1, 3), probs(2, 3)
    assert hot is not None
    assert hot.mean == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), abs=1e-5)


def test_other_samples_and_statuses_are_named_and_their_rows_not_measured(make: Make) -> None:
    one = make(1, Dense("float32"), undecodable=(3,))
    two = make(1, Dense("float32"), other_samples=(5, 9), not_finite=(9, 13), other_targets=(20,))
    result = diff(one, two)
    rows = result.rows
    assert (rows.num_other_samples, rows.first_other_sample) == (2, 5)
    assert (rows.num_other_status, rows.first_other_status) == (3, 3)
    assert (rows.num_differing, rows.first_differing) == (5, 3)
    assert rows.num_compared == rows.num_top1_agreed == 18
    assert (of_array(result, "hard_target").num_rows, of_array(result, "hard_target").first_row) == (1, 20)
    assert of_array(result, "values").max_abs == 0
    text = run("diff", one, two).stdout
    assert "5 differ (row 3 first), 2 of another sample (row 5 first), 3 of another status (row 3 first)" in text
    assert "sample_digest        differs in 2 rows (row 5 first)\n" in text


def test_a_number_that_is_not_finite_in_one_store_alone_is_counted_apart(make: Make) -> None:
    logits = says(manifest_of(), 1)
    logits[7, 2] = -np.inf
    result = diff(make(1, Dense("float32"), logits=logits), make(1, Dense("float32")))
    values = of_array(result, "values")
    assert values.num_not_finite == 1
    assert values.max_abs is not None
    assert math.isfinite(values.max_abs)
    back = diff(make(1, Dense("float32")), make(1, Dense("float32"), logits=logits))
    assert back.rows.divergence is not None
    assert back.rows.divergence.num_infinite == 1
    json.dumps(back.to_json(), allow_nan=False)


def test_zeros_of_another_sign_are_a_difference_since_the_digests_differ(make: Make) -> None:
    logits = np.zeros((22, 5), np.float32)
    one, two = (make(seed, Dense("float32"), logits=logits, provenance={}) for seed in (1, 1))
    assert diff(one, two).same
    minus = make(1, Dense("float32"), logits=np.copysign(logits, -1))
    assert diff(one, minus).same == (open_store(one).content_digest == open_store(minus).content_digest)


# Other encodings


def test_dense_stores_of_other_types_are_compared_by_what_they_stand_for(make: Make) -> None:
    for values, most in (("float16", 0.01), ("uint8", 0.05)):
        result = diff(make(1, Dense("float32")), make(1, Dense(values)))  # type: ignore[arg-type]
        found = of_array(result, "values")
        assert found.max_abs is not None
        assert 0 < found.max_abs < most
        assert [field.name for field in result.identity] == ["encoding.values"]
        assert result.rows.divergence is not None
        assert result.rows.divergence.max is not None
        assert 0 < result.rows.divergence.max < 1e-3
    assert result.only_in_second == ("value_range",)


def test_hidden_states_are_compared_with_what_their_head_makes_of_them(tmp_path: Path) -> None:
    hidden = write_store(tmp_path / "h.zarr", manifest_of(encoding=hidden_encoding(5)))
    manifest = manifest_of(encoding=hidden_encoding(5))
    same = diff(hidden, write_store(tmp_path / "g.zarr", manifest))
    assert same.same
    with open_store(hidden) as store:
        head, arrays = store.head(), store.read(["hidden"], 0, 22)
    assert head is not None
    assert isinstance(manifest.encoding, Hidden)
    logits = np.nan_to_num(manifest.encoding.logits(arrays, head))
    dense = write_member(tmp_path / "d.zarr", 1, Dense("float32"), logits=logits, undecodable=(3, 13))
    result = diff(hidden, dense)
    assert result.rows.divergence is not None
    assert result.rows.num_compared == 0  # the samples of the two have other digests
    with open_store(hidden) as one, open_store(dense) as two:
        plan = common_arrays(one, two, None)
    assert (plan.kind, plan.only_first, plan.only_second) == ("full", ("hidden",), ("values",))


def test_topk_stores_diverge_over_what_both_keep_and_the_rest(make: Make) -> None:
    fields = {"num_classes": 12}
    one, two = make(1, TopK(4, "float32"), **fields), make(2, TopK(6, "float32"), **fields)
    result = diff(one, two)
    p, q = probs(1, **fields), probs(2, **fields)
    expected = np.zeros(22)
    ids = read_all(one)["ids"], read_all(two)["ids"]
    for row in range(22):
        both = np.intersect1d(ids[0][row], ids[1][row])
        first, second = np.append(p[row, both], 1 - p[row, both].sum()), np.append(q[row, both], 1 - q[row, both].sum())
        expected[row] = (first * np.log(first / second)).sum()
    found = result.rows.divergence
    assert found is not None
    assert found.mean == pytest.approx(expected.mean(), abs=1e-5)
    assert found.max_row == expected.argmax()
    assert (expected <= (p * np.log(p / q)).sum(axis=1) + 1e-9).all()
    assert found.over.endswith("a lower bound")
    assert of_array(result, "ids").num_rows == sum((ids[0][row] != ids[1][row, :4]).any() for row in range(22))


def test_a_topk_store_diverges_from_the_dense_one_that_it_is_of_by_rounding_alone(make: Make) -> None:
    for one, two in ((Dense("float32"), TopK(3, "float32")), (TopK(3, "float32"), Dense("float32"))):
        result = diff(make(1, one), make(1, two))
        assert result.rows.divergence is not None
        assert result.rows.divergence.max is not None
        assert result.rows.divergence.max < 1e-6
        assert result.rows.num_top1_agreed == 22
        assert of_array(result, "lse").num_rows == of_array(result, "max_logit").num_rows == 0
        with pytest.raises(MismatchError, match=r"\.zarr: temperature: expected one that the store declares .*got 3"):
            diff(make(1, one), make(1, two), temperature=3)


def test_draws_are_compared_by_what_came_up_most_and_have_no_divergence(make: Make) -> None:
    result = diff(make(1, draws_with(1)), make(1, draws_with(2)))
    assert result.rows.divergence is None
    assert result.rows.num_top1_agreed >= 20
    assert of_array(result, "counts").num_rows > 0
    assert of_array(result, "lse").num_rows == 0
    with pytest.raises(
        ValueError, match="temperature: expected none with sample and sample stores, which have no diver"
    ):
        diff(make(1, draws_with(1)), make(1, draws_with(2)), temperature=1)
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        diff(make(1, Dense()), make(1, Dense()), temperature=-1)


def test_statistics_are_compared_at_the_temperatures_of_both(make: Make) -> None:
    result = diff(make(1, Dense()), make(1, Dense(), temperatures=(2.0, 4.0)))
    assert [field.name for field in result.identity] == ["temperatures"]
    lse = of_array(result, "lse")
    assert (lse.num_rows, lse.max_abs) == (0, 0)
    apart = diff(make(1, TopK(2)), make(1, TopK(2), temperatures=(2.0,)))
    assert apart.only_in_first == apart.only_in_second == ("log_tail", "lse")
    assert apart.rows.divergence is None
    hot = diff(make(1, TopK(2), temperatures=(2.0,)), make(2, TopK(2), temperatures=(2.0, 3.0)))
    assert hot.rows.divergence is not None
    assert hot.rows.divergence.temperature == 2


def test_sequences_are_compared_position_by_position(make: Make) -> None:
    one, two = (make(seed, Dense("float32"), sequences=sequences_of()) for seed in (1, 2))
    result = diff(one, two)
    assert result.rows.num_distributions == 22 * 5
    p, q = (probs(seed, sequences=sequences_of()) for seed in (1, 2))
    kl_R = (p * np.log(p / q)).sum(axis=1)
    assert result.rows.divergence is not None
    assert result.rows.divergence.mean == pytest.approx(kl_R.mean(), abs=1e-5)
    assert result.rows.divergence.max_row == kl_R.argmax() // 5
    assert of_array(result, "token_ids").num_rows == 0


def test_stores_of_other_classes_or_rows_have_their_statistics_compared(make: Make) -> None:
    result = diff(make(1, Dense()), make(1, Dense(), num_classes=6))
    assert result.only_in_first == result.only_in_second == ("values",)
    assert result.rows.divergence is None
    longer = diff(make(1, Dense()), make(1, Dense(), num_rows=30))
    assert (longer.num_rows, longer.only_second) == (22, ((22, 30),))
    assert {"num_rows", "corpus.num_samples"} <= {field.name for field in longer.identity}
    words = diff(make(1, Dense()), make(1, Dense(), sequences=sequences_of()))
    assert words.rows.divergence is None
    assert {"entropy", "lse", "values"} <= set(words.only_in_first)


# What fails, and what is printed


def test_what_is_no_store_or_damaged_or_empty_is_refused(tmp_path: Path, make: Make) -> None:
    with pytest.raises(PathError, match="expected a logit store, got no such path"):
        diff(make(1, Dense()), tmp_path / "nothing.zarr")
    empty = make(1, Dense(), finalize=False, shards=())
    with pytest.raises(NotSealedError, match="expected sealed rows to compare, got none in both"):
        diff(empty, empty)
    damaged = write_member(tmp_path / "damaged.zarr", 2, Dense())
    file = damaged / "values" / "c" / "1" / "0"
    data = bytearray(file.read_bytes())
    data[7] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamageError, match="array 'values', shard 1"):
        diff(make(1, Dense()), damaged)
    failed = run("diff", make(1, Dense()), tmp_path / "nothing.zarr")
    assert (failed.exit_code, failed.stderr.count("\n")) == (1, 1)


def test_rows_are_counted_once_each(make: Make) -> None:
    counted: list[int] = []
    diff(make(1, Dense()), make(2, Dense()), progress=counted.append, num_workers=2)
    assert sum(counted) == 22


def test_the_command_says_where_two_stores_differ(make: Make) -> None:
    one, two = make(1, TopK(3, "float32")), make(2, Dense("float32"), shard_rows=6, chunk_rows=3, compressor="zstd")
    done = run("diff", one, two)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"{one} and {two} differ"
    assert lines[1] == '  identity    encoding.name: "topk" | "dense"'
    assert "  packing     shard_rows: 8 | 6" in lines
    assert any(line.startswith("  top-1       agrees in ") for line in lines)
    assert any(line.startswith("  KL          ") and "a lower bound" in line for line in lines)
    assert f"  not compared, as {one} alone has such: ids, log_tail, values" in lines
    figures = json.loads(run("diff", one, two, "--json").stdout)
    assert figures["same"] is False
    assert figures["identity"][0] == {"name": "encoding.name", "first": "topk", "second": "dense"}
    assert figures["rows"]["num_compared"] == 22
    same = run("diff", one, one, "--threads", 1)
    assert (same.exit_code, same.stdout) == (0, f"{one} and {one} say the same: 22 rows\n  rows        22 in both\n")
