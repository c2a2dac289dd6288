import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from storage.corpus import Corpus, SampleError, open_corpus
from storage.corpus.protocol import ReadsRows
from storage.errors import CorpusError
from tests.builders import idx_bytes, random_pixels, write_idx


def images_of(corpus: Corpus) -> np.ndarray:
    return np.stack([corpus.decode(corpus.read_raw(row)) for row in range(corpus.num_samples)])


@pytest.mark.parametrize("compressed", [False, True])
def test_images_and_the_labels_beside_them_are_read(tmp_path: Path, compressed: bool) -> None:
    corpus = open_corpus(write_idx(tmp_path, compressed=compressed))
    assert np.array_equal(images_of(corpus)[..., 0], random_pixels(20, 6, 5))
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.dtype == np.int32
    assert len(corpus.hard_targets) == 20
    assert (corpus.kind, corpus.sample_kind, corpus.class_names, corpus.num_ignored) == ("idx", "image", None, 0)
    assert corpus.key(7) == "7"
    assert isinstance(corpus, ReadsRows)
    assert corpus.row_bytes == 30


def test_a_gzip_file_and_a_plain_one_are_the_same_corpus(tmp_path: Path) -> None:
    one, two = (open_corpus(write_idx(tmp_path / str(flag), compressed=flag)) for flag in (False, True))
    assert one.fingerprint == two.fingerprint
    assert one.read_raw(3) == two.read_raw(3)


def test_a_plain_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big-images-idx3-ubyte"
    with path.open("wb") as file:
        file.write(bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (1 << 14, 1 << 10, 1 << 10)))
        file.truncate(16 + (1 << 34))
    assert open_corpus(path).num_samples == 1 << 14


def test_another_shape_has_another_fingerprint(tmp_path: Path) -> None:
    one = open_corpus(write_idx(tmp_path / "one", num_samples=10, size=(6, 5)))
    two = open_corpus(write_idx(tmp_path / "two", num_samples=10, size=(5, 6)))
    assert one.fingerprint != two.fingerprint


def test_colour_images_are_read(tmp_path: Path) -> None:
    pixels = random_pixels(3, 4, 5, 3)
    (tmp_path / "a-images-idx4-ubyte").write_bytes(idx_bytes(pixels))
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([1, 2, 0])))
    corpus = open_corpus(tmp_path / "a-images-idx4-ubyte")
    assert np.array_equal(images_of(corpus), pixels)
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.tolist() == [1, 2, 0]


def test_labels_of_the_other_compression_are_found(tmp_path: Path) -> None:
    path = write_idx(tmp_path, compressed=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert open_corpus(path).hard_targets is not None


def test_a_file_without_labels_beside_it_has_no_hard_targets(tmp_path: Path) -> None:
    (tmp_path / "faces.idx3-ubyte").write_bytes(idx_bytes(random_pixels(3, 4, 4)))
    assert open_corpus(tmp_path / "faces.idx3-ubyte").hard_targets is None
    assert open_corpus(tmp_path).num_samples == 3


def test_given_labels_win_over_those_beside_it(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    np.save(tmp_path / "other.npy", np.arange(20))
    corpus = open_corpus(path, labels=tmp_path / "other.npy")
    again = pickle.loads(pickle.dumps(corpus))
    for one in (corpus, again):
        assert one.hard_targets is not None
        assert one.hard_targets.tolist() == list(range(20))
    assert again.read_raw(4) == corpus.read_raw(4)


def test_labels_beside_it_of_another_count_are_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(19))))
    with pytest.raises(CorpusError, match="expected 20 labels, one a sample, got 19"):
        open_corpus(path)


def test_a_folder_with_one_file_of_images_is_a_corpus(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    corpus = open_corpus(tmp_path)
    assert corpus.path == path
    assert corpus.num_samples == 20


def test_a_folder_with_two_names_both(tmp_path: Path) -> None:
    write_idx(tmp_path, name="train")
    write_idx(tmp_path, name="t10k")
    with pytest.raises(
        CorpusError, match=r"got 2: 't10k-images.*gz' and 'train-images.*gz'; give one of them: '.*/t10k-images"
    ):
        open_corpus(tmp_path)


def test_a_folder_with_labels_only_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path).unlink()
    with pytest.raises(CorpusError, match="expected an IDX file of images, got none; give the path of the file"):
        open_corpus(tmp_path)


