"""A part of a store is a store of its own: its rows, arrays and entries say what they said, and of which samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from storage.arrays import STATUS_OK
from storage.cli import main
from storage.corpus import (
    Corpus,
    default_preprocess,
    open_corpus,
    rows_of_store,
    verify_corpus,
    verify_hard_targets,
)
from storage.corpus.stored import StoredTokens
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.encodings.dense import loaded_values
from storage.errors import CorpusError, CorpusMismatchError, DamageError, MismatchError, NotSealedError
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.scan import Selection, copy, parse_rows, verify
from tests.builders import write_npz
from tests.builders import write_store as store_of_corpus
from tests.storage.scan_stores import manifest_of, write_store
from tests.storage.soft_targets import hidden_encoding, sequences_of


def all_rows(store: Store, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    stop = store.manifest.num_rows if stop is None else stop
    return store.read([spec.name for spec in store.manifest.arrays], start, stop)


def assert_rows_of(part: Path, source: Path, start: int, stop: int, but: tuple[str, ...] = ()) -> None:
    """A part holds just these rows of a store, bit for bit."""
    with open_store(part) as one, open_store(source) as two:
        found, expected = all_rows(one), all_rows(two, start, stop)
        assert set(found) == set(expected) - set(but)
        for name, values in found.items():
            assert values.tobytes() == expected[name].tobytes(), name
        rows = [(entry.row + start, entry.key, entry.reason) for entry in one.quarantine()]
        assert rows == [tuple(vars(entry).values()) for entry in two.quarantine() if start <= entry.row < stop]
    result = verify(part)
    assert result.ok, result.damage
    assert result.warnings == ()


# Rows


@pytest.mark.parametrize(
    ("fields", "source", "target"),
    [
        ({"encoding": Dense("uint8")}, "a.zarr", "b.h5"),
        ({"encoding": TopK(3), "compressor": "zstd"}, "a.h5", "b.zarr"),
        ({"encoding": Sample(9), "sequences": sequences_of(3)}, "a.zarr", "b.zarr"),
        ({"encoding": hidden_encoding(5, 4, has_bias=True)}, "a.zarr", "b.zarr"),
    ],
)
def test_a_part_has_just_the_rows_that_were_asked_for(
    fields: dict[str, Any], source: str, target: str, tmp_path: Path
) -> None:
    write_store(tmp_path / source, manifest_of(**fields))
    counted: list[int] = []
    for number, (start, stop) in enumerate(((0, 8), (3, 14), (21, 22), (8, 22))):
        path = tmp_path / f"{number}{target}"
        copy(tmp_path / source, path, Selection(rows=(start, stop)), progress=counted.append)
        assert_rows_of(path, tmp_path / source, start, stop)
    assert sum(counted) == 2 * (8 + 11 + 1 + 14)


def test_lineage_and_corpus_say_where_the_rows_are_from(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    first = copy(source, tmp_path / "b.zarr", Selection(rows=(4, None)))
    second = copy(tmp_path / "b.zarr", tmp_path / "c.zarr", Selection(rows=(None, 6)))
    with open_store(source) as store, open_store(tmp_path / "c.zarr") as part:
        manifest = part.manifest
        assert manifest.corpus == {**store.manifest.corpus, "first_row": 4}
        assert manifest.is_part
        assert manifest.lineage is not None
        assert [origin["content_digest"] for origin in manifest.lineage] == [store.content_digest, first.content_digest]
        assert [origin["rows"] for origin in manifest.lineage] == [[4, 22], [0, 6]]
    assert second.content_digest not in (first.content_digest, first.source_digest)
    assert not second.is_whole
    assert_rows_of(tmp_path / "c.zarr", source, 4, 10)


def test_a_part_of_a_part_is_the_same_rows_as_one_taken_at_once(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    copy(source, tmp_path / "b.zarr", Selection(rows=(5, 20)))
    copy(tmp_path / "b.zarr", tmp_path / "c.zarr", Selection(rows=(2, 9)))
    with open_store(tmp_path / "c.zarr") as part:
        assert part.manifest.first_row == 7
    assert_rows_of(tmp_path / "c.zarr", source, 7, 14)


def test_rows_of_all_are_a_copy_as_it_is(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    assert copy(source, tmp_path / "b.zarr", Selection(rows=(0, 22))).is_whole


def test_a_part_that_was_stopped_goes_on_and_another_part_is_refused(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "b.zarr", Selection(rows=(2, 20)), num_workers=1, progress=stop)
    with pytest.raises(MismatchError, match="expected nothing, or this copy begun, got another store"):
        copy(source, tmp_path / "b.zarr", Selection(rows=(2, 19)))
    counted: list[int] = []
    copy(source, tmp_path / "b.zarr", Selection(rows=(2, 20)), progress=counted.append)
    assert sum(counted) == 2 * 18
    assert_rows_of(tmp_path / "b.zarr", source, 2, 20)


def test_a_shard_that_is_damaged_outside_the_rows_is_found_all_the_same(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(temperatures=(1.0, 5.0)))
    (source / "lse" / "c" / "0" / "0").write_bytes((other / "lse" / "c" / "0" / "0").read_bytes())
    with pytest.raises(DamageError, match="array 'lse', shard 0: expected the sealed sha256 to hold, got another"):
        copy(source, tmp_path / "c.zarr", Selection(rows=(6, 10)))


@pytest.mark.parametrize("text", ["", ":", "3", "3:2:1", "-1:4", "a:b", "1e3:"])
def test_rows_that_are_no_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rows: expected START:STOP, such as 0:1000, got"):
        parse_rows(text)


@pytest.mark.parametrize("rows", [(5, 5), (6, 5), (0, 23), (22, None)])
def test_rows_that_the_store_does_not_have_are_refused(rows: tuple[int, int | None], tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    with pytest.raises(ValueError, match="rows: expected a range inside 0:22, got"):
        copy(source, tmp_path / "b.zarr", Selection(rows=rows))


def test_rows_that_will_never_be_sealed_are_refused(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=2)
    copy(source, tmp_path / "b.zarr", Selection(rows=(3, 16)))
    with pytest.raises(NotSealedError, match="expected rows 3 to 16 sealed, got rows 16 to 16 without targets; choose"):
        copy(source, tmp_path / "c.zarr", Selection(rows=(3, 17)))


def test_no_part_is_taken_of_a_store_that_is_not_finalized(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    with pytest.raises(NotSealedError, match="expected a finalized store to take a part of, got one that is not"):
        copy(source, tmp_path / "b.zarr", Selection(rows=(0, 8)))


# The corpus of a part


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return open_corpus(write_npz(tmp_path / "x.npz", num_samples=30))


@pytest.fixture
def part(corpus: Corpus, tmp_path: Path) -> Path:
    preprocess = default_preprocess(corpus).to_json()
    source = store_of_corpus(tmp_path / "a.zarr", corpus, num_classes=4, preprocess=preprocess, finalize=True)
    copy(source, tmp_path / "part.zarr", Selection(rows=(11, 25)))
    return tmp_path / "part.zarr"


def test_a_part_is_held_against_its_own_samples_of_the_whole_corpus(part: Path, corpus: Corpus) -> None:
    with open_store(part) as store:
        samples = rows_of_store(store, corpus)
        assert samples.num_samples == 14
        assert samples.key(0) == corpus.key(11)
        assert samples.fingerprint == corpus.fingerprint
        assert samples.hard_targets is not None
        assert corpus.hard_targets is not None
        np.testing.assert_array_equal(samples.hard_targets, corpus.hard_targets[11:25])
        verify_corpus(store, samples)
        verify_hard_targets(store, samples)
        inner = samples.part(3, 5)
        assert inner.read_raw(4) == corpus.read_raw(15)


def test_a_part_does_not_fit_the_first_samples_of_the_corpus(part: Path, corpus: Corpus) -> None:
    with open_store(part) as store, pytest.raises(CorpusMismatchError, match=r"row 0 .*there should be 14 samples"):
        verify_corpus(store, corpus)


def test_a_part_is_refused_with_a_corpus_of_another_size(part: Path, tmp_path: Path) -> None:
    other = open_corpus(write_npz(tmp_path / "y.npz", num_samples=29))
    message = r"expected a corpus of 30 samples, of which the store has 11 to 24, got 29 in the corpus '.*y.npz'; use"
    with open_store(part) as store, pytest.raises(CorpusMismatchError, match=message):
        rows_of_store(store, other)


def test_a_student_learns_from_a_part_with_the_whole_corpus(part: Path, corpus: Corpus, tmp_path: Path) -> None:
    from studenttrain.cli import main as studenttrain

    options = ["fit", "--targets", str(part), "--data", str(corpus.path), "--student", "mlp:6-4"]
    result = CliRunner().invoke(studenttrain, [*options, "--out", str(tmp_path / "run"), "--epochs", "1"])
    assert result.exit_code == 0, result.output
    evaluated = ["eval", "--checkpoint", str(tmp_path / "run"), "--data", str(corpus.path), "--targets", str(part)]
    result = CliRunner().invoke(studenttrain, [*evaluated, "--json"])
    assert result.exit_code == 0, result.output
    assert '"num_samples": 14' in result.stdout


def test_info_says_which_samples_a_part_is_of(part: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(part)])
    assert "samples 11 to 24 of 30 samples" in result.stdout


# Arrays


def test_hard_targets_are_left_out(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    result = copy(source, tmp_path / "b.zarr", Selection(arrays=("values",)))
    assert result.come_along == ("entropy", "lse", "max_logit", "sample_digest", "status")
    with open_store(tmp_path / "b.zarr") as store:
        assert not store.manifest.has_hard_targets
    assert_rows_of(tmp_path / "b.zarr", source, 0, 22, but=("hard_target", "hard_target_logprob"))


def test_tokens_are_left_out(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(3), sequences=sequences_of(3)))
    copy(source, tmp_path / "b.zarr", Selection(arrays=("ids",), rows=(0, 9)))
    assert_rows_of(tmp_path / "b.zarr", source, 0, 9, but=("token_ids", "position_ids"))
    copy(source, tmp_path / "c.zarr", Selection(arrays=("token_ids", "position_ids"), rows=(4, 9)))
    assert_rows_of(tmp_path / "c.zarr", source, 4, 9)
    with open_store(tmp_path / "c.zarr") as store:
        assert StoredTokens(store).read_raw(0) == StoredTokens(open_store(source)).read_raw(4)
    with open_store(tmp_path / "b.zarr") as store, pytest.raises(CorpusError, match="made with --no-store-tokens"):
        StoredTokens(store)


def test_a_store_that_lacks_rows_lacks_them_too_when_arrays_are_left_out(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(), shards=2)
    result = copy(source, tmp_path / "b.zarr", Selection(arrays=("values",)))
    assert (result.num_sealed_rows, result.num_rows) == (16, 22)


def test_arrays_that_can_not_be_chosen_are_refused(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of())
    with pytest.raises(ValueError, match=r"arrays: expected some of entropy, hard_target, .*, got 'logits'; name"):
        copy(source, tmp_path / "b.zarr", Selection(arrays=("values", "logits")))
    with pytest.raises(ValueError, match=r"arrays: expected some of .*, got none"):
        copy(source, tmp_path / "b.zarr", Selection(arrays=()))
    message = "expected hard_target and hard_target_logprob both or neither, got one of them; name hard_target too"
    with pytest.raises(ValueError, match=message):
        copy(source, tmp_path / "b.zarr", Selection(arrays=("hard_target_logprob",)))
    assert not (tmp_path / "b.zarr").exists()


# Fewer entries


def dropped_mass(manifest: Manifest, arrays: dict[str, np.ndarray[Any, Any]], k: int) -> np.ndarray[Any, Any]:
    """What the tail becomes, the plain way, float64."""
    values = loaded_values(arrays).astype(np.float64)
    tails = []
    for column, temperature in enumerate(manifest.temperatures):
        lse = arrays["lse"][..., column].astype(np.float64)
        dropped = np.exp(values[..., k:] / temperature - lse[..., None]).sum(-1)
        tails.append(np.log(np.exp(arrays["log_tail"][..., column].astype(np.float64)) + dropped))
    return np.stack(tails, -1)


@pytest.mark.parametrize("encoding", [TopK(4), TopK(5, "float32"), TopK(5, "uint8")])
def test_fewer_entries_are_a_prefix_and_their_mass_goes_to_the_tail(encoding: TopK, tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=encoding))
    copy(source, tmp_path / "b.zarr", Selection(k=2))
    with open_store(source) as one, open_store(tmp_path / "b.zarr") as two:
        before, after = all_rows(one), all_rows(two)
        good = before["status"] == STATUS_OK
        for name in ("ids", "values"):
            np.testing.assert_array_equal(after[name], before[name][:, :2])
        for name in sorted(set(before) - {"ids", "values", "log_tail"}):
            np.testing.assert_array_equal(after[name], before[name])
        expected = dropped_mass(one.manifest, before, 2)[good]
        np.testing.assert_allclose(after["log_tail"][good], expected, rtol=1e-6, atol=1e-6)
    assert verify(tmp_path / "b.zarr").ok


@pytest.mark.parametrize("sequences", [None, sequences_of(3)])
def test_fewer_entries_are_what_transcode_makes_of_them(sequences: Any, tmp_path: Path) -> None:
    from teacherdump.transcode import TranscodeOptions, transcode

    fields: dict[str, Any] = {"encoding": TopK(5), "sequences": sequences, "compressor": "zstd"}
    source = write_store(tmp_path / "a.zarr", manifest_of(**fields))
    copied = copy(source, tmp_path / "b.zarr", Selection(k=3))
    made = transcode(source, tmp_path / "c.zarr", TranscodeOptions(k=3))
    assert copied.content_digest == made.content_digest


def test_rows_arrays_and_entries_combine(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(5)))
    copy(source, tmp_path / "at-once.h5", Selection(rows=(3, 17), arrays=("ids",), k=2))
    copy(source, tmp_path / "1.zarr", Selection(k=2))
    copy(tmp_path / "1.zarr", tmp_path / "2.zarr", Selection(arrays=("ids",)))
    copy(tmp_path / "2.zarr", tmp_path / "3.zarr", Selection(rows=(3, 17)))
    with open_store(tmp_path / "at-once.h5") as one, open_store(tmp_path / "3.zarr") as two:
        for shard in range(2):
            assert one.seal(shard).arrays == two.seal(shard).arrays
    assert verify(tmp_path / "at-once.h5").ok


@pytest.mark.parametrize(
    ("encoding", "k", "message"),
    [
        (Dense(), 2, "expected a topk store .*, got dense; make one of it: logitstore transcode --encoding topk --k 2"),
        (Sample(9), 2, "expected a topk store to take fewer entries of, got sample; leave --k out"),
        (TopK(3), 4, "expected at most the 3 entries that it keeps, got k = 4; use a smaller k"),
    ],
)
def test_entries_that_are_not_there_are_refused(encoding: Encoding, k: int, message: str, tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=encoding))
    with pytest.raises(MismatchError, match=message):
        copy(source, tmp_path / "b.zarr", Selection(k=k))


def test_the_command_takes_a_part_and_says_of_what(tmp_path: Path) -> None:
    source = write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(4)))
    options = ["--rows", "4:", "--arrays", "ids, values", "--k", "2"]
    result = CliRunner().invoke(main, ["copy", str(source), str(tmp_path / "b.zarr"), *options])
    assert result.exit_code == 0, result.output
    assert "b.zarr: 18 rows" in result.stdout
    assert "every such store has entropy, log_tail, lse, max_logit, sample_digest, status too" in result.stdout
    assert ", of a part of " in result.stdout
    result = CliRunner().invoke(main, ["copy", str(source), str(tmp_path / "c.zarr"), "--k", "0"])
    assert result.exit_code == 2
    assert "k: expected at least 1, got 0" in result.stderr
