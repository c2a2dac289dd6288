"""What every backend must do, whatever it lies on."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.backends import Backend, MemoryBackend
from storage.encodings import TopK
from storage.errors import MismatchError, NotSealedError, PathError
from storage.manifest import Manifest
from storage.reader import Store
from storage.records import FINAL, MANIFEST, Seal
from storage.writer import StoreWriter
from tests.contracts.small import (
    ENCODINGS,
    KINDS,
    LATER,
    REMOTE,
    assert_same,
    compressor_of,
    create,
    expected_rows,
    make_backend,
    names_of,
    shard_arrays,
    small_manifest,
    write,
)

Open = Callable[[], Backend]
SHOWN_REMOTE = ("topk-uint8", "hidden-sequences")
SEAL = Seal(0, 0, 8, "", {}, {}, ())


@pytest.fixture(params=[*KINDS, REMOTE])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Open:
    if kind == REMOTE:
        request.getfixturevalue("s3")
    return make_backend(kind, tmp_path)


@pytest.mark.parametrize("name", [*ENCODINGS, *LATER])
def test_what_is_written_is_read_back_before_and_after_finalizing(kind: str, backend: Open, name: str) -> None:
    if kind == REMOTE and name not in SHOWN_REMOTE:
        pytest.skip("the same objects as on a disk, as another test shows; each is a request")
    fields = LATER[name] if name in LATER else {"encoding": ENCODINGS[name]}
    manifest = small_manifest(**fields, compressor=compressor_of(kind))
    with create(backend(), manifest) as writer:
        write(writer, 2, 0, 1)
    with Store(backend()) as store:
        assert not store.finalized
        assert_same(store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))
    with create(backend(), manifest) as writer:
        digest = writer.finalize()
    with Store(backend()) as store:
        assert store.manifest == manifest
        assert store.content_digest == digest
        assert_same(store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))
        for shard in range(3):
            store.check_shard(shard)
        store.backend.check_final()
        entries = [entry for shard in range(3) for entry in shard_arrays(manifest, shard)[1]]
        assert store.quarantine() == entries


def test_the_content_digest_is_the_same_on_every_backend_whatever_the_order(kind: str, backend: Open) -> None:
    memory = make_backend("memory", Path())()
    with StoreWriter.on(memory, small_manifest(provenance={"when": "then"})) as writer:
        write(writer)
        expected = writer.finalize()
    with StoreWriter.on(backend(), small_manifest(compressor=compressor_of(kind), chunk_rows=2)) as writer:
        write(writer, 1, 2, 0)
        assert writer.finalize() == expected


def test_a_store_without_the_optional_arrays_and_of_one_row(kind: str, backend: Open) -> None:
    fields = {"num_rows": 1, "num_classes": 1, "shard_rows": 4, "chunk_rows": 2, "has_hard_targets": False}
    manifest = small_manifest(**fields, encoding=ENCODINGS["dense-float16"], compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer)
        writer.finalize()
        assert_same(writer.store.read(names_of(manifest), 0, 1), expected_rows(manifest, 0, 1))


def test_every_range_reads_alike_into_a_new_or_a_given_array(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer)
    names = ["values", "lse", "status"]
    whole = expected_rows(manifest, 0, 22)
    with Store(backend()) as store:
        for start in (0, 7, 21) if kind == REMOTE else (0, 1, 4, 7, 8, 15, 21, 22):
            for stop in range(start, 23, 5 if kind == REMOTE else 1):
                expected = {name: whole[name][start:stop] for name in names}
                assert_same(store.read(names, start, stop), expected)
                out = {name: np.empty_like(expected[name]) for name in names}
                found = store.read(names, start, stop, out)
                assert_same(out, expected)
                assert all(found[name] is out[name] for name in names)


def test_an_out_that_does_not_fit_is_refused(kind: str, backend: Open) -> None:
    with StoreWriter.on(backend(), small_manifest(compressor=compressor_of(kind))) as writer:
        write(writer)
        for out in (np.empty(3, np.uint8), np.empty(4, np.int8), np.empty(8, np.uint8)[::2]):
            with pytest.raises(ValueError, match=r"out: expected 'status' C-contiguous, uint8 \(4,\), got"):
                writer.store.read(["status"], 0, 4, {"status": out})
        with pytest.raises(ValueError, match="out: expected an array for 'status', got none"):
            writer.store.read(["status"], 0, 4, {})


def test_rows_without_a_seal_are_not_read(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer, 0)
        arrays, _ = shard_arrays(manifest, 1)
        writer.store.backend.write_shard(1, arrays)  # and no seal
    with Store(backend()) as store:
        assert store.sealed_shards() == (0,)
        assert store.num_sealed_rows == 8
        store.read(["status"], 0, 8)
        with pytest.raises(NotSealedError, match="expected rows 8 to 15 sealed, got shard 1 without a seal; resume"):
            store.read(["status"], 7, 9)
        with pytest.raises(NotSealedError, match=r"seals/00000001.json: expected a seal, got none; resume"):
            store.seal(1)


def test_a_reader_sees_shards_that_are_sealed_after_it_opened(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer, Store(backend()) as store:
        assert store.sealed_shards() == ()
        write(writer, 2)
        assert_same(store.read(names_of(manifest), 16, 22), expected_rows(manifest, 16, 22))
        assert store.num_sealed_rows == 6
        write(writer)
        writer.finalize()
        assert_same(store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))
        assert store.sealed_shards() == (0, 1, 2)
        assert len(store.quarantine()) == 2


def test_an_unknown_array_or_row_is_refused(kind: str, backend: Open) -> None:
    with StoreWriter.on(backend(), small_manifest(compressor=compressor_of(kind))) as writer:
        write(writer)
        with pytest.raises(ValueError, match=r"names: expected one of entropy, .*, got 'logits'"):
            writer.store.read(["logits"], 0, 1)
        with pytest.raises(ValueError, match=r"rows: expected a range inside \[0, 22\), got \[20, 23\)"):
            writer.store.read(["status"], 20, 23)


def test_finalizing_wants_every_shard_or_the_word_partial(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        with pytest.raises(NotSealedError, match="nothing is sealed yet"):
            writer.finalize(partial=True)
        write(writer, 0, 2)
        writer.store.backend.write_shard(1, shard_arrays(manifest, 1)[0])  # a writer killed before the seal
        with pytest.raises(NotSealedError, match="expected all 3 shards sealed, got 2; go on with the same"):
            writer.finalize()
        checked: list[int] = []
        digest = writer.finalize(partial=True, progress=checked.append)
        assert checked == [8, 6]
        assert writer.finalize() == digest
        assert writer.owed_shards() == ()
        with pytest.raises(PathError, match="expected a store that is not finalized, got one; give another path"):
            write(writer, 1)
    with Store(backend()) as store:
        assert store.final is not None
        assert (store.final.complete, store.final.sealed, store.num_sealed_rows) == (False, (0, 2), 14)
        assert_same(store.read(names_of(manifest), 16, 22), expected_rows(manifest, 16, 22))
        with pytest.raises(NotSealedError, match="got shard 1 without a seal; read sealed rows only"):
            store.read(["status"], 0, 22)


def test_a_writer_that_was_open_when_another_finalized_writes_no_more(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as late, StoreWriter.on(backend(), manifest) as writer:
        write(writer, 0)
        digest = writer.finalize(partial=True)
        with pytest.raises(PathError, match="expected a store that is not finalized"):
            write(late, 1)
        assert late.finalize(partial=True) == digest


def test_other_settings_are_refused_and_named(kind: str, backend: Open) -> None:
    compressor = compressor_of(kind)
    StoreWriter.on(backend(), small_manifest(compressor=compressor)).close()
    others: dict[str, dict[str, Any]] = {
        "encoding.k: the store has 3, this run 4": {"encoding": TopK(4)},
        "teacher.digest: ": {"teacher": {"digest": "00"}},
        "temperatures: ": {"temperatures": (1.0, 2.0)},
        r"\(and 1 more\); use the same settings, or another path": {
            "num_rows": 23,
            "chunk_rows": 2,
            "num_classes": 6,
            "shard_rows": 2,
        },
    }
    for message, fields in others.items():
        with pytest.raises(MismatchError, match=message):
            StoreWriter.on(backend(), small_manifest(compressor=compressor, **fields))
    StoreWriter.on(backend(), small_manifest(compressor=compressor, provenance={"by": "another"})).close()


def test_arrays_that_do_not_fit_the_manifest_are_refused(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        arrays, quarantine = shard_arrays(manifest, 0)
        with pytest.raises(ValueError, match=r"arrays: expected \['entropy', .*, got \['lse'\]"):
            writer.write_shard(0, {"lse": arrays["lse"]}, quarantine)
        with pytest.raises(ValueError, match=r"lse: expected float32 \(8, 2\), got float64 \(8, 2\)"):
            writer.write_shard(0, arrays | {"lse": arrays["lse"].astype(np.float64)}, quarantine)
        with pytest.raises(ValueError, match=r"status: expected uint8 \(8,\), got uint8 \(7,\)"):
            writer.write_shard(0, arrays | {"status": arrays["status"][1:]}, quarantine)
        with pytest.raises(ValueError, match="status: expected every row written, got row 2 unwritten"):
            writer.write_shard(0, arrays | {"status": np.array([0, 0, 255, 0, 0, 0, 0, 0], np.uint8)}, quarantine)
        with pytest.raises(ValueError, match=r"quarantine: expected an entry for each of rows \[5\], got others"):
            writer.write_shard(0, arrays, ())
        with pytest.raises(ValueError, match="shard: expected 0 to 2, got 3"):
            writer.write_shard(3, arrays, quarantine)
        assert writer.sealed_shards() == ()


def test_a_sealed_shard_is_never_written_again(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer, 0)
        seal = writer.store.seal(0)
        arrays, quarantine = shard_arrays(manifest, 0, seed=1)
        assert writer.write_shard(0, arrays, quarantine) == seal
        assert writer.store.check_shard(0) == seal
        assert_same(writer.store.read(names_of(manifest), 0, 8), expected_rows(manifest, 0, 8))


def test_a_shard_written_without_a_seal_is_written_over(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        for seed in (3, 4):
            arrays = shard_arrays(manifest, 0, seed)[0]
            writer.store.backend.write_shard(0, arrays)
            assert_same({"values": writer.store.backend.read("values", 0, 0, 8)}, {"values": arrays["values"]})
        write(writer, 0)
        writer.store.check_shard(0)
        assert_same(writer.store.read(names_of(manifest), 0, 8), expected_rows(manifest, 0, 8))


def test_a_record_is_created_once(backend: Open) -> None:
    with StoreWriter.on(backend(), small_manifest()) as writer:
        there = writer.store.backend
        assert there.get_record("seals/00000001.json") is None
        assert there.put_record("seals/00000001.json", b"one")
        assert not there.put_record("seals/00000001.json", b"two")
        assert there.get_record("seals/00000001.json") == b"one"
        assert there.list_seals() == [1]
        assert not there.put_record(MANIFEST, b"{}")
        assert there.get_record(FINAL) is None


def test_two_threads_write_one_shard_and_one_seal_stands(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    writers = [StoreWriter.on(backend(), manifest) for _ in range(4)]
    barrier = threading.Barrier(4)

    def race(seed: int) -> object:
        arrays, quarantine = shard_arrays(manifest, 0, seed)
        barrier.wait()
        return writers[seed].write_shard(0, arrays, quarantine)

    with ThreadPoolExecutor(4) as pool:
        seals = list(pool.map(race, range(4)))
    assert all(seal == seals[0] for seal in seals)
    assert writers[0].store.check_shard(0) == seals[0]
    for writer in writers:
        writer.close()


def test_threads_share_one_open_store(kind: str, backend: Open) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    expected = expected_rows(manifest, 0, 22)
    with StoreWriter.on(backend(), manifest) as writer:
        write(writer)
        writer.finalize()
    with Store(backend()) as store, ThreadPoolExecutor(8) as pool:

        def read(start: int) -> None:
            stop = min(22, start + 7)
            found = store.read(names_of(manifest), start, stop)
            assert_same(found, {name: values[start:stop] for name, values in expected.items()})

        list(pool.map(read, [start % 22 for start in range(30 if kind == REMOTE else 200)]))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_zarr_and_hdf5_read_back_what_memory_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chunk_rows = data.draw(st.integers(1, 5))
    manifest_fields: dict[str, Any] = {
        "num_rows": data.draw(st.integers(1, 40)),
        "num_classes": data.draw(st.integers(5, 9)),
        "chunk_rows": chunk_rows,
        "shard_rows": chunk_rows * data.draw(st.integers(1, 4)),
        "encoding": ENCODINGS[data.draw(st.sampled_from(sorted(ENCODINGS)))],
        "has_hard_targets": data.draw(st.booleans()),
    }
    num_rows = manifest_fields["num_rows"]
    start = data.draw(st.integers(0, num_rows))
    stop = data.draw(st.integers(start, num_rows))
    found, digests = [], set()
    for kind in data.draw(
        st.sampled_from([("memory", "zarr-none", "hdf5-zstd"), ("memory", "zarr-zstd", "hdf5-none")])
    ):
        manifest = small_manifest(**manifest_fields, compressor=compressor_of(kind))
        with StoreWriter.on(make_backend(kind, tmp_path_factory.mktemp(kind))(), manifest) as writer:
            write(writer)
            digests.add(writer.finalize())
            found.append(writer.store.read(names_of(manifest), start, stop))
    assert len(digests) == 1
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_store_that_another_creates_meanwhile_is_gone_on_with(
    kind: str, backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small_manifest(compressor=compressor_of(kind))
    late = backend()
    create = type(late).create

    def slow_create(self: Any, manifest: Manifest) -> None:
        create(self, manifest)
        monkeypatch.undo()
        StoreWriter.on(backend(), manifest).close()

    monkeypatch.setattr(type(late), "create", slow_create)
    with StoreWriter.on(late, manifest) as writer:
        write(writer)
        writer.finalize()
        assert_same(writer.store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))


def test_the_seal_of_another_that_came_first_is_what_a_writer_gives(
    kind: str, backend: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system knows no locks, creating the seal only if it is absent still decides."""
    manifest = small_manifest(compressor=compressor_of(kind))
    with StoreWriter.on(backend(), manifest) as writer:
        there = writer.store.backend
        put_record = there.put_record
        other = dataclasses.replace(SEAL, manifest_sha256=writer.store.manifest_sha256)

        def put_late(name: str, data: bytes) -> bool:
            assert put_record(name, other.to_bytes())
            return put_record(name, data)

        monkeypatch.setattr(there, "put_record", put_late)
        arrays, quarantine = shard_arrays(manifest, 0)
        assert writer.write_shard(0, arrays, quarantine) == other


def test_memory_has_no_shard_that_was_not_written() -> None:
    with StoreWriter.on(MemoryBackend(), small_manifest()) as writer:
        with pytest.raises(NotSealedError, match="memory: expected shard 1, got none; write it first"):
            writer.store.backend.read("lse", 1, 8, 9)
        assert writer.store.backend.num_bytes() > 0


def test_the_size_of_a_store_is_that_of_its_files(kind: str, backend: Open, tmp_path: Path) -> None:
    with StoreWriter.on(backend(), small_manifest(compressor=compressor_of(kind))) as writer:
        write(writer)
        for _ in range(2):
            found = writer.store.backend.num_bytes()
            if kind not in ("memory", REMOTE):
                assert found == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            writer.finalize()
