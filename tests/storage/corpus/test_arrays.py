import io
import json
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from storage.corpus import (
    SampleError,
    SequenceOptions,
    default_preprocess,
    open_corpus,
    read_batch,
    sample_digests,
    tables,
)
from storage.corpus.arrays import _take
from storage.corpus.labels import read_labels
from storage.corpus.protocol import ReadsRows
from storage.errors import CorpusError
from storage.remote import open_place
from tests.builders import random_pixels, write_npz
from tests.s3 import S3Server

X = np.random.default_rng(0).normal(size=(30, 3, 4)).astype(np.float32)
Y = np.arange(30) % 5


def write(path: Path, **arrays: Any) -> Path:
    """Named arrays in the form that a suffix asks for."""
    if path.suffix == ".npy":
        np.save(path, *arrays.values())
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    else:
        group = zarr.create_group(path, zarr_format=3)
        for name, values in arrays.items():
            parent = group.require_group(name.rpartition("/")[0]) if "/" in name else group
            chunks = (4, *values.shape[1:])[: values.ndim]
            parent.create_array(name.rpartition("/")[2], data=np.asarray(values), chunks=chunks)
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.zarr"])
def test_rows_come_back_exactly_in_any_order(tmp_path: Path, name: str) -> None:
    corpus = open_corpus(write(tmp_path / name, x=X))
    assert (corpus.kind, corpus.sample_kind, corpus.class_names, corpus.num_ignored) == ("arrays", "array", None, 0)
    assert corpus.num_samples == 30
    assert corpus.hard_targets is None
    assert corpus.key(3) == "3"
    assert isinstance(corpus, ReadsRows)
    assert corpus.row_bytes == 48
    for rows in ([5], [0, 29], [3, 4, 5], [7, 7, 2], list(range(30)), list(range(29, -1, -1))):
        assert np.array_equal(corpus.read_rows(np.array(rows)), X[rows])
    assert corpus.read_raw(11) == X[11].tobytes()
    assert np.array_equal(corpus.decode(corpus.read_raw(11)), X[11])


def test_the_same_rows_have_the_same_fingerprint_in_every_form(tmp_path: Path) -> None:
    names = ["a.npy", "a.npz", "a.h5", "a.zarr"]
    assert len({open_corpus(write(tmp_path / name, x=X)).fingerprint for name in names}) == 1
    assert open_corpus(write(tmp_path / "b.npy", x=X.astype("f8"))).fingerprint not in {
        open_corpus(tmp_path / "a.npy").fingerprint,
        open_corpus(write(tmp_path / "c.npy", x=X[:29])).fingerprint,
    }


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.zarr"])
@pytest.mark.parametrize("label", ["y", "labels", "targets", "hard_targets"])
def test_labels_beside_the_samples_are_found(tmp_path: Path, name: str, label: str) -> None:
    corpus = open_corpus(write(tmp_path / name, **{"x": X, label: Y}))
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.dtype == np.int32
    assert np.array_equal(corpus.hard_targets, Y)


@pytest.mark.parametrize("name", ["a.h5", "a.zarr"])
def test_labels_are_looked_for_in_the_group_of_the_samples(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, **{"train/x": X, "train/y": Y, "test/x": X[:5], "test/y": Y[:5] + 1})
    corpus = open_corpus(path, array="test/x")
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.zarr"])
def test_one_of_several_arrays_must_be_chosen(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, one=X, two=X + 1, y=Y)
    with pytest.raises(
        CorpusError, match="expected one array of samples, got 'one', 'two', 'y'; say which: --array NAME"
    ):
        open_corpus(path)
    assert np.array_equal(open_corpus(path, array="two").decode(open_corpus(path, array="two").read_raw(0)), X[0] + 1)
    for missing in ("three", "../two"):
        with pytest.raises(CorpusError, match=f"expected an array '{missing}', got 'one', 'two', 'y'; give the name"):
            open_corpus(path, array=missing)


def test_only_labels_are_no_samples(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="expected one array of samples, got 'y'; say which"):
        open_corpus(write(tmp_path / "a.npz", y=X))
    assert open_corpus(tmp_path / "a.npz", array="y").hard_targets is None


def test_two_arrays_of_labels_are_refused_unless_a_file_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", x=X, y=Y, labels=Y)
    with pytest.raises(CorpusError, match="expected one array of hard targets, got 'y', 'labels'; give the right ones"):
        open_corpus(path)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.zarr"])
