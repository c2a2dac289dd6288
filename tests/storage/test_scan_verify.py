"""`verify`: whatever is damaged is found and named, and what is sound is left alone."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.arrays import Array
from storage.encodings import Dense, Encoding, Sample, TopK
from storage.errors import FormatVersionError, PathError, StoreError
from storage.records import MANIFEST, QuarantineEntry
from storage.scan import verification, verify
from storage.scan.passes import blocks
from storage.sequences import Sequences
from storage.writer import StoreWriter
from tests.storage.scan_stores import manifest_of, shard_of, write_store
from tests.storage.soft_targets import head_for, hidden_encoding, sequences_of

ENCODINGS: list[Encoding] = [
    Dense("float16"),
    Dense("float32"),
    Dense("uint8"),
    TopK(3, "float16"),
    TopK(5, "float32"),
    TopK(2, "uint8"),
]


def fails(path: Path) -> bool:
    try:
        return not verify(path).ok
    except StoreError:
        return True


def flip(path: Path, position: int, bit: int = 0) -> bytes:
    """Flip a bit of a file, and give the bytes that were there before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[position] ^= 1 << bit
    path.write_bytes(changed)
    return before


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.name}-{encoding.values}")
@pytest.mark.parametrize("compressor", ["none", "zstd"])
@pytest.mark.parametrize("finalize", [True, False])
def test_nothing_is_found_in_a_sound_store(
    tmp_path: Path, encoding: Encoding, suffix: str, compressor: str, finalize: bool
) -> None:
    manifest = manifest_of(encoding=encoding, compressor=compressor)
    result = verify(write_store(tmp_path / f"a{suffix}", manifest, finalize=finalize))
    assert (result.damage, result.warnings) == ((), ())
    assert result.num_shards == 3
    assert result.num_chunks == 6 * len(manifest.arrays)
    assert (result.content_digest is None) is not finalize


SEQUENCES = sequences_of(3)
WITHOUT_TOKENS = sequences_of(3, has_tokens=False, tokenizer=None)
SKEWED = hidden_encoding(5, 6, values="float32", scale=0.5, soft_cap=4.0, has_bias=True)
LATER: list[tuple[Encoding, Sequences | None, str]] = [
    (Dense("float16"), SEQUENCES, ".zarr"),
    (TopK(3, "uint8"), SEQUENCES, ".h5"),
    (Sample(7, 3), SEQUENCES, ".zarr"),
    (Sample(255, 3), None, ".h5"),
    (hidden_encoding(5), SEQUENCES, ".zarr"),
    (SKEWED, WITHOUT_TOKENS, ".h5"),
    (SKEWED, None, ".zarr"),
]


@pytest.mark.parametrize(("encoding", "sequences", "suffix"), LATER)
def test_nothing_is_found_in_a_sound_store_of_sequences_draws_or_hidden_states(
    tmp_path: Path, encoding: Encoding, sequences: Sequences | None, suffix: str
) -> None:
    manifest = manifest_of(encoding=encoding, sequences=sequences)
    result = verify(write_store(tmp_path / f"a{suffix}", manifest))
    assert (result.damage, result.warnings) == ((), ())
    assert result.num_chunks == 6 * len(manifest.arrays)


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_a_flipped_bit_in_any_file_of_a_zarr_store_is_found(tmp_path: Path, compressor: str) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(encoding=TopK(2, "uint8"), compressor=compressor))
    generator = random.Random(7)
    for file in files_of(path):
        for _ in range(5):
            position = generator.randrange(file.stat().st_size)
            before = flip(file, position, generator.randrange(8))
            assert fails(path), f"byte {position} of {file}"
            file.write_bytes(before)
    assert verify(path).ok


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_a_flipped_bit_anywhere_in_an_hdf5_store_is_found(tmp_path: Path, compressor: str) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of(encoding=Dense("float16"), compressor=compressor))
    generator = random.Random(7)
    for _ in range(250):
        position = generator.randrange(path.stat().st_size)
        before = flip(path, position, generator.randrange(8))
        assert fails(path), f"byte {position}"
        path.write_bytes(before)
    assert verify(path).ok


