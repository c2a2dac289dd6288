"""The training loop: what it minimises, what it writes, and what it gives when it is asked again."""

import itertools
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from storage.corpus import open_corpus
from storage.encodings import TopK
from storage.errors import StudentError
from storage.reader import open_store
from storage.writer import StoreWriter
from studenttrain import epoch_start
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint
from studenttrain.checks import Objective
from studenttrain.distributed import World
from studenttrain.learner import build_learner
from studenttrain.loss import target_arrays
from studenttrain.models import build_model
from studenttrain.preparation import Prepared, stored_preprocess
from studenttrain.step import BatchLoader, Counts, LearningBatch, count_rows, load_batch, train_step
from studenttrain.stream import StudentBatch, TargetStream
from studenttrain.train import fit
from tests.studenttrain.runs import (
    NUM_CLASSES,
    NUM_FEATURES,
    Ground,
    assert_same_weights,
    final_state,
    make_ground,
    metric_lines,
    write_blobs,
    write_targets,
)

ALONE = World(0, 1, torch.device("cpu"))
PLAIN = f"mlp:{NUM_FEATURES}-16-{NUM_CLASSES}"


def some_batches(ground: Ground, batch_size: int, count: int) -> list[StudentBatch]:
    store, corpus = open_store(ground.targets), open_corpus(ground.data)
    names = target_arrays(store.manifest)
    with TargetStream(store, corpus, stored_preprocess(store), batch_size, 0, arrays=names, readers=1) as stream:
        return list(itertools.islice(stream, count))


def gradients(ground: Ground, group: list[StudentBatch], objective: Objective) -> dict[str, torch.Tensor]:
    """What one plain step of rate 1 subtracts from the weights."""
    store = open_store(ground.targets)
    torch.manual_seed(0)
    learner = build_learner(build_model(PLAIN), ground.config(optimizer="sgd", momentum=0.0), ALONE)
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    train_step(
        learner,
        group,
        lambda batch: load_batch(batch, store.manifest, objective, None, ALONE.device),
        objective,
        count_rows(group, objective, None),
        ALONE,
        lr=1.0,
    )
    return {name: before[name] - value for name, value in learner.student.state_dict().items()}


def test_a_step_descends_the_mixed_loss_of_the_paper(ground: Ground) -> None:
    [batch] = some_batches(ground, 32, 1)
    found = gradients(ground, [batch], Objective("kl", 4.0, 0.75))
    torch.manual_seed(0)
    model = build_model(PLAIN)
    logits_NC = model(torch.from_numpy(batch.inputs))
    target_NC = torch.from_numpy(batch.arrays["values"])
    logp_NC, logq_NC = (target_NC / 4.0).log_softmax(1), (logits_NC / 4.0).log_softmax(1)
    soft = 16.0 * (logp_NC.exp() * (logp_NC - logq_NC)).sum(1).mean()
    assert batch.hard_targets_N is not None
    hard = F.cross_entropy(logits_NC, torch.from_numpy(batch.hard_targets_N).long())
    (0.75 * soft + 0.25 * hard).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_step_as_one_large_batch(ground: Ground) -> None:
    [large] = some_batches(ground, 40, 1)
    small = some_batches(ground, 10, 4)
    assert [row for batch in small for row in batch.rows_N.tolist()] == large.rows_N.tolist()
    objective = Objective("kl", 4.0, 0.5)
    one, many = (gradients(ground, group, objective) for group in ([large], small))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-4, atol=1e-6)


def test_batches_of_different_sizes_weigh_by_their_rows(ground: Ground) -> None:
    """The mean is over the rows of the step, so a short last batch does not weigh as much as a full one."""
    [large] = some_batches(ground, 40, 1)
    pieces = [
        StudentBatch(
            large.rows_N[part],
            large.inputs[part],
            {name: values[part] for name, values in large.arrays.items()},
            None if large.hard_targets_N is None else large.hard_targets_N[part],
            large.valid_N[part],
        )
        for part in (slice(0, 37), slice(37, 40))
    ]
    objective = Objective("kl", 4.0, 0.5)
    one, many = (gradients(ground, group, objective) for group in ([large], pieces))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-4, atol=1e-6)


def test_what_lies_ready_is_loaded_with_the_batch_before_it_and_once(ground: Ground) -> None:
    batches = some_batches(ground, 10, 6)
    store, loaded, ready = open_store(ground.targets), [], deque(batches)

    def load(batch: StudentBatch) -> LearningBatch:
        loaded.append(batches.index(batch))
        return load_batch(batch, store.manifest, Objective("kl", 4.0, 1.0), None, ALONE.device)

    loader, order = BatchLoader(load, ready), []
    for group in (batches[:2], batches[2:4], batches[4:]):  # two are asked for at a time, as with --accumulate 2
        for _ in group:
            ready.popleft()
        for batch in group:
            assert torch.equal(loader(batch).inputs, torch.from_numpy(batch.inputs))
            order.append(list(loaded))
    assert order == [[0, 2, 3, 4, 5], *[[0, 2, 3, 4, 5, 1]] * 5]