def test_a_labels_file_wins(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "other.npy", Y[::-1].copy())
    arrays = {"x": X} if name == "a.npy" else {"x": X, "y": Y}
    corpus = open_corpus(write(tmp_path / name, **arrays), labels=tmp_path / "other.npy")
    assert np.array_equal(corpus.hard_targets, Y[::-1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:7], "the labels in it: expected 30 labels, one a sample, got 7"),
        (np.eye(5)[Y], "give class numbers, not one-hot rows"),
        (Y.astype(np.float32), "expected integers, got float32; save the class numbers as integers"),
        (Y - 2, "expected class numbers from 0 .*, got -2 to 2; number the classes from 0"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        open_corpus(write(tmp_path / "a.npz", x=X, y=labels))


def test_an_array_name_where_there_are_no_names_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"array: expected a file of several arrays for 'x', got a .npy; leave it out"):
        open_corpus(write(tmp_path / "a.npy", x=X), array="x")
    zarr.create_array(tmp_path / "b.zarr", data=X)
    with pytest.raises(ValueError, match="array: expected a group of arrays for 'x', got one array; leave it out"):
        open_corpus(tmp_path / "b.zarr", array="x")


def test_a_zarr_array_without_a_group_is_a_corpus(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "b.zarr", data=X, chunks=(7, 3, 4))
    assert open_corpus(tmp_path / "b.zarr").read_raw(29) == X[29].tobytes()


def test_an_array_inside_a_zarr_group_can_be_given_as_a_path(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", one=X, two=X + 1)
    assert open_corpus(tmp_path / "a.zarr" / "two").read_raw(0) == (X[0] + 1).tobytes()


@pytest.mark.parametrize("dtype", [">f4", ">i2", "u1", "?", "<f2", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_bytes_are_little_endian_and_in_c_order(tmp_path: Path, dtype: str, order: Any) -> None:
    values = np.asarray(X > 0 if dtype == "?" else X * 50 + 100).astype(dtype, order=order)
    corpus = open_corpus(write(tmp_path / "a.npy", x=values))
    expected = np.ascontiguousarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    assert corpus.read_raw(4) == expected[4].tobytes()
    assert isinstance(corpus, ReadsRows)
    rows = corpus.read_rows(np.array([4, 2]))
    assert rows.dtype == expected.dtype
    assert rows.flags.c_contiguous
    assert np.array_equal(corpus.decode(corpus.read_raw(4)), expected[4])


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickled_objects_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, x=np.array([[{"a": 1}], [None]], dtype=object))
    with pytest.raises(CorpusError, match="expected numbers, got an array of pickled Python objects or of strings"):
        open_corpus(path)


def test_strings_in_hdf5_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=[["a", "b"], ["c", "d"]], dtype=h5py.string_dtype())
    with pytest.raises(CorpusError, match="expected numbers, got an array of pickled Python objects or of strings"):
        open_corpus(tmp_path / "a.h5")


@pytest.mark.parametrize("values", [X.astype("c8"), np.full((3, 2), "text"), np.zeros((3, 2), "M8[s]"), X.astype("g")])
def test_types_that_are_no_numbers_of_64_bits_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(CorpusError, match="expected numbers of at most 64 bits, got"):
        open_corpus(write(tmp_path / "a.npy", x=values))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5"])
def test_no_rows_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=r"expected at least one sample, got shape \(0, 4\)"):
        open_corpus(write(tmp_path / name, x=np.zeros((0, 4))))


@pytest.mark.parametrize("values", [np.zeros(5), np.float32(3)])
def test_an_array_without_rows_of_values_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(CorpusError, match=r"expected samples along the first axis, shape \(N, ...\), got shape"):
        open_corpus(write(tmp_path / "a.npy", x=values))


def test_a_truncated_npy_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", x=X)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CorpusError, match=r"expected 1568 bytes for the shape \(30, 3, 4\), got 1564; the file is trunc"
    ):
        open_corpus(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CorpusError, match=r"expected a whole .npy array, got a damaged one"):
        open_corpus(path)
    path.write_bytes(b"no magic")
    with pytest.raises(CorpusError, match=r"expected a whole .npy array, got a damaged one"):
        open_corpus(path)


