"""The table of the paper, its arithmetic, the record of steps, and an experiment from end to end on a few images."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch

from benchmarks.paper import ensemble, few, omitted, sizes, students, teacher, temperature
from benchmarks.paper.cifar.experiment import settings_of
from benchmarks.paper.idx import jitter, read_idx, write_idx, write_part
from benchmarks.paper.lab import Lab, Settings, lab_of
from benchmarks.paper.steps import Steps
from benchmarks.paper.table import BEGIN, END, PAGE, Row, markdown, put_into, share_closed, spread, table_of
from benchmarks.paper.train_teacher import UNITS, constrain
from benchmarks.result import RESULTS
from studenttrain.models import MLP


def test_the_worked_example_is_that_of_the_paper() -> None:
    figures = temperature.run(None)
    assert figures["largest_difference"] <= 1e-5
    assert all(row.met for row in temperature.rows(figures))
    rising = list(figures["entropy_nats"].values())
    assert rising == sorted(rising)


def test_a_softmax_that_is_off_misses_its_aim() -> None:
    figures = temperature.run(None) | {"largest_difference": 0.001}
    assert not any(row.met for row in temperature.rows(figures))


def test_a_spread_is_mean_smallest_and_largest() -> None:
    assert spread([3.0, 1.0]) == "2 (1-3)"
    assert spread([47.31, 46.0], 1) == "46.7 (46.0-47.3)"
    assert spread([67]) == "67"


def test_of_the_paper_soft_targets_close_nine_tenths_of_the_gap() -> None:
    assert share_closed(146, 74, 67) == pytest.approx(0.911, abs=1e-3)
    assert share_closed(58.9, 60.8, 61.1) == pytest.approx(0.864, abs=1e-3)


def test_the_table_is_markdown_with_a_cell_for_each_column() -> None:
    lines = markdown([Row("a", "1", "2"), Row("b", "", "3", "at most 2", False), Row("c", "1", "1", "1", True)])
    assert lines.splitlines()[2:] == [
        "| a | 1 | 2 | | |",
        "| b | | 3 | at most 2 | **no** |",
        "| c | 1 | 1 | 1 | yes |",
    ]


def test_the_table_replaces_the_one_that_was_there() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put_into(page, "new\n") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert put_into(put_into(page, "new\n"), "new\n") == put_into(page, "new\n")
    with pytest.raises(ValueError, match="expected the marks"):
        put_into("no marks", "new\n")


@pytest.mark.skipif(not (RESULTS / "paper.json").exists(), reason="no result file is there")
def test_the_page_has_the_table_of_the_result_file() -> None:
    figures = json.loads((RESULTS / "paper.json").read_text())["figures"]
    assert put_into(PAGE.read_text(), table_of(figures)) == PAGE.read_text()


def test_an_aim_is_judged_by_its_figures() -> None:
    def met(rows: list[Row]) -> list[bool]:
        return [row.met for row in rows if row.met is not None]

    def student(closed: float) -> dict[str, object]:
        return {"hard": [140], "soft": [90], "gap_closed": closed}

    assert met(students.rows(student(0.61))) == [True]
    assert met(students.rows(student(0.59))) == [False]

    def small(best: int) -> dict[str, object]:
        large = {"hard": [150], "8": [100, 102], "20": [104]}
        return {"errors": {"300": large, "30": {"hard": [300], "1": [best], "2.5": [280], "20": [350]}}}

    assert met(sizes.rows(small(290))) == [True, True]
    assert met(sizes.rows(small(270))) == [True, False]
    assert sizes.difference_above_8({"4": [10], "8": [100], "20": [150]}) == pytest.approx(0.4)

    ratio = {"rows": 1800, "hard": [100], "soft": [60]}
    assert met(few.rows(ratio | {"soft_over_hard": 0.6})) == [True]
    assert met(few.rows(ratio | {"soft_over_hard": 0.66})) == [False]
    gain = {"members": [500, 520], "ensemble": 400, "student": [420]}
    gain |= {"rows": 12_000, "temperature": 2.0}
    both = {"same_rows": gain | {"gain_kept": 0.8}, "own_rows": gain | {"gain_kept": 0.81}}
    assert met(ensemble.rows(both)) == [False, True]
    assert met(teacher.rows({"errors": 70})) == []


def test_the_worst_seed_decides_of_the_classes_left_out() -> None:
    def of(errors: list[int], on_3s: list[int]) -> dict[str, list[int]]:
        return {"errors": errors, "on_3s": on_3s}

    without = dict.fromkeys(("hard", "soft", "match"), of([100], [10])) | {"shift": of([120, 130], [10, 30])}
    only = dict.fromkeys(("hard", "soft", "shift"), of([1500], [0])) | {"match": of([1500, 1700], [0, 0])}
    rows = omitted.rows({"threes": 1010, "without_3": without, "only_7_8": only})
    assert [row.met for row in rows if row.met is not None] == [True, False, False, True]


def test_an_image_is_moved_by_at_most_two_pixels() -> None:
    images = torch.zeros(200, 9, 9)
    images[:, 4, 4] = 1
    moved = jitter(images, torch.Generator().manual_seed(0)).nonzero()[:, 1:]
    assert len(moved) == 200
    assert sorted(set(moved.flatten().tolist())) == [2, 3, 4, 5, 6]


def test_long_weights_are_shortened_and_short_ones_stay() -> None:
    model = MLP([3, 2])
    model.load_state_dict({"layers.0.weight": torch.tensor([[3.0, 0, 4], [0.1, 0, 0]]), "layers.0.bias": torch.ones(2)})
    constrain(model, 2.0)
    weights, bias = model.parameters()
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.2, 0, 1.6], [0.1, 0, 0]]))
    assert torch.equal(bias, torch.ones(2))


def test_a_part_of_some_classes_has_their_images(tmp_path: Path) -> None:
    write_mnist(tmp_path, 40)
    images, classes = (tmp_path / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    part = write_part(tmp_path / "part", images, classes, [7, 8])
    is_wanted = np.isin(read_idx(classes), [7, 8])
    assert is_wanted.any()
    assert np.array_equal(read_idx(part), read_idx(images)[is_wanted])
    assert set(read_idx(part.with_name(classes.name))) == {7, 8}


def test_a_step_is_done_once_and_its_time_is_kept(tmp_path: Path) -> None:
    words = ("-m", "benchmarks.paper.temperature_", tmp_path / "nothing")
    steps = Steps(tmp_path / "steps", places={"RUN": tmp_path})
    with pytest.raises(subprocess.CalledProcessError):
        steps.call("broken", *words)
    said = ("-m", "this")
    assert steps.call("zen", *said) == Steps(tmp_path / "steps").call("zen", *said)
    record = json.loads((tmp_path / "steps" / "zen.json").read_text())
    assert (record["is_done"], record["num_attempts"]) == (True, 1)
    assert record["wall_s"] > 0 < record["cpu_s"]
    broken = json.loads((tmp_path / "steps" / "broken.json").read_text())
    assert (broken["is_done"], broken["command"]) == (False, "-m benchmarks.paper.temperature_ RUN/nothing")
    assert steps.times()["wall_s"] == pytest.approx(record["wall_s"] + broken["wall_s"], abs=0.11)
    with pytest.raises(ValueError, match="step 'zen': expected the command that it was done by"):
        steps.call("zen", "-m", "that")


def write_mnist(folder: Path, num_images: int) -> None:
    """Four IDX files of noise, in classes."""
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        classes = np.arange(num_images) % 10
        images = rng.integers(0, 256, (num_images, 28, 28))  # noise: no student gets all of them right
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", classes)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab of a few images, whose commands run in this process."""
    import storage.cli
    import studenttrain.cli
    import teacherdump.cli

    programs = {
        "logitstore": storage.cli.main,
        "studenttrain": studenttrain.cli.main,
        "teacherdump": teacherdump.cli.main,
    }

    def call(self: Steps, name: str, *words: object) -> str:
        if words[0] == "-m":
            torch.save(MLP(UNITS).state_dict(), tmp_path / "run" / "teacher.pt")
            return ""
        result = click.testing.CliRunner().invoke(programs[str(words[0])], [str(word) for word in words[1:]])
        assert result.exit_code == 0, result.output
        return result.stdout

    write_mnist(tmp_path, 60)
    monkeypatch.setattr(Steps, "call", call)
    words = ("--mnist", tmp_path, "--run", tmp_path / "run", "--seeds", 1)
    return lab_of("", [str(word) for word in words])


