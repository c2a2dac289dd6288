"""A stranger reads sequences, draws and hidden states: what storage/FORMAT.md says of version 1.1."""

import hashlib
from typing import Any

import numpy as np
import pytest

from tests.golden.stranger import FORMAT, GOLDEN, Array, Stranger, log_softmax, snippets

# Legend: N rows, P positions, R distributions, C classes, W width of a hidden state, K kept entries, D places for ids.
NUM_ROWS, P, C, W = 7, 5, 300, 3
STORES = ("topk.zarr", "topk.h5", "sample.zarr", "sample.h5", "hidden.zarr", "hidden.h5")
SEQUENCES = STORES[:5]
MANIFEST = "format format_version num_rows num_classes shard_rows chunk_rows encoding temperatures teacher corpus"
MANIFEST += " preprocess class_names has_hard_targets compressor provenance"
REASONS = {1: "logits are not finite: NaN", 4: "expected 6 tokens, got 5"}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Stranger:
    return Stranger(GOLDEN / "v1.1" / request.param)


@pytest.fixture(params=SEQUENCES)
def sequences(request: pytest.FixtureRequest) -> Stranger:
    return Stranger(GOLDEN / "v1.1" / request.param)


def what_make_draws() -> tuple[Array, Array, Array, Array]:
    """Hidden states, logits, token ids and position ids of all rows: `make.py` draws the same."""
    generator = np.random.default_rng(13)
    hidden_NPW = generator.normal(0, 1, (NUM_ROWS, P, W)).astype(np.float32)
    logits_NPC = generator.normal(1, 4, (NUM_ROWS, P, C)).astype(np.float32)
    token_ids = generator.integers(0, C, (NUM_ROWS, P + 1))
    position_ids = np.tile([0, 1, 2, 0, 1, 2], (NUM_ROWS, 1))
    position_ids[::2] = np.arange(P + 1)
    token_ids[-1, -2:] = position_ids[-1, -2:] = 0
    return hidden_NPW, logits_NPC, token_ids, position_ids


def teacher_logits(store: Stranger) -> Array:
    """What the teacher said of the rows with targets, float64 (R, C)."""
    hidden_NPW, logits_NPC, _, _ = what_make_draws()
    num_positions = P if "sequences" in store.manifest else 1
    if store.head is None:
        return logits_NPC[store.rows, :num_positions].reshape(-1, C).astype(np.float64)
    weight, bias = (None if values is None else values.astype(np.float64) for values in store.head)
    assert weight is not None
    logits_RC: Array = hidden_NPW[store.rows, :num_positions].reshape(-1, W).astype(np.float64) @ weight.T
    logits_RC = 0.5 * (logits_RC if bias is None else logits_RC + bias)
    return logits_RC if bias is None else 20 * np.tanh(logits_RC / 20)


def flat(store: Stranger, name: str) -> Array:
    """An array of the rows with targets, one distribution after the other."""
    values = store.arrays[name][store.rows]
    return values.reshape(-1, *values.shape[2:]) if "sequences" in store.manifest else values


def test_the_manifest_has_the_fields_of_the_page(store: Stranger) -> None:
    encoding, is_sequence = store.manifest["encoding"], store.path.name != "hidden.h5"
    optional = {"sequences"} if is_sequence else set()
    optional |= {"lineage"} if store.path.name == "topk.zarr" else set()
    assert set(store.manifest) == set(MANIFEST.split()) | optional
    assert store.manifest["format_version"] == "1.1"
    assert encoding.pop("per", None) == ("position" if is_sequence else None)
    expected = {
        "topk": {"name", "k", "values"},
        "sample": {"name", "draws", "seed"},
        "hidden": {"name", "width", "values", "scale", "soft_cap", "has_bias", "head_sha256"},
    }
    assert set(encoding) == expected[encoding["name"]]
    assert all(f"`{name}`" in FORMAT.read_text() for name in (*store.manifest, *encoding))
    if is_sequence:
        said = store.manifest["sequences"]
        assert set(said) == {"num_positions", "has_tokens", "tokenizer", "num_padded"}
        assert (said["num_positions"], said["num_padded"]) == (P, 4)
        assert said["tokenizer"] == ("ef" * 32 if said["has_tokens"] else None)
        assert store.manifest["class_names"] is None
        assert not store.manifest["has_hard_targets"]
    for origin in store.manifest.get("lineage", []):
        assert set(origin) == {"content_digest", "encoding", "temperatures"}


