"""Alarms stop broken runs, each for its reason, and leave healthy ones alone."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE
from storage.errors import AlarmError, CorpusError, TeacherError
from storage.reader import open_store
from studenttrain.models import build_model
from teacherdump.alarm_pilot import choose_rows
from teacherdump.alarms import shard_alarm, status_findings
from teacherdump.config import ALARMS, DumpConfig
from teacherdump.run import run
from teacherdump.source import open_source, prepare

Build = Callable[..., DumpConfig]
Teach = Callable[..., DumpConfig]
ENCODINGS: list[dict[str, Any]] = [
    {},
    {"values": "float32"},
    {"values": "uint8"},
    {"encoding": "topk", "k": 3},
    {"encoding": "sample", "draws": 40},
]


class Says(nn.Module):
    """A teacher whose logits are a function of its input's first number; it has a weight, so that it can be saved."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.logits = logits

    def forward(self, inputs_N: Tensor) -> Tensor:
        return self.logits(inputs_N.flatten(1)[:, :1])


@pytest.fixture
def teach(config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teach:
    """A dump by a teacher of one function over 1,024 rows without hard targets, the i-th of which begins with i."""

    def build(logits: Callable[[Tensor], Tensor], **options: Any) -> DumpConfig:
        saying = type(sys)("saying")
        saying.__dict__["make"] = lambda: Says(logits)
        monkeypatch.setitem(sys.modules, "saying", saying)
        torch.save(Says(logits).state_dict(), tmp_path / "says.pt")
        rows = np.random.default_rng(0).normal(size=(1024, 12)).astype(np.float32)
        rows[:, 0] = np.arange(1024)
        np.savez(tmp_path / "numbered.npz", x=rows)
        defaults: dict[str, Any] = {
            "data": str(tmp_path / "numbered.npz"),
            "labels": None,
            "shard_rows": 256,
            "batch_size": 64,
        }
        defaults["limit_samples"] = 256  # of 1,024: the first shard is enough
        return config(models=(str(tmp_path / "says.pt"),), arch="saying:make", **{**defaults, **options})

    return build


def one_hot(number_N1: Tensor, num_classes: int, high: float) -> Tensor:
    """`high` in the class that a number names."""
    return torch.nn.functional.one_hot(number_N1[:, 0].long() % num_classes, num_classes) * high


def varied(number_N1: Tensor, num_classes: int = 5, size: float = 1.0) -> Tensor:
    """Logits like those of random weights: some classes a little above others, another one for each row."""
    return torch.sin(number_N1 * torch.arange(1, num_classes + 1)) * size


def refused(config: DumpConfig, name: str, message: str) -> None:
    """The alarm of a name goes off, alone, leaves nothing behind, and can be switched off."""
    with pytest.raises(AlarmError, match=message) as caught:
        run(config)
    assert str(caught.value).endswith(f"; or go on all the same: --no-alarm {name}")
    assert not Path(config.out).exists()


# What goes off


@pytest.mark.parametrize("options", [{}, {"encoding": "topk", "k": 3}, {"encoding": "sample", "draws": 40}])
def test_a_teacher_that_does_not_see_its_input_is_stopped(teach: Teach, options: dict[str, Any]) -> None:
    constant = teach(lambda number: torch.tensor([1.0, 2, 0, 0.5, 4]).repeat(len(number), 1), **options)
    refused(constant, "constant", r"pilot of 64 rows: expected logits that differ from sample to sample, got the same")
    run(teach(lambda number: torch.tensor([1.0, 2, 0, 0.5, 4]).repeat(len(number), 1), no_alarms=("constant",)))


def test_logits_that_are_all_alike_are_stopped(teach: Teach) -> None:
    refused(teach(lambda number: varied(number, size=1e-5)), "flat", "expected some classes above others, got all 5 al")


def test_one_class_and_nothing_beside_it_is_stopped(teach: Teach) -> None:
    message = r"expected soft targets, got one class and nothing beside it for all 64 .* at temperature 4 too"
    refused(teach(lambda number: one_hot(number, 5, 1000) + varied(number)), "collapsed", message)


@pytest.mark.parametrize("options", [{}, {"encoding": "topk", "k": 3}])
def test_probabilities_instead_of_logits_are_stopped(teach: Teach, options: dict[str, Any]) -> None:
    message = r"pilot of 64 rows: expected logits, got numbers from 0 to 1 that add up to 1 for all 64 samples"
    refused(teach(lambda number: varied(number).softmax(1), **options), "probabilities", message)
    refused(teach(lambda number: one_hot(number, 5, 1.0), **options), "probabilities", message)
    run(teach(lambda number: varied(number).log_softmax(1), **options))


def test_one_class_for_everything_is_stopped(teach: Teach) -> None:
    sure = torch.tensor([0.0, 0, 0, 6, 0])
    message = r"expected several classes, got class 3 on top for all 64 samples that were looked at: the preprocessing"
    refused(teach(lambda number: varied(number) + sure), "one-class", message)


def test_nan_in_one_row_of_four_is_stopped(teach: Teach) -> None:
    message = r"expected finite logits, got NaN or inf in \d+ of 64 rows: .*overflow: try --precision bf16 or fp32"
    refused(teach(lambda number: torch.where(number % 4 == 1, torch.nan, varied(number))), "not-finite", message)


def test_values_beyond_a_float16_are_stopped(teach: Teach) -> None:
    message = r"expected logits that float16 can hold, got \d+ of 320 values at its end, 65,504 below the largest"
    wide = teach(lambda number: varied(number, size=80_000.0), no_alarms=("collapsed",))
    refused(wide, "saturated", message)
    assert run(teach(lambda number: varied(number, size=80_000.0), values="float32", no_alarms=("collapsed",)))


def test_a_corpus_of_which_half_can_not_be_decoded_is_stopped(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    for path in sorted(images.rglob("*.*"))[::2]:
        path.write_bytes(b"no image")
    options = {"models": (str(saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")),), "arch": "cnn:3-4-2"}
    broken = config(**options, data=str(images), labels=None, image_size=(8, 8), shard_rows=None, chunk_rows=None)
    refused(broken, "undecodable", "expected samples that can be decoded, got 8 of 16 rows that can't: check that --d")


def test_several_alarms_are_told_at_once(teach: Teach) -> None:
    with pytest.raises(AlarmError, match=r"--no-alarm constant --no-alarm flat$"):
        run(teach(lambda number: torch.zeros(len(number), 5)))


def test_a_corpus_that_is_refused_as_a_whole_is_told_by_its_first_sample(teach: Teach) -> None:
    with pytest.raises(TeacherError, match=r"row 0 \('0'\): expected finite logits for some of 64 samples from all ov"):
        run(teach(lambda number: varied(number) * torch.nan))


def test_samples_that_can_not_be_decoded_at_all_are_told_by_the_first(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    good = sorted(images.rglob("*.*"))[:1]
    for path in sorted(images.rglob("*.*")):
        if path not in good:
            path.write_bytes(b"no image")
    options = {"models": (str(saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")),), "arch": "cnn:3-4-2"}
    broken = config(**options, data=str(images), labels=None, image_size=(8, 8), shard_rows=None, chunk_rows=None)
    good[0].write_bytes(b"no image")
    with pytest.raises((CorpusError, AlarmError)):
        run(broken)


def test_a_teacher_that_breaks_later_is_stopped_before_that_shard_is_written(teach: Teach, tmp_path: Path) -> None:
    calls = [0]

    def breaking(number: Tensor) -> Tensor:
        calls[0] += 1
        late = calls[0] > 8  # a trial, a pilot of one batch, then shards of four
        return torch.ones(len(number), 5) * torch.arange(5) if late else varied(number)

    with pytest.raises(AlarmError, match=r"shard 1 \(rows 256 to 511\), before it was written: .*--no-alarm constant"):
        run(teach(breaking, limit_samples=None))
    with open_store(tmp_path / "out.zarr") as store:
        assert store.sealed_shards() == (0,)


# What does not


@pytest.mark.parametrize("options", ENCODINGS)
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(lambda number: varied(number, size=0.05), id="random weights"),
        pytest.param(lambda number: one_hot(number, 5, 12.0) + varied(number), id="a sharp teacher"),
        pytest.param(
            lambda number: varied(number) * 0.05 + torch.tensor([0.0, 0, 0.3, 0, 0]), id="unsure of one class"
        ),
        pytest.param(
            lambda number: torch.where(torch.arange(5) == number.long() % 5, -1e9, varied(number)), id="a mask"
        ),
        pytest.param(lambda number: one_hot(number, 5, 9.0), id="the same logits in another order"),
    ],
)
def test_a_healthy_teacher_is_left_alone(
    teach: Teach, options: dict[str, Any], logits: Callable[[Tensor], Tensor]
) -> None:
    assert run(teach(logits, **options)).num_refused == 0


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("size", [1e-6, 1.0, 400.0])
def test_one_and_two_classes_are_left_alone(teach: Teach, num_classes: int, size: float) -> None:
    run(teach(lambda number: varied(number, num_classes, size)))


def test_a_corpus_of_one_class_with_hard_targets_is_left_alone(teach: Teach, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.full(1024, 3))
    sure = torch.tensor([0.0, 0, 0, 6, 0])
    options = {"labels": str(tmp_path / "labels.npy")}
    run(teach(lambda number: varied(number) + sure, **options))
    np.save(tmp_path / "labels.npy", np.arange(1024) % 5)
    with pytest.raises(AlarmError, match=r"got class 3 on top for all 64 .* though the hard targets differ"):
        run(teach(lambda number: varied(number) + sure, out=str(tmp_path / "b.zarr"), **options))


def test_a_corpus_sorted_by_class_is_left_alone(teach: Teach, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.arange(1024) // 256)
    by_class = teach(
        lambda number: one_hot(number // 256, 5, 8.0) + varied(number),
        labels=str(tmp_path / "labels.npy"),
        limit_samples=None,
    )
    assert run(by_class).num_sealed_rows == 1024


def test_a_corpus_of_one_sample_over_and_over_is_left_alone(config: Build, tmp_path: Path) -> None:
    np.savez(tmp_path / "corpus.npz", x=np.ones((200, 12), np.float32))
    assert run(config(labels=None)).num_sealed_rows == 200


def test_a_corpus_with_some_odd_samples_is_left_alone(teach: Teach) -> None:
    run(teach(lambda number: torch.where(number % 16 == 0, torch.nan, varied(number))))


@pytest.mark.parametrize("options", [{"encoding": "topk", "k": 9}, {"encoding": "hidden"}])
def test_sequences_are_left_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.save(build_model("gpt:1x16,heads=2,vocab=300").state_dict(), tmp_path / "gpt.pt")
    tokens = np.random.default_rng(0).integers(0, 300, 700).astype(np.uint16)
    tokens[::16] = 0  # each sequence begins alike, so its first position is the same in all
    np.save(tmp_path / "tokens.npy", tokens)
    base: dict[str, Any] = {
        "models": (str(tmp_path / "gpt.pt"),),
        "arch": "gpt:1x16,heads=2,vocab=300",
        "device": "cpu",
    }
    base |= {"data": str(tmp_path / "tokens.npy"), "sequence_length": 16, "out": str(tmp_path / "out.zarr")}
    assert run(DumpConfig(**base, **options)).num_refused == 0


def test_a_language_model_that_does_not_see_its_input_is_stopped(tmp_path: Path) -> None:
    model = build_model("gpt:1x16,heads=2,vocab=300")
    with torch.no_grad():
        model.embedding.weight.zero_()  # type: ignore[union-attr,operator]  # so that nothing of the tokens is left
    torch.save(model.state_dict(), tmp_path / "gpt.pt")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, 700).astype(np.uint16))
    base: dict[str, Any] = {
        "models": (str(tmp_path / "gpt.pt"),),
        "arch": "gpt:1x16,heads=2,vocab=300",
        "device": "cpu",
    }
    base |= {"data": str(tmp_path / "tokens.npy"), "sequence_length": 16, "out": str(tmp_path / "out.zarr")}
    with pytest.raises(AlarmError, match=r"got the same for all 64 positions of 4 sequences"):
        run(DumpConfig(**base, encoding="topk", k=9))


# The pilot


def test_a_pilot_changes_nothing_that_is_written(config: Build, tmp_path: Path) -> None:
    with_pilot = run(config())
    assert run(config(out=str(tmp_path / "b.zarr"), no_alarms=("all",))).content_digest == with_pilot.content_digest


def test_a_pilot_takes_a_share_of_a_small_corpus_and_whole_batches_of_a_compiled_teacher(config: Build) -> None:
    manifest = prepare(open_source(config()), lambda _: None).manifest
    assert len(choose_rows(manifest, 10)) == 16
    assert choose_rows(manifest, 10)[[0, -1]].tolist() == [0, 199]
    compiled = replace(manifest, provenance={"compile": True})
    assert len(choose_rows(compiled, 10)) == 20


def test_a_pilot_ends_when_the_run_is_to_stop(config: Build) -> None:
    from teacherdump.alarm_pilot import pilot_alarm

    job = prepare(open_source(config()), lambda _: None)
    pilot_alarm(job, lambda: True)


def test_few_rows_are_not_judged() -> None:
    statuses = np.full(15, STATUS_NOT_FINITE, np.uint8)
    assert list(status_findings(statuses, is_spread=True)) == []


def test_undecodable_samples_side_by_side_are_no_alarm() -> None:
    statuses = np.full(64, STATUS_UNDECODABLE, np.uint8)
    assert list(status_findings(statuses, is_spread=False)) == []
    assert [found.name for found in status_findings(statuses, is_spread=True)] == ["undecodable"]


def test_a_shard_is_judged_by_its_arrays_alone(config: Build) -> None:
    with open_store(run(config()).path) as store:
        arrays = store.read([spec.name for spec in store.manifest.arrays], 0, 32)
        shard_alarm(arrays, store.manifest)
        for name in ("values", "lse", "max_logit"):
            arrays[name][:] = arrays[name][:1]
        with pytest.raises(AlarmError, match=r"^a shard before it was written: .*got the same for all 32 samples"):
            shard_alarm(arrays, store.manifest)
        shard_alarm(arrays, store.manifest, [name for name in ALARMS if name != "constant"])
        assert (arrays["status"] == STATUS_OK).all()


def test_an_alarm_that_there_is_not_is_refused(config: Build) -> None:
    with pytest.raises(ValueError, match=r"no_alarms: expected undecodable, not-finite, .* or all, got 'loud'; give"):
        config(no_alarms=("loud",))
