import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.corpus import Corpus, SequenceOptions, default_preprocess, open_corpus, read_batch, sample_digests
from storage.corpus.part import CorpusPart, hard_targets_at
from storage.errors import CorpusError, CorpusMismatchError
from tests.builders import write_idx, write_image_folder, write_npz

KINDS = ("images", "idx", "arrays", "tokens", "text")


def make(folder: Path, kind: str) -> Corpus:
    """A small corpus of a kind."""
    if kind == "images":
        return open_corpus(write_image_folder(folder / "images", per_class=4))
    if kind == "idx":
        return open_corpus(write_idx(folder, num_samples=12))
    if kind == "arrays":
        return open_corpus(write_npz(folder / "a.npz", num_samples=12))
    if kind == "tokens":
        np.save(folder / "a.npy", np.arange(60))
        return open_corpus(folder / "a.npy", sequence=SequenceOptions(5))
    (folder / "a.txt").write_text("some words of text " * 4)
    return open_corpus(folder / "a.txt", sequence=SequenceOptions(5, tokenizer="bytes"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_reads_as_the_whole_does_under_the_same_rows(tmp_path: Path, kind: str) -> None:
    corpus = make(tmp_path, kind)
    part = pickle.loads(pickle.dumps(corpus.part(3, 9)))
    assert (part.kind, part.path, part.num_samples, part.fingerprint, part.sample_kind) == (
        corpus.kind,
        corpus.path,
        corpus.num_samples,
        corpus.fingerprint,
        corpus.sample_kind,
    )
    rows_N = np.array([8, 3, 5])
    preprocess = default_preprocess(corpus)
    one, two = read_batch(corpus, rows_N, preprocess), read_batch(part, rows_N, preprocess)
    np.testing.assert_array_equal(one.inputs, two.inputs)
    np.testing.assert_array_equal(one.digests_N, two.digests_N)
    np.testing.assert_array_equal(sample_digests(corpus, 3, 9), sample_digests(part, 3, 9))
    assert [corpus.key(row) for row in rows_N] == [part.key(row) for row in rows_N]
    assert corpus.read_raw(4) == part.read_raw(4)
    expected, found = hard_targets_at(corpus, rows_N), hard_targets_at(part, rows_N)
    assert (expected is None) == (found is None)
    if expected is not None and found is not None:
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_of_a_part_are_refused(tmp_path: Path, kind: str) -> None:
    corpus = make(tmp_path, kind)
    part = corpus.part(3, 9)
    for row in (2, 9):
        for read in (part.key, part.read_raw, lambda row: read_batch(part, [row], default_preprocess(corpus))):
            with pytest.raises(ValueError, match=f"row: expected 3 to 8, the rows of this part, got {row}"):
                read(row)
    for start, stop in ((-1, 3), (3, 3), (0, corpus.num_samples + 1)):
        with pytest.raises(ValueError, match=r"rows: expected a range inside \[0, "):
            corpus.part(start, stop)


def test_a_part_of_images_is_small_whatever_the_size_of_the_folder(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path, per_class=100))
    assert len(pickle.dumps(corpus.part(7, 9))) < 1500 < len(pickle.dumps(corpus))


def test_a_part_of_an_array_opens_nothing_until_it_is_used_and_the_whole_once(tmp_path: Path) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz"))
    parts = [pickle.loads(pickle.dumps(corpus.part(start, start + 5))) for start in (0, 5)]
    assert parts[0].samples is parts[1].samples
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    other = CorpusPart(*[getattr(parts[0], name) for name in CorpusPart.__dataclass_fields__])
    assert other.key(2) == "2"  # still open here
    gone = open_corpus(tmp_path / "b.npz").part(0, 5)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(CorpusError, match=r"got 'No such file or directory'; make it readable for every process"):
        gone.read_raw(2)


def test_a_part_of_a_corpus_that_is_another_one_here_is_refused(tmp_path: Path) -> None:
    part = open_corpus(write_npz(tmp_path / "a.npz", num_samples=20)).part(0, 5)
    write_npz(tmp_path / "a.npz", num_samples=21)
    for _ in range(2):
        with pytest.raises(
            CorpusMismatchError, match=r"expected the one that the run was begun with .*got another here"
        ):
            part.read_raw(2)
