"""Find what kind of corpus a path holds, and open it."""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from storage.corpus.arrays import open_arrays
from storage.corpus.files import FILE_KINDS, IMAGE_SUFFIXES, absolute
from storage.corpus.idx import idx_files, open_idx
from storage.corpus.images import describe_files, first_image, open_images
from storage.corpus.labels import GZIP_MAGIC, NPY_MAGIC
from storage.corpus.protocol import Corpus
from storage.corpus.sequences import SequenceOptions
from storage.corpus.tables import HDF5_SUFFIXES, ZARR_METADATA
from storage.corpus.text import TEXT_SUFFIXES, first_text, open_text
from storage.corpus.tokens import TOKENS_SUFFIX, holds_ids, open_tokens
from storage.errors import CorpusError

CORPUS_KINDS = ("images", "idx", "arrays", "tokens", "text")

# Kinds whose samples are sequences, which need `SequenceOptions`.
SEQUENCE_KINDS = ("tokens", "text")

# Kinds that the design names and that this release does not read, with the suffixes that they are known by.
LATER_KINDS = {
    "webdataset": (".tar",),
    "parquet": (".parquet",),
}

_STORE_FORMAT = "logit-store"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def open_corpus(
    path: str | Path,
    kind: str | None = None,
    labels: str | Path | None = None,
    array: str | None = None,
    sequence: SequenceOptions | None = None,
    *,
    files: Sequence[str] | None = None,
) -> Corpus:
    """The corpus at a path, indexed and ready to read.

    Args:
        path: a folder of images, an IDX file or a folder with one, or a `.npy`, `.npz`, HDF5 or Zarr v3 array; for
            sequences, token ids as a 1-D `.npy` or a `.bin`, or text as `.txt` or `.jsonl`, or a folder of these.
        kind: one of `CORPUS_KINDS`; None finds it.
        labels: a `.npy` or IDX file of hard targets, instead of those that the corpus brings; `none` ignores these, and
            the classes that its folders name.
        array: name of the array, where the file or group holds several.
        sequence: how tokens and text are cut into sequences.
        files: names of the files that make up the corpus, in this order, of those that `list_files` gives; None takes
            all.

    Raises:
        CorpusError: there is nothing that can be used, or no `sequence` where one is needed; the message says what to
            do.
        ValueError: `array`, `labels`, `sequence` or `files` for a corpus that has no use for it.
    """
    if _BROKEN_URL.match(str(path)):
        raise CorpusError(f"corpus '{path}': expected a path or a URL as text, got a URL made a path; give the text")
    path = absolute(path)
    where = f"corpus '{path}'"
    if kind is not None:
        _check_kind(kind, where)
    try:
        found = _kinds_at(path, kind, sequence is not None, where)
        if kind is None:
            kind = _only_kind(found, path, where)
        elif found and kind not in found:
            raise CorpusError(
                f"{where}: expected a corpus of the kind {kind}, got {' and '.join(found)}; "
                "leave --corpus-kind out, or give another path"
            )
        if kind in SEQUENCE_KINDS:
            return _open_sequences(path, kind, labels, array, sequence, where)
        if sequence is not None:
            raise ValueError(
                f"sequence_length: expected a corpus of tokens or text, got {kind}; leave the options of sequences "
                "out, or give token ids as a 1-D .npy of integers or a .bin"
            )
        if array is not None and kind != "arrays":
            raise ValueError(f"array: expected a .npz, HDF5 or Zarr corpus for {array!r}, got {kind}; leave it out")
        if files is not None and kind not in FILE_KINDS:
            raise ValueError(f"files: expected a corpus of {' or '.join(FILE_KINDS)} files, got {kind}; leave them out")
        if kind == "images":
            return open_images(path, labels, files)
        assert isinstance(path, Path)
        return open_idx(path, labels) if kind == "idx" else open_arrays(path, labels, array)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        place = f" at '{error.filename}'" if error.filename else ""
        raise CorpusError(
            f"{where}: expected something that can be read, got '{reason}'{place}; mend that, or give another path"
        ) from error


def _open_sequences(
    path: Path | str,
    kind: str,
    labels: str | Path | None,
    array: str | None,
    sequence: SequenceOptions | None,
    where: str,
) -> Corpus:
    """The sequences of a corpus of tokens or text."""
    assert isinstance(path, Path)
    for name, value in (("labels", labels), ("array", array)):
        if value is not None:
            raise ValueError(f"{name}: expected none for a corpus of {kind}, got '{value}'; leave it out")
    if sequence is None:
        also = " and --tokenizer" if kind == "text" else ""
        what = "a 1-D array of integers, which are token ids" if holds_ids(path) else kind
        also = " and --token-dtype" if kind == "tokens" and not holds_ids(path) else also
        raise CorpusError(f"{where}: expected the length of a sequence for {what}; give --sequence-length{also}")
    return open_tokens(path, sequence) if kind == "tokens" else open_text(path, sequence)


def _check_kind(kind: str, where: str) -> None:
    if kind in LATER_KINDS:
        raise CorpusError(
            f"{where}: expected a kind of this release ({', '.join(CORPUS_KINDS)}), got {kind!r}, which is not in it; "
            "turn the corpus into one of these"
        )
    if kind not in CORPUS_KINDS:
        raise CorpusError(f"{where}: expected the kind {', '.join(CORPUS_KINDS)}, got {kind!r}; choose one of them")