def test_refused_rows_teach_nothing(tmp_path: Path) -> None:
    whole = make_ground(tmp_path / "whole")
    holed = make_ground(tmp_path / "holed", refused=(3, 40, 77))
    [batch] = some_batches(holed, 96, 1)
    assert (~batch.valid_N).sum() == 3
    [full] = some_batches(whole, 96, 1)
    kept = ~np.isin(full.rows_N, (3, 40, 77))
    rest = StudentBatch(
        full.rows_N[kept],
        full.inputs[kept],
        {name: values[kept] for name, values in full.arrays.items()},
        None if full.hard_targets_N is None else full.hard_targets_N[kept],
        full.valid_N[kept],
    )
    objective = Objective("kl", 4.0, 0.5)
    found, expected = gradients(holed, [batch], objective), gradients(whole, [rest], objective)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_step(ground: Ground) -> None:
    [batch] = some_batches(ground, 32, 1)
    store, objective = open_store(ground.targets), Objective("kl", 4.0, 0.5)
    learner = build_learner(build_model(PLAIN), ground.config(optimizer="sgd", momentum=0.0), ALONE)
    before = [parameter.detach().clone() for parameter in learner.student.parameters()]

    def load(given: StudentBatch):  # type: ignore[no-untyped-def]
        return load_batch(given, store.manifest, objective, None, ALONE.device)

    losses = train_step(learner, [batch], load, objective, Counts(32, 32), ALONE, lr=1.0, clip_norm=0.01)
    assert losses[2] > 0.01
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, learner.student.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_run_learns_and_writes_everything(ground: Ground) -> None:
    val = write_blobs(ground.folder / "val.npz", 200, seed=3)
    val_targets = write_targets(ground.folder / "val.zarr", open_corpus(val))
    config = ground.config(epochs=30, lr=0.01, val_data=str(val), val_targets=str(val_targets), student=PLAIN)
    result = fit(config, quiet=True)
    assert result.figures is not None
    assert result.figures.top1 is not None
    assert result.figures.top1 > 0.9
    assert result.figures.agreement is not None
    assert result.figures.agreement > 0.9
    assert (result.steps, result.num_rows_seen) == (180, 30 * 96)
    names = {path.name for path in Path(config.out).iterdir()}
    expected = {"checkpoint.pt", "metrics.jsonl", "tensorboard", "result.json", "report.html"}
    assert names >= expected | {"student.safetensors", "student.json", "student.pt2"}
    lines = metric_lines(config)
    assert [line["step"] for line in lines] == list(range(1, 181))
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert [line["step"] for line in metric_lines(config, "validation")] == list(range(6, 181, 6))
    assert any((Path(config.out) / "tensorboard").iterdir())


def test_a_run_that_has_ended_says_so_at_once(ground: Ground) -> None:
    config = ground.config(steps=4)
    first = fit(config, quiet=True)
    before = {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    again = fit(config, quiet=True)
    assert again.already_ended
    assert not first.already_ended
    assert again.to_json() == first.to_json()
    assert str(again).startswith("had ended already: 4 steps, 64 rows seen")
    assert {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()} | {".lock": 0} == before | {
        ".lock": 0
    }


def test_alpha_0_reads_no_soft_targets_and_is_plain_training(ground: Ground) -> None:
    fit(ground.config("one", alpha=0.0, steps=6), quiet=True)
    # other soft targets, the same hard ones: nothing changes
    other = ground.folder / "other.zarr"
    noise = np.random.default_rng(0).normal(size=(96, NUM_CLASSES)).astype(np.float32)
    write_targets(other, open_corpus(ground.data), logits=noise)
    config = ground.config("two", alpha=0.0, steps=6, targets=str(other))
    fit(config, quiet=True)
    assert_same_weights(final_state(ground.config("one", steps=6)), final_state(config))
    assert {line["soft_loss"] for line in metric_lines(config)} == {None}


def test_without_hard_targets_alpha_is_1(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, labels=False)
    config = ground.config(steps=2)
    fit(config, quiet=True)
    assert {line["hard_loss"] for line in metric_lines(config)} == {None}
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["data"]["objective"]["alpha"] == 1.0


def test_hard_targets_beside_a_store_that_has_none_are_used(tmp_path: Path) -> None:
    with_them = make_ground(tmp_path / "with")
    without = make_ground(tmp_path / "without", with_hard_targets=False)
    one, two = with_them.config(steps=6), without.config(steps=6)
    fit(one, quiet=True)
    fit(two, quiet=True)
    assert_same_weights(final_state(one), final_state(two))


def test_the_temperature_is_the_largest_declared(ground: Ground) -> None:
    config = ground.config(steps=1)
    fit(config, quiet=True)
    objective = load_checkpoint(Path(config.out) / CHECKPOINT)["data"]["objective"]
    assert objective == {"loss": "kl", "temperature": 4.0, "alpha": 0.9}


def test_a_topk_store_trains_with_the_tail_bucket(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=TopK(2, "float16"))
    config = ground.config(epochs=20, lr=0.01, student=PLAIN)
    fit(config, quiet=True)
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["data"]["objective"]["loss"] == "tail-bucket"
    lines = metric_lines(config)
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]


