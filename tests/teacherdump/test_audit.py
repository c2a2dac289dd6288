"""An audit passes an honest store in any encoding, and no other; what the encoding gave up it reports apart."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, Array
from storage.encodings import TopK
from storage.errors import CorpusError, CorpusMismatchError, MismatchError, NotSealedError, TeacherError
from storage.manifest import Manifest
from storage.reader import open_store
from storage.records import QuarantineEntry
from storage.writer import StoreWriter
from teacherdump.audit import AuditOptions, audit, choose_rows, config_for
from teacherdump.audit_result import AuditResult
from teacherdump.cli import main
from teacherdump.teacher import load_teacher
from teacherdump.transcode import TranscodeOptions, transcode
from tests.teacherdump.small_dumps import ARCHS, REFUSED, Dump, dumper, save_teacher, source_options

ALL = 1000  # rows: more than there are
ENCODINGS: tuple[dict[str, Any], ...] = (
    {"encoding": "dense"},
    {"encoding": "dense", "values": "uint8"},
    {"encoding": "topk", "k": 9},
    {"encoding": "topk", "k": 9, "values": "uint8"},
    {"encoding": "sample", "draws": 40, "seed": 7, "temperatures": (2.0,)},
    {"encoding": "hidden"},
)


class Dumped:
    """Dumps of one kind of corpus, and their audits."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.dump: Dump = dumper(folder, kind)
        self.options = source_options(folder, kind)

    def audit(self, path: Path, rows: int = ALL, **changes: Any) -> AuditResult:
        with open_store(path) as store:
            config = config_for(store.manifest, out=str(path), **{**self.options, **changes})
        return audit(path, config, AuditOptions(rows))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    return Dumped(tmp_path_factory.mktemp("classes"), "classes")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    return Dumped(tmp_path_factory.mktemp("sequences"), "sequences")


@pytest.fixture(params=["classes", "sequences"])
def dumped(request: pytest.FixtureRequest) -> Dumped:
    found: Dumped = request.getfixturevalue(request.param)
    return found


def sealed_by_hand(source: Path, target: Path, change: Callable[[dict[str, Array]], None]) -> Path:
    """The store with something changed, sealed as if it had always been so."""
    with open_store(source) as store, StoreWriter.open(target, store.manifest, store.head()) as writer:
        for shard in store.sealed_shards():
            seal = store.seal(shard)
            arrays = store.read([spec.name for spec in store.manifest.arrays], seal.start, seal.stop)
            if shard == 0:
                change(arrays)
            status_N, old = arrays["status"], {entry.row: entry for entry in seal.quarantine}
            refused = (np.flatnonzero(status_N != STATUS_OK) + seal.start).tolist()
            writer.write_shard(shard, arrays, [old.get(row, QuarantineEntry(row, "?", "?")) for row in refused])
        writer.finalize()
    return target


# Honest stores


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
def test_an_honest_store_is_faithful(dumped: Dumped, options: dict[str, Any]) -> None:
    result = dumped.audit(dumped.dump(**options))
    assert result.ok, result.summary()
    assert (result.failures, result.reasons, result.notes) == ((), (), ())
    num_rows, num_positions = (100, 98) if dumped.kind == "classes" else (44, 704)
    assert (result.num_rows, result.num_positions) == (num_rows, num_positions)
    assert all(check.num_failed == 0 <= check.worst <= 1 for check in result.checks.values())
    assert {"sample digest", "max_logit", "lse", "entropy", "hard_target_logprob", "status"} < set(result.checks)


@pytest.mark.parametrize(
    ("source", "steps"),
    [
        ({"encoding": "dense"}, [TranscodeOptions("topk", k=9, values="uint8"), TranscodeOptions(k=3)]),
        ({"encoding": "dense", "values": "uint8"}, [TranscodeOptions("sample", draws=40)]),
        ({"encoding": "hidden"}, [TranscodeOptions("topk", k=9)]),
        ({"encoding": "hidden"}, [TranscodeOptions("dense"), TranscodeOptions(values="uint8")]),
    ],
    ids=str,
)
def test_a_store_that_was_transcoded_is_faithful_within_the_bounds_of_each_step(
    dumped: Dumped, tmp_path: Path, source: dict[str, Any], steps: list[TranscodeOptions]
) -> None:
    path = dumped.dump(**source)
    for number, options in enumerate(steps):
        path, before = tmp_path / f"{number}.zarr", path
        transcode(before, path, options)
    result = dumped.audit(path)
    assert result.ok, result.summary()


