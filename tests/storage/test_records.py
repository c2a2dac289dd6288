"""Records can tell whether a bit of them was changed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import untrusted
from storage.errors import DamageError, FormatVersionError
from storage.records import Final, QuarantineEntry, Seal, array_digests, canonical, parse_manifest

SEAL = Seal(
    3,
    24,
    32,
    "ab",
    {"lse": "cd"},
    {"lse/c/3": {"num_bytes": 1, "xxh3_128": "ef"}},
    (QuarantineEntry(25, "ü", "no \udcff"),),
)
FINAL = Final("ab", True, 32, 1, (0, 1, 3), "cd", "ef", {})


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_canonical_json_is_one_ascii_line_that_comes_back(value: dict[str, object]) -> None:
    data = canonical(value)
    assert json.loads(data) == value
    assert data.isascii()
    assert b"\n" not in data
    assert canonical(dict(reversed(value.items()))) == data


def test_canonical_json_has_no_nan() -> None:
    assert canonical({"b": 1, "a": [1.0, None]}) == b'{"a":[1.0,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_records_come_back() -> None:
    assert Seal.from_bytes(SEAL.to_bytes(), "here") == SEAL
    assert Final.from_bytes(FINAL.to_bytes(), "here") == FINAL
    assert json.loads(FINAL.to_bytes())["sealed"] == [[0, 2], [3, 4]]


def test_every_flipped_bit_of_a_record_is_found() -> None:
    for record, kind in ((SEAL, Seal), (FINAL, Final)):
        data = record.to_bytes()
        for byte in range(len(data)):
            for bit in range(8):
                changed = bytearray(data)
                changed[byte] ^= 1 << bit
                with pytest.raises(DamageError, match=r"here: expected (its checksum to hold|JSON), got"):
                    kind.from_bytes(bytes(changed), "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{}", b"\xff", b'{"record_sha256": 3}', b"[" * 100_000])
def test_something_else_is_no_record(data: bytes) -> None:
    for kind in (Seal, Final):
        with pytest.raises(DamageError, match=r"here: expected (its checksum to hold|JSON), got"):
            kind.from_bytes(data, "here")


def test_signed_records_of_another_kind_are_refused() -> None:
    with pytest.raises(DamageError, match="here: expected a seal record, got"):
        Seal.from_bytes(FINAL.to_bytes(), "here")
    with pytest.raises(DamageError, match="here: expected a final record, got"):
        Final.from_bytes(SEAL.to_bytes(), "here")


def test_a_record_that_is_too_large_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_RECORD_BYTES", 10)
    with pytest.raises(DamageError, match="here: expected at most 10 bytes, got 11; this is no logit store"):
        parse_manifest(b"{          ", "here")


def test_a_manifest_must_be_json_and_one_of_ours() -> None:
    with pytest.raises(DamageError, match="here: expected JSON, got something else"):
        parse_manifest(b"{", "here")
    with pytest.raises(FormatVersionError, match="is this a logit store"):
        parse_manifest(b"{}", "here")


def test_array_digests_depend_on_values_not_on_how_they_lie() -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    expected = array_digests({"x": values})
    assert array_digests({"x": np.asfortranarray(values)}) == expected
    assert array_digests({"x": values.astype(">f4")}) == expected
    assert array_digests({"x": values + 1}) != expected
    assert len(array_digests({"x": values[:0]})["x"]) == 64
