"""A generalist with its specialists: at inference, on a corpus, and as a store that a student learns from."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from storage.corpus import Batch, open_corpus
from storage.encodings import Dense, HeadArrays, Hidden, TopK
from storage.errors import CorpusError, CorpusMismatchError, MismatchError, NotSealedError, PathError, StudentError
from storage.info import info, info_text
from storage.reader import Store, open_store
from storage.scan import verify
from studenttrain.cli import main
from studenttrain.evaluate import read_ahead
from studenttrain.export import CARD, WEIGHTS, save_weights
from studenttrain.specialists.evaluation import TryOptions, try_specialists
from studenttrain.specialists.fuse_options import FuseOptions
from studenttrain.specialists.fuse_store import fuse_store
from studenttrain.specialists.fused import Fused, FusedClassifier, load_folder, load_generalist
from studenttrain.specialists.fused_figures import CountLine, FusedTally
from studenttrain.specialists.fused_picture import together, write_fused_picture
from studenttrain.specialists.fused_text import evaluated_text, fused_text
from studenttrain.specialists.fusion import FusedResult, fuse
from studenttrain.specialists.generalist import check_generalist_store, stored_logprobs
from studenttrain.specialists.head import cut_head
from studenttrain.specialists.specialist import load_specialists, phase_folder
from studenttrain.train import fit
from tests.studenttrain.runs import NUM_CLASSES, NUM_FEATURES, Ground, write_targets
from tests.studenttrain.sequences import make_token_ground
from tests.studenttrain.specialists_ground import (
    CLASSES,
    SHAPE,
    build_generalist,
    generalist_ground,
    write_generalist,
    write_specialists,
)  # fmt: skip

ONE = {"device": "cpu", "readers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A corpus with the generalist's store, and specialists beside them."""
    found = generalist_ground(tmp_path_factory.mktemp("made"), build_generalist())
    write_specialists(found.folder / "specialists", found)
    return found


