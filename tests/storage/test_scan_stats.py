"""`stats`: its figures are those that a plain count gives, and its picture can be looked at."""

import errno
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from storage.arrays import STATUS_UNDECODABLE, Array
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.sample import systematic_counts, uniforms
from storage.errors import DamageError, NotSealedError, OutOfSpaceError, PathError
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from storage.scan import Stats, statistics, stats, write_picture
from storage.scan.statistics import _ClassCounts, _Tally
from storage.writer import StoreWriter
from tests.storage.scan_stores import BLURRED, BROKEN, hard_targets_of, logits_of, manifest_of, shard_of, write_store
from tests.storage.soft_targets import hard_target_logprobs, hidden_encoding, num_positions_of, sequences_of

ROWS = [row for row in range(22) if row not in (BLURRED, BROKEN)]


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
@pytest.mark.parametrize("encoding", [Dense("float16"), Dense("float32"), TopK(3), TopK(2, "uint8")])
def test_counts_are_those_of_a_plain_count(tmp_path: Path, encoding: Encoding, suffix: str) -> None:
    manifest = manifest_of(encoding=encoding)
    logits_NC, target_N = logits_of(manifest)[ROWS], hard_targets_of(manifest)[ROWS]
    top1_N = logits_NC.argmax(axis=1)
    counted: list[int] = []
    figures = stats(write_store(tmp_path / f"a{suffix}", manifest), progress=counted.append)
    assert sum(counted) == 22
    assert figures.top1_counts == tuple(np.bincount(top1_N, minlength=5).tolist())
    assert figures.agreement is not None
    assert figures.agreement.num_rows == int((target_N >= 0).sum())
    assert figures.agreement.num_agreed == int((target_N == top1_N).sum()) == sum(figures.agreement.agreed_counts)
    assert figures.hard_target_nll == pytest.approx(
        -hard_target_logprobs(logits_NC, target_N)[target_N >= 0].mean(), rel=0.01
    )
    assert sum(figures.entropy.counts) == len(ROWS)
    entropy_N = manifest.encoding.encode(logits_NC, manifest.temperatures)["entropy"].astype(float)
    assert figures.entropy.mean == pytest.approx(entropy_N.mean())
    assert (figures.num_undecodable, figures.num_not_finite, figures.num_refused) == (1, 1, 2)
    assert [(item.reason, item.num_rows, item.key, item.row) for item in figures.refused] == [
        ("expected an image, got a truncated file", 1, "sample-3", BLURRED),
        ("expected finite logits, got NaN", 1, "sample-13", BROKEN),
    ]
    assert set(figures.bytes_by_array) == {spec.name for spec in manifest.arrays}
    json.dumps(figures.to_json(), allow_nan=False)


def is_counted(manifest: Manifest) -> Array:
    """Which flat positions are counted: those of rows with targets whose next token is of the same document."""
    row_R = np.repeat(np.isin(np.arange(manifest.num_rows), ROWS), num_positions_of(manifest))
    counted_R: Array = row_R & (hard_targets_of(manifest) >= 0)
    return counted_R


@pytest.mark.parametrize(
    ("encoding", "suffix"),
    [
        (Dense("float32"), ".zarr"),
        (TopK(3), ".h5"),
        (Sample(9), ".zarr"),
        (hidden_encoding(5, 4, values="float32", soft_cap=9.0, has_bias=True), ".h5"),
    ],
)
def test_tokens_are_counted_at_the_positions_that_are_not_masked(
    tmp_path: Path, encoding: Encoding, suffix: str
) -> None:
    manifest = manifest_of(encoding=encoding, sequences=sequences_of(3))
    counted_R = is_counted(manifest)
    logits_RC, target_R = logits_of(manifest)[counted_R], hard_targets_of(manifest)[counted_R]
    figures = stats(write_store(tmp_path / f"a{suffix}", manifest))
    assert figures.num_tokens == len(logits_RC) == counted_R.sum()
    assert (figures.num_positions, figures.counted, figures.num_refused) == (3, "tokens", 2)
    top1_R = logits_RC.argmax(axis=1)
    if isinstance(encoding, Sample):
        uniform_R = uniforms(encoding.seed, np.arange(22), 3)[counted_R]
        counts_RC = systematic_counts(logits_RC - logits_RC.max(axis=1, keepdims=True), 1.0, uniform_R, encoding.draws)
        top1_R = counts_RC.argmax(axis=1)  # of ids that came up equally often, the lowest
    assert figures.top1_counts == tuple(np.bincount(top1_R, minlength=5).tolist())
    assert figures.agreement is not None
    assert figures.agreement.num_rows == len(target_R)
    assert figures.agreement.num_agreed == int((target_R == top1_R).sum()) == sum(figures.agreement.agreed_counts)
    assert figures.agreement.hard_target_counts == tuple(np.bincount(target_R, minlength=5).tolist())
    assert sum(figures.entropy.counts) == len(logits_RC)
    logprob_R = hard_target_logprobs(logits_RC, target_R).astype(float)
    assert figures.hard_target_nll == pytest.approx(-logprob_R.mean())
    assert [sum(kept.tail_counts) for kept in figures.kept_mass] == [len(logits_RC)] * (
        2 if isinstance(encoding, TopK) else 0
    )
    assert figures.bytes_per_token is not None
    assert figures.bytes_per_token["lse"] == figures.bytes_by_array["lse"] / len(logits_RC)
    assert figures.head_bytes == (5 * 4 * 2 + 5 * 2 + 2 * 128 if isinstance(encoding, Hidden) else 0)
    value = json.loads(json.dumps(figures.to_json(), allow_nan=False))
    assert value["sequences"] == sequences_of(3).to_json()
    assert value["num_tokens"] == len(logits_RC)


