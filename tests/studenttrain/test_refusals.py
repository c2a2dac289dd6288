"""What does not fit is refused before the first step, with a message that says what and what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.corpus import open_corpus
from storage.encodings import Dense, TopK
from storage.errors import (
    CorpusError,
    CorpusMismatchError,
    DamageError,
    MismatchError,
    NotSealedError,
    PathError,
    StoreError,
    StudentError,
)
from studenttrain.train import fit
from tests.builders import write_image_folder
from tests.studenttrain.runs import NUM_CLASSES, Ground, make_ground, write_blobs, write_targets

pytestmark = pytest.mark.usefixtures("no_report")


def assert_refused(ground: Ground, kind: type[Exception], message: str, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        fit(ground.config(**options), quiet=True)
    assert not (ground.folder / "run" / "checkpoint.pt").exists()


def rewrite(data: Path, points: Any, classes: Any) -> None:
    np.savez(data, x=points, y=classes)


def contents(data: Path) -> tuple[Any, Any]:
    with np.load(data) as archive:
        return archive["x"].copy(), archive["y"].copy()


def test_a_replaced_sample_is_refused_by_row(ground: Ground) -> None:
    points, classes = contents(ground.data)
    points[41] += 1
    rewrite(ground.data, points, classes)
    assert_refused(
        ground, CorpusMismatchError, r"row 41 \('41'\): expected the sample that it was made from .* replaced"
    )


def test_two_swapped_samples_are_refused_by_the_first_row(ground: Ground) -> None:
    points, classes = contents(ground.data)
    points[[17, 60]] = points[[60, 17]]
    rewrite(ground.data, points, classes)
    assert_refused(ground, CorpusMismatchError, r"row 17 \('17'\): expected the sample that it was made from")


def test_a_removed_sample_is_refused_by_row(ground: Ground) -> None:
    points, classes = contents(ground.data)
    rewrite(ground.data, np.delete(points, 30, 0), np.delete(classes, 30, 0))
    assert_refused(
        ground, CorpusMismatchError, r"row 30 \('30'\): .*; there should be 96 samples as in the store, got 95"
    )


def test_a_sample_too_many_is_refused(ground: Ground) -> None:
    points, classes = contents(ground.data)
    rewrite(ground.data, np.concatenate([points, points[:1]]), np.append(classes, 0))
    assert_refused(ground, CorpusMismatchError, r"goes on with row 96 \('96'\)")


def test_a_changed_hard_target_is_refused_by_row(ground: Ground) -> None:
    points, classes = contents(ground.data)
    classes[55] = (classes[55] + 1) % NUM_CLASSES
    rewrite(ground.data, points, classes)
    assert_refused(ground, CorpusMismatchError, r"row 55 \('55'\): expected the hard target")


@pytest.mark.parametrize("change", ["replace", "remove", "swap"])
def test_image_folders_that_changed_are_refused_by_file(tmp_path: Path, change: str) -> None:
    data = write_image_folder(tmp_path / "images", per_class=8, size=(8, 8))
    targets = write_targets(tmp_path / "targets.zarr", open_corpus(data), num_classes=3)
    ground = Ground(tmp_path, data, targets)
    one, two = data / "ant" / "003.png", data / "bee" / "002.png"
    if change == "replace":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(one)
    elif change == "remove":
        one.unlink()
    else:
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    key = "ant/004.png" if change == "remove" else "ant/003.png"
    assert_refused(ground, CorpusMismatchError, f"row 3 \\('{key}'\\)", student="cnn:3-4-3")


def test_samples_that_change_during_the_run_are_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    points, classes = contents(ground.data)
    points[41] += 1
    rewrite(ground.data, points, classes)
    monkeypatch.setattr("studenttrain.preparation.verify_corpus", lambda *_: None)
    with pytest.raises(CorpusMismatchError, match=r"row 41 \('41'\)"):
        fit(ground.config(), quiet=True)


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
@pytest.mark.parametrize("alpha", [None, 0.0])
def test_a_flipped_bit_in_the_store_is_found_by_the_run(tmp_path: Path, suffix: str, alpha: float | None) -> None:
    ground = make_ground(tmp_path)
    targets = write_targets(tmp_path / f"other{suffix}", open_corpus(ground.data))
    name = "values" if alpha is None else "hard_target"
    values = open_corpus_store_bytes(targets, name)
    files = [targets] if targets.is_file() else sorted((targets / name).rglob("*"))
    for path in files:
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        if (place := data.find(values)) >= 0:
            data[place + 5] ^= 16
            path.chmod(0o644)
            path.write_bytes(data)
            break
    else:
        pytest.fail("the values were not found in the files")
    with pytest.raises(DamageError, match=rf"array '{name}', shard 2|expected its checksum|other.h5"):
        fit(ground.config(targets=str(targets), alpha=alpha, epochs=1), quiet=True)


def open_corpus_store_bytes(targets: Path, name: str) -> bytes:
    """Some stored bytes of the third shard."""
    from storage.reader import open_store

    with open_store(targets) as store:
        return store.read([name], 32, 40)[name].tobytes()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": 3.0, "loss": "mse"}, ValueError, "temperature: expected none with --loss mse"),
        ({"temperature": 3.0, "alpha": 0.0}, ValueError, "alpha: expected no --temperature with --alpha 0"),
        ({"loss": "kl", "alpha": 0.0}, ValueError, "alpha: expected no --loss with --alpha 0"),
        ({"loss": "tail-bucket"}, MismatchError, "loss: expected one that a dense store allows"),
        ({"loss": "nonsense"}, ValueError, "loss: expected one of"),
        ({"student": "mlp:9-4"}, StudentError, "expected 8 inputs .* use mlp:8-4"),
        ({"student": "mlp:8-5"}, StudentError, "expected 4 classes, got 5; use mlp:8-4"),
        ({"student": "nonsense"}, StudentError, "expected a spec such as"),
        ({"precision": "fp16"}, ValueError, "precision: expected fp32 or bf16 on cpu, got fp16"),
        (
            {"device": "cuda:99"},
            ValueError,
            "device: expected one of .* CUDA devices, got 'cuda:99'; give --device cpu",
        ),
        ({"device": "tpu"}, ValueError, "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (
            {"epochs": 1, "warmup_steps": 6},
            ValueError,
            "warmup_steps: expected fewer than the 6 steps of the run, got 6",
        ),
        ({"targets": "/nowhere.zarr"}, PathError, "expected a logit store, got no such path"),
        ({"data": "/nowhere"}, CorpusError, "corpus '/nowhere'"),
        ({"val_data": "/nowhere"}, CorpusError, "corpus '/nowhere'"),
        ({"init": "/nowhere.safetensors"}, StudentError, "expected a .safetensors file, got nothing there"),
        ({"init": "/nowhere"}, StudentError, "expected a file, got nothing there"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    ground: Ground, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    assert_refused(ground, kind, message, **options)


def test_alpha_below_1_without_hard_targets_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, labels=False)
    assert_refused(ground, ValueError, "alpha: expected 1 without hard targets, got 0.5; leave --alpha out", alpha=0.5)


def test_an_undeclared_temperature_of_a_topk_store_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=TopK(2))
    assert_refused(ground, MismatchError, r"expected one that the store declares \(1, 4\), got 3", temperature=3.0)
    assert_refused(ground, MismatchError, "loss: expected one that a topk store allows", loss="mse")


def test_a_store_without_sealed_rows_is_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, shards=(), finalize=False)
    message = "expected at least one sealed shard, got none; wait until teacherdump run has sealed one"
    assert_refused(ground, NotSealedError, message)


def test_class_names_in_another_order_are_refused(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "images", per_class=4)
    names = ("ant", "cat", "bee")
    targets = write_targets(tmp_path / "t.zarr", open_corpus(data), num_classes=3, class_names=names)
    ground = Ground(tmp_path, data, targets)
    message = r"expected class 1 to be 'cat' as in store '.*', got 'bee' \(in another order\)"
    assert_refused(ground, MismatchError, message, student="cnn:3-4-3")


def test_a_class_too_many_is_named_before_its_hard_targets(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "images", per_class=4)
    targets = write_targets(tmp_path / "t.zarr", open_corpus(data), num_classes=3)
    (data / "zoo").mkdir()
    (data / "zoo" / "000.png").write_bytes((data / "ant" / "000.png").read_bytes())
    message = r"expected 3 classes as in store '.*', got 4: 'zoo' is new; use the same classes"
    assert_refused(Ground(tmp_path, data, targets), MismatchError, message, student="cnn:3-4-3")
    (data / "zoo" / "000.png").unlink()
    (data / "zoo").rmdir()
    for path in (data / "bee").iterdir():
        path.unlink()
    (data / "bee").rmdir()
    message = r"expected 3 classes as in store '.*', got 2: 'bee' is missing; use the same classes"
    assert_refused(Ground(tmp_path, data, targets), MismatchError, message, student="cnn:3-4-3")


def test_hard_targets_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, labels=False)
    labels = np.zeros(96, np.int64)
    labels[7] = 4
    np.save(tmp_path / "labels.npy", labels)
    message = r"expected hard targets below the 4 classes, got 4 in row 7"
    assert_refused(ground, MismatchError, message, labels=str(tmp_path / "labels.npy"))


def test_a_corpus_of_another_shape_is_refused(ground: Ground) -> None:
    np.savez(ground.data, x=np.zeros((96, 7), np.float32), y=np.zeros(96, np.int64))
    assert_refused(ground, CorpusError, r"expected samples of shape \(8,\), got \(7,\)")


def test_validation_data_that_do_not_fit_are_refused(ground: Ground) -> None:
    corpus = open_corpus(write_blobs(ground.folder / "val.npz", 40, seed=3))
    unlabelled = write_blobs(ground.folder / "unlabelled.npz", 40, seed=3, labels=False)
    smaller = open_corpus(write_blobs(ground.folder / "smaller.npz", 39, seed=3))
    val = {"val_data": str(ground.folder / "val.npz")}
    assert_refused(ground, CorpusError, "expected hard targets to validate on, got none", val_data=str(unlabelled))
    cases: list[tuple[Path, type[StoreError], str]] = [
        (
            write_targets(ground.folder / "v1.zarr", corpus, teacher="1"),
            MismatchError,
            "expected targets of the teacher that made",
        ),
        (
            write_targets(ground.folder / "v2.zarr", corpus, num_classes=5),
            MismatchError,
            "expected 4 classes as in .*, got 5; use a store of the same classes",
        ),
        (
            write_targets(ground.folder / "v3.zarr", smaller),
            CorpusMismatchError,
            "expected 39 samples as in .*, got 40; give the corpus that the store was made from",
        ),
    ]
    for path, kind, message in cases:
        assert_refused(ground, kind, message, **val, val_targets=str(path))


def test_validation_samples_of_another_shape_or_kind_are_refused(ground: Ground) -> None:
    np.savez(ground.folder / "narrow.npz", x=np.zeros((20, 7), np.float32), y=np.zeros(20, np.int64))
    message = r"expected samples of shape \(8,\), got \(7,\); give --val-data a corpus with the student's input, 8$"
    assert_refused(ground, CorpusError, message, val_data=str(ground.folder / "narrow.npz"))
    images = write_image_folder(ground.folder / "images", per_class=2)
    message = "of the kind array, got image; give --val-data a corpus with the student's input, 8$"
    assert_refused(ground, CorpusError, message, val_data=str(images))


def test_a_validation_store_of_other_samples_is_refused_when_it_is_used(ground: Ground) -> None:
    val = write_blobs(ground.folder / "val.npz", 40, seed=3)
    targets = write_targets(ground.folder / "val.zarr", open_corpus(val))
    points, classes = contents(val)
    points[23] += 1
    rewrite(val, points, classes)
    with pytest.raises(CorpusMismatchError, match=r"row 23 \('23'\)"):
        fit(ground.config(val_data=str(val), val_targets=str(targets)), quiet=True)


def test_a_file_or_a_read_only_place_as_out_is_refused(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    (ground.folder / "file").write_text("")
    with pytest.raises(PathError, match=r"expected a folder, or nothing, got a file; give --out another path"):
        fit(ground.config("file"), quiet=True)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PathError, match=r"expected a folder that can be written, got 'Read-only file system'"):
        fit(ground.config(), quiet=True)


def test_a_folder_of_other_files_as_out_is_refused_and_left_alone(ground: Ground) -> None:
    out = ground.folder / "notes"
    out.mkdir()
    (out / "report.html").write_text("mine")
    message = r"notes: expected an empty folder or a run of studenttrain, got 'report.html'; give --out another path"
    with pytest.raises(PathError, match=message):
        fit(ground.config("notes"), quiet=True)
    (out / "student.json").write_text("mine too")
    with pytest.raises(PathError, match=r"got 'report.html' and others; give --out another path"):
        fit(ground.config("notes"), quiet=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "report.html": "mine",
        "student.json": "mine too",
    }


def test_a_store_or_a_corpus_as_out_is_refused_and_left_alone(ground: Ground) -> None:
    images = write_image_folder(ground.folder / "images", per_class=2)
    for path in (ground.targets, images):
        before = sorted(path.rglob("*"))
        with pytest.raises(PathError, match="expected an empty folder or a run of studenttrain"):
            fit(ground.config(path.name), quiet=True)
        assert sorted(path.rglob("*")) == before


def test_an_empty_folder_or_a_run_that_had_hardly_begun_is_taken(ground: Ground) -> None:
    (ground.folder / "empty").mkdir()
    assert fit(ground.config("empty", steps=1), quiet=True).steps == 1
    with pytest.raises(CorpusError):
        fit(ground.config("begun", data="/nowhere"), quiet=True)
    (ground.folder / "begun" / "metrics.jsonl").write_text("")
    (ground.folder / "begun" / "tensorboard").mkdir()
    (ground.folder / "begun" / ".checkpoint.pt.partial").write_text("")
    assert fit(ground.config("begun", steps=1), quiet=True).steps == 1
    (ground.folder / "other").mkdir()
    (ground.folder / "other" / "metrics.jsonl").write_text("")
    with pytest.raises(PathError, match=r"got 'metrics.jsonl'; give"):
        fit(ground.config("other", steps=1), quiet=True)


def test_weights_of_another_student_to_begin_with_are_refused(ground: Ground) -> None:
    fit(ground.config("wide", steps=1, student="mlp:8-24-4"), quiet=True)
    message = (
        r"^--init: expected weights of the same --student, 'mlp:8-16-4,dropout=0.3', got others in '.*' "
        r"\((Missing|Unexpected|size mismatch|copying).*\); give --init weights of that student, or --student as"
    )
    for init in ("wide", "wide/student.safetensors", "wide/checkpoint.pt"):
        assert_refused(ground, StudentError, message, init=str(ground.folder / init))


def test_a_student_that_fails_on_a_batch_is_named_with_the_step(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from torch import nn\n"
        "class Picky(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if self.training and len(x) != 96: raise RuntimeError('I want 96 rows')\n"
        "        return super().forward(x)\n"
        "def build(): return Picky(8, 4)\n"
    )
    (tmp_path / "picky_student.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    message = "step 1: expected a student that learns from a batch of 16 rows, got RuntimeError: I want 96 rows; mend"
    with pytest.raises(StudentError, match=message):
        fit(ground.config(student="picky_student:build"), quiet=True)


def test_a_student_without_weights_that_learn_is_refused(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\ndef build(): return nn.Linear(8, 4).requires_grad_(False)\n"
    (tmp_path / "frozen_student.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert_refused(ground, StudentError, "expected weights that learn, got none", student="frozen_student:build")


def test_a_teacher_that_meets_the_hard_targets_by_chance_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).normal(size=(96, NUM_CLASSES)).astype(np.float32)
    bad, good = make_ground(tmp_path / "bad", logits=noise), make_ground(tmp_path / "good")
    fit(bad.config(steps=1))
    said = capsys.readouterr().err
    assert "the stored top-1 meets the hard target in" in said
    assert "WARNING: that is no better than chance, 1 in 4" in said
    fit(good.config(steps=1))
    said = capsys.readouterr().err
    assert "the stored top-1 meets the hard target in" in said
    assert "WARNING" not in said


def test_a_store_of_a_preprocessing_of_another_release_is_refused(ground: Ground, tmp_path: Path) -> None:
    from studenttrain.preparation import stored_preprocess

    class Newer:
        path = "newer.zarr"

        class manifest:  # noqa: N801
            preprocess = {"version": 99}  # noqa: RUF012

    with pytest.raises(StoreError, match=r"99|release"):
        stored_preprocess(Newer())  # type: ignore[arg-type]


def test_dense_uint8_trains_too(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=Dense("uint8"))
    assert fit(ground.config(steps=2), quiet=True).steps == 2
