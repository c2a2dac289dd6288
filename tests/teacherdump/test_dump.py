"""A dump stores what the teacher says of each sample, whatever stops it on the way."""

import errno
import os
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE
from storage.cli import main as logitstore
from storage.console import progress
from storage.corpus import open_corpus, read_batch, sample_digest, verify_corpus
from storage.encodings import Dense, TopK
from storage.errors import CorpusError, CorpusMismatchError, MismatchError, OutOfSpaceError, PathError, TeacherError
from storage.exclusive import sole_run
from storage.interruption import Interrupted
from storage.layout import Layout
from storage.reader import open_store
from storage.records import QuarantineEntry
from storage.scan import verify
from storage.writer import StoreWriter
from studenttrain.models import build_model
from teacherdump import run as run_module
from teacherdump.config import DumpConfig
from teacherdump.dump import dump_shard
from teacherdump.preview import preview
from teacherdump.run import run
from teacherdump.source import open_source, prepare
from teacherdump.teacher import load_teacher

Build = Callable[..., DumpConfig]
ARCH = "mlp:12-16-5"


def say_nothing(text: str) -> None:
    del text


class OnRows(nn.Module):
    """A linear teacher that gives NaN where an input begins with 100, +inf with 200, -inf in all classes with 300."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, inputs_N: Tensor) -> Tensor:
        logits_NC: Tensor = self.linear(inputs_N)
        mark_N = inputs_N[:, :1]
        logits_NC = torch.where(mark_N == 100, torch.nan, logits_NC)
        logits_NC = torch.where(mark_N == 200, torch.tensor([0.0, torch.inf, 0, 0, 0]), logits_NC)
        return torch.where(mark_N == 300, -torch.inf, logits_NC)


@pytest.fixture
def marked(tmp_path: Path, rows: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a teacher that fails on some rows of its corpus."""
    making = type(sys)("making")
    making.__dict__["make"] = OnRows
    monkeypatch.setitem(sys.modules, "making", making)
    torch.manual_seed(0)
    torch.save(OnRows().state_dict(), tmp_path / "marked.pt")
    rows[5, 0], rows[70, 0], rows[199, 0] = 100, 200, 300
    np.savez(tmp_path / "corpus.npz", x=rows)
    return {"models": (str(tmp_path / "marked.pt"),), "arch": "making:make"}


# What is stored


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
@pytest.mark.parametrize("encoding", [Dense("float32"), Dense(), Dense("uint8"), TopK(2)])
def test_each_row_holds_what_the_teacher_says_of_its_sample(
    config: Build, rows: np.ndarray[Any, Any], weights: Path, tmp_path: Path, suffix: str, encoding: Any
) -> None:
    options = {"encoding": encoding.name, "values": encoding.values, "k": getattr(encoding, "k", None)}
    result = run(config(out=str(tmp_path / f"out.{suffix}"), **options))
    with open_store(result.path) as store:
        names = [spec.name for spec in store.manifest.arrays]
        found = store.read(names, 0, 200)
        logits_NC = load_teacher([weights], ARCH, device="cpu")(torch.from_numpy(rows)).numpy()
        for name, values in encoding.encode(logits_NC, (1.0, 2.0, 4.0)).items():
            tolerance = 1.01 if values.dtype == np.uint8 and name == "values" else 1e-3 if name == "entropy" else 1e-5
            np.testing.assert_allclose(found[name].astype(float), values.astype(float), rtol=2e-3, atol=tolerance)
        assert (found["status"] == STATUS_OK).all()
        assert found["sample_digest"].tolist() == [sample_digest(row.tobytes()) for row in rows]
        hard_targets = np.load(tmp_path / "labels.npy")
        np.testing.assert_array_equal(found["hard_target"], hard_targets)
        logprobs_NC = torch.from_numpy(logits_NC).log_softmax(1).numpy()
        expected = np.where(hard_targets < 0, np.nan, logprobs_NC[np.arange(200), hard_targets])
        np.testing.assert_allclose(found["hard_target_logprob"].astype(float), expected, rtol=2e-3)
        assert store.content_digest == result.content_digest is not None
    assert (result.num_rows, result.num_sealed_rows, result.num_new_rows, result.num_refused) == (200, 200, 200, 0)


