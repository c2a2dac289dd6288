"""`specialists plan`: classes that are confused come together, and the plan's file is what it says."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from storage.arrays import Array
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.errors import PathError, StudentError
from storage.reader import open_store
from storage.scan.covariance import covariance
from storage.writer import StoreWriter
from studenttrain.checks import store_identity
from studenttrain.cli import main
from studenttrain.specialists.clusters import ClusterOptions, find_clusters, tightness
from studenttrain.specialists.plan import SpecialistsPlan, load_plan, plan_text, write_plan
from studenttrain.specialists.plan_picture import caption, class_order, ordered_correlation, write_plan_picture
from studenttrain.specialists.planning import plan_from_store
from tests.storage.scan_stores import manifest_of
from tests.storage.soft_targets import encode_rows

BLOCKS = ((0, 5, 9), (1, 2), (3, 7, 8, 11), (4, 6, 10))
NAMES = tuple(f"class {label}" for label in range(12))


def confused_logits(num_rows: int = 600, seed: int = 0) -> Array:
    """Logits of a generalist that hesitates between the classes of a block, and knows the block."""
    generator = np.random.default_rng(seed)
    block_C = np.zeros(12, np.int64)
    for number, classes in enumerate(BLOCKS):
        block_C[list(classes)] = number
    block_N = generator.integers(0, len(BLOCKS), num_rows)
    logits_NC = generator.normal(0, 1, (num_rows, 12)) + 5 * (block_N[:, None] == block_C)
    found_NC: Array = logits_NC.astype(np.float32)
    return found_NC


def write_confused(
    path: Path, encoding: Encoding | None = None, shards: int = 3, logits_NC: Array | None = None, **fields: Any
) -> Path:
    """A store of 600 such rows, or others, in three shards, so many of them sealed."""
    logits_NC = confused_logits() if logits_NC is None else logits_NC
    options: dict[str, Any] = {"num_rows": 600, "num_classes": 12, "shard_rows": 200, "chunk_rows": 100}
    options |= {"temperatures": (1.0,), "class_names": NAMES, "has_hard_targets": False}
    manifest = manifest_of(encoding=encoding, **(options | fields))
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(shards):
            rows = np.arange(*manifest.layout.shard_bounds(shard))
            arrays = {spec.name: np.zeros((len(rows), *spec.row_shape), spec.dtype) for spec in manifest.arrays}
            writer.write_shard(shard, arrays | encode_rows(manifest, rows, logits_NC[rows], None))
        if shards == 3:
            writer.finalize()
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_confused(tmp_path_factory.mktemp("confused") / "a.zarr")


def covariance_of(logits_NC: Array) -> Array:
    exps_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    found_CC: Array = np.cov((exps_NC / exps_NC.sum(axis=1, keepdims=True)).T, bias=True).astype(np.float32)
    return found_CC


def a_plan(**fields: Any) -> SpecialistsPlan:
    options: dict[str, Any] = {
        "num_classes": 12,
        "class_names": NAMES,
        "store": {"digest": "ab" * 32, "content_digest": None},
        "specialists": ((0, 5, 9), (1, 2)),
    }
    return SpecialistsPlan(**(options | fields))


def run_plan(*words: object) -> Result:
    return CliRunner().invoke(main, ["specialists", "plan", *map(str, words)])


@pytest.mark.parametrize("encoding", [Dense("float16"), TopK(4), Sample(40)])
def test_planted_blocks_are_found(tmp_path: Path, encoding: Encoding) -> None:
    path = write_confused(tmp_path / "a.zarr", encoding)
    made, is_written = plan_from_store(str(path), tmp_path / "plan.json", ClusterOptions(4))
    assert is_written
    assert sorted(made.plan.specialists) == sorted(BLOCKS)
    assert [len(classes) for classes in made.plan.specialists] == [4, 3, 3, 2]
    assert made.plan.uncovered == ()
    assert load_plan(tmp_path / "plan.json") == made.plan
    for cluster in made.clusters.specialists:
        assert cluster.within is not None
        assert cluster.outside is not None
        assert cluster.within > 0.05 > 0 > cluster.outside
    with open_store(path) as opened:
        assert made.plan.store == store_identity(opened)


def test_a_pair_that_only_its_classes_confuse_comes_together() -> None:
    """With a class's own 1, or with 0, in its column, such a pair has columns at right angles."""
    correlation_CC = np.full((12, 12), -0.05, np.float32)
    correlation_CC[6:, 6:] = 0.02
    for one, two in ((0, 1), (2, 3), (4, 5)):
        correlation_CC[one, two] = correlation_CC[two, one] = 0.12
    np.fill_diagonal(correlation_CC, 1)
    found = find_clusters(correlation_CC, ClusterOptions(4))
    assert {(0, 1), (2, 3), (4, 5)} < {cluster.classes for cluster in found.specialists}


