import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.corpus import CORPUS_KINDS, SequenceOptions, open_corpus
from storage.errors import CorpusError
from tests.builders import image_bytes, random_pixels, write_idx, write_image_folder, write_npz, write_store


def test_the_kind_is_found_from_what_is_there(tmp_path: Path) -> None:
    found = [
        open_corpus(write_image_folder(tmp_path / "images")).kind,
        open_corpus(write_idx(tmp_path / "idx")).kind,
        open_corpus(tmp_path / "idx").kind,
        open_corpus(write_idx(tmp_path / "plain", compressed=False)).kind,
        open_corpus(write_npz(tmp_path / "a.npz")).kind,
    ]
    assert found == ["images", "idx", "idx", "idx", "arrays"]


def test_files_are_known_by_their_first_bytes_whatever_their_names(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz").rename(tmp_path / "features.data")
    write_idx(tmp_path).rename(tmp_path / "digits")
    assert open_corpus(tmp_path / "features.data").kind == "arrays"
    assert open_corpus(tmp_path / "digits").kind == "idx"


@pytest.mark.parametrize("kind", CORPUS_KINDS)
def test_a_kind_that_contradicts_what_is_there_is_refused(tmp_path: Path, kind: str) -> None:
    paths = {
        "images": write_image_folder(tmp_path / "images"),
        "idx": write_idx(tmp_path / "idx"),
        "arrays": write_npz(tmp_path / "a.npz"),
    }
    for found, path in paths.items():
        if found == kind:
            assert open_corpus(path, kind=kind).kind == kind
            continue
        with pytest.raises(
            CorpusError, match=f"expected a corpus of the kind {kind}, got {found}; leave --corpus-kind out"
        ):
            open_corpus(path, kind=kind)


def test_a_folder_of_two_kinds_needs_the_kind(tmp_path: Path) -> None:
    write_idx(tmp_path)
    write_image_folder(tmp_path)
    with pytest.raises(CorpusError, match="expected one kind of corpus, got images and idx; say which: --corpus-kind"):
        open_corpus(tmp_path)
    assert open_corpus(tmp_path, kind="idx").kind == "idx"
    assert open_corpus(tmp_path, kind="images").num_ignored == 2


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError,
        match="expected the kind images, idx, arrays, tokens, text, webdataset, parquet, got 'image'; choose one",
    ):
        open_corpus(tmp_path, kind="image")


def test_a_url_that_was_made_a_path_is_refused() -> None:
    with pytest.raises(CorpusError, match="expected a path or a URL as text, got a URL made a path; give the text"):
        open_corpus(Path("s3://bucket/images"))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    for kind in (None, *CORPUS_KINDS):
        with pytest.raises(CorpusError, match="expected a file or folder, got nothing there; check the path"):
            open_corpus(tmp_path / "none", kind=kind)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").touch()
    with pytest.raises(CorpusError, match="expected a corpus, got an empty file; take another copy"):
        open_corpus(tmp_path / "x.npy")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for kind in (None, "images"):
        with pytest.raises(
            CorpusError, match=r"expected images \(.*\).*, got an empty folder; give a folder that holds"
        ):
            open_corpus(tmp_path, kind=kind)


def test_a_folder_of_text_files_says_what_is_looked_for_and_what_was_found(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("words")
    (tmp_path / "README").write_text("words")
    with pytest.raises(
        CorpusError,
        match=r"expected images \(.jpg, .jpeg, .png, .webp\), IDX files, .tar or .parquet files, a Zarr array, or with "
        r"--sequence-length text \(.txt, .jsonl\), got 4 other file\(s\) \(3 of .txt, 1 of no suffix; for example "
        r"'0.txt'\); give a folder",
    ):
        open_corpus(tmp_path)


def test_a_folder_of_arrays_names_them(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros((3, 2)))
    with pytest.raises(CorpusError, match=r"got a folder that holds 'a.npz', 'b.npy'; give the path of one of them"):
        open_corpus(tmp_path)


def test_zarr_of_version_2_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(CorpusError, match="expected Zarr v3, got Zarr v2; save it again with zarr-python 3"):
        open_corpus(tmp_path)


def test_one_image_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(random_pixels(4, 4)))
    with pytest.raises(CorpusError, match=r"expected a folder of images, got one image; give the folder '.*'"):
        open_corpus(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "train-{0..3}.tar.gz"])
def test_packed_tars_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(CorpusError, match=r"expected plain .tar files, .* got packed ones; unpack them to .tar"):
        open_corpus(tmp_path / name)


def test_a_pattern_without_a_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(
        CorpusError, match=r"expected a pattern that ends with .tar or .parquet, got another; say the kind"
    ):
        open_corpus(tmp_path / "*.txt")
    for kind in ("idx", "arrays"):
        with pytest.raises(
            CorpusError, match=f"expected one file or folder for the kind {kind}, got a pattern; give one"
        ):
            open_corpus(tmp_path / "*.txt", kind)
    with pytest.raises(
        CorpusError, match="expected one file or folder for the kind text, got a pattern; give one path"
    ):
        open_corpus(tmp_path / "*.txt", "text", sequence=BYTES)


def test_a_pickle_or_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(
        CorpusError, match=r"got a file that starts with 80 04 95 .*, which may be a pickle; save the samples"
    ):
        open_corpus(tmp_path / "a.pkl")
    (tmp_path / "a.xyz").write_bytes(b"something")
    with pytest.raises(CorpusError, match=r"got a file that starts with 73 6f 6d 65; save the samples"):
        open_corpus(tmp_path / "a.xyz")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"something"))
    with pytest.raises(CorpusError, match=r"got a file that starts with 1f 8b"):
        open_corpus(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"something")[:5])
    with pytest.raises(CorpusError, match=r"got a file that starts with 1f 8b"):
        open_corpus(tmp_path / "b.gz")


