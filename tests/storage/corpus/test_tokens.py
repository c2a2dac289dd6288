import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.corpus import SampleError, SequenceOptions, TokenCorpus, check_ids, open_corpus, sequences, tokens
from storage.corpus.protocol import ReadsRows
from storage.corpus.sequences import (
    has_several_documents,
    num_sequences,
    position_ids,
    read_ids,
    starts_behind,
    starts_of_lengths,
)
from storage.errors import CorpusError


def write_tokens(path: Path, ids: Any, dtype: str = "uint16") -> Path:
    """A `.npy` or `.bin` of token ids."""
    values = np.asarray(ids, np.dtype(dtype).newbyteorder("<"))
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        values.tofile(path)
    return path


def open_tokens(path: Path, length: int, **options: Any) -> TokenCorpus:
    corpus = open_corpus(path, sequence=SequenceOptions(length, **options))
    assert isinstance(corpus, TokenCorpus)
    return corpus


def slow_samples(ids: Sequence[int], starts: Sequence[int], length: int) -> list[list[list[int]]]:
    """Token ids and places of each sequence, a token at a time."""
    samples = []
    first = 0
    while first < len(ids) - 1:
        inside, places = [], []
        for offset in range(first, first + length + 1):
            if offset >= len(ids):
                inside.append(0)
                places.append(0)
                continue
            inside.append(ids[offset])
            places.append(offset - max(first, *(start for start in starts if start <= offset)))
        samples.append([inside, places])
        first += length
    return samples


documents = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


# Packing


@given(documents, st.integers(1, 14))
def test_sequences_and_places_are_those_of_a_slow_reading(lengths: list[int], length: int) -> None:
    ids = np.arange(100, 100 + sum(lengths))
    starts_D = starts_of_lengths(lengths)
    rows = np.random.default_rng(0).permutation(num_sequences(len(ids), length))
    for rows_N in (np.arange(len(rows)), rows, rows[:0], np.repeat(rows[:1], 3)):
        expected = np.array(slow_samples(ids.tolist(), [0, *starts_D.tolist()], length))[rows_N]
        assert np.array_equal(read_ids(ids, rows_N, length), expected[:, 0])
        assert np.array_equal(position_ids(starts_D, rows_N, length, len(ids)), expected[:, 1])


@given(documents, st.integers(1, 14))
def test_each_token_but_the_first_is_a_target_once_unless_it_begins_a_document(lengths: list[int], length: int) -> None:
    num_tokens = sum(lengths)
    ids = np.arange(1, num_tokens + 1)
    starts_D = starts_of_lengths(lengths)
    rows_N = np.arange(num_sequences(num_tokens, length))
    mask_NP = position_ids(starts_D, rows_N, length, num_tokens)[:, 1:] != 0
    targets = read_ids(ids, rows_N, length)[:, 1:][mask_NP]
    assert sorted(targets.tolist()) == sorted(set(ids.tolist()) - set((starts_D + 1).tolist()))


@given(documents, st.integers(1, 14))
def test_a_document_is_what_lies_between_two_places_of_zero(lengths: list[int], length: int) -> None:
    document_T = np.repeat(np.arange(len(lengths)), lengths)
    rows_N = np.arange(num_sequences(len(document_T), length))
    positions_NP = position_ids(starts_of_lengths(lengths), rows_N, length, len(document_T))
    document_NP = read_ids(document_T + 1, rows_N, length)
    is_real_NP = rows_N[:, None] * length + np.arange(length + 1) < len(document_T)
    counted_NP = np.cumsum(positions_NP == 0, axis=1)
    for row in rows_N:
        real = is_real_NP[row]
        _, expected = np.unique(document_NP[row][real], return_inverse=True)
        assert np.array_equal(counted_NP[row][real] - 1, expected)


@given(documents, st.integers(1, 14))
def test_several_documents_are_seen_among_the_tokens_that_a_model_reads(lengths: list[int], length: int) -> None:
    starts_D = starts_of_lengths(lengths)
    num_tokens = sum(lengths)
    inner = [start for start in starts_D.tolist() if start % length]
    assert has_several_documents(starts_D, length) == bool(inner)
    positions_NP = position_ids(starts_D, np.arange(num_sequences(num_tokens, length)), length, num_tokens)
    offsets_NP = np.arange(len(positions_NP))[:, None] * length + np.arange(length)
    restarts = (positions_NP[:, 1:-1] == 0) & (offsets_NP[:, 1:] < num_tokens)
    assert restarts.any() == bool(inner)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 7))
