"""A plan's pilot says what each encoding would cost and give up, as a dump and an audit of it say afterwards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from storage.errors import TeacherError
from storage.reader import open_store
from teacherdump.audit import AuditOptions, audit, config_for
from teacherdump.cli import main
from teacherdump.config import DumpConfig
from teacherdump.pilot import Pilot, PilotOptions
from teacherdump.pilot_trials import Candidate, runs_to_pay
from teacherdump.preview import Preview, preview
from teacherdump.run import run
from tests.teacherdump.small_dumps import source_options


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacherdump.preview.TIMED_S", 0.01)


@pytest.fixture(scope="module", params=["classes", "sequences"])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a dump, without where to; the rows fill whole chunks and shards."""
    found = source_options(tmp_path_factory.mktemp(request.param), request.param)
    found |= {"chunk_rows": 4, "temperatures": (1.0, 2.0)}
    return found | ({"sequence_length": 16, "shard_rows": 44} if request.param == "sequences" else {"shard_rows": 20})


def pilot_of(options: dict[str, Any], rows: int = 100, **changes: Any) -> Pilot:
    plan = preview(DumpConfig(**{**options, "out": "/nowhere/out.zarr", **changes}), pilot=PilotOptions(rows))
    assert plan.pilot is not None
    return plan.pilot


def candidate(pilot: Pilot, name: str) -> Candidate:
    return next(found for found in pilot.candidates if found.name == name)


def bytes_on_disk(path: Path) -> int:
    with open_store(path) as store:
        objects = [value for shard in store.sealed_shards() for value in store.seal(shard).objects.values()]
    return sum(int(value["num_bytes"]) for value in objects)


def test_a_pilot_of_all_rows_says_what_a_dump_and_its_audit_say(options: dict[str, Any], tmp_path: Path) -> None:
    pilot = pilot_of(options)
    is_sequences = "sequence_length" in options
    assert (pilot.num_rows, pilot.num_positions) == ((44, 704) if is_sequences else (100, 98))
    wanted: dict[str, dict[str, Any]] = {
        "dense uint8": {"encoding": "dense", "values": "uint8"},
        "hidden float16": {"encoding": "hidden"},
        "topk 16 float16": {"encoding": "topk", "k": 16},
        "topk 8 uint8": {"encoding": "topk", "k": 8, "values": "uint8"},
        "sample 32": {"encoding": "sample", "draws": 32, "temperatures": (1.0,)},
    }
    for name, encoding in wanted.items():
        path = tmp_path / f"{name}.zarr"
        run(DumpConfig(**{**options, **encoding, "out": str(path)}))
        with open_store(path) as store:
            names = {"sequence_length", "shard_rows", "chunk_rows", "temperatures"}
            config = config_for(
                store.manifest, out=str(path), **{key: value for key, value in options.items() if key not in names}
            )
            num_rows = store.manifest.num_rows
        found, truncation = candidate(pilot, name), audit(path, config, AuditOptions(1000)).truncation
        assert [part.temperature for part in found.at] == [part.temperature for part in truncation]
        for part, expected in zip(found.at, truncation, strict=True):
            assert part.gradient_error == pytest.approx(expected.gradient_error, rel=1e-3)
            assert part.kl == (expected.kl_mean and pytest.approx(expected.kl_mean, rel=1e-2, abs=1e-7))
            assert part.kept == (expected.kept_mean and pytest.approx(expected.kept_mean, rel=1e-6))
        assert found.row_bytes * num_rows == pytest.approx(bytes_on_disk(path), rel=0.05)
        if is_sequences:
            assert found.position_bytes == pytest.approx(found.row_bytes / 16)
        else:
            assert found.position_bytes is None


def test_the_candidates_fit_the_classes_and_the_one_that_was_asked_for_is_marked(options: dict[str, Any]) -> None:
    pilot = pilot_of(options, 4, encoding="topk", k=50, values="float32")
    names = [found.name for found in pilot.candidates]
    expected = ["dense float16", "dense uint8", "hidden float16"]
    for k in (8, 16, 32, 50, 64, 128, 256):
        expected += ["topk 50 float32"] if k == 50 else [f"topk {k} float16", f"topk {k} uint8"]
    assert names == [*expected, "sample 16", "sample 32", "sample 64", "sample 128"]
    assert [found.name for found in pilot.candidates if found.is_chosen] == ["topk 50 float32"]
    (line,) = [line for line in pilot.table().splitlines() if line.startswith("> topk")]
    assert line.split()[1:4] == ["topk", "50", "float32"]
    for choice in ({"encoding": "hidden"}, {"encoding": "sample", "draws": 64, "temperatures": (2.0,)}):
        found = pilot_of(options, 4, **choice)
        (chosen,) = [found for found in found.candidates if found.is_chosen]
        assert chosen.name in ("hidden float16", "sample 64")
        assert len(found.candidates) == 19


def test_draws_are_tried_at_one_of_the_wanted_temperatures(options: dict[str, Any]) -> None:
    for temperatures, expected in (((1.0, 2.0), 1.0), ((2.0, 3.0), 2.0)):
        pilot = pilot_of(options, 4, temperatures=temperatures)
        assert [part.temperature for part in candidate(pilot, "sample 16").at] == [expected]
        assert [part.temperature for part in candidate(pilot, "topk 16 uint8").at] == list(temperatures)