def test_the_manifest_says_who_made_the_store_and_no_path(config: Build, weights: Path, tmp_path: Path) -> None:
    run(config())
    with open_store(tmp_path / "out.zarr") as store:
        manifest = store.manifest
    assert manifest.teacher == load_teacher([weights], ARCH, device="cpu").describe()
    assert (manifest.num_classes, manifest.layout) == (5, Layout(200, 32, 16))
    assert manifest.provenance["batch_size"] == 10
    assert manifest.provenance["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in str(manifest.to_json())


def test_an_ensemble_is_dumped_as_one_teacher(
    config: Build, saving: dict[str, Callable[..., Path]], tmp_path: Path, rows: np.ndarray[Any, Any]
) -> None:
    paths = [str(saving["weights"](tmp_path / f"{seed}.pt", ARCH, seed)) for seed in range(2)]
    run(config(models=tuple(paths), values="float32"))
    with open_store(tmp_path / "out.zarr") as store:
        found = store.read(["values", "max_logit"], 0, 200)
        assert len(store.manifest.teacher["members"]) == 2
    probs = [load_teacher([path], ARCH, device="cpu")(torch.from_numpy(rows)).softmax(1).numpy() for path in paths]
    np.testing.assert_allclose(found["values"] + found["max_logit"][:, None], np.log(np.mean(probs, 0)), atol=1e-5)


def test_images_bring_their_classes(config: Build, images: Path, saving: dict[str, Any], tmp_path: Path) -> None:
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")
    result = run(
        config(models=(str(path),), arch="cnn:3-4-2", data=str(images), labels=None, shard_rows=None, chunk_rows=None)
    )
    with open_store(result.path) as store:
        assert store.manifest.class_names == ("cat", "dog")
        assert store.read(["hard_target"], 0, 40)["hard_target"].tolist() == [0] * 20 + [1] * 20


def test_one_shard_by_itself_is_what_the_loop_writes(config: Build, tmp_path: Path) -> None:
    run(config())
    job = prepare(open_source(config(out=str(tmp_path / "single.zarr"))), say_nothing)
    with (
        StoreWriter.open(tmp_path / "single.zarr", job.manifest) as writer,
        progress(32, "rows", "dumping", quiet=True) as bar,
    ):
        seal = dump_shard(job, writer, 3, bar).seal
        with open_store(tmp_path / "out.zarr") as store:
            assert store.seal(3).arrays == seal.arrays


def test_a_report_says_what_a_shard_took_and_holds(config: Build, tmp_path: Path) -> None:
    run(config())
    job = prepare(open_source(config(out=str(tmp_path / "single.zarr"))), say_nothing)
    with (
        StoreWriter.open(tmp_path / "single.zarr", job.manifest) as writer,
        progress(32, "rows", "dumping", quiet=True) as bar,
    ):
        report = pickle.loads(pickle.dumps(dump_shard(job, writer, 3, bar)))
        entropies = writer.store.read(["entropy"], 96, 128)["entropy"].astype(np.float64)
    assert min(report.seconds_read, report.seconds_teacher, report.seconds_write) > 0
    assert report.num_bytes == sum(value["num_bytes"] for value in report.seal.objects.values())
    assert (report.num_rows, report.num_refused, report.worker) == (32, 0, "local")
    assert report.mean_entropy == pytest.approx(entropies.mean())


def test_rows_that_are_left_out_change_no_other_row(config: Build, tmp_path: Path) -> None:
    run(config())
    job = prepare(open_source(config(out=str(tmp_path / "single.zarr"))), say_nothing)
    with (
        StoreWriter.open(tmp_path / "single.zarr", job.manifest) as writer,
        progress(32, "rows", "dumping", quiet=True) as bar,
        open_store(tmp_path / "out.zarr") as store,
    ):
        report = dump_shard(job, writer, 3, bar, without={97: "it kills", 127: "it kills, too", 5: "of another shard"})
        (first, last), names = report.seal.quarantine, [spec.name for spec in store.manifest.arrays]
        left, whole = writer.store.read(names, 96, 128), store.read(names, 96, 128)
    assert (first.row, first.reason, last.row, last.reason) == (97, "it kills", 127, "it kills, too")
    assert left["status"][[1, 31]].tolist() == [STATUS_UNDECODABLE] * 2
    assert left["sample_digest"][[1, 31]].tolist() == [0, 0]
    kept = np.delete(np.arange(32), [1, 31])
    for name in names:
        np.testing.assert_array_equal(left[name][kept], whole[name][kept], err_msg=name)


@pytest.mark.parametrize("batch_size", [7, 50])
def test_the_number_of_threads_changes_no_bit(config: Build, tmp_path: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    torch.save(build_model("mlp:64-32-10").state_dict(), tmp_path / "wide.pt")
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(150, 64)).astype(np.float32))
    options: dict[str, Any] = {"models": (str(tmp_path / "wide.pt"),), "arch": "mlp:64-32-10"}
    options |= {
        "data": str(tmp_path / "wide.npy"),
        "values": "float32",
        "batch_size": batch_size,
        "shard_rows": 75,
        "chunk_rows": 15,
        "labels": None,
    }
    before, digests = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.add(run(config(**options, out=str(tmp_path / f"{threads}.zarr"))).content_digest)
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_what_is_no_sample_is_counted_aloud(config: Build, images: Path, tmp_path: Path) -> None:
    (images / "cat" / "notes.txt").write_text("no image")
    torch.save(build_model("mlp:192-8-2").state_dict(), tmp_path / "small.pt")
    said: list[str] = []
    options: dict[str, Any] = {"data": str(images), "labels": None, "models": (str(tmp_path / "small.pt"),)}
    run(config(**options, arch="mlp:192-8-2", no_alarms=("all",)), said.append)
    assert any("1 other files are no samples, and are passed over" in line for line in said)