def test_a_store_of_another_batch_size_and_precision_is_faithful_within_the_tolerance(sequences: Dumped) -> None:
    path = sequences.dump(encoding="topk", k=9, precision="bf16")
    result = sequences.audit(path, batch_size=44, precision="fp32")
    assert result.ok, result.summary()
    assert result.tolerance == 5e-2
    assert result.notes == ("the teacher ran in bf16 then, and in fp32 now",)
    assert sequences.audit(path).tolerance == 5e-2


# Stores that are not


def test_another_teacher_is_not_passed(dumped: Dumped, tmp_path: Path) -> None:
    path = dumped.dump(encoding="topk", k=9)
    other = save_teacher(tmp_path / "other.pt", dumped.kind, seed=4)
    result = dumped.audit(path, models=(str(other),))
    assert not result.ok
    assert "teacher: expected the one that made the store (digest " in result.reasons[0]
    assert result.checks["max_logit"].num_failed > 40
    assert len(result.failures) == result.num_scored
    assert "not faithful: row 0 (" in result.summary()


def test_the_same_teacher_from_another_file_is_told_apart_by_its_digest_alone(classes: Dumped, tmp_path: Path) -> None:
    state = torch.load(classes.folder / "teacher.pt", weights_only=True)
    torch.save(dict(reversed(state.items())), tmp_path / "again.pt")
    result = classes.audit(classes.dump(encoding="topk", k=9), models=(str(tmp_path / "again.pt"),))
    assert not result.ok
    assert (len(result.reasons), result.failures) == (1, ())


@pytest.mark.parametrize("options", ENCODINGS[2:5:2], ids=str)
def test_targets_of_swapped_samples_are_named(classes: Dumped, tmp_path: Path, options: dict[str, Any]) -> None:
    def swap(arrays: dict[str, Array]) -> None:
        for name in set(arrays) - {"sample_digest", "hard_target"}:
            arrays[name][[10, 11]] = arrays[name][[11, 10]]

    result = classes.audit(sealed_by_hand(classes.dump(**options), tmp_path / "a.zarr", swap))
    assert [failure.row for failure in result.failures] == [10, 11]
    assert result.checks["sample digest"].num_failed == 0


def test_another_corpus_is_not_passed(dumped: Dumped, tmp_path: Path) -> None:
    path = dumped.dump(encoding="topk", k=9)
    data = np.load(dumped.options["data"])
    data[[20, 21]] = data[[21, 20]]
    np.save(tmp_path / "other.npy", data)
    result = dumped.audit(path, data=str(tmp_path / "other.npy"))
    rows = [1] if dumped.kind == "sequences" else [20, 21]
    assert [failure.row for failure in result.failures] == rows
    assert result.failures[0].reason == "sample digest: expected that of the sample, got another"


# What is changed in one row of an array after the other, and the check that finds it.
CHANGES: dict[int, tuple[tuple[str, Callable[[Array], Any], str], ...]] = {
    0: (
        ("values", lambda row: row * 1.01, "values"),
        ("max_logit", lambda row: row + 0.02, "max_logit"),
        ("lse", lambda row: row + 0.02, "lse"),
        ("entropy", lambda row: row + 0.1, "entropy"),
        ("hard_target_logprob", lambda row: row - 0.1, "hard_target_logprob"),
        ("hard_target_logprob", lambda row: row * np.nan, "hard_target_logprob"),
        ("sample_digest", lambda row: row + np.uint64(1), "sample digest"),
    ),
    1: (
        ("values", lambda row: np.minimum(row, 250) + 2, "values"),
        ("value_range", lambda row: row * 1.01, "values"),
    ),
    2: (
        ("values", lambda row: row * 1.01, "values"),
        ("ids", lambda row: np.roll(row, 1, -1), "values"),
        ("ids", lambda row: np.where(row == row[..., -1:], (row.max() + 1) % 290, row), "ids"),
        ("log_tail", lambda row: row + 0.01, "log_tail"),
    ),
    3: (("values", lambda row: np.minimum(row, 250) + 2, "values"),),
    4: (
        ("counts", lambda row: np.roll(row, 1, -1), "counts"),
        ("counts", lambda row: row * 2, "ids"),
        ("ids", lambda row: np.where(row == row.max(), row - 1, row), "ids"),
    ),
    5: (
        ("hidden", lambda row: row * 1.01, "hidden"),
        ("hidden", lambda row: row * np.nan, "hidden"),
    ),
}


