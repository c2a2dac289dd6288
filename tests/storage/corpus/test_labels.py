import gzip
from pathlib import Path

import numpy as np
import pytest

from storage.corpus.labels import one_line, read_labels
from storage.errors import CorpusError
from tests.builders import idx_bytes


def test_labels_of_npy_and_idx_files_are_read_as_int32(tmp_path: Path) -> None:
    values = np.array([3, 0, 2])
    np.save(tmp_path / "a.npy", values)
    (tmp_path / "b").write_bytes(idx_bytes(values))
    (tmp_path / "c.gz").write_bytes(gzip.compress(idx_bytes(values)))
    for name in ("a.npy", "b", "c.gz"):
        labels = read_labels(tmp_path / name, 3)
        assert labels.dtype == np.int32
        assert labels.tolist() == [3, 0, 2]


def test_an_unknown_class_is_minus_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([-1, 0]))
    assert read_labels(tmp_path / "a.npy", 2).tolist() == [-1, 0]


def test_a_missing_labels_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"labels '.*none.npy': expected a .npy or IDX file, got nothing there"):
        read_labels(tmp_path / "none.npy", 3)


def test_pickled_or_truncated_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, None]))
    with pytest.raises(CorpusError, match=r"expected a whole .npy file of integers, got Object arrays"):
        read_labels(tmp_path / "a.npy", 2)
    np.save(tmp_path / "b.npy", np.arange(9))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"expected a whole .npy file of integers, got"):
        read_labels(tmp_path / "b.npy", 9)


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("0\n1\n")
    with pytest.raises(CorpusError, match="expected an IDX file, which starts with 00 00 08, got 30 0a 31 0a"):
        read_labels(tmp_path / "labels.txt", 2)


def test_what_an_exception_says_fits_in_one_line() -> None:
    assert one_line(ValueError("two\nlines\x00")) == "two lines?"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 500))) == 200