def test_a_truncated_or_strange_npz_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    data = path.read_bytes()
    for damaged in (data[:200], data[:60] + bytes(100) + data[160:], b"no zip file"):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"expected a whole .np[zy] .*take another copy"):
            open_corpus(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no arrays")
    with pytest.raises(CorpusError, match="expected an array of samples, got none; give a file that holds one"):
        open_corpus(path)


def test_an_npz_member_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    data = (tmp_path / "x.npy").read_bytes().replace(b"(30, 3, 4)", b"(99999, 4)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(CorpusError, match=r"array 'x': expected the shape \(99999, 4\) in it, got 1568 bytes"):
        open_corpus(tmp_path / "a.npz")


def test_an_npz_member_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_MEMORY_BYTES", 100)
    with pytest.raises(
        CorpusError, match=r"expected at most 100 bytes, since a .npz is read into memory.*save it as .npy"
    ):
        open_corpus(write_npz(tmp_path / "a.npz"))


def test_a_damaged_hdf5_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", x=X)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CorpusError, match="expected a whole HDF5 file, got a truncated or damaged one"):
        open_corpus(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(CorpusError, match="expected a whole HDF5 file, got a truncated or damaged one"):
        open_corpus(path)


def test_hdf5_labels_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = X
        file.create_dataset("y", data=Y, chunks=(30,), fletcher32=True)
        offset = file["y"].id.get_chunk_info(0).byte_offset
    flip(tmp_path / "a.h5", offset)
    with pytest.raises(CorpusError, match="expected a whole HDF5 file, got a damaged one"):
        open_corpus(tmp_path / "a.h5")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_damaged_hdf5_chunk_refuses_its_rows_only(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", data=X, chunks=(10, 3, 4), fletcher32=True)
        offset = dataset.id.get_chunk_info(1).byte_offset
    flip(tmp_path / "a.h5", offset)
    corpus = open_corpus(tmp_path / "a.h5")
    assert corpus.read_raw(9) == X[9].tobytes()
    with pytest.raises(SampleError, match="expected a row that can be read, got a damaged one"):
        corpus.read_raw(10)


def test_a_damaged_zarr_chunk_refuses_its_rows_only(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=X, chunks=(10, 3, 4), compressors=[zarr.codecs.Crc32cCodec()])
    flip(tmp_path / "a.zarr" / "c" / "1" / "0" / "0", 5)
    corpus = open_corpus(tmp_path / "a.zarr")
    assert corpus.read_raw(9) == X[9].tobytes()
    with pytest.raises(SampleError, match="expected a row that can be read, got a damaged one"):
        corpus.read_raw(10)


def test_a_damaged_zarr_group_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", x=X, y=Y)
    metadata = path / "x" / "zarr.json"
    value = json.loads(metadata.read_bytes())
    metadata.write_text(json.dumps(value | {"shape": "none"}))
    with pytest.raises(CorpusError, match="expected a Zarr v3 array that opens, got a damaged one"):
        open_corpus(path)
    metadata.write_text("no JSON")
    with pytest.raises(CorpusError, match="expected a Zarr v3 array that opens, got a damaged one"):
        open_corpus(path)


def test_zarr_groups_skip_what_is_no_array(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", x=X)
    (path / "notes").mkdir()
    (path / "odd").mkdir()
    (path / "odd" / "zarr.json").write_text("[]")
    assert open_corpus(path).num_samples == 30


def test_a_folder_without_zarr_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(
        CorpusError, match=r"expected a Zarr v3 array or group, got a folder without zarr.json; give one"
    ):
        open_corpus(tmp_path / "a", kind="arrays")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.zarr"])
def test_a_corpus_of_arrays_survives_pickling(tmp_path: Path, name: str) -> None:
    corpus = open_corpus(write(tmp_path / name, x=X), array=None if name == "a.npy" else "x")
    again = pickle.loads(pickle.dumps(corpus))
    assert len(pickle.dumps(corpus)) < 1000
    assert again.fingerprint == corpus.fingerprint
    assert again.read_raw(6) == corpus.read_raw(6)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.zarr"])
def test_many_threads_read_the_same_rows(tmp_path: Path, name: str) -> None:
    corpus = open_corpus(write(tmp_path / name, x=X))
    rows = np.random.default_rng(0).integers(0, 30, (200, 6))
    assert isinstance(corpus, ReadsRows)
    with ThreadPoolExecutor(8) as pool:
        for wanted, got in zip(rows, pool.map(corpus.read_rows, rows), strict=True):
            assert np.array_equal(got, X[wanted])


def test_bytes_of_another_length_are_no_sample(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.npy", x=X))
    with pytest.raises(SampleError, match="expected 48 bytes of a row, got 3"):
        corpus.decode(b"abc")
    with pytest.raises(ValueError, match="row: expected 0 to 29, got 30"):
        corpus.read_raw(30)


class Sliced:
    """A table that can only be sliced, as those on disk."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.values[rows]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20))
def test_rows_in_any_order_are_gathered_from_slices(rows: list[int]) -> None:
    values = random_pixels(100, 3)
    assert np.array_equal(_take(Sliced(values), np.array(rows)), values[rows])


# Behind a URL


def test_an_array_behind_a_url_is_the_corpus_that_it_is_on_disk(s3: S3Server, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(">f4")
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "y.npy", np.arange(50))
    url = s3.url("a.npy")
    open_place(url).put("", (tmp_path / "a.npy").read_bytes())
    local = open_corpus(tmp_path / "a.npy")
    for place in (url, s3.http(url)):
        remote = pickle.loads(pickle.dumps(open_corpus(place, labels=tmp_path / "y.npy")))
        assert (remote.kind, remote.path, remote.fingerprint) == ("arrays", place, local.fingerprint)
        np.testing.assert_array_equal(sample_digests(remote, 0, 50), sample_digests(local, 0, 50))
        batch = read_batch(remote, [49, 3, 3, 17], default_preprocess(remote))
        np.testing.assert_array_equal(batch.inputs, values[[49, 3, 3, 17]])
        assert pickle.loads(pickle.dumps(remote.part(5, 9))).read_raw(7) == local.read_raw(7)
    before = s3.ask()["bytes"]
    remote.read_rows(np.arange(10, 20))
    assert s3.ask()["bytes"] - before == 10 * 48


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: npy_of(np.asfortranarray(np.zeros((3, 2)))),
            "expected an array in C order, .* got one in Fortran order",
        ),
        (
            lambda: npy_of(np.zeros((30, 20)))[:-8],
            r"expected 4928 bytes for the shape \(30, 20\), got 4920; the file is",
        ),
        (lambda: npy_of(np.array([["a"]], object)), "expected numbers, got an array of pickled Python objects"),
        (lambda: b"something", "expected a whole .npy array, got a damaged one"),
        (
            lambda: claiming((10**15, 8)),
            r"expected \d+ bytes for the shape \(1000000000000000, 8\), got 128; the file is",
        ),
        (None, "expected a .npy file, got nothing there; check the URL"),
    ],
)
def test_arrays_behind_a_url_that_can_t_be_used_are_refused(
    s3: S3Server, make: Callable[[], bytes] | None, message: str
) -> None:
    url = s3.url("a.npy")
    if make is not None:
        open_place(url).put("", make())
    with pytest.raises(CorpusError, match=message):
        open_corpus(url)
    with pytest.raises(ValueError, match=r"array: expected a file of several arrays for 'x', got a .npy; leave it out"):
        open_corpus(url, array="x")


def test_kinds_that_are_not_read_by_url_say_what_to_do(s3: S3Server) -> None:
    for name, found in (("zarr.json", "got Zarr"), ("a.txt", "got 'a.txt' and others")):
        url = s3.url("x")
        open_place(url).put(name, b"{}")
        with pytest.raises(CorpusError, match=f"{found}.* to this machine first"):
            open_corpus(url)
    url = s3.url("x")
    with pytest.raises(
        CorpusError, match=r"expected images, .tar or .parquet files, or one .npy, got nothing there; check"
    ):
        open_corpus(url)
    for kind in ("idx", "tokens", "text"):
        with pytest.raises(
            CorpusError, match=rf"expected a kind that is read by URL \(.*\), got {kind}; copy it to this"
        ):
            open_corpus(url, kind=kind)
    with pytest.raises(
        CorpusError, match=r"expected a .tar, .parquet or .npy file over HTTP, .* got another URL; copy it"
    ):
        open_corpus(s3.http(url))
    with pytest.raises(CorpusError, match="got parquet; leave --corpus-kind out"):
        open_corpus(f"{url}/a.parquet", kind="images")
    for name in ("a.npy", "a.bin", "a.txt", "a.jsonl"):
        with pytest.raises(
            CorpusError, match="expected Parquet files of text, the only sequences that are read by URL"
        ):
            open_corpus(f"{url}/{name}", sequence=SequenceOptions(4))
    with pytest.raises(CorpusError, match=r"labels 's3://x/y.npy': expected a file on this machine, got a URL; copy"):
        read_labels("s3://x/y.npy", 3)
    open_place(url).put("manifest.json", b"{}")
    with pytest.raises(CorpusError, match="expected the samples, got a store of soft targets; give it as --targets"):
        open_corpus(url)


def npy_of(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()