def test_arrays_have_the_types_and_shapes_of_the_page(store: Stranger) -> None:
    manifest, encoding = store.manifest, store.manifest["encoding"]
    num_temperatures = len(manifest["temperatures"])
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "max_logit": ("float32", ()),
        "entropy": ("float16", ()),
        "hard_target_logprob": ("float16", ()),
        "lse": ("float32", (num_temperatures,)),
    }
    if encoding["name"] == "topk":
        expected |= {"ids": ("uint16", (encoding["k"],)), "log_tail": ("float32", (num_temperatures,))}
        expected |= {"values": (encoding["values"], (encoding["k"],))}
        expected |= {"value_range": ("float32", ())} if encoding["values"] == "uint8" else {}
    elif encoding["name"] == "sample":
        places = (min(encoding["draws"], C),)
        expected |= {"ids": ("uint16", places), "counts": ("uint8", places)}
    else:
        expected |= {"hidden": (encoding["values"], (encoding["width"],))}
    if "sequences" in manifest:
        expected = {name: (dtype, (P, *shape)) for name, (dtype, shape) in expected.items()}
        if manifest["sequences"]["has_tokens"]:
            expected |= {"token_ids": ("uint16", (P + 1,)), "position_ids": ("uint8", (P + 1,))}
    else:
        expected |= {"hard_target": ("int32", ())}
    expected |= {"status": ("uint8", ()), "sample_digest": ("uint64", ())}
    assert {name: (values.dtype.name, values.shape) for name, values in store.arrays.items()} == {
        name: (dtype, (NUM_ROWS, *shape)) for name, (dtype, shape) in expected.items()
    }


def test_tokens_positions_and_masks_are_those_of_the_corpus(sequences: Stranger) -> None:
    _, _, token_ids, position_ids = what_make_draws()
    rows = sequences.rows
    if "token_ids" in sequences.arrays:
        np.testing.assert_array_equal(sequences.arrays["token_ids"][rows], token_ids[rows])
        np.testing.assert_array_equal(sequences.arrays["position_ids"][rows], position_ids[rows])
        found = (sequences.arrays[name] for name in ("token_ids", "position_ids"))
        targets = snippets()["next_tokens"](*found)[rows]
        token_ids[:, 3][position_ids[:, 3] == 0] = -1
        token_ids[-1, -2:] = -1
        np.testing.assert_array_equal(targets, token_ids[rows, 1:])
    is_masked = position_ids[rows, 1:] == 0
    np.testing.assert_array_equal(np.isnan(sequences.arrays["hard_target_logprob"][rows]), is_masked)
    assert is_masked.any()


def test_statistics_are_those_of_the_formulas_at_every_position(store: Stranger) -> None:
    logits_RC = teacher_logits(store)
    centred_RC = logits_RC - logits_RC.max(axis=1, keepdims=True)
    np.testing.assert_allclose(flat(store, "max_logit"), logits_RC.max(axis=1), rtol=1e-5)
    for column, temperature in enumerate(store.manifest["temperatures"]):
        expected = np.log(np.exp(centred_RC / temperature).sum(axis=1))
        np.testing.assert_allclose(flat(store, "lse")[:, column], expected, rtol=1e-5, atol=1e-5)
    logprobs_RC = log_softmax(centred_RC)
    entropy_R = -(np.exp(logprobs_RC) * logprobs_RC).sum(axis=1)
    np.testing.assert_allclose(flat(store, "entropy"), entropy_R, rtol=1e-3)
    _, _, token_ids, _ = what_make_draws()
    num_positions = P if "sequences" in store.manifest else 1
    target_R = token_ids[store.rows, 1 : num_positions + 1].reshape(-1)
    found_R = flat(store, "hard_target_logprob")
    known = ~np.isnan(found_R)
    np.testing.assert_allclose(found_R[known], logprobs_RC[np.arange(len(target_R)), target_R][known], rtol=1e-3)


def test_log_probabilities_of_topk_are_the_teachers_at_every_position(sequences: Stranger) -> None:
    if sequences.manifest["encoding"]["name"] != "topk":
        return
    kept = {name: flat(sequences, name) for name in sequences.arrays if sequences.arrays[name].shape[1:2] == (P,)}
    logits_RC = teacher_logits(sequences)
    order_RC = np.argsort(-logits_RC, axis=1, kind="stable")
    num_kept = sequences.manifest["encoding"]["k"]
    np.testing.assert_array_equal(kept["ids"], order_RC[:, :num_kept])
    error_R = kept["value_range"] / 510 if "value_range" in kept else np.full(len(logits_RC), 40 * 2**-11)
    for temperature in sequences.manifest["temperatures"]:
        found = snippets()["log_probs"](sequences.manifest, dict(kept), temperature)
        sorted_RC = np.take_along_axis(log_softmax(logits_RC / temperature), order_RC, axis=1)
        tail_R = np.log(np.exp(sorted_RC[:, num_kept:]).sum(axis=1))
        expected = np.concatenate([sorted_RC[:, :num_kept], tail_R[:, None]], axis=1)
        assert (abs(found - expected) <= 2 * error_R[:, None] / temperature + 1e-5).all()
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-6)


