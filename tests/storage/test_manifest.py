"""A manifest comes back as it was, and refuses what can't be."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.encodings import Dense, Sample, TopK
from storage.errors import DamageError, FormatVersionError
from storage.layout import MAX_SHARDS
from storage.manifest import Manifest
from storage.records import content_digest, manifest_bytes, parse_manifest
from storage.sequences import Sequences
from tests.contracts.small import ENCODINGS, LATER, small_manifest
from tests.storage.soft_targets import hidden_encoding, sequences_of

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)

common: dict[str, Any] = {
    "num_rows": st.integers(1, 8 * MAX_SHARDS),
    "teacher": objects,
    "corpus": objects,
    "preprocess": objects,
    "provenance": objects,
    "compressor": st.sampled_from(["none", "zstd"]),
    "lineage": st.none() | st.lists(objects, max_size=2).map(tuple),
}
classified = st.builds(
    small_manifest,
    **common,
    num_classes=st.integers(5, 10**5),
    encoding=st.sampled_from(list(ENCODINGS.values())),
    temperatures=st.sets(st.floats(0.01, 100), min_size=1, max_size=4).map(lambda values: tuple(sorted(values))),
    has_hard_targets=st.booleans(),
)
sequences = st.builds(
    Sequences,
    num_positions=st.integers(1, 5000),
    has_tokens=st.booleans(),
    tokenizer=st.none() | st.text(),
    num_padded=st.integers(0, 100),
    extra=st.dictionaries(st.text(min_size=1).map("x-".__add__), json_values, max_size=2),
)
later = st.sampled_from(sorted(LATER)).flatmap(
    lambda name: st.builds(
        small_manifest,
        **common,
        encoding=st.just(LATER[name]["encoding"]),
        temperatures=st.just(LATER[name].get("temperatures", (1.0, 4.0))),
        sequences=sequences if "sequences" in LATER[name] else st.none(),
    )
)
manifests = classified | later


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


ORIGIN = {"content_digest": "ab" * 32, "encoding": {"name": "dense", "values": "float16"}, "temperatures": [1.0]}


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, "1.0"),
        ({"encoding": Dense()}, "1.0"),
        ({"lineage": (ORIGIN,)}, "1.1"),
        ({"sequences": sequences_of()}, "1.1"),
        ({"encoding": Sample(3), "temperatures": (1.0,)}, "1.1"),
        ({"encoding": hidden_encoding(5)}, "1.1"),
    ],
)
def test_a_store_is_of_the_lowest_version_that_has_all_that_it_keeps(fields: dict[str, Any], version: str) -> None:
    value = small_manifest(**fields).to_json()
    assert value["format_version"] == version
    assert set(value) & {"sequences", "lineage"} == set(fields) & {"sequences", "lineage"}
    assert value["encoding"].get("per") == ("position" if "sequences" in fields else None)


def test_lineage_and_sequences_are_part_of_the_content_digest() -> None:
    manifests = [
        small_manifest(has_hard_targets=False, **fields)
        for fields in (
            {},
            {"lineage": (ORIGIN,)},
            {"lineage": (ORIGIN, ORIGIN)},
            {"sequences": sequences_of(5)},
            {"sequences": sequences_of(5, tokenizer=None)},
            {"sequences": sequences_of(5, extra={"later": 1})},
        )
    ]
    assert len({content_digest(manifest, []) for manifest in manifests}) == 6


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
        ({"num_classes": 0}, "num_classes: expected 1 to 4,194,304, got 0"),
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
            {"encoding": Sample(3)},
            "temperatures: expected one for sample, which draws at it, got 2; declare the one that",
        ),
        (
            {"sequences": sequences_of(), "class_names": tuple("abcde")},
            "sequences: expected neither class names nor hard targets beside them, got some",
        ),
        (
            {"sequences": sequences_of(), "has_hard_targets": True},
            "sequences: expected neither class names nor hard targets beside them, got some",
        ),
        (
            {"encoding": Dense(), "num_classes": 50_257, "sequences": sequences_of(8192), "chunk_rows": 4},
            "got 3,293,642,752 in 'values'; use fewer rows a chunk",
        ),
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
    wrong: dict[str, Any]
    for wrong in ({"num_rows": "many"}, {"temperatures": 1}, {"class_names": 3}, {"encoding": 3}, {"lineage": [3]}):
        with pytest.raises(DamageError, match="manifest: expected a valid"):
            Manifest.from_json(value | wrong)
    value = small_manifest(sequences=sequences_of()).to_json()
    for wrong in ({"sequences": None}, {"sequences": {}}, {"sequences": value["sequences"] | {"num_positions": 0}}):
        with pytest.raises(DamageError, match="manifest: expected a valid"):
            Manifest.from_json(value | wrong)


def test_sequences_and_what_makes_a_reader_of_1_0_refuse_them_come_together() -> None:
    value = small_manifest(sequences=sequences_of()).to_json()
    plain = {name: value["encoding"][name] for name in ("name", "k", "values")}
    assert value["encoding"] == plain | {"per": "position"}
    for encoding in (plain, plain | {"per": "row"}):
        with pytest.raises(DamageError, match='encoding: "per": "position" beside sequences; take another copy'):
            Manifest.from_json(value | {"encoding": encoding})
    with pytest.raises(
        FormatVersionError, match=r"that this release knows, got \['k', 'per', 'values'\]; install a new"
    ):
        Manifest.from_json({name: value[name] for name in value if name != "sequences"})


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
    sequences = replace(mine, has_hard_targets=False, sequences=sequences_of(5))
    longer = replace(sequences, sequences=sequences_of(6, tokenizer="x"))
    assert sequences.differences(longer) == [
        "sequences.num_positions: the store has 5, this run 6",
        f'sequences.tokenizer: the store has "{"ef" * 32}", this run "x"',
    ]
    other = small_manifest(encoding=hidden_encoding(5))
    assert other.differences(small_manifest(encoding=replace(hidden_encoding(5), head_sha256="x")))[0].startswith(
        "encoding.head_sha256: the store has "
    )


def test_a_manifest_is_json_that_a_person_can_read() -> None:
    text = manifest_bytes(small_manifest()).decode()
    assert text.startswith('{\n  "format": "logit-store",\n  "format_version": "1.0",\n  "num_rows": 22')
    assert json.loads(text) == small_manifest().to_json()
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest_bytes(small_manifest(teacher={"x": float("nan")}))