def test_without_tokens_the_masked_log_probabilities_tell_what_is_counted(tmp_path: Path) -> None:
    sequences = sequences_of(3, has_tokens=False, tokenizer=None)
    manifest = manifest_of(encoding=TopK(2), sequences=sequences)
    figures = stats(write_store(tmp_path / "a.zarr", manifest))
    assert figures.num_tokens == is_counted(manifest).sum()
    assert figures.agreement is None
    assert figures.hard_target_nll is not None


def test_a_hidden_store_of_rows_counts_the_classes_of_its_head(tmp_path: Path) -> None:
    manifest = manifest_of(encoding=hidden_encoding(5, 4, values="float32"))
    figures = stats(write_store(tmp_path / "a.zarr", manifest))
    assert figures.top1_counts == tuple(np.bincount(logits_of(manifest)[ROWS].argmax(axis=1), minlength=5).tolist())
    assert (figures.num_tokens, figures.bytes_per_token, figures.counted) == (None, None, "rows")
    assert (figures.num_positions, figures.to_json()["sequences"]) == (1, None)


def test_sequences_of_which_every_position_is_masked_have_figures_and_a_picture(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=3, encoding=TopK(2), sequences=sequences_of(3))
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 0)
        arrays["position_ids"][:], arrays["hard_target_logprob"][:] = 0, np.nan
        writer.write_shard(0, arrays, quarantine)
    figures = stats(tmp_path / "a.zarr")
    assert (figures.num_tokens, figures.kept_mass, figures.hard_target_nll) == (0, (), None)
    assert figures.to_json()["bytes_per_token"] is None
    write_picture(figures, tmp_path / "a.html")


def test_a_hard_target_without_probability_has_no_mean_loss_in_json(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=3)
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        arrays, quarantine = shard_of(manifest, 0)
        arrays["hard_target_logprob"][0] = -np.inf
        writer.write_shard(0, arrays, quarantine)
    figures = stats(tmp_path / "a.zarr")
    assert figures.hard_target_nll == math.inf
    assert figures.to_json()["hard_target_nll"] is None