@pytest.mark.parametrize("number", CHANGES, ids=lambda number: str(ENCODINGS[number]))
def test_every_changed_row_is_found(dumped: Dumped, tmp_path: Path, number: int) -> None:
    changes = CHANGES[number]
    if dumped.kind == "sequences" and number not in (2, 5):
        changes = changes[-1:]

    def flip(arrays: dict[str, Array]) -> None:
        for row, (name, change, _) in enumerate(changes):
            arrays[name][row + 10] = change(arrays[name][row + 10])

    result = dumped.audit(sealed_by_hand(dumped.dump(**ENCODINGS[number]), tmp_path / "a.zarr", flip))
    assert [failure.row for failure in result.failures] == list(range(10, 10 + len(changes))), result.summary()
    assert {name for name, check in result.checks.items() if check.num_failed} >= {check for _, _, check in changes}


@pytest.mark.parametrize(
    ("kind", "name"), [("sequences", "token_ids"), ("sequences", "position_ids"), ("classes", "hard_target")]
)
def test_what_the_corpus_has_otherwise_is_found(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str
) -> None:
    dumped: Dumped = request.getfixturevalue(kind)

    def flip(arrays: dict[str, Array]) -> None:
        arrays[name][3] = arrays[name][4]

    result = dumped.audit(sealed_by_hand(dumped.dump(encoding="topk", k=9), tmp_path / "a.zarr", flip))
    assert [failure.reason for failure in result.failures] == [
        f"{name}: expected what the corpus has, got something else"
    ]


def test_a_row_that_has_targets_where_the_teacher_gives_none_is_found_and_the_other_way_round(
    classes: Dumped, tmp_path: Path
) -> None:
    def trade(arrays: dict[str, Array]) -> None:
        for name in set(arrays) - {"sample_digest", "hard_target"}:
            arrays[name][[REFUSED[0], 6]] = arrays[name][[6, REFUSED[0]]]
        assert arrays["status"][6] == STATUS_NOT_FINITE

    result = classes.audit(sealed_by_hand(classes.dump(encoding="topk", k=9), tmp_path / "a.zarr", trade))
    assert [(failure.row, failure.reason) for failure in result.failures] == [
        (5, "status: expected targets as in the store, got none from the teacher"),
        (6, "status: expected no targets as in the store, got some from the teacher"),
    ]


def test_another_head_is_found(sequences: Dumped, tmp_path: Path) -> None:
    state = torch.load(sequences.folder / "teacher.pt", weights_only=True)
    state["head.weight"][:5] *= 1.5
    torch.save(state, tmp_path / "other.pt")
    result = sequences.audit(sequences.dump(encoding="hidden"), models=(str(tmp_path / "other.pt"),))
    assert result.reasons[1] == "head: expected the teacher's head in the store, got another; dump it again"


# What the encoding gave up


def test_what_was_given_up_is_the_kl_to_what_a_reader_gets(classes: Dumped) -> None:
    path = classes.dump(encoding="topk", k=9)
    result = classes.audit(path)
    logits_NC = load_teacher(classes.options["models"], ARCHS["classes"], device="cpu")(
        torch.from_numpy(np.load(classes.options["data"]))
    ).double()
    with open_store(path) as store:
        arrays = store.read([spec.name for spec in store.manifest.arrays], 0, 100)
    has_targets = arrays["status"] == STATUS_OK
    arrays = {name: values[has_targets] for name, values in arrays.items()}
    for part in result.truncation:
        probs = (logits_NC[has_targets] / part.temperature).softmax(1)
        read = torch.from_numpy(TopK(9).logprobs(arrays, part.temperature, (1.0, 2.0))).double()
        logprobs = (read[:, -1:] - np.log(300 - 9)).expand(98, 300).clone()
        logprobs.scatter_(1, torch.from_numpy(arrays["ids"].astype(np.int64)), read[:, :-1])
        kl = (probs * (probs.log() - logprobs)).sum(1)
        kept = 1 - read[:, -1].exp()
        error = (probs - logprobs.exp()).square().sum() / (probs - 1 / 300).square().sum()
        assert part.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
        assert part.kl_worst == pytest.approx(float(kl.max()), rel=1e-5)
        assert part.kept_mean == pytest.approx(float(kept.mean()), rel=1e-3)
        assert part.kept_least == pytest.approx(float(kept.min()), rel=1e-2)
        assert part.gradient_error == pytest.approx(float(error.sqrt()), rel=1e-3)
    assert result.id_overlap == 1


