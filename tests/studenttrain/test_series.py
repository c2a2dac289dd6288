"""A student that learns from a series while it grows, and learns the same again from the finished one."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from storage.corpus import open_corpus
from storage.corpus.growing import GrowingCorpus
from storage.errors import (
    CorpusError,
    CorpusMismatchError,
    MismatchError,
    NotSealedError,
    PathError,
    StudentError,
)
from storage.reader import open_store
from storage.series import Series
from studenttrain import epoch_start
from studenttrain.cli import main
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.epochs import EPOCHS, read_epochs
from studenttrain.metrics import StepLog
from studenttrain.preparation import open_data, prepare
from studenttrain.train import fit
from tests.builders import write_image_folder
from tests.series import write_image_member
from tests.studenttrain.runs import assert_same_weights, final_state, metric_lines, write_targets

pytestmark = pytest.mark.usefixtures("no_report", "no_export")

NUM_IMAGES = 56


class Killed(BaseException):
    """What ends a run at once, as a kill does: nothing is saved."""


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that an export takes: weights are compared in checkpoints."""
    monkeypatch.setattr("studenttrain.ending.export_student", lambda *_: "not in a test")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """56 flat images of 8 x 8 pixels."""
    return write_image_folder(tmp_path_factory.mktemp("images") / "data", NUM_IMAGES, class_names=())


def names(start: int, stop: int) -> list[str]:
    return [f"{number:03d}.png" for number in range(start, stop)]