def test_more_entries_lose_less_and_more_draws_are_less_noisy(options: dict[str, Any]) -> None:
    pilot = pilot_of(options, 30)
    for names in (
        [f"topk {k} float16" for k in (8, 16, 32, 64, 128, 256)],
        [f"sample {draws}" for draws in (16, 32, 64, 128)],
    ):
        found = [candidate(pilot, name) for name in names]
        errors = [one.at[0].gradient_error for one in found]
        assert errors == sorted(errors, reverse=True)
        assert [one.row_bytes for one in found] == sorted(one.row_bytes for one in found)
        assert [one.num_bytes for one in found] == [
            round(one.row_bytes * (44 if "sequence_length" in options else 100)) for one in found
        ]
    kl = [candidate(pilot, f"topk {k} float16").at[0].kl for k in (8, 16, 32, 64, 128, 256)]
    assert kl == sorted(kl, key=lambda value: -(value or 0))


def test_a_teacher_without_a_head_has_no_hidden_states_to_try(
    saving: dict[str, Callable[..., Path]], corpus: Path, tmp_path: Path
) -> None:
    import torch
    from torch import nn

    program = saving["program"](tmp_path / "program.pt2", nn.Linear(12, 5).eval(), torch.zeros(4, 12))
    config = DumpConfig(models=(str(program),), data=str(corpus), out=str(tmp_path / "out.zarr"), device="cpu")
    plan = preview(config, pilot=PilotOptions(10))
    assert plan.pilot is not None
    names = [found.name for found in plan.pilot.candidates]
    assert names == ["dense float16", "dense uint8", "sample 16", "sample 32", "sample 64", "sample 128"]


def test_a_store_has_paid_for_itself_when_it_took_less_time_than_the_teacher() -> None:
    assert runs_to_pay(2.0, 0.5, 1) == pytest.approx(2.0 / 1.5)
    assert runs_to_pay(2.0, 0.5, 10) == pytest.approx(2.0 / 15)
    assert runs_to_pay(1.0, 1.0, 3) is None
    n, teacher_s, read_s, epochs = 1.25, 1.0, 0.2, 1
    assert n * epochs * teacher_s == pytest.approx(teacher_s + n * epochs * read_s)


def test_the_table_says_when_a_store_never_pays(options: dict[str, Any]) -> None:
    pilot = pilot_of(options, 4)
    never = replace(pilot, candidates=(replace(pilot.candidates[0], runs_to_pay=None),), student_epochs=2.5)
    assert never.table().splitlines()[3].endswith(" never")
    assert "student runs of 2.5 epochs," in never.table()
    assert " 2 runs" in replace(pilot, candidates=(replace(pilot.candidates[0], runs_to_pay=1.2),)).table()


def test_a_pilot_without_one_finite_logit_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    if "sequence_length" in options:
        pytest.skip("tokens are finite")
    np.save(tmp_path / "corpus.npy", np.full((100, 12), np.inf, np.float32))
    with pytest.raises(TeacherError, match="expected finite logits for some of 5 rows of a pilot, got none; check the"):
        pilot_of(options, 5, data=str(tmp_path / "corpus.npy"), labels=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": -1}, "pilot_rows: expected at least 1, or 0 for no pilot, got -1"),
        ({"student_epochs": 0.0}, r"student_epochs: expected a number above 0, got 0\.0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PilotOptions(**options)


def test_the_command_prints_the_plan_first_and_writes_nothing(weights: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["plan", "--model", str(weights), "--arch", "mlp:12-16-5", "--data", str(corpus), "--device", "cpu"]
    words += ["--out", str(tmp_path / "out.zarr"), "--pilot-rows", "20"]
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"store       {tmp_path / 'out.zarr'}"
    assert lines[8].startswith("pilot       20 rows, 20 distributions; the teacher takes about ")
    assert "T=4: kept" in lines[10]
    value = json.loads(CliRunner().invoke(main, [*words, "--json", "--student-epochs", "3"]).stdout)
    assert (value["num_rows"], value["pilot"]["num_rows"], value["pilot"]["student_epochs"]) == (200, 20, 3)
    assert {"name", "row_bytes", "num_bytes", "is_chosen", "runs_to_pay", "at"} < set(value["pilot"]["candidates"][0])
    none = json.loads(CliRunner().invoke(main, [*words, "--json", "--pilot-rows", "0"]).stdout)
    assert none["pilot"] is None
    assert {name for name in none if name != "pilot"} == set(Preview.__dataclass_fields__) - {"pilot"}
    assert CliRunner().invoke(main, [*words, "--student-epochs", "-1"]).exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_store_is_planned_with_its_pilot_too(options: dict[str, Any], tmp_path: Path) -> None:
    out = str(tmp_path / "out.zarr")
    config = DumpConfig(**{**options, "out": out, "encoding": "topk", "k": 8})
    run(config)
    plan = preview(config, pilot=PilotOptions(4))
    assert plan.finalized
    assert plan.pilot is not None
    assert [found.name for found in plan.pilot.candidates if found.is_chosen] == ["topk 8 float16"]
    assert plan.pilot.hours > 0