def test_a_labels_file_says_that_it_is_one_and_where_the_images_are(tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(
        CorpusError, match=r"expected images, got 20 labels; give the images: '.*train-images-idx3-ubyte"
    ):
        open_corpus(tmp_path / "train-labels-idx1-ubyte.gz")
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(CorpusError, match="got 20 labels; give the file of images"):
        open_corpus(tmp_path / "train-labels-idx1-ubyte.gz")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 2), (2, 2, 2, 2, 2)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "x-idx-ubyte").write_bytes(idx_bytes(random_pixels(*shape)))
    with pytest.raises(CorpusError, match=r"expected images of shape \(N, H, W\) or \(N, H, W, C\) with C 1 or 3, got"):
        open_corpus(tmp_path / "x-idx-ubyte")


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4)])
def test_no_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "x-idx3-ubyte").write_bytes(idx_bytes(np.empty(shape)))
    with pytest.raises(CorpusError, match="expected at least one image"):
        open_corpus(tmp_path / "x-idx3-ubyte")


def test_a_truncated_plain_file_is_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path, compressed=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CorpusError, match=r"expected 616 bytes for the shape \(20, 6, 5\), got 615; the file is truncated"
    ):
        open_corpus(path)


def test_a_file_with_more_bytes_than_its_shape_is_refused(tmp_path: Path) -> None:
    for compressed in (False, True):
        path = write_idx(tmp_path / str(compressed), compressed=compressed)
        data = path.read_bytes()
        path.write_bytes(gzip.compress(gzip.decompress(data) + b"x") if compressed else data + b"x")
        with pytest.raises(CorpusError, match="got more; the file is damaged"):
            open_corpus(path)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="expected a whole gzip file, got a truncated or damaged one"):
        open_corpus(path)


def test_a_gzip_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    with pytest.raises(CorpusError, match=r"expected 616 bytes for the shape .*, got 611; the file is truncated"):
        open_corpus(path)


def test_a_gzip_file_that_is_cut_in_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(CorpusError, match="expected a whole gzip file"):
        open_corpus(tmp_path / "x-images-idx3-ubyte.gz")


def test_a_gzip_file_that_claims_more_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (10_000, 100, 100))
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
    with pytest.raises(CorpusError, match="which can't hold them; it is truncated or damaged"):
        open_corpus(tmp_path / "x-images-idx3-ubyte.gz")
    header = bytes([0, 0, 8, 3]) + b"\xff" * 12
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
    with pytest.raises(CorpusError, match=r"expected at most \d+ bytes in a gzip file.*unpack it with gunzip first"):
        open_corpus(tmp_path / "x-images-idx3-ubyte.gz")


def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    with pytest.raises(CorpusError, match="expected 3 dimensions, got a file that ends in its header"):
        open_corpus(tmp_path / "x-images-idx3-ubyte")


def test_values_of_another_type_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes([0, 0, 0x0D, 1, 0, 0, 0, 1, 0, 0, 0, 0]))
    with pytest.raises(CorpusError, match=r"expected IDX values of type 0x08.*got type 0x0d; save them as .npy"):
        open_corpus(tmp_path / "x")


def test_a_file_that_is_not_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"some text")
    with pytest.raises(CorpusError, match="expected an IDX file, which starts with 00 00 08, got 73 6f 6d 65"):
        open_corpus(tmp_path / "x", kind="idx")


def test_bytes_of_another_length_are_no_sample(tmp_path: Path) -> None:
    corpus = open_corpus(write_idx(tmp_path))
    with pytest.raises(SampleError, match="expected 30 bytes of an image, got 3"):
        corpus.decode(b"abc")
    with pytest.raises(ValueError, match="row: expected 0 to 19, got 20"):
        corpus.read_raw(20)


def test_mnist_is_read_as_it_was_published(shared_data: Path) -> None:
    corpus = open_corpus(shared_data / "mnist" / "train-images-idx3-ubyte.gz")
    state = hashlib.md5(bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (60000, 28, 28)))
    assert isinstance(corpus, ReadsRows)
    state.update(corpus.read_rows(np.arange(60000)).tobytes())
    assert state.hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    assert corpus.hard_targets is not None
    assert corpus.hard_targets[:5].tolist() == [5, 0, 4, 1, 9]


def test_the_folder_of_mnist_names_its_two_files(shared_data: Path) -> None:
    with pytest.raises(CorpusError, match=r"'t10k-images-idx3-ubyte.gz' and 'train-images-idx3-ubyte.gz'; give one of"):
        open_corpus(shared_data / "mnist")
