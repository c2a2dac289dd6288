"""The specialists' experiment: clusters against superclasses, its corpora, its network and its generalist."""

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.paper.cifar import report, train_generalist
from benchmarks.paper.cifar.corpora import rows_per_class, split_cifar, write_transfer
from benchmarks.paper.cifar.dustbin import change, moved
from benchmarks.paper.cifar.dustbin import dustbin as dustbin_figures
from benchmarks.paper.cifar.experiment import own_accuracy
from benchmarks.paper.cifar.images import MEAN, NUM_PADDED, STD, crop_and_flip, normalise, pad, read_images
from benchmarks.paper.cifar.network import make
from benchmarks.paper.cifar.superclasses import agreement, superclasses
from benchmarks.paper.cifar.train_generalist import learning_rate, train
from storage.corpus import open_corpus
from storage.corpus.preprocess import Preprocess
from studenttrain.heads import find_head, head_difference

CLASSES = ("otter", "seal", "oak", "rose")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like CIFAR-100's: two training files of 4 classes in 2 superclasses, 12 rows of each class."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    metadata = {"fine_names": json.dumps(CLASSES), "coarse_names": json.dumps(["animals", "plants"])}
    for number in range(2):
        fine = np.tile(np.arange(4), 6)
        images = [_jpeg(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in fine]
        keys = [f"train/{number}-{row}" for row in range(len(fine))]
        table = pa.table({"key": keys, "image": images, "fine_label": fine, "coarse_label": fine // 2})
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"train-{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def run(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpora of that folder, three copies of each row in the transfer set."""
    folder = tmp_path_factory.mktemp("run")
    split_cifar(cifar, folder, per_class=3)
    write_transfer(folder, num_copies=3)
    return folder


def _jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg")
    return stream.getvalue()


def test_clusters_that_are_superclasses_share_all_their_pairs() -> None:
    superclass_C = np.repeat(np.arange(20), 5)
    found = agreement([range(5 * i, 5 * i + 5) for i in range(20)], superclass_C, num_permutations=500)
    assert (found.num_same, found.num_pairs) == (200, 200)
    assert found.chance == pytest.approx(200 * 4 / 99, rel=0.1)  # another class shares one's superclass so often
    assert found.chance_p5 < found.chance < found.chance_p95 < found.num_same


def test_clusters_across_superclasses_share_no_pair_and_less_than_chance() -> None:
    found = agreement([range(i, 100, 5) for i in range(5)], np.repeat(np.arange(20), 5), num_permutations=500)
    assert found.num_same == 0 < found.chance_p5


def test_a_pair_of_two_overlapping_clusters_counts_in_each() -> None:
    found = agreement([(0, 1), (0, 1, 2)], np.array([0, 0, 1, 1]), num_permutations=10)
    assert (found.num_same, found.num_pairs) == (2, 4)


def test_clusters_of_single_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="clusters: expected one of at least two classes, got none"):
        agreement([(0,), (1,)], np.array([0, 0]))


def test_the_superclass_of_a_class_is_that_of_its_rows() -> None:
    assert superclasses(np.array([2, 0, 1, 2]), np.array([7, 5, 5, 7]), 3).tolist() == [5, 5, 7]
    with pytest.raises(ValueError, match="superclasses: expected rows of every class, got none of 1"):
        superclasses(np.array([0, 2]), np.array([0, 0]), 3)
    with pytest.raises(ValueError, match="superclasses: expected one of each class, got several of 0"):
        superclasses(np.array([0, 0]), np.array([0, 1]), 1)


def test_held_out_rows_are_no_training_rows_and_as_many_of_each_class(cifar: Path, run: Path) -> None:
    everything = [key for file in sorted(cifar.glob("*.parquet")) for key in pq.read_table(file)["key"].to_pylist()]
    keys = {name: pq.read_table(run / f"{name}.parquet")["key"].to_pylist() for name in ("train", "held", "seen")}
    assert sorted(keys["train"] + keys["held"]) == sorted(everything)
    assert set(keys["seen"]) < set(keys["train"])
    for name in ("held", "seen"):
        assert np.bincount(pq.read_table(run / f"{name}.parquet")["fine_label"].to_numpy()).tolist() == [3] * 4


def tried(top1: float, fused: float, own_before: float, own_after: float) -> dict[str, Any]:
    """What `specialists eval --json` prints, of 1,000 rows of which 400 have a specialist."""
    lines = [
        {"num_specialists": number, "num_known": known, "right_before": before, "change": change,
         "relative_change": change / before if before else None}
        for number, known, before, change in ((0, 600, 300, -3), (1, 300, 150, 12), (2, 100, 0, 5))
    ]  # fmt: skip
    specialists = [
        {"num_own": 100, "own_before": own_before, "own_after": own_after},
        {"num_own": 300, "own_before": own_before, "own_after": own_after - 0.04},
        {"num_own": 0, "own_before": None, "own_after": None},
    ]
    return {
        "generalist": {"top1": top1}, "fused": {"top1": fused}, "by_covering": lines, "specialists": specialists,
    }  # fmt: skip


def dustbin(moved_down: float) -> dict[str, Any]:
    """Fusions that are right in 60 % with dustbins as they are, and in another share with dustbins moved down."""
    return {
        "moved": {"-1": {"top1": moved_down}, "0": {"top1": 0.6}, "1": {"top1": 0.5}},
        "dustbin": {"true": 0.2, "generalist": 0.18, "specialists": 0.3},
    }


@pytest.fixture
def figures() -> dict[str, Any]:
    """Figures of an experiment: specialists gain 5 %, and the soft phase takes half of their over-fitting."""
    hard = {
        "seen": tried(0.8, 0.9, 0.8, 0.99),
        "held": tried(0.6, 0.62, 0.7, 0.75),
        "test": tried(0.6, 0.63, 0.7, 0.75),
    }
    soft = {
        "seen": tried(0.8, 0.9, 0.8, 0.93),
        "held": tried(0.6, 0.63, 0.7, 0.81),
        "test": tried(0.6, 0.64, 0.7, 0.81),
    }
    found = {
        "classes": [["maple_tree", "oak_tree"]],
        "superclasses": {"num_pairs": 200, "num_same": 80, "chance": 8.06, "chance_p5": 4.0, "chance_p95": 13.0},
    }
    return {
        "phases": {"hard": hard, "soft": soft},
        "dustbin": {
            "hard": {"held": dustbin(0.64), "test": dustbin(0.62)},
            "soft": {"held": dustbin(0.6), "test": dustbin(0.6)},
        },
        "students": {"fused": [0.63, 0.632], "generalist": [0.6], "hard": [0.61]},
        "clusters": dict.fromkeys(("correlation", "covariance", "specialists"), found),
    }


def test_the_tables_say_what_the_figures_say(figures: dict[str, Any]) -> None:
    text = report.tables(figures)
    assert "| generalist alone | 25.0 | 43.1 | 60.0 | 70.0 |" in text
    assert "| with specialists, hard targets | 26.1 (+4.4 %) | 45.9 | 63.0 (+5.0 %) | 72.0 |" in text
    assert "| 1 | 300 | 50.0 | +12 (+8.0 %) | +12 (+8.0 %) | +3.4 % |" in text
    assert "| 2 | 100 | 0.0 | +5 | +5 | +7.4 % |" in text  # nothing to be relative to
    assert "| hard targets | 96.0 | 72.0 | 72.0 | 24.0 |" in text
    assert "| student from all together | 63.10 (63.00-63.20) | +3.10 |" in text
    assert (
        "| hard targets | 60.0 | 60.0 | -1 | 64.0 | 62.0 | 20.0 | 18.0 | 30.0 |" in text
    )  # chosen by the held-out rows
    assert "| then soft | 60.0 | 60.0 | +0 | 60.0 | 60.0 | 20.0 | 18.0 | 30.0 |" in text  # no gain, so left as it is
    assert "80 of 200 (40.0 %) | 8.1 (4-13) |" in text
    assert "- maple tree, oak tree" in text


def test_own_rows_weigh_the_same_whichever_specialist_has_them(figures: dict[str, Any]) -> None:
    assert own_accuracy(figures["phases"]["hard"]["test"], "own_after") == pytest.approx(0.25 * 0.75 + 0.75 * 0.71)


def test_the_tables_go_between_their_marks_and_a_page_without_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "paper.md"
    report.write_into(page, "new")
    assert not page.exists()
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nbehind\n")
    report.write_into(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nbehind\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected the marks '<!-- specialists"):
        report.write_into(page, "new")


def test_the_picture_is_drawn(figures: dict[str, Any], tmp_path: Path) -> None:
    report.draw(figures, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size[0] > 500


def test_rows_of_a_class_that_has_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="class 1: expected more than 2 rows, got 2; take fewer"):
        rows_per_class(np.array([0, 0, 0, 1, 1]), 2, seed=0)


def test_a_folder_without_training_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected train-\*\.parquet, got none; give the folder of CIFAR-100"):
        split_cifar(tmp_path, tmp_path / "run")


def test_the_transfer_rows_are_the_training_rows_and_their_crops(run: Path) -> None:
    images, classes = read_images(run / "train.parquet")
    copies, copied_classes = read_images(run / "transfer.parquet")
    assert torch.equal(copies[: len(images)], images)
    assert torch.equal(copied_classes, classes.repeat(3))
    assert not torch.equal(copies[len(images) : 2 * len(images)], images)
    corpus = open_corpus(str(run / "transfer.parquet"))
    assert corpus.class_names == CLASSES
    assert len({corpus.key(row) for row in range(corpus.num_samples)}) == corpus.num_samples


def test_what_is_written_already_stays(cifar: Path, run: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    split_cifar(cifar, run, per_class=3)
    write_transfer(run, num_copies=3)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_a_crop_is_a_part_of_the_padded_image_or_its_mirror_image() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    padded = pad(images)
    moved = crop_and_flip(padded, torch.Generator().manual_seed(0))
    flipped = 0
    for whole, part in zip(padded, moved, strict=True):
        places = [(top, left) for top in range(2 * NUM_PADDED + 1) for left in range(2 * NUM_PADDED + 1)]
        parts = [whole[:, top : top + 8, left : left + 8] for top, left in places]
        is_mirrored = any(torch.equal(it.flip(2), part) for it in parts)
        assert is_mirrored or any(torch.equal(it, part) for it in parts)
        flipped += is_mirrored
    assert 0 < flipped < 16


def test_the_generalist_is_trained_on_what_the_dump_gives_it(run: Path) -> None:
    corpus = open_corpus(str(run / "train.parquet"))
    declared = Preprocess(kind="image", shape=(3, 32, 32), scale=1 / 255, mean=MEAN, std=STD)
    given = declared.apply(corpus.decode(corpus.read_raw(0)))
    images, _ = read_images(run / "train.parquet")
    np.testing.assert_allclose(normalise(images[:1])[0].numpy(), given, atol=1e-5)


def test_the_network_has_a_head_that_says_what_it_does() -> None:
    model = make(7).eval()
    found = find_head(model)
    assert found is not None
    assert head_difference(found, torch.randn(2, 3, 32, 32)) < 1e-6
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_the_learning_rate_rises_to_its_peak_and_ends_at_nothing() -> None:
    rates = [learning_rate(step, 100, 20, 0.5) for step in range(100)]
    assert rates[19] == max(rates) == pytest.approx(0.5)
    assert rates[-1] == 0
    assert min(rates) >= 0


def test_a_generalist_that_is_stopped_goes_on_to_the_same_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, classes = read_images(run / "train.parquet")

    def trained(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = make(4)
        args = argparse.Namespace(
            out=tmp_path / f"{name}.safetensors", epochs=2, batch_size=8, lr=0.1, weight_decay=1e-4, warmup_epochs=1.0,
            seed=0,
        )  # fmt: skip
        figures = train(model, images, classes, (images, classes), args)
        assert len(figures["curve"]) == 2
        return model.state_dict()

    undisturbed = trained("one")
    after = iter([0.5])  # the second epoch finds none, after its steps and before its checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(train_generalist, "accuracy", lambda *_: next(after))
        with pytest.raises(StopIteration):
            trained("two")
    stopped = trained("two")
    assert all(torch.equal(value, stopped[name]) for name, value in undisturbed.items())


def test_a_dustbin_that_is_moved_has_more_or_less_of_the_probability() -> None:
    said_NK = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    np.testing.assert_allclose(moved(said_NK, math.log(3)).exp().numpy(), [[0.1, 0.15, 0.75]])
    assert torch.equal(moved(said_NK, 0), said_NK.log_softmax(1))


def test_dustbins_are_counted_over_the_rows_of_active_specialists() -> None:
    said = [torch.tensor([[0.9, 0.1], [0.6, 0.4], [math.nan, math.nan]]).double().log()]
    generalist_NC = torch.tensor([[0.7, 0.1, 0.2], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).double().log()
    found = dustbin_figures([(0,)], said, generalist_NC, ~said[0][:, :1].isnan(), torch.tensor([0, 2, 0]))
    assert (found["true"], found["specialists"], found["generalist"]) == (0.5, 0.25, 0.4)
    assert found["nll_specialists"] == pytest.approx(-(math.log(0.9) + math.log(0.4)) / 2, abs=1e-4)


def test_a_change_counts_what_became_right_and_what_became_wrong() -> None:
    before_NC = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]).double().log()
    after_NC = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.1, 0.9]]).double().log()
    found = change(before_NC, after_NC, torch.tensor([0, 1, 0, 1]))
    assert (found["gained"], found["lost"]) == (2, 0)
    falls = [0, math.log(3), 0, math.log(1.8)]
    assert found["nll_fall"] == pytest.approx(sum(falls) / 4, abs=1e-4)
    assert found["nll_standard_error"] == pytest.approx(np.std(falls, ddof=1) / 2, abs=1e-4)
    assert change(after_NC, before_NC, torch.tensor([0, 1, 0, 1]))["lost"] == 2