def test_hdf5_stores_train_to_the_same_weights(tmp_path: Path) -> None:
    ground = make_ground(tmp_path)
    other = write_targets(tmp_path / "targets.h5", open_corpus(ground.data))
    one, two = ground.config("one", steps=8), ground.config("two", steps=8, targets=str(other))
    fit(one, quiet=True)
    fit(two, quiet=True)
    assert_same_weights(final_state(one), final_state(two))


def test_the_number_of_readers_changes_nothing(ground: Ground) -> None:
    one, two = ground.config("one", readers=1), ground.config("two", readers=4)
    fit(one, quiet=True)
    fit(two, quiet=True)
    assert_same_weights(final_state(one), final_state(two))


def test_a_student_may_train_while_the_store_grows(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, shards=(0, 2), finalize=False)
    config = ground.config("early", epochs=1)
    assert fit(config, quiet=True).num_rows_seen == 32
    # more shards, then the end of the dump: the same run is still known, and a new one sees more
    write_targets(ground.targets, open_corpus(ground.data), finalize=False)
    assert fit(config, quiet=True).already_ended
    with StoreWriter.open(ground.targets, open_store(ground.targets).manifest) as writer:
        writer.finalize()
    assert fit(config, quiet=True).already_ended
    assert fit(ground.config("late", epochs=1), quiet=True).num_rows_seen == 96


def test_rows_sealed_during_a_run_are_taken_up_by_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = make_ground(tmp_path, shards=(0,), finalize=False)
    real = epoch_start.epoch_shards

    def shards(prepared: Prepared, world: World, replay: None, epoch: int) -> Sequence[int]:
        if epoch == 1:
            write_targets(ground.targets, open_corpus(ground.data), finalize=False)
        return real(prepared, world, replay, epoch)

    monkeypatch.setattr(epoch_start, "epoch_shards", shards)
    result = fit(ground.config(epochs=2), quiet=True)
    assert result.num_rows_seen == 16 + 96


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(ground: Ground) -> None:
    config = ground.config(steps=60, lr=1e30, optimizer="sgd", momentum=0.0, checkpoint_every="1", student=PLAIN)
    with pytest.raises(
        StudentError,
        match=r"step \d+: expected a finite loss, got (nan|inf); give a lower --lr, .* and give a new --out",
    ):
        fit(config, quiet=True)
    checkpoint = load_checkpoint(Path(config.out) / CHECKPOINT)
    lines = metric_lines(config)
    assert checkpoint["step"] <= lines[-1]["step"]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_rows_that_the_teacher_refused_are_counted_in_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ground = make_ground(tmp_path, refused=(3, 40, 77))
    assert fit(ground.config(epochs=1)).num_rows_seen == 93
    assert "on 96 rows, 3 of them refused by the teacher's run (" in capsys.readouterr().err


def test_averaged_weights_are_what_is_exported_and_validated(ground: Ground) -> None:
    from safetensors.torch import load_file

    config = ground.config(steps=8, ema=0.9)
    fit(config, quiet=True)
    checkpoint = load_checkpoint(Path(config.out) / CHECKPOINT)
    exported = load_file(Path(config.out) / "student.safetensors")
    assert_same_weights(exported, checkpoint["ema"])
    assert any(not torch.equal(value, checkpoint["model"][name]) for name, value in exported.items())


def test_bfloat16_trains(ground: Ground) -> None:
    config = ground.config(epochs=20, lr=0.01, precision="bf16", student=PLAIN)
    fit(config, quiet=True)
    lines = metric_lines(config)
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]


def test_a_run_begins_with_given_weights(ground: Ground) -> None:
    first = ground.config("first", steps=4, student=PLAIN)
    fit(first, quiet=True)
    for source in (first.out, f"{first.out}/student.safetensors", f"{first.out}/checkpoint.pt"):
        config = ground.config(f"second-{Path(source).suffix}", steps=1, lr=1e-30, student=PLAIN, init=source)
        fit(config, quiet=True)
        for name, value in final_state(first).items():
            torch.testing.assert_close(final_state(config)[name], value)


def test_the_result_is_one_json_object(ground: Ground) -> None:
    config = ground.config(steps=2)
    result = fit(config, quiet=True)
    value = json.loads((Path(config.out) / "result.json").read_text())
    assert value["steps"] == 2
    assert value["files"] == list(result.files)
    assert result.report == Path(config.out) / "report.html"


def test_without_the_report_extra_a_run_completes_and_says_how_to_get_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = fit(ground.config(steps=2), quiet=True)
    assert result.report is None
    assert result.notes[0].startswith("no report: it needs jinja2; pip install 'logitstore[report]'")
    assert "student.safetensors" in result.files