@pytest.fixture
def ground(made: Ground, tmp_path: Path) -> Ground:
    """The same, to be changed."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Ground(tmp_path, tmp_path / made.data.name, tmp_path / made.targets.name)


def tried(ground: Ground, **options: Any) -> TryOptions:
    given: dict[str, Any] = {"specialists": str(ground.folder / "specialists"), "data": str(ground.data), **ONE}
    if "generalist" not in options:
        given["targets"] = str(ground.targets)
    return TryOptions(**given | options)


def fused(ground: Ground, out: str = "fused.zarr", **options: Any) -> FuseOptions:
    given: dict[str, Any] = {"specialists": str(ground.folder / "specialists"), "data": str(ground.data), **ONE}
    given |= {"targets": str(ground.targets), "out": str(ground.folder / out)}
    return FuseOptions(**given | options)


def run(command: str, ground: Ground, *words: str) -> Result:
    where = ["--specialists", str(ground.folder / "specialists"), "--data", str(ground.data), "--device", "cpu"]
    return CliRunner().invoke(main, ["specialists", command, *where, *words], catch_exceptions=False)


def inputs_of(ground: Ground) -> Tensor:
    with np.load(ground.data) as arrays:
        return torch.from_numpy(arrays["x"])


# at inference


def test_a_specialist_runs_on_the_rows_that_it_is_active_for_and_on_no_others(ground: Ground) -> None:
    classifier = FusedClassifier(load_specialists(ground.folder / "specialists"), NUM_CLASSES, build_generalist())
    seen: list[int] = []
    for specialist in classifier.specialists:
        specialist.model.register_forward_hook(lambda *given: seen.append(len(given[1][0])))
    found = classifier.fuse(inputs_of(ground))
    top1_N = build_generalist()(inputs_of(ground)).argmax(1)
    for number, classes in enumerate(CLASSES):
        assert torch.equal(found.active_NM[:, number], torch.isin(top1_N, torch.tensor(classes)))
        assert torch.equal(found.said[number].isnan().all(1), ~found.active_NM[:, number])
    assert seen == found.active_NM.sum(0).tolist()
    seen.clear()
    every = classifier.fuse(inputs_of(ground), every_row=True)
    assert seen == [96, 96]
    assert torch.allclose(every.logprobs_NC, found.logprobs_NC, atol=1e-6)


def test_the_answer_is_the_fusion_of_what_generalist_and_specialists_say(ground: Ground) -> None:
    folder = write_generalist(ground.folder / "generalist", ground, build_generalist())
    classifier = FusedClassifier.load(ground.folder / "specialists", folder)
    inputs, found = inputs_of(ground), classifier.fuse(inputs_of(ground))
    said = [(it.classes, it.logprobs(inputs).detach()) for it in load_specialists(ground.folder / "specialists")]
    expected = fuse(build_generalist()(inputs).log_softmax(1), said, found.active_NM)
    assert torch.allclose(found.logprobs_NC.exp(), expected.logprobs_NC.exp(), atol=1e-5)
    assert torch.equal(classifier.logprobs(inputs), found.logprobs_NC)
    assert not torch.allclose(found.logprobs_NC, found.generalist_NC, atol=0.1)


def test_more_of_the_likeliest_classes_make_more_specialists_active(ground: Ground) -> None:
    specialists = load_specialists(ground.folder / "specialists")
    generalist_NC = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]).log_softmax(1)
    active = [
        FusedClassifier(specialists, NUM_CLASSES, active_top=top).active(generalist_NC).tolist() for top in (1, 2, 3)
    ]
    assert active == [[[True, False], [False, True]], [[True, True], [False, True]], [[True, True], [True, True]]]


def test_what_does_not_fit_together_is_refused(ground: Ground) -> None:
    specialists = load_specialists(ground.folder / "specialists")
    with pytest.raises(ValueError, match="specialists: expected at least one, got none"):
        FusedClassifier([], NUM_CLASSES)
    for top in (0, 5):
        with pytest.raises(ValueError, match=f"active_top: expected 1 to the 4 classes, got {top}"):
            FusedClassifier(specialists, NUM_CLASSES, active_top=top)
    with pytest.raises(ValueError, match="tolerance: expected a number above 0, got 0"):
        FusedClassifier(specialists, NUM_CLASSES, tolerance=0.0)
    with pytest.raises(StudentError, match="specialist 1: expected classes below the generalist's 3, got class 3"):
        FusedClassifier(specialists, 3)
    other = replace(specialists[1], card=replace(specialists[1].card, input_shape=(9,)))
    with pytest.raises(
        StudentError, match=r"specialist 1: expected an input of \[8\], preprocessed as that of specialist 0"
    ):
        FusedClassifier([specialists[0], other], NUM_CLASSES)
    with pytest.raises(ValueError, match="generalist_NC: expected log-probabilities, since there is no generalist"):
        FusedClassifier(specialists, NUM_CLASSES).logprobs(inputs_of(ground))
    with pytest.raises(ValueError, match="phase: expected hard or soft, got 'firm'"):
        load_folder(ground.folder / "specialists", "firm")  # type: ignore[arg-type]
    with pytest.raises(StudentError, match=r"specialist 0 of .*: expected a finished run in .*soft', got none"):
        load_folder(ground.folder / "specialists", "soft")


def test_a_model_that_is_no_generalist_of_the_specialists_is_refused(ground: Ground) -> None:
    folder = write_generalist(ground.folder / "generalist", ground, build_generalist())
    there = json.loads((folder / CARD).read_text())

    def change(**changed: Any) -> None:
        (folder / CARD).write_text(json.dumps(there | changed))

    change(class_names=["a", "b", "c", "d"])
    assert FusedClassifier.load(ground.folder / "specialists", folder).num_classes == NUM_CLASSES
    change(preprocess=there["preprocess"] | {"scale": 2.0})
    with pytest.raises(
        StudentError, match=r"generalist '.*': expected an input of \[8\], preprocessed as that of the specia"
    ):
        FusedClassifier.load(ground.folder / "specialists", folder)
    with pytest.raises(StudentError, match="expected a model of all classes, got a specialist; give the generalist"):
        FusedClassifier.load(ground.folder / "specialists", phase_folder(ground.folder / "specialists", 0, "hard"))
    change()
    write_specialists(ground.folder / "five", ground, num_classes=5)
    with pytest.raises(MismatchError, match="expected the plan's 5 classes, got 4; give the generalist"):
        FusedClassifier.load(ground.folder / "five", folder)


# the figures


def test_the_tables_count_what_was_right_before_and_after() -> None:
    before_NC = torch.tensor([[5.0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5], [0, 5, 0]]).log_softmax(1)
    after_NC = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 5, 0], [0, 0, 5], [5, 0, 0]]).log_softmax(1)
    hard_N = torch.tensor([0, 1, 0, 2, -1])
    active_NM = torch.tensor([[True, False], [True, False], [True, True], [False, False], [True, True]])
    said_NK = torch.tensor([[3.0, 1, 0], [1, 3, 0], [0, 2, 4], [0, 0, 0], [1, 0, 0]]).log_softmax(1)
    said_NL = torch.tensor([[0.0, 1], [0, 1], [2, 1], [1, 0], [0, 0]]).log_softmax(1)
    said_NK[3], said_NL[~active_NM[:, 1]] = torch.nan, torch.nan
    tally = FusedTally([(0, 1), (1,)], 3)
    for rows in (slice(0, 2), slice(2, 5)):
        said = (said_NK[rows], said_NL[rows])
        result = FusedResult(after_NC[rows], 3, 1e-9)
        tally.add(Fused(after_NC[rows], before_NC[rows], active_NM[rows], said, result), hard_N[rows])
    figures = tally.figures(1e-8, every_row=False)
    assert figures.by_covering == (
        CountLine(0, 1, 1, 0, 1, 1),  # class 2
        CountLine(1, 2, 2, 0, 1, 1),  # class 0
        CountLine(2, 1, 1, 1, 0, 1),  # class 1
    )
    assert figures.by_active == (CountLine(0, 1, 1, 0, 1, 1), CountLine(1, 2, 2, 1, 1, 2), CountLine(2, 2, 1, 1, 0, 0))
    assert [line.relative_change for line in figures.by_active] == [0.0, 1.0, None]
    assert (figures.generalist.num_errors, figures.fused.num_errors, figures.num_changed) == (2, 1, 2)
    first, second = figures.specialists
    assert (first.num_active, first.num_seen, first.num_own, first.own_before, first.own_after) == (
        4,
        3,
        3,
        1 / 3,
        2 / 3,
    )
    assert (first.dustbin_precision, first.dustbin_recall) == (0.0, None)
    assert (second.num_active, second.num_seen, second.num_own, second.own_before) == (2, 1, 0, None)
    assert (second.dustbin_precision, second.dustbin_recall) == (None, 0.0)
    assert (figures.num_iterations, figures.residual) == (3, 1e-9)


def test_a_store_and_a_run_of_the_generalist_give_the_same_figures(ground: Ground) -> None:
    folder = write_generalist(ground.folder / "generalist", ground, build_generalist())
    by_store = try_specialists(tried(ground), quiet=True)
    by_run = try_specialists(tried(ground, generalist=str(folder), batch_size=7), quiet=True)
    assert by_store.by_covering == by_run.by_covering
    assert by_store.specialists == by_run.specialists
    assert by_store.fused.nll == pytest.approx(by_run.fused.nll, abs=1e-5)
    assert by_store.fused.num_samples == 96
    assert sum(line.num_rows for line in by_store.by_active) == 96


def test_the_command_prints_both_classifiers_and_the_tables(ground: Ground) -> None:
    result = run("eval", ground, "--targets", str(ground.targets), "-q")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("generalist  top-1 ")
    assert lines[1].startswith("fused       top-1 ")
    assert "specialists that have the true class" in lines
    assert "active specialists" in lines
    assert "the rows that each was active for" in result.output
    value = json.loads(run("eval", ground, "--targets", str(ground.targets), "--every-row", "--json").output)
    assert value["every_row"]
    assert {line["num_seen"] for line in value["specialists"]} == {96}
    assert value["fused"]["num_samples"] == sum(line["num_rows"] for line in value["by_covering"]) == 96
    assert value["residual"] <= value["tolerance"] == 1e-8


def test_without_hard_targets_only_what_changed_is_told(tmp_path: Path) -> None:
    ground = generalist_ground(tmp_path, build_generalist(), labels=False)
    write_specialists(tmp_path / "specialists", ground)
    figures = try_specialists(tried(ground), quiet=True)
    assert figures.fused.top1 is None
    assert figures.by_covering == ()
    text = evaluated_text(figures, ("ant", "bee", "a very long name indeed", "elk"))
    assert "ant, bee" in text
    assert "a very long n…" in text
    assert "relative" not in text
    with pytest.raises(StudentError, match=r"gain.png: expected hard targets to draw what is right, got none"):
        write_fused_picture(tmp_path / "gain.png", figures, None)


def test_the_store_s_hard_targets_serve_where_the_corpus_has_none(ground: Ground) -> None:
    expected = try_specialists(tried(ground), quiet=True)
    with np.load(ground.data) as arrays:
        np.savez(ground.folder / "bare.npz", x=arrays["x"])
    assert try_specialists(tried(ground, data=str(ground.folder / "bare.npz")), quiet=True) == expected


def test_rows_without_targets_are_left_out(tmp_path: Path) -> None:
    ground = generalist_ground(tmp_path, build_generalist(), refused=(3, 40))
    write_specialists(tmp_path / "specialists", ground)
    figures = try_specialists(tried(ground), quiet=True)
    assert (figures.num_refused, figures.fused.num_samples) == (2, 94)
    assert "2 samples without an answer, left out" in evaluated_text(figures, None)


def test_the_picture_is_drawn(ground: Ground, tmp_path: Path) -> None:
    result = run("eval", ground, "--targets", str(ground.targets), "--picture", str(tmp_path / "gain.png"), "-q")
    assert result.exit_code == 0
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("eval", ground, "--targets", str(ground.targets), "--picture", str(tmp_path / "gain.jpg"))
    assert wrong.exit_code == 2
    assert "expected a path that ends in .png" in wrong.output


def test_many_numbers_of_specialists_share_the_last_bar() -> None:
    lines = [CountLine(number, 10, 10, 1, 5, 6) for number in range(20)]
    shown = together(lines)
    assert len(shown) == 9
    assert shown[-1] == ("8+", CountLine(8, 120, 120, 12, 60, 72))
    assert together(lines[:3]) == [(str(number), line) for number, line in enumerate(lines[:3])]


def _do(options: TryOptions | FuseOptions) -> object:
    return fuse_store(options) if isinstance(options, FuseOptions) else try_specialists(options, quiet=True)


def test_a_corpus_of_other_samples_is_refused(ground: Ground) -> None:
    with np.load(ground.data) as arrays:
        x, y = arrays["x"].copy(), arrays["y"]
    x[[5, 9]] = x[[9, 5]]
    np.savez(ground.folder / "swapped.npz", x=x, y=y)
    for options in (tried, fused):
        given = options(ground, data=str(ground.folder / "swapped.npz"))
        with pytest.raises(CorpusMismatchError, match=r"row 5 .* it was swapped with row 9"):
            _do(given)
    np.savez(ground.folder / "short.npz", x=x[:50], y=y[:50])
    with pytest.raises(CorpusMismatchError, match="expected 96 samples"):
        try_specialists(tried(ground, data=str(ground.folder / "short.npz")), quiet=True)
    wide = np.zeros((96, NUM_FEATURES + 1), np.float32)
    np.savez(ground.folder / "wide.npz", x=wide, y=y)
    with pytest.raises(CorpusError, match="--data"):
        try_specialists(tried(ground, data=str(ground.folder / "wide.npz")), quiet=True)
    np.savez(ground.folder / "wrong.npz", x=inputs_of(ground).numpy(), y=(y + 1) % 4)
    with pytest.raises(CorpusMismatchError, match="expected the hard target"):
        try_specialists(tried(ground, data=str(ground.folder / "wrong.npz")), quiet=True)


def test_stores_that_can_t_speak_for_the_generalist_are_refused(ground: Ground) -> None:
    corpus = open_corpus(ground.data)
    path = write_targets(ground.folder / "topk.zarr", corpus, encoding=TopK(2))
    with pytest.raises(MismatchError, match=r"expected dense or hidden, .* got topk: .* dump the generalist again"):
        try_specialists(tried(ground, targets=str(path)), quiet=True)
    with pytest.raises(MismatchError, match="expected dense or hidden"):
        fuse_store(fused(ground, targets=str(path)))
    names = ("a", "b", "c", "d")
    write_specialists(ground.folder / "named", ground, class_names=names)
    other = write_targets(ground.folder / "named.zarr", corpus, class_names=("a", "b", "d", "c"))
    with pytest.raises(MismatchError, match="expected class 2 to be 'c' as in the plan of the specialists, got 'd'"):
        try_specialists(tried(ground, targets=str(other), specialists=str(ground.folder / "named")), quiet=True)
    more = write_targets(ground.folder / "more.zarr", corpus, num_classes=6)
    with pytest.raises(MismatchError, match="expected the plan's 4 classes, got 6"):
        try_specialists(tried(ground, targets=str(more)), quiet=True)
    card = phase_folder(ground.folder / "specialists", 0, "hard") / CARD
    value = json.loads(card.read_text())
    for number in range(2):
        place = phase_folder(ground.folder / "specialists", number, "hard") / CARD
        there = json.loads(place.read_text())
        place.write_text(json.dumps(there | {"preprocess": value["preprocess"] | {"scale": 2.0}}))
    with pytest.raises(MismatchError, match="expected the preprocessing of the store"):
        try_specialists(tried(ground), quiet=True)


def test_a_store_of_another_teacher_is_refused(ground: Ground) -> None:
    with open_store(ground.targets) as store:
        teacher = store.manifest.teacher["digest"]
    for number in range(2):
        place = phase_folder(ground.folder / "specialists", number, "hard") / CARD
        value = json.loads(place.read_text())
        value["specialist"]["generalist"] = teacher if number == 0 else "f" * 64
        place.write_text(json.dumps(value))
    for options in (tried(ground), fused(ground)):
        with pytest.raises(
            MismatchError, match=r"expected what the generalist of specialist 1 said, got another teach"
        ):
            _do(options)


def test_hidden_states_say_what_their_head_makes_of_them(ground: Ground) -> None:
    generator = np.random.default_rng(0)
    head = HeadArrays(generator.normal(size=(NUM_CLASSES, 3)).astype(np.float32), None)
    hidden_NW = generator.normal(size=(5, 3)).astype(np.float32)
    with open_store(ground.targets) as store:
        manifest = replace(store.manifest, encoding=Hidden(3, "float32", head_sha256="0" * 64), format_version="")
    found_NC = stored_logprobs(manifest, {"hidden": hidden_NW}, head)
    expected_NC = torch.from_numpy(hidden_NW @ head.weight_CW.T).log_softmax(1)
    assert np.allclose(found_NC, expected_NC, atol=1e-6)


def test_options_that_contradict_each_other_are_refused(ground: Ground) -> None:
    with pytest.raises(ValueError, match="targets: expected --targets or --generalist, one of the two, got both"):
        tried(ground, targets="x", generalist="y")
    with pytest.raises(ValueError, match="one of the two, got neither"):
        tried(ground, targets=None)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        tried(ground, batch_size=0)
    result = run("eval", ground)
    assert result.exit_code == 2
    assert "expected --targets or --generalist" in result.output
    with pytest.raises(PathError, match=r"expected the folder of studenttrain .*, got one without plan.json"):
        try_specialists(tried(ground, specialists=str(ground.folder)), quiet=True)


# the store


def fused_of(ground: Ground) -> Tensor:
    """What a fused store of the ground has to say: log-probabilities (N, C)."""
    with open_store(ground.targets) as store:
        arrays = store.read(["values"], 0, 96)
    classifier = FusedClassifier.load(ground.folder / "specialists")
    return classifier.fuse(inputs_of(ground), torch.from_numpy(arrays["values"]).double().log_softmax(1)).logprobs_NC


def test_a_fused_store_says_the_fused_distribution_at_any_temperature(ground: Ground) -> None:
    result = fuse_store(fused(ground))
    assert result.num_rows == result.num_written == 96
    expected_NC = fused_of(ground)
    with open_store(result.path) as store, open_store(ground.targets) as source:
        names = [spec.name for spec in store.manifest.arrays]
        arrays = store.read(names, 0, 96)
        before = source.read(["sample_digest", "hard_target", "status"], 0, 96)
        for temperature in (1.0, 2.5):
            found_NC = store.manifest.encoding.logprobs(arrays, temperature, store.manifest.temperatures)
            wanted_NC = (expected_NC / temperature).log_softmax(1).numpy()
            assert np.allclose(found_NC, wanted_NC, atol=1e-5)
        for name, values in before.items():
            assert np.array_equal(arrays[name], values)
        assert (store.manifest.temperatures, store.manifest.encoding) == ((1.0, 4.0), Dense("float32"))
        hard_N = torch.from_numpy(arrays["hard_target"]).long()
        assert np.allclose(arrays["hard_target_logprob"], expected_NC.gather(1, hard_N[:, None])[:, 0], atol=1e-2)
        teacher, lineage = store.manifest.teacher, store.manifest.lineage
        assert lineage is not None
        assert lineage[-1]["content_digest"] == source.content_digest
        assert (teacher["kind"], teacher["fusion"]) == ("fused", {"active_top": 1, "tolerance": 1e-8})
        assert [member["kind"] for member in teacher["members"]] == ["weights", "specialist", "specialist"]
        assert teacher["members"][2]["classes"] == [1, 2, 3]
    assert verify(result.path).damage == ()
    assert "fused" in info_text(info(result.path))


def test_a_fused_topk_store_is_a_prefix_with_its_exact_tail(ground: Ground) -> None:
    options = fused(ground, "topk.zarr", encoding="topk", k=2, temperatures=(3.0, 1.0), values="float32")
    fuse_store(options)
    expected_NC = fused_of(ground)
    with open_store(options.out) as store:
        assert store.manifest.temperatures == (1.0, 3.0)
        assert store.manifest.compressor == "zstd"
        arrays = store.read([spec.name for spec in store.manifest.arrays], 0, 96)
        for column, temperature in enumerate(store.manifest.temperatures):
            logprobs_NC = (expected_NC / temperature).log_softmax(1)
            top = logprobs_NC.sort(1, descending=True)
            assert np.array_equal(arrays["ids"], top.indices[:, :2])
            assert np.allclose(arrays["log_tail"][:, column], top.values[:, 2:].logsumexp(1), atol=1e-5)
            kept_NK = store.manifest.encoding.logprobs(arrays, temperature, store.manifest.temperatures)[:, :2]
            assert np.allclose(kept_NK, top.values[:, :2], atol=1e-5)
    assert verify(options.out).damage == ()


def test_rows_without_targets_stay_without(tmp_path: Path) -> None:
    ground = generalist_ground(tmp_path, build_generalist(), refused=(3, 40))
    write_specialists(tmp_path / "specialists", ground)
    result = fuse_store(fused(ground))
    assert (result.num_quarantined, result.num_written) == (2, 94)
    with open_store(result.path) as store, open_store(ground.targets) as source:
        assert store.quarantine() == source.quarantine()
        assert np.isnan(store.read(["values"], 3, 4)["values"]).all()
        before, after = (it.read(["hard_target"], 3, 4)["hard_target"] for it in (source, store))
        assert np.array_equal(after, before)


@pytest.mark.parametrize("suffix", ["zarr", "h5"])
def test_a_fusion_that_was_stopped_goes_on_to_the_same_store(ground: Ground, suffix: str) -> None:
    undisturbed = fuse_store(fused(ground, "whole.zarr")).content_digest
    options, calls = fused(ground, f"stopped.{suffix}"), []

    def stop(count: int) -> None:
        calls.append(count)
        if len(calls) == 4:  # nothing yet; three shards of 16 rows
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse_store(options, progress=lambda _: stop)
    with open_store(options.out) as store:
        assert 0 < store.num_sealed_rows < 96
        sealed = store.num_sealed_rows
    with pytest.raises(MismatchError, match=r"teacher.fusion.tolerance|teacher.digest"):
        fuse_store(replace(options, tolerance=1e-6))
    total = []
    result = fuse_store(options, progress=lambda count: total.append(count) or total.append)  # type: ignore[func-returns-value]
    assert result.content_digest == undisturbed
    assert result.num_written == 96 - sealed
    assert sum(total[1:]) == total[0] == 192
    assert "written now" in fused_text(result)
    again = fuse_store(options)
    assert (again.content_digest, again.num_written) == (undisturbed, 0)
    assert "written now" not in fused_text(again)


def test_a_store_that_is_none_of_this_fusion_is_left_alone(ground: Ground) -> None:
    other = write_targets(ground.folder / "other.zarr", open_corpus(ground.data))
    with pytest.raises(MismatchError, match="expected nothing, or this fusion begun, got another store"):
        fuse_store(fused(ground, "other.zarr"))
    with pytest.raises(PathError, match="expected a path outside"):
        fuse_store(fused(ground, Path(ground.targets).name))
    with open_store(other) as store:
        assert store.manifest.teacher["kind"] == "weights"


def test_specialists_that_were_fused_in_already_are_refused(ground: Ground) -> None:
    path = fuse_store(fused(ground)).path
    for options in (fused(ground, "again.zarr", targets=path), tried(ground, targets=path)):
        with pytest.raises(MismatchError, match="got one that specialist 0 was fused into already; give the general"):
            _do(options)
    write_specialists(ground.folder / "next", ground, shift=0.1)
    for number in range(2):  # of a second round
        at = phase_folder(ground.folder / "next", number, "hard")
        save_weights(at / WEIGHTS, cut_head(build_generalist(20 + number), CLASSES[number], SHAPE, "test").eval())
    again = fuse_store(fused(ground, "again.zarr", targets=path, specialists=str(ground.folder / "next")))
    assert again.num_active


def test_a_store_that_is_not_finalized_is_refused(tmp_path: Path) -> None:
    ground = generalist_ground(tmp_path, build_generalist(), finalize=False)
    write_specialists(tmp_path / "specialists", ground)
    with pytest.raises(NotSealedError, match="expected a finalized store"):
        fuse_store(fused(ground))


def test_a_store_of_a_part_of_the_shards_is_fused_at_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ground = generalist_ground(tmp_path, build_generalist(), shards=(0, 2))
    write_specialists(tmp_path / "specialists", ground)
    assert fuse_store(fused(ground)).num_rows == 32
    assert try_specialists(tried(ground)).fused.num_samples == 32
    assert "32 of 96 rows are sealed; these are tried" in capsys.readouterr().err


def test_options_of_another_encoding_are_refused(ground: Ground) -> None:
    with pytest.raises(ValueError, match="k: expected how many entries topk keeps, got none"):
        fused(ground, encoding="topk")
    with pytest.raises(ValueError, match="k: expected none with dense, got 3"):
        fused(ground, k=3)
    with pytest.raises(ValueError, match="encoding: expected dense or topk, got 'hidden'"):
        fused(ground, encoding="hidden")
    with pytest.raises(ValueError, match="values: expected float16 or float32 or uint8, got 'int4'"):
        fused(ground, values="int4")
    with pytest.raises(ValueError, match=r"temperatures: expected numbers above 0, got \[0.0, 1.0\]"):
        fused(ground, temperatures=(1.0, 0.0))
    with pytest.raises(ValueError, match="readers: expected at least 1, got 0"):
        fused(ground, readers=0)
    with pytest.raises(ValueError, match=r"k: expected at most the number of classes \(4\), got 5"):
        fuse_store(fused(ground, encoding="topk", k=5))


def test_a_student_learns_from_a_fused_store_made_by_the_command(
    ground: Ground, no_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del no_report
    monkeypatch.setattr("torch.export.export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not in a test")))
    out = ground.folder / "fused.zarr"
    result = run("fuse", ground, "--targets", str(ground.targets), "--out", str(out), "-q")
    assert result.exit_code == 0
    assert result.output.startswith(f"{out}: 96 rows, dense values=float32, ")
    assert "written now: 96 rows" in result.output
    again = run("fuse", ground, "--targets", str(ground.targets), "--out", str(out), "--json")
    assert json.loads(again.output)["num_written"] == 0
    assert fit(replace(ground, targets=out).config(epochs=1), quiet=True) is not None


# what can't be fused


def test_a_series_is_refused_for_one_of_its_stores(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studenttrain.specialists.evaluation.Series", Store)
    with pytest.raises(MismatchError, match="expected one store of the corpus, got a series of them; give a member"):
        try_specialists(tried(ground), quiet=True)


def test_sequences_have_no_specialists(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, specialists = load_folder(ground.folder / "specialists", None)
    with (
        open_store(make_token_ground(tmp_path / "tokens").targets) as store,
        pytest.raises(StudentError, match="expected one whose rows have a class, got sequences of tokens"),
    ):
        check_generalist_store(store, plan, specialists)
    card = replace(specialists[0].card, specialist=None, sequences={"num_positions": 4})
    monkeypatch.setattr("studenttrain.specialists.fused.load_student", lambda _: (build_generalist(), card))
    with pytest.raises(StudentError, match="expected a model of all classes, got a language model"):
        load_generalist("runs/lm", plan, specialists)


def test_a_sample_that_can_t_be_decoded_any_more_stops_the_fusion(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*given: Any) -> Iterator[Batch]:
        for batch in read_ahead(*given):
            batch.errors[2] = "a decoder that is gone"
            yield batch

    monkeypatch.setattr("studenttrain.specialists.fuse_store.read_ahead", damaged)
    with pytest.raises(
        MismatchError, match=r"row 2: expected a sample that can be decoded, .* \(a decoder that is gone\)"
    ):
        fuse_store(fused(ground))