# Refused rows


def test_samples_that_can_not_be_decoded_are_quarantined_and_the_run_goes_on(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    broken = sorted(path for path in images.rglob("*.jpg"))[3]
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")
    result = run(config(models=(str(path),), arch="cnn:3-4-2", data=str(images), labels=None))
    corpus = open_corpus(images)
    row = next(row for row in range(40) if corpus.key(row) == broken.relative_to(images).as_posix())
    assert (result.num_refused, result.num_sealed_rows) == (1, 40)
    with open_store(result.path) as store:
        (entry,) = store.quarantine()
        assert (entry.row, entry.key) == (row, corpus.key(row))
        assert entry.reason
        assert "\n" not in entry.reason
        found = store.read([spec.name for spec in store.manifest.arrays], 0, 40)
        assert np.flatnonzero(found["status"] == STATUS_UNDECODABLE).tolist() == [row]
        assert found["sample_digest"][row] == sample_digest(broken.read_bytes())
        assert found["hard_target"][row] == row // 20
        for name in ("values", "lse", "max_logit", "entropy", "hard_target_logprob"):
            assert np.isnan(found[name][row]).all()
            assert np.isfinite(np.delete(found[name], row, axis=0)).all()


@pytest.mark.parametrize("encoding", [{}, {"values": "uint8"}, {"encoding": "topk", "k": 2}])
def test_rows_whose_logits_are_not_finite_are_quarantined(
    config: Build, marked: dict[str, Any], encoding: dict[str, Any]
) -> None:
    result = run(config(**marked, **encoding))
    with open_store(result.path) as store:
        assert store.quarantine() == [
            QuarantineEntry(5, "5", "logits are not finite: NaN"),
            QuarantineEntry(70, "70", "logits are not finite: +inf"),
            QuarantineEntry(199, "199", "logits are not finite: -inf for every class"),
        ]
        found = store.read([spec.name for spec in store.manifest.arrays], 0, 200)
        refused = found["status"] == STATUS_NOT_FINITE
        assert np.flatnonzero(refused).tolist() == [5, 70, 199]
        assert (found["sample_digest"] != 0).all()
        for spec in store.manifest.arrays:
            if spec.name not in ("status", "sample_digest", "hard_target"):
                np.testing.assert_array_equal(found[spec.name][refused], spec.full(3))
    assert result.num_refused == 3


def test_a_first_shard_without_any_target_stops_the_run_before_it_is_sealed(
    config: Build, marked: dict[str, Any], rows: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    rows[:32, 0] = 100
    np.savez(tmp_path / "corpus.npz", x=rows)
    with pytest.raises(TeacherError, match=r"row 0 \('0'\): expected finite logits for some of the first 32 samples"):
        run(config(**marked))
    assert not (tmp_path / "out.zarr").exists()


def test_a_first_shard_of_samples_that_can_not_be_decoded_stops_the_run(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    for path in sorted((images / "cat").iterdir()):
        path.write_bytes(path.read_bytes()[:60])
    weights = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-2")
    with pytest.raises(CorpusError, match=r"expected some of the first 16 samples to be usable, got none: .*; check"):
        run(
            config(
                models=(str(weights),), arch="cnn:3-4-2", data=str(images), labels=None, shard_rows=16,
                no_alarms=("undecodable",),
            )
        )  # fmt: skip


# Going on


def digest_of(result: Any) -> str:
    assert result.content_digest is not None
    return str(result.content_digest)


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_two_patterns_of_interruption_give_the_same_store(config: Build, tmp_path: Path, suffix: str) -> None:
    undisturbed = digest_of(run(config(out=str(tmp_path / f"a.{suffix}"))))
    for name, pattern in {"b": (1, 1, 1, 200), "c": (100, 33, 64)}.items():
        for samples in pattern:
            result = run(config(out=str(tmp_path / f"{name}.{suffix}"), limit_samples=samples))
        assert digest_of(result) == undisturbed
        with (
            open_store(tmp_path / f"a.{suffix}") as store,
            open_store(tmp_path / f"{name}.{suffix}") as other,
        ):
            for spec in store.manifest.arrays:
                first, second = (each.read([spec.name], 0, 200)[spec.name] for each in (store, other))
                assert first.tobytes() == second.tobytes()


def test_a_finished_store_is_left_alone_without_loading_the_teacher(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(config())
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("loaded"))
    again = run(config())
    assert (again.content_digest, again.num_new_rows) == (first.content_digest, 0)
    assert "nothing to do" in again.summary()


def test_shards_that_are_all_sealed_are_finalized_without_loading_the_teacher(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finalize", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            run(config())
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("loaded"))
    assert run(config()).content_digest is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, 'teacher.precision: the store has "fp32", this run "bf16"'),
        ({"encoding": "topk", "k": 2}, 'encoding.name: the store has "dense", this run "topk"'),
        ({"temperatures": (3.0,)}, r"temperatures: the store has \[1.0, 2.0, 4.0\], this run \[3.0\]"),
        ({"scale": 2.0}, r"preprocess.scale: the store has 1.0, this run 2.0"),
        ({"shard_rows": 64}, "shard_rows: the store has 32, this run 64"),
        ({"compressor": "zstd"}, 'compressor: the store has "none", this run "zstd"'),
    ],
)
def test_a_run_that_would_change_what_the_store_holds_is_refused(
    config: Build, options: dict[str, Any], message: str
) -> None:
    run(config(limit_samples=1))
    for call in (run, preview):
        with pytest.raises(MismatchError, match=f"goes on with this store, got other settings: .*{message}"):
            call(config(**options))