def test_a_separator_ends_its_document(ids: list[int], block: int) -> None:
    expected = [0] + [offset + 1 for offset, token in enumerate(ids[:-1]) if token == 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_SCAN_TOKENS", block)
        assert starts_behind(np.array(ids, np.uint8), 3).tolist() == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(st.integers(0, 200), min_size=2, max_size=60),
    st.integers(1, 20),
    st.sampled_from(["uint8", "uint16", "uint32", "int32", "int64"]),
    st.booleans(),
)
def test_rows_at_once_are_what_their_bytes_decode_to(
    tmp_path: Path, ids: list[int], length: int, dtype: str, is_npy: bool
) -> None:
    path = write_tokens(tmp_path / ("a.npy" if is_npy else "a.bin"), ids, dtype)
    corpus = open_tokens(path, length, dtype=None if is_npy else dtype)
    rows_N = np.arange(corpus.num_samples)[::-1]
    samples = corpus.read_rows(rows_N)
    assert samples.dtype == np.dtype("<u4")
    assert samples.shape == (len(rows_N), 2, length + 1)
    for row, sample in zip(rows_N.tolist(), samples, strict=True):
        raw = corpus.read_raw(row)
        assert len(raw) == corpus.row_bytes
        assert np.array_equal(corpus.decode(raw), sample)
    assert samples.tolist() == slow_samples(ids, [0], length)[::-1]


# The corpus


def test_a_corpus_of_tokens_says_what_it_is(tmp_path: Path) -> None:
    corpus = open_tokens(write_tokens(tmp_path / "a.bin", range(10)), 4, dtype="uint16")
    assert isinstance(corpus, ReadsRows)
    assert (corpus.kind, corpus.sample_kind, corpus.sequence_length) == ("tokens", "tokens", 4)
    assert (corpus.num_tokens, corpus.num_samples, corpus.num_documents, corpus.num_ignored) == (10, 3, 1, 0)
    assert (corpus.class_names, corpus.hard_targets, corpus.tokenizer, corpus.vocab_size) == (None,) * 4
    assert [corpus.key(row) for row in range(3)] == ["0-4", "4-8", "8-9"]
    assert corpus.read_rows(np.array([2])).tolist() == [[[8, 9, 0, 0, 0], [0, 1, 0, 0, 0]]]
    assert not corpus.has_several_documents
    assert isinstance(corpus.ids_T.base, np.memmap)