def words(number: int) -> str:
    """A number in letters: reasons that differ in digits alone count as one."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def test_it_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(num_rows=500, encoding=TopK(2)))
    one, four = stats(path, num_workers=1), stats(path, num_workers=4)
    assert one == four


def test_kept_mass_is_within_its_bound_of_the_exact_quantile(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=2000, num_classes=50, encoding=TopK(4), shard_rows=512, chunk_rows=64)
    figures = stats(write_store(tmp_path / "a.zarr", manifest))
    rows = [row for row in range(2000) if row not in (BLURRED, BROKEN)]
    logits_NC = logits_of(manifest)[rows].astype(float)
    for kept in figures.kept_mass:
        probs_NC = np.exp(logits_NC / kept.temperature)
        probs_NC /= probs_NC.sum(axis=1, keepdims=True)
        mass_N = np.sort(probs_NC, axis=1)[:, -4:].sum(axis=1)
        exact = float(np.sort(mass_N)[len(rows) - math.ceil(0.95 * len(rows))])
        assert kept.mean == pytest.approx(mass_N.mean(), abs=1e-6)
        assert kept.min == pytest.approx(mass_N.min(), abs=1e-6)
        assert exact * 0.99 <= kept.p5 <= exact + 1e-6
        assert sum(kept.tail_counts) == len(rows)
    assert [kept.temperature for kept in figures.kept_mass] == [1.0, 4.0]


def test_rows_with_two_top_classes_are_counted(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=3, encoding=Dense("uint8"), has_hard_targets=False)
    logits_NC = np.array([[5, 5, 0, 0, 0], [0, 1, 0, 0, 0], [0, 9, 8.999, 0, 0]], np.float32)
    arrays = manifest.encoding.encode(logits_NC, manifest.temperatures)
    arrays |= {"status": np.zeros(3, np.uint8), "sample_digest": np.ones(3, np.uint64)}
    with StoreWriter.open(tmp_path / "a.zarr", manifest) as writer:
        writer.write_shard(0, arrays)
    figures = stats(tmp_path / "a.zarr")
    assert figures.top1_counts == (1, 2, 0, 0, 0)
    assert figures.num_top1_ties == 2
    assert figures.agreement is None


def refused_store(path: Path, reasons: int) -> Path:
    """A store of which every row is refused, each for a reason of its own."""
    manifest = manifest_of(num_rows=8 * reasons, encoding=TopK(2))
    with StoreWriter.open(path, manifest) as writer:
        for shard in range(manifest.layout.num_shards):
            start, stop = manifest.layout.shard_bounds(shard)
            arrays = {spec.name: spec.full(stop - start) for spec in manifest.arrays}
            arrays["status"][:] = STATUS_UNDECODABLE
            entries = [QuarantineEntry(row, f"k{row}", f"reason {words(row // 2)}") for row in range(start, stop)]
            writer.write_shard(shard, arrays, entries)
    return path


def test_reasons_that_differ_in_numbers_alone_are_one() -> None:
    tally = _Tally.empty(manifest_of(), _ClassCounts(manifest_of(), "here"))
    for row, reason in enumerate(("byte 7 of 80 is wrong", "byte 12 of 9 is wrong", "no file")):
        tally.refuse(reason, f"k{row}", row)
    assert list(tally.reasons.values()) == [2, 1]
    assert list(tally.examples.values()) == [("byte 7 of 80 is wrong", "k0", 0), ("no file", "k2", 2)]


def test_a_store_of_refused_rows_has_figures_and_a_picture(tmp_path: Path) -> None:
    figures = stats(refused_store(tmp_path / "a.zarr", 3))
    assert (figures.num_refused, sum(figures.top1_counts), figures.kept_mass) == (24, 0, ())
    assert len(figures.refused) == 12
    assert figures.to_json()["entropy"]["mean"] is None
    write_picture(figures, tmp_path / "a.png")
    write_picture(figures, tmp_path / "a.html")


def test_reasons_beyond_the_most_are_counted_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_REASONS", 10)
    figures = stats(refused_store(tmp_path / "a.zarr", 4))
    assert len(figures.refused) == 11
    assert sum(item.num_rows for item in figures.refused) == 32
    assert (figures.refused[0].reason, figures.refused[0].num_rows) == ("other reasons", 12)


def test_a_store_without_sealed_shards_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of(), shards=0, finalize=False)
    with pytest.raises(NotSealedError, match="expected rows to count, got no sealed shard; resume the dump first"):
        stats(path)


def test_a_damaged_chunk_stops_the_count(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", manifest_of())
    file = path / "entropy" / "c" / "1"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    with pytest.raises(DamageError, match="array 'entropy', shard 1, chunk 0"):
        stats(path)


@pytest.fixture
def figures(tmp_path: Path) -> Stats:
    names = ("$x$", "<script>alert(1)</script>", "\u732b", "a very long name of a class that has no end", "e")
    return stats(write_store(tmp_path / "store.zarr", manifest_of(encoding=TopK(2), class_names=names)))


def test_a_png_is_a_png(tmp_path: Path, figures: Stats) -> None:
    write_picture(figures, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_html_page_is_self_contained_and_escapes_names(tmp_path: Path, figures: Stats) -> None:
    write_picture(figures, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not [link for link in ("src=", "@import", "url(http", 'href="http') if link in page]
    assert "expected an image, got a truncated file" in page


def test_a_picture_of_a_thousand_classes_shows_thirty_and_tells_of_the_rest(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=64, num_classes=1000, encoding=TopK(8), class_names=None, has_hard_targets=False)
    write_picture(stats(write_store(tmp_path / "a.zarr", manifest)), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Top-1 class, the 30 most frequent" in page
    assert "the other 970 classes" in page


def test_a_picture_of_a_vocabulary_tells_of_tokens_and_lists_the_most_frequent_ids(tmp_path: Path) -> None:
    manifest = manifest_of(num_rows=8, num_classes=3000, encoding=TopK(8), sequences=sequences_of(32))
    write_picture(stats(write_store(tmp_path / "store.zarr", manifest)), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for words in (
        "8 sequences of 32",
        "3,000 token ids",
        "Top-1 token id, the 30 most frequent (dark: it is the next token)",
        "the other 2,970 ids",
        "% of tokens",
        "What a token costs",
        "Token ids, the 1,000 most frequent",
    ):
        assert words in page, words
    assert page.count("<tr>") < 1100
    assert "class" not in page.split("<body>")[1].split("<svg")[0]


def test_a_picture_that_cannot_be_written_is_refused(
    tmp_path: Path, figures: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"picture: expected a path that ends in .png or .html, got 'a.gif'; rename it"
    ):
        write_picture(figures, tmp_path / "a.gif")
    with pytest.raises(PathError, match="expected a folder to write into, got none; make"):
        write_picture(figures, tmp_path / "none" / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        PathError, match=r"expected matplotlib to draw it, got none; install it: pip install 'logitstore"
    ):
        write_picture(figures, tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_a_disk_without_room_for_a_picture_is_said_and_keeps_the_old_one(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, path = stats(write_store(tmp_path / "a.zarr", manifest_of())), tmp_path / f"a{suffix}"
    path.write_bytes(b"the old one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("storage.backends.files._write_durably", full)
    with pytest.raises(OutOfSpaceError, match=rf"a{suffix}: expected room on the disk, got none; free space"):
        write_picture(figures, path)
    assert path.read_bytes() == b"the old one"
