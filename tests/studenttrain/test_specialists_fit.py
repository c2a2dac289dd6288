"""Specialists: their rows, their classes, and runs that train them."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from distributed import KilledWorker, Status
from distributed.scheduler import WorkerState
from numpy.typing import NDArray
from torch import nn

from storage.corpus import open_corpus
from storage.encodings import Dense, Encoding, TopK
from storage.errors import CorpusError, MismatchError, NotSealedError, PathError, StoreError, StudentError
from storage.reader import open_store
from studenttrain.checks import store_identity
from studenttrain.cli import main
from studenttrain.ending import RESULT
from studenttrain.export import build_carded, load_card, load_student
from studenttrain.heads import Head
from studenttrain.loss import default_loss, soft_loss
from studenttrain.metrics import StepLog
from studenttrain.models import build_model
from studenttrain.preparation import hold_folder
from studenttrain.selection import RowClasses
from studenttrain.specialists.collapse import OwnClasses
from studenttrain.specialists.config import SpecialistsConfig
from studenttrain.specialists.fitting import check_store, fit_specialists
from studenttrain.specialists.head import cut_head
from studenttrain.specialists.parallel import check_future, device_of
from studenttrain.specialists.plan import SpecialistsPlan, write_plan
from studenttrain.specialists.sampling import choose_rows, counts_of
from studenttrain.specialists.specialist import (
    Specialist,
    load_specialists,
    own_classes,
    phase_folder,
    read_phases,
    write_phases,
)
from studenttrain.specialists.specialty import Specialty
from studenttrain.targets import DenseTargets, HiddenTargets, SampleTargets, TopKTargets
from studenttrain.train import fit
from studenttrain.trial import try_student
from tests.studenttrain.runs import NUM_FEATURES, STUDENT, Ground, make_ground, write_blobs, write_targets
from tests.studenttrain.soft_targets import random_logits, targets_of

pytestmark = pytest.mark.usefixtures("no_report", "no_program")

Array = NDArray[Any]
PLAN = ((0, 1), (1, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """What `ground` is a copy of: to make a store durable takes longer than most of these tests."""
    return make_ground(tmp_path_factory.mktemp("made"))


@pytest.fixture
def ground(made: Ground, tmp_path: Path) -> Ground:
    """A corpus of blobs and a finalized float32 dense store of it."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Ground(tmp_path, tmp_path / made.data.name, tmp_path / made.targets.name)


def write_plan_of(ground: Ground, specialists: Sequence[Sequence[int]] = PLAN, **changed: Any) -> Path:
    """A plan of the ground's store."""
    with open_store(ground.targets) as store:
        plan = SpecialistsPlan(
            num_classes=store.manifest.num_classes,
            class_names=store.manifest.class_names,
            store=store_identity(store),
            specialists=tuple(tuple(classes) for classes in specialists),
        )
    path = ground.folder / "plan.json"
    write_plan(path, replace(plan, **changed))
    return path


def config_of(ground: Ground, out: str = "specialists", **options: Any) -> SpecialistsConfig:
    """Options of short trainings on the ground."""
    if not (ground.folder / "plan.json").exists():
        write_plan_of(ground)
    training = {"batch_size": 16, "device": "cpu", "readers": 1, **options.pop("training", {})}
    given: dict[str, Any] = {"targets": str(ground.targets), "data": str(ground.data), "student": STUDENT}
    given |= {"plan": str(ground.folder / "plan.json"), "out": str(ground.folder / out), "training": training}
    if not {"epochs", "steps", "soft_epochs"} & set(options):
        given["epochs"] = 2
    return SpecialistsConfig(**given | options)


