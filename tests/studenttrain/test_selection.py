"""A run that learns from the rows of some classes alone."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from storage.backends import mapped
from storage.corpus import Corpus, Preprocess, open_corpus
from storage.encodings import TopK
from storage.errors import MismatchError, NotSealedError, StudentError
from storage.reader import Store, open_store
from studenttrain.cli import main
from studenttrain.export import load_card
from studenttrain.metrics import StepLog
from studenttrain.selection import ClassSelection, RowClasses, choose_classes, name_classes, parse_classes
from studenttrain.stream import TargetStream
from studenttrain.train import fit
from tests.builders import write_image_folder
from tests.series import write_image_member
from tests.studenttrain.runs import (
    Ground,
    assert_same_weights,
    command,
    final_state,
    make_ground,
    teacher_logits,
    write_blobs,
    write_targets,
)

pytestmark = pytest.mark.usefixtures("no_report", "no_program")

NUM_ROWS = 96


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """What `ground` is a copy of: to make a store durable takes longer than most of these tests."""
    return make_ground(tmp_path_factory.mktemp("made"))


@pytest.fixture
def ground(made: Ground, tmp_path: Path) -> Ground:
    """A corpus of blobs and a finalized float32 dense store of it."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Ground(tmp_path, tmp_path / made.data.name, tmp_path / made.targets.name)


@contextlib.contextmanager
def opened(ground: Ground) -> Iterator[tuple[Store, Corpus]]:
    with open_store(ground.targets) as store:
        yield store, open_corpus(ground.data)


def classes_of(ground: Ground) -> np.ndarray[Any, Any]:
    with np.load(ground.data) as archive:
        classes: np.ndarray[Any, Any] = archive["y"]
        return classes


def stream_of(store: Store, corpus: Corpus, selection: ClassSelection | None, **options: Any) -> TargetStream:
    given: dict[str, Any] = {"arrays": ("values",), "readers": 1, "block_rows": 8, "window_blocks": 3}
    preprocess = Preprocess.from_json(store.manifest.preprocess)
    return TargetStream(store, corpus, preprocess, 5, 3, selection=selection, **given | options)


def test_a_stream_gives_the_rows_of_the_classes_once_an_epoch_with_their_own_targets(ground: Ground) -> None:
    classes, inputs = classes_of(ground), np.load(ground.data)["x"]
    expected = np.flatnonzero(np.isin(classes, (1, 3))).tolist()
    with opened(ground) as (store, corpus):
        selection = choose_classes("1,3", None, RowClasses(store, corpus))
        values = store.read(["values"], 0, NUM_ROWS)["values"]
        with stream_of(store, corpus, selection) as stream:
            for _ in range(2):
                assert stream.num_rows == len(expected)
                batches = list(stream)
                rows = np.concatenate([batch.rows_N for batch in batches])
                assert sorted(rows.tolist()) == expected
                assert [len(batch.rows_N) for batch in batches[:-1]] == [5] * (len(batches) - 1)
                for batch in batches:
                    assert np.array_equal(batch.inputs, inputs[batch.rows_N])
                    assert np.array_equal(batch.arrays["values"], values[batch.rows_N])


def test_a_stream_of_chosen_rows_goes_on_from_every_position_on_any_number_of_ranks(ground: Ground) -> None:
    with opened(ground) as (store, corpus):
        selection = choose_classes(None, "2", RowClasses(store, corpus))
        with stream_of(store, corpus, selection) as stream:
            states, batches = [stream.state()], []
            for _ in range(2):
                for batch in stream:
                    batches.append(batch.rows_N.tolist())
                    states.append(stream.state())
        for position, state in enumerate(states[:-1]):
            parts = []
            for rank in range(2):
                again = choose_classes(None, "2", RowClasses(store, corpus))
                with stream_of(store, corpus, again, rank=rank, world_size=2) as stream:
                    stream.restore(json.loads(json.dumps(state)))
                    parts.append(next(iter(stream)).rows_N.tolist())
            assert parts[0] + parts[1] == batches[position]


