"""`studenttrain calibrate`: a student that is used like any other afterwards, and what is refused on the way."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from storage.corpus import default_preprocess, open_corpus
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.errors import (
    CorpusError,
    CorpusMismatchError,
    MismatchError,
    OutOfSpaceError,
    PathError,
    StudentError,
)
from storage.reader import open_store
from storage.scan import class_mass
from studenttrain import calibration_logits
from studenttrain.calibration import calibrate
from studenttrain.calibration_config import CalibrationConfig
from studenttrain.calibration_fit import fit_temperature
from studenttrain.calibration_fold import check_folded, check_not_tied, fold, last_layer
from studenttrain.checks import store_identity
from studenttrain.cli import main
from studenttrain.export import StudentCard, build_carded, load_card, load_student, save_weights
from studenttrain.heads import Head
from studenttrain.models import build_model
from studenttrain.targets import build_targets
from studenttrain.train import fit
from tests.builders import image_bytes, random_pixels, write_image_folder
from tests.series import write_series
from tests.studenttrain.runs import NUM_CLASSES, NUM_FEATURES, Ground, make_ground, write_blobs, write_targets
from tests.studenttrain.sequences import LENGTH, VOCABULARY, hidden_encoding, make_token_ground, open_tokens
from tests.studenttrain.soft_targets import random_logits, stored

pytestmark = pytest.mark.usefixtures("no_report")

SPEC = f"mlp:{NUM_FEATURES}-16-{NUM_CLASSES}"


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ground, Path]:
    """A ground and a student of it for tests in which nothing is written."""
    ground = make_ground(tmp_path_factory.mktemp("refusing"))
    return ground, write_student(ground.folder / "run", ground)


@pytest.fixture
def with_program() -> None:
    """Asked for by a test that looks at the exported program."""


@pytest.fixture(autouse=True)
def spare_the_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that tracing takes, where the program is not what is tested."""
    if "with_program" not in request.fixturenames:
        monkeypatch.setattr(torch.export, "export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not traced")))


def write_student(folder: Path, ground: Any, student: str = SPEC, model: nn.Module | None = None, **card: Any) -> Path:
    """A student with random weights that are not small, as a run exports it."""
    with open_store(ground.targets) as store:
        manifest, identity = store.manifest, store_identity(store)
    made = StudentCard(
        student=student,
        input_shape=tuple(manifest.preprocess["shape"]),
        num_classes=manifest.num_classes,
        class_names=manifest.class_names,
        preprocess=dict(manifest.preprocess),
        store=identity,
        sequences=None if manifest.sequences is None else manifest.sequences.to_json(),
    )
    made = dataclasses.replace(made, **card)
    folder.mkdir()
    torch.manual_seed(1)
    model = build_carded(made) if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_weights(folder / "student.safetensors", model)
    (folder / "student.json").write_text(json.dumps(made.to_json()))
    return folder


def config_of(ground: Any, checkpoint: Path, out: str = "calibrated", **options: Any) -> CalibrationConfig:
    given = {"checkpoint": str(checkpoint), "data": str(ground.data), "out": str(ground.folder / out), "readers": 1}
    return CalibrationConfig(**{**given, "device": "cpu", **options})


def logits_on(path: Path, inputs: Tensor) -> Tensor:
    model, _ = load_student(path)
    with torch.no_grad():
        logits: Tensor = model(inputs)
        return logits


def inputs_of(ground: Ground) -> Tensor:
    with np.load(ground.data) as archive:
        return torch.from_numpy(archive["x"])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("batch_size", [7, 512])
@pytest.mark.usefixtures("with_program")
def test_the_mean_mass_of_the_student_meets_that_of_the_store(ground: Ground, batch_size: int) -> None:
    student = write_student(ground.folder / "run", ground)
    before = digests(student)
    result = calibrate(config_of(ground, student, prior=str(ground.targets), batch_size=batch_size), quiet=True)
    inputs = inputs_of(ground)
    mass_C = logits_on(Path(result.out), inputs).double().softmax(1).mean(0).numpy()
    np.testing.assert_allclose(mass_C, class_mass(ground.targets).mean, rtol=2e-4)
    assert digests(student) == before
    assert result.files == ("student.safetensors", "student.json", "student.pt2")
    record = result.record
    assert record["method"] == "match"
    assert record["prior"]["content_digest"] == store_identity(open_store(ground.targets))["content_digest"]
    assert record["data"]["num_samples"] == 96
    np.testing.assert_allclose(record["mass"]["after"], mass_C, atol=1e-6)
    before_C = logits_on(student, inputs).double().softmax(1).mean(0).numpy()
    np.testing.assert_allclose(record["mass"]["before"], before_C, atol=1e-6)
    assert load_card(Path(result.out) / "student.json").calibration == json.loads(json.dumps(record))


