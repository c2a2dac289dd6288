"""Stores of real teachers, combined, against a dump of the same teachers as one ensemble."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import MismatchError
from storage.reader import open_store
from storage.scan import CombineOptions, combine, diff, verify
from storage.scan.ensemble import Combine
from teacherdump.audit import AuditOptions, audit, config_for
from teacherdump.config import DumpConfig
from teacherdump.run import run
from teacherdump.transcode import TranscodeOptions, transcode
from tests.storage.members import read_all
from tests.teacherdump.small_dumps import ARCHS, save_teacher, source_options

Dump = Callable[..., Path]
ROUNDING = 1e-5  # of float32 logits of some tens


@pytest.fixture(scope="module", params=["classes", "sequences"])
def dump(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """What dumps one of two teachers, or both as an ensemble, once for each set of options."""
    folder = tmp_path_factory.mktemp(request.param)
    options = source_options(folder, request.param) | {"shard_rows": 48, "temperatures": (1.0, 2.0)}
    options |= {"sequence_length": 16} if request.param == "sequences" else {}
    options.pop("models")
    models = [str(save_teacher(folder / f"{seed}.pt", request.param, seed)) for seed in (3, 8)]
    made: dict[str, Path] = {}

    def one(*teachers: int, **more: Any) -> Path:
        key = repr((teachers, more))
        if key not in made:
            made[key] = folder / f"{len(made)}.zarr"
            chosen = tuple(models[teacher] for teacher in teachers)
            run(DumpConfig(**{**options, "models": chosen, "out": str(made[key]), **more}))
        return made[key]

    return one


@pytest.mark.parametrize("how", ["mean-probs", "mean-logits"])
def test_dense_stores_become_what_a_dump_of_the_ensemble_is(dump: Dump, tmp_path: Path, how: Combine) -> None:
    options = {"encoding": "dense", "values": "float32"}
    direct = dump(0, 1, combine=how, **options)
    combine([dump(0, **options), dump(1, **options)], tmp_path / "both.zarr", CombineOptions(how))
    result = diff(tmp_path / "both.zarr", direct)
    names = {field.name.partition(".")[0] for field in result.identity}
    assert names <= {"format_version", "lineage", "combined"}
    assert result.rows.num_other_samples == result.rows.num_other_status == 0
    assert result.rows.num_top1_agreed == result.rows.num_distributions > 90
    assert result.rows.divergence is not None
    assert result.rows.divergence.max is not None
    assert result.rows.divergence.max < 1e-5
    for array in result.arrays:
        assert array.num_not_finite == 0
        if array.name in ("values", "max_logit", "lse"):
            assert array.max_abs is not None
            assert array.max_abs < ROUNDING, array
        elif array.name in ("status", "sample_digest", "hard_target", "token_ids", "position_ids"):
            assert array.num_rows == 0, array
    one, two = read_all(tmp_path / "both.zarr"), read_all(direct)
    for name in ("entropy", "hard_target_logprob"):
        np.testing.assert_allclose(one[name].astype(float), two[name].astype(float), rtol=2**-10, atol=2**-20)
    with open_store(tmp_path / "both.zarr") as mine, open_store(direct) as theirs:
        assert mine.manifest.teacher == theirs.manifest.teacher
        assert [entry.key for entry in mine.quarantine()] == [entry.key for entry in theirs.quarantine()]
    assert verify(tmp_path / "both.zarr").ok


def test_topk_stores_hold_what_a_dump_of_the_ensemble_holds_within_what_they_say(dump: Dump, tmp_path: Path) -> None:
    options = {"encoding": "topk", "k": 280, "values": "float32"}
    sources = [dump(0, **options), dump(1, **options)]
    for tolerance in (0.0006, 0.02):
        path = tmp_path / f"{tolerance}.zarr"
        result = combine(sources, path, CombineOptions(tolerance=tolerance))
        assert result.within["probability_within"] <= tolerance
        direct = dump(0, 1, encoding="topk", k=result.encoding["k"], values="float32", temperatures=(1.0,))
        found, expected = read_all(path), read_all(direct)
        has_targets = found["status"] == 0
        np.testing.assert_array_equal(found["status"], expected["status"])
        for name, bound in (
            ("max_logit", result.within["max_logit_within"] + ROUNDING),
            ("lse", result.within["max_logit_within"] + ROUNDING),
            ("entropy", result.within["entropy_within"] + 5e-3),
            ("hard_target_logprob", 0.02),
        ):
            off = np.abs(found[name].astype(float) - expected[name])[has_targets]
            assert np.nanmax(off) <= bound, name
        likeliest = [np.exp(it["values"] - it["lse"][..., :1])[has_targets] for it in (found, expected)]
        off = np.abs(likeliest[0] - likeliest[1])  # sorted downward: the j-th may be another class
        assert off.max() <= result.within["probability_within"] + ROUNDING
        assert verify(path).ok


def test_what_was_combined_can_be_made_smaller_like_any_store(dump: Dump, tmp_path: Path) -> None:
    options = {"encoding": "dense", "values": "float32"}
    combine([dump(0, **options), dump(1, **options)], tmp_path / "both.zarr")
    transcode(tmp_path / "both.zarr", tmp_path / "small.zarr", TranscodeOptions(encoding="topk", k=20))
    direct = dump(0, 1, encoding="topk", k=20)
    result = diff(tmp_path / "small.zarr", direct)
    assert result.rows.num_top1_agreed == result.rows.num_distributions
    assert verify(tmp_path / "small.zarr").ok
    with open_store(tmp_path / "small.zarr") as store:
        assert store.manifest.lineage is not None
        assert [origin["encoding"]["name"] for origin in store.manifest.lineage] == ["dense"] * 3
        assert store.manifest.extra["combined"]["num_stores"] == 2


def test_an_audit_finds_a_combined_store_faithful_to_the_teachers_and_not_to_one_of_them(
    dump: Dump, tmp_path: Path
) -> None:
    options = {"encoding": "dense", "values": "float32"}
    sources = [dump(0, **options), dump(1, **options)]
    combine(sources, tmp_path / "both.zarr")
    folder, kind = sources[0].parent, sources[0].parent.name.rstrip("0123456789")
    with open_store(tmp_path / "both.zarr") as store:
        manifest = store.manifest
    given: dict[str, Any] = {"out": str(tmp_path / "both.zarr"), "arch": ARCHS[kind], "device": "cpu"}
    if kind == "classes":
        given |= {"data": str(folder / "corpus.npy"), "labels": str(folder / "labels.npy")}
    else:
        given |= {"data": str(folder / "tokens.npy"), "boundaries": str(folder / "starts.npy"), "vocab_size": 290}
    both = tuple(str(folder / f"{seed}.pt") for seed in (3, 8))
    found = audit(tmp_path / "both.zarr", config_for(manifest, models=both, **given), AuditOptions(rows=30))
    assert found.ok, found
    coarse = [dump(teacher, encoding="dense") for teacher in (0, 1)]
    combine(coarse, tmp_path / "coarse.zarr")
    assert audit(tmp_path / "coarse.zarr", config_for(manifest, models=both, **given), AuditOptions(rows=30)).ok
    kept = [dump(teacher, encoding="topk", k=280, values="float32") for teacher in (0, 1)]
    combine(kept, tmp_path / "kept.zarr", CombineOptions(tolerance=0.02))
    with pytest.raises(
        MismatchError, match="got one that was combined from topk stores and is within bounds of it; au"
    ):
        audit(tmp_path / "kept.zarr", config_for(manifest, models=both, **given), AuditOptions(rows=30))
    assert not audit(tmp_path / "both.zarr", config_for(manifest, models=both[:1], **given), AuditOptions(rows=30)).ok
