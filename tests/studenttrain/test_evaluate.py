"""Evaluation of a student, and of the stored targets themselves, over a corpus."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from storage.corpus import open_corpus
from storage.encodings import Dense, TopK
from storage.errors import CorpusError, CorpusMismatchError
from storage.reader import open_store
from studenttrain.distributed import World
from studenttrain.evaluate import evaluate, evaluate_teacher
from studenttrain.figures import Tally
from studenttrain.preparation import stored_preprocess
from tests.builders import image_bytes, random_pixels, write_image_folder
from tests.studenttrain.runs import make_ground, teacher_logits, write_blobs, write_targets

ALONE = World(0, 1, torch.device("cpu"))


class Copycat(nn.Module):
    """A student that says just what the teacher of the blobs says."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, 4)."""
        assert not self.training
        return torch.from_numpy(teacher_logits(inputs.numpy()))


@pytest.mark.parametrize("encoding", [Dense("float16"), Dense("uint8"), TopK(2)])
def test_a_student_that_copies_the_teacher_agrees_with_it(tmp_path: Path, encoding: Dense | TopK) -> None:
    ground = make_ground(tmp_path, encoding=encoding, refused=(4,))
    store, corpus = open_store(ground.targets), open_corpus(ground.data)
    student = Copycat()
    seen: list[int] = []
    figures = evaluate(
        student, corpus, stored_preprocess(store), ALONE, store=store, batch_size=7, readers=2, advance=seen.append
    )
    assert figures.agreement == pytest.approx(1.0, abs=0.02 if encoding == Dense("uint8") else 0)
    assert figures.num_samples == sum(seen) == 96
    assert student.training
    whole = Tally()
    hard = torch.from_numpy(np.load(ground.data)["y"])
    whole.add(torch.from_numpy(teacher_logits(np.load(ground.data)["x"])), hard)
    assert figures.num_errors == whole.figures().num_errors
    assert figures.nll == pytest.approx(whole.figures().nll, rel=1e-5)


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("float16"), TopK(2), TopK(4)])
def test_the_stored_teacher_has_the_figures_of_its_logits(tmp_path: Path, encoding: Dense | TopK) -> None:
    ground = make_ground(tmp_path, encoding=encoding)
    store, corpus = open_store(ground.targets), open_corpus(ground.data)
    assert corpus.hard_targets is not None
    found = evaluate_teacher(store, corpus.hard_targets)
    whole = Tally()
    logits = torch.from_numpy(teacher_logits(np.load(ground.data)["x"]))
    whole.add(logits, torch.from_numpy(corpus.hard_targets.astype(np.int64)))
    expected = whole.figures()
    assert found is not None
    assert found.num_errors == expected.num_errors
    assert found.nll == pytest.approx(expected.nll, rel=5e-3)
    assert found.ece == pytest.approx(expected.ece, abs=5e-3)


def test_a_topk_store_without_temperature_1_has_no_teacher_figures(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=TopK(2), temperatures=(4.0,))
    assert evaluate_teacher(open_store(ground.targets), np.zeros(96, np.int32)) is None


def test_samples_that_can_not_be_decoded_are_left_out_and_counted(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "images", per_class=4, size=(6, 6))
    good = image_bytes(random_pixels(6, 6, 3))
    (data / "ant" / "001.png").write_bytes(good[: len(good) // 2])
    corpus = open_corpus(data)
    store = open_store(write_targets(tmp_path / "t.zarr", corpus, num_classes=3, refused=(1,)))

    class Flat(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.flatten(1)[:, :3]

    figures = evaluate(Flat(), corpus, stored_preprocess(store), ALONE, store=store, batch_size=5)
    assert (figures.num_samples, figures.num_refused) == (11, 1)
    assert "1 samples refused" in str(figures)


def test_another_corpus_than_the_stores_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path)
    store, other = open_store(ground.targets), open_corpus(write_blobs(tmp_path / "other.npz", 96, seed=8))
    with pytest.raises(CorpusMismatchError, match=r"row 0 \('0'\)"):
        evaluate(Copycat(), other, stored_preprocess(store), ALONE, store=store)


def test_hard_targets_beyond_the_students_classes_are_refused(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "corpus.npz", 20, labels=False)
    np.save(tmp_path / "labels.npy", np.full(20, 4))
    corpus = open_corpus(data, labels=tmp_path / "labels.npy")
    preprocess = stored_preprocess(open_store(write_targets(tmp_path / "t.zarr", corpus, num_classes=5)))
    with pytest.raises(CorpusError, match="expected hard targets below the student's 4 classes, got 4"):
        evaluate(Copycat(), corpus, preprocess, ALONE)