def test_another_teacher_corpus_or_labels_are_refused(
    config: Build, saving: dict[str, Any], tmp_path: Path, rows: np.ndarray[Any, Any]
) -> None:
    run(config(limit_samples=1))
    other = saving["weights"](tmp_path / "other.pt", ARCH, 7)
    with pytest.raises(MismatchError, match=r"teacher.digest"):
        run(config(models=(str(other),)))
    np.savez(tmp_path / "longer.npz", x=rows.repeat(2, axis=0))
    np.save(tmp_path / "longer.npy", np.zeros(400, np.int64))
    with pytest.raises(MismatchError, match=r"num_rows: the store has 200, this run 400"):
        run(config(data=str(tmp_path / "longer.npz"), labels=str(tmp_path / "longer.npy")))
    with pytest.raises(MismatchError, match=r"has_hard_targets: the store has true, this run false"):
        run(config(labels=None))
    np.save(tmp_path / "labels.npy", np.zeros(200, np.int64))
    with pytest.raises(CorpusMismatchError, match=r"row 0 .*: expected the hard target -1, got 0"):
        run(config())


def test_a_run_goes_on_with_the_batch_size_and_layout_that_the_store_was_begun_with(config: Build) -> None:
    auto = {"batch_size": None, "shard_rows": None, "chunk_rows": None}
    run(config(limit_samples=1))
    notes: list[str] = []
    run(config(**auto, limit_samples=1), notes.append)
    assert notes == [
        "going on: 32 of 200 rows are sealed",
        "--limit-samples 1: rounded up to 32, since shards are dumped whole",
    ]
    notes.clear()
    run(config(batch_size=7), notes.append)
    assert "dumped with another batch size: the last bits of new rows may differ" in notes[1]