@pytest.mark.usefixtures("with_program")
def test_the_folded_logits_are_those_over_the_temperature_plus_the_biases(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    asked: dict[str, Any] = {"prior": "uniform", "slack": 0, "temperature": "targets", "targets": str(ground.targets)}
    result = calibrate(config_of(ground, student, **asked), quiet=True)
    inputs = inputs_of(ground)
    bias_C, temperature = torch.tensor(result.record["bias"]), result.record["temperature"]
    expected_NC = logits_on(student, inputs).double() / temperature + bias_C
    found_NC = logits_on(Path(result.out), inputs)
    torch.testing.assert_close(found_NC.double(), expected_NC, rtol=1e-6, atol=1e-5)
    program = torch.export.load(Path(result.out) / "student.pt2").module()
    torch.testing.assert_close(program(inputs), found_NC)
    mass_C = found_NC.double().softmax(1).mean(0)
    torch.testing.assert_close(mass_C, torch.full((4,), 0.25, dtype=torch.float64), rtol=2e-4, atol=0)


def test_a_temperature_by_itself_changes_no_top1(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    result = calibrate(config_of(ground, student, temperature="labels"), quiet=True)
    inputs = inputs_of(ground)
    assert result.record["bias"] is None
    assert result.record["temperature"] != 1
    before_NC, after_NC = logits_on(student, inputs), logits_on(Path(result.out), inputs)
    assert torch.equal(before_NC.argmax(1), after_NC.argmax(1))
    hard_N = torch.from_numpy(np.load(ground.data)["y"])
    nlls = [float(nn.functional.cross_entropy(logits_NC, hard_N)) for logits_NC in (before_NC, after_NC)]
    assert nlls[1] < nlls[0]
    loss = result.record["loss"]
    assert [loss["before"], loss["after"]] == pytest.approx(nlls, rel=1e-4)


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("float16"), TopK(2, "float32"), TopK(4, "float32")])
def test_a_student_twice_as_sure_as_the_stored_teacher_gets_a_temperature_of_2(
    ground: Ground, encoding: Encoding
) -> None:
    student = write_student(ground.folder / "run", ground)
    said_NC = logits_on(student, inputs_of(ground)).numpy() / 2
    options: dict[str, Any] = {"encoding": encoding, "temperatures": (1.0,), "refused": (3,), "shards": (0, 1, 2, 4, 5)}
    targets = write_targets(ground.folder / "said.zarr", open_corpus(ground.data), logits=said_NC, **options)
    result = calibrate(config_of(ground, student, temperature="targets", targets=str(targets)), quiet=True)
    assert result.record["temperature"] == pytest.approx(2, rel=5e-3)
    assert result.record["loss"]["after"] < result.record["loss"]["before"]
    assert result.record["targets"]["content_digest"] is not None


def test_draws_of_a_teacher_lead_to_its_temperature() -> None:
    logits_NC = random_logits(2000, 6)
    manifest, arrays = stored(Sample(255, 1), logits_NC)
    block = {"logits": torch.from_numpy(2 * logits_NC).float()}
    block |= calibration_logits._expected_of_soft(block["logits"], build_targets(manifest, arrays, 1.0))
    assert fit_temperature(lambda: [block]).temperature == pytest.approx(2, rel=2e-2)


