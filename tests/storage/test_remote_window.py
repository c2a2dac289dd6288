"""Windows of a remote store: the right rows in their places, few requests, hardly a byte too many, and the cache."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.backends import CacheSettings, IsFarAway
from storage.backends.cache import ByteCache
from storage.backends.remote_bytes import BufferSource, Known, KnownObjects
from storage.backends.remote_window import MAX_REQUEST_BYTES, WASTE, plan_requests, rows_by_shard
from storage.errors import DamageError, PathError
from storage.layout import Layout
from storage.reader import Store, open_store
from storage.writer import StoreWriter
from tests.contracts.small import expected_rows, small_manifest, write
from tests.s3 import S3Server

DIGEST = "ab" * 16
RANGES = [(0, 8), (9, 11), (12, 16), (16, 22)]


@st.composite
def windows(draw: st.DrawFn) -> tuple[Layout, list[tuple[int, int]]]:
    """A layout, and ranges of rows that don't overlap, each inside one shard, ascending."""
    chunk_rows = draw(st.integers(1, 4))
    layout = Layout(draw(st.integers(1, 60)), chunk_rows * draw(st.integers(1, 4)), chunk_rows)
    edges = sorted(draw(st.sets(st.integers(0, layout.num_rows), min_size=2, max_size=9)))
    pieces = [piece for low, high in zip(edges[::2], edges[1::2], strict=False) for piece in layout.split(low, high)]
    return layout, [(start, stop) for _, start, stop in pieces]


