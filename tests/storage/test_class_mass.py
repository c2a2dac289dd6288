"""The mean soft-target mass of each class: that of the logits, whatever the encoding, the threads and the numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from storage.arrays import Array
from storage.cli import main
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.errors import DamageError, MismatchError, NotSealedError
from storage.manifest import Manifest
from storage.reader import open_store
from storage.scan import stats
from storage.scan.class_mass import MassCounts, class_mass, starved_classes
from storage.scan.picture import write_picture
from storage.writer import StoreWriter
from tests.storage.scan_stores import BLURRED, BROKEN, hard_targets_of, logits_of, manifest_of, shard_of, write_store
from tests.storage.soft_targets import hidden_encoding, num_positions_of, sequences_of

ROWS = [row for row in range(22) if row not in (BLURRED, BROKEN)]


def probs_of(manifest: Manifest) -> Array:
    """softmax of the logits that are counted, float64."""
    logits_RC = logits_of(manifest).astype(np.float64)
    row_R = np.repeat(np.isin(np.arange(manifest.num_rows), ROWS), num_positions_of(manifest))
    if manifest.sequences is not None:
        row_R &= hard_targets_of(manifest) >= 0
    exps_RC = np.exp(logits_RC[row_R] - logits_RC[row_R].max(axis=1, keepdims=True))
    probs_RC: Array = exps_RC / exps_RC.sum(axis=1, keepdims=True)
    return probs_RC


@pytest.mark.parametrize(
    ("encoding", "sequences", "within"),
    [
        (Dense("float32"), None, 1e-6),
        (Dense("float16"), None, 1e-3),
        (Dense("uint8"), None, 2e-2),
        (hidden_encoding(5, 4, values="float32", soft_cap=9.0, has_bias=True), None, 1e-6),
        (Sample(255), None, 4e-3),
        (TopK(5), None, 1e-3),
        (Dense("float32"), sequences_of(3), 1e-6),
        (hidden_encoding(5, 4, values="float32"), sequences_of(3), 1e-6),
        (Sample(255), sequences_of(3), 4e-3),
    ],
)
@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_the_mass_is_the_mean_of_the_teachers_probabilities(
    tmp_path: Path, encoding: Encoding, sequences: Any, within: float, suffix: str
) -> None:
    manifest = manifest_of(encoding=encoding, sequences=sequences)
    path = write_store(tmp_path / f"a{suffix}", manifest)
    probs_RC = probs_of(manifest)
    found = class_mass(path)
    np.testing.assert_allclose(found.mean, probs_RC.mean(axis=0), atol=within)
    assert sum(found.mean) == pytest.approx(1, abs=1e-6)
    assert found.tail == pytest.approx(0, abs=1e-6)
    top1_R = probs_RC.argmax(axis=1)
    for index, share in enumerate(found.elsewhere):
        assert share == pytest.approx(probs_RC[top1_R != index, index].mean(), abs=2 * within)
    figures = stats(path)
    assert figures.class_mass == found
    assert figures.class_mass_unknown is None
    json.dumps(figures.to_json(), allow_nan=False)


def test_what_topk_does_not_keep_is_told_as_the_tail(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=TopK(2, "float32"))
    found = class_mass(write_store(tmp_path / "a.zarr", manifest))
    probs_RC = probs_of(manifest)
    kept_RC = probs_RC >= np.sort(probs_RC, axis=1)[:, -2:-1]
    np.testing.assert_allclose(found.mean, (probs_RC * kept_RC).mean(axis=0), atol=1e-6)
    assert found.tail == pytest.approx((probs_RC * ~kept_RC).sum(axis=1).mean(), abs=1e-6)
    assert sum(found.mean) + found.tail == pytest.approx(1, abs=1e-6)


def test_more_classes_than_ids_give_the_same_mass_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(num_rows=64, num_classes=400, encoding=TopK(3), class_names=None, has_hard_targets=False)
    path = write_store(tmp_path / "a.zarr", manifest)
    with open_store(path) as store:
        rows = store.read(["ids", "values", "lse", "log_tail"], 4, 12)
        sparse, dense = MassCounts(store), MassCounts(store)
        sparse.add(rows, None)
        for _ in range(17):  # 400 classes, 408 ids
            dense.add({name: np.concatenate([values] * 17) for name, values in rows.items()}, None)
        np.testing.assert_allclose(sparse.mass().mean, dense.mass().mean, atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", [Dense("float16"), TopK(2), hidden_encoding(5, 4)])
def test_the_mass_is_the_same_for_any_number_of_threads(tmp_path: Path, encoding: Encoding) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(num_rows=60, encoding=encoding))
    assert class_mass(path, num_workers=1) == class_mass(path, num_workers=4)


@pytest.mark.parametrize("encoding", [TopK(2), Sample(8)])
def test_a_store_that_is_not_exact_at_temperature_1_says_why_it_has_no_mass(tmp_path: Path, encoding: Encoding) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(encoding=encoding, temperatures=(4.0,)))
    reason = f"its {encoding.name} targets are exact at T = 4 only"
    with pytest.raises(MismatchError, match=f"exact at T = 1, for the mass of each class, got none: {reason}; use a"):
        class_mass(path)
    figures = stats(path)
    assert (figures.class_mass, figures.class_mass_unknown) == (None, reason)
    done = CliRunner().invoke(main, ["stats", str(path)])
    assert f"class mass       not known at T = 1: {reason}" in done.stdout
    write_picture(figures, tmp_path / "a.html")


def test_a_store_without_rows_to_count_has_no_mass(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=0, finalize=False)
    with pytest.raises(NotSealedError, match="expected rows with targets to count, got none; resume the dump first"):
        class_mass(path)


def test_targets_that_are_no_numbers_are_damage(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=3, encoding=Dense("float32"))
    arrays, quarantine = shard_of(manifest, 0)
    arrays["values"][1, 2] = np.nan
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        writer.write_shard(0, arrays, quarantine)
    for count in (stats, class_mass):
        with pytest.raises(DamageError, match="expected finite soft targets, got others in rows that have some; see"):
            count(tmp_path / "a.zarr")


def test_ids_beyond_the_classes_are_damage(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=3, encoding=TopK(2))
    arrays, quarantine = shard_of(manifest, 0)
    arrays["ids"][1, 1] = 7
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        writer.write_shard(0, arrays, quarantine)
    with pytest.raises(DamageError, match="expected classes below 5, got 7; see what else is wrong"):
        class_mass(tmp_path / "a.zarr")


def test_many_distributions_do_not_overflow_their_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(write_store(tmp_path / "a.zarr", manifest_of())) as store:
        monkeypatch.setattr(type(store), "num_sealed_rows", property(lambda _: 1 << 50))
        counts = MassCounts(store)
        for _ in range(3):
            counts._add_classes(0, np.full(5, 2.0**48))
        assert counts._mass_C.min() > 0
        assert math.isclose(counts._mass_C[0] * counts._unit, 3 * 2.0**48)


def store_of_few(path: Path, share: float, num_rows: int = 60) -> Path:
    """A store of 5 classes, one of which has this share of each row."""
    names = ("ant", "bee", "cat", "dog", "eel")
    manifest = manifest_of(num_rows=num_rows, encoding=Dense("float32"), class_names=names, has_hard_targets=False)
    probs_NC = np.full((num_rows, 5), (1 - share) / 4)
    probs_NC[:, 2] = share
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(manifest.layout.num_shards):
            start, stop = manifest.layout.shard_bounds(shard)
            arrays = manifest.encoding.encode(np.log(probs_NC[start:stop]).astype(np.float32), manifest.temperatures)
            arrays |= {"status": np.zeros(stop - start, np.uint8), "sample_digest": np.ones(stop - start, np.uint64)}
            writer.write_shard(shard, arrays)
    return path


def test_a_class_below_a_tenth_of_an_equal_share_is_starved(tmp_path: Path) -> None:
    path = store_of_few(tmp_path / "a.zarr", 0.019)
    assert stats(path).starved_classes == (2,)
    done = CliRunner().invoke(main, ["stats", str(path)])
    line = "starved classes  1 of 5 have less than a tenth of an equal share of the mass: cat 1.9 %; students of this"
    assert line in done.stdout
    assert "studenttrain calibrate" in done.stdout
    assert "class mass       1.9 % (cat) to 24.5 % (ant) in the mean, at T = 1; an equal share is 20 %" in done.stdout
    write_picture(stats(path), tmp_path / "a.html")
    assert "1.9 % (starved)" in (tmp_path / "a.html").read_text()
    assert stats(store_of_few(tmp_path / "b.zarr", 0.021)).starved_classes == ()


def test_of_a_few_classes_in_a_store_all_others_are_starved() -> None:
    mass_C = np.array([0.004, 0.003, 0.006, 0.487, 0.5])
    assert starved_classes(mass_C, 1000) == (0, 1, 2)  # the median class is starved too


def test_few_rows_starve_no_class(tmp_path: Path) -> None:
    assert stats(store_of_few(tmp_path / "a.zarr", 0.001, num_rows=48)).starved_classes == ()
    assert starved_classes(np.array([0, 49]), 19) == ()
    assert starved_classes(np.array([0, 49]), 20) == (0,)
    assert starved_classes(np.array([3.0]), 100) == ()


def test_without_mass_the_top1_tells_which_classes_are_starved(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=64, encoding=TopK(1), temperatures=(4.0,), has_hard_targets=False)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        for shard in range(manifest.layout.num_shards):
            start, stop = manifest.layout.shard_bounds(shard)
            logits_NC = np.zeros((stop - start, 5), np.float32)
            logits_NC[np.arange(stop - start), np.arange(start, stop) % 4] = 9
            arrays = manifest.encoding.encode(logits_NC, manifest.temperatures)
            arrays |= {"status": np.zeros(stop - start, np.uint8), "sample_digest": np.ones(stop - start, np.uint64)}
            writer.write_shard(shard, arrays)
    assert stats(tmp_path / "a.zarr").starved_classes == (4,)
    done = CliRunner().invoke(main, ["stats", str(tmp_path / "a.zarr")])
    assert "an equal share of the top-1: class 4; students" in done.stdout


def test_token_ids_are_never_called_starved(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=24, num_classes=40, encoding=TopK(2), sequences=sequences_of(32))
    path = write_store(tmp_path / "a.zarr", manifest)
    assert stats(path).starved_classes == ()
    assert "class mass" not in CliRunner().invoke(main, ["stats", str(path)]).stdout