def test_draws_lose_no_nats_that_could_be_named(classes: Dumped) -> None:
    result = classes.audit(classes.dump(**ENCODINGS[4]))
    (part,) = result.truncation
    assert (part.temperature, part.kl_mean, part.kept_mean) == (2.0, None, None)
    assert 0 < part.gradient_error < 1
    assert "a distribution, in the mean by nothing" in result.summary()


def test_what_keeps_everything_loses_nothing_that_counts(classes: Dumped) -> None:
    for options in (ENCODINGS[0], ENCODINGS[5]):
        for part in classes.audit(classes.dump(**options)).truncation:
            assert part.kl_worst is not None
            assert part.kl_worst < 1e-5
            assert part.kept_least == 1


# Rows, options, refusals


def test_rows_are_chosen_among_the_sealed_ones_and_by_the_seed(classes: Dumped, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with open_store(classes.dump(encoding="topk", k=9)) as store, StoreWriter.open(path, store.manifest) as writer:
        with pytest.raises(NotSealedError, match="expected at least one sealed shard, got none; wait until"):
            choose_rows(writer.store, AuditOptions())
        for shard in (0, 2):
            start, stop = store.layout.shard_bounds(shard)
            arrays = store.read([spec.name for spec in store.manifest.arrays], start, stop)
            writer.write_shard(shard, arrays, store.seal(shard).quarantine)
    with open_store(path) as store:
        assert choose_rows(store, AuditOptions(ALL)).tolist() == [*range(48), *range(96, 100)]
        chosen = [choose_rows(store, AuditOptions(10, seed)).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10
    np.save(tmp_path / "longer.npy", np.concatenate([np.load(classes.options["data"]), np.ones((1, 12), np.float32)]))
    result = classes.audit(path, rows=20, data=str(tmp_path / "longer.npy"), labels=None)
    assert result.ok
    assert result.notes == (
        "the corpus's index is another than when the store was made; its samples are compared one by one",
    )


def test_what_has_nothing_to_do_with_the_store_is_refused(classes: Dumped, sequences: Dumped, tmp_path: Path) -> None:
    path = classes.dump(encoding="topk", k=9)
    np.save(tmp_path / "few.npy", np.zeros((50, 12), np.float32))
    with pytest.raises(CorpusMismatchError, match="expected 100 samples, got 50 in the corpus"):
        classes.audit(path, data=str(tmp_path / "few.npy"), labels=None)
    np.save(tmp_path / "wide.npy", np.zeros((100, 13), np.float32))
    with pytest.raises(CorpusError, match=r"expected samples of shape \(12,\), got \(13,\)"):
        classes.audit(path, data=str(tmp_path / "wide.npy"), labels=None)
    torch.manual_seed(0)
    torch.save(torch.nn.Sequential(torch.nn.Linear(12, 7)).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(TeacherError, match=r"expected weights for 'layers\.0\.weight'"):
        classes.audit(path, models=(str(tmp_path / "seven.pt"),))
    with open_store(sequences.dump(encoding="topk", k=9)) as store:
        assert config_for(store.manifest, out="x", **sequences.options).sequence_length == 16


@pytest.mark.parametrize("teacher", [{"kind": "fused"}, {"kind": "ensemble", "members": [{"kind": "fused"}]}])
def test_a_store_of_a_fused_teacher_is_refused_for_what_it_is(
    classes: Dumped, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    with open_store(classes.dump(encoding="dense")) as store:
        manifest = replace(store.manifest, teacher={**store.manifest.teacher, **teacher})
    path = tmp_path / "fused.zarr"
    StoreWriter.open(path, manifest).close()
    with pytest.raises(MismatchError, match=r"got one whose teacher is a fused one, .*; audit the generalist's store"):
        classes.audit(path)


def test_a_teacher_of_other_classes_is_refused(classes: Dumped, tmp_path: Path) -> None:
    from studenttrain.models import build_model

    torch.save(build_model("mlp:12-4-7").state_dict(), tmp_path / "seven.pt")
    with pytest.raises(MismatchError, match="expected a teacher of 300 classes, got one of 7; give the teacher that"):
        classes.audit(classes.dump(encoding="topk", k=9), models=(str(tmp_path / "seven.pt"),), arch="mlp:12-4-7")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("What is said twice is said once too often. " * 20)
    options = source_options(tmp_path, "sequences") | {"data": str(tmp_path / "corpus.txt"), "tokenizer": "bytes"}
    options |= {"boundaries": None, "vocab_size": None, "sequence_length": 16, "encoding": "topk", "k": 4}
    from teacherdump.config import DumpConfig
    from teacherdump.run import run

    run(DumpConfig(**options, out=str(tmp_path / "a.zarr")))
    del options["sequence_length"], options["encoding"], options["k"]

    def with_tokenizer(manifest: Manifest, fingerprint: str) -> Manifest:
        from dataclasses import replace

        assert manifest.sequences is not None
        return replace(manifest, sequences=replace(manifest.sequences, tokenizer=fingerprint))

    with open_store(tmp_path / "a.zarr") as store:
        config = config_for(store.manifest, out="x", **options)
        assert audit(tmp_path / "a.zarr", config, AuditOptions(8)).ok
        arrays = store.read([spec.name for spec in store.manifest.arrays], 0, store.num_sealed_rows)
        other = with_tokenizer(store.manifest, "ab" * 32)
        with StoreWriter.open(tmp_path / "b.zarr", other) as writer:
            start, stop = store.layout.shard_bounds(0)
            writer.write_shard(0, {name: values[start:stop] for name, values in arrays.items()})
    with pytest.raises(
        MismatchError, match=r"expected the tokenizer that it was made with \(abababababab\), got another"
    ):
        audit(tmp_path / "b.zarr", config, AuditOptions(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"tolerance": 1.0}, "tolerance: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditOptions(**options)


def test_the_command_says_what_it_found_and_ends_with_it(sequences: Dumped, tmp_path: Path) -> None:
    path, folder = sequences.dump(encoding="topk", k=9), sequences.folder
    words = ["audit", "--model", str(folder / "teacher.pt"), "--arch", ARCHS["sequences"], "--device", "cpu"]
    words += ["--data", str(folder / "tokens.npy"), "--boundaries", str(folder / "starts.npy"), "--vocab-size", "290"]

    def invoke(*more: str) -> Any:
        return CliRunner().invoke(main, [*words, "--rows", "9", *more], catch_exceptions=False)

    done = invoke("--targets", str(path))
    assert (done.exit_code, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    assert first == f"{path}: 9 rows looked at, 9 with targets, 144 distributions scored again"
    assert last == "faithful, as far as was looked"
    assert "  at T = 2: " in done.stdout

    def flip(arrays: dict[str, Array]) -> None:
        arrays["values"][:] *= 1.1

    bad = sealed_by_hand(path, tmp_path / "bad.zarr", flip)
    done = invoke("--targets", str(bad), "--json")
    assert done.exit_code == 1
    value = json.loads(done.stdout)
    assert (value["ok"], value["num_rows"], value["encoding"]["name"]) == (False, 9, "topk")
    assert value["checks"]["values"]["num_failed"] == len(value["failures"]) == 9
    text = invoke("--targets", str(bad)).stdout
    assert text.count("not faithful: row ") == 5
    assert "... and 4 rows more: --json gives all" in text
    assert text.endswith("\nnot faithful\n")
    missing = invoke("--targets", str(tmp_path / "nowhere.zarr"))
    assert missing.exit_code == 1
    assert missing.stderr.startswith(f"error: {tmp_path / 'nowhere.zarr'}: expected a logit store, got no such path")
    assert invoke("--targets", str(path), "--tolerance", "2").exit_code == 2