def _kinds_at(path: Path | str, kind: str | None, has_options: bool, where: str) -> list[str]:
    """The kinds that a path may hold, seen by its first bytes or names; none where it can't be told.

    Text beside images, and what a `.bin` begins with, is looked at only where it was asked for: `kind` is what the user
    says, `has_options` whether there are options of sequences.

    Raises:
        CorpusError: nothing is there, or a logit store.
    """
    if isinstance(path, str):
        return ["images"]
    if not path.exists():
        raise CorpusError(f"{where}: expected a file or folder, got nothing there; check the path")
    _refuse_store(path, where)
    if path.is_dir():
        if (path / ZARR_METADATA).is_file():
            return ["arrays"]
        found = ["images"] if first_image(path) is not None else []
        found += ["idx"] if idx_files(path) else []
        wants_text = kind == "text" or (has_options and not found)
        return [*found, "text"] if wants_text and first_text(path) is not None else found
    with path.open("rb") as file:
        magic = file.read(8)
    if not magic:
        raise CorpusError(f"{where}: expected a corpus, got an empty file; take another copy")
    suffix = path.suffix.lower()
    if magic.startswith(NPY_MAGIC):
        return ["tokens"] if kind == "tokens" or holds_ids(path) else ["arrays"]
    if magic.startswith((b"PK\x03\x04", _HDF5_MAGIC)) or suffix in (*HDF5_SUFFIXES, ".npy", ".npz"):
        return ["arrays"]
    if (kind == "tokens" or (has_options and suffix == TOKENS_SUFFIX)) and not magic.startswith(GZIP_MAGIC):
        return ["tokens"]
    if _looks_like_idx(path, magic):
        return ["idx"]
    if suffix == TOKENS_SUFFIX:
        return ["tokens"]
    return ["text"] if suffix in TEXT_SUFFIXES else []


def _looks_like_idx(path: Path, magic: bytes) -> bool:
    if magic.startswith(GZIP_MAGIC):
        try:
            with gzip.open(path, "rb") as file:
                magic = file.read(4)
        except (EOFError, OSError, zlib.error):
            return "idx" in path.name  # so that its own opener says what is wrong with it
    return magic[:2] == b"\0\0" and magic[2:3] in b"\x08\x09\x0b\x0c\x0d\x0e"


def _refuse_store(path: Path, where: str) -> None:
    """Refuse a store of soft targets that is given as a corpus."""
    if path.is_dir():
        record, is_store = path / "manifest.json", False
        if record.is_file():
            try:
                value = json.loads(record.read_bytes())
                is_store = isinstance(value, dict) and value.get("format") == _STORE_FORMAT
            except (ValueError, RecursionError):
                is_store = False
    else:
        with path.open("rb") as file:
            is_store = file.read(64).startswith(f'{{"format": "{_STORE_FORMAT}"'.encode())
    if is_store:
        raise CorpusError(
            f"{where}: expected the samples, got a store of soft targets; give it as --targets, "
            "and the corpus as --data"
        )


def _only_kind(found: list[str], path: Path | str, where: str) -> str:
    """The one kind that was found.

    Raises:
        CorpusError: there are two, or none; the message says what is there.
    """
    if len(found) == 1:
        return found[0]
    if found:
        raise CorpusError(f"{where}: expected one kind of corpus, got {' and '.join(found)}; say which: --corpus-kind")
    assert isinstance(path, Path)
    if path.is_dir():
        raise _strange_folder(path, where)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise CorpusError(f"{where}: expected a folder of images, got one image; give the folder '{path.parent}'")
    for kind, suffixes in LATER_KINDS.items():
        if path.suffix.lower() in suffixes:
            raise CorpusError(
                f"{where}: expected a kind of this release ({', '.join(CORPUS_KINDS)}), got a {path.suffix} file, "
                f"the kind {kind}, which is not in it; turn the corpus into one of these"
            )
    with path.open("rb") as file:
        start = file.read(4)
    pickled = ", which may be a pickle" if start[:1] == b"\x80" else ""
    raise CorpusError(
        f"{where}: expected a folder of images, an IDX file, a .npy, .npz, HDF5 or Zarr array, a .bin of token ids, or "
        f".txt or .jsonl text, got a file that starts with {start.hex(' ')}{pickled}; save the samples as one of these"
    )


def _strange_folder(path: Path, where: str) -> CorpusError:
    """What to say about a folder that holds neither images, nor IDX files, nor a Zarr array."""
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if (path / ".zarray").is_file() or (path / ".zgroup").is_file():
        return CorpusError(f"{where}: expected Zarr v3, got Zarr v2; save it again with zarr-python 3")
    arrays = [name for name in names if Path(name).suffix.lower() in (".npy", ".npz", ".bin", *HDF5_SUFFIXES)]
    zarrs = [name for name in names if (path / name / ZARR_METADATA).is_file()]
    if arrays or zarrs:
        several = ", ".join(repr(name) for name in (arrays + zarrs)[:4])
        return CorpusError(
            f"{where}: expected one array, got a folder that holds {several}; give the path of one of them"
        )
    later = sorted(
        {kind for name in names for kind, suffixes in LATER_KINDS.items() if Path(name).suffix.lower() in suffixes}
    )
    more = f" (the kind {' or '.join(later)} is not in this release)" if later else ""
    return CorpusError(
        f"{where}: expected images ({', '.join(IMAGE_SUFFIXES)}), IDX files, a Zarr array, or with --sequence-length "
        f"text ({', '.join(TEXT_SUFFIXES)}), got {describe_files(path)}{more}; give a folder that holds samples"
    )
