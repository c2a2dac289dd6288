"""A stranger reads the golden stores and checks all that storage/FORMAT.md promises of them.

Version 1.0, and of 1.1 what holds of every store; what sequences, draws and hidden states are is in
`test_stranger_sequences.py`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.golden.stranger import FORMAT, GOLDEN, Array, Stranger, log_softmax, snippets

STORES = [f"v1.0/{name}" for name in ("dense.zarr", "topk.zarr", "dense.h5", "topk.h5")]
LATER = [f"v1.1/{name}{suffix}" for name in ("topk", "sample", "hidden") for suffix in (".zarr", ".h5")]


@pytest.fixture(params=[*STORES, *LATER])
def any_store(request: pytest.FixtureRequest) -> Stranger:
    return Stranger(GOLDEN / request.param)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Stranger:
    return Stranger(GOLDEN / request.param)


def expected_logits() -> Array:
    """What the teacher said: `make.py` draws the same."""
    return np.random.default_rng(7).normal(1, 4, (22, 6)).astype(np.float32)


def test_the_manifest_has_the_fields_of_the_page(store: Stranger) -> None:
    expected = "format format_version num_rows num_classes shard_rows chunk_rows encoding temperatures teacher corpus"
    expected += " preprocess class_names has_hard_targets compressor provenance"
    assert set(store.manifest) == set(expected.split())
    assert store.manifest["format"] == "logit-store"
    assert store.manifest["format_version"] == "1.0"
    assert all(f"`{name}`" in FORMAT.read_text() for name in store.manifest)
    assert store.manifest["class_names"][4:] == ["élan", "\N{FOX FACE}"]


def test_records_refer_to_each_other_as_the_page_says(any_store: Stranger) -> None:
    manifest_sha256 = hashlib.sha256(any_store.manifest_bytes).hexdigest()
    assert any_store.final["manifest_sha256"] == manifest_sha256
    assert {seal["manifest_sha256"] for seal in any_store.seals} == {manifest_sha256}
    assert any_store.final["seals_sha256"] == hashlib.sha256(b"".join(any_store.seal_bytes)).hexdigest()
    sealed = [shard for start, stop in any_store.final["sealed"] for shard in range(start, stop)]
    assert [seal["shard"] for seal in any_store.seals] == sealed
    num_rows, shard_rows = any_store.manifest["num_rows"], any_store.manifest["shard_rows"]
    assert any_store.final["complete"] == (sealed == list(range(-(-num_rows // shard_rows))))
    for seal in any_store.seals:
        start = shard_rows * seal["shard"]
        assert (seal["start"], seal["stop"]) == (start, min(start + shard_rows, num_rows))
    assert any_store.final["num_sealed_rows"] == sum(seal["stop"] - seal["start"] for seal in any_store.seals)
    assert any_store.final["num_quarantined"] == sum(len(seal["quarantine"]) for seal in any_store.seals)


def test_every_array_has_the_sealed_digest(any_store: Stranger) -> None:
    for seal in any_store.seals:
        assert set(seal["arrays"]) == set(any_store.arrays)
        for name, values in any_store.arrays.items():
            rows = np.ascontiguousarray(values[seal["start"] : seal["stop"]])
            little = rows.astype(rows.dtype.newbyteorder("<"))
            assert hashlib.sha256(little.tobytes()).hexdigest() == seal["arrays"][name]


def test_every_object_has_its_digest(any_store: Stranger) -> None:
    objects: dict[str, Mapping[str, Any]] = dict(any_store.final["metadata"])
    for seal in any_store.seals:
        objects |= seal["objects"]
    if any_store.path.suffix == ".h5":
        assert not objects
        data = any_store.path.read_bytes()
        line, _, zeros = data[:512].partition(b"\n")
        assert not zeros.strip(b"\0")
        expected = {"num_bytes": len(data) - 512, "xxh3_128": xxhash.xxh3_128_hexdigest(data[512:])}
        assert json.loads(line) == {"format": "logit-store", "user_block": 512, **expected}
        return
    files = {path.relative_to(any_store.path).as_posix() for path in any_store.path.rglob("*") if path.is_file()}
    records = {f"seals/{seal['shard']:08d}.json" for seal in any_store.seals}
    records |= {f"head/{name}" for name in any_store.head_bytes}
    assert files == {*objects, *records, "manifest.json", "final.json"}
    for key, digest in objects.items():
        data = (any_store.path / key).read_bytes()
        assert digest == {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_the_content_digest_is_what_the_page_computes(any_store: Stranger) -> None:
    assert snippets()["content_digest"](any_store.manifest, any_store.seals) == any_store.final["content_digest"]


def test_records_are_signed_as_the_page_says(any_store: Stranger) -> None:
    assert [snippets()["signed"](seal) for seal in any_store.seals] == any_store.seal_bytes


def test_statistics_are_those_of_the_formulas(store: Stranger) -> None:
    rows = store.rows
    logits_NC = expected_logits().astype(np.float64)[rows]
    centred_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(store.arrays["max_logit"][rows], expected_logits()[rows].max(axis=1))
    for column, temperature in enumerate(store.manifest["temperatures"]):
        expected = np.log(np.exp(centred_NC / temperature).sum(axis=1))
        np.testing.assert_allclose(store.arrays["lse"][rows, column], expected, rtol=1e-5)
    logprobs_NC = log_softmax(centred_NC)
    np.testing.assert_allclose(
        store.arrays["entropy"][rows], -(np.exp(logprobs_NC) * logprobs_NC).sum(axis=1), rtol=1e-3
    )
    hard_targets = store.arrays["hard_target"][rows]
    np.testing.assert_array_equal(hard_targets, rows % 6)
    expected = logprobs_NC[np.arange(len(rows)), hard_targets]
    np.testing.assert_allclose(store.arrays["hard_target_logprob"][rows], expected, rtol=1e-3)


def test_log_probabilities_are_the_teachers(store: Stranger) -> None:
    rows = store.rows
    logits_NC = expected_logits().astype(np.float64)[rows]
    kept = {name: values[rows] for name, values in store.arrays.items()}
    is_uint8 = store.manifest["encoding"]["values"] == "uint8"
    error_N = kept["value_range"] / 510 if is_uint8 else np.full(len(rows), 30 * 2**-11)
    for temperature in (1.0, 4.0):
        truth_NC = log_softmax(logits_NC / temperature)
        found = snippets()["log_probs"](store.manifest, dict(kept), temperature)
        if "ids" in kept:
            order_NC = np.argsort(-logits_NC, axis=1, kind="stable")
            num_kept = store.manifest["encoding"]["k"]
            np.testing.assert_array_equal(kept["ids"], order_NC[:, :num_kept])
            sorted_NC = np.take_along_axis(truth_NC, order_NC, axis=1)
            tail_N = np.log(np.exp(sorted_NC[:, num_kept:]).sum(axis=1))
            truth_NC = np.concatenate([sorted_NC[:, :num_kept], tail_N[:, None]], axis=1)
        assert (abs(found - truth_NC) <= 2 * error_N[:, None] / temperature + 1e-5).all()
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-6)


def test_quarantined_rows_hold_no_targets_and_say_why(store: Stranger) -> None:
    entries = {entry["row"]: entry for seal in store.seals for entry in seal["quarantine"]}
    sealed = np.concatenate([np.arange(seal["start"], seal["stop"]) for seal in store.seals])
    status = store.arrays["status"]
    assert sorted(entries) == [row for row in sealed if status[row] in (1, 2)] == [5, 17]
    assert (status[5], status[17]) == (2, 1)
    assert entries[17] == {"row": 17, "key": "sample-17", "reason": "expected an image, got 'élan'"}
    assert (store.arrays["sample_digest"][[5, 17]] == 0).tolist() == [False, True]
    for name, values in store.arrays.items():
        if values.dtype.kind == "f":
            assert np.isnan(values[[5, 17]]).all(), name
    assert store.arrays["hard_target"][[5, 17]].tolist() == [5, 5]


def test_rows_that_are_not_sealed_read_as_no_legal_row() -> None:
    store = Stranger(GOLDEN / "v1.0" / "topk.zarr")
    assert [seal["shard"] for seal in store.seals] == [0, 2]
    assert (store.arrays["status"][8:16] == 255).all()
    for name in ("max_logit", "lse", "entropy", "log_tail", "value_range"):
        assert np.isnan(store.arrays[name][8:16]).all()
