"""A student from a float32 dense store is, bit for bit, the one that would have learned with the teacher live.

What that claims: nothing on the road from the teacher's logits to the loss (centring, storing, reading, shuffling,
decoding) changes a bit, and the loop sees the same rows in the same order. It does not claim that a teacher says the
same of a row in another batch: a float32 matrix product may round otherwise when its batch has another size, and the
dump's batches are not the student's. So the teacher here works a row at a time, in float64, rounded to float32 at
the end: what it says of a row depends on that row alone, which the first test checks.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from storage.corpus import open_corpus
from storage.reader import open_store
from studenttrain.checks import choose_objective
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.learner import build_learner
from studenttrain.loss import DenseTargets
from studenttrain.models import build_model
from studenttrain.preparation import stored_preprocess
from studenttrain.schedule import learning_rate
from studenttrain.step import LearningBatch, count_rows, train_step
from studenttrain.stream import StudentBatch, TargetStream
from studenttrain.train import fit
from tests.studenttrain.runs import Ground, assert_same_weights, final_state, write_blobs, write_targets

ALONE = World(0, 1, torch.device("cpu"))


class RowTeacher(nn.Module):
    """A small MLP whose answer to a row does not depend on the other rows of its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.model = build_model("mlp:8-32-4").double().eval()

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, C), float32."""
        return torch.cat([self.model(row[None].double()) for row in inputs]).float() * 5


def make_dump(folder: Path, teacher: RowTeacher) -> Ground:
    """A store of the teacher's logits, said in batches of another size than the student's."""
    data = write_blobs(folder / "corpus.npz", 96)
    inputs = torch.from_numpy(np.load(data)["x"])
    logits = torch.cat([teacher(piece) for piece in inputs.split(7)]).numpy()
    return Ground(folder, data, write_targets(folder / "targets.zarr", open_corpus(data), logits=logits))


def train_live(config: FitConfig, teacher: RowTeacher) -> dict[str, torch.Tensor]:
    """The loop with the teacher in it; of the store, only the order of the rows is used."""
    assert config.data is not None
    store, corpus = open_store(config.targets), open_corpus(config.data)
    objective = choose_objective(config, store.manifest, True)

    def load(batch: StudentBatch) -> LearningBatch:
        inputs = torch.from_numpy(batch.inputs)
        assert batch.hard_targets_N is not None
        hard_targets_N = torch.from_numpy(batch.hard_targets_N).long() if objective.is_hard else None
        targets = DenseTargets.of_logits(teacher(inputs), objective.temperature)
        return LearningBatch(inputs, targets, hard_targets_N)

    torch.manual_seed(config.seed)
    learner = build_learner(build_model(config.student), config, ALONE)
    preprocess = stored_preprocess(store)
    with TargetStream(store, corpus, preprocess, config.batch_size, config.seed, readers=1) as stream:
        for _ in range(config.epochs or 0):
            total_steps = (config.epochs or 0) * stream.num_batches
            for batch in stream:
                lr = learning_rate(config.lr, config.schedule, learner.step, total_steps)
                train_step(learner, [batch], load, objective, count_rows([batch], objective, None), ALONE, lr=lr)
    return learner.student.state_dict()


def test_what_the_teacher_says_of_a_row_depends_on_that_row_alone(tmp_path: Path) -> None:
    teacher = RowTeacher()
    inputs = torch.from_numpy(np.load(write_blobs(tmp_path / "x.npz", 64))["x"])
    whole = teacher(inputs)
    for size in (1, 5, 16, 63):
        assert torch.equal(torch.cat([teacher(piece) for piece in inputs.split(size)]), whole)
    order = torch.randperm(64)
    assert torch.equal(teacher(inputs[order]), whole[order])


@pytest.mark.parametrize("alpha", [1.0, 0.9])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_a_student_from_a_float32_store_equals_one_with_the_teacher_live(
    tmp_path: Path, no_report: None, alpha: float, loss: str
) -> None:
    teacher = RowTeacher()
    ground = make_dump(tmp_path, teacher)
    config = ground.config(epochs=4, alpha=alpha, loss=loss, lr=0.01, batch_size=20)
    fit(config, quiet=True)
    live = train_live(config, teacher)
    assert_same_weights(final_state(config), live)
    # and the comparison can fail: a teacher that is off by a last bit leads elsewhere
    off = copy.deepcopy(teacher)
    with torch.no_grad():
        off.model.layers[1].bias[0] += 1e-5  # type: ignore[index, union-attr]
    other = train_live(config, off)
    assert any(not torch.equal(value, other[name]) for name, value in live.items())