def test_the_same_seed_finds_the_same_and_the_scale_of_a_class_does_not_matter() -> None:
    covariance_CC = covariance_of(confused_logits(200))
    scale_C = np.geomspace(0.01, 1, 12)
    scaled_CC = (covariance_CC * scale_C * scale_C[:, None]).astype(np.float32)
    assert find_clusters(covariance_CC, ClusterOptions(5, seed=3)) == find_clusters(
        covariance_CC.copy(), ClusterOptions(5, seed=3)
    )
    plain, scaled = (find_clusters(each, ClusterOptions(4)) for each in (covariance_CC, scaled_CC))
    assert [cluster.classes for cluster in plain.specialists] == [cluster.classes for cluster in scaled.specialists]


def test_the_covariance_is_left_as_it_was() -> None:
    covariance_CC = covariance_of(confused_logits(200))
    for on in ("correlation", "covariance"):
        before_CC = covariance_CC.copy()
        find_clusters(covariance_CC, ClusterOptions(4, on=on))
        np.testing.assert_allclose(covariance_CC, before_CC, rtol=1e-6)


def test_each_may_have_as_many_classes_as_are_asked_for_and_then_they_overlap() -> None:
    found = find_clusters(covariance_of(confused_logits()), ClusterOptions(4, classes_each=5))
    assert {len(cluster.classes) for cluster in found.specialists} == {5}
    for block in BLOCKS:
        assert any(set(block) <= set(cluster.classes) for cluster in found.specialists)
    assert sum(len(cluster.classes) for cluster in found.specialists) > 12


def test_small_clusters_are_no_specialists() -> None:
    found = find_clusters(covariance_of(confused_logits()), ClusterOptions(4, min_classes=3))
    assert sorted(cluster.classes for cluster in found.specialists) == sorted(BLOCKS[:1] + BLOCKS[2:])
    assert (found.num_small, found.num_same) == (1, 0)


def test_a_class_that_never_varies_is_in_no_specialist() -> None:
    covariance_CC = covariance_of(confused_logits())
    covariance_CC[3] = covariance_CC[:, 3] = 0
    found = find_clusters(covariance_CC, ClusterOptions(4))
    assert found.apart == (3,)
    assert sorted(cluster.classes for cluster in found.specialists) == sorted([*BLOCKS[:2], (7, 8, 11), BLOCKS[3]])


def test_a_class_that_is_confused_with_no_other_is_in_no_specialist() -> None:
    correlation_CC = np.full((8, 8), -0.05, np.float32)
    for one, two in ((0, 1), (2, 3), (4, 5)):
        correlation_CC[one, two] = correlation_CC[two, one] = 0.12
    np.fill_diagonal(correlation_CC, 1)
    found = find_clusters(correlation_CC, ClusterOptions(3))
    assert [cluster.classes for cluster in found.specialists] == [(0, 1), (2, 3), (4, 5)]
    assert found.apart == (6, 7)


def test_columns_that_are_the_same_make_fewer_clusters_which_is_said() -> None:
    covariance_CC = np.kron(np.eye(3), np.ones((4, 4))).astype(np.float32)
    found = find_clusters(covariance_CC, ClusterOptions(5))
    assert [cluster.classes for cluster in found.specialists] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert found.num_same == 2


