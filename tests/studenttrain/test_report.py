"""The report: one file that needs no network, and says what was measured."""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from storage.corpus import open_corpus
from storage.encodings import Dense, TopK
from storage.reader import open_store
from studenttrain.inspection import TEMPERATURES, choose_views, inspect, spread_pieces
from studenttrain.models import build_model
from studenttrain.plots import MAX_POINTS, thinned
from studenttrain.preparation import stored_preprocess
from studenttrain.train import fit
from tests.builders import write_image_folder
from tests.studenttrain.runs import Ground, make_ground, write_blobs, write_targets

CPU = torch.device("cpu")


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)))


def image_ground(folder: Path, num_classes: int = 3, encoding: Dense | TopK | None = None) -> Ground:
    names = [f"class-{index:02d}" for index in range(num_classes)]
    data = write_image_folder(folder / "images", per_class=48 // num_classes, class_names=names, size=(12, 12))
    targets = write_targets(
        folder / "targets.zarr", open_corpus(data), num_classes=num_classes, encoding=encoding, temperatures=(1.0, 5.0)
    )
    return Ground(folder, data, targets)


def test_the_report_needs_no_network_and_shows_everything(tmp_path: Path) -> None:
    ground = image_ground(tmp_path)
    result = fit(
        ground.config(student="cnn:3-4-3", val_data=str(ground.data), val_targets=str(ground.targets)), quiet=True
    )
    assert result.report is not None
    page = result.report.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    text = text_of(page)
    assert result.figures is not None
    assert result.figures.top1 is not None
    for said in (
        "cnn:3-4-3 from targets.zarr",
        "Training loss",
        "Learning rate",
        "Validation errors",
        "Reliability",
        f"accuracy (top-1) {result.figures.top1:.2%}",
        "agreement with the teacher",
        "NLL of the hard target",
        "calibration error",
        "Softened distributions",
        "Settings of the run",
        "batch_size 16",
        "content digest",
        str(open_store(ground.targets).content_digest),
        "class-00/000.png",
        "true class: class-00",
    ):
        assert said in text, said
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    assert len(pictures) == 6
    assert Image.open(io.BytesIO(pictures[0])).size == (112, 112)
    drawings = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)]
    assert len(drawings) == 4 + 1 + 6
    assert all(b"<svg" in drawing for drawing in drawings)


def test_names_are_escaped(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "images", per_class=8, class_names=["<script>alert(1)", "bee"])
    targets = write_targets(tmp_path / "t.zarr", open_corpus(data), num_classes=2)
    result = fit(Ground(tmp_path, data, targets).config(student="cnn:3-4-2", steps=1), quiet=True)
    assert result.report is not None
    assert "<script" not in result.report.read_text()


def test_a_store_of_kept_entries_shows_its_declared_temperatures_and_says_so(tmp_path: Path) -> None:
    ground = image_ground(tmp_path, 16, TopK(4))
    result = fit(ground.config(student="cnn:3-4-16", steps=2), quiet=True)
    assert result.report is not None
    assert "only the temperatures that were declared when it was made are exact" in text_of(result.report.read_text())


def test_without_validation_the_figures_are_of_training_rows_and_said_to_be(ground: Ground) -> None:
    result = fit(ground.config(steps=2), quiet=True)
    assert result.report is not None
    text = text_of(result.report.read_text())
    assert "Measured on 96 rows of the training corpus, spread over all, which the student has learned from." in text
    assert result.figures is None


def test_without_hard_targets_there_is_a_report_all_the_same(tmp_path: Path) -> None:
    result = fit(make_ground(tmp_path, labels=False).config(steps=2), quiet=True)
    assert result.report is not None
    text = text_of(result.report.read_text())
    assert "agreement with the teacher" in text
    assert "Reliability" not in text


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("uint8"), TopK(3), TopK(4)])
def test_the_distributions_are_those_of_the_store_and_of_the_student(tmp_path: Path, encoding: Dense | TopK) -> None:
    ground = make_ground(tmp_path, encoding=encoding, refused=(2,))
    store, corpus = open_store(ground.targets), open_corpus(ground.data)
    model = build_model("mlp:8-4")
    found = inspect(model, store, corpus, stored_preprocess(store), corpus.hard_targets, CPU, 1)
    assert found.figures.num_samples == 95
    assert len(found.views) == 6
    assert model.training
    for view in found.views:
        declared = store.manifest.encoding.exact_temperatures(store.manifest.temperatures)
        assert view.temperatures == (declared or TEMPERATURES)
        np.testing.assert_allclose(view.teacher_TB.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(view.student_TB.sum(1), 1, atol=1e-5)
        logits_C = model(torch.from_numpy(np.load(ground.data)["x"][view.row])[None]).detach().double()[0]
        for index, temperature in enumerate(view.temperatures):
            probs_C = (logits_C / temperature).softmax(0).numpy()
            for place, label in enumerate(view.labels):
                if label != "rest":
                    assert view.student_TB[index, place] == pytest.approx(probs_C[int(label)], rel=1e-4)


def test_many_classes_are_shown_as_the_likeliest_and_the_rest(tmp_path: Path) -> None:
    ground = image_ground(tmp_path, 16)
    store, corpus = open_store(ground.targets), open_corpus(ground.data)
    found = inspect(build_model("cnn:3-4-16"), store, corpus, stored_preprocess(store), None, CPU, 1)
    for view in found.views:
        assert len(view.labels) == 10
        assert view.labels[-1] == "rest"
        assert (np.diff(view.teacher_TB[0, :-1]) <= 1e-6).all()
        np.testing.assert_allclose(view.student_TB.sum(1), 1, atol=1e-6)


def test_rows_that_are_looked_at_are_spread_over_the_sealed_ones(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, num_samples=4000, shard_rows=64, shards=range(10, 63))
    store = open_store(ground.targets)
    pieces = spread_pieces(store, 500)
    rows = [row for start, stop in pieces for row in range(start, stop)]
    assert 400 <= len(rows) <= 500
    assert len(set(rows)) == len(rows)
    assert min(rows) == 640
    assert max(rows) >= 3900


def test_views_are_the_unsure_ones_and_some_others() -> None:
    assert choose_views([0.1, 0.9, 0.2, 0.8, 0.3], 4) == [1, 3, 0, 4]
    assert choose_views([0.5], 6) == [0]
    assert choose_views([], 6) == []
    assert len(set(choose_views([float(index % 7) for index in range(100)], 6))) == 6


def test_long_curves_are_thinned_to_means() -> None:
    steps = list(range(1, 10_001))
    thin_steps, thin_values = thinned(steps, [2.0 * step for step in steps])
    assert len(thin_steps) == MAX_POINTS
    np.testing.assert_allclose(thin_values, 2 * thin_steps)
    assert thinned([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_a_run_of_one_step_has_curves(ground: Ground) -> None:
    val = write_blobs(ground.folder / "val.npz", 10, seed=3)
    assert fit(ground.config(steps=1, val_data=str(val)), quiet=True).report is not None