def test_blocks_and_samples_that_are_not_chosen_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_blobs(tmp_path / "corpus.npz", NUM_ROWS)
    points = np.load(data)["x"]
    np.savez(data, x=points, y=np.arange(NUM_ROWS) // 24)  # sorted by class, as a folder of images is
    write_targets(tmp_path / "targets.zarr", open_corpus(data))
    blocks: set[tuple[int, int]] = set()
    samples: set[int] = set()
    read_blocks, read_rows = mapped.read_scattered, type(open_corpus(data)).read_rows  # type: ignore[attr-defined]

    def spy(backend: Any, manifest: Any, name: str, ranges: Any, out: Any, positions: Any) -> None:
        blocks.update(ranges)
        read_blocks(backend, manifest, name, ranges, out, positions)

    def spy_rows(corpus: Any, rows_N: Any) -> Any:
        samples.update(rows_N.tolist())
        return read_rows(corpus, rows_N)

    with opened(Ground(tmp_path, data, tmp_path / "targets.zarr")) as (store, corpus):
        selection = choose_classes("1", None, RowClasses(store, corpus))
        monkeypatch.setattr("storage.reader.read_scattered", spy)
        monkeypatch.setattr(type(corpus), "read_rows", spy_rows)
        with stream_of(store, corpus, selection) as stream:
            list(stream)
    assert sorted(blocks) == [(24, 32), (32, 40), (40, 48)]
    assert samples == set(range(24, 48))


def test_the_class_of_a_row_is_the_stores_hard_target_else_that_of_the_corpus_else_the_stored_top1(
    tmp_path: Path,
) -> None:
    for name, labels, kept in (("a", True, True), ("b", True, False), ("c", False, False)):
        (tmp_path / name).mkdir()
        ground = make_ground(tmp_path / name, labels=labels, with_hard_targets=kept, refused=(5,), encoding=TopK(2))
        with opened(ground) as (store, corpus):
            rows = RowClasses(store, corpus)
            found = rows.of_shards(store.sealed_shards())
            assert rows.by_top1 == (not labels)
            if labels:
                assert np.array_equal(found, classes_of(ground))
            else:
                top1 = teacher_logits(np.load(ground.data)["x"]).argmax(1)
                top1[5] = -1
                assert np.array_equal(found, top1)
                chosen = choose_classes("0,1,2,3", None, rows)
                assert chosen is not None
                assert np.flatnonzero(~chosen.chosen(0, store.sealed_shards())).tolist() == [5]


def test_only_classes_learns_what_a_store_of_these_rows_alone_teaches(ground: Ground) -> None:
    seen: set[int] = set()
    real = TargetStream.__iter__

    def spy(stream: TargetStream) -> Any:
        for batch in real(stream):
            seen.update(batch.rows_N.tolist())
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TargetStream, "__iter__", spy)
        result = fit(ground.config(only_classes="0,2"), quiet=True)
    expected = np.flatnonzero(np.isin(classes_of(ground), (0, 2)))
    assert seen == set(expected.tolist())
    assert result.num_rows_seen == 2 * len(expected)
    card = load_card(ground.folder / "run" / "student.json")
    assert card.rows == {"only_classes": [0, 2], "by": "hard targets"}


def test_the_first_line_says_how_many_rows_of_which_classes(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, class_names=("ant", "bee", "cow", "dog"), refused=(0, 1, 2, 3, 4))
    classes = classes_of(ground)
    count, num_refused = int((classes != 3).sum()), int((classes[:5] != 3).sum())
    result = CliRunner().invoke(main, command(ground.config(without_classes="dog")))
    assert result.exit_code == 0, result.output
    assert f" on {count} of 96 rows: without class 'dog', {num_refused} of them refused by the teacher's" in (
        result.output
    )