# Limits


def test_a_limit_on_samples_is_rounded_up_to_whole_shards_and_says_how_to_go_on(config: Build) -> None:
    notes: list[str] = []
    result = run(config(limit_samples=33), notes.append)
    assert notes == ["--limit-samples 33: rounded up to 64, since shards are dumped whole"]
    assert (result.num_sealed_rows, result.content_digest, result.limit) == (64, None, "--limit-samples 33")
    assert "64 of 200 rows sealed" in result.summary()
    assert "stopped by --limit-samples 33; run the same command again to go on, or finalize" in result.summary()


def test_a_limit_on_bytes_is_kept(config: Build, tmp_path: Path) -> None:
    result = run(config(limit_bytes=9000))
    assert result.limit == "--limit-bytes 9000"
    assert 0 < result.num_sealed_rows < 200
    shards = sum(path.stat().st_size for path in (tmp_path / "out.zarr").rglob("c/**/*") if path.is_file())
    assert shards <= 9000
    with pytest.raises(
        ValueError, match=r"limit_bytes: expected room for one shard of 32 rows, 1.38 kB, got 100 bytes"
    ):
        run(config(limit_bytes=100))


def test_a_limit_that_leaves_no_room_leaves_no_store(config: Build, tmp_path: Path) -> None:
    for out in ("out.zarr", "out.h5"):
        with pytest.raises(ValueError, match=r"limit_bytes: expected room for one shard"):
            run(config(limit_bytes=100, out=str(tmp_path / out)))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["out.zarr", "out.h5"])