def words_of(config: SpecialistsConfig) -> list[str]:
    """The arguments of the command that mean the same."""
    words = ["specialists", "fit"]
    for name in ("targets", "data", "plan", "student", "out", "epochs", "soft_epochs", "workers", "scheduler"):
        if getattr(config, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    for name, value in config.training.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


@pytest.fixture
def bare(tmp_path: Path) -> Ground:
    """Names of what is not there, where nothing is read."""
    (tmp_path / "plan.json").touch()
    return Ground(tmp_path, tmp_path / "corpus.npz", tmp_path / "targets.zarr")


def weights_of(config: SpecialistsConfig, number: int, phase: Any) -> dict[str, torch.Tensor]:
    return load_student(phase_folder(Path(config.out), number, phase))[0].state_dict()


def assert_same(one: SpecialistsConfig, two: SpecialistsConfig) -> None:
    """Two trainings came to the same weights, bit for bit."""
    for number in range(2):
        for phase in one.phases:
            first, second = (weights_of(config, number, phase) for config in (one, two))
            assert first.keys() == second.keys()
            assert all(torch.equal(value, second[name]) for name, value in first.items())


# the classes of a specialist


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_dustbin_has_at_t1_what_all_other_classes_have_together(temperature: float) -> None:
    own = OwnClasses((1, 4), 6, 0.7)
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 4
    probs = logits.softmax(1)
    expected = torch.stack([probs[:, 1], probs[:, 4], probs[:, [0, 2, 3, 5]].sum(1)], 1)
    valid = torch.ones(5, dtype=torch.bool)
    # the same of hidden states: the identity is their head
    for targets in (
        DenseTargets(logits, valid, temperature),
        HiddenTargets(logits, Head(torch.eye(6)), valid, temperature),
    ):
        collapsed = own.soft(targets)
        assert isinstance(collapsed, DenseTargets)
        assert collapsed.temperature == temperature
        torch.testing.assert_close(collapsed.values_NC.softmax(1), expected)


def test_a_class_that_the_teacher_rules_out_stays_ruled_out() -> None:
    own = OwnClasses((0,), 3, 0.0)
    logits = torch.tensor([[-math.inf, 0.0, 0.0], [0.0, -math.inf, -math.inf]])
    dense = own.soft(DenseTargets(logits, torch.ones(2, dtype=torch.bool), 2.0))
    assert isinstance(dense, DenseTargets)
    assert torch.equal(dense.values_NC.softmax(1), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    loss = soft_loss("kl", torch.zeros(2, 2, requires_grad=True), dense)
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize("name", ["tail-bucket", "reverse-kl", "jsd"])
def test_topk_that_keeps_all_own_classes_gives_the_loss_of_dense(name: str) -> None:
    own, temperature = OwnClasses((1, 4), 6, 0.7), 1.0
    generator = torch.Generator().manual_seed(1)
    logits, student = torch.randn(7, 6, generator=generator), torch.randn(7, 3, generator=generator)
    logits[:, [1, 4]] += 5  # so that both are among the first three
    logprobs, ids = (logits / temperature).log_softmax(1).topk(3, 1)
    tail = (1 - logprobs.exp().sum(1)).log()
    valid = torch.ones(7, dtype=torch.bool)
    losses = []
    for targets in (
        DenseTargets(logits, valid, temperature),
        TopKTargets(ids, logprobs, tail, valid, temperature),
    ):
        collapsed, mine = own.soft(targets), student.clone().requires_grad_()
        which = "kl" if name == "tail-bucket" and isinstance(targets, DenseTargets) else name
        loss = soft_loss(which, own.soft_logits(mine, collapsed), collapsed)
        loss.sum().backward()
        losses.append((loss.detach(), mine.grad))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-5)


def test_an_own_class_that_topk_does_not_keep_is_one_bucket_with_the_dustbin() -> None:
    own = OwnClasses((1, 4), 6, 0.0)
    ids, probs, tail = torch.tensor([[4, 0]]), torch.tensor([[0.5, 0.3]]), torch.tensor([0.2])
    collapsed = own.soft(TopKTargets(ids, probs.log(), tail.log(), torch.ones(1, dtype=torch.bool), 1.0))
    logits = torch.tensor([[0.3, -0.2, 1.1]])
    q = logits.softmax(1)[0]  # class 1, class 4, the others
    loss = soft_loss("tail-bucket", own.soft_logits(logits, collapsed), collapsed)
    expected = 0.5 * math.log(0.5 / q[1]) + 0.5 * math.log(0.5 / (q[0] + q[2]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_draws_of_other_classes_are_draws_of_the_dustbin() -> None:
    own = OwnClasses((1, 4), 6, 0.0)
    targets = SampleTargets(torch.tensor([[4, 0, 2]]), torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([True]), 1.0)
    collapsed, logits = own.soft(targets), torch.tensor([[0.3, -0.2, 1.1]])
    logq = logits.log_softmax(1)[0]
    loss = soft_loss("sampled-ce", own.soft_logits(logits, collapsed), collapsed)
    assert loss.item() == pytest.approx(-(0.5 * logq[1] + 0.5 * logq[2]).item(), rel=1e-5)


@pytest.mark.parametrize("encoding", [Dense("float32"), TopK(3, "float32"), TopK(7, "float32")], ids=str)
def test_what_the_teacher_says_of_the_own_classes_is_the_minimum(encoding: Encoding) -> None:
    own, logits = OwnClasses((1, 4), 7, 0.9), random_logits()
    said = torch.from_numpy(logits).float().log_softmax(1)
    others = said[:, [0, 2, 3, 5, 6]].logsumexp(1, keepdim=True)
    student = torch.cat([said[:, [1, 4]], others - 0.9], 1).requires_grad_()  # as one that sees its own rows more often
    collapsed = own.soft(targets_of(encoding, logits))
    loss = soft_loss(default_loss(encoding), own.soft_logits(student, collapsed), collapsed)
    loss.sum().backward()
    assert loss.abs().max() < 1e-5
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5


def test_hard_targets_are_the_place_among_the_own_classes_or_the_dustbin() -> None:
    own = OwnClasses((1, 4), 6, 0.0)
    assert own.hard(torch.tensor([0, 1, 2, 3, 4, 5, -1])).tolist() == [2, 0, 2, 2, 1, 2, -1]


# the model


class Bare(nn.Module):
    """A model whose last layer nobody tells, and which is not the last that was made."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.last = nn.Linear(5, 4, bias=bias)
        self.first = nn.Linear(NUM_FEATURES, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.first(inputs.flatten(1)).relu())
        return logits


@pytest.mark.parametrize(
    "model",
    [build_model(STUDENT), Bare(), Bare(bias=False), nn.Linear(NUM_FEATURES, 4), build_model("cnn:1-4-4")],
    ids=["mlp", "bare", "no bias", "linear", "cnn"],
)
def test_a_cut_model_says_the_same_of_its_own_classes(model: nn.Module) -> None:
    shape = (1, 8, 8) if type(model).__name__ == "CNN" else (NUM_FEATURES,)
    inputs = torch.randn(6, *shape)
    with torch.no_grad():
        before = model.eval()(inputs)
        cut = cut_head(model, (0, 2), shape, "here")
        after = cut.eval()(inputs)
    assert after.shape == (6, 3)
    torch.testing.assert_close(after[:, :2], before[:, [0, 2]])
    torch.testing.assert_close(after[:, 2], before[:, [1, 3]].mean(1) + math.log(2))


def test_a_model_without_a_last_layer_to_replace_is_refused() -> None:
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.LayerNorm(4))
    with pytest.raises(StudentError, match=r"here: expected a last layer that can be replaced, an nn.Linear of 4"):
        cut_head(model, (0, 1), (NUM_FEATURES,), "here")
    assert model(torch.zeros(1, NUM_FEATURES)).shape == (1, 4)  # as it was


# the rows


def test_an_epoch_has_all_own_rows_and_others_drawn_anew(ground: Ground) -> None:
    with open_store(ground.targets) as store:
        shards = store.sealed_shards()
        rows = RowClasses(store, open_corpus(ground.data))
        classes = rows.of_shards(shards)
        found = choose_rows(store, classes, (0, 1), 0.75, 3, "hard targets")
        is_own = np.isin(classes, (0, 1))
        assert found.counts.own == is_own.sum()
        assert found.counts.rest == (~is_own).sum()
        assert found.counts.drawn == round(is_own.sum() / 3)
        assert found.counts.dustbin_shift == pytest.approx(math.log((~is_own).sum() / round(is_own.sum() / 3)))
        epochs = [found.chosen(epoch, shards) for epoch in range(400)]
        for chosen in epochs:
            assert chosen[is_own].all()
            assert chosen[~is_own].sum() == found.counts.drawn
        assert np.array_equal(epochs[3], choose_rows(store, classes, (0, 1), 0.75, 3, "").chosen(3, shards))
        assert not np.array_equal(epochs[0], epochs[1])
        # each other row comes as often as any
        share = np.mean(epochs, 0)[~is_own]
        assert np.abs(share - found.counts.drawn / found.counts.rest).max() < 0.12
        with pytest.raises(StudentError, match="expected the 6 shards that the specialist's rows were counted in"):
            found.chosen(0, shards[:3])


def test_rows_without_targets_or_a_class_are_not_counted(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, refused=(0, 1, 2, 3, 4, 5))
    with open_store(ground.targets) as store:
        classes = RowClasses(store, open_corpus(ground.data)).of_shards(store.sealed_shards()).copy()
        classes[6:10] = -1
        found = choose_rows(store, classes, (2,), 0.5, 0, "hard targets")
    assert found.counts.own == (classes[10:] == 2).sum()
    assert found.counts.own + found.counts.rest == 96 - 10
    assert not found.own_N[:10].any()
    assert found.rest_R.min() >= 10


def test_a_specialist_of_nearly_all_rows_takes_all_others(ground: Ground) -> None:
    with open_store(ground.targets) as store:
        classes = RowClasses(store, open_corpus(ground.data)).of_shards(store.sealed_shards())
        found = choose_rows(store, classes, (0, 1, 2), 0.5, 0, "hard targets")
        assert found.counts.drawn == found.counts.rest < found.counts.own
        assert found.counts.dustbin_shift == 0
        for absent, classes_N in (
            ("rows of its class 3", np.zeros(96, np.int32)),
            ("rows of other", np.full(96, 3, np.int32)),
        ):
            with pytest.raises(StudentError, match=f"expected {absent}.*, by the labels, got none"):
                choose_rows(store, classes_N, (3,), 0.5, 0, "labels")


@pytest.mark.parametrize("value", [{"own": 1, "rest": 2, "drawn": 3}, {"own": 0, "rest": 2, "drawn": 1}])
def test_counts_that_can_not_be_are_refused(value: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rows: expected counts of own, rest and drawn rows, got"):
        counts_of(value | {"by": "hard targets"})


# what is learned


def population(folder: Path) -> tuple[Ground, Array, Array]:
    """A corpus of four inputs with known shares of each class, a store that says just these, and both."""
    shares = np.array([[40, 10, 30, 20], [5, 25, 60, 10], [60, 20, 15, 5], [10, 10, 10, 70]])
    inputs, classes = [], []
    for index, counts in enumerate(shares):
        inputs += [np.eye(NUM_FEATURES, dtype=np.float32)[index]] * int(counts.sum())
        classes += [number for number, count in enumerate(counts) for _ in range(count)]
    data = folder / "corpus.npz"
    np.savez(data, x=np.array(inputs), y=np.array(classes))
    probs = shares / shares.sum(1, keepdims=True)
    logits = np.log(probs)[np.repeat(np.arange(4), 100)].astype(np.float32)
    targets = write_targets(folder / "targets.zarr", open_corpus(data), logits=logits, shard_rows=200)
    return Ground(folder, data, targets), np.eye(NUM_FEATURES, dtype=np.float32)[:4], probs


@pytest.mark.parametrize(
    "phases",
    [
        {"epochs": 60},
        {"soft_epochs": 60, "alpha": 1.0},
        {"soft_epochs": 60, "alpha": 0.3},
        {"soft_epochs": 60, "alpha": 1.0, "temperature": 3.0},
    ],
    ids=["hard", "soft", "both", "soft at T = 3"],
)
def test_a_corrected_specialist_has_the_probabilities_of_the_whole_population(
    tmp_path: Path, phases: dict[str, Any]
) -> None:
    ground, inputs, probs = population(tmp_path)
    write_plan_of(ground, [[0, 1]])
    training = {"lr": 0.2, "batch_size": 400, "seed": 1}
    config = config_of(ground, student=f"mlp:{NUM_FEATURES}-4", own_share=0.7, training=training, **phases)
    fit_specialists(config, quiet=True)
    (specialist,) = load_specialists(config.out)
    assert specialist.dustbin_shift > 0.9  # 180 own rows, 77 of 220 others
    assert specialist.card.specialist is not None
    with open_store(ground.targets) as store:
        assert specialist.card.specialist["generalist"] == store.manifest.teacher["digest"]
    with torch.no_grad():
        found = specialist.logprobs(torch.from_numpy(inputs)).exp().numpy()
        raw = specialist.model(torch.from_numpy(inputs)).softmax(1).numpy()
    expected = np.column_stack([probs[:, :2], probs[:, 2:].sum(1)])
    assert np.abs(found - expected).max() < 0.03
    assert np.abs(raw - expected).max() > 0.15


def test_specialists_begin_from_the_generalist_and_are_loaded_again(ground: Ground) -> None:
    fit(ground.config("generalist"), quiet=True)
    val = write_blobs(ground.folder / "val.npz", 64, seed=5)
    training = {"init": str(ground.folder / "generalist"), "val_data": str(val)}
    config = config_of(ground, epochs=3, soft_epochs=2, training=training)
    result = fit_specialists(config, quiet=True)
    assert "2 of 2 specialists" in str(result)
    classes = np.load(val)["y"]
    for number, specialist in enumerate(load_specialists(config.out)):
        assert specialist.classes == PLAN[number]
        own = result.specialists[number]
        assert own.rows.own == np.isin(np.load(ground.data)["y"], PLAN[number]).sum()
        assert [phase for phase, _ in own.phases] == ["hard", "soft"]
        # the validation is of own rows alone, corrected
        inputs = torch.from_numpy(np.load(val)["x"][np.isin(classes, PLAN[number])])
        known = torch.tensor([PLAN[number].index(it) for it in classes if it in PLAN[number]])
        with torch.no_grad():
            logprobs = specialist.logprobs(inputs)
        torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(inputs)))
        figures = own.phases[-1][1].figures
        assert figures is not None
        assert figures.num_samples == len(inputs)
        assert figures.top1 == pytest.approx((logprobs.argmax(1) == known).float().mean().item())
        assert figures.nll == pytest.approx(-logprobs.gather(1, known[:, None]).mean().item(), rel=1e-4)
    before, again = load_specialists(config.out, "hard")[1].model, specialist.model
    assert not torch.equal(before.state_dict()["layers.0.weight"], again.state_dict()["layers.0.weight"])
    card = load_card(phase_folder(Path(config.out), 1, "soft") / "student.json")
    assert card.num_classes == 3
    assert build_carded(card)(torch.zeros(1, NUM_FEATURES)).shape == (1, 3)
    ended = fit_specialists(config, quiet=True)
    assert all(result.already_ended for own in ended.specialists for _, result in own.phases)
    with pytest.raises(MismatchError, match="expected a student of all classes, got a specialist, which knows 2 and"):
        try_student(str(phase_folder(Path(config.out), 0, "hard")), str(val), quiet=True)


def test_the_first_weights_are_the_generalists(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(ground.config("generalist"), quiet=True)
    generalist = load_student(ground.folder / "generalist")[0]
    config = config_of(ground, training={"init": str(ground.folder / "generalist"), "lr": 1e-12})
    fit_specialists(config, quiet=True)
    inputs = torch.randn(4, NUM_FEATURES)
    with torch.no_grad():
        for specialist in load_specialists(config.out):
            found = specialist.model(inputs)[:, :-1]
            torch.testing.assert_close(found, generalist(inputs)[:, list(specialist.classes)], rtol=1e-4, atol=1e-4)


def test_topk_has_a_soft_phase(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=TopK(2), temperatures=(1.0,))
    config = config_of(ground, soft_epochs=2, specialists=(1,))
    result = fit_specialists(config, quiet=True)
    assert result.specialists[0].phases[0][1].steps > 0
    lines = (phase_folder(Path(config.out), 1, "soft") / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["soft_loss"]) for line in lines if '"train"' in line)


@pytest.mark.parametrize("encoding", [TopK(2), Dense("float16")], ids=lambda it: it.name)
def test_only_logits_of_all_classes_allow_another_temperature_than_1(encoding: Encoding, tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=encoding)
    config = config_of(ground, soft_epochs=1, specialists=(0,), temperature=4.0)
    if encoding.name == "topk":
        assert_refused(MismatchError, "temperature: expected 1 for specialists from a topk store, got 4", config)
    else:
        assert fit_specialists(config, quiet=True).specialists[0].phases[0][1].steps > 0


def test_without_hard_targets_the_stored_top1_tells_the_own_rows_and_soft_is_all(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, labels=False)
    with pytest.raises(
        ValueError, match=r"epochs, steps: expected hard targets for them, got none in .* --soft-epochs"
    ):
        fit_specialists(config_of(ground, epochs=1), quiet=True)
    result = fit_specialists(config_of(ground, soft_epochs=1), quiet=True)
    assert {own.rows.by for own in result.specialists} == {"stored top-1"}
    assert [specialist.classes for specialist in load_specialists(result.out)] == list(PLAN)


class Killed(BaseException):
    """What ends a run at once, as a kill does."""


def test_specialists_that_are_killed_go_on_to_the_same_weights(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"epochs": 2, "soft_epochs": 2, "training": {"checkpoint_every": "2", "ema": 0.9}}
    whole = config_of(ground, "whole", **options)
    fit_specialists(whole, quiet=True)
    add, done, left = StepLog.add, [0], [3, 5, 11, 17, 18]

    def with_kill(self: StepLog, *values: Any) -> None:
        add(self, *values)
        done[0] += 1
        if left and done[0] == left[0]:
            left.pop(0)
            raise Killed

    monkeypatch.setattr(StepLog, "add", with_kill)
    killed = config_of(ground, "killed", **options)
    for _ in range(5):
        with pytest.raises(Killed):
            fit_specialists(killed, quiet=True)
    with pytest.raises(StudentError, match=r"specialist \d of .*: expected a finished run in .*, got .*; run the same"):
        load_specialists(killed.out)
    fit_specialists(killed, quiet=True)
    assert_same(whole, killed)


# refusals


def assert_refused(kind: type[Exception], message: str, config: SpecialistsConfig) -> None:
    with pytest.raises(kind, match=message):
        fit_specialists(config, quiet=True)
    assert not list(Path(config.out).glob("specialist-*/*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"store": {"digest": "f" * 64, "content_digest": "e" * 64}}, r"got one of another store \(eeeeeeeeeeee\)"),
        ({"num_classes": 5}, "expected 4 classes as in .*, got 5"),
        ({"class_names": ("a", "b", "c", "d")}, "expected class 0 to be 'w' as in store .*, got 'a'"),
    ],
)
def test_a_plan_of_another_store_or_other_classes_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ground = make_ground(tmp_path, class_names=("w", "x", "y", "z"))
    if "num_classes" in changed:
        changed = changed | {"class_names": None}
    write_plan_of(ground, **changed)
    assert_refused(MismatchError, message, config_of(ground))


def test_a_folder_of_another_plan_or_of_something_else_is_refused(ground: Ground) -> None:
    config = config_of(ground, epochs=1, specialists=(0,))
    fit_specialists(config, quiet=True)
    write_plan_of(ground, [[0, 2], [1, 3]])
    with pytest.raises(PathError, match="expected the folder of this plan, got one of another"):
        fit_specialists(config, quiet=True)
    (ground.folder / "other").mkdir()
    (ground.folder / "other" / "notes.txt").touch()
    assert_refused(
        PathError, "expected an empty folder or one of specialists, got 'notes.txt'", config_of(ground, "other")
    )
    (ground.folder / "file").touch()
    with pytest.raises(PathError, match="file: expected a folder, or nothing, got a file"):
        fit_specialists(config_of(ground, "file"), quiet=True)


def test_other_options_are_refused_on_going_on(ground: Ground) -> None:
    fit_specialists(config_of(ground, epochs=1, specialists=(0,)), quiet=True)
    with pytest.raises(StudentError, match=r"--lr 0.001, not 0.5"):
        fit_specialists(config_of(ground, epochs=1, training={"lr": 0.5}), quiet=True)
    with pytest.raises(StudentError, match=r"expected --own-share 0.5, with which it was begun, got 0.6"):
        fit_specialists(config_of(ground, epochs=1, specialists=(0,), own_share=0.6), quiet=True)
    run = phase_folder(ground.folder / "specialists", 0, "hard")
    (run / RESULT).unlink()
    specialty = Specialty(0, (0, 2), is_checked=True)  # of other classes than are there
    with pytest.raises(StudentError, match="expected the specialist that it was begun with, its classes, --own-share"):
        fit(config_of(ground, epochs=1).run(0, "hard"), True, specialty)


def test_what_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, labels=False)
    config = config_of(ground, epochs=1)
    with pytest.raises(ValueError, match="expected hard targets for them"):
        fit_specialists(config, quiet=True)
    assert not Path(config.out).exists()


def test_a_store_that_may_grow_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, finalize=False, shards=(0, 1))
    assert_refused(
        NotSealedError, "expected a finalized store, since a specialist's rows are counted", config_of(ground)
    )


def test_specialists_of_sequences_are_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(ground)
    monkeypatch.setattr("storage.manifest.Manifest.sequences", object(), raising=False)
    monkeypatch.setattr("studenttrain.specialists.fitting.check_plan", lambda *_: None)
    with open_store(ground.targets) as store:
        object.__setattr__(store.manifest, "sequences", object())
        with pytest.raises(StudentError, match="expected one whose rows have a class, got sequences of tokens"):
            check_store(store)
    assert config.phases == ("hard",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None, "steps": None}, "epochs, steps, soft_epochs: expected one of them, got none"),
        ({"epochs": 1, "steps": 2}, "epochs, steps: expected one of them, got both"),
        ({"own_share": 1.0}, "own_share: expected a number between 0 and 1, got 1"),
        ({"own_share": math.nan}, "own_share: expected a number between 0 and 1, got nan"),
        ({"alpha": 0.5}, "alpha: expected --soft-epochs beside it, got none"),
        ({"temperature": 2.0}, "temperature: expected --soft-epochs beside it, got none"),
        ({"soft_epochs": 1, "alpha": 0.0}, "alpha: expected a number above 0, up to 1, got 0"),
        ({"workers": 1, "scheduler": "tcp://a:1"}, "workers, scheduler: expected one of them, got both"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"training": {"lr": -1.0}}, "lr: expected a number above 0, got -1"),
        ({"plan": ""}, "plan: expected some text, got none"),
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, Any], message: str, bare: Ground) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(bare, **{"epochs": 1, **options})


def test_ranks_are_refused(bare: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun: expected one process, got ranks; give --workers or --scheduler"):
        config_of(bare)


def test_a_specialist_that_the_plan_does_not_have_is_refused(ground: Ground) -> None:
    with pytest.raises(ValueError, match=r"specialist: expected 0 to 1, as in .*, got 2"):
        fit_specialists(config_of(ground, specialists=(2,)), quiet=True)


def test_weights_of_another_specialist_are_refused_to_begin_with(ground: Ground) -> None:
    config = config_of(ground, epochs=1, specialists=(0,))
    fit_specialists(config, quiet=True)
    init = str(phase_folder(Path(config.out), 0, "hard"))
    with pytest.raises(StudentError, match="--init: expected a generalist's weights, or those of specialist 1, got"):
        fit_specialists(config_of(ground, "others", specialists=(1,), training={"init": init}), quiet=True)


def test_what_a_later_specialist_can_t_be_made_of_is_refused_before_the_first(ground: Ground) -> None:
    config = config_of(ground, epochs=1, specialists=(0,))
    fit_specialists(config, quiet=True)
    init = str(phase_folder(Path(config.out), 0, "hard"))
    later = config_of(ground, "later", training={"init": init})
    with pytest.raises(StudentError, match="or those of specialist 1, got specialist 0"):
        fit_specialists(later, quiet=True)
    assert not Path(later.out).exists()
    val = write_blobs(ground.folder / "val.npz", 64, seed=5)
    np.savez(val, x=np.load(val)["x"], y=np.zeros(64, np.int64))
    later = config_of(ground, "later", training={"val_data": str(val)})
    with pytest.raises(CorpusError, match="expected rows of classes 1, 3 to validate specialist 1 on, got none"):
        fit_specialists(later, quiet=True)
    assert not Path(later.out).exists()


def test_a_validation_without_a_row_of_the_classes_is_refused(ground: Ground) -> None:
    val = write_blobs(ground.folder / "val.npz", 64, seed=5)
    points, classes = np.load(val)["x"], np.load(val)["y"]
    np.savez(val, x=points, y=np.where(classes == 3, 1, 2 * (classes % 2) // 2 + 1))
    write_plan_of(ground, [[0, 3]])
    with pytest.raises(CorpusError, match="expected rows of classes 0, 3 to validate specialist 0 on, got none"):
        fit_specialists(config_of(ground, training={"val_data": str(val)}), quiet=True)


def test_folders_that_are_none_of_specialists_are_refused(ground: Ground) -> None:
    with pytest.raises(PathError, match="expected the folder of studenttrain specialists fit, got one without plan"):
        load_specialists(ground.folder)
    config = config_of(ground, epochs=1)
    fit_specialists(replace(config, specialists=(1,)), quiet=True)
    with pytest.raises(
        StudentError, match=r"specialist 0 of .*: expected a finished run in .*, got none; run the same"
    ):
        load_specialists(config.out)
    fit_specialists(config, quiet=True)
    model, card = load_student(phase_folder(Path(config.out), 0, "hard"))
    assert Specialist.of(model, card, "here").classes == (0, 1)
    with pytest.raises(StudentError, match="here: expected a specialist, got a student of all classes"):
        own_classes(replace(card, specialist=None), "here")
    assert card.specialist is not None
    for name, value in (("classes", [1, 0]), ("classes", 3), ("dustbin_shift", math.inf), ("num_classes", 2)):
        with pytest.raises(StudentError, match="here: expected the card of a specialist, got a damaged one"):
            own_classes(replace(card, specialist={**card.specialist, name: value}), "here")
    out = Path(config.out)
    write_phases(out, ("soft",))
    assert read_phases(out) == ("hard", "soft")
    (out / "fit.json").write_text("[]")
    with pytest.raises(StudentError, match=r"fit.json: expected the phases of specialists, got something else"):
        read_phases(out)
    (out / "fit.json").unlink()
    plan = out / "plan.json"
    plan.write_text(plan.read_text().replace("[1, 3]", "[1, 2]"))
    with pytest.raises(StudentError, match=r"specialist 1 of .*: expected the classes of its plan, got others"):
        load_specialists(out)


# workers


KILLER = """
import os, signal
from pathlib import Path
from torch import nn

class Killer(nn.Sequential):
    def forward(self, inputs):
        marker = Path(__file__).with_name("killed")
        if self.training and len(inputs) > 2:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 6 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs.flatten(1))

def build(num_classes=4):
    return Killer(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, num_classes))
"""


@pytest.mark.slow
def test_workers_give_the_weights_of_one_process_though_one_dies(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ground.folder / "killer.py").write_text(KILLER)
    (ground.folder / "killed").touch()
    monkeypatch.chdir(ground.folder)
    options: dict[str, Any] = {"student": "killer:build", "epochs": 4, "training": {"checkpoint_every": "2"}}
    alone = config_of(ground, "alone", **options)
    fit_specialists(alone, quiet=True)
    (ground.folder / "killed").unlink()
    shared = config_of(ground, "shared", workers=2, **options)
    result = CliRunner().invoke(main, words_of(shared))
    assert result.exit_code == 0, result.output
    assert (ground.folder / "killed").exists()
    assert "specialist 0 has ended" in result.output
    assert_same(alone, shared)


@pytest.fixture
def scheduler() -> Iterator[Callable[..., str]]:
    """Starts a Dask cluster in this process, whose worker has so many threads, and gives its address."""
    from distributed import LocalCluster

    with contextlib.ExitStack() as stack:

        def start(num_threads: int, num_workers: int = 1) -> str:
            options: dict[str, Any] = {"processes": False, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0"}
            cluster = LocalCluster(n_workers=num_workers, threads_per_worker=num_threads, host="127.0.0.1", **options)
            stack.enter_context(cluster)
            return str(cluster.scheduler_address)

        yield start


def test_workers_of_a_scheduler_train_and_say_what_they_met(ground: Ground, scheduler: Callable[..., str]) -> None:
    config = config_of(ground, epochs=1)
    one, two = scheduler(1), scheduler(2)
    with pytest.raises(StudentError, match=r"specialist \d: worker '.*': expected one thread, since two trainings"):
        fit_specialists(replace(config, scheduler=two), quiet=True)
    fit_specialists(replace(config, scheduler=one), quiet=True)
    alone = config_of(ground, "alone", epochs=1)
    fit_specialists(alone, quiet=True)
    assert_same(alone, config)
    (Path(config.out) / "specialist-00" / "hard" / RESULT).unlink()
    with (
        hold_folder(str(phase_folder(Path(config.out), 0, "hard"))),
        pytest.raises(StudentError, match=r"specialist 0: .*: expected a folder that no other run writes to, got one"),
    ):
        fit_specialists(replace(config, scheduler=one), quiet=True)


def test_a_scheduler_without_workers_is_refused(
    ground: Ground, scheduler: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studenttrain.specialists.parallel.CONNECT_S", 1.0)
    with pytest.raises(
        PathError, match=r"scheduler 'tcp://.*': expected a worker, got none in 1 s; start some: dask w"
    ):
        fit_specialists(config_of(ground, scheduler=scheduler(1, num_workers=0)), quiet=True)


def test_workers_that_write_to_another_place_are_found_out(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studenttrain.specialists.parallel.train_on_workers", lambda *_: None)
    with pytest.raises(StudentError, match=r"specialist 0: expected it to have ended in .*, got no result there; give"):
        fit_specialists(config_of(ground, workers=1), quiet=True)


def last_worker() -> WorkerState:
    """A worker that died, as a scheduler remembers it."""
    where: dict[str, Any] = {"address": "tcp://gone:1", "name": 0, "local_directory": "", "nanny": None}
    return WorkerState(**where, status=Status.closed, pid=1, memory_limit=0, server_id="0")


def test_a_worker_that_dies_again_and_again_and_one_that_fails_are_said() -> None:
    for error, message in (
        (
            KilledWorker("task", last_worker(), 3),
            "specialist 4: expected a worker that lives until it has ended, got several",
        ),
        (RuntimeError("boom"), "specialist 4: expected it to end, got RuntimeError: boom; run without --workers"),
    ):
        future: Future[None] = Future()
        future.set_exception(error)
        with pytest.raises(StudentError, match=message):
            check_future(future, 4)


def test_workers_share_the_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of("auto", worker) for worker in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of("cpu", 1) == "cpu"
    assert device_of("auto", "a name") == "auto"


@pytest.mark.slow
def test_a_stop_of_workers_says_how_to_go_on(ground: Ground) -> None:
    config = config_of(ground, epochs=400, workers=1, specialists=(), training={"checkpoint_every": "5"})
    words = [sys.executable, "-m", "studenttrain.cli", *words_of(config)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not list(Path(config.out).glob("specialist-*/hard/checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped with 2 of 2 specialists not done" in said
    assert "to go on, run the same command" in said


def test_a_scheduler_that_is_none_is_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studenttrain.specialists.parallel.CONNECT_S", 0.3)
    with pytest.raises(StoreError, match=r"scheduler 'tcp://127.0.0.1:9': expected a Dask scheduler that answers"):
        fit_specialists(config_of(ground, scheduler="tcp://127.0.0.1:9"), quiet=True)