@given(windows(), st.integers(1, 2000), st.data())
def test_requests_cover_every_chunk_and_waste_little(
    window: tuple[Layout, list[tuple[int, int]]], largest: int, data: st.DataObject
) -> None:
    layout, ranges = window
    num_chunks = layout.shard_rows // layout.chunk_rows
    sizes = {name: data.draw(st.integers(1, largest)) for name in ("wide", "narrow")}

    def index_of(name: str, shard: int) -> np.ndarray:
        offsets = np.arange(num_chunks) * sizes[name]
        return np.stack([offsets, np.full(num_chunks, sizes[name])], axis=1).astype(np.uint64)

    rows = rows_by_shard(layout, ranges)
    requests = plan_requests(list(sizes), rows, index_of, lambda *_: AssertionError())
    seen = []
    for request in requests:
        assert request.stop - request.start <= max(MAX_REQUEST_BYTES, largest)
        for it in request.rows:
            first = request.shard * layout.shard_rows + it.chunk * layout.chunk_rows + it.skipped
            seen += [(request.name, first + at, it.place + at) for at in range(it.num_rows)]
            assert request.start <= it.chunk * sizes[request.name]
            assert (it.chunk + 1) * sizes[request.name] <= request.stop
    wanted = [row for start, stop in ranges for row in range(start, stop)]
    assert sorted(seen) == sorted((name, row, place) for name in sizes for place, row in enumerate(wanted))
    used = {(name, row // layout.shard_rows, row % layout.shard_rows // layout.chunk_rows) for name, row, _ in seen}
    useful = sum(sizes[name] for name, _, _ in used)
    assert sum(it.stop - it.start for it in requests) <= useful * (1 + WASTE)


def test_requests_for_one_object_are_joined_first_over_the_smallest_gaps() -> None:
    layout = Layout(400, 400, 4)
    index = np.stack([np.arange(100) * 100, np.full(100, 100)], axis=1).astype(np.uint64)
    ranges = [(0, 200), (204, 300), (320, 396)]
    requests = plan_requests(["x"], rows_by_shard(layout, ranges), lambda *_: index, lambda *_: AssertionError())
    assert [(it.start, it.stop) for it in requests] == [(0, 7500), (8000, 9900)]
    index[3, 0] = np.iinfo(np.uint64).max
    with pytest.raises(DamageError, match="chunk 3"):
        plan_requests(["x"], rows_by_shard(layout, ranges), lambda *_: index, lambda *at: DamageError(f"chunk {at[2]}"))


@pytest.fixture
def url(s3: S3Server) -> str:
    url = s3.url("store.zarr")
    with StoreWriter.open(url, small_manifest(compressor="zstd")) as writer:
        write(writer)
        writer.finalize()
    return url


def check_windows(store: Store) -> None:
    """Rows of all arrays come to their places."""
    rows = np.concatenate([np.arange(*pair) for pair in RANGES])
    positions = np.random.default_rng(0).permutation(len(rows))
    outs = {spec.name: spec.full(len(rows)) for spec in store.manifest.arrays}
    store.read_window(RANGES, outs, positions)
    for name, expected in expected_rows(store.manifest, 0, 22).items():
        assert outs[name][positions].tobytes() == expected[rows].tobytes(), name


def test_a_window_is_what_reading_row_by_row_gives(url: str, s3: S3Server, tmp_path: Path) -> None:
    for where in (url, s3.http(url)):
        with open_store(where) as store:
            assert store.is_far_away
            check_windows(store)
    with StoreWriter.open(tmp_path / "x.zarr", small_manifest()) as writer:
        assert not writer.store.is_far_away


def test_a_window_that_nobody_waits_for_is_left(url: str) -> None:
    with open_store(url) as store:
        assert isinstance(store.backend, IsFarAway)
        outs = {"lse": np.zeros((22, 2), np.float32)}
        store.read_window([(0, 8)], outs, np.arange(8), lambda: True)
        assert not outs["lse"].any()


def test_a_flipped_bit_in_an_object_is_found_in_a_window(url: str) -> None:
    with open_store(url) as store:
        place = store.backend.place  # type: ignore[attr-defined]
        data = place.get("values/c/1/0")
        place.put("values/c/1/0", bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(DamageError, match="'values', shard 1, chunk 0"):
            check_windows(store)


def moved(store: Store) -> int:
    """Bytes that reading all windows moves."""
    assert isinstance(store.backend, IsFarAway)
    before = store.backend.bytes_read
    check_windows(store)
    return store.backend.bytes_read - before


def test_a_second_epoch_moves_no_bytes(url: str, tmp_path: Path) -> None:
    settings_ = CacheSettings(str(tmp_path / "cache"), 10**6)
    with open_store(url, settings_) as store:
        assert moved(store) > 0
        assert moved(store) == 0
        assert ByteCache(settings_).num_bytes() == sum(
            int(it["num_bytes"]) for shard in range(3) for it in store.seal(shard).objects.values()
        )
    with open_store(url, settings_) as store:  # another run: only the records
        seals = sum(len(store.backend.get_record(f"seals/0000000{shard}.json") or b"") for shard in range(3))
        assert moved(store) == seals
        whole = store.read(["values"], 3, 20)["values"]
        assert whole.tobytes() == expected_rows(store.manifest, 3, 20)["values"].tobytes()
        assert moved(store) == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_piece_is_fetched_again(url: str, tmp_path: Path, damage: str) -> None:
    settings_ = CacheSettings(str(tmp_path / "cache"), 10**6)
    with open_store(url, settings_) as store:
        check_windows(store)
    for path in (tmp_path / "cache").glob(f"{'[0-9a-f]' * 32}-*"):
        data = path.read_bytes()
        path.write_bytes({"flipped": bytes(byte ^ 255 for byte in data), "short": data[:-1], "empty": b""}[damage])
    with open_store(url, settings_) as store:
        assert moved(store) > 0
        assert moved(store) == 0
        np.testing.assert_array_equal(store.read(["status"], 0, 8)["status"][:5], 0)


def test_a_damaged_piece_is_fetched_again_by_plain_reading_too(url: str, tmp_path: Path) -> None:
    settings_ = CacheSettings(str(tmp_path / "cache"), 10**6)
    for _ in range(2):
        with open_store(url, settings_) as store:
            found = store.read(["values"], 0, 22)["values"]
            assert found.tobytes() == expected_rows(store.manifest, 0, 22)["values"].tobytes()
        for path in (tmp_path / "cache").glob(f"{'[0-9a-f]' * 32}-*"):
            path.write_bytes(bytes(path.stat().st_size))


def test_a_full_cache_keeps_what_it_has_and_stays_within_its_limit(url: str, tmp_path: Path) -> None:
    settings_ = CacheSettings(str(tmp_path / "cache"), 1500)
    with open_store(url, settings_) as store:
        first = moved(store)
        kept = set((tmp_path / "cache").iterdir())
        second = moved(store)
        assert 0 < second < first
        assert set((tmp_path / "cache").iterdir()) == kept
        assert 0 < ByteCache(settings_).num_bytes() <= 1500


def test_what_nobody_used_for_an_hour_makes_room_the_oldest_first(tmp_path: Path) -> None:
    cache = ByteCache(CacheSettings(str(tmp_path), 300))
    for start in (0, 100, 200):
        assert cache.put(DIGEST, start, bytes(100))
    assert not cache.put(DIGEST, 300, bytes(100))
    assert not cache.has_room()
    hours = {0: 3, 100: 5, 200: 0.5}
    for start, age in hours.items():
        os.utime(tmp_path / f"{DIGEST}-{start}", (time.time() - age * 3600,) * 2)
    cache = ByteCache(CacheSettings(str(tmp_path), 300))
    assert cache.put(DIGEST, 300, bytes(100))
    assert cache.get(DIGEST, 100, 200) is None
    assert cache.get(DIGEST, 0, 100) == bytes(100)  # which marks it as used
    cache = ByteCache(CacheSettings(str(tmp_path), 300))
    assert not cache.put(DIGEST, 400, bytes(100))
    assert cache.num_bytes() == 300


def test_a_cache_that_can_not_be_written_is_only_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ByteCache(CacheSettings(str(tmp_path), 300))

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(ByteCache, "_write", fail)
    assert not cache.put(DIGEST, 0, bytes(10))
    assert cache.get(DIGEST, 0, 10) is None


def test_a_digest_that_is_none_is_no_name_of_a_file(tmp_path: Path) -> None:
    cache = ByteCache(CacheSettings(str(tmp_path / "cache"), 300))
    for digest in ("../../x", "", "AB" * 16, "ab" * 16 + "/x"):
        assert not cache.put(digest, 0, b"x")
        assert cache.get(digest, 0, 1) is None
        cache.drop(digest, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_begins_in_an_empty_folder_and_mends_itself(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(PathError, match=r"expected an empty folder, or a cache, got 'photo.jpg' in it"):
        ByteCache(CacheSettings(str(tmp_path), 300))
    with pytest.raises(PathError, match="expected a path in a folder, got"):
        ByteCache(CacheSettings(str(tmp_path / "photo.jpg"), 300))
    with pytest.raises(ValueError, match="cache_size: expected at least 1 byte, got 0"):
        CacheSettings(str(tmp_path), 0)
    folder = tmp_path / "cache"
    ByteCache(CacheSettings(str(folder), 300)).put(DIGEST, 0, bytes(200))
    (folder / "count").write_text("no number")
    left = folder / f"{DIGEST}-5.{'cd' * 16}.partial"
    left.touch()
    cache = ByteCache(CacheSettings(str(folder), 300))
    assert not left.exists()
    assert not cache.put(DIGEST, 200, bytes(200))


SHARING = """
import sys
from storage.backends.cache import ByteCache, CacheSettings
cache = ByteCache(CacheSettings(sys.argv[1], 20_000))
for start in range(0, 60_000, 100):
    data = str(start).encode().ljust(100)
    found = cache.get("ab" * 16, start, start + 100)
    assert found in (None, data), start
    cache.put("ab" * 16, start, data)
    cache._full_until = 0
    if start % 700 == 0:
        cache.drop("ab" * 16, start)
"""


def test_processes_share_a_cache_within_its_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARING, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    most = 0
    while any(process.poll() is None for process in processes):
        sizes = [path.stat().st_size for path in tmp_path.glob("*-*[0-9]") if path.exists()]
        most = max(most, sum(sizes))
        time.sleep(0.01)
    assert [process.wait() for process in processes] == [0, 0]
    assert 19_000 <= ByteCache(CacheSettings(str(tmp_path), 20_000)).num_bytes() <= 20_000
    assert most <= 20_000


def test_bytes_in_memory_are_read_like_a_file() -> None:
    source = BufferSource(10, b"0123456789")
    assert (source.read(3, 12), source.read(5, 18), source.read(1, 5)) == (b"234", b"89", b"")
    one, two = bytearray(3), bytearray(3)
    assert source.read_into([memoryview(one), memoryview(two)], 16) == 4
    assert (bytes(one), bytes(two)) == (b"678", b"9\0\0")
    assert source.read_into([memoryview(one)], 5) == 0


@settings(max_examples=20)
@given(st.integers(1, 2**40), st.binary(min_size=16, max_size=16))
def test_what_seals_say_of_objects_is_remembered(num_bytes: int, digest: bytes) -> None:
    known = KnownObjects()
    known.learn(3, ["a", "b", "c"], {"a": {"num_bytes": num_bytes, "xxh3_128": digest.hex()}, "c": {"xxh3_128": "no"}})
    assert known.of(3, 0) == Known(num_bytes, digest.hex())
    assert known.of(3, 1) is known.of(3, 2) is known.of(2, 0) is None
    assert 3 in known
