"""Sequences: their arrays, their flat positions, and which of them have a hard target."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.arrays import Array, ArraySpec, float_array
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.manifest import Manifest
from storage.sequences import Sequences, at_positions, flatten_positions, next_tokens, target_mask
from tests.contracts.small import small_manifest
from tests.storage.soft_targets import hidden_encoding, sequences_of


def manifest_of(encoding: Encoding, num_classes: int = 300, **fields: Any) -> Manifest:
    temperatures = (1.0,) if isinstance(encoding, Sample) else (1.0, 4.0)
    return small_manifest(
        encoding=encoding, num_classes=num_classes, temperatures=temperatures, sequences=sequences_of(7, **fields)
    )


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (Dense("float16"), {"values": ("float16", (7, 300))}),
        (Dense("uint8"), {"values": ("uint8", (7, 300)), "value_range": ("float32", (7,))}),
        (TopK(9), {"ids": ("uint16", (7, 9)), "values": ("float16", (7, 9)), "log_tail": ("float32", (7, 2))}),
        (Sample(20), {"ids": ("uint16", (7, 20)), "counts": ("uint8", (7, 20))}),
        (hidden_encoding(300, 6), {"hidden": ("float16", (7, 6))}),
    ],
)
def test_every_array_of_a_distribution_has_the_positions_behind_the_rows(
    encoding: Encoding, expected: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    manifest = manifest_of(encoding)
    common = {
        "max_logit": ("float32", (7,)),
        "lse": ("float32", (7, len(manifest.temperatures))),
        "entropy": ("float16", (7,)),
        "hard_target_logprob": ("float16", (7,)),
        "status": ("uint8", ()),
        "sample_digest": ("uint64", ()),
        "token_ids": ("uint16", (8,)),
        "position_ids": ("uint8", (8,)),
    }
    found = {spec.name: (spec.dtype, spec.row_shape) for spec in manifest.arrays}
    assert found == common | expected
    assert [spec.name for spec in manifest.arrays] == sorted(found)


def test_a_store_without_tokens_has_no_array_of_them() -> None:
    names = {spec.name for spec in manifest_of(TopK(3), has_tokens=False).arrays}
    assert not names & {"token_ids", "position_ids", "hard_target"}
    assert "hard_target_logprob" in names


@pytest.mark.parametrize(
    ("num_classes", "num_positions", "types"),
    [(256, 255, ["uint8", "uint8"]), (257, 256, ["uint16", "uint16"]), (151_936, 70_000, ["uint32", "uint32"])],
)
def test_tokens_take_the_smallest_type_that_holds_them(num_classes: int, num_positions: int, types: list[str]) -> None:
    specs = Sequences(num_positions, True, None, 0).arrays(num_classes)
    assert [(spec.name, spec.dtype, spec.row_shape) for spec in specs] == [
        ("token_ids", types[0], (num_positions + 1,)),
        ("position_ids", types[1], (num_positions + 1,)),
    ]


def test_arrays_of_rows_stay_and_others_keep_their_fill() -> None:
    sequences = Sequences(3, True, None, 0)
    status = ArraySpec("status", "uint8", (), 255)
    assert at_positions(status, sequences) is status
    spec = at_positions(float_array("lse", "float32", 2), sequences)
    assert (spec.row_shape, np.isnan(spec.fill_value)) == ((3, 2), True)


def test_flat_positions_are_views_of_what_is_of_positions() -> None:
    manifest = manifest_of(TopK(3))
    arrays = {spec.name: spec.full(4) for spec in manifest.arrays}
    flat = flatten_positions(manifest.sequences, arrays)
    assert set(flat) == set(arrays) - {"status", "sample_digest", "token_ids", "position_ids"}
    assert flat["values"].shape == (28, 3)
    assert flat["entropy"].shape == (28,)
    assert flat["lse"].shape == (28, 2)
    assert all(np.shares_memory(values, arrays[name]) for name, values in flat.items())
    arrays["values"][2, 5, 1] = -7
    assert flat["values"][2 * 7 + 5, 1] == -7


def test_rows_of_one_distribution_are_flat_as_they_are() -> None:
    arrays: dict[str, Array] = {"status": np.zeros(3, np.uint8), "lse": np.zeros((3, 2), np.float32)}
    assert flatten_positions(None, arrays) == arrays


documents = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=5), min_size=1, max_size=6)


@given(documents, st.integers(0, 3))
def test_hard_targets_are_the_next_tokens_of_the_same_document(texts: list[list[int]], num_padding: int) -> None:
    tokens = [token for text in texts for token in text] + [0] * num_padding
    positions = [place for text in texts for place in range(len(text))] + [0] * num_padding
    token_ids, position_ids = np.array([tokens], np.uint16), np.array([positions], np.uint8)
    expected = [text[place + 1] if place + 1 < len(text) else -1 for text in texts for place in range(len(text))] + [
        -1
    ] * num_padding
    found = next_tokens(token_ids, position_ids)
    assert found.dtype == np.int32
    assert found.tolist() == [expected[:-1]]
    assert target_mask(position_ids).tolist() == [[target >= 0 for target in expected[:-1]]]


def test_a_large_vocabulary_fits_the_hard_targets() -> None:
    token_ids: Array = np.array([[1, 151_935]], np.uint32)
    assert next_tokens(token_ids, np.array([[0, 1]], np.uint32)).tolist() == [[151_935]]


def test_they_come_back_from_json_with_what_a_later_version_adds() -> None:
    value = sequences_of(7).to_json()
    assert value == {"num_positions": 7, "has_tokens": True, "tokenizer": "ef" * 32, "num_padded": 2}
    assert Sequences.from_json(value) == sequences_of(7)
    later = value | {"views": {"a": 1}}
    assert Sequences.from_json(later).to_json() == later
    with pytest.raises(KeyError, match="num_padded"):
        Sequences.from_json({name: value[name] for name in value if name != "num_padded"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_positions": 0}, "num_positions: expected a whole number, at least 1, got 0"),
        ({"num_positions": 1.5}, "num_positions: expected a whole number, at least 1, got 1.5"),
        ({"num_padded": -1}, "num_padded: expected a whole number, at least 0, got -1"),
        ({"num_padded": "2"}, "num_padded: expected a whole number, at least 0, got 2"),
        ({"has_tokens": 1}, "has_tokens: expected true or false, got 1"),
        ({"tokenizer": 5}, "tokenizer: expected a fingerprint or None, got 5"),
    ],
)
def test_sequences_that_can_not_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequences_of(**fields)