def test_tightness_is_the_mean_correlation() -> None:
    covariance_CC = covariance_of(confused_logits())
    deviation_C = np.sqrt(np.diag(covariance_CC))
    correlation_CC = covariance_CC / deviation_C / deviation_C[:, None]
    within, outside = tightness(covariance_CC, (1, 2))
    assert within == pytest.approx(correlation_CC[1, 2], abs=1e-5)
    assert outside == pytest.approx(np.delete(correlation_CC[[1, 2]], [1, 2], axis=1).mean(), abs=1e-5)
    assert tightness(covariance_CC, (4,))[0] is None
    assert tightness(covariance_CC, tuple(range(12)))[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_specialists": 1}, "num_specialists: expected 2 to 6 specialists of at least 2 classes for 12 classes"),
        ({"num_specialists": 7}, "num_specialists: expected 2 to 6 specialists .* got 7"),
        ({"num_specialists": 13, "classes_each": 3}, "num_specialists: expected 1 to 12 specialists for 12 .* got 13"),
        ({"num_specialists": 3, "classes_each": 12}, r"classes_each: expected 2 \(min_classes\) to 11, .* got 12"),
        ({"num_specialists": 3, "classes_each": 1}, r"classes_each: expected 2 \(min_classes\) to 11, .* got 1"),
        (
            {"num_specialists": 2, "min_classes": 7},
            "min_classes: expected at most half of the 12 classes, .* got 7; giv",
        ),
        ({"num_specialists": 3, "min_classes": 0}, "min_classes: expected at least 1, got 0"),
        ({"num_specialists": 3, "on": "logits"}, "on: expected one of correlation, covariance, got 'logits'"),
        ({"num_specialists": 3, "seed": -1}, "seed: expected 0 to 4294967295, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_clusters(np.eye(12, dtype=np.float32), ClusterOptions(**options))


def test_a_store_without_clusters_is_refused() -> None:
    with pytest.raises(
        StudentError, match=r"expected at least 4 classes that are confused with another one, got 0; use a"
    ):
        find_clusters(np.zeros((12, 12), np.float32), ClusterOptions(4))
    with pytest.raises(StudentError, match="expected clusters of at least 2 classes, got one of all classes; use ano"):
        find_clusters(np.ones((12, 12), np.float32), ClusterOptions(4))
    pairs_CC = np.kron(np.eye(2), np.ones((2, 2))).astype(np.float32)
    with pytest.raises(StudentError, match="expected clusters of at least 3 classes, got none of 2; use another"):
        find_clusters(pairs_CC, ClusterOptions(2, classes_each=3, min_classes=3))


def test_without_scikit_learn_it_says_what_to_install(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    result = run_plan("--targets", store, "--num-specialists", 4, "--out", tmp_path / "plan.json")
    assert result.exit_code == 1
    assert "pip install 'logitstore[specialists]'" in result.stderr


def test_the_command_prints_the_classes_of_each_and_may_be_repeated(store: Path, tmp_path: Path) -> None:
    words = ("--targets", store, "--num-specialists", 4, "--out", tmp_path / "plan.json")
    first = run_plan(*words)
    assert first.exit_code == 0, first.stderr
    assert "4 specialists for 12 classes, by the correlation over 600 rows" in first.stdout
    assert "class 3, class 7, class 8, class 11" in first.stdout
    before = (tmp_path / "plan.json").stat().st_mtime_ns
    again = run_plan(*words)
    assert again.exit_code == 0
    assert "plan.json, as it was: 4 specialists" in again.stdout
    assert (tmp_path / "plan.json").stat().st_mtime_ns == before


def test_another_plan_is_only_replaced_by_force(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    words = ("--targets", store, "--out", out, "-q")
    assert run_plan(*words, "--num-specialists", 4).exit_code == 0
    other = run_plan(*words, "--num-specialists", 3, "--seed", 5)
    assert other.exit_code == 1
    assert (
        "got one that was made with --num-specialists 4, --seed 0; give --out another path, or --force" in other.stderr
    )
    made = load_plan(out)
    write_plan(out, replace(made, specialists=((0, 1),)))
    assert "got one of other rows, or changed by hand" in run_plan(*words, "--num-specialists", 4).stderr
    write_plan(out, replace(made, how={}))
    assert "got one that was made by hand" in run_plan(*words, "--num-specialists", 4).stderr
    write_plan(out, replace(made, store={"digest": "0", "content_digest": None}))
    assert "got one of another store" in run_plan(*words, "--num-specialists", 4).stderr
    assert run_plan(*words, "--num-specialists", 4, "--force").exit_code == 0
    assert load_plan(out) == made


def test_what_is_no_plan_is_never_replaced(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = ("--targets", store, "--num-specialists", 4, "--force", "--out")
    result = run_plan(*words, tmp_path / "notes.txt")
    assert result.exit_code == 1
    assert "expected a plan of specialists, or nothing, got something else" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "expected a folder to write into, got none" in run_plan(*words, tmp_path / "no" / "plan.json").stderr
    assert "expected a plan of specialists, or nothing" in run_plan(*words, tmp_path).stderr
    assert "plan: expected a path on this machine, got a URL" in run_plan(*words, "s3://bucket/plan.json").stderr


def test_json_is_the_plan_and_notes_say_what_is_left_out(tmp_path: Path) -> None:
    path = write_confused(tmp_path / "a.zarr", TopK(3), shards=2)
    words = ("--targets", path, "--num-specialists", 4, "--out", tmp_path / "p.json", "--json", "--min-classes", 3)
    result = run_plan(*words)
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["uncovered"] == [1, 2]
    assert value["how"]["num_distributions"] == 400
    assert value["how"]["options"]["min_classes"] == 3
    assert SpecialistsPlan.from_json(value) == load_plan(tmp_path / "p.json")
    assert "note: the store is not finished: 400 of 600 rows are in the plan" in result.stderr
    assert "% of the probability is left out" in result.stderr
    assert "note: 1 cluster of fewer than 3 classes" in result.stderr
    assert "note" not in run_plan(*words, "-q").stderr


def test_draws_are_said_to_be_biased(tmp_path: Path) -> None:
    path = write_confused(tmp_path / "a.zarr", Sample(40))
    result = run_plan("--targets", path, "--num-specialists", 4, "--out", tmp_path / "p.json")
    assert "an entry of the covariance is off by up to 0.00016" in result.stderr


def test_a_class_that_is_confused_with_none_is_not_said_to_be_the_same_in_every_row(tmp_path: Path) -> None:
    logits_NC = confused_logits()
    logits_NC[:, 6] = np.where(np.arange(600) % 10 == 0, 30, -30)  # sure of it in some rows, of others in the rest
    words = ("--num-specialists", 4, "--out", tmp_path / "plan.json", "--targets")
    result = run_plan(*words, write_confused(tmp_path / "a.zarr", logits_NC=logits_NC))
    assert "note: 1 class that is confused with no other one: in no specialist" in result.stderr
    logits_NC[:, 6] = -200
    result = run_plan(*words, write_confused(tmp_path / "b.zarr", logits_NC=logits_NC), "--force")
    assert "note: 1 class with the same probability in every row: in no specialist" in result.stderr


def test_a_picture_says_what_its_boxes_are() -> None:
    overlapping = a_plan(specialists=((0, 5, 9), (1, 2, 5)))
    assert caption(a_plan()) == "boxes: the classes of a specialist; the last 7 are in none"
    assert caption(overlapping) == "boxes: the classes that a specialist is the first to have; the last 7 are in none"
    rest = tuple(label for label in range(12) if label not in (0, 5, 9))
    assert caption(a_plan(specialists=((0, 5, 9), rest))) == "boxes: the classes of a specialist"
    assert caption(a_plan(specialists=((0, 5), rest))) == "boxes: the classes of a specialist; the last one is in none"


def test_a_picture_of_partition_and_of_overlapping_classes_is_drawn(store: Path, tmp_path: Path) -> None:
    words = ("--targets", store, "--num-specialists", 4, "-q")
    for name, more in (("a", ()), ("b", ("--classes-each", 5))):
        out = ("--out", tmp_path / f"{name}.json", "--picture", tmp_path / f"{name}.png")
        result = run_plan(*words, *out, *more)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture: expected a path that ends in .png, got 'a.svg'; rename it"):
        write_plan_picture(tmp_path / "a.svg", a_plan(), np.eye(12))
    with pytest.raises(PathError, match="expected a folder to write into, got none"):
        write_plan_picture(tmp_path / "no" / "a.png", a_plan(), np.eye(12))


def test_a_picture_has_the_classes_of_a_specialist_side_by_side() -> None:
    plan = a_plan(specialists=((3, 5), (1, 3, 7)))
    order, starts = class_order(plan)
    assert order.tolist() == [3, 5, 1, 7, 0, 2, 4, 6, 8, 9, 10, 11]
    assert starts == [0, 2, 4]
    covariance_CC = covariance_of(confused_logits(100))
    deviation_C = np.sqrt(np.diag(covariance_CC))
    correlation_CC = covariance_CC / deviation_C / deviation_C[:, None]
    np.fill_diagonal(correlation_CC, np.nan)
    shown_PP = ordered_correlation(covariance_CC, order, 1)
    np.testing.assert_allclose(shown_PP, correlation_CC[np.ix_(order, order)], rtol=1e-4)
    coarse_PP = ordered_correlation(covariance_CC, order, 5)
    assert coarse_PP.shape == (3, 3)
    assert coarse_PP[0, 1] == pytest.approx(np.nanmean(shown_PP[:5, 5:10]), rel=1e-4)
    assert coarse_PP[2, 2] == pytest.approx(shown_PP[10, 11], rel=1e-4)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    hard_names = tuple(f'"specialists": "@" \ud800 ä {label}' for label in range(12))
    for names in (NAMES, None, hard_names):
        plan = a_plan(class_names=names, how={"seed": 1, "figures": [1.5, None]})
        write_plan(tmp_path / "plan.json", plan)
        assert load_plan(tmp_path / "plan.json") == plan
    assert '  "specialists": [\n    [0, 5, 9],\n    [1, 2]\n  ]' in plan_text(a_plan())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected a whole number, at least 2, got 1"),
        ({"class_names": ("a",)}, "class_names: expected one for each of 12 classes, got 1"),
        ({"specialists": ()}, "specialists: expected at least one, got none"),
        ({"specialists": ((0,), ())}, "specialists: number 1: expected 1 to 11 classes, .* got 0"),
        ({"specialists": (tuple(range(12)),)}, "specialists: number 0: expected 1 to 11 classes, .* got 12"),
        ({"specialists": ((0, 12),)}, "specialists: number 0: expected classes from 0 to 11, got 12"),
        ({"specialists": ((True, 3),)}, "specialists: number 0: expected classes from 0 to 11, got True"),
        ({"specialists": ((3, 1),)}, "specialists: number 0: expected classes ascending, each once"),
        ({"specialists": ((3, 3),)}, "specialists: number 0: expected classes ascending, each once"),
    ],
)
def test_a_plan_that_can_t_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_plan(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected a plan of specialists, got another JSON; make a plan"),
        ({"version": 2}, "expected version 1, got 2; install a newer release"),
        ({"version": "1"}, "expected a version, got '1'"),
        ({"specialists": [[0, 99]]}, "specialists: number 0: expected classes from 0 to 11, got 99; make a plan"),
        ({"specialists": [[0, 1.5]]}, "specialists: number 0: expected classes from 0 to 11, got 1.5"),
        ({"specialists": {"a": [0]}}, "specialists: expected lists of classes, got something else"),
        ({"num_classes": "12"}, "num_classes: expected a whole number, at least 2, got '12'"),
        ({"class_names": "abcdefghijkl"}, "class_names: expected a list of names, or null"),
        ({"store": []}, "store: expected an object"),
        ({"store": {"digest": 3}}, "store: expected digest to be a digest"),
        ({"store": {}}, "store: expected its digest, got none"),
        ({"how": 1}, "how: expected an object"),
    ],
)
def test_a_plan_that_somebody_else_made_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(a_plan().to_json() | change))
    with pytest.raises(StudentError, match=message) as caught:
        load_plan(path)
    assert str(caught.value).startswith(f"plan '{path}'")


def test_what_is_no_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PathError, match="expected a file, got nothing there; make a plan: studenttrain specialists pl"):
        load_plan(path)
    for data in (b"", b"{", b"\xff\x00", b"[" * 5000, b'{"format": 1, "format": 2}', b'{"how": NaN}'):
        path.write_bytes(data)
        with pytest.raises(StudentError, match="expected JSON, got something else; make a plan"):
            load_plan(path)
    path.write_text("[]")
    with pytest.raises(StudentError, match="expected a plan of specialists, got another JSON"):
        load_plan(path)
    value = a_plan().to_json()
    del value["how"]
    path.write_text(json.dumps(value))
    with pytest.raises(StudentError, match="expected 'how', got none"):
        load_plan(path)
    monkeypatch.setattr("studenttrain.specialists.plan.MAX_PLAN_BYTES", 10)
    with pytest.raises(StudentError, match="expected at most 0 MiB, got more"):
        load_plan(path)


def test_the_plan_needs_nothing_but_the_rows(store: Path) -> None:
    with open_store(store) as opened:
        found = covariance(opened)
    np.testing.assert_allclose(found.covariance_CC, covariance_of(confused_logits()), atol=1e-4)
