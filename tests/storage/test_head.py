"""The head's records: plain .npy files, known by their digest, and refused where they are anything else."""

import hashlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from storage.arrays import Array
from storage.encodings import HeadArrays, Hidden
from storage.errors import DamageError
from storage.head import HEAD_BIAS, HEAD_WEIGHT, check_head, head_digest, head_records, read_head
from tests.storage.soft_targets import head_of, hidden_encoding

C, W = 6, 4


def npy(values: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=values.dtype.hasobject)
    return buffer.getvalue()


def encoding_of(records: dict[str, bytes]) -> Hidden:
    """The encoding that names just these records."""
    digest = hashlib.sha256(b"".join(records.values())).hexdigest()
    return Hidden(W, has_bias=HEAD_BIAS in records, head_sha256=digest)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_head_comes_back_from_its_records(dtype: str, has_bias: bool) -> None:
    head = head_of(C, W, has_bias, dtype)
    records = head_records(head)
    assert list(records) == [HEAD_WEIGHT, HEAD_BIAS][: 1 + has_bias]
    assert head_digest(head) == hashlib.sha256(b"".join(records.values())).hexdigest()
    found = read_head(records.get, encoding_of(records), C, "here")
    np.testing.assert_array_equal(found.weight_CW, head.weight_CW)
    assert (found.bias_C is not None) == has_bias
    assert found.weight_CW.dtype == dtype
    check_head(head, encoding_of(records), C)


def test_records_do_not_depend_on_how_an_array_lies_in_memory() -> None:
    head = head_of(C, W, True)
    assert head.bias_C is not None
    swapped = HeadArrays(np.asfortranarray(head.weight_CW), head.bias_C.astype(">f2"))
    strided = HeadArrays(np.repeat(head.weight_CW, 2, axis=1)[:, ::2], head.bias_C)
    assert head_records(swapped) == head_records(strided) == head_records(head)
    assert all(data.startswith(b"\x93NUMPY\x01\x00") for data in head_records(head).values())


def test_a_missing_record_is_damage() -> None:
    records = head_records(head_of(C, W, True))
    for name in records:
        left = {other: data for other, data in records.items() if other != name}
        with pytest.raises(DamageError, match=f"here: expected {name}, got none; take another copy of the store"):
            read_head(left.get, encoding_of(records), C, "here")


def test_another_head_is_damage() -> None:
    encoding = hidden_encoding(C, W)
    other = head_records(HeadArrays(head_of(C, W).weight_CW + 1, None))
    with pytest.raises(DamageError, match=r"here: head/weight.npy: expected the digest in the manifest to hold, got"):
        read_head(other.get, encoding, C, "here")
    both = encoding_of(head_records(head_of(C, W, True)))
    with pytest.raises(DamageError, match=r"head/weight.npy and head/bias.npy: expected the digest in the manifest"):
        read_head((other | {HEAD_BIAS: b""}).get, both, C, "here")


WRONG: list[tuple[bytes, str]] = [
    (
        npy(np.zeros((C, W + 1), np.float16)),
        r"a weight of float16 or float32 \(6, 4\), got float16 \(6, 5\)",
    ),
    (npy(np.zeros((C + 1, W), np.float16)), r"got float16 \(7, 4\); dump it again"),
    (npy(np.zeros((C, W), np.float64)), r"got float64 \(6, 4\)"),
    (npy(np.full((C, W), np.nan, np.float16)), "expected a weight of finite numbers, got others"),
    (
        npy(np.full((C, W), {"not": "a float"}, object)),
        "plain .npy records, got object",
    ),
    (b"no npy", "expected plain .npy records, got"),
    (b"PK\x03\x04" + bytes(40), "expected plain .npy records, got"),
    (npy(np.zeros((C, W), np.float16))[:-3], "expected plain .npy records, got"),
    (b"", "expected plain .npy records, got"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_a_record_that_is_no_head_is_damage_though_its_digest_holds(data: bytes, message: str) -> None:
    records = {HEAD_WEIGHT: data}
    with pytest.raises(DamageError, match=message):
        read_head(records.get, encoding_of(records), C, "here")


def test_a_bias_of_another_shape_is_damage() -> None:
    records = {HEAD_WEIGHT: npy(np.zeros((C, W), np.float16)), HEAD_BIAS: npy(np.zeros((C, 1), np.float16))}
    with pytest.raises(DamageError, match=r"expected a bias of float16 or float32 \(6,\), got float16 \(6, 1\)"):
        read_head(records.get, encoding_of(records), C, "here")


def test_a_head_that_is_not_the_encodings_is_refused() -> None:
    head, both = head_of(C, W), head_of(C, W, True)
    encoding, with_bias = hidden_encoding(C, W), hidden_encoding(C, W, has_bias=True)
    cases: list[tuple[HeadArrays, Hidden, str]] = [
        (both, encoding, "head: expected no bias, got one"),
        (head, with_bias, "head: expected a bias, got none"),
        (head_of(C, W + 1), encoding, r"head: expected a weight of float16 or float32 \(6, 4\), got float16 \(6, 5\)"),
        (HeadArrays(head.weight_CW.astype(np.float64), None), encoding, "got float64"),
        (HeadArrays(head.weight_CW * np.float16(np.inf), None), encoding, "expected a weight of finite numbers"),
        (head, replace(encoding, head_sha256="00"), "head: expected the one whose digest the encoding names, got an"),
    ]
    for wrong, of, message in cases:
        with pytest.raises(ValueError, match=message):
            check_head(wrong, of, C)


def test_reading_a_head_unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("expected no pickle, got one")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    records = {HEAD_WEIGHT: WRONG[4][0]}
    with pytest.raises(DamageError, match=r"expected plain \.npy records, got object"):
        read_head(records.get, encoding_of(records), C, "here")
