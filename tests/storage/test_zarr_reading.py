"""Reading around zarr-python gives what zarr-python gives."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage.backends import ZarrBackend
from storage.backends.zarr3 import list_seal_files
from storage.errors import DamageError
from storage.reader import Store, open_store
from storage.writer import StoreWriter
from tests.contracts.small import ENCODINGS, small_manifest, write


def by_zarr(path: Path, name: str) -> Any:
    return zarr.open_array(path / name, mode="r")


@pytest.mark.parametrize("compressor", ["none", "zstd"])
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("num_rows", [21, 24])
def test_every_range_equals_what_zarr_python_reads(compressor: str, name: str, num_rows: int, tmp_path: Path) -> None:
    manifest = small_manifest(
        num_rows=num_rows, chunk_rows=3, shard_rows=9, encoding=ENCODINGS[name], compressor=compressor
    )
    with StoreWriter.open(tmp_path / "x.zarr", manifest) as writer:
        write(writer)
        for spec in manifest.arrays:
            whole = by_zarr(tmp_path / "x.zarr", spec.name)[...]
            assert whole.dtype == np.dtype(spec.dtype)
            for start in range(0, num_rows, 2):
                for stop in range(start, num_rows + 1):
                    found = writer.store.read([spec.name], start, stop)[spec.name]
                    assert found.tobytes() == whole[start:stop].tobytes()


def test_unwritten_rows_read_as_no_legal_row_in_zarr_python(tmp_path: Path) -> None:
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        write(writer, 2)
    for name in ("values", "lse", "max_logit", "entropy", "log_tail", "hard_target_logprob"):
        assert np.isnan(by_zarr(tmp_path / "x.zarr", name)[:16]).all()
        assert not np.isnan(by_zarr(tmp_path / "x.zarr", name)[16:18]).any()
    assert (by_zarr(tmp_path / "x.zarr", "status")[:16] == 255).all()
    assert (by_zarr(tmp_path / "x.zarr", "hard_target")[:16] == -1).all()


def test_backends_read_no_rows_as_none(tmp_path: Path) -> None:
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        write(writer)
        assert writer.store.backend.read("lse", 0, 3, 3).shape == (0, 2)


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        write(writer)
        expected = writer.store.read(["lse"], 0, 22)["lse"]
        whole_read = os.preadv

        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            return whole_read(descriptor, [buffers[0][:3]], offset)

        monkeypatch.setattr(os, "preadv", short)
        np.testing.assert_array_equal(writer.store.read(["lse"], 0, 22)["lse"], expected)

        def nothing(*_: object) -> int:
            return 0

        monkeypatch.setattr(os, "preadv", nothing)
        with pytest.raises(DamageError, match="'lse', shard 0, chunk 0: expected 72 bytes, got 0"):
            writer.store.read(["lse"], 0, 22)


def test_a_shard_that_was_written_again_is_not_read_by_its_old_index(tmp_path: Path) -> None:
    """Same size, same tick of the clock, another index: only the inode tells."""
    manifest = small_manifest(encoding=ENCODINGS["dense-float32"], compressor="zstd")
    path = tmp_path / "x.zarr"
    with StoreWriter.open(path, manifest) as writer:
        write(writer, 0, seed=1)
        file = path / "values" / "c" / "0" / "0"
        first = file.stat()
        old = writer.store.read(["values"], 0, 8)["values"]
        data = file.read_bytes()
        index = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2)
        sizes = index[:, 1].tolist()
        swapped = data[sizes[0] : sum(sizes)] + data[: sizes[0]]
        from google_crc32c import value as crc32c

        new_index = np.array([[0, sizes[1]], [sizes[1], sizes[0]]], "<u8").tobytes()
        other = file.with_name("0.new")
        other.write_bytes(swapped + new_index + crc32c(new_index).to_bytes(4, "little"))
        os.utime(other, ns=(first.st_atime_ns, first.st_mtime_ns))
        other.replace(file)
        found = writer.store.backend.read("values", 0, 0, 8)
        assert found.tobytes() == old[4:].tobytes() + old[:4].tobytes()


def test_a_chunk_index_that_points_elsewhere_is_damage(tmp_path: Path) -> None:
    from google_crc32c import value as crc32c

    path = tmp_path / "x.zarr"
    with StoreWriter.open(path, small_manifest()) as writer:
        write(writer)
    file = path / "lse" / "c" / "0" / "0"
    data = file.read_bytes()

    def with_index(index: list[list[int]]) -> DamageError:
        packed = np.array(index, "<u8").tobytes()
        file.write_bytes(data[:-36] + packed + crc32c(packed).to_bytes(4, "little"))
        with open_store(path) as store, pytest.raises(DamageError) as info:
            store.read(["lse"], 0, 8)
        return info.value

    whole = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2).tolist()
    nowhere = 2**64 - 1
    assert "expected chunks inside its object" in str(with_index([whole[0], [5000, 36]]))
    assert "expected chunks inside its object" in str(with_index([whole[0], [2**64 - 10, 36]]))
    assert "chunk 1: expected a chunk, got none" in str(with_index([whole[0], [nowhere, nowhere]]))
    assert "chunk 1: expected 36 bytes, got another length" in str(with_index([whole[0], [whole[1][0], 20]]))
    file.write_bytes(b"short")
    with open_store(path) as store, pytest.raises(DamageError, match="expected at least 36 bytes, got 5"):
        store.read(["lse"], 0, 8)


def test_a_compressed_chunk_whose_header_lies_is_damage(tmp_path: Path) -> None:
    from google_crc32c import value as crc32c

    path = tmp_path / "x.zarr"
    with StoreWriter.open(path, small_manifest(compressor="zstd")) as writer:
        write(writer)
    file = path / "lse" / "c" / "0" / "0"
    data = file.read_bytes()
    offset, length = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2)[0].tolist()
    for place, byte, message in ((4, 99, "bytes compressed into"), (12, 99, "bytes compressed into"), (0, 77, "")):
        chunk = bytearray(data[offset : offset + length - 4])
        chunk[place] = byte
        changed = bytes(chunk) + crc32c(bytes(chunk)).to_bytes(4, "little")
        file.write_bytes(data[:offset] + changed + data[offset + length :])
        with open_store(path) as store, pytest.raises(DamageError, match=f"shard 0, chunk 0: expected .*{message}"):
            store.read(["lse"], 0, 8)


def test_files_that_are_no_seals_are_passed_over(tmp_path: Path) -> None:
    for name in ("00000003.json", "100000000.json", "3.json", "00000004.json.lock.partial", "²²²²²²²².json", "x.json"):
        (tmp_path / name).touch()
    assert list_seal_files(tmp_path) == [3, 100_000_000]
    assert list_seal_files(tmp_path / "no") == []
    assert list_seal_files(tmp_path / "x.json") == []


def test_a_store_is_sent_to_another_process_by_its_path(tmp_path: Path) -> None:
    import copy

    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        write(writer)
        again = copy.copy(writer.store)  # by the same protocol as pickling
        assert isinstance(again, Store)
        assert isinstance(again.backend, ZarrBackend)
        assert again.path == writer.store.path