def test_documents_begin_where_the_boundaries_say(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    for name, offsets in (("b.npy", [0, 3, 8]), ("c.npy", [3, 8])):
        np.save(tmp_path / name, offsets)
        corpus = open_tokens(path, 4, boundaries=str(tmp_path / name))
        assert corpus.starts_D.tolist() == [0, 3, 8]
        assert corpus.read_rows(np.arange(3))[:, 1].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
        assert corpus.has_several_documents
        assert corpus.num_documents == 3


def test_documents_end_with_their_separator(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", [5, 6, 0, 7, 0, 0, 8, 9])
    corpus = open_tokens(path, 7, separator=0)
    assert corpus.read_rows(np.arange(1))[0].tolist() == [[5, 6, 0, 7, 0, 0, 8, 9], [0, 1, 2, 0, 1, 0, 0, 1]]
    assert open_tokens(write_tokens(tmp_path / "b.npy", [5, 6, 0]), 2, separator=0).num_documents == 1


def test_the_fingerprint_is_of_what_the_sequences_are_made_from(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    np.save(tmp_path / "b.npy", [0, 3, 8])
    np.save(tmp_path / "all.npy", [0])
    corpora = [
        open_tokens(path, 4),
        open_tokens(path, 5),
        open_tokens(path, 4, boundaries=str(tmp_path / "b.npy")),
        open_tokens(path, 4, tokenizer="bytes"),
        open_tokens(write_tokens(tmp_path / "longer.npy", range(11)), 4),
        open_tokens(write_tokens(tmp_path / "wider.npy", range(10), "uint32"), 4),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    same = [
        open_tokens(write_tokens(tmp_path / "c.bin", range(10)), 4, dtype="uint16"),
        open_tokens(path, 4, boundaries=str(tmp_path / "all.npy")),
        open_tokens(path, 4, vocab_size=99),
    ]
    assert {corpus.fingerprint for corpus in same} == {corpora[0].fingerprint}
    assert corpora[0].fingerprint == "fe10d63c235b36f4e998e232ae00421a6fcd38eacd8a3f5940a9c2b5be2f5309"


def test_a_corpus_of_tokens_is_pickled_and_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path / "a.bin", range(50))
    np.save(tmp_path / "b.npy", [0, 3, 8])
    monkeypatch.chdir(tmp_path)
    corpus = open_tokens(Path("a.bin"), 4, dtype="uint16", boundaries="b.npy", tokenizer="bytes")
    monkeypatch.chdir("/")
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.fingerprint == corpus.fingerprint
    assert again.options == corpus.options
    assert np.array_equal(again.read_rows(np.arange(13)), corpus.read_rows(np.arange(13)))


def test_the_tokenizer_or_the_option_says_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    assert open_tokens(path, 4, tokenizer="bytes").vocab_size == 256
    assert open_tokens(path, 4, vocab_size=10).vocab_size == 10
    larger = open_tokens(
        write_tokens(tmp_path / "b.npy", [1, 256, 299]), 4, tokenizer="bytes", vocab_size=300, separator=256
    )
    assert larger.vocab_size == 300
    assert larger.read_rows(np.arange(1)).tolist() == [[[1, 256, 299, 0, 0], [0, 1, 0, 0, 0]]]


def test_a_row_that_is_not_there_and_bytes_of_another_length_are_refused(tmp_path: Path) -> None:
    corpus = open_tokens(write_tokens(tmp_path / "a.npy", range(10)), 4)
    for read in (corpus.key, corpus.read_raw):
        with pytest.raises(ValueError, match="row: expected 0 to 2, got 3"):
            read(3)
    with pytest.raises(SampleError, match="expected 40 bytes of a sequence, got 39; take another copy"):
        corpus.decode(bytes(39))


# Ids out of range


def ids_of(path: Path, **options: Any) -> NDArray[np.uint32]:
    corpus = open_tokens(path, 4, **options)
    return corpus.read_rows(np.arange(corpus.num_samples)[::-1])


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", [0, 1, 2, 3, 4, 5, 300, 7, 8, 9, 301])
    assert ids_of(path, vocab_size=302).max() == 301
    message = r"corpus '.*a.npy': row 1, position 2: expected token ids from 0 to 299, got 300; give ids of this voc"
    with pytest.raises(CorpusError, match=message):
        ids_of(path, vocab_size=300)
    with pytest.raises(CorpusError, match="row 1, position 2: expected token ids from 0 to 255, got 300"):
        ids_of(path, tokenizer="bytes")


@pytest.mark.parametrize(("dtype", "wrong"), [("int32", -1), ("int64", -5), ("int64", 2**32), ("int8", -128)])
def test_ids_that_no_vocabulary_holds_are_refused(tmp_path: Path, dtype: str, wrong: int) -> None:
    path = write_tokens(tmp_path / "a.npy", [0, 1, 2, wrong, 4], dtype)
    with pytest.raises(CorpusError, match=f"row 0, position 3: expected token ids from 0 to 4294967295, got {wrong}"):
        ids_of(path)
    assert not isinstance(CorpusError, SampleError)


def test_a_batch_of_ids_is_checked_against_any_vocabulary() -> None:
    ids_NP = np.array([[1, 2], [3, 4], [9, 1]], np.int64)
    check_ids(ids_NP, np.array([7, 5, 6]), 10, "here")
    check_ids(ids_NP[:0], np.zeros(0, np.int64), 1, "here")
    check_ids(ids_NP.astype(np.uint8), np.arange(3), None, "here")
    with pytest.raises(CorpusError, match="here: row 5, position 1: expected token ids from 0 to 3, got 4; give"):
        check_ids(ids_NP, np.array([7, 5, 6]), 4, "here")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "sequence_length: expected 1 to 16777216 positions, got 0"),
        ({"length": 2**25}, "sequence_length: expected 1 to 16777216 positions, got 33554432"),
        ({"dtype": "float32"}, "token_dtype: expected uint8, uint16, uint32, int32, int64, got 'float32'"),
        ({"boundaries": "b.npy", "separator": 0}, "boundaries: expected them or a separator, got 'b.npy' and the sep"),
        ({"vocab_size": 0}, "vocab_size: expected 1 to 4294967296, got 0"),
        ({"separator": -1}, "separator: expected a token id from 0 to 4294967295, got -1"),
        ({"text_field": ""}, "text_field: expected the name of a field, got nothing; leave it out for 'text'"),
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceOptions(**{"length": 4, **options})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.npy", {"dtype": "uint16"}, "token_dtype: expected none for a .npy, which says its type, got uint16; leave"),
        ("a.npy", {"text_field": "x"}, "text_field: expected a corpus of text for 'x', got tokens; leave it out"),
        (
            "a.npy",
            {"tokenizer": "bytes", "vocab_size": 255},
            "vocab_size: expected at least the 256 ids of the tokenizer 'bytes', got 255; leave it out",
        ),
        (
            "a.npy",
            {"tokenizer": "bytes", "separator": 256},
            "separator: expected a token id below 256, the size of the vocabulary, got 256; give the id that ends",
        ),
        ("a.npy", {"vocab_size": 50, "separator": 50}, "separator: expected a token id below 50"),
    ],
)
def test_options_that_would_be_ignored_or_contradict_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    path = write_tokens(tmp_path / name, range(10))
    with pytest.raises(ValueError, match=message):
        open_tokens(path, 4, **options)


