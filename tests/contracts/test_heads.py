"""The head of a store of hidden states: there before the manifest, never another's, its damage always found."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from storage.backends import Backend, Hdf5Backend
from storage.encodings import HeadArrays, Hidden
from storage.errors import DamageError, MismatchError, PathError
from storage.head import HEAD_BIAS, HEAD_WEIGHT, head_digest, head_records
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.records import MANIFEST
from storage.scan import convert, verify
from storage.writer import StoreWriter
from tests.contracts.small import (
    LATER,
    ON_DISK,
    assert_same,
    compressor_of,
    create,
    expected_rows,
    make_backend,
    names_of,
    path_of,
    small_manifest,
    write,
)
from tests.storage.soft_targets import head_for

Open = Callable[[], Backend]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(params=["zarr-none", "hdf5-none", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(kind: str, tmp_path: Path) -> Open:
    return make_backend(kind, tmp_path)


def hidden_manifest(kind: str, name: str = "hidden-sequences", **fields: Any) -> Manifest:
    return small_manifest(**(LATER[name] | fields), compressor=compressor_of(kind))


def other_manifest(kind: str) -> tuple[Manifest, HeadArrays]:
    """The same store of another head, without a bias."""
    manifest = hidden_manifest(kind)
    head = HeadArrays(np.ones((manifest.num_classes, 4), np.float16), None)
    assert isinstance(manifest.encoding, Hidden)
    encoding = replace(manifest.encoding, has_bias=False, head_sha256=head_digest(head))
    return replace(manifest, encoding=encoding), head


def assert_head(found: HeadArrays | None, expected: HeadArrays | None) -> None:
    assert found is not None
    assert expected is not None
    assert head_records(found) == head_records(expected)


@pytest.mark.parametrize("name", ["hidden-sequences", "hidden-rows"])
def test_the_head_is_read_back_before_and_after_finalizing(kind: str, backend: Open, name: str) -> None:
    manifest = hidden_manifest(kind, name)
    with create(backend(), manifest) as writer:
        assert_head(writer.store.head(), head_for(manifest))
        assert (writer.store.backend.get_record(HEAD_BIAS) is None) == (name == "hidden-rows")
        write(writer)
        writer.finalize()
    with Store(backend()) as store:
        assert_head(store.head(), head_for(manifest))
        assert store.head() is store.head()


def test_a_store_without_hidden_states_has_no_head(backend: Open) -> None:
    with StoreWriter.on(backend(), small_manifest()) as writer:
        assert writer.store.head() is None


@pytest.mark.parametrize("is_other", [False, True])
@pytest.mark.parametrize("last", [HEAD_WEIGHT, HEAD_BIAS, MANIFEST])
def test_a_creation_killed_among_its_records_is_done_again_also_with_another_head(
    kind: str, backend: Open, last: str, is_other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, killed = hidden_manifest(kind), backend()
    put_record = type(killed).put_record

    def put(self: Any, name: str, data: bytes) -> bool:
        if name == last:
            raise Killed
        return put_record(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(type(killed), "put_record", put)
        with pytest.raises(Killed):
            create(killed, manifest)
    with pytest.raises(PathError, match="expected a logit store, got something without a manifest"):
        Store(backend())
    again, head = other_manifest(kind) if is_other else (manifest, head_for(manifest))
    with StoreWriter.on(backend(), again, head) as writer:
        assert_head(writer.store.head(), head)
        if not is_other:
            write(writer)
            writer.finalize()
            assert_same(writer.store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))
        assert (writer.store.backend.get_record(HEAD_BIAS) is None) == is_other


def test_a_run_with_another_head_is_refused(kind: str, backend: Open) -> None:
    manifest = hidden_manifest(kind)
    create(backend(), manifest).close()
    other, head = other_manifest(kind)
    with pytest.raises(MismatchError, match=r"encoding.head_sha256: the store has"):
        StoreWriter.on(backend(), other, head)
    with Store(backend()) as store:
        assert_head(store.head(), head_for(manifest))


def test_a_new_store_wants_the_head_that_its_encoding_names(kind: str, backend: Open) -> None:
    manifest = hidden_manifest(kind)
    _, other = other_manifest(kind)
    with pytest.raises(ValueError, match="head: expected one beside hidden states, and none without, got it otherwise"):
        StoreWriter.on(backend(), manifest)
    with pytest.raises(ValueError, match="head: expected one beside hidden states, and none without, got it otherwise"):
        StoreWriter.on(backend(), small_manifest(compressor=compressor_of(kind)), other)
    with pytest.raises(ValueError, match="head: expected a bias, got none"):
        StoreWriter.on(backend(), manifest, other)
    head = head_for(manifest)
    assert head is not None
    with pytest.raises(ValueError, match="head: expected the one whose digest the encoding names, got another"):
        StoreWriter.on(backend(), manifest, HeadArrays(head.weight_CW + 1, head.bias_C))
    assert not backend().exists()


def test_a_late_creation_does_not_take_the_head_of_the_store_that_is_there(tmp_path: Path) -> None:
    manifest = hidden_manifest("hdf5-none")
    create(Hdf5Backend(tmp_path / "a.h5"), manifest).close()
    with pytest.raises(PathError, match="expected nothing, or parts of a logit store; give another path"):
        Hdf5Backend(tmp_path / "a.h5").create(manifest)  # of a writer that looked for a manifest just before
    with open_store(tmp_path / "a.h5") as store:
        assert_head(store.head(), head_for(manifest))


def make(kind: str, folder: Path, is_final: bool = True, name: str = "hidden-sequences") -> Path:
    path = path_of(kind, folder)
    with StoreWriter.open(path, hidden_manifest(kind, name), head_for(hidden_manifest(kind, name))) as writer:
        write(writer)
        if is_final:
            writer.finalize()
    return path


@pytest.mark.parametrize("name", ["topk-sequences", "sample-sequences", "hidden-sequences", "hidden-rows"])
def test_there_and_back_again_the_digest_the_rows_and_the_head_are_the_same(name: str, tmp_path: Path) -> None:
    source = make("zarr-zstd", tmp_path, name=name)
    there, back = convert(source, tmp_path / "b.h5"), convert(tmp_path / "b.h5", tmp_path / "c.zarr")
    with open_store(source) as store, open_store(tmp_path / "c.zarr") as copy:
        assert there.content_digest == back.content_digest == store.content_digest
        assert copy.manifest.identity() == store.manifest.identity()
        assert_same(copy.read(names_of(copy.manifest), 0, 22), store.read(names_of(store.manifest), 0, 22))
        if isinstance(store.manifest.encoding, Hidden):
            assert_head(copy.head(), store.head())
    for path in (tmp_path / "b.h5", tmp_path / "c.zarr"):
        result = verify(path)
        assert (result.damage, result.warnings) == ((), ())


@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("kind", ["zarr-none", "hdf5-none"])
def test_a_damaged_head_is_found_by_whoever_reads_it_and_by_verify(kind: str, is_final: bool, tmp_path: Path) -> None:
    path = make(kind, tmp_path, is_final)
    if kind == "hdf5-none" and is_final:
        damage_hdf5(path)
        return
    folder = path if kind == "zarr-none" else tmp_path / "store.h5.parts"
    generator = np.random.default_rng(5)
    for name in (HEAD_WEIGHT, HEAD_BIAS):
        file = folder / name
        data = file.read_bytes()
        changes = [bytearray(data) for _ in range(6)]
        for changed in changes:
            changed[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        for wrong in (*map(bytes, changes), data[: len(data) // 2], b""):
            file.write_bytes(wrong)
            with open_store(path) as store, pytest.raises(DamageError, match="expected the digest in the manifest to"):
                store.head()
            assert [item.message for item in verify(path).damage if "head/weight.npy and head/bias.npy" in item.message]
        file.unlink()
        with open_store(path) as store, pytest.raises(DamageError, match=f"expected {name}, got none; take another"):
            store.head()
        assert not verify(path).ok
        file.write_bytes(data)
    assert verify(path).ok


def damage_hdf5(path: Path) -> None:
    """Flip a byte of the head in a finalized HDF5 file, then take its records out."""
    data = path.read_bytes()
    with h5py.File(path) as file:
        head = file[f"records/{HEAD_WEIGHT}"]
        place = head.id.get_chunk_info(0).byte_offset + head.shape[0] - 1
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with open_store(path) as store, pytest.raises(DamageError, match=r"expected a readable record 'head/weight.npy'"):
        store.head()
    assert not verify(path).ok
    path.write_bytes(data)
    with h5py.File(path, "r+") as file:
        del file[f"records/{HEAD_BIAS}"]
    with open_store(path) as store, pytest.raises(DamageError, match=r"readable record 'head/bias.npy', got"):
        store.head()
    path.write_bytes(data)
    assert verify(path).ok


def test_a_bias_that_the_encoding_does_not_name_is_warned_of(tmp_path: Path) -> None:
    path = make("zarr-none", tmp_path, name="hidden-rows")
    (path / HEAD_BIAS).write_bytes(b"x")
    result = verify(path)
    assert result.ok
    assert result.warnings == (f"{path / HEAD_BIAS}: not a file of the store",)


@pytest.mark.parametrize("kind", ON_DISK)
def test_a_store_that_is_sent_to_another_process_brings_its_head(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    with open_store(path) as store:
        opener, arguments = store.__reduce__()
        assert callable(opener)
        with opener(*arguments) as copy:
            assert_head(copy.head(), store.head())
            assert np.load(io.BytesIO(copy.backend.get_record(HEAD_WEIGHT)), allow_pickle=False).dtype == np.float16
