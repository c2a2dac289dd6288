"""The student's stream: each row once with its own target, from any position on, and no thread left behind."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from storage.backends import mapped
from storage.corpus import Batch, Corpus, Preprocess, SampleError, open_corpus
from storage.encodings import Dense, TopK
from storage.errors import CorpusMismatchError, DamageError, NotSealedError
from storage.reader import Store, open_store
from storage.writer import StoreWriter
from studenttrain.order import EpochOrder
from studenttrain.stream import StudentBatch, TargetStream, split_samples
from studenttrain.window import TargetReader
from tests.studenttrain.runs import teacher_logits, write_blobs, write_targets

Array = NDArray[Any]
NUM_ROWS, SHARD_ROWS = 96, 16


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a chunk of 8 rows, windows of 24 rows, so that a small store has many."""
    monkeypatch.setattr("studenttrain.stream.choose_block_rows", lambda _: 8)
    monkeypatch.setattr("studenttrain.stream.choose_window_blocks", lambda *_: 3)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every test closes what it opens."""
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("targets", "samples", "batches"))]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Blobs with hard targets."""
    return open_corpus(write_blobs(tmp_path / "corpus.npz", NUM_ROWS))


@pytest.fixture
def store(tmp_path: Path, corpus: Corpus) -> Iterator[Store]:
    """A float32 dense store of them, two rows in quarantine."""
    with open_store(write_targets(tmp_path / "targets.zarr", corpus, refused=(7, 50))) as store:
        yield store


def stream_of(store: Store, corpus: Corpus, batch_size: int = 10, seed: int = 3, **options: Any) -> TargetStream:
    """A stream with the preprocessing of the store."""
    preprocess = Preprocess.from_json(store.manifest.preprocess)
    given: dict[str, Any] = {"arrays": ("values", "status"), "readers": 2}
    return TargetStream(store, corpus, preprocess, batch_size, seed, **given | options)


def rows_of(batches: Sequence[StudentBatch]) -> list[list[int]]:
    """The rows of some batches."""
    return [batch.rows_N.tolist() for batch in batches]