def test_a_type_is_needed_for_plain_ids_and_has_to_fit_the_size(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.bin", range(5))
    with pytest.raises(CorpusError, match=r"expected the type of its ids, .* got none; give --token-dtype, uint16 for"):
        open_tokens(path, 4)
    with pytest.raises(
        CorpusError, match=r"expected ids of 4 bytes \(uint32\), got 10 bytes, which is no whole number"
    ):
        open_tokens(path, 4, dtype="uint32")
    (tmp_path / "b.bin").touch()
    with pytest.raises(CorpusError, match=r"expected ids of 2 bytes \(uint16\), got 0 bytes"):
        tokens.open_tokens(tmp_path / "b.bin", SequenceOptions(4, dtype="uint16"))


def test_the_header_of_llm_c_is_not_read_as_ids(tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 4
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.arange(4, dtype="<u2").tobytes())
    with pytest.raises(CorpusError, match=r"expected nothing but ids, got the header of llm.c .*: tail -c \+1025 FILE"):
        open_tokens(tmp_path / "a.bin", 4, dtype="uint16")


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_corpus_without_anything_to_predict_is_refused(tmp_path: Path, num_tokens: int) -> None:
    path = write_tokens(tmp_path / "a.npy", range(num_tokens))
    for options in ({}, {"separator": 0}):
        with pytest.raises(CorpusError, match=f"expected at least 2 tokens, .* got {num_tokens}; give more"):
            open_tokens(path, 4, **options)


def test_an_array_that_holds_no_flat_ids_is_refused(tmp_path: Path) -> None:
    for values in (np.zeros((3, 4), int), np.zeros(5)):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(CorpusError, match=r"expected token ids, integers of shape \(T,\), got .*; save the ids of"):
            open_corpus(tmp_path / "a.npy", "tokens", sequence=SequenceOptions(4))


def test_a_truncated_array_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="the file is truncated, take another copy"):
        open_tokens(path, 4)
    with pytest.raises(CorpusError, match="expected a file of token ids, got a folder; give the file"):
        open_corpus(tmp_path, "tokens", sequence=SequenceOptions(4))


def test_a_separator_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10), "uint8")
    for separator in (77, 50256):
        with pytest.raises(CorpusError, match=f"expected documents that end with the separator {separator}, got none"):
            open_tokens(path, 4, separator=separator)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "expected at least one offset, got none; leave them out for one document"),
        ([0, 5, 5], "expected ascending offsets, got 5 and then 5 at 2; sort them, and leave out those of empty"),
        ([0, 6, 5], "expected ascending offsets, got 6 and then 5 at 2"),
        ([0, 10], "expected offsets from 0 to 9, the last token, got 10; give where documents begin, in tokens, with"),
        ([-1, 3], "expected offsets from 0 to 9, the last token, got -1"),
        ([0.0, 1.0], r"expected a .npy of the offset at which each document begins, integers of shape \(D,\), got ano"),
        ([[0, 1]], r"expected a .npy of the offset at which each document begins, integers of shape \(D,\), got ano"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(tmp_path: Path, offsets: Any, message: str) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    np.save(tmp_path / "b.npy", np.array(offsets, None if offsets else np.int64))
    with pytest.raises(CorpusError, match=f"boundaries '.*b.npy': {message}"):
        open_tokens(path, 4, boundaries=str(tmp_path / "b.npy"))


def test_boundaries_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a.npy", range(10))
    with pytest.raises(CorpusError, match=r"expected a .npy file of offsets, got nothing there; check the path"):
        open_tokens(path, 4, boundaries=str(tmp_path / "b.npy"))
    np.save(tmp_path / "b.npy", [0, 3])
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-1])
    with pytest.raises(CorpusError, match=r"expected a whole .npy file, got a truncated one"):
        open_tokens(path, 4, boundaries=str(tmp_path / "b.npy"))
    np.savez(tmp_path / "c.npz", a=[0])
    with pytest.raises(CorpusError, match="got another file or array; save them as one flat array"):
        open_tokens(path, 4, boundaries=str(tmp_path / "c.npz"))


def test_a_type_that_can_not_hold_the_vocabulary_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint8))
    message = (
        r"expected ids of a type that holds a vocabulary of 257, got uint8, which ends at 255; write them as uint16"
    )
    with pytest.raises(CorpusError, match=message):
        open_corpus(tmp_path / "ids.npy", sequence=SequenceOptions(8, vocab_size=257))
    assert open_corpus(tmp_path / "ids.npy", sequence=SequenceOptions(8, vocab_size=256)).num_samples == 13