def test_the_page_gives_the_random_numbers_of_numpy() -> None:
    uniform: Any = snippets()["uniform"]
    for seed, row in ((0, 0), (2**64 - 3, 6), (12345, 10**12)):
        words = np.random.Philox(key=np.array([seed, row], np.uint64)).random_raw(11) >> np.uint64(11)
        assert [uniform(seed, row, position) for position in range(11)] == (words * 2.0**-53).tolist()


@pytest.mark.parametrize("name", ["sample.zarr", "sample.h5"])
def test_draws_are_those_that_the_page_computes(name: str) -> None:
    store = Stranger(GOLDEN / "v1.1" / name)
    encoding, (temperature,) = store.manifest["encoding"], store.manifest["temperatures"]
    probs_RC = np.exp(log_softmax(teacher_logits(store) / temperature))
    uniform: Any = snippets()["uniform"]
    uniform_R = [uniform(encoding["seed"], int(row), position) for row in store.rows for position in range(P)]
    ids_RD, counts_RD = flat(store, "ids"), flat(store, "counts")
    shares_RD = np.exp(snippets()["log_probs"](store.manifest, {"counts": counts_RD}, temperature))
    for row, (probs_C, u) in enumerate(zip(probs_RC, uniform_R, strict=True)):
        below_C = np.clip(np.ceil(encoding["draws"] * np.cumsum(probs_C) - u), 0, encoding["draws"])
        below_C[-1] = encoding["draws"]
        counts_C = np.diff(below_C, prepend=0)
        drawn = np.flatnonzero(counts_C)
        assert ids_RD[row].tolist() == drawn.tolist() + [0] * (ids_RD.shape[1] - len(drawn))
        assert counts_RD[row, : len(drawn)].tolist() == counts_C[drawn].tolist()
        assert not counts_RD[row, len(drawn) :].any()
        assert counts_RD[row].sum() == encoding["draws"]
        np.testing.assert_allclose(shares_RD[row].sum(), 1)
        assert (abs(shares_RD[row, : len(drawn)] - probs_C[drawn]) < 1 / encoding["draws"]).all()


@pytest.mark.parametrize("name", ["hidden.zarr", "hidden.h5"])
def test_the_head_is_the_one_that_the_manifest_names_and_gives_the_teachers_distribution(name: str) -> None:
    store = Stranger(GOLDEN / "v1.1" / name)
    encoding = store.manifest["encoding"]
    assert list(store.head_bytes) == ["weight.npy", "bias.npy"][: 1 + encoding["has_bias"]]
    digest = hashlib.sha256(b"".join(store.head_bytes.values())).hexdigest()
    assert digest == encoding["head_sha256"]
    assert all(data.startswith(b"\x93NUMPY\x01\x00") for data in store.head_bytes.values())
    assert store.head is not None
    weight, bias = (None if values is None else abs(values.astype(np.float64)) for values in store.head)
    assert weight is not None
    assert weight.shape == (C, W)
    assert (bias is not None) == encoding["has_bias"] == (encoding["soft_cap"] is not None)
    hidden_RW = flat(store, "hidden")
    size_RC = abs(hidden_RW.astype(np.float64)) @ weight.T + (0 if bias is None else bias)
    bound_R = 2.0**-10 * abs(encoding["scale"]) * size_RC.max(axis=1)
    for temperature in (0.5, 1.0, 3.0):  # declared or not
        found = snippets()["log_probs"](store.manifest, {"hidden": hidden_RW}, temperature, store.head)
        expected = log_softmax(teacher_logits(store) / temperature)
        assert (abs(found - expected) <= 2 * bound_R[:, None] / temperature + 1e-5).all()


def test_quarantined_rows_hold_no_targets_and_say_why(store: Stranger) -> None:
    entries = {entry["row"]: entry for seal in store.seals for entry in seal["quarantine"]}
    refused = [row for row in (1, 4) if row in store.sealed]
    assert sorted(entries) == [row for row in store.sealed if store.arrays["status"][row] != 0] == refused
    for row in refused:
        assert entries[row] == {"row": row, "key": f"sample-{row}", "reason": REASONS[row]}
        assert store.arrays["status"][row] == {1: 2, 4: 1}[row]
        for name, values in store.arrays.items():
            if values.dtype.kind == "f":
                assert np.isnan(values[row]).all(), name
            elif name in ("ids", "counts"):
                assert not values[row].any(), name
            elif name in ("token_ids", "position_ids"):
                assert values[row].any() == (row == 1), name


def test_rows_that_are_not_sealed_read_as_no_legal_row() -> None:
    store = Stranger(GOLDEN / "v1.1" / "sample.h5")
    assert [seal["shard"] for seal in store.seals] == [1]
    assert (store.arrays["status"][:4] == 255).all()
    assert np.isnan(store.arrays["lse"][:4]).all()
    assert not store.arrays["counts"][:4].any()
