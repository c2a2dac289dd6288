"""`convert`: the new store says just what the old one says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.encodings import Dense, Encoding, TopK
from storage.errors import DamageError, MismatchError, NotSealedError, PathError
from storage.reader import open_store
from storage.records import sha256
from storage.scan import convert, verify
from tests.storage.scan_stores import manifest_of, write_store


def bytes_of_rows(path: Path) -> dict[str, bytes]:
    """Every sealed row of every array, NaN and all."""
    with open_store(path) as store:
        names = [spec.name for spec in store.manifest.arrays]
        return {name: values.tobytes() for name, values in store.read(names, 0, store.num_sealed_rows).items()}


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("uint8"), TopK(3)])
@pytest.mark.parametrize("compressor", ["none", "zstd"])
@pytest.mark.parametrize("shards", [2, 3])
def test_there_and_back_again_every_byte_is_the_same(
    tmp_path: Path, encoding: Encoding, compressor: str, shards: int
) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=encoding, compressor=compressor), shards)
    there = convert(source, tmp_path / "b.h5")
    back = convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    with open_store(source) as store:
        assert there.content_digest == back.content_digest == store.content_digest
        quarantine = store.quarantine()
    assert bytes_of_rows(source) == bytes_of_rows(tmp_path / "b.h5") == bytes_of_rows(tmp_path / "c.zarr")
    for path in (tmp_path / "b.h5", tmp_path / "c.zarr"):
        assert verify(path).ok
        with open_store(path) as store:
            assert store.quarantine() == quarantine
            assert store.manifest.compressor == compressor


def test_the_provenance_is_kept_and_says_where_the_store_comes_from(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    result = convert(source, tmp_path / "b.h5", "zstd")
    with open_store(tmp_path / "b.h5") as store:
        assert store.manifest.provenance == {
            "made": "2020-01-01",
            "converted_from": {
                "content_digest": result.content_digest,
                "manifest_sha256": sha256((tmp_path / "a.zarr" / "manifest.json").read_bytes()),
                "name": "a.zarr",
                "compressor": "none",
            },
        }
        assert store.manifest.compressor == "zstd"
    assert result.num_rows == 22
    assert result.num_bytes == (tmp_path / "b.h5").stat().st_size


def stop_after(num_calls: int) -> Callable[[int], None]:
    """A progress callback that raises, as a kill would, when it is called once more than so often."""
    calls = []

    def progress(num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) > num_calls:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("target", ["b.h5", "b.zarr"])
@pytest.mark.parametrize("num_calls", range(6))
def test_a_conversion_that_was_stopped_goes_on(tmp_path: Path, target: str, num_calls: int) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / target, num_workers=1, progress=stop_after(num_calls))
    counted: list[int] = []
    result = convert(source, tmp_path / target, progress=counted.append)
    assert sum(counted) == 2 * 22
    assert bytes_of_rows(source) == bytes_of_rows(tmp_path / target)
    assert convert(source, tmp_path / target) == result  # and once more: it is there


def test_an_unfinished_store_is_not_converted(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    with pytest.raises(NotSealedError, match="expected a finalized store, got one that is not; finish the dump, or"):
        convert(source, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5.parts").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.h5", manifest_of())  # the same rows, but made by another hand
    with pytest.raises(MismatchError, match="expected nothing, or this conversion begun, got another store"):
        convert(source, other)
    begun = write_store(tmp_path / "c.zarr", manifest_of(), shards=1, finalize=False)
    with pytest.raises(MismatchError, match="got another store; give another path"):
        convert(source, begun)
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else"):
        convert(source, tmp_path / "d.zarr")
    (tmp_path / "e.h5").write_bytes(b"no HDF5")
    with pytest.raises(PathError, match="expected an HDF5 file, got something else"):
        convert(source, tmp_path / "e.h5")
    convert(source, tmp_path / "f.h5")
    with pytest.raises(MismatchError, match="compressor"):
        convert(source, tmp_path / "f.h5", "zstd")


@pytest.mark.parametrize("target", ["a.zarr", "a.zarr/inside.h5"])
def test_a_store_is_not_converted_into_itself(tmp_path: Path, target: str) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    with pytest.raises(PathError, match="expected a path outside"):
        convert(source, tmp_path / target)
    assert verify(source).warnings == ()


def test_a_damaged_shard_is_not_converted(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    file = source / "values" / "c" / "1" / "0"
    data = bytearray(file.read_bytes())
    data[7] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamageError, match="array 'values', shard 1, chunk 0"):
        convert(source, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_a_shard_that_its_seal_does_not_name_is_not_converted(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(encoding=Dense("float16"), temperatures=(1.0, 5.0)))
    (source / "lse" / "c" / "0" / "0").write_bytes((other / "lse" / "c" / "0" / "0").read_bytes())
    with pytest.raises(DamageError, match="array 'lse', shard 0: expected the sealed sha256 to hold, got another"):
        convert(source, tmp_path / "c.zarr")


def test_nan_payloads_survive(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    convert(source, tmp_path / "b.h5")
    with open_store(source) as first, open_store(tmp_path / "b.h5") as second:
        one, two = (store.read(["lse"], 0, 8)["lse"].view(np.uint32) for store in (first, second))
    np.testing.assert_array_equal(one, two)


def test_a_store_that_is_packed_tightly_says_the_same(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(4), compressor="zstd"), 3)
    tight = convert(source, tmp_path / "b.zarr", "zstd-max")
    h5 = convert(source, tmp_path / "b.h5", "zstd-max")
    back = convert(tmp_path / "b.zarr", tmp_path / "c.zarr", "zstd")
    assert tight.content_digest == h5.content_digest == back.content_digest
    codecs = json.loads((tmp_path / "b.zarr" / "ids" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert codecs[1]["configuration"] | {"clevel": 9, "shuffle": "noshuffle"} == codecs[1]["configuration"]
    assert verify(tmp_path / "b.zarr").ok
    with open_store(tmp_path / "b.zarr") as packed, open_store(source) as plain:
        assert packed.manifest.compressor == "zstd"
        assert packed.manifest.is_packed_tightly
        ids = packed.read(["ids"], 0, plain.manifest.num_rows)["ids"]
        np.testing.assert_array_equal(ids, plain.read(["ids"], 0, plain.manifest.num_rows)["ids"])
    with open_store(tmp_path / "c.zarr") as plain:
        assert not plain.manifest.is_packed_tightly