def test_slack_is_left_out_where_the_prior_is_of_the_very_samples(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    own = calibrate(config_of(ground, student, "own", prior=str(ground.targets)), quiet=True)
    assert own.record["fit"]["slack"] == 0
    assert own.record["fit"]["error"] < 1e-4
    other = str(write_blobs(ground.folder / "other.npz", 96, seed=5))
    options: dict[str, Any] = {"prior": str(ground.targets), "data": other}
    loose = calibrate(config_of(ground, student, "loose", **options), quiet=True)
    assert loose.record["fit"]["slack"] == 1
    assert "with a slack of 1 standard deviations" in str(loose)
    tight = calibrate(config_of(ground, student, "tight", **options, slack=0.0), quiet=True)
    assert tight.record["fit"]["error"] < 1e-4 < loose.record["fit"]["error"]
    assert np.ptp(loose.record["bias"]) < np.ptp(tight.record["bias"])


def test_no_label_is_read_where_none_is_asked_for(ground: Ground) -> None:
    """Hard targets that would be refused are not even looked at."""
    student = write_student(ground.folder / "run", ground)
    with np.load(ground.data) as archive:
        np.savez(ground.folder / "odd.npz", x=archive["x"], y=np.full(96, 1000))
    options: dict[str, Any] = {"prior": "uniform", "data": str(ground.folder / "odd.npz")}
    odd = calibrate(config_of(ground, student, "odd", **options), quiet=True)
    plain = calibrate(config_of(ground, student, prior="uniform"), quiet=True)
    assert odd.record["bias"] == plain.record["bias"]
    assert odd.record["data"]["labels"] is None
    with pytest.raises(MismatchError, match="expected hard targets below the 4 classes, got 1000 in row 0"):
        calibrate(config_of(ground, student, "labelled", **options, temperature="labels"), quiet=True)


def test_unlabelled_folders_are_no_classes(tmp_path: Path) -> None:
    """Images as they come, in folders that mean nothing, one of them damaged."""
    folder = write_image_folder(tmp_path / "known", per_class=4, size=(6, 6))
    targets = write_targets(tmp_path / "targets.zarr", open_corpus(folder), num_classes=3)
    unknown = write_image_folder(tmp_path / "unknown", per_class=5, size=(6, 6))
    (unknown / "ant").rename(unknown / "monday")
    good = image_bytes(random_pixels(6, 6, 3))
    (unknown / "bee" / "001.png").write_bytes(good[: len(good) // 2])
    ground = Ground(tmp_path, unknown, targets)
    student = write_student(tmp_path / "run", ground, student="mlp:108-3")
    result = calibrate(config_of(ground, student, prior=str(targets)), quiet=True)
    assert (result.record["data"]["num_samples"], result.record["data"]["num_refused"]) == (15, 1)
    assert "14 samples, 1 refused" in str(result)
    with pytest.raises(MismatchError, match="class 0 to be 'ant' as in student"):
        calibrate(config_of(ground, student, "b", temperature="labels"), quiet=True)


@pytest.mark.usefixtures("with_program")
def test_the_same_command_again_gives_the_same_files_and_another_is_refused(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    first = calibrate(config_of(ground, student, prior="uniform"), quiet=True)
    before = digests(Path(first.out))
    (Path(first.out) / "student.pt2").unlink()  # as a kill may leave it
    (Path(first.out) / ".student.pt2.partial").touch()
    again = calibrate(config_of(ground, student, prior="uniform", batch_size=9), quiet=True)
    assert (first.was_there, again.was_there) == (False, True)
    assert str(again).startswith("had been calibrated so already: 96 samples")
    after = digests(Path(first.out))
    assert before.keys() == after.keys()
    assert {name: before[name] for name in before if name != "student.pt2"} == {
        name: after[name] for name in after if name != "student.pt2"
    }
    for options, name in (
        ({"prior": str(ground.targets)}, "prior"),
        ({"prior": "uniform", "method": "shift"}, "method"),
        ({"prior": "uniform", "temperature": "labels"}, "temperature_from"),
        ({"prior": "uniform", "data": str(write_blobs(ground.folder / "other.npz", 50, seed=4))}, "data"),
    ):
        message = rf"expected the calibration that it holds, got another \({name} differs\); give --out another folder"
        with pytest.raises(StudentError, match=message):
            calibrate(config_of(ground, student, **options), quiet=True)
    assert digests(Path(first.out)) == after


def test_samples_that_changed_under_the_same_names_are_another_calibration(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    calibrate(config_of(ground, student, prior="uniform"), quiet=True)
    with np.load(ground.data) as archive:
        np.savez(ground.data, x=archive["x"] + 1, y=archive["y"])
    with pytest.raises(StudentError, match=r"got another \(data differs\)"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)


def test_a_calibrated_student_may_be_calibrated_again_elsewhere(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    first = calibrate(config_of(ground, student, prior="uniform"), quiet=True)
    second = calibrate(config_of(ground, Path(first.out), "again", prior=str(ground.targets)), quiet=True)
    assert second.record["earlier"]["prior"] == {"from": "uniform"}
    direct = calibrate(config_of(ground, student, "direct", prior=str(ground.targets)), quiet=True)
    inputs = inputs_of(ground)
    once, twice = (logits_on(Path(it.out), inputs).softmax(1) for it in (direct, second))
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-3)
    with pytest.raises(StudentError, match=r"got another \(student differs\)"):
        calibrate(config_of(ground, Path(first.out), prior="uniform"), quiet=True)


def test_shift_looks_at_the_rows_that_the_student_learned_from(ground: Ground) -> None:
    config = ground.config(steps=20, student=SPEC, without_classes="3", lr=0.01)
    fit(config, quiet=True)
    shift: dict[str, Any] = {"prior": str(ground.targets), "method": "shift"}
    with pytest.raises(
        ValueError, match=r"targets: expected the store that .* learned some rows of, .* give it: --targ"
    ):
        calibrate(config_of(ground, Path(config.out), **shift), quiet=True)
    result = calibrate(config_of(ground, Path(config.out), **shift, targets=str(ground.targets)), quiet=True)
    with np.load(ground.data) as archive:
        kept_N = archive["y"] != 3
    assert result.record["data"]["num_samples"] == kept_N.sum()
    assert result.record["data"]["rows"] == {"without_classes": [3], "by": "hard targets"}
    mass_C = logits_on(Path(config.out), inputs_of(ground)[kept_N]).double().softmax(1).mean(0).numpy()
    bias_C = np.log(class_mass(ground.targets).mean) - np.log(mass_C)
    np.testing.assert_allclose(result.record["bias"], bias_C - np.median(bias_C), atol=1e-4)
    other = write_targets(ground.folder / "other.zarr", open_corpus(ground.data), teacher="1")
    with pytest.raises(MismatchError, match="expected the store that the run began with"):
        calibrate(config_of(ground, Path(config.out), "b", **shift, targets=str(other)), quiet=True)


def test_shift_of_rows_that_only_the_corpus_knows_the_classes_of_reads_its_labels(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, with_hard_targets=False)
    student = write_student(tmp_path / "run", ground, rows={"only_classes": [0, 2], "by": "hard targets"})
    options: dict[str, Any] = {"prior": "uniform", "method": "shift", "targets": str(ground.targets)}
    result = calibrate(config_of(ground, student, **options), quiet=True)
    with np.load(ground.data) as archive:
        assert result.record["data"]["num_samples"] == np.isin(archive["y"], [0, 2]).sum()
    with pytest.raises(
        CorpusError, match="expected hard targets to read, got none; give --labels, or calibrate without"
    ):
        calibrate(config_of(ground, student, "b", **options, labels="none"), quiet=True)


def test_a_store_of_other_samples_is_refused(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    other = write_blobs(ground.folder / "other.npz", 96, seed=5)
    options: dict[str, Any] = {"temperature": "targets", "targets": str(ground.targets), "data": str(other)}
    with pytest.raises(CorpusMismatchError, match=r"row 0 \('0'\)"):
        calibrate(config_of(ground, student, **options), quiet=True)
    few = write_blobs(ground.folder / "few.npz", 40)
    with pytest.raises(CorpusMismatchError, match="expected 96 samples as in"):
        calibrate(config_of(ground, student, **options | {"data": str(few)}), quiet=True)


def test_several_processes_are_refused(refusing: tuple[Ground, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ground, student = refusing
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="calibrate: expected one process, got several of torchrun's; run it without"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)


def test_a_disk_that_is_full_is_told_and_leaves_no_student(
    refusing: tuple[Ground, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground, student = refusing
    monkeypatch.setattr(calibration_logits.Spool.__init__, "__defaults__", (0,))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Path("/dev/full").open("wb", 0))  # noqa: SIM115
    config = dataclasses.replace(config_of(ground, student, prior="uniform"), out=str(tmp_path / "out"))
    with pytest.raises(
        OutOfSpaceError, match="expected room on the disk, got none; free space and run the same command"
    ):
        calibrate(config, quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_series_is_a_prior_as_one_store(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series", [40, 24])
    names = ("series/000000.zarr", "series/000001.zarr")
    masses = [np.array(class_mass(tmp_path / name).mean) for name in names]
    mean_C = (40 * masses[0] + 24 * masses[1]) / 64
    np.testing.assert_allclose(class_mass(series).mean, mean_C, atol=1e-9)
    ground = Ground(tmp_path, tmp_path / "corpus-0.npz", tmp_path / names[0])
    student = write_student(tmp_path / "run", ground)
    result = calibrate(config_of(ground, student, prior=str(series)), quiet=True)
    np.testing.assert_allclose(result.record["mass"]["prior"], mean_C, atol=1e-6)
    assert result.record["fit"]["slack"] == 1
    assert result.record["prior"]["num_members"] == 2


@pytest.mark.parametrize("limit", [0, 500])
def test_logits_on_the_disk_lead_to_the_same_calibration(
    ground: Ground, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = write_student(ground.folder / "run", ground)
    options: dict[str, Any] = {"prior": "uniform", "temperature": "labels", "batch_size": 10}
    plain = calibrate(config_of(ground, student, **options), quiet=True)
    monkeypatch.setattr(calibration_logits.Spool.__init__, "__defaults__", (limit,))
    assert calibrate(config_of(ground, student, "b", **options), quiet=True).record == plain.record
    assert {path.name for path in (ground.folder / "b").iterdir()} == set(plain.files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prior, temperature: expected one of them, or both, got neither"),
        (
            {"method": "match", "temperature": "labels"},
            "method: expected a prior beside it, got none, so that match has",
        ),
        ({"prior": "uniform", "method": "guess"}, "method: expected match or shift, got 'guess'"),
        ({"temperature": "best"}, "temperature: expected none, labels, targets, got 'best'"),
        (
            {"temperature": "targets"},
            "targets: expected the store whose targets the temperature is fitted to, got none",
        ),
        ({"prior": "uniform", "targets": "a"}, "targets: expected --temperature targets or --method shift beside it"),
        ({"prior": "uniform", "slack": -1}, "slack: expected a number of at least 0, got -1"),
        ({"prior": "uniform", "slack": float("nan")}, "slack: expected a number of at least 0, got nan"),
        ({"prior": "uniform", "method": "shift", "slack": 1}, "slack: expected a prior and the method match beside it"),
        ({"temperature": "labels", "slack": 1}, "slack: expected a prior and the method match beside it"),
        ({"prior": "uniform", "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"prior": "uniform", "readers": 0}, "readers: expected at least 1, got 0"),
        ({"prior": ""}, "prior: expected some text, got none"),
        ({"prior": "uniform", "out": "s3://a/b"}, "out: expected a path on this machine, got a URL, s3:"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**{"checkpoint": "a", "data": "b", "out": "c", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": "y.npy"},
            "labels: expected --temperature labels beside it, got none: no label is read; leave it out",
        ),
        ({"label_column": "y"}, "label_column: expected --temperature labels beside it"),
        (
            {"method": "shift", "targets": "TARGETS"},
            "targets: expected --temperature targets beside it, or a student that",
        ),
        ({"tokenizer": "bytes"}, "tokenizer: expected a language model beside it, got another student; leave it out"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    refusing: tuple[Ground, Path], options: dict[str, Any], message: str
) -> None:
    ground, student = refusing
    given = {name: str(ground.targets) if value == "TARGETS" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        calibrate(config_of(ground, student, prior="uniform", **given), quiet=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0.25, 0.25, 0.5]", "expected a list of 4 probabilities, or an object of them by class, got 3"),
        ("[0.25, 0.25, 0.25, 0.3]", "expected probabilities that sum to 1, got a sum of 1.05; divide them by it"),
        ("[0.5, 0.25, 0.25, 0]", "expected a probability above 0 for each class, got 0 for class 3: no finite bias"),
        ("[1.5, 0.25, 0.25, -1]", "expected a probability above 0 for each class, got -1 for class 3"),
        ('[0.5, 0.25, 0.25, "0"]', "expected numbers, got others; give a probability for each class"),
        ("[0.5, 0.25, 0.25, true]", "expected numbers, got others"),
        ("[NaN, 0.25, 0.25, 0.25]", "expected probabilities that sum to 1, got a sum of nan"),
        ("7", "expected a list of 4 probabilities, or an object of them by class, got int"),
        ("[", "expected a JSON file, got one that can't be read"),
        (
            '{"0": 0.5, "1": 0.2, "2": 0.3}',
            "expected a probability for each of the 4 classes by name, got none for '3'",
        ),
        ('{"0": 0.5, "1": 0.2, "2": 0.2, "3": 0.1, "4": 0}', "by name, got '4' too; name them as the student does"),
        (None, "expected a JSON file, got nothing there; check the path"),
    ],
)
def test_a_prior_file_that_is_none_is_refused(
    refusing: tuple[Ground, Path], tmp_path: Path, text: str | None, message: str
) -> None:
    ground, student = refusing
    if text is not None:
        (tmp_path / "prior.json").write_text(text)
    with pytest.raises(StudentError, match=message):
        calibrate(config_of(ground, student, prior=str(tmp_path / "prior.json")), quiet=True)


def test_a_prior_by_name_is_that_of_the_list(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground, class_names=("a", "b", "c", "d"))
    (ground.folder / "list.json").write_text("[0.1, 0.2, 0.3, 0.4]")
    (ground.folder / "names.json").write_text('{"d": 0.4, "c": 0.3, "b": 0.2, "a": 0.1}')
    one, two = (
        calibrate(config_of(ground, student, name, prior=str(ground.folder / f"{name}.json")), quiet=True)
        for name in ("list", "names")
    )
    assert one.record == two.record
    assert one.record["mass"]["prior"] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_prior_of_other_classes_or_of_too_few_known_ones_is_refused(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground, class_names=("a", "b", "c", "d"))
    corpus = open_corpus(ground.data)
    flat_NC = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
    names = ("a", "b", "d", "c")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"class_names": names}, MismatchError, r"class 2 to be 'c' as in student .*, got 'd' \(in another order\)"),
        ({"num_classes": 5}, MismatchError, "expected 4 classes as in student"),
        ({"encoding": TopK(1), "temperatures": (4.0,)}, MismatchError, "exact at T = 1, for the mass of each class"),
        (
            {"encoding": TopK(2)},
            StudentError,
            "tells the class of 90 % of its mass or more, got .*; use a store with a",
        ),
        ({"encoding": TopK(1)}, StudentError, "expected a store that tells the class"),
    ]
    for number, (options, error, message) in enumerate(cases):
        logits: Any = None if "num_classes" in options else flat_NC
        prior = write_targets(ground.folder / f"{number}.zarr", corpus, logits=logits, **options)
        with pytest.raises(error, match=message):
            calibrate(config_of(ground, student, str(number), prior=str(prior)), quiet=True)


def test_a_topk_prior_with_small_tails_says_how_they_are_taken(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    prior = write_targets(ground.folder / "topk.zarr", open_corpus(ground.data), encoding=TopK(3))
    result = calibrate(config_of(ground, student, prior=str(prior)), quiet=True)
    assert "% of the prior's mass is in tails, taken to be spread as the rest is" in str(result)
    assert sum(result.record["mass"]["prior"]) == pytest.approx(1)


class Sequenced(nn.Sequential):
    """Says nothing of its head; the last linear layer is found."""


class Backwards(nn.Module):
    """A model whose last linear layer with so many outputs does not make its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.other = nn.Linear(NUM_FEATURES, NUM_CLASSES), nn.Linear(NUM_CLASSES, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, 4)."""
        return self.logits(inputs) + self.other(inputs[:, :4]).tanh()  # type: ignore[no-any-return]


def sequenced() -> nn.Module:
    return Sequenced(nn.Linear(NUM_FEATURES, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


def backwards() -> nn.Module:
    return Backwards()


def test_a_model_that_does_not_tell_its_head_is_calibrated_all_the_same(ground: Ground) -> None:
    spec = "tests.studenttrain.test_calibrate:sequenced"
    student = write_student(ground.folder / "run", ground, student=spec)
    result = calibrate(config_of(ground, student, prior="uniform", slack=0), quiet=True)
    mass_C = logits_on(Path(result.out), inputs_of(ground)).double().softmax(1).mean(0)
    torch.testing.assert_close(mass_C, torch.full((4,), 0.25, dtype=torch.float64), rtol=2e-4, atol=0)


def test_a_model_whose_last_layer_is_another_is_refused_and_writes_nothing(ground: Ground) -> None:
    spec = "tests.studenttrain.test_calibrate:backwards"
    student = write_student(ground.folder / "run", ground, student=spec)
    with pytest.raises(StudentError, match=r"to make its logits, got some that are off by .* give it output_head\(\)"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)
    assert list((ground.folder / "calibrated").iterdir()) == []


def test_a_last_layer_that_nothing_can_be_folded_into_is_refused() -> None:
    with pytest.raises(
        StudentError, match="here: expected a linear layer with an output for each of 4 classes, got none"
    ):
        last_layer(nn.Sequential(nn.ReLU(), nn.Linear(4, 5)), 4, "here", needs_bias=True)
    with pytest.raises(StudentError, match=r"here: expected a last layer with a bias, .* leave --prior out, or give"):
        last_layer(nn.Linear(3, 4, bias=False), 4, "here", needs_bias=True)
    assert last_layer(nn.Linear(3, 4, bias=False), 4, "here", needs_bias=False).bias_C is None

    class Capped(nn.Linear):
        def hidden(self, inputs: Tensor) -> Tensor:
            return inputs

        def output_head(self) -> Head:
            return Head(self.weight, self.bias, soft_cap=30.0)

    with pytest.raises(
        StudentError, match="here: expected logits that are linear in the last layer, got a soft cap of 30"
    ):
        last_layer(Capped(3, 4), 4, "here", needs_bias=False)
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    tied[0].weight = tied[1].weight
    with pytest.raises(
        StudentError, match=r"weights of its own to fold a temperature into, got weights that are '0.weight'"
    ):
        check_not_tied(tied, last_layer(tied, 4, "here", needs_bias=False), "here")


def test_a_scaled_head_gets_biases_that_its_scale_undoes() -> None:
    head, hidden_NW = Head(torch.randn(5, 3), torch.randn(5), scale=0.25), torch.randn(6, 3)
    before_NC = head.logits(hidden_NW)
    bias_C = np.array([1.0, -2.0, 0.5])
    fold(head, 1.7, bias_C)
    padded_C = np.append(bias_C, [0.0, 0.0])
    assert check_folded(before_NC, head.logits(hidden_NW), 1.7, padded_C, "here") < 1e-6


def test_logits_that_are_not_finite_are_refused(ground: Ground) -> None:
    model = build_model(SPEC)
    with torch.no_grad():
        last_layer(model, 4, "here", needs_bias=True).weight_CW[0] = torch.inf
    student = write_student(ground.folder / "run", ground, model=model)
    with pytest.raises(StudentError, match="student: expected finite logits, got others on the corpus"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)


def test_a_student_without_any_mass_for_a_class_cannot_be_shifted(ground: Ground) -> None:
    model = build_model(SPEC)
    with torch.no_grad():
        last_layer(model, 4, "here", needs_bias=True).bias_C[2] = -1e4  # type: ignore[index]
    student = write_student(ground.folder / "run", ground, model=model)
    with pytest.raises(StudentError, match="expected some mass for each class over --data, got none for class 2"):
        calibrate(config_of(ground, student, prior="uniform", method="shift"), quiet=True)


def test_a_specialist_is_refused(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground, specialist={"num_classes": 4, "classes": [0, 1, 2]})
    with pytest.raises(StudentError, match="expected a student of all classes, got a specialist, whose dustbin has no"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)


def test_corpora_that_the_student_cannot_take_are_refused(refusing: tuple[Ground, Path], tmp_path: Path) -> None:
    ground, student = refusing
    np.savez(tmp_path / "narrow.npz", x=np.zeros((20, 7), np.float32))
    with pytest.raises(CorpusError, match="give --data a corpus with the student's input, 8"):
        calibrate(config_of(ground, student, prior="uniform", data=str(tmp_path / "narrow.npz")), quiet=True)
    write_blobs(tmp_path / "unlabelled.npz", 20, labels=False)
    options: dict[str, Any] = {"temperature": "labels", "data": str(tmp_path / "unlabelled.npz")}
    with pytest.raises(
        CorpusError, match="expected hard targets to read, got none; give --labels, or calibrate without"
    ):
        calibrate(config_of(ground, student, **options), quiet=True)


def test_a_corpus_of_damaged_images_alone_is_refused(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "images", per_class=2, size=(6, 6))
    ground = Ground(tmp_path, folder, write_targets(tmp_path / "t.zarr", open_corpus(folder), num_classes=3))
    student = write_student(tmp_path / "run", ground, student="mlp:108-3")
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorpusError, match="expected samples to calibrate on, got 6 of which none can be used"):
        calibrate(config_of(ground, student, prior="uniform"), quiet=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run", "expected a calibrated student, or nothing, got another student; give --out another folder"),
        ("corpus.npz", "expected a folder, or nothing, got a file; give --out a new folder"),
        (
            "",
            "expected an empty folder, or that of a calibrated student, got 'corpus.npz' and others; give --out a new",
        ),
    ],
)
def test_a_folder_of_something_else_is_left_alone(refusing: tuple[Ground, Path], name: str, message: str) -> None:
    ground, student = refusing
    before = digests(student)
    with pytest.raises((PathError, StudentError), match=message):
        calibrate(config_of(ground, student, name, prior="uniform"), quiet=True)
    assert digests(student) == before


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_the_command_prints_what_it_did_and_eval_takes_the_result(ground: Ground) -> None:
    student = write_student(ground.folder / "run", ground)
    calibrating = [
        "calibrate",
        "--checkpoint",
        str(student),
        "--data",
        str(ground.data),
        "--prior",
        str(ground.targets),
    ]
    out = str(ground.folder / "calibrated")
    done = call(*calibrating, "--out", out, "--temperature", "targets", "--targets", str(ground.targets))
    assert done.exit_code == 0, done.output
    for part in (
        "96 samples, 0 refused",
        "temperature ",
        "cross entropy to the stored targets",
        "biases by match: ",
        "mean mass, before and with them, and the prior:",
        "met within ",
        f"export: {out}/student.safetensors",
    ):
        assert part in done.stdout
    tried = call("eval", "--checkpoint", out, "--data", str(ground.data), "--json")
    assert tried.exit_code == 0, tried.output
    words = ["fit", "--targets", str(ground.targets), "--data", str(ground.data), "--student", SPEC, "--init", out]
    begun = call(*words, "--steps", "1", "--out", str(ground.folder / "next"), "-q")
    assert begun.exit_code == 0, begun.output
    as_json = call(*calibrating, "--out", str(ground.folder / "json"), "--json", "--method", "shift")
    value = json.loads(as_json.stdout)
    assert as_json.stderr == ""
    assert value["method"] == "shift"
    assert len(value["bias"]) == 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prior", "nowhere"], 1, "error: nowhere: expected a logit store, got no such path"),
        (["--prior", "nowhere.json"], 1, "error: prior 'nowhere.json': expected a JSON file, got nothing there"),
        (["--prior", "uniform", "--device", "tpu"], 2, "error: device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--prior", "uniform", "--checkpoint", "no"], 1, "error: checkpoint 'no': expected a file, got nothing there"),
        ([], 2, "error: prior, temperature: expected one of them, or both, got neither; say what to calibrate"),
    ],
)
def test_the_command_refuses_in_one_line(
    refusing: tuple[Ground, Path], words: list[str], code: int, message: str
) -> None:
    ground, student = refusing
    out = ["--out", str(ground.folder / "calibrated")]
    done = call("calibrate", "--checkpoint", str(student), "--data", str(ground.data), *out, *words)
    assert done.exit_code == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_language_model_gets_a_temperature_and_no_biases(tmp_path: Path) -> None:
    ground = make_token_ground(tmp_path, hidden_encoding())
    config = ground.config(student="gpt:1x16", steps=60, lr=0.02, alpha=0.5)
    fit(config, quiet=True)
    student = Path(config.out)
    boundaries = {"boundaries": str(tmp_path / "starts.npy")}
    with pytest.raises(StudentError, match="expected a last layer with a bias"):
        calibrate(config_of(ground, student, prior="uniform", **boundaries), quiet=True)
    both: list[dict[str, Any]] = [{}, {"temperature": "targets", "targets": str(ground.targets)}]
    for number, options in enumerate(both):
        given = {"temperature": "labels", **boundaries, **options}
        result = calibrate(config_of(ground, student, str(number), **given), quiet=True)
        loss = result.record["loss"]
        assert loss["after"] < loss["before"]
        assert result.record["data"]["num_distributions"] < 49 * LENGTH  # the others are of the next document
    corpus = open_tokens(ground.data, tmp_path / "starts.npy")
    samples = torch.from_numpy(corpus.read_rows(np.arange(4)).astype(np.int64))
    assert default_preprocess(corpus).shape == (2, LENGTH + 1)
    before, _ = load_student(student)
    after, _ = load_student(Path(result.out))
    with torch.no_grad():
        found, expected = after(samples[:, 0, :-1]), before(samples[:, 0, :-1]) / result.record["temperature"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.shape[2] == VOCABULARY
