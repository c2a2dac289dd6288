"""A flipped bit is never read as a row, wherever it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.backends import backend_for
from storage.errors import DamageError, FormatVersionError, PathError
from storage.reader import Store, open_store
from storage.records import FINAL, MANIFEST
from storage.writer import StoreWriter
from tests.contracts.small import (
    ON_DISK,
    assert_same,
    compressor_of,
    expected_rows,
    names_of,
    path_of,
    small_manifest,
    write,
)


def make(kind: str, folder: Path, is_final: bool = True) -> Path:
    path = path_of(kind, folder)
    with StoreWriter.open(path, small_manifest(compressor=compressor_of(kind))) as writer:
        write(writer)
        if is_final:
            writer.finalize()
    return path


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def read_all(path: Path) -> None:
    """Read the way that a training run does."""
    with open_store(path) as store:
        found = store.read(names_of(store.manifest), 0, store.layout.num_rows)
        assert_same(found, expected_rows(store.manifest, 0, store.layout.num_rows))


@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("kind", ["zarr-none", "zarr-zstd"])
def test_a_bit_flipped_in_any_file_of_a_zarr_store_is_found_by_reading_it(
    kind: str, is_final: bool, tmp_path: Path
) -> None:
    path = make(kind, tmp_path, is_final)
    generator = np.random.default_rng(1)
    for file in sorted(path.rglob("*")):
        if (
            file.is_dir() or file.name == "zarr.json"
        ):  # reading takes nothing from zarr.json; finalized, it has a digest
            continue
        data = file.read_bytes()
        for byte in generator.integers(0, len(data), 3).tolist():
            flip(file, byte, int(generator.integers(8)))
            with pytest.raises((DamageError, FormatVersionError)):
                read_all(path)
            file.write_bytes(data)
        file.unlink()
        if file.name != FINAL and (is_final or file.parent.name != "seals"):
            with pytest.raises((DamageError, PathError)):
                read_all(path)
        file.write_bytes(data[: len(data) // 2])
        with pytest.raises(DamageError):
            read_all(path)
        file.write_bytes(data)
    read_all(path)


@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("kind", ["hdf5-none", "hdf5-zstd"])
def test_a_bit_flipped_in_a_hdf5_store_is_found_or_does_no_harm(kind: str, is_final: bool, tmp_path: Path) -> None:
    """HDF5 has bytes that nobody reads; the digest in the user block covers those too."""
    path = make(kind, tmp_path, is_final)
    files = [path] if is_final else sorted((tmp_path / "store.h5.parts").rglob("*"))
    generator = np.random.default_rng(2)
    num_found = 0
    for file in [file for file in files if file.is_file()]:
        data = file.read_bytes()
        for byte in generator.integers(0, len(data), 60 if is_final else 10).tolist():
            flip(file, byte, int(generator.integers(8)))
            try:
                read_all(path)
            except (DamageError, FormatVersionError):
                num_found += 1
            if is_final:
                try:
                    with (
                        Store(backend_for(path)) as store,
                        pytest.raises(DamageError, match="digest of the whole file"),
                    ):
                        store.backend.check_final()
                except (DamageError, FormatVersionError):
                    pass
            file.write_bytes(data)
    assert num_found > 5
    read_all(path)


@pytest.mark.parametrize("kind", ON_DISK)
def test_damage_in_a_chunk_names_the_array_the_shard_and_the_chunk(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path, is_final=False)
    if kind.startswith("zarr"):
        file = path / "values" / "c" / "1" / "0"
        data = file.read_bytes()
        index = np.frombuffer(data[-36:-4], "<u8").reshape(2, 2)
        flip(file, int(index[1, 0]) + 1)
    else:
        file = path.parent / "store.h5.parts" / "shards" / "00000001.h5"
        import h5py

        with h5py.File(file) as part:
            chunk = part["values"].id.get_chunk_info(1)
        flip(file, chunk.byte_offset + 1)
    with open_store(path) as store:
        store.read(["values"], 0, 12)
        with pytest.raises(
            DamageError, match=r"array 'values', shard 1, chunk 1: expected .*; take another copy"
        ) as info:
            store.read(["values"], 0, 22)
        assert (info.value.array, info.value.shard, info.value.chunk) == ("values", 1, 1)
    with (
        StoreWriter.open(path, small_manifest(compressor=compressor_of(kind))) as writer,
        pytest.raises(DamageError, match=r"to dump it again, remove seals/00000001.json of the store and run"),
    ):
        writer.finalize()
    seals = path if kind.startswith("zarr") else path.parent / "store.h5.parts"
    (seals / "seals" / "00000001.json").unlink()
    with StoreWriter.open(path, small_manifest(compressor=compressor_of(kind))) as writer:
        assert writer.owed_shards() == (1,)
        write(writer)
        writer.finalize()
    read_all(path)


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_shard_that_was_put_in_the_place_of_another_is_found_when_it_is_checked(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path, is_final=False)
    if kind.startswith("zarr"):
        shutil.copy(path / "lse" / "c" / "0" / "0", path / "lse" / "c" / "1" / "0")
        message = "lse/c/1/0, shard 1: expected the sealed digest to hold"
    else:
        shards = path.parent / "store.h5.parts" / "shards"
        shutil.copy(shards / "00000000.h5", shards / "00000001.h5")
        message = "array 'entropy', shard 1: expected the sealed sha256 to hold, got another"
    with open_store(path) as store, pytest.raises(DamageError, match=message):
        store.check_shard(1)


def test_the_seal_of_another_shard_or_store_is_refused(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path, is_final=False)
    shutil.copy(path / "seals" / "00000000.json", path / "seals" / "00000001.json")
    with open_store(path) as store, pytest.raises(DamageError, match="expected the seal of this shard and store"):
        store.read(["status"], 8, 9)


def test_a_lost_seal_of_a_finalized_store_is_damage(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path)
    (path / "seals" / "00000001.json").unlink()
    with open_store(path) as store:
        with pytest.raises(DamageError, match=r"00000001.json: expected a seal, got none; take another copy") as info:
            store.seal(1)
        assert info.value.shard == 1


def test_another_manifest_than_the_finalized_one_is_refused(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path)
    manifest = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_text(json.dumps(manifest | {"provenance": {"by": "me"}}))
    with pytest.raises(DamageError, match="expected the manifest that was finalized, got another"):
        open_store(path)


def test_missing_zarr_metadata_is_named_when_finalizing(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path, is_final=False)
    (path / "lse" / "zarr.json").unlink()
    with (
        StoreWriter.open(path, small_manifest()) as writer,
        pytest.raises(DamageError, match=r"expected lse/zarr.json, got none; take another copy"),
    ):
        writer.finalize()


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path, is_final=False)
    (path / "lse" / "c" / "2" / "0").unlink()
    with open_store(path) as store:
        with pytest.raises(DamageError, match="array 'lse', shard 2: expected its object, got none"):
            store.read(["lse"], 16, 17)
        with pytest.raises(DamageError, match="array 'lse', shard 2: expected its object, got none"):
            store.check_shard(2)


def test_a_part_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = make("hdf5-none", tmp_path, is_final=False)
    import h5py

    with h5py.File(tmp_path / "store.h5.parts" / "shards" / "00000000.h5", "r+") as file:
        del file["lse"], file["entropy"]
        file["lse"] = np.zeros((8, 3), np.float32)
    with open_store(path) as store:
        with pytest.raises(DamageError, match="'lse', shard 0: expected the manifest's shape and type, got another"):
            store.read(["lse"], 0, 8)
        with pytest.raises(DamageError, match="'entropy', shard 0, chunk 0: expected its checksum to hold"):
            store.read(["entropy"], 0, 8)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    path = make("hdf5-none", tmp_path, is_final=False)
    (tmp_path / "store.h5.parts" / "shards" / "00000000.h5").unlink()
    with open_store(path) as store, pytest.raises(DamageError, match="'lse', shard 0: expected a part that opens, got"):
        store.read(["lse"], 0, 8)


def test_unreadable_records_of_a_hdf5_file_are_damage(tmp_path: Path) -> None:
    path = make("hdf5-none", tmp_path)
    import h5py

    with h5py.File(path, "r+") as file:
        seals = file["records/seals"][()]
        del file["records/seals"]
        file["records/seals"] = np.frombuffer(b"no JSON\n", np.uint8)
    with open_store(path) as store:
        with pytest.raises(DamageError, match=r"expected a readable record 'seals/00000000.json', got"):
            store.seal(0)
        with pytest.raises(DamageError, match="expected readable seals, got"):
            store.backend.list_seals()
    with h5py.File(path, "r+") as file:
        del file["records/seals"]
        file["records/seals"] = seals[: len(seals) // 2]
    with open_store(path) as store, pytest.raises(DamageError, match="seals"):
        store.read(["lse"], 16, 20)


def test_a_cut_off_hdf5_file_is_damage(tmp_path: Path) -> None:
    path = make("hdf5-none", tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamageError, match="expected an HDF5 file that opens, got"):
        open_store(path)
    path.write_bytes(data[:512])
    with pytest.raises(DamageError, match="expected an HDF5 file that opens, got"):
        open_store(path)