def test_a_store_of_which_nothing_is_sealed_is_begun_anew_with_other_settings(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = str(tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr("teacherdump.dump.dump", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            run(config(out=out))
    with open_store(out) as store:
        assert store.sealed_shards() == ()
    assert preview(config(out=out, encoding="topk", k=2, shard_rows=64)).num_new_rows == 200
    undisturbed = run(config(out=str(tmp_path / f"another-{name}"), encoding="topk", k=2, shard_rows=64))
    result = run(config(out=out, encoding="topk", k=2, shard_rows=64))
    assert result.content_digest == undisturbed.content_digest is not None
    assert verify(out).warnings == ()


@pytest.mark.parametrize("name", ["out.zarr", "out.h5"])
def test_a_second_run_and_finalize_are_refused_while_a_run_writes(config: Build, tmp_path: Path, name: str) -> None:
    out = str(tmp_path / name)
    run(config(out=out, limit_samples=32))
    message = "another teacherdump run is writing this store; wait for it, or stop it"
    with sole_run(out):
        with pytest.raises(PathError, match=message):
            run(config(out=out))
        refused = CliRunner().invoke(logitstore, ["finalize", out, "--partial"])
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert message in refused.stderr
        assert verify(out).warnings == ()
    assert run(config(out=out)).content_digest is not None


@pytest.mark.parametrize("name", ["out.zarr", "out.h5"])
def test_a_run_that_begins_while_another_does_is_refused(config: Build, tmp_path: Path, name: str) -> None:
    out = str(tmp_path / name)
    with sole_run(out), pytest.raises(PathError, match="another teacherdump run is writing this store"):
        run(config(out=out))
    assert not list(tmp_path.glob("out*"))


def test_a_store_finalized_at_a_part_says_so(config: Build, tmp_path: Path) -> None:
    run(config(limit_samples=32))
    assert CliRunner().invoke(logitstore, ["finalize", str(tmp_path / "out.zarr"), "--partial"]).exit_code == 0
    summary = run(config()).summary()
    assert "finalized at 32 of 200 rows; the others can't be added any more" in summary


def test_a_second_interruption_still_says_where_the_store_stands(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(limit_samples=32))
    monkeypatch.setattr("teacherdump.dump.dump", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match=r"interrupted: 32 of 200 rows are sealed in .*; run the same command again"):
        run(config())


def test_a_path_with_spaces_is_quoted_in_what_to_do_next(config: Build, tmp_path: Path) -> None:
    out = str(tmp_path / "my logits.zarr")
    assert f"logitstore finalize '{out}' --partial" in run(config(out=out, limit_samples=32)).summary()


def test_class_folders_that_are_not_the_teachers_classes_can_be_left_out(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    weights = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-3")
    options = {"models": (str(weights),), "arch": "cnn:3-4-3", "data": str(images), "shard_rows": 16}
    with pytest.raises(TeacherError, match=r"where the folders are no classes of the teacher: --labels none"):
        run(config(**options, labels=None))
    assert run(config(**options, labels="none")).num_sealed_rows == 40
    with open_store(tmp_path / "out.zarr") as store:
        assert (store.manifest.class_names, store.manifest.has_hard_targets) == (None, False)
        verify_corpus(store, open_corpus(images))


def test_a_limit_on_hours_lets_one_shard_pass(config: Build) -> None:
    result = run(config(limit_hours=1e-9))
    assert (result.num_sealed_rows, result.limit) == (32, "--limit-hours 1e-09")


def test_a_limit_that_is_not_reached_finishes_the_store(config: Build) -> None:
    result = run(config(limit_samples=10**6, limit_hours=5, limit_bytes=10**9))
    assert (result.limit, result.num_sealed_rows) == (None, 200)
    assert result.content_digest


# What goes wrong on the way


def test_a_full_disk_stops_the_run_and_loses_nothing(
    config: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undisturbed = digest_of(run(config(out=str(tmp_path / "other.zarr"))))
    sync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 120:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpaceError, match="room on the disk, got none; free space and run the same command again"):
        run(config(wait_for_room=0.0))
    monkeypatch.setattr(os, "fsync", sync)
    with open_store(tmp_path / "out.zarr") as store:
        assert 0 < store.num_sealed_rows < 200
    assert digest_of(run(config())) == undisturbed


def test_an_error_of_the_reader_stops_the_run_and_is_raised_as_itself(
    config: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = [0]

    def gone(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 9:
            raise CorpusError("corpus 'x': expected samples, got an unplugged disk; plug it in")
        return read_batch(*args)

    monkeypatch.setattr("teacherdump.dump.read_batch", gone)
    before = threading.active_count()
    with pytest.raises(CorpusError, match="unplugged disk"):
        run(config(no_alarms=("all",)))
    assert threading.active_count() <= before
    with open_store(tmp_path / "out.zarr") as store:
        assert store.sealed_shards() == (0, 1)


def test_an_error_of_the_teacher_stops_the_run(config: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = [0]

    class Tiring(nn.Linear):
        def forward(self, inputs_N: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] > 8:
                raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
            return super().forward(inputs_N)

    making = type(sys)("making")
    making.__dict__["make"] = lambda: Tiring(12, 5)
    monkeypatch.setitem(sys.modules, "making", making)
    torch.save(nn.Linear(12, 5).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(TeacherError, match="got RuntimeError: CUDA error: an illegal memory access was encountered"):
        run(config(models=(str(tmp_path / "linear.pt"),), arch="making:make", no_alarms=("all",)))
    with open_store(tmp_path / "out.zarr") as store:
        assert store.sealed_shards() == (0,)


def test_a_read_only_folder_is_refused_in_one_line(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)  # the tests may run as root, whom no mode keeps out
    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(PathError, match="got Permission denied; choose another"):
        run(config())


# What contradicts


def test_classes_that_differ_from_the_corpus_are_refused(
    config: Build, images: Path, saving: dict[str, Any], tmp_path: Path
) -> None:
    path = saving["weights"](tmp_path / "cnn.pt", "cnn:3-4-7")
    with pytest.raises(TeacherError, match=r"as many classes as the teacher has \(7\), got 2 \('cat' to 'dog'\)"):
        run(config(models=(str(path),), arch="cnn:3-4-7", data=str(images), labels=None))


def test_a_hard_target_beyond_the_classes_is_refused_by_its_row(config: Build, tmp_path: Path) -> None:
    hard_targets = np.zeros(200, np.int64)
    hard_targets[[17, 30]] = 5
    np.save(tmp_path / "labels.npy", hard_targets)
    with pytest.raises(
        CorpusError, match=r"row 17 \('17'\): expected a hard target below 5, the teacher's classes, got 5"
    ):
        run(config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "model: expected at least one, got none"),
        ({"k": 3}, "k: expected none with dense, got 3; it is of topk: leave it out"),
        ({"encoding": "topk"}, "k: expected how many entries topk keeps, got none; give --k N"),
        ({"encoding": "topk", "k": 0}, "k: expected at least 1, got 0"),
        ({"encoding": "wave"}, "encoding: expected dense or topk or sample or hidden, got 'wave'"),
        ({"values": "float64"}, "values: expected one of float16, float32, uint8"),
        ({"temperatures": (0.0,)}, "temperatures: expected numbers above 0"),
        ({"temperatures": (1.0, -2.0)}, "temperatures: expected numbers above 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"limit_hours": 0.0}, "limit_hours: expected a number above 0, got 0.0"),
        ({"limit_samples": -1}, "limit_samples: expected at least 1, got -1"),
        ({"combine": "mean-logits"}, "combine: expected several models, got one"),
        ({"combine": "median"}, "combine: expected mean-probs or mean-logits, got 'median'"),
        ({"precision": "tf32"}, "precision: expected fp32 or bf16 or fp16, got 'tf32'"),
        ({"resize": "crop"}, "resize: expected shorter or stretch, got 'crop'"),
    ],
)
def test_options_that_contradict_are_refused(config: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_more_kept_entries_than_classes_are_refused(config: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k: expected at most the number of classes \(5\), got 6; use a smaller k"):
        run(config(encoding="topk", k=6))
    assert not (tmp_path / "out.zarr").exists()


def test_preprocessing_that_a_corpus_has_no_use_for_is_refused(config: Build) -> None:
    with pytest.raises(ValueError, match="size: expected a corpus of images, got arrays; leave it out"):
        run(config(image_size=(8, 8)))


def test_a_batch_beyond_what_a_program_takes_is_refused(config: Build, saving: dict[str, Any], tmp_path: Path) -> None:
    program = saving["program"](tmp_path / "fixed.pt2", build_model(ARCH).eval(), torch.zeros(4, 12), None)
    options = {"models": (str(program),), "arch": None}
    with pytest.raises(ValueError, match="batch_size: expected at most 4, for which the program was exported, got 10"):
        run(config(**options))
    notes: list[str] = []
    result = run(config(**options, batch_size=None), notes.append)
    assert result.num_sealed_rows == 200
    assert "exported for batches of 4, which is slow" in notes[0]


def test_something_else_at_out_is_refused(config: Build, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "diary.txt").write_text("mine")
    with pytest.raises(PathError, match="expected nothing, or a logit store, got something else; give another path"):
        run(config())
    assert (tmp_path / "out.zarr" / "diary.txt").read_text() == "mine"


# Plans


def test_a_plan_says_what_a_run_does_and_writes_nothing(config: Build, tmp_path: Path) -> None:
    plan = preview(config(limit_samples=50))
    assert (plan.num_rows, plan.num_shards, plan.num_new_rows, plan.num_new_shards) == (200, 7, 64, 2)
    assert (plan.shard_rows, plan.chunk_rows, plan.batch_size, plan.num_classes) == (32, 16, 10, 5)
    assert plan.num_bytes == 200 * plan.row_bytes
    assert plan.hours is not None
    assert plan.rows_per_s is not None
    assert not (tmp_path / "out.zarr").exists()
    result = run(config(limit_samples=50))
    assert result.num_new_rows == plan.num_new_rows
    with open_store(result.path) as store:
        assert store.manifest.row_bytes == plan.row_bytes
    going_on = preview(config())
    assert (going_on.num_sealed_rows, going_on.num_new_rows, going_on.finalized) == (64, 136, False)
    run(config())
    finished = preview(config())
    assert (finished.num_new_rows, finished.finalized, finished.hours) == (0, True, None)
    for made in (plan, going_on, finished):
        assert "rows        200, 5 classes" in made.summary()


# Memory


def test_memory_does_not_grow_with_the_rows(config: Build, tmp_path: Path) -> None:
    process = psutil.Process()

    def growth(num_rows: int) -> int:
        np.save(tmp_path / f"{num_rows}.npy", np.ones((num_rows, 12), np.float32))
        before = int(process.memory_info().rss)
        options = {"data": str(tmp_path / f"{num_rows}.npy"), "labels": None, "shard_rows": 512, "batch_size": 256}
        run(config(out=str(tmp_path / f"{num_rows}.zarr"), **options))
        return int(process.memory_info().rss) - before

    growth(2_000)
    assert growth(40_000) < 30 << 20


def test_reading_threads_change_nothing(config: Build, tmp_path: Path) -> None:
    digests = {digest_of(run(config(out=str(tmp_path / f"{readers}.zarr"), readers=readers))) for readers in (1, 4)}
    assert len(digests) == 1


@pytest.mark.gpu
def test_a_dump_on_cuda_is_close_to_one_on_the_cpu(config: Build, tmp_path: Path) -> None:
    for encoding in ({}, {"encoding": "topk", "k": 5, "values": "float32"}):
        stores = []
        for device in ("cpu", "cuda"):
            result = run(config(device=device, out=str(tmp_path / f"{device}{len(encoding)}.zarr"), **encoding))
            stores.append(open_store(result.path))
        for name in ("lse", "max_logit", "entropy", "hard_target_logprob", "sample_digest", "hard_target"):
            first, second = (store.read([name], 0, 200)[name].astype(float) for store in stores)
            np.testing.assert_allclose(second, first, rtol=2e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_cuda_runs_in_less_precision_with_a_batch_size_of_its_own(config: Build, precision: str) -> None:
    result = run(config(device="cuda", precision=precision, batch_size=None))
    assert (result.num_sealed_rows, result.num_refused) == (200, 0)
