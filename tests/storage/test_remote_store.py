"""A store at a URL: the objects of a folder, sealed by one of several writers, whoever stops when."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends import RemoteBackend, ZarrBackend, backend_for
from storage.backends.remote_seal import Intent, intent_name
from storage.backends.zarr_objects import seal_name
from storage.encodings import Dense, TopK
from storage.errors import DamageError, MismatchError, NotSealedError, PathError, RemoteError
from storage.exclusive import discard_unsealed, sole_run
from storage.head import HEAD_WEIGHT
from storage.reader import open_store
from storage.records import MANIFEST
from storage.remote import Place, open_place
from storage.scan import verify
from storage.writer import StoreWriter
from tests.contracts.small import (
    LATER,
    assert_same,
    create,
    expected_rows,
    names_of,
    shard_arrays,
    small_manifest,
    write,
)
from tests.s3 import SECRET, S3Server

SEED_OF_ANOTHER = 7  # of arrays that another writer would seal in the same shard


def backend_at(url: str, patience_s: float = 0.3) -> RemoteBackend:
    return RemoteBackend(open_place(url), patience_s=patience_s)


def objects_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_at(url: str) -> dict[str, bytes]:
    place = open_place(url)
    return {entry.key: place.get(entry.key) or b"" for entry in place.list()}


@pytest.fixture
def finalized(s3: S3Server) -> str:
    url = s3.url("store.zarr")
    with StoreWriter.open(url, small_manifest()) as writer:
        write(writer)
        writer.finalize()
    return url


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_the_objects_are_those_of_a_folder_byte_for_byte(s3: S3Server, tmp_path: Path, compressor: str) -> None:
    url = s3.url("store.zarr")
    manifest = small_manifest(compressor=compressor)
    for path in (url, str(tmp_path / "store.zarr")):
        with StoreWriter.open(path, manifest) as writer:
            write(writer, 2, 0)
            writer.finalize(partial=True)
    assert objects_at(url) == objects_in(tmp_path / "store.zarr")


def test_a_finalized_store_is_read_over_http_too(s3: S3Server, finalized: str) -> None:
    manifest = small_manifest()
    with open_store(s3.http(finalized)) as store:
        assert_same(store.read(names_of(manifest), 0, 22), expected_rows(manifest, 0, 22))
        assert store.backend.num_bytes() == sum(map(len, objects_at(finalized).values()))
    assert verify(s3.http(finalized)).ok
    assert verify(finalized).ok
    with StoreWriter.open(s3.http(finalized), manifest) as writer:
        assert writer.owed_shards() == ()
        assert writer.finalize() == writer.store.content_digest


def test_a_store_that_is_not_finalized_is_not_read_over_http(s3: S3Server) -> None:
    url = s3.url("store.zarr")
    with StoreWriter.open(url, small_manifest()) as writer:
        write(writer, 0)
    with open_store(s3.http(url)) as store, pytest.raises(NotSealedError, match="since HTTP can't list which shards"):
        store.sealed_shards()
    with pytest.raises(RemoteError, match="expected a storage that can be written, got HTTP"):
        StoreWriter.open(s3.http(s3.url("new.zarr")), small_manifest())


def test_nothing_at_a_url_is_no_store_and_something_else_is_not_written_over(s3: S3Server) -> None:
    url = s3.url("folder")
    with pytest.raises(PathError, match="expected a logit store, got no such path"):
        open_store(url)
    with pytest.raises(PathError, match="expected a logit store, got no such path"):
        open_store(s3.http(url))
    open_place(url).put("photo.jpg", b"")
    with pytest.raises(PathError, match="expected a logit store, got something without a manifest"):
        open_store(url)
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else; give another URL"):
        StoreWriter.open(url, small_manifest())
    other = s3.url("group.zarr")
    open_place(other).put("zarr.json", b'{"attributes": {}}')
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else; give another URL"):
        StoreWriter.open(other, small_manifest())
    assert list(objects_at(url)) == ["photo.jpg"]


def test_a_creation_that_was_cut_off_is_done_again_with_other_settings(s3: S3Server) -> None:
    url = s3.url("store.zarr")
    backend_at(url).create(small_manifest(encoding=TopK(2)))
    manifest = small_manifest()
    with StoreWriter.open(url, manifest) as writer:
        write(writer)
        writer.finalize()
    assert verify(url).ok


def test_who_creates_the_manifest_mends_metadata_that_another_put_there_meanwhile(s3: S3Server) -> None:
    url = s3.url("store.zarr")
    manifest, other = small_manifest(), small_manifest(encoding=TopK(2))
    first, second = backend_at(url), backend_at(url)
    first.create(manifest)
    second.create(other)
    with StoreWriter.on(first, manifest) as writer:
        with pytest.raises(MismatchError, match=r"encoding.k: the store has 3, this run 2.*nothing of it is sealed"):
            StoreWriter.on(second, other)
        write(writer)
        writer.finalize()
    assert verify(url).ok


def test_a_run_that_comes_while_another_creates_the_store_goes_on_with_it(s3: S3Server) -> None:
    url, manifest = s3.url("store.zarr"), small_manifest(**LATER["hidden-rows"])
    open_place(url).put(f"zarr.json.{'ab' * 16}.probe", b"1")  # of one that was stopped
    late = backend_at(url)
    with create(backend_at(url), manifest) as writer:
        write(writer, 0)
        late.create(small_manifest())  # it had looked before the manifest was there
        assert not late.put_record(HEAD_WEIGHT, b"of another teacher")
        assert not late.put_record(MANIFEST, b"{}")
        write(writer)
        writer.finalize()
    assert (verify(url).damage, verify(url).warnings) == ((), ())


def test_a_storage_that_ignores_conditions_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_anyway(self: Place, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True

    monkeypatch.setattr(Place, "put_new", put_anyway)
    with pytest.raises(RemoteError, match="expected a storage that writes an object only if there is none, got one"):
        StoreWriter.open(s3.url("store.zarr"), small_manifest())


@pytest.mark.parametrize("same_bits", [True, False])
def test_two_writers_race_over_every_shard_and_one_store_comes_out(s3: S3Server, same_bits: bool) -> None:
    url = s3.url("store.zarr")
    manifest = small_manifest(
        num_rows=20, chunk_rows=2, shard_rows=4, encoding=Dense("float16"), has_hard_targets=False
    )
    barrier = threading.Barrier(2)

    def run(seed: int) -> str:
        with sole_run(url), StoreWriter.on(backend_at(url, 5.0), manifest) as writer:
            owed = writer.owed_shards()
            barrier.wait()
            for shard in owed:
                arrays, quarantine = shard_arrays(manifest, shard, 0 if same_bits else seed)
                writer.write_shard(shard, arrays, quarantine)
            return writer.finalize()

    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(run, (0, 1)))
    assert digests[0] == digests[1]
    result = verify(url)
    assert (result.damage, result.warnings, result.missing_rows) == ((), (), ())


class StoppedError(Exception):
    """What stops a writer in the middle."""


def stop_before(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """Let a number of conditional writes of this process through, then none; gives what lets them through again."""
    real, lock, left = Place._put_if, threading.Lock(), [number]

    def put_if(self: Place, key: str, data: bytes, mode: Any) -> bool:
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise StoppedError
        return real(self, key, data, mode)

    monkeypatch.setattr(Place, "_put_if", put_if)
    return lambda: monkeypatch.setattr(Place, "_put_if", real)


ONE_SHARD = {"num_rows": 4, "chunk_rows": 2, "shard_rows": 4, "encoding": Dense("float16"), "has_hard_targets": False}


@pytest.mark.parametrize(("let_through", "seed"), [(1, 0), (4, 0), (4, SEED_OF_ANOTHER), (7, SEED_OF_ANOTHER), (8, 0)])
def test_a_writer_that_is_stopped_anywhere_leaves_a_shard_that_another_seals(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, let_through: int, seed: int
) -> None:
    manifest = small_manifest(**ONE_SHARD)
    assert len(manifest.arrays) == 6  # so what is let through: the intent, three objects, all, the commit too
    url = s3.url("store.zarr")
    StoreWriter.open(url, manifest).close()
    go_on = stop_before(monkeypatch, let_through)
    with StoreWriter.on(backend_at(url), manifest) as writer, pytest.raises(StoppedError):
        write(writer, seed=SEED_OF_ANOTHER)
    go_on()
    assert open_store(url).sealed_shards() == ()
    with StoreWriter.on(backend_at(url), manifest) as writer:
        write(writer, seed=seed)
        writer.finalize()
        expected = expected_rows(manifest, 0, 4, SEED_OF_ANOTHER if let_through == 8 else seed)
        assert_same(writer.store.read(names_of(manifest), 0, 4), expected)
    assert verify(url).ok
    assert not [key for key in objects_at(url) if "intent" in key]


@pytest.mark.parametrize("asleep_at", ["status/c/0", intent_name(seal_name(0))])
def test_a_writer_that_wakes_up_after_another_took_over_changes_nothing(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, asleep_at: str
) -> None:
    """It sleeps before its first object, or before its commit, and wakes when the other has sealed."""
    manifest, url = small_manifest(**ONE_SHARD), s3.url("store.zarr")
    StoreWriter.open(url, manifest).close()
    sleeping, awake, real = threading.Event(), threading.Event(), Place._put_if

    def put_if(self: Place, key: str, data: bytes, mode: Any) -> bool:
        is_first_intent = mode == "create" and key.endswith("intent.json")
        if key == asleep_at and not is_first_intent and not sleeping.is_set():
            sleeping.set()
            assert awake.wait(20)
        return real(self, key, data, mode)

    monkeypatch.setattr(Place, "_put_if", put_if)
    late = StoreWriter.on(backend_at(url), manifest)
    with ThreadPoolExecutor(1) as pool, late:
        future = pool.submit(late.write_shard, 0, *shard_arrays(manifest, 0, SEED_OF_ANOTHER))
        assert sleeping.wait(20)
        with StoreWriter.on(backend_at(url), manifest) as writer:
            seal = writer.write_shard(0, *shard_arrays(manifest, 0))
        awake.set()
        assert future.result(20) == seal
        late.finalize()
    assert verify(url).ok
    with open_store(url) as store:
        assert_same(store.read(names_of(manifest), 0, 4), expected_rows(manifest, 0, 4))


def test_an_intent_that_is_none_is_taken_over(s3: S3Server) -> None:
    url = s3.url("store.zarr")
    with StoreWriter.on(backend_at(url), small_manifest()) as writer:
        place = open_place(url)
        whole = Intent("other", 0, False, b"{}\n")
        assert Intent.from_bytes(whole.to_bytes(), "") == whole
        for shard, data in enumerate((b"no JSON", whole.to_bytes()[:-5], replace(whole, attempt=1).to_bytes())):
            place.put(intent_name(seal_name(shard)), data)
        write(writer)
        writer.finalize()
    assert verify(url).ok


def test_a_shard_whose_seal_was_removed_is_dumped_again(s3: S3Server) -> None:
    url, manifest = s3.url("store.zarr"), small_manifest()
    with StoreWriter.open(url, manifest) as writer:
        write(writer)
        place = open_place(url)
        place.put("values/c/1/0", b"x" * 5)
        with pytest.raises(
            DamageError, match=r"remove seals/00000001.json of the store and run the same command again"
        ):
            writer.finalize()
        place.delete(seal_name(1))
    with StoreWriter.open(url, manifest) as writer:
        assert writer.owed_shards() == (1,)
        write(writer)
        writer.finalize()
    assert verify(url).ok


def test_what_is_damaged_at_a_url_is_found_and_named(s3: S3Server, finalized: str) -> None:
    place = open_place(finalized)
    whole = place.get("values/c/1/0") or b""
    for data in (whole[:-1], whole[:3], bytes([whole[0] ^ 1]) + whole[1:], None, whole + bytes(2 << 20)):
        place.delete("values/c/1/0") if data is None else place.put("values/c/1/0", data)
        result = verify(finalized)
        assert {(it.shard, it.array) for it in result.damage} == {(1, "values")}
        with open_store(finalized) as store, pytest.raises(DamageError, match="'values', shard 1") as caught:
            store.check_shard(1) if data is not None and len(data) > len(whole) else store.read(["values"], 8, 16)
        assert caught.value.shard == 1
    place.put("values/c/1/0", whole)
    place.put("strange", b"")
    assert verify(finalized).warnings == (f"{finalized}/strange: not a file of the store",)
    place.put("lse/zarr.json", b"{}")
    (damage,) = verify(finalized).damage
    assert damage.message.startswith(f"{finalized}: lse/zarr.json: expected the digest in the final record to hold")


def test_a_record_of_a_gigabyte_is_not_read(s3: S3Server, finalized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.untrusted.MAX_RECORD_BYTES", 1300)
    with pytest.raises(DamageError, match=r"final.json: expected at most 1300 bytes, got \d+"):
        open_store(finalized)


def test_a_store_at_a_url_is_never_discarded(s3: S3Server) -> None:
    url = s3.url("store.zarr")
    with StoreWriter.open(url, small_manifest()) as writer:
        assert not discard_unsealed(writer.store)
    assert MANIFEST in objects_at(url)


def test_a_whole_shard_is_fetched_once_to_be_checked(s3: S3Server, finalized: str) -> None:
    with open_store(finalized) as store:
        assert isinstance(store.backend, RemoteBackend)
        store.seal(1)
        before = store.backend.bytes_read
        seal = store.check_shard(1)
        moved = store.backend.bytes_read - before
        num_bytes = sum(int(it["num_bytes"]) for it in seal.objects.values())
        assert num_bytes <= moved <= num_bytes + 2000  # and the seal once more


def test_no_credential_is_in_a_store_its_pickle_or_its_records(s3: S3Server, finalized: str) -> None:
    with open_store(finalized) as store:
        again = pickle.loads(pickle.dumps(store))
        assert again.content_digest == store.content_digest
        texts = [pickle.dumps(store).decode("latin-1"), repr(vars(store.backend)), repr(store.backend)]
    texts += [data.decode("latin-1") for data in objects_at(finalized).values()]
    assert not [text for text in texts if SECRET in text or "KeyThatIsNowhere" in text]


def test_a_path_gets_no_cache_and_a_url_no_hdf5(tmp_path: Path) -> None:
    from storage.backends import CacheSettings

    assert isinstance(backend_for(tmp_path / "x.zarr"), ZarrBackend)
    with pytest.raises(
        ValueError, match=r"cache: expected a store at a URL, got .*, which is here; leave the cache out"
    ):
        backend_for(tmp_path / "x.zarr", CacheSettings(str(tmp_path), 1))
    with pytest.raises(PathError, match="expected a Zarr store at a URL, got the name of an HDF5 file"):
        backend_for("https://host/x.HDF5")


def test_cut_connections_and_failures_in_the_middle_change_nothing(s3: S3Server) -> None:
    url, manifest = s3.url("store.zarr"), small_manifest(**ONE_SHARD)
    with StoreWriter.open(url, manifest) as writer:
        s3.ask(fail=3, status=500)
        write(writer, 0)
        before = s3.ask(fail=1, cut=2)
        writer.finalize()
    s3.ask(cut=2)
    with open_store(url) as store:
        assert_same(store.read(names_of(manifest), 0, 4), expected_rows(manifest, 0, 4))
    after = s3.ask()
    assert after["cut"] - before["cut"] == 4
    assert after["failed"] > before["failed"]
    assert verify(url).ok
