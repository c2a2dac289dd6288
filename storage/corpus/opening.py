"""Open the corpus at a path or URL."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.corpus.arrays import open_arrays
from storage.corpus.files import FILE_KINDS, absolute
from storage.corpus.idx import open_idx
from storage.corpus.images import open_images
from storage.corpus.kinds import CORPUS_KINDS, SEQUENCE_KINDS, check_kind, kinds_at, kinds_by_url, only_kind
from storage.corpus.matching import Advances
from storage.corpus.parquet import open_parquet
from storage.corpus.parquet_columns import Columns
from storage.corpus.parquet_text import open_parquet_text
from storage.corpus.protocol import Corpus
from storage.corpus.sequences import SequenceOptions
from storage.corpus.text import open_text
from storage.corpus.tokens import holds_ids, open_tokens
from storage.corpus.webdataset import open_webdataset
from storage.errors import CorpusError

__all__ = ["CORPUS_KINDS", "find_kind", "open_corpus"]

_BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


@dataclass(frozen=True)
class _Options:
    """What `open_corpus` is given beside path and kind."""

    labels: str | Path | None
    array: str | None
    sequence: SequenceOptions | None
    files: Sequence[str] | None
    columns: Columns
    progress: Advances | None


def open_corpus(
    path: str | Path,
    kind: str | None = None,
    labels: str | Path | None = None,
    array: str | None = None,
    sequence: SequenceOptions | None = None,
    *,
    files: Sequence[str] | None = None,
    columns: Columns | None = None,
    progress: Advances | None = None,
) -> Corpus:
    """The corpus at a path or URL, indexed and ready to read.

    Args:
        path: a folder of images, an IDX file or a folder with one, a `.npy`, `.npz`, HDF5 or Zarr v3 array, or `.tar`
            or `.parquet` files, as a folder, one file, or a pattern with braces and wildcards; for sequences, token ids
            as a 1-D `.npy` or a `.bin`, or text as `.txt`, `.jsonl` or `.parquet`, or a folder of these. A URL of
            images, `.tar` or `.parquet` files or one `.npy`.
        kind: one of `CORPUS_KINDS`; None finds it.
        labels: a `.npy` or IDX file of hard targets, instead of those that the corpus brings; `none` ignores these, and
            the classes that its folders name.
        array: name of the array, where the file or group holds several.
        sequence: how tokens and text are cut into sequences.
        files: names of the files that make up the corpus, in this order, of those that `list_files` gives; None takes
            all.
        columns: of Parquet files, where they are not to be found.
        progress: told of each file that is indexed, where there are many.

    Raises:
        CorpusError: there is nothing that can be used, or no `sequence` where one is needed; the message says what to
            do.
        PathError: a URL that can't be used.
        RemoteError: a URL that can't be reached.
        ValueError: an option for a corpus that has no use for it.
    """
    if _BROKEN_URL.match(str(path)):
        raise CorpusError(f"corpus '{path}': expected a path or a URL as text, got a URL made a path; give the text")
    path = absolute(path)
    where = f"corpus '{path}'"
    options = _Options(labels, array, sequence, files, columns or Columns(), progress)
    if kind is not None:
        check_kind(kind, isinstance(path, str), where)
    try:
        kind = _choose_kind(path, kind, sequence is not None, where)
        if kind in SEQUENCE_KINDS or (kind == "parquet" and sequence is not None):
            return _open_sequences(path, kind, options, where)
        _check_options(kind, options)
        return _open_samples(path, kind, options, where)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        place = f" at '{error.filename}'" if error.filename else ""
        raise CorpusError(
            f"{where}: expected something that can be read, got '{reason}'{place}; mend that, or give another path"
        ) from error


def find_kind(path: str | Path, is_sequence: bool = False) -> str:
    """The kind of the corpus at a path or URL, as `open_corpus` finds it.

    Args:
        path: as there.
        is_sequence: whether there are options of sequences.

    Raises:
        CorpusError: nothing that can be used is there, or several kinds.
    """
    path = absolute(path)
    return _choose_kind(path, None, is_sequence, f"corpus '{path}'")


def _choose_kind(path: Path | str, kind: str | None, has_options: bool, where: str) -> str:
    """The kind that is asked for, where that may be; else the one that is there."""
    if isinstance(path, Path):
        found = kinds_at(path, kind, has_options, where)
    else:
        found = kinds_by_url(path, has_options, where)
    if kind is None:
        return only_kind(found, path, where)
    if found and kind not in found:
        raise CorpusError(
            f"{where}: expected a corpus of the kind {kind}, got {' and '.join(found)}; "
            "leave --corpus-kind out, or give another path"
        )
    return kind


def _check_options(kind: str, options: _Options) -> None:
    """Refuse options that samples which stand alone have no use for.

    Raises:
        ValueError: there is one.
    """
    if options.sequence is not None:
        raise ValueError(
            f"sequence_length: expected a corpus of tokens or text, got {kind}; leave the options of sequences "
            "out, or give token ids as a 1-D .npy of integers or a .bin"
        )
    if options.array is not None and kind != "arrays":
        raise ValueError(f"array: expected a .npz, HDF5 or Zarr corpus for {options.array!r}, got {kind}; leave it out")
    if options.files is not None and kind not in FILE_KINDS:
        raise ValueError(f"files: expected a corpus of {' or '.join(FILE_KINDS)} files, got {kind}; leave them out")
    if kind != "parquet":
        _refuse_columns(kind, options.columns)


def _refuse_columns(kind: str, columns: Columns) -> None:
    for name, value in (("image_column", columns.image), ("label_column", columns.label)):
        if value is not None:
            raise ValueError(f"{name}: expected Parquet files of images for {value!r}, got {kind}; leave it out")


def _open_samples(path: Path | str, kind: str, options: _Options, where: str) -> Corpus:
    """A corpus of samples that stand alone."""
    labels, files = options.labels, options.files
    if kind == "images":
        return open_images(path, labels, files)
    if kind == "webdataset":
        return open_webdataset(path, labels, files, options.progress)
    if kind == "parquet":
        return open_parquet(path, labels, options.columns, files, options.progress)
    if isinstance(path, Path) and not path.exists():
        raise CorpusError(f"{where}: expected one file or folder for the kind {kind}, got a pattern; give one path")
    if kind == "arrays":
        return open_arrays(path, labels, options.array)
    assert isinstance(path, Path)
    return open_idx(path, labels)


def _open_sequences(path: Path | str, kind: str, options: _Options, where: str) -> Corpus:
    """The sequences of a corpus of tokens or text."""
    sequence, what = options.sequence, "text" if kind == "parquet" else kind
    for name, value in (("labels", options.labels), ("array", options.array), ("files", options.files)):
        if value is not None:
            raise ValueError(f"{name}: expected none for a corpus of {what}, got '{value}'; leave it out")
    _refuse_columns(what, options.columns)
    if kind == "parquet":
        assert sequence is not None
        return open_parquet_text(path, sequence)
    if isinstance(path, str) or not path.exists():
        raise CorpusError(f"{where}: expected one file or folder for the kind {kind}, got a pattern; give one path")
    if sequence is None:
        also = " and --tokenizer" if kind == "text" else ""
        of_what = "a 1-D array of integers, which are token ids" if holds_ids(path) else kind
        also = " and --token-dtype" if kind == "tokens" and not holds_ids(path) else also
        raise CorpusError(f"{where}: expected the length of a sequence for {of_what}; give --sequence-length{also}")
    return open_tokens(path, sequence) if kind == "tokens" else open_text(path, sequence)
