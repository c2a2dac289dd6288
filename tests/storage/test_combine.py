"""`combine`: what is written, what is refused, and that a kill loses nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.cli import main
from storage.encodings import Dense, Encoding, TopK
from storage.errors import CorpusMismatchError, DamageError, MismatchError, NotSealedError, PathError
from storage.reader import open_store
from storage.scan import CombineOptions, combine, copy, diff, verify
from storage.scan.ensemble import Combine
from storage.writer import StoreWriter
from tests.s3 import S3Server
from tests.series import write_series
from tests.storage.members import Make, draws_with, maker, read_all, says
from tests.storage.scan_stores import manifest_of, write_store
from tests.storage.soft_targets import hard_target_logprobs, hidden_encoding, sequences_of

EXACT = 2e-6  # float32 rounding of log-probabilities of a few nats


def mean_of(logits: list[Array], how: Combine) -> Array:
    """The logits of the ensemble, float64."""
    each = np.stack(logits).astype(np.float64)
    if how == "mean-logits":
        mean: Array = each.mean(axis=0)
        return mean
    each -= np.log(np.exp(each).sum(axis=2, keepdims=True))
    total: Array = np.log(np.exp(each).mean(axis=0))
    return total


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def two(make: Make) -> list[Path]:
    return [make(seed, Dense("float32")) for seed in (1, 2)]


# What is written


@pytest.mark.parametrize("how", ["mean-probs", "mean-logits"])
def test_dense_stores_say_together_what_their_teachers_would(tmp_path: Path, make: Make, how: Combine) -> None:
    paths = [make(seed, Dense("float32")) for seed in (1, 2, 3)]
    result = combine(paths, tmp_path / "all.zarr", CombineOptions(how))
    manifest = manifest_of()
    logits_NC = mean_of([says(manifest, seed) for seed in (1, 2, 3)], how)
    found, target_N = read_all(tmp_path / "all.zarr"), read_all(paths[0])["hard_target"]
    np.testing.assert_allclose(found["values"], logits_NC - logits_NC.max(axis=1, keepdims=True), atol=EXACT)
    np.testing.assert_allclose(found["max_logit"], logits_NC.max(axis=1), atol=EXACT)
    expected = Dense("float32").encode(logits_NC.astype(np.float32), (1.0, 4.0))
    np.testing.assert_allclose(found["lse"], expected["lse"], atol=EXACT)
    np.testing.assert_allclose(found["entropy"], expected["entropy"], rtol=2**-10)
    np.testing.assert_allclose(
        found["hard_target_logprob"], hard_target_logprobs(logits_NC, target_N), rtol=2**-10, atol=2**-20
    )
    assert (found["status"] == STATUS_OK).all()
    assert verify(result.path).ok
    assert result.within == {"probability_within": 0, "entropy_within": 0, "max_logit_within": 0}


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("how", ["mean-probs", "mean-logits"])
def test_sequences_are_combined_position_by_position(
    tmp_path: Path, make: Make, how: Combine, has_tokens: bool
) -> None:
    sequences = sequences_of(5, has_tokens=has_tokens)
    paths = [make(seed, Dense("float32"), sequences=sequences, not_finite=(4,)) for seed in (1, 2)]
    combine(paths, tmp_path / "both.zarr", CombineOptions(how))
    found, one = read_all(tmp_path / "both.zarr"), read_all(paths[0])
    manifest = manifest_of(sequences=sequences)
    logits_RC = mean_of([says(manifest, seed) for seed in (1, 2)], how)
    values = (logits_RC - logits_RC.max(axis=1, keepdims=True)).reshape(22, 5, 5)
    values[4] = np.nan
    np.testing.assert_allclose(found["values"], values, atol=EXACT)
    target_logprob = found["hard_target_logprob"]
    np.testing.assert_array_equal(np.isnan(target_logprob), np.isnan(one["hard_target_logprob"]))
    logprobs = (logits_RC - np.log(np.exp(logits_RC).sum(axis=1, keepdims=True))).reshape(22, 5, 5)
    if has_tokens:
        np.testing.assert_array_equal(found["token_ids"], one["token_ids"])
        expected = np.take_along_axis(logprobs, one["token_ids"][:, 1:, None].astype(int), axis=2)[..., 0]
        known = ~np.isnan(target_logprob)
        np.testing.assert_allclose(target_logprob[known], expected[known], rtol=2**-10, atol=2**-20)
    else:  # it must be one of the classes' all the same
        off = np.abs(logprobs - target_logprob[..., None]).min(axis=2)
        assert np.nanmax(off) < 2e-2
    assert verify(tmp_path / "both.zarr").ok


def test_topk_stores_of_agreeing_teachers_become_what_the_ensemble_keeps(tmp_path: Path, make: Make) -> None:
    generator = np.random.default_rng(5)
    logits = [np.arange(30) * -0.7 + generator.normal(0, 0.3, (22, 30)) for _ in range(2)]
    paths = [
        make(seed, TopK(8, "float32"), logits=each.astype(np.float32), num_classes=30)
        for seed, each in enumerate(logits)
    ]
    result = combine(paths, tmp_path / "both.zarr")
    assert result.encoding["name"] == "topk"
    k = result.encoding["k"]
    assert 4 <= k < 8
    assert result.within["probability_within"] == 0
    expected = TopK(k, "float32").encode(mean_of(logits, "mean-probs").astype(np.float32), (1.0,))
    found = read_all(tmp_path / "both.zarr")
    np.testing.assert_array_equal(found["ids"], expected["ids"])
    for name in ("values", "lse", "log_tail", "max_logit"):
        np.testing.assert_allclose(found[name], expected[name], atol=EXACT)
    within = result.within["entropy_within"]
    assert 0 < within < 0.1
    assert (np.abs(found["entropy"] - expected["entropy"].astype(float)) <= within + 2e-3).all()
    assert verify(result.path).ok
    assert "only T = 1 is declared, not 4" in result.notes[0]
    with pytest.raises(MismatchError, match=f"expected the 8 likeliest classes .*; use --k {k}, --tolerance "):
        combine(paths, tmp_path / "more.zarr", CombineOptions(k=8))


def test_a_tolerance_lets_classes_in_that_one_store_does_not_keep_and_is_held(tmp_path: Path, make: Make) -> None:
    paths = [make(seed, TopK(9), num_classes=20) for seed in (1, 2)]
    with pytest.raises(MismatchError, match=r"within 0, got .*, in row \d+: classes that one store keeps and another"):
        combine(paths, tmp_path / "both.zarr")
    result = combine(paths, tmp_path / "both.zarr", CombineOptions(k=9, tolerance=0.2))
    off = result.within["probability_within"]
    assert 0 < off <= 0.2
    with pytest.raises(MismatchError, match=f"expected the 9 likeliest .* known within 1e-05, got {off:.2g}"[:-1]):
        combine(paths, tmp_path / "more.zarr", CombineOptions(k=9, tolerance=1e-5))
    assert not (tmp_path / "more.zarr").exists()
    logits_NC = mean_of([says(manifest_of(num_classes=20), seed) for seed in (1, 2)], "mean-probs")
    found = read_all(tmp_path / "both.zarr")
    said = np.exp(found["values"].astype(float) - found["lse"])
    true = np.exp(np.take_along_axis(logits_NC, found["ids"].astype(int), axis=1))
    assert (np.abs(said - true) <= off + 1e-3).all()
    assert np.abs(found["max_logit"] - logits_NC.max(axis=1)).max() <= result.within["max_logit_within"] + 1e-3
    assert verify(result.path).ok
    with open_store(result.path) as store:
        assert store.manifest.extra["combined"] == {"num_stores": 2, **result.within}
        assert store.manifest.format_version == "1.1"
    third = make(3, TopK(9), num_classes=20)
    three = combine([tmp_path / "both.zarr", third], tmp_path / "three.zarr", CombineOptions(tolerance=0.9))
    assert three.within["probability_within"] > off / 2  # what a store is off by itself is counted too
    with pytest.raises(MismatchError, match="classes that one store keeps and another does not"):
        combine([tmp_path / "both.zarr", third], tmp_path / "x.zarr", CombineOptions(tolerance=off / 2))


def test_draws_of_all_stores_are_kept_together(tmp_path: Path, make: Make) -> None:
    paths = [make(seed, draws_with(seed)) for seed in (1, 2)]
    result = combine(paths, tmp_path / "both.h5")
    found, parts = read_all(tmp_path / "both.h5"), [read_all(path) for path in paths]
    assert result.encoding == {"name": "sample", "draws": 40, "seed": 0}
    for row in range(22):
        total = np.zeros(5, int)
        for part in parts:
            total[part["ids"][row]] += part["counts"][row]
        assert dict(zip(found["ids"][row], found["counts"][row], strict=True)) | {0: total[0]} == {
            **{index: count for index, count in enumerate(total) if count},
            0: total[0],
        }
    assert verify(result.path).ok
    assert not any("one seed" in note for note in result.notes)


def test_stores_that_drew_with_one_seed_are_noted(tmp_path: Path, make: Make) -> None:
    paths = [make(seed, draws_with(7)) for seed in (1, 2)]
    assert "stores drew with one seed" in combine(paths, tmp_path / "both.zarr").notes[0]


@pytest.mark.parametrize("encoding", [Dense("float16"), Dense("uint8"), TopK(5, "float16"), TopK(5, "uint8")])
def test_coarse_stores_are_combined_within_their_bounds(tmp_path: Path, make: Make, encoding: Encoding) -> None:
    paths = [make(seed, encoding) for seed in (1, 2)]
    result = combine(paths, tmp_path / "both.zarr")
    assert verify(result.path).ok
    found = read_all(tmp_path / "both.zarr")
    logits_NC = mean_of([says(manifest_of(), seed) for seed in (1, 2)], "mean-probs")
    said = encoding.logprobs(found, 1.0, (1.0,))[:, :5]
    ids = found["ids"].astype(int) if "ids" in found else np.arange(5)[None].repeat(22, 0)
    bound = 0.1 if encoding.to_json()["values"] == "uint8" else 0.02
    np.testing.assert_allclose(said, np.take_along_axis(logits_NC, ids, axis=1), atol=bound)
    fine = combine(paths, tmp_path / "fine.zarr", CombineOptions(values="float32"))
    assert fine.encoding["values"] == "float32"


def test_a_row_that_any_store_refuses_is_refused_and_says_by_which(tmp_path: Path, make: Make) -> None:
    one = make(1, Dense("float32"), undecodable=(3,), unread=(3,))
    two = make(2, Dense("float32"), not_finite=(3, 13))
    combine([one, two], tmp_path / "both.zarr")
    found = read_all(tmp_path / "both.zarr")
    assert found["status"][[3, 13]].tolist() == [STATUS_UNDECODABLE, STATUS_NOT_FINITE]
    assert np.flatnonzero(found["status"]).tolist() == [3, 13]
    assert (found["sample_digest"] == read_all(two)["sample_digest"]).all()  # the one that could read it knows it
    assert verify(tmp_path / "both.zarr").ok
    with open_store(tmp_path / "both.zarr") as store:
        entries = [(entry.row, entry.key, entry.reason) for entry in store.quarantine()]
    assert entries == [
        (3, "sample-3", f"{one.name}: refused by teacher 1; {two.name}: refused by teacher 2"),
        (13, "sample-13", f"{two.name}: refused by teacher 2"),
    ]


def test_a_shard_without_any_targets_is_combined_too(tmp_path: Path, make: Make) -> None:
    for encoding in (Dense(), TopK(5), draws_with(1)):
        folder = tmp_path / encoding.name
        paths = [make(seed, encoding, undecodable=tuple(range(8))) for seed in (1, 2)]
        combine(paths, folder / "both.zarr")
        assert verify(folder / "both.zarr").ok


def test_a_row_of_which_no_class_is_left_is_refused(tmp_path: Path, make: Make) -> None:
    logits = np.zeros((2, 22, 5), np.float32)
    logits[0, 9, :3] = logits[1, 9, 3:] = -np.inf
    paths = [make(seed, Dense("float32"), logits=logits[seed]) for seed in (0, 1)]
    combine(paths, tmp_path / "geometric.zarr", CombineOptions("mean-logits"))
    combine(paths, tmp_path / "arithmetic.zarr")
    assert np.flatnonzero(read_all(tmp_path / "geometric.zarr")["status"]).tolist() == [9]
    assert (read_all(tmp_path / "arithmetic.zarr")["status"] == STATUS_OK).all()
    for name in ("geometric.zarr", "arithmetic.zarr"):
        assert verify(tmp_path / name).ok
    with open_store(tmp_path / "geometric.zarr") as store:
        assert store.quarantine()[0].reason == "logits are not finite: -inf for every class"


def test_stores_that_are_cut_otherwise_are_cut_anew(tmp_path: Path, make: Make) -> None:
    cuts = ((8, 4), (6, 3), (22, 11))
    paths = [make(seed, Dense("float32"), shard_rows=rows, chunk_rows=chunk) for seed, (rows, chunk) in enumerate(cuts)]
    same = [make(seed, Dense("float32")) for seed in range(3)]
    combine(paths, tmp_path / "cut.zarr")
    combine(same, tmp_path / "same.zarr")
    for name, values in read_all(tmp_path / "cut.zarr").items():
        assert values.tobytes() == read_all(tmp_path / "same.zarr")[name].tobytes(), name
    with open_store(tmp_path / "cut.zarr") as store:
        assert (store.manifest.shard_rows, store.manifest.chunk_rows) == (8, 4)


def test_rows_that_one_store_lacks_are_left_out(tmp_path: Path, make: Make, two: list[Path]) -> None:
    part = make(3, Dense("float32"), shards=(1, 2))
    result = combine([two[0], part], tmp_path / "both.zarr")
    with open_store(tmp_path / "both.zarr") as store:
        assert store.sealed_shards() == (1, 2)
        assert result.num_rows == store.num_sealed_rows == 14
    other = make(4, Dense("float32"), shards=(0,))
    with pytest.raises(NotSealedError, match="expected a shard of 8 rows that all stores have, got none"):
        combine([part, other], tmp_path / "none.zarr")


def test_a_series_is_combined_like_one_store(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", [16, 8])
    with open_store(series) as store:
        manifest = replace(store.manifest, shard_rows=12, chunk_rows=6)
        arrays = store.read([spec.name for spec in manifest.arrays], 0, 24)
    logits_NC = np.random.default_rng(1).normal(size=(24, manifest.num_classes)).astype(np.float32)
    one = arrays | manifest.encoding.encode(logits_NC, manifest.temperatures)
    for name, rows in (("one", one), ("same", arrays)):
        with StoreWriter.open(tmp_path / f"{name}.zarr", manifest) as writer:
            for start in (0, 12):
                writer.write_shard(start // 12, {key: values[start : start + 12] for key, values in rows.items()})
            writer.finalize()
    combine([series, tmp_path / "one.zarr"], tmp_path / "a.zarr")
    combine([tmp_path / "same.zarr", tmp_path / "one.zarr"], tmp_path / "b.zarr")
    for name, values in read_all(tmp_path / "a.zarr").items():
        assert values.tobytes() == read_all(tmp_path / "b.zarr")[name].tobytes(), name


def test_a_combined_store_says_of_which_stores_it_is(tmp_path: Path, two: list[Path]) -> None:
    result = combine(two, tmp_path / "both.zarr")
    with open_store(tmp_path / "both.zarr") as store:
        manifest = store.manifest
        digests = [open_store(path).content_digest for path in two]
        assert manifest.lineage is not None
        assert [origin["content_digest"] for origin in manifest.lineage] == digests == list(result.source_digests)
        assert manifest.teacher["kind"] == "ensemble"
        assert manifest.teacher["members"] == [
            {"digest": "01" * 32, "kind": "weights"},
            {"digest": "02" * 32, "kind": "weights"},
        ]
        assert (manifest.teacher["arch"], manifest.teacher["precision"]) == ("mlp:1-1", "fp32")
        assert manifest.provenance["combined_from"] == [path.name for path in two]
    again = combine([tmp_path / "both.zarr", two[0]], tmp_path / "three.zarr")
    with open_store(again.path) as store:
        lineage = json.loads(json.dumps(store.manifest.to_json()["lineage"]))
    assert lineage[0]["lineage"][1]["content_digest"] == digests[1]
    text = run("info", tmp_path / "both.zarr").stdout
    assert "lineage   from dense digest" in text
    assert "combined  of 2 stores, exact up to rounding\n" in text


def test_teachers_of_several_kinds_and_inputs_are_each_named(tmp_path: Path, make: Make) -> None:
    one = make(1, Dense())
    teacher = {"digest": "77" * 32, "kind": "weights", "arch": "cnn:1", "precision": "bf16"}
    corpus = {"kind": "images", "fingerprint": "99" * 32, "num_samples": 22}
    two = make(2, Dense(), teacher=teacher, preprocess={"version": 2}, corpus=corpus)
    result = combine([one, two], tmp_path / "both.zarr")
    assert result.notes == (
        f"{two.name}'s teacher saw its input otherwise; students get what {one.name}'s saw",
        f"{two.name} has another index of the corpus; its samples are compared one by one",
    )
    with open_store(result.path) as store:
        manifest = store.manifest
    assert (manifest.teacher["arch"], manifest.teacher["precision"]) == (None, None)
    assert [(member["arch"], member["precision"]) for member in manifest.teacher["members"]] == [
        ("mlp:1-1", "fp32"),
        ("cnn:1", "bf16"),
    ]
    assert manifest.preprocess == {"version": 1, "kind": "array"}
    assert manifest.lineage is not None
    assert (manifest.lineage[1]["preprocess"], manifest.lineage[1]["corpus"]) == ({"version": 2}, corpus)
    assert "preprocess" not in manifest.lineage[0]


# How it goes on


def stop_after(num_calls: int) -> Callable[[int], None]:
    calls = []

    def progress(num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) > num_calls:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("target", "num_calls"), [("both.zarr", 1), ("both.zarr", 4), ("both.h5", 7)])
def test_a_combination_that_was_stopped_goes_on(tmp_path: Path, two: list[Path], target: str, num_calls: int) -> None:
    undisturbed = combine(two, tmp_path / "other.zarr")
    with pytest.raises(KeyboardInterrupt):
        combine(two, tmp_path / target, num_workers=1, progress=stop_after(num_calls))
    counted: list[int] = []
    result = combine(two, tmp_path / target, progress=counted.append)
    assert result.content_digest == undisturbed.content_digest
    assert sum(counted) == 3 * 22
    assert combine(two, tmp_path / target) == result  # and once more: it is there


def test_nothing_is_written_over(tmp_path: Path, make: Make, two: list[Path]) -> None:
    combine(two, tmp_path / "both.zarr")
    with pytest.raises(MismatchError, match="expected nothing, or this combination begun, got another store"):
        combine(two[::-1], tmp_path / "both.zarr")
    with pytest.raises(MismatchError, match="combine: the store has"):
        combine(two, tmp_path / "both.zarr", CombineOptions("mean-logits"))
    with pytest.raises(MismatchError, match="expected nothing, or this combination begun"):
        combine(two, make(3, Dense("float32")))
    with pytest.raises(PathError, match="expected a path outside"):
        combine(two, two[1] / "inside.zarr")


def test_a_damaged_store_is_not_combined(tmp_path: Path, make: Make, two: list[Path]) -> None:
    damaged = Path(shutil.copytree(two[0], tmp_path / "damaged.zarr"))
    lse = Path("lse", "c", "1", "0")
    (damaged / lse).write_bytes((two[1] / lse).read_bytes())
    with pytest.raises(DamageError, match="array 'lse', shard 1: expected the sealed sha256 to hold, got another"):
        combine([damaged, two[1]], tmp_path / "both.zarr")
    cut = make(5, Dense("float32"), shard_rows=6, chunk_rows=3)
    with pytest.raises(DamageError, match="lse"):  # a shard that lies across two of the new store
        combine([cut, damaged], tmp_path / "more.zarr")


# What is refused


@pytest.mark.parametrize(
    ("encodings", "options", "message"),
    [
        (
            (Dense(), TopK(3)),
            {},
            "expected dense, as .* has it, got topk; bring them to one encoding first: logitstore",
        ),
        ((TopK(3), TopK(3)), {"combine": "mean-logits"}, "expected dense stores for mean-logits, got topk: what the"),
        ((TopK(3), TopK(3)), {"temperatures": (4.0,)}, "expected temperature 1, got 4: an ensemble's probabilities at"),
        ((TopK(3), TopK(4)), {"k": 4}, "expected at most the 3 entries that every store keeps, got k = 4; use a"),
        ((draws_with(1), draws_with(2, 30)), {}, r"expected the same number of draws in every store, .*got \[20, 30\]"),
        ((draws_with(1, 200), draws_with(2, 200)), {}, "expected at most 255 draws of all stores together, .*got 400"),
        ((draws_with(1), draws_with(2)), {"combine": "mean-logits"}, "expected dense stores for mean-logits, got sam"),
    ],
)
def test_what_stores_cannot_say_together_is_refused(
    tmp_path: Path, make: Make, encodings: tuple[Encoding, Encoding], options: dict[str, object], message: str
) -> None:
    paths = [make(seed, encoding) for seed, encoding in enumerate(encodings)]
    with pytest.raises(MismatchError, match=message):
        combine(paths, tmp_path / "both.zarr", CombineOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "both.zarr").exists()


@pytest.mark.parametrize("encoding", [TopK(3), draws_with(1)])
def test_a_store_without_the_temperature_1_is_refused(tmp_path: Path, make: Make, encoding: Encoding) -> None:
    paths = [make(seed, encoding, temperatures=(4.0 if seed else 1.0,)) for seed in range(2)]
    with pytest.raises(MismatchError, match=r"\.zarr: expected a store that declares temperature 1, .*got 4; dump it"):
        combine(paths, tmp_path / "both.zarr")


def test_hidden_states_are_refused_with_the_way_round(tmp_path: Path, make: Make) -> None:
    hidden = write_store(tmp_path / "h.zarr", manifest_of(encoding=hidden_encoding(5)))
    dense = make(1, Dense())
    with pytest.raises(MismatchError, match=r"got hidden states, .* logitstore transcode --encoding dense"):
        combine([dense, hidden], tmp_path / "both.zarr")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_rows": 23}, "got another num_rows: 23 here, 22 there"),
        ({"num_classes": 6}, "got another num_classes: 6 here, 5 there"),
        ({"class_names": None}, "got another class_names: None here"),
        ({"class_names": None, "has_hard_targets": False}, "got another class_names"),
        ({"sequences": sequences_of()}, "got another class_names"),
        ({"has_hard_targets": False}, "got another has_hard_targets: False here, True there"),
    ],
)
def test_stores_over_other_rows_or_classes_are_refused(
    tmp_path: Path, make: Make, two: list[Path], fields: dict[str, object], message: str
) -> None:
    other = make(3, Dense("float32"), **fields)
    with pytest.raises(MismatchError, match=message):
        combine([two[0], other], tmp_path / "both.zarr")


def test_sequences_that_differ_are_refused_but_for_what_pads_the_vocabulary(tmp_path: Path, make: Make) -> None:
    paths = [make(n, Dense(), sequences=sequences_of(num_padded=n)) for n in range(2)]
    combine(paths, tmp_path / "both.zarr")
    other = make(3, Dense(), sequences=sequences_of(tokenizer="aa" * 32))
    with pytest.raises(MismatchError, match="got another sequences"):
        combine([paths[0], other], tmp_path / "none.zarr")


def test_other_samples_or_hard_targets_are_refused_before_anything_is_written(
    tmp_path: Path, make: Make, two: list[Path]
) -> None:
    other = make(3, Dense("float32"), other_samples=(17, 18))
    with pytest.raises(CorpusMismatchError, match=r"samples of .*zarr, got others in row 17 and of 1 more rows near"):
        combine([*two, other], tmp_path / "both.zarr")
    labels = make(3, Dense("float32"), other_targets=(5,))
    with pytest.raises(CorpusMismatchError, match=r"hard targets of .*, got others in row 5; dump one of them again"):
        combine([*two, labels], tmp_path / "both.zarr")
    assert not (tmp_path / "both.zarr").exists()


def test_a_sample_that_nobody_could_read_tells_no_two_corpora_apart(tmp_path: Path, make: Make) -> None:
    paths = [
        make(1, Dense(), undecodable=(2,), unread=(2,)),
        make(2, Dense()),
        make(3, Dense(), other_samples=(2,)),
    ]
    with pytest.raises(CorpusMismatchError, match=r"zarr: expected the samples of .*, got others in row 2"):
        combine(paths, tmp_path / "all.zarr")  # the second knows the sample that the first could not read
    combine(paths[:2], tmp_path / "two.zarr")


def test_one_store_alone_twice_the_same_and_an_unfinished_one_are_refused(
    tmp_path: Path, make: Make, two: list[Path]
) -> None:
    with pytest.raises(ValueError, match="expected two or more to combine, got 1"):
        combine(two[:1], tmp_path / "both.zarr")
    with pytest.raises(MismatchError, match="got one that says the same; name each store once"):
        combine([*two, two[0]], tmp_path / "both.zarr")
    begun = make(3, Dense("float32"), finalize=False)
    with pytest.raises(NotSealedError, match="expected a finalized store, got one that is not"):
        combine([two[0], begun], tmp_path / "both.zarr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "median"}, "combine: expected mean-probs or mean-logits, got 'median'"),
        ({"values": "int4"}, "values: expected uint8 or float16 or float32, got 'int4'"),
        ({"compressor": "lz4"}, "compressor: expected none or zstd, got 'lz4'"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"tolerance": 1.0}, "tolerance: expected a probability from 0 to below 1, got 1.0"),
        ({"temperatures": (0.0,)}, "temperatures: expected numbers above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombineOptions(**options)  # type: ignore[arg-type]


def test_options_that_would_be_ignored_are_refused(tmp_path: Path, make: Make, two: list[Path]) -> None:
    for options in (CombineOptions(k=3), CombineOptions(tolerance=0.1)):
        with pytest.raises(ValueError, match=r"expected none with dense, got .*; it is of topk: leave it out"):
            combine(two, tmp_path / "both.zarr", options)
    draws = [make(seed, draws_with(seed)) for seed in (1, 2)]
    with pytest.raises(ValueError, match="values: expected none with sample, which keeps counts, got float16"):
        combine(draws, tmp_path / "both.zarr", CombineOptions(values="float16"))
    apart = [make(seed, Dense(), temperatures=(float(seed),)) for seed in (1, 2)]
    with pytest.raises(ValueError, match="temperatures: expected one that every store declares, got none; give --temp"):
        combine(apart, tmp_path / "both.zarr")
    assert combine(apart, tmp_path / "both.zarr", CombineOptions(temperatures=(1, 3))).num_rows == 22


def test_the_command_prints_what_it_did_and_fails_in_one_line(tmp_path: Path, make: Make, two: list[Path]) -> None:
    done = run("combine", *two, "--out", tmp_path / "both.h5", "--combine", "mean-logits", "--compressor", "zstd")
    assert done.exit_code == 0, done.output
    assert "both.h5: 22 rows, dense values=float32, " in done.stdout
    figures = json.loads(run("combine", *two, "--out", tmp_path / "more.zarr", "--json", "--threads", 1).stdout)
    assert figures["num_rows"] == 22
    assert figures["within"]["probability_within"] == 0
    assert verify(figures["path"]).content_digest == figures["content_digest"]
    alone = run("combine", two[0], "--out", tmp_path / "x.zarr")
    assert (alone.exit_code, alone.stderr.count("\n")) == (2, 1)
    missing = run("combine", two[0], tmp_path / "nothing.zarr", "--out", tmp_path / "x.zarr")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    assert "expected a logit store, got no such path" in missing.stderr
    topk = [make(seed, TopK(3), num_classes=20) for seed in (1, 2)]
    refused = run("combine", *topk, "--out", tmp_path / "k.zarr")
    assert refused.exit_code == 1
    tolerance = refused.stderr.split("--tolerance ")[1].split(",")[0]
    done = run("combine", *topk, "--out", tmp_path / "k.zarr", "--tolerance", tolerance)
    assert done.exit_code == 0, done.output
    assert "note: a kept probability is off by " in done.stderr
    said = json.loads(run("info", tmp_path / "k.zarr", "--json").stdout)["combined"]
    assert said["probability_within"] <= float(tolerance)
    text = run("info", tmp_path / "k.zarr").stdout
    assert f"combined  of 2 stores, kept probabilities within {said['probability_within']:g}, entropy within " in text


@pytest.mark.parametrize(
    "combined", ["yes", {"entropy_within": -1}, {"probability_within": True}, {"max_logit_within": "x"}]
)
def test_bounds_that_are_no_numbers_are_damage(tmp_path: Path, make: Make, two: list[Path], combined: object) -> None:
    other = make(3, Dense("float32"), extra={"combined": combined})
    with pytest.raises(DamageError, match=r"manifest: expected .*; take another copy of the store"):
        combine([two[0], other], tmp_path / "both.zarr")
    assert run("info", other).exit_code == 0


def test_stores_at_urls_are_combined_and_compared_where_they_are(tmp_path: Path, s3: S3Server, two: list[Path]) -> None:
    urls = [s3.url(f"members/{path.name}") for path in two]
    for path, url in zip(two, urls, strict=True):
        copy(path, url)
    here = combine(two, tmp_path / "both.zarr")
    there = combine(urls, s3.url("members") + "/both.zarr")
    assert there.content_digest == here.content_digest
    assert diff(there.path, here.path).same
    assert run("diff", there.path, urls[0]).exit_code == 1