@pytest.mark.parametrize("name", ["s.zarr", "s.h5"])
def test_a_store_of_soft_targets_is_refused(tmp_path: Path, name: str) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz"))
    path = write_store(tmp_path / name, corpus, finalize=True)
    write_store(tmp_path / "unfinished.h5", corpus)
    with pytest.raises(CorpusError, match="got a store of soft targets"):
        open_corpus(tmp_path / "unfinished.h5.parts")
    for kind in (None, "arrays"):
        with pytest.raises(
            CorpusError, match="expected the samples, got a store of soft targets; give it as --targets"
        ):
            open_corpus(path, kind=kind)


def test_another_manifest_does_not_make_a_store(tmp_path: Path) -> None:
    write_image_folder(tmp_path, class_names=[])
    for content in ('{"format": "another"}', "no JSON", json.dumps([1])):
        (tmp_path / "manifest.json").write_text(content)
        assert open_corpus(tmp_path).num_ignored == 1


def test_an_array_name_for_another_kind_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"array: expected a .npz, HDF5 or Zarr corpus for 'x', got images; leave it out"
    ):
        open_corpus(write_image_folder(tmp_path), array="x")


def test_a_path_relative_to_the_current_folder_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_npz(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("a.npz")
    monkeypatch.chdir("/")
    assert corpus.path == tmp_path / "a.npz"
    assert pickle.loads(pickle.dumps(corpus)).num_samples == 20


# Sequences


BYTES = SequenceOptions(4, tokenizer="bytes")


def test_sequences_are_found_from_what_is_there(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "a.bin").write_bytes(bytes(range(9)))
    (tmp_path / "b.bin").write_bytes(b"\0\0\x08\x01" + bytes(range(9)))  # as an IDX file begins
    (tmp_path / "text").mkdir()
    for name in ("text/a.txt", "text/a.md"):
        (tmp_path / name).write_text("words")
    (tmp_path / "a.jsonl").write_text('{"text": "words"}')
    ids = SequenceOptions(4, dtype="uint8")
    found = [
        open_corpus(tmp_path / "a.npy", sequence=SequenceOptions(4)),
        open_corpus(tmp_path / "a.bin", sequence=ids),
        open_corpus(tmp_path / "b.bin", sequence=ids),
        open_corpus(tmp_path / "text", sequence=BYTES),
        open_corpus(tmp_path / "text" / "a.txt", sequence=BYTES),
        open_corpus(tmp_path / "a.jsonl", sequence=BYTES),
        open_corpus(tmp_path / "text" / "a.md", kind="text", sequence=BYTES),
    ]
    assert [corpus.kind for corpus in found] == ["tokens"] * 3 + ["text"] * 4
    (tmp_path / "b.bin").rename(tmp_path / "ids")
    assert open_corpus(tmp_path / "ids", kind="tokens", sequence=ids).num_samples == 3


def test_text_beside_images_is_read_only_where_it_is_asked_for(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "README.txt").write_text("words")
    assert open_corpus(tmp_path).kind == "images"
    assert open_corpus(tmp_path, kind="text", sequence=BYTES).num_samples == 1
    with pytest.raises(ValueError, match="sequence_length: expected a corpus of tokens or text, got images; leave the"):
        open_corpus(tmp_path, sequence=BYTES)


def test_sequences_without_a_length_say_what_to_give(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    (tmp_path / "a.bin").write_bytes(bytes(range(9)))
    (tmp_path / "a.txt").write_text("words")
    message = (
        "expected the length of a sequence for a 1-D array of integers, which are token ids; give --sequence-length$"
    )
    with pytest.raises(CorpusError, match=message):
        open_corpus(tmp_path / "a.npy")
    message = "expected the length of a sequence for tokens; give --sequence-length and --token-dtype$"
    with pytest.raises(CorpusError, match=message):
        open_corpus(tmp_path / "a.bin")
    message = "expected the length of a sequence for text; give --sequence-length and --tokenizer$"
    for kind in (None, "text"):
        with pytest.raises(CorpusError, match=message):
            open_corpus(tmp_path / "a.txt", kind=kind)


def test_options_of_sequences_are_refused_for_other_corpora(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3), np.int64))
    for path, kind in ((write_idx(tmp_path / "idx"), "idx"), (tmp_path / "a.npy", "arrays")):
        with pytest.raises(
            ValueError, match=f"sequence_length: expected a corpus of tokens or text, got {kind}; leave"
        ):
            open_corpus(path, sequence=BYTES)


def test_sequences_have_neither_labels_nor_a_named_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    for options in ({"labels": "none"}, {"labels": tmp_path / "y.npy"}, {"array": "x"}):
        name, value = next(iter(options.items()))
        with pytest.raises(
            ValueError, match=f"{name}: expected none for a corpus of tokens, got '{value}'; leave it out"
        ):
            open_corpus(tmp_path / "a.npy", sequence=SequenceOptions(4), **options)


def test_flat_integers_are_not_taken_as_samples_of_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(CorpusError, match="expected a corpus of the kind arrays, got tokens; leave --corpus-kind out"):
        open_corpus(tmp_path / "a.npy", kind="arrays")


def test_a_folder_of_tokens_names_them(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(9))
    with pytest.raises(CorpusError, match=r"got a folder that holds 'train.bin'; give the path of one of them"):
        open_corpus(tmp_path, sequence=BYTES)
