"""Rows put straight to their places: the same as `read` gives, and the same damage found."""

import errno
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.backends import zarr3
from storage.backends.mapped import MappedShard, read_scattered
from storage.errors import DamageError
from storage.manifest import Manifest
from storage.reader import Store
from storage.writer import StoreWriter
from tests.contracts.small import ENCODINGS, KINDS, compressor_of, expected_rows, make_backend, small_manifest, write

# (start, stop) inside shards of 8 rows in chunks of 4, of 22 rows: whole chunks, parts of them, and the ragged last one
RANGES = [(0, 8), (0, 4), (4, 8), (9, 16), (10, 11), (8, 15), (16, 22), (20, 22), (21, 22), (5, 7)]


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 22 rows of each kind, all sealed."""
    backend = make_backend(request.param, tmp_path_factory.mktemp("mapped"))
    with StoreWriter.on(backend(), small_manifest(compressor=compressor_of(request.param))) as writer:
        write(writer)
    return Store(backend())


def scatter(store: Store, name: str, ranges: list[tuple[int, int]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What comes where, in an array that is larger than need be; and what should."""
    spec = next(spec for spec in store.manifest.arrays if spec.name == name)
    rows = np.concatenate([np.arange(*pair) for pair in ranges])
    positions = np.random.default_rng(seed).permutation(len(rows) + 3)[: len(rows)]
    out, expected = spec.full(len(rows) + 3), spec.full(len(rows) + 3)
    read_scattered(store.backend, store.manifest, name, ranges, out, positions)
    expected[positions] = expected_rows(store.manifest, 0, 22)[name][rows]
    return out, expected


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(RANGES), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.data())
def test_rows_come_to_their_places_as_read_gives_them(
    store: Store, ranges: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([spec.name for spec in store.manifest.arrays]))
    out, expected = scatter(store, name, ranges, seed)
    assert out.tobytes() == expected.tobytes()


def large_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr3, "MAX_MAPPED_BYTES", 0)


def bad_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedShard, "_open", lambda *_: None)


def no_maps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENODEV, "no maps here")

    monkeypatch.setattr(mmap, "mmap", fail)


@pytest.mark.parametrize("trouble", [large_store, bad_disk, no_maps])
def test_what_can_not_be_mapped_is_read(
    store: Store, trouble: Callable[[Store, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    trouble(store, monkeypatch)
    for spec in store.manifest.arrays:
        out, expected = scatter(store, spec.name, RANGES, 1)
        assert out.tobytes() == expected.tobytes()
    store.close()


def values_path(folder: Path, manifest: Manifest, shard: int) -> Path:
    """The file of a shard's values."""
    return folder / "store.zarr" / "values" / "c" / str(shard) / "0"


@pytest.mark.parametrize("kind", ["zarr-none", "zarr-zstd"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_flipped_bit_anywhere_is_found_and_its_chunk_named(kind: str, encoding: str, tmp_path: Path) -> None:
    backend = make_backend(kind, tmp_path)
    manifest = small_manifest(compressor=compressor_of(kind), encoding=ENCODINGS[encoding])
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer)
    path = values_path(tmp_path, manifest, 1)
    whole = path.read_bytes()
    spec = next(spec for spec in manifest.arrays if spec.name == "values")
    index = np.frombuffer(whole[-36:-4], "<u8").reshape(2, 2)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with Store(backend()) as store, pytest.raises(DamageError, match="array 'values', shard 1") as caught:
            read_scattered(store.backend, manifest, "values", [(8, 16)], spec.full(8), np.arange(8))
        inside = [chunk for chunk, (offset, length) in enumerate(index) if offset <= place < offset + length]
        assert caught.value.chunk == (inside[0] if inside else None)


@pytest.mark.parametrize("kind", ["zarr-none", "zarr-zstd"])
@pytest.mark.parametrize("num_bytes", [0, 3, 40, -5])
def test_a_truncated_or_missing_file_is_found(kind: str, num_bytes: int, tmp_path: Path) -> None:
    backend = make_backend(kind, tmp_path)
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer)
    path = values_path(tmp_path, manifest, 0)
    path.write_bytes(path.read_bytes()[:num_bytes])
    out = np.zeros((8, 3), np.float16)
    with Store(backend()) as store, pytest.raises(DamageError, match="array 'values', shard 0"):
        read_scattered(store.backend, manifest, "values", [(0, 8)], out, np.arange(8))
    path.unlink()
    with Store(backend()) as store, pytest.raises(DamageError, match="array 'values', shard 0"):
        read_scattered(store.backend, manifest, "values", [(0, 8)], out, np.arange(8))


def test_a_kernel_that_can_not_be_asked_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.backends.mapped.MADV_POPULATE_READ", 12345)  # EINVAL, as from an older kernel
    backend = make_backend("zarr-none", tmp_path)
    with StoreWriter.on(backend(), small_manifest()) as writer:
        write(writer)
    with Store(backend()) as store:
        mapped = store.backend.map_shard("values", 0)  # type: ignore[attr-defined]
        out = np.zeros((4, 3), np.float16)
        assert mapped.put(0, 0, out, np.arange(4), np.empty((4, 3), np.float16))
        assert out.tobytes() == expected_rows(store.manifest, 0, 4)["values"].tobytes()