def assert_same(one: StudentBatch, two: StudentBatch) -> None:
    """Two batches are equal, bit for bit."""
    for name in ("rows_N", "inputs", "hard_targets_N", "valid_N"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
    assert one.arrays.keys() == two.arrays.keys()
    for name, values in one.arrays.items():
        assert values.tobytes() == two.arrays[name].tobytes(), name


def test_each_epoch_gives_every_row_once_with_its_own_sample_and_target(store: Store, corpus: Corpus) -> None:
    inputs = np.load(corpus.path)["x"]
    hard_targets = corpus.hard_targets
    assert hard_targets is not None
    logits = teacher_logits(inputs)
    seen = []
    with stream_of(store, corpus) as stream:
        for _ in range(3):
            batches = list(stream)
            assert [len(batch.rows_N) for batch in batches] == [10] * 9 + [6]
            rows = np.concatenate([batch.rows_N for batch in batches])
            assert sorted(rows.tolist()) == list(range(NUM_ROWS))
            seen.append(rows.tolist())
            for batch in batches:
                ok = batch.valid_N
                assert (~ok).tolist() == np.isin(batch.rows_N, (7, 50)).tolist()
                assert np.array_equal(batch.inputs, inputs[batch.rows_N])
                assert batch.hard_targets_N is not None
                assert np.array_equal(batch.hard_targets_N, hard_targets[batch.rows_N])
                assert set(batch.arrays) == {"values", "status"}
                centred = logits[batch.rows_N] - logits[batch.rows_N].max(1, keepdims=True)
                assert np.array_equal(batch.arrays["values"][ok], centred[ok])
                assert np.isnan(batch.arrays["values"][~ok]).all()
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_the_order_depends_on_the_seed_alone(store: Store, corpus: Corpus) -> None:
    def epoch(**options: Any) -> list[list[int]]:
        with stream_of(store, corpus, **options) as stream:
            return rows_of(list(stream))

    assert epoch() == epoch(readers=1, prefetch=5, arrays=("entropy",)) != epoch(seed=4)


def test_a_stream_restored_from_every_position_goes_on_identically(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        states = [stream.state()]
        batches = []
        for _ in range(3):
            for batch in stream:
                batches.append(batch)
                states.append(stream.state())
    for position, state in enumerate(states[:-1]):
        assert len(json.dumps(state)) < 300
        with stream_of(store, corpus) as stream:
            stream.restore(json.loads(json.dumps(state)))
            assert stream.state() == state
            for expected in batches[position : position + 12]:
                if stream.batch == 0 or expected is batches[position]:
                    rest = iter(stream)
                assert_same(next(rest), expected)


def test_arrays_of_a_batch_stay_as_they_are(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        kept = list(stream)
    copies = [batch.arrays["values"].copy() for batch in kept]
    with stream_of(store, corpus) as stream:
        for batch, copy, again in zip(kept, copies, stream, strict=True):
            assert batch.arrays["values"].tobytes() == copy.tobytes() == again.arrays["values"].tobytes()


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_see_the_batches_of_one(store: Store, corpus: Corpus, world_size: int) -> None:
    with stream_of(store, corpus) as stream:
        alone = list(stream)
    shares = []
    for rank in range(world_size):
        with stream_of(store, corpus, rank=rank, world_size=world_size) as stream:
            shares.append(list(stream))
    for batch, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert np.concatenate([part.rows_N for part in parts]).tolist() == batch.rows_N.tolist()
        assert np.concatenate([part.arrays["values"] for part in parts]).tobytes() == batch.arrays["values"].tobytes()
        assert np.concatenate([part.inputs for part in parts]).tobytes() == batch.inputs.tobytes()
    if world_size == 7:  # the last batch has six rows
        assert [len(share[-1].rows_N) for share in shares] == [0, 1, 1, 1, 1, 1, 1]
        assert shares[0][-1].inputs.shape == (0, 8)


def test_the_world_size_may_change_on_going_on(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        batches = iter(stream)
        for _ in range(4):
            next(batches)
        state, expected = stream.state(), next(batches)
    parts = []
    for rank in range(2):
        with stream_of(store, corpus, rank=rank, world_size=2) as stream:
            stream.restore(state)
            parts.append(next(iter(stream)).rows_N)
    assert np.concatenate(parts).tolist() == expected.rows_N.tolist()


def test_iterating_again_gives_the_rest_of_the_epoch_then_the_next(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        whole = rows_of(list(stream) + list(stream))
    with stream_of(store, corpus) as stream:
        found = []
        for batch in stream:
            found.append(batch)
            if len(found) == 3:
                break
        assert (stream.epoch, stream.batch, stream.num_batches, stream.num_rows) == (0, 3, 10, NUM_ROWS)
        stale = iter(stream)
        found.append(next(stale))
        found += list(stream)
        assert list(stale) == []
        assert (stream.epoch, stream.batch) == (1, 0)
        assert rows_of(found + list(stream)) == whole


def test_an_epoch_holds_the_shards_that_are_sealed_when_it_begins(tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / "growing.zarr", corpus, shards=(1, 4), finalize=False)

    def sealed_rows(batches: Sequence[StudentBatch]) -> set[int]:
        return {row // SHARD_ROWS for batch in batches for row in batch.rows_N.tolist()}

    with open_store(path) as store, stream_of(store, corpus) as stream:
        assert stream.num_rows == 32
        first = iter(stream)
        begun = [next(first)]
        state = stream.state()
        assert state["sealed"] == [[1, 2], [4, 5]]
        write_targets(path, corpus, shards=(0, 5), finalize=False)
        begun += list(first)
        assert sealed_rows(begun) == {1, 4}
        assert sum(len(batch.rows_N) for batch in begun) == 32
        assert stream.state()["sealed"] is None
        assert sealed_rows(list(stream)) == {0, 1, 4, 5}
        stream.restore(state)
        assert rows_of(list(stream)) == rows_of(begun[1:])
    write_targets(path, corpus)  # the rest, and finalized
    with open_store(path) as store, stream_of(store, corpus) as stream:
        stream.restore(state)
        assert rows_of(list(stream)) == rows_of(begun[1:])
        assert sealed_rows(list(stream)) == {0, 1, 2, 3, 4, 5}


def test_the_shards_of_an_epoch_can_be_given(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        order = stream.begin_epoch([0, 1, 3])
        assert order.sealed == ((0, 2), (3, 4))
        assert stream.begin_epoch() is order is stream.begin_epoch([5])
        assert stream.num_batches == 5
        assert sum(len(batch.rows_N) for batch in stream) == 48
        assert stream.num_rows == NUM_ROWS


def test_without_a_sealed_shard_there_is_nothing_to_stream(tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / "empty.zarr", corpus, shards=(), finalize=False)
    with (
        open_store(path) as store,
        stream_of(store, corpus) as stream,
        pytest.raises(
            NotSealedError, match=r"expected a sealed shard, got none yet; wait until the dump has sealed one"
        ),
    ):
        next(iter(stream))


def test_a_state_of_another_run_is_refused(tmp_path: Path, store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        next(iter(stream))
        state = stream.state()
        with pytest.raises(ValueError, match="seed: expected 9 as in the state, got 3"):
            stream.restore(state | {"seed": 9})
        with pytest.raises(ValueError, match="batch_size: expected 32 as in the state, got 10"):
            stream.restore(state | {"batch_size": 32})
        with pytest.raises(ValueError, match="sealed: expected ascending ranges in 0 to 6"):
            stream.restore(state | {"sealed": [[0, 7]]})
    less = write_targets(tmp_path / "less.zarr", corpus, shards=(0, 1, 2), finalize=False)
    with (
        open_store(less) as store,
        stream_of(store, corpus) as stream,
        pytest.raises(NotSealedError, match="expected shard 3 sealed, as when the training stopped, got no seal"),
    ):
        stream.restore(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size, prefetch, readers: expected at least 1, got 0, 2, 2"),
        ({"prefetch": 0}, "expected at least 1, got 10, 0, 2"),
        ({"readers": 0}, "expected at least 1, got 10, 2, 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2"),
        ({"seed": -1}, r"seed: expected 0 to 2\^64 - 1, got -1"),
        ({"arrays": ("logits",)}, "names: expected arrays that the store keeps, got logits"),
    ],
)
def test_an_argument_out_of_range_is_refused(
    options: dict[str, Any], message: str, store: Store, corpus: Corpus
) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(store, corpus, **options)


def test_a_sample_that_was_replaced_stops_the_stream_and_is_named(tmp_path: Path, store: Store) -> None:
    arrays = dict(np.load(tmp_path / "corpus.npz"))
    arrays["x"][41, 3] += 1e-3
    np.savez(tmp_path / "other.npz", **arrays)
    other = open_corpus(tmp_path / "other.npz")
    with (
        stream_of(store, other) as stream,
        pytest.raises(CorpusMismatchError, match=r"row 41 .*: expected the sample that it was made from"),
    ):
        list(stream)


@pytest.mark.parametrize("group_batches", [1, 3, 8])
def test_the_batches_before_a_replaced_sample_are_given(group_batches: int, tmp_path: Path, store: Store) -> None:
    with stream_of(store, open_corpus(tmp_path / "corpus.npz")) as stream:
        batches = rows_of(list(stream))
    arrays = dict(np.load(tmp_path / "corpus.npz"))
    arrays["x"][batches[5][3]] += 1
    np.savez(tmp_path / "other.npz", **arrays)
    given: list[StudentBatch] = []
    with stream_of(store, open_corpus(tmp_path / "other.npz")) as stream:
        stream._group_batches = group_batches
        with pytest.raises(CorpusMismatchError, match="expected the sample that it was made from"):
            given.extend(iter(stream))
        assert rows_of(given) == batches[:5]
        assert stream.batch == 5


@pytest.mark.parametrize(("world_size", "refused"), [(1, ()), (3, (2, 15, 16, 17))])
def test_batches_that_are_read_at_once_are_those_that_are_read_singly(
    world_size: int, refused: Sequence[int], tmp_path: Path, store: Store, corpus: Corpus
) -> None:
    del store
    path = write_targets(tmp_path / "more.zarr", corpus, refused=refused)
    with open_store(path) as store:
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "batch_size": 7}
            with stream_of(store, corpus, **options) as one, stream_of(store, corpus, **options) as two:
                assert one._group_batches > 1
                two._group_batches = 1
                for a, b in zip(one, two, strict=True):
                    assert_same(a, b)


def test_the_batches_that_are_ready_are_those_that_come(store: Store, corpus: Corpus) -> None:
    with stream_of(store, corpus) as stream:
        batches = iter(stream)
        next(batches)
        ready = list(stream.ready)
        assert len(ready) == 7
        assert [next(batches) for _ in range(7)] == ready
        assert not stream.ready
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert not stream.ready


def test_what_can_not_be_decoded_stays_in_its_own_batch() -> None:
    samples = Batch(np.arange(5), np.zeros((5, 2), np.float32), np.arange(5, dtype=np.uint64), {1: "a", 2: "b", 4: "c"})
    parts = split_samples(samples, [2, 0, 3])
    assert [part.errors for part in parts] == [{1: "a"}, {}, {0: "b", 2: "c"}]
    assert [part.rows_N.tolist() for part in parts] == [[0, 1], [], [2, 3, 4]]
    assert [part.digests_N.tolist() for part in parts] == [[0, 1], [], [2, 3, 4]]


def test_a_sample_that_no_longer_decodes_stops_the_stream(
    store: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = corpus.read_raw(41)
    decode = type(corpus).decode

    def fail(corpus: Corpus, data: bytes) -> Array:
        if data == raw:
            raise SampleError("no such codec")
        return decode(corpus, data)

    read_rows = type(corpus).read_rows  # type: ignore[attr-defined]

    def fail_many(corpus: Corpus, rows_N: Array) -> Array:
        if len(rows_N) > 1:
            raise SampleError("one at a time")
        result: Array = read_rows(corpus, rows_N)
        return result

    monkeypatch.setattr(type(corpus), "decode", fail)
    monkeypatch.setattr(type(corpus), "read_rows", fail_many)
    with (
        stream_of(store, corpus) as stream,
        pytest.raises(
            CorpusMismatchError, match=r"row 41 .*: expected a sample that decodes .*, got no such codec; use"
        ),
    ):
        list(stream)


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_a_flipped_bit_stops_the_stream_with_the_damage(suffix: str, tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / f"damaged{suffix}", corpus)
    if suffix == ".zarr":
        file, needle = path / "values" / "c" / "3" / "0", None
    else:
        with open_store(path) as store:
            needle = store.read(["values"], 50, 51)["values"].tobytes()
        file = path
    data = bytearray(file.read_bytes())
    place = 100 if needle is None else data.index(needle)
    data[place] ^= 1
    file.write_bytes(data)
    with (
        open_store(path) as store,
        stream_of(store, corpus) as stream,
        pytest.raises(DamageError, match="array 'values', shard 3, chunk 0"),
    ):
        list(stream)


def test_a_changed_seal_stops_the_stream(tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / "damaged.zarr", corpus)
    seal = path / "seals" / "00000003.json"
    data = bytearray(seal.read_bytes())
    data[40] ^= 1
    seal.write_bytes(data)
    with (
        open_store(path) as store,
        stream_of(store, corpus) as stream,
        pytest.raises(DamageError, match=r"00000003\.json: expected its checksum"),
    ):
        list(stream)


def test_nothing_before_the_window_in_hand_is_read(
    store: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    real = mapped.read_scattered

    def spy(backend: Any, manifest: Any, name: str, ranges: Any, out: Array, positions: Array) -> None:
        read.update(row for start, stop in ranges for row in range(start, stop))
        real(backend, manifest, name, ranges, out, positions)

    monkeypatch.setattr("storage.reader.read_scattered", spy)
    with stream_of(store, corpus) as stream:
        stream.restore(stream.state() | {"batch": 8, "sealed": [[0, 6]]})
        order = stream.begin_epoch()
        list(stream)
    assert read == set(order.rows(72, 96).tolist())  # batch 8 begins at row 80, in the window of rows 72 to 95


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
@pytest.mark.parametrize("encoding", [Dense("float16"), TopK(2, "uint8")], ids=str)
def test_a_reader_gives_what_the_store_holds(suffix: str, encoding: Any, tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / f"other{suffix}", corpus, encoding=encoding)
    with open_store(path) as store:
        names = [spec.name for spec in store.manifest.arrays]
        whole = store.read(names, 0, NUM_ROWS)
        order = EpochOrder(store.layout, ((0, 6),), 0, 0, 8, 3)
        for threads in (1, 3):
            with TargetReader(store, names, threads) as reader:
                for batch in reader.batches(order, 50):  # batches of more than a window
                    for name in names:
                        assert batch.arrays[name].tobytes() == whole[name][batch.rows_N].tobytes()


def test_buffers_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    sizes = []
    for num_rows in (64, 640):
        corpus = open_corpus(write_blobs(tmp_path / f"{num_rows}.npz", num_rows))
        with open_store(write_targets(tmp_path / f"{num_rows}.zarr", corpus)) as store:
            order = EpochOrder(store.layout, ((0, store.layout.num_shards),), 0, 0, 8, 3)
            with TargetReader(store, ["values"]) as reader:
                for _ in range(2):
                    assert sum(len(batch.rows_N) for batch in reader.batches(order, 7)) == num_rows
                sizes.append(sum(values.nbytes for buffers in reader._buffers for values in buffers.values()))
    assert sizes[0] == sizes[1] == 2 * 24 * 16


def test_closing_in_the_middle_leaves_at_once(store: Store, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows = type(corpus).read_rows  # type: ignore[attr-defined]

    def slow(corpus: Corpus, rows_N: Array) -> Array:
        time.sleep(0.2)
        result: Array = read_rows(corpus, rows_N)
        return result

    monkeypatch.setattr(type(corpus), "read_rows", slow)
    stream = stream_of(store, corpus, prefetch=50)
    batches = iter(stream)
    next(batches)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 1.0  # one batch is being read, nine were waiting
    assert next(batches, None) is None
    stream.close()


def test_an_error_in_the_loop_leaves_no_thread(store: Store, corpus: Corpus) -> None:
    held = []

    def interrupt(batch: StudentBatch) -> None:
        held.append(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), stream_of(store, corpus) as stream:
        list(map(interrupt, stream))
    assert len(held) == 1


def test_a_reader_that_is_left_in_the_middle_serves_the_next_epoch(store: Store) -> None:
    order = EpochOrder(store.layout, ((0, 6),), 0, 0, 8, 3)
    whole = store.read(["values"], 0, NUM_ROWS)["values"]
    with TargetReader(store, ["values"]) as reader:
        for _ in range(20):
            left = reader.batches(order, 5)
            next(left)
            left.close()
            for batch in reader.batches(order, 5, first=3):
                assert batch.arrays["values"].tobytes() == whole[batch.rows_N].tobytes()
        assert list(reader.batches(order, 5, first=20)) == []


def test_a_store_that_is_written_meanwhile_is_streamed(tmp_path: Path, corpus: Corpus) -> None:
    path = write_targets(tmp_path / "live.zarr", corpus, shards=(0,), finalize=False)
    with open_store(path) as store, StoreWriter.open(path, store.manifest), stream_of(store, corpus) as stream:
        for sealed in range(1, 4):
            assert sum(len(batch.rows_N) for batch in stream) == sealed * SHARD_ROWS
            write_targets(path, corpus, shards=(sealed,), finalize=False)