def test_every_file_that_is_cut_or_gone_is_found(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    for file in files_of(path):
        before = file.read_bytes()
        for size in (0, len(before) // 2, len(before) - 1):
            file.write_bytes(before[:size])
            assert fails(path), f"{file} cut to {size} bytes"
        file.unlink()
        if file.name == "final.json":  # without it the store is one that nobody finalized yet
            assert not verify(path).finalized
        else:
            assert fails(path), f"{file} removed"
        file.write_bytes(before)
    assert verify(path).ok


def test_an_hdf5_store_that_is_cut_is_found(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of())
    before = path.read_bytes()
    for size in (600, len(before) // 2, len(before) - 1):
        path.write_bytes(before[:size])
        result = verify(path)
        assert not result.ok


def test_damage_names_its_array_shard_and_chunk(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    file = path / "values" / "c" / "1" / "0"
    chunk_bytes = 4 * 5 * 2 + 4  # four rows of five halves and their checksum
    flip(file, chunk_bytes + 3)
    (damage,) = verify(path).damage
    assert (damage.shard, damage.array, damage.chunk) == (1, "values", 1)
    assert "array 'values', shard 1, chunk 1" in damage.message


def test_damage_in_hdf5_names_its_array_shard_and_chunk(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=Dense("float32"))
    path = write_store(tmp_path / "a.h5", manifest)
    wanted = shard_of(manifest, 1)[0]["values"][6].tobytes()
    flip(path, path.read_bytes().index(wanted))
    found = {(damage.shard, damage.array, damage.chunk) for damage in verify(path).damage}
    assert found == {(None, None, None), (1, "values", 1)}  # the digest of the whole file, and the chunk


def test_all_damage_is_found_and_not_only_the_first(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    flip(path / "values" / "c" / "0" / "0", 2)
    flip(path / "values" / "c" / "0" / "0", 50)
    flip(path / "lse" / "c" / "2" / "0", 5)
    flip(path / "lse" / "zarr.json", 9)
    (path / "entropy" / "c" / "1").unlink()
    (path / "seals" / "00000002.json").unlink()
    result = verify(path, num_workers=2)
    found = {(damage.shard, damage.array, damage.chunk) for damage in result.damage}
    assert found == {
        (0, "values", 0),
        (0, "values", 1),
        (1, "entropy", None),
        (2, "lse", 0),
        (2, None, None),
        (None, None, None),
    }
    assert result.content_digest is None
    assert verify(path, num_workers=1) == result


def test_rows_that_are_not_sealed_are_told_and_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with StoreWriter.open(path, manifest_of()) as writer:
        writer.write_shard(1, *shard_of(writer.manifest, 1))
    result = verify(path)
    assert result.ok
    assert result.missing_rows == ((0, 8), (16, 22))
    assert (result.num_sealed_rows, result.num_rows) == (8, 22)
    assert "not finalized" in result.notes[0]


def test_a_store_finalized_at_a_part_is_sound(tmp_path: Path) -> None:
    result = verify(write_store(tmp_path / "a.zarr", manifest_of(), shards=2))
    assert result.ok
    assert result.missing_rows == ((16, 22),)


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_an_empty_store_says_that_its_manifest_is_not_checked(tmp_path: Path, suffix: str) -> None:
    result = verify(write_store(tmp_path / f"a{suffix}", manifest_of(), shards=0, finalize=False))
    assert result.ok
    assert "nothing yet that the manifest could be checked against" in result.notes[0]


@pytest.mark.parametrize("position", ["start", "middle"])
def test_a_changed_manifest_of_an_unfinalized_store_is_found_by_its_seals(tmp_path: Path, position: str) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    text = (path / MANIFEST).read_text()
    old, new = ('"logit-store"', '"logit-stare"') if position == "start" else ('"shard_rows": 8', '"shard_rows": 4')
    (path / MANIFEST).write_text(text.replace(old, new))
    assert not verify(path).ok


def test_a_lost_manifest_is_damage_where_seals_are_left(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    (path / MANIFEST).unlink()
    assert "expected the manifest that seals/00000000.json names, got none" in verify(path).damage[0].message


def test_zarr_metadata_of_another_shape_is_found_before_anything_is_finalized(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False)
    metadata = path / "values" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("22", "23"))
    (path / "lse" / "zarr.json").write_text("{")
    (path / "zarr.json").write_text("{}")
    messages = " ".join(damage.message for damage in verify(path).damage)
    assert "values/zarr.json: expected shape" in messages
    assert "lse/zarr.json: expected metadata that opens" in messages
    assert ": zarr.json: expected the metadata of a Zarr v3 group" in messages


def test_a_seal_of_another_store_is_found(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(num_classes=6))
    shutil.copy(other / "seals" / "00000001.json", path / "seals" / "00000001.json")
    assert any("got another's" in damage.message and damage.shard == 1 for damage in verify(path).damage)


def test_a_final_record_that_seals_contradict_is_found(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    other = write_store(tmp_path / "b.zarr", manifest_of(), shards=2)
    shutil.copy(other / "final.json", path / "final.json")
    seal = path / "seals" / "00000001.json"
    shutil.copy(path / "seals" / "00000002.json", path / "seals" / "x.json")
    assert verify(path).warnings
    shutil.copy(seal, path / "seals" / "00000000.json")
    assert not verify(path).ok


def test_files_that_are_not_the_stores_are_warned_of(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    (path / "notes.txt").write_text("mine")
    (path / "values" / "c" / "9").mkdir()
    (path / "values" / "c" / "9" / "0").write_text("no shard")
    (path / "seals" / "1.json").write_text("no seal")
    result = verify(path)
    assert result.ok
    assert [warning.split(": ")[0].removeprefix(f"{path}/") for warning in result.warnings] == [
        "notes.txt",
        "seals/1.json",
        "values/c/9/0",
    ]
    for index in range(20):
        (path / f"more{index}").write_text("")
    assert "13 more files" in verify(path).warnings[-1]


def test_what_is_being_written_is_not_warned_of(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=1, finalize=False)
    (path / "values" / "c" / "1").mkdir()
    (path / "values" / "c" / "1" / "0").write_text("half a sha")
    (path / "values" / "c" / "1" / "0.123.partial").write_text("ha")
    assert verify(path).warnings == ()


def test_parts_left_beside_a_finalized_hdf5_store_are_warned_of(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of())
    (tmp_path / "a.h5.parts").mkdir()
    assert "left behind" in verify(path).warnings[0]


def test_a_damaged_part_of_an_unfinalized_hdf5_store_is_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.h5", manifest_of(), finalize=False)
    (tmp_path / "a.h5.parts" / "shards" / "00000001.h5").write_bytes(b"gone")
    assert {damage.shard for damage in verify(path).damage} == {1}


Change = Callable[[dict[str, Array]], None]


def put(name: str, place: tuple[int, ...], value: float) -> Change:
    def change(arrays: dict[str, Array]) -> None:
        arrays[name][place] = value

    return change


def swap_topk(arrays: dict[str, Array]) -> None:
    arrays["values"][2] = arrays["values"][2, ::-1]


ILLEGAL = [
    (Dense("float16"), put("status", (2,), 7), "status of 0, 1, 2"),
    (Dense("float16"), put("max_logit", (2,), np.inf), "a finite number"),
    (Dense("float16"), put("lse", (2, 0), -0.5), "of at least 0"),
    (Dense("float16"), put("lse", (2, 1), np.nan), "of at least 0"),
    (Dense("float16"), put("lse", (2, 1), 9.0), "sum to one at T = 4"),
    (Dense("float16"), put("entropy", (2,), 2.0), "0 to log 5 nats"),
    (Dense("float16"), put("hard_target", (2,), 5), "-1 to 4"),
    (Dense("float16"), put("hard_target_logprob", (2,), 0.5), "at most 0"),
    (Dense("float16"), put("values", (2, 1), np.nan), "at most 0 or -inf"),
    (Dense("float16"), put("values", (2, 1), 1.0), "at most 0 or -inf"),
    (Dense("float32"), put("values", (2, slice(None)), -1.0), "0 as the largest value"),  # type: ignore[arg-type]
    (Dense("float32"), put("values", (2, 3), -0.001), "sum to one at T = 1"),
    (Dense("uint8"), put("value_range", (2,), -1.0), "finite number of at least 0"),
    (Dense("uint8"), put("value_range", (2,), 0.5), "sum to one"),
    (TopK(3), put("ids", (2, 1), 5), "ids below 5"),
    (TopK(3), lambda arrays: arrays["ids"][2].fill(1), "every id once"),
    (TopK(3), swap_topk, "values sorted downward"),
    (TopK(3), swap_topk, "0 as the first value"),
    (TopK(3), put("log_tail", (2, 0), 1.0), "at most 0 or -inf"),
    (TopK(3), put("log_tail", (2, 1), -np.inf), "sum to one at T = 4"),
]


@pytest.mark.parametrize(("encoding", "change", "expected"), ILLEGAL)
def test_a_row_that_no_teacher_can_have_given_is_found(
    tmp_path: Path, encoding: Encoding, change: Change, expected: str
) -> None:
    manifest = manifest_of(encoding=encoding)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 2)
        change(arrays)
        if arrays["status"][2]:  # the writer wants an entry for it
            quarantine = [QuarantineEntry(18, "sample-18", "none")]
        writer.write_shard(2, arrays, quarantine)
    damage = [item for item in verify(tmp_path / "a.zarr").damage if expected in item.message]
    assert damage, verify(tmp_path / "a.zarr").damage
    assert (damage[0].shard, damage[0].chunk) == (2, 0)
    assert "row 18" in damage[0].message


def draws(ids: list[int], counts: list[int]) -> Change:
    def change(arrays: dict[str, Array]) -> None:
        arrays["ids"][2, 1], arrays["counts"][2, 1] = ids, counts

    return change


def known(logprobs: list[float]) -> Change:
    """Log-probabilities where the second of three next tokens begins another document."""

    def change(arrays: dict[str, Array]) -> None:
        arrays["position_ids"][2], arrays["hard_target_logprob"][2] = [0, 1, 0, 1], logprobs

    return change


def slipped(arrays: dict[str, Array]) -> None:
    """Each position of two rows holds the hidden state of the one before."""
    arrays["hidden"][2:4] = np.roll(arrays["hidden"][2:4].reshape(6, -1), 1, axis=0).reshape(2, 3, -1)


SAMPLE, HIDDEN = Sample(7, 3), hidden_encoding(5)
ILLEGAL_AT = [
    (TopK(3), put("lse", (2, 1, 0), -0.5), "of at least 0", "row 18, position 1"),
    (TopK(3), put("ids", (2, 2, 1), 5), "ids below 5", "row 18, position 2"),
    (Dense(), put("values", (2, 1, 3), -30), "sum to one at T = 4", "row 18, position 1"),
    (TopK(3), put("token_ids", (2, 1), 5), "ids below 5", "row 18"),
    (TopK(3), put("position_ids", (2, 0), 1), "0 first, then 0 or one more than before", "row 18"),
    (TopK(3), put("position_ids", (2, 2), 3), "0 first, then 0 or one more than before", "row 18"),
    (TopK(3), known([-1, np.nan, 0.5]), "at most 0 where the hard target is known", "row 18, position 2"),
    (TopK(3), known([np.nan, np.nan, -1]), "at most 0 where the hard target is known", "row 18, position 0"),
    (TopK(3), known([-1, -1, -1]), "NaN where the next token is masked", "row 18, position 1"),
    (SAMPLE, draws([1, 5, 0, 0, 0], [3, 4, 0, 0, 0]), "ids below 5", "row 18, position 1"),
    (SAMPLE, draws([1, 2, 0, 0, 0], [3, 5, 0, 0, 0]), "counts that sum to 7", "row 18, position 1"),
    (SAMPLE, draws([2, 1, 0, 0, 0], [3, 4, 0, 0, 0]), "ids in ascending order, each once", "row 18, position 1"),
    (SAMPLE, draws([2, 2, 0, 0, 0], [3, 4, 0, 0, 0]), "ids in ascending order, each once", "row 18, position 1"),
    (SAMPLE, draws([0, 1, 0, 0, 0], [0, 7, 0, 0, 0]), "no count behind a count of 0", "row 18, position 1"),
    (SAMPLE, draws([1, 0, 3, 0, 0], [7, 0, 0, 0, 0]), "id 0 where the count is 0", "row 18, position 1"),
    (HIDDEN, put("hidden", (2, 1, 3), np.inf), "finite numbers", "row 18, position 1"),
    (HIDDEN, slipped, "from which the head computes the stored max_logit", "row 19, position 2"),
    (HIDDEN, put("max_logit", (0, 0), 1.0), "the head computes the stored max_logit", "row 16, position 0"),
    (HIDDEN, put("lse", (3, 2, 1), 0.01), "from which the head computes the stored lse at T = 4", "row 19, position 2"),
]


@pytest.mark.parametrize(("encoding", "change", "expected", "place"), ILLEGAL_AT)
def test_a_position_that_no_teacher_can_have_given_is_found(
    tmp_path: Path, encoding: Encoding, change: Change, expected: str, place: str
) -> None:
    manifest = manifest_of(encoding=encoding, sequences=SEQUENCES)
    with StoreWriter.open(tmp_path / "a.zarr", manifest, head_for(manifest)) as writer:
        arrays, quarantine = shard_of(manifest, 2)
        change(arrays)
        writer.write_shard(2, arrays, quarantine)
    damage = [item for item in verify(tmp_path / "a.zarr").damage if expected in item.message]
    assert [(item.shard, item.chunk) for item in damage] == [(2, 0)]
    assert damage[0].message.endswith(f"{expected}, got something else in {place}")


def test_the_chunk_of_a_wrong_position_is_that_of_its_row(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=TopK(2), sequences=SEQUENCES)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 1)
        arrays["max_logit"][6, 1:] = np.nan  # rows 14 and 15 of the store, in the second chunk of shard 1
        arrays["max_logit"][7, 0] = np.nan
        writer.write_shard(1, arrays, quarantine)
    (damage,) = verify(tmp_path / "a.zarr").damage
    assert (damage.shard, damage.array, damage.chunk) == (1, "max_logit", 1)
    assert "got something else in row 14, position 1 and in 1 more rows near it" in damage.message


def test_a_masked_log_probability_is_asked_for_only_where_the_tokens_tell_it(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=TopK(2), sequences=WITHOUT_TOKENS)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 2)
        arrays["hard_target_logprob"][2] = [np.nan, -1, np.nan]
        arrays["hard_target_logprob"][3] = 1
        writer.write_shard(2, arrays, quarantine)
    (damage,) = verify(tmp_path / "a.zarr").damage
    assert "at most 0 where the hard target is known, got something else in row 19, position 0" in damage.message


@pytest.mark.parametrize(
    ("name", "expected"), [("counts", "0 in a row"), ("ids", "0 in a row"), ("lse", "NaN in a row")]
)
def test_a_refused_sequence_that_holds_targets_is_found(tmp_path: Path, name: str, expected: str) -> None:
    manifest = manifest_of(encoding=SAMPLE, sequences=SEQUENCES)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 0)
        arrays[name][3, 2] = 1
        writer.write_shard(0, arrays, quarantine)
    (damage,) = verify(tmp_path / "a.zarr").damage
    assert f"expected {expected} without targets, got something else in row 3" in damage.message


def test_hidden_states_beside_a_large_head_are_recomputed_at_the_start_of_a_shard_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_of(encoding=HIDDEN, sequences=SEQUENCES)
    for chunk in (0, 1):
        with StoreWriter.open(tmp_path / f"{chunk}.zarr", manifest, head_for(manifest)) as writer:
            arrays, quarantine = shard_of(manifest, 0)
            arrays["hidden"][4 * chunk : 4 * chunk + 3] = 0
            writer.write_shard(0, arrays, quarantine)
    assert [verify(tmp_path / f"{chunk}.zarr").ok for chunk in (0, 1)] == [False, False]
    monkeypatch.setattr(verification, "SPOT_HEAD_VALUES", 1)
    monkeypatch.setattr(verification, "blocks", lambda manifest, shard: blocks(manifest, shard, block_bytes=1))
    assert [verify(tmp_path / f"{chunk}.zarr").ok for chunk in (0, 1)] == [False, True]


def test_a_refused_row_that_holds_targets_is_found(tmp_path: Path) -> None:
    manifest = manifest_of()
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 0)
        arrays["lse"][3] = 1
        writer.write_shard(0, arrays, quarantine)
    (damage,) = verify(tmp_path / "a.zarr").damage
    assert "expected NaN in a row without targets, got something else in row 3" in damage.message


def test_minus_infinity_is_a_legal_value(tmp_path: Path) -> None:
    for encoding in ENCODINGS[:4]:
        manifest = manifest_of(num_rows=4, encoding=encoding, has_hard_targets=False)
        logits_NC = np.array([[1, 2, -np.inf, -np.inf, 0], [0, 0, 0, 0, 0], [-np.inf, 9, 1, 1, 1], [5, 4, 3, 2, 1]])
        arrays = encoding.encode(logits_NC.astype(np.float32), manifest.temperatures)
        arrays |= {"status": np.zeros(4, np.uint8), "sample_digest": np.ones(4, np.uint64)}
        path = tmp_path / f"{encoding.name}-{encoding.to_json()['values']}.zarr"
        with StoreWriter.open(path, manifest) as writer:
            writer.write_shard(0, arrays)
        assert verify(path).damage == ()


def test_progress_counts_every_sealed_row(tmp_path: Path) -> None:
    counted: list[int] = []
    verify(write_store(tmp_path / "a.zarr", manifest_of()), progress=counted.append)
    assert sum(counted) == 22


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="no such path"):
        verify(tmp_path / "nothing.zarr")
    path = write_store(tmp_path / "a.zarr", manifest_of(), finalize=False, shards=0)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"format_version": "1.0"', '"format_version": "2.0"'))
    with pytest.raises(
        FormatVersionError, match=r"a.zarr: manifest.json: expected format version 1\.x, got 2\.0; install a newer"
    ):
        verify(path)