def test_students_are_trained_and_tried_by_the_real_commands(lab: Lab) -> None:
    part = lab.part("part", lab.store, (20, 40))
    soft = lab.students("soft", "mlp:784-4-10", 20.0, "--alpha", 1, "--steps", 2, targets=[part])
    assert len(soft.errors) == 1
    assert 0 < soft.mean <= 60
    assert (lab.settings.run / "students" / "soft-seed0" / "student.safetensors").exists()
    assert 0 < lab.teacher_errors <= 60


def test_an_option_of_each_setting_is_taken(tmp_path: Path) -> None:
    write_mnist(tmp_path, 10)
    words = ["--mnist", str(tmp_path), "--run", str(tmp_path / "run"), "--large-epochs", "3", "--precision", "fp32"]
    assert lab_of("", words).settings == Settings(tmp_path, tmp_path / "run", large_epochs=3, precision="fp32")


@pytest.mark.parametrize("start", [lab_of, settings_of])
def test_a_folder_without_the_data_is_refused_in_one_line(
    start: Callable[[str, list[str]], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--mnist" if start is lab_of else "--cifar"
    with pytest.raises(SystemExit, match="2"):
        start("", [option, str(tmp_path / "nowhere"), "--run", str(tmp_path / "run")])
    assert f"{option}: expected train-" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
