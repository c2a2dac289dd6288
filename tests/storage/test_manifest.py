"""A manifest comes back as it was, and refuses what can't be."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encodings import Dense, TopK
from storage.errors import DamageError, FormatVersionError
from storage.manifest import Manifest
from storage.records import content_digest, manifest_bytes, parse_manifest
from tests.contracts.small import ENCODINGS, small_manifest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)
manifests = st.builds(
    small_manifest,
    num_rows=st.integers(1, 10**9),
    num_classes=st.integers(5, 10**5),
    encoding=st.sampled_from(list(ENCODINGS.values())),
    temperatures=st.sets(st.floats(0.01, 100), min_size=1, max_size=4).map(lambda values: tuple(sorted(values))),
    teacher=objects,
    corpus=objects,
    preprocess=objects,
    provenance=objects,
    has_hard_targets=st.booleans(),
    compressor=st.sampled_from(["none", "zstd"]),
)


@given(manifests)
def test_a_manifest_comes_back_from_its_bytes(manifest: Manifest) -> None:
    assert parse_manifest(manifest_bytes(manifest), "here") == manifest
    assert manifest.differences(manifest) == []


@given(manifests)
def test_what_a_later_minor_version_adds_is_kept_and_told_in_the_content_digest(manifest: Manifest) -> None:
    value = manifest.to_json() | {"format_version": "1.7", "added": {"later": 1}}
    read = Manifest.from_json(value)
    assert read.format_version == "1.7"
    assert read.to_json() == value
    said = {name: value[name] for name in value if name not in ("provenance", "compressor", "chunk_rows")}
    assert read.identity() == said
    assert content_digest(read, []) != content_digest(manifest, [])


def test_whole_numbers_as_temperatures_give_the_same_bytes() -> None:
    assert manifest_bytes(small_manifest(temperatures=(1, 4))) == manifest_bytes(
        small_manifest(temperatures=(1.0, 4.0))
    )


def test_packing_and_provenance_are_no_part_of_the_content_digest() -> None:
    other = small_manifest(chunk_rows=2, compressor="zstd", provenance={"x": 1})
    assert content_digest(other, []) == content_digest(small_manifest(), [])
    changes: list[dict[str, Any]]
    changes = [{"shard_rows": 12}, {"teacher": {}}, {"num_rows": 23}, {"temperatures": (1.0,)}]
    for fields in changes:
        assert content_digest(small_manifest(**fields), []) != content_digest(small_manifest(), [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_rows": 0}, "num_rows: expected a whole number, at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"temperatures": ()}, r"temperatures: expected numbers above 0, got \[\]"),
        ({"temperatures": (0.0,)}, "temperatures: expected numbers above 0"),
        ({"temperatures": (1.0, float("inf"))}, "temperatures: expected numbers above 0"),
        ({"temperatures": (float("nan"),)}, "temperatures: expected numbers above 0"),
        ({"temperatures": (4.0, 1.0)}, "temperatures: expected ascending, each once"),
        ({"temperatures": (1.0, 1.0)}, "temperatures: expected ascending, each once"),
        ({"class_names": ("a",)}, "class_names: expected one for each of 5 classes, got 1"),
        ({"compressor": "lz4"}, "compressor: expected none or zstd, got 'lz4'"),
        ({"encoding": TopK(6)}, r"k: expected at most the number of classes \(5\), got 6; use a smaller k"),
        (
            {"encoding": Dense("float32"), "num_classes": 10**6, "chunk_rows": 1024, "shard_rows": 1024},
            "chunk_rows: expected chunks of at most 2,147,483,584 bytes, got 4,096,000,000 in 'values'; use fewer rows",
        ),
    ],
)
def test_a_manifest_that_can_not_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_manifest(**fields)


@pytest.mark.parametrize("value", [{}, [], "text", None, {"format": "zip"}])
def test_something_else_is_no_manifest(value: Any) -> None:
    with pytest.raises(FormatVersionError, match="manifest: expected the format 'logit-store', got another"):
        Manifest.from_json(value)


def test_stored_manifests_that_can_not_be_are_damage() -> None:
    value = small_manifest().to_json()
    with pytest.raises(DamageError, match="manifest: expected a format version, got 'x'"):
        Manifest.from_json(value | {"format_version": "x"})
    with pytest.raises(DamageError, match="manifest: expected a valid num_rows"):
        Manifest.from_json(value | {"num_rows": 0})
    with pytest.raises(DamageError, match="manifest: expected a valid 'corpus'; take another copy"):
        Manifest.from_json({name: value[name] for name in value if name != "corpus"})
    for wrong in ({"num_rows": "many"}, {"temperatures": 1}, {"class_names": 3}, {"encoding": 3}):
        with pytest.raises(DamageError, match="manifest: expected a valid"):
            Manifest.from_json(value | wrong)


def test_newer_formats_and_encodings_are_refused() -> None:
    value = small_manifest().to_json()
    with pytest.raises(FormatVersionError, match=r"expected format version 1.x, got 2.0; install a newer release"):
        Manifest.from_json(value | {"format_version": "2.0"})
    with pytest.raises(FormatVersionError, match="expected an encoding of dense, topk, sample, hidden, got 'wave'"):
        Manifest.from_json(value | {"encoding": {"name": "wave"}})
    with pytest.raises(FormatVersionError, match=r"options of the encoding 'dense' that this release knows, got \['b'"):
        Manifest.from_json(value | {"encoding": {"name": "dense", "b": 1}})


def test_differences_name_fields_and_both_values() -> None:
    mine = small_manifest(teacher={"digest": "a" * 100, "kind": "export"})
    theirs = replace(mine, teacher={"digest": "b", "kind": "export"}, temperatures=(1.0,), provenance={"x": 1})
    found = mine.differences(theirs)
    assert found[0] == "temperatures: the store has [1.0, 4.0], this run [1.0]"
    assert found[1].startswith('teacher.digest: the store has "aaaa')
    assert found[1].endswith('..., this run "b"')
    assert len(found) == 2


def test_a_manifest_is_json_that_a_person_can_read() -> None:
    text = manifest_bytes(small_manifest()).decode()
    assert text.startswith('{\n  "format": "logit-store",\n  "format_version": "1.0",\n  "num_rows": 22')
    assert json.loads(text) == small_manifest().to_json()
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest_bytes(small_manifest(teacher={"x": float("nan")}))