class Growth:
    """A series of three members over the images, written a stage at a time; the second leaves two samples out.

    0: two shards of the first member. 1: all of it. 2: one shard of the second. 3: all of both. 4: the third too.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data, self.stage = folder, data, -1
        self.to(0)

    def to(self, stage: int) -> None:
        for number in range(self.stage + 1, stage + 1):
            self._write(number)
        self.stage = max(stage, self.stage)

    def _write(self, stage: int) -> None:
        member = [0, 0, 1, 1, 2][stage]
        rows = [(0, 20), (20, 36), (36, 56)][member]
        shards = {0: [0, 1], 2: [1]}.get(stage)
        left_out = ((1, 3),) if member == 1 else ()
        write_image_member(
            self.folder, self.data, member, names(*rows), left_out, shards=shards, finalize=shards is None,
            refused=[1] if member == 0 else [],
        )  # fmt: skip


@pytest.fixture
def growth(tmp_path: Path, images: Path) -> Growth:
    return Growth(tmp_path / "series", images)


def config(growth: Growth, out: str = "run", **options: Any) -> FitConfig:
    given: dict[str, Any] = {"epochs": 5, "student": "mlp:192-8-4,dropout=0.3", "warmup_steps": 3}
    given |= {"batch_size": 8, "device": "cpu", "readers": 1, "checkpoint_every": "4"}
    where = {"targets": str(growth.folder), "data": str(growth.data), "out": str(growth.folder.parent / out)}
    return FitConfig(**where | given | options)


@contextlib.contextmanager
def at_steps(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], object]]) -> Iterator[None]:
    """Do something once after a step, whichever run comes to it."""
    add = StepLog.add

    def with_act(self: StepLog, step: int, epoch: int, lr: float, losses: torch.Tensor) -> None:
        add(self, step, epoch, lr, losses)
        if step in acts:
            acts.pop(step)()

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "add", with_act)
        yield


def kill() -> None:
    raise Killed


def learning_rates(run: FitConfig) -> list[float]:
    return [line["lr"] for line in metric_lines(run)]


def grown_run(growth: Growth, monkeypatch: pytest.MonkeyPatch, **options: Any) -> FitConfig:
    """A run that saw the series grow, and was killed and resumed on the way."""
    run = config(growth, **options)
    acts: dict[int, Callable[[], object]] = {
        2: lambda: growth.to(1),  # in epoch 0, of two shards
        3: kill,
        4: lambda: growth.to(2),
        6: kill,
        9: lambda: growth.to(3),
        11: kill,
        13: lambda: growth.to(4),
        18: kill,
    }
    with at_steps(monkeypatch, acts):
        for _ in range(4):
            try:
                fit(run, quiet=True)
            except Killed:
                continue
        fit(run, quiet=True)
    assert growth.stage == 4
    return run


def test_a_replay_from_the_finished_series_gives_the_weights_of_the_run_that_saw_it_grow(
    growth: Growth, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = grown_run(growth, monkeypatch)
    seen = read_epochs(Path(run.out) / EPOCHS)
    assert [epoch.epoch for epoch in seen] == [0, 1, 2, 3, 4]
    assert len({epoch.sealed for epoch in seen}) >= 3
    assert (seen[0].num_rows, seen[-1].num_rows) == (16, 54)
    replay = config(growth, "replay", replay=run.out)
    fit(replay, quiet=True)
    assert_same_weights(final_state(run), final_state(replay))
    assert learning_rates(run) == learning_rates(replay)
    assert (Path(run.out) / EPOCHS).read_bytes() == (Path(replay.out) / EPOCHS).read_bytes()
    # and without a replay it is another training
    other = config(growth, "other")
    fit(other, quiet=True)
    mine, others = final_state(run), final_state(other)
    assert not all(torch.equal(mine[name], others[name]) for name in mine)


def test_a_replay_that_is_killed_goes_on_and_comes_to_the_same_weights(
    growth: Growth, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = grown_run(growth, monkeypatch, accumulate=2, epochs=8)
    replay = config(growth, "replay", replay=run.out, accumulate=2, epochs=8)
    with at_steps(monkeypatch, {3: kill, 7: kill}):
        for _ in range(2):
            with pytest.raises(Killed):
                fit(replay, quiet=True)
        fit(replay, quiet=True)
    assert_same_weights(final_state(run), final_state(replay))


def test_an_epoch_is_written_down_before_its_first_step(growth: Growth, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(growth)
    counts: list[int] = []
    acts: dict[int, Callable[[], object]] = {
        1: lambda: counts.append(len(read_epochs(Path(run.out) / EPOCHS))),
        2: kill,
    }
    with at_steps(monkeypatch, acts), pytest.raises(Killed):
        fit(run, quiet=True)
    assert counts == [1]


def test_an_epoch_that_was_not_kept_begins_anew_with_what_is_sealed_then(
    growth: Growth, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(growth, checkpoint_every="100")
    with at_steps(monkeypatch, {3: kill}), pytest.raises(Killed):  # in epoch 1, which no checkpoint tells of
        fit(run, quiet=True)
    assert [epoch.num_rows for epoch in read_epochs(Path(run.out) / EPOCHS)] == [16, 16]
    growth.to(4)
    fit(run, quiet=True)
    assert [epoch.num_rows for epoch in read_epochs(Path(run.out) / EPOCHS)] == [16, 54, 54, 54, 54]


def test_a_replay_of_a_store_that_grew_gives_the_same_weights(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(images)
    path = write_targets(tmp_path / "one.zarr", corpus, shard_rows=8, shards=[2, 3], finalize=False)
    options: dict[str, Any] = {"data": str(images), "student": "mlp:192-8-4", "device": "cpu", "readers": 1}
    options |= {"targets": str(path), "epochs": 3, "batch_size": 8}
    run = FitConfig(**options, out=str(tmp_path / "run"))
    with at_steps(monkeypatch, {3: lambda: write_targets(path, corpus, shard_rows=8)}):
        fit(run, quiet=True)
    replay = FitConfig(**options, out=str(tmp_path / "replay"), replay=run.out)
    fit(replay, quiet=True)
    assert_same_weights(final_state(run), final_state(replay))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 1}, "expected --seed 0, as there, got 1"),
        ({"batch_size": 4}, "expected --batch-size 8, as there, got 4"),
        ({"epochs": 4}, "expected total_steps .* in epoch 0, as there, got"),
        ({"epochs": None, "steps": 500, "schedule": "constant"}, "expected total_steps"),
        ({"accumulate": 2, "warmup_steps": 1}, "expected total_steps"),
    ],
)
def test_a_replay_with_other_batches_is_refused(growth: Growth, options: dict[str, Any], error: str) -> None:
    run = config(growth, epochs=2)
    fit(run, quiet=True)
    with pytest.raises(StudentError, match=error):
        fit(config(growth, "replay", **{"replay": run.out, "epochs": 2, **options}), quiet=True)


def test_a_replay_longer_than_its_run_is_refused(growth: Growth) -> None:
    run = config(growth, epochs=None, steps=4)
    fit(run, quiet=True)
    lines = (Path(run.out) / EPOCHS).read_text().splitlines(keepends=True)
    (Path(run.out) / EPOCHS).write_text(lines[0])
    with pytest.raises(StudentError, match=f"expected the epoch 1 in its {EPOCHS}, got 1 epochs"):
        fit(config(growth, "replay", replay=run.out, epochs=None, steps=4), quiet=True)


def test_a_replay_needs_a_run_and_its_store(growth: Growth, tmp_path: Path, images: Path) -> None:
    run = config(growth, epochs=1, warmup_steps=0)
    with pytest.raises(PathError, match=f"expected the folder of a run with {EPOCHS}, got none there"):
        fit(config(growth, "replay", replay=str(tmp_path / "nothing")), quiet=True)
    fit(run, quiet=True)
    with pytest.raises(ValueError, match="replay: expected another folder than --out"):
        config(growth, replay=run.out)
    again = config(growth, "replay", replay=run.out, epochs=1, warmup_steps=0)
    other = Growth(tmp_path / "other", images)
    path = other.folder / "000000.zarr"
    with pytest.raises(MismatchError, match="expected the store that the run began with"):
        fit(FitConfig(**again.to_json() | {"targets": str(path)}), quiet=True)
    (Path(run.out) / EPOCHS).write_text("{}\n")
    with pytest.raises(StudentError, match="expected a line of JSON for each epoch, got something else"):
        fit(again, quiet=True)
    line = json.loads(json.dumps({"epoch": 1, "seed": 0, "batch_size": 8, "sealed": [[0, 2]], "block_rows": 4}))
    line |= {"window_blocks": 16, "num_rows": 16, "step": 0, "total_steps": 2}
    (Path(run.out) / EPOCHS).write_text(json.dumps(line) + "\n")
    with pytest.raises(StudentError, match="expected its epochs from 0 on, got 1 first"):
        fit(again, quiet=True)
    line |= {"epoch": 0, "sealed": [[0, 3]]}
    (Path(run.out) / EPOCHS).write_text(json.dumps(line) + "\n")
    with pytest.raises(NotSealedError, match="expected shard 2 sealed, as in epoch 0 of the run"):
        fit(again, quiet=True)


def test_a_replay_says_which_options_are_not_those_of_its_run(
    growth: Growth, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(growth, epochs=1, warmup_steps=0)
    fit(run, quiet=True)
    fit(config(growth, "replay", replay=run.out, epochs=1, warmup_steps=0, lr=0.5))
    said = capsys.readouterr().err
    assert "not as in the run" in said
    assert "--lr 0.001, not 0.5" in said
    assert "each epoch takes the rows that it took there" in said


def test_a_run_is_refused_on_a_series_that_began_otherwise(
    growth: Growth, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth.to(1)
    run = config(growth)
    with at_steps(monkeypatch, {5: kill}), pytest.raises(Killed):
        fit(run, quiet=True)
    other = tmp_path / "other"
    write_image_member(other, images, 0, names(5, 25), refused=[1])
    with pytest.raises(MismatchError, match=r"expected the store that the run began with \(content_digest"):
        fit(FitConfig(**run.to_json() | {"targets": str(other)}), quiet=True)


def test_a_rank_that_does_not_see_what_the_main_one_sees_stops(growth: Growth, monkeypatch: pytest.MonkeyPatch) -> None:
    class Behind(World):
        def from_main(self, value: Any) -> Any:
            del value
            return (0, 1), 10_000

    monkeypatch.setattr(epoch_start, "LONGEST_LAG_S", 0.0)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_store(growth.folder))
        prepared = prepare(config(growth), store, stack)
        with pytest.raises(StudentError, match=r"rank 1: expected 10000 rows in .*, as rank 0 sees them, got 20"):
            epoch_start.epoch_shards(prepared, Behind(1, 2, torch.device("cpu")), None, 0)


def test_the_corpus_of_a_series_gives_the_sample_of_each_row(growth: Growth) -> None:
    with open_store(growth.folder) as series:
        assert isinstance(series, Series)
        corpus = open_data(str(growth.data), None, None, None, None, series)
        assert isinstance(corpus, GrowingCorpus)
        assert (corpus.num_samples, corpus.key(19), corpus.kind) == (20, "019.png", "images")
        growth.to(4)
        series.refresh()
        corpus.grow()
        corpus.grow()  # nothing more
        kept = [*names(0, 21), *names(23, NUM_IMAGES)]
        assert [corpus.key(row) for row in range(corpus.num_samples)] == kept
        rows = np.array([53, 0, 20, 21, 33, 34, 19], np.int64)
        expected = [(growth.data / kept[row]).read_bytes() for row in rows]
        assert corpus.read_raws(rows) == expected == [corpus.read_raw(int(row)) for row in rows]
        assert corpus.decode(expected[0]).shape == (8, 8, 3)
        assert (corpus.num_ignored, corpus.class_names, corpus.sample_kind) == (0, None, "image")
        part = corpus.part(19, 23)
        assert part.key(21) == kept[21]
        whole = open_data(str(growth.data), None, None, None, None, series)
        assert whole.fingerprint != corpus.fingerprint  # opened at once
        assert [whole.key(row) for row in range(whole.num_samples)] == kept
        with pytest.raises(ValueError, match="row: expected 0 to 53, got 54"):
            corpus.key(54)


def test_files_that_are_gone_or_hold_other_samples_are_refused(growth: Growth, tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data", 12, class_names=())
    with open_store(growth.folder) as series, pytest.raises(CorpusError, match=r"expected the file '012.png'"):
        open_data(str(data), None, None, None, None, series)
    with open_store(growth.folder) as series:
        assert isinstance(series, Series)
        fewer = open_corpus(data)
        expected = r"expected 20 samples in the files of member 0 of .* \(000.png, 001.png, 002.png, ...\), got 12"
        with pytest.raises(CorpusMismatchError, match=expected):
            GrowingCorpus(series, lambda _: fewer)
        with pytest.raises(ValueError, match="labels: expected none beside a series"):
            open_data(str(growth.data), None, "labels.npy", None, None, series)


def test_a_sample_that_was_replaced_since_is_refused(growth: Growth, tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data", NUM_IMAGES, class_names=())
    series = Growth(tmp_path / "own", data)
    (data / "003.png").write_bytes((data / "004.png").read_bytes())
    run = FitConfig(**config(series).to_json() | {"data": str(data)})
    with pytest.raises(CorpusMismatchError, match=r"row 3 \('003.png'\)"):
        fit(run, quiet=True)


def test_hard_targets_of_later_members_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_image_folder(tmp_path / "data", 10, class_names=("a", "b", "c", "d"))
    folder = tmp_path / "series"

    def add(member: int, one: str) -> None:
        write_image_member(folder, data, member, [f"{one}/{number:03d}.png" for number in range(10)])

    add(0, "b")
    options: dict[str, Any] = {"student": "mlp:192-8-4", "device": "cpu", "readers": 1, "epochs": 2, "batch_size": 4}
    options |= {"targets": str(folder), "data": str(data)}
    run = FitConfig(**options, out=str(tmp_path / "run"))
    with at_steps(monkeypatch, {2: lambda: add(1, "d")}):
        fit(run, quiet=True)
    assert [epoch.num_rows for epoch in read_epochs(Path(run.out) / EPOCHS)] == [10, 20]
    result = CliRunner().invoke(
        main,
        ["eval", "--checkpoint", f"{run.out}/checkpoint.pt", "--data", str(data), "--targets", str(folder), "--json"],
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_samples"] == 20


def test_a_series_is_validated_on_too(growth: Growth, tmp_path: Path, images: Path) -> None:
    growth.to(1)
    validation = Growth(tmp_path / "validation", images)
    validation.to(4)
    run = config(growth, epochs=1, val_data=str(images), val_targets=str(validation.folder), warmup_steps=0)
    result = fit(run, quiet=True)
    assert result.figures is not None
    assert result.figures.num_samples == 54