def test_a_run_on_some_classes_that_was_killed_goes_on_to_the_same_weights(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    options: dict[str, Any] = {"without_classes": "1", "epochs": 3, "checkpoint_every": "2"}
    fit(ground.config("whole", **options), quiet=True)
    add, left = StepLog.add, [3, 4, 9]

    def with_kill(self: StepLog, step: int, *values: Any) -> None:
        add(self, step, *values)
        if left and step == left[0]:
            left.pop(0)
            raise Killed

    monkeypatch.setattr(StepLog, "add", with_kill)
    for _ in range(3):
        with pytest.raises(Killed):
            fit(ground.config("killed", **options), quiet=True)
    fit(ground.config("killed", **options), quiet=True)
    assert_same_weights(final_state(ground.config("whole")), final_state(ground.config("killed")))
    with pytest.raises(StudentError, match="--without-classes 1, not 2"):
        fit(ground.config("killed", **options | {"without_classes": "2"}), quiet=True)


def test_a_store_that_grows_gives_the_rows_of_the_classes_of_what_is_sealed(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "corpus.npz", NUM_ROWS)
    corpus = open_corpus(data)
    path = write_targets(tmp_path / "live.zarr", corpus, shards=(0,), finalize=False)
    with np.load(data) as archive:
        is_own = archive["y"] == 1
    with open_store(path) as store:
        selection = choose_classes("1", None, RowClasses(store, corpus))
        with stream_of(store, corpus, selection) as stream:
            for sealed in (1, 2, 4):
                write_targets(path, corpus, shards=range(sealed), finalize=False)
                rows = np.concatenate([batch.rows_N for batch in stream])
                assert sorted(rows.tolist()) == np.flatnonzero(is_own[: 16 * sealed]).tolist()


def test_a_series_that_grows_gives_the_rows_of_the_classes_of_all_its_members(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data", 24, class_names=())
    for member in range(2):
        names = [f"{number:03d}.png" for number in range(12 * member, 12 * member + 12)]
        write_image_member(tmp_path / "series", data, member, names)
        if member == 0:
            store = open_store(tmp_path / "series")
            rows = RowClasses(store, open_corpus(data))
            assert rows.by_top1
            assert len(rows.of_shards(store.sealed_shards())) == 12
    with store:
        store.refresh()
        found = rows.of_shards(store.sealed_shards())
        assert len(found) == 24
        assert found.min() >= 0
        most = int(np.bincount(found).argmax())
        options = {"targets": str(tmp_path / "series"), "data": str(data), "student": "mlp:192-4-4"}
        ground = Ground(tmp_path, data, tmp_path / "series")
        result = fit(ground.config("run", **options, only_classes=str(most), epochs=1), quiet=True)
        assert result.num_rows_seen == int((found == most).sum())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"only_classes": "4"}, MismatchError, "only_classes: expected classes of .* from 0 to 3 or names, got '4'"),
        ({"without_classes": "x"}, MismatchError, "without_classes: expected classes of .*, got 'x'; see logits"),
        ({"only_classes": "1,,2"}, MismatchError, "only_classes: expected classes of .*, got ''"),
        ({"only_classes": " "}, MismatchError, "only_classes: expected classes of .*, got ''"),
        (
            {"without_classes": "0,1,2,3"},
            StudentError,
            r"without_classes: expected rows that are left in .*, got none \(without classes 0, 1, 2, 3\)",
        ),
    ],
)  # fmt: skip
def test_classes_that_the_store_does_not_have_and_nothing_left_are_refused(
    options: dict[str, str], kind: type[Exception], message: str, ground: Ground
) -> None:
    with pytest.raises(kind, match=message):
        fit(ground.config(**options), quiet=True)
    assert not (ground.folder / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only_classes": "1", "without_classes": "2"}, "only_classes, without_classes: expected one of them"),
        ({"only_classes": ""}, "only_classes: expected some text, got none"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options: dict[str, str], message: str, ground: Ground) -> None:
    with pytest.raises(ValueError, match=message):
        ground.config(**options)


def test_an_epoch_without_a_chosen_row_yet_says_so(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "corpus.npz", NUM_ROWS)
    np.savez(data, x=np.load(data)["x"], y=np.arange(NUM_ROWS) // 24)
    path = write_targets(tmp_path / "targets.zarr", open_corpus(data), shards=(0,), finalize=False)
    ground = Ground(tmp_path, data, path)
    with pytest.raises(NotSealedError, match="expected a sealed row that is chosen, got none yet; wait until"):
        fit(ground.config(only_classes="3"), quiet=True)


def test_a_number_that_is_the_name_of_another_class_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, class_names=("1", "0", "tench, Tinca tinca", "3"))
    with opened(ground) as (store, _):
        assert parse_classes("only_classes", '3, "tench, Tinca tinca"', store) == (2, 3)
        assert parse_classes("only_classes", "2", store) == (2,)
        with pytest.raises(MismatchError, match="got '1', which is class 1 by number and class 0 by name"):
            parse_classes("only_classes", "1", store)


def test_sequences_have_no_classes_to_choose(ground: Ground) -> None:
    with opened(ground) as (store, corpus):
        store.manifest = replace(store.manifest)
        object.__setattr__(store.manifest, "sequences", object())
        with pytest.raises(StudentError, match="only_classes: expected a store whose rows have a class, got sequences"):
            choose_classes("1", None, RowClasses(store, corpus))


def test_many_classes_are_named_in_short() -> None:
    assert name_classes(range(8), None) == "classes 0, 1, 2, 3, 4 and 3 more"
    assert name_classes([0, 1], ("0", "owl")) == "classes 0, 'owl'"
