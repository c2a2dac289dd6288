"""Find what kind of corpus is at a path or URL, by names and first bytes."""

import gzip
import itertools
import json
import zlib
from pathlib import Path

from storage.corpus.files import (
    IMAGE_SUFFIXES,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    find_files,
    first_file,
    has_suffix,
)
from storage.corpus.idx import idx_files
from storage.corpus.images import describe_files, first_image
from storage.corpus.labels import GZIP_MAGIC, NPY_MAGIC
from storage.corpus.patterns import is_pattern
from storage.corpus.tables import HDF5_SUFFIXES, ZARR_METADATA
from storage.corpus.text import TEXT_SUFFIXES, first_text
from storage.corpus.tokens import TOKENS_SUFFIX, holds_ids
from storage.errors import CorpusError
from storage.remote import open_place

CORPUS_KINDS = ("images", "idx", "arrays", "tokens", "text", "webdataset", "parquet")

# Kinds whose samples are always sequences, which need `SequenceOptions`; Parquet with them is a corpus of text.
SEQUENCE_KINDS = ("tokens", "text")

# Kinds that are read by URL; of arrays only one `.npy`.
URL_KINDS = ("images", "webdataset", "parquet", "arrays")

_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_STORE_FORMAT = "logit-store"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257

# Objects below a URL that are looked at to find what kind of corpus it is.
_NUM_LOOKED_AT = 2000


def check_kind(kind: str, is_by_url: bool, where: str) -> None:
    """Refuse a kind that there is not, or that is not read by URL.

    Raises:
        CorpusError: it is one of these.
    """
    if kind not in CORPUS_KINDS:
        raise CorpusError(f"{where}: expected the kind {', '.join(CORPUS_KINDS)}, got {kind!r}; choose one of them")
    if is_by_url and kind not in URL_KINDS:
        raise CorpusError(
            f"{where}: expected a kind that is read by URL ({', '.join(URL_KINDS)}), got {kind}; copy it to this "
            "machine first"
        )


def kinds_by_url(url: str, has_options: bool, where: str) -> list[str]:
    """The kinds that may be at a URL, by the names that are there; none where it can't be told.

    Args:
        url: which.
        has_options: whether there are options of sequences.
        where: for messages.

    Raises:
        CorpusError: it is something that is not read by URL.
        RemoteError: it can't be listed.
    """
    _refuse_packed(url, where)
    if has_options and not has_suffix(url, (*TAR_SUFFIXES, *PARQUET_SUFFIXES)) and url.rpartition("/")[2].count("."):
        raise CorpusError(
            f"{where}: expected Parquet files of text, the only sequences that are read by URL, got another file; copy "
            "it to this machine first"
        )
    for kind, suffixes in (("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES), ("arrays", (".npy",))):
        if has_suffix(url, suffixes):
            return [kind]
    if is_pattern(url):
        return []
    place = open_place(url)
    if place.is_read_only:
        raise CorpusError(
            f"{where}: expected a .tar, .parquet or .npy file over HTTP, or names of them in braces, got another URL; "
            "copy it to this machine first"
        )
    names = [entry.key for entry in itertools.islice(place.list(), _NUM_LOOKED_AT)]
    if "manifest.json" in names:
        raise _is_store(where)
    if ZARR_METADATA in names:
        raise CorpusError(f"{where}: expected a kind that is read by URL, got Zarr; copy it to this machine first")
    kinds = (("images", IMAGE_SUFFIXES), ("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES))
    found = [kind for kind, suffixes in kinds if any(has_suffix(name, suffixes) for name in names)]
    if not found:
        what = f"{names[0]!r} and others" if names else "nothing there"
        raise CorpusError(
            f"{where}: expected images, .tar or .parquet files, or one .npy, got {what}; check the URL, or copy it to "
            "this machine first"
        )
    return found


def kinds_at(path: Path, kind: str | None, has_options: bool, where: str) -> list[str]:
    """The kinds that a path may hold, seen by its first bytes or names; none where it can't be told.

    Text beside images, and what a `.bin` begins with, is looked at only where it was asked for: `kind` is what the user
    says, `has_options` whether there are options of sequences.

    Raises:
        CorpusError: nothing is there, or a logit store.
    """
    _refuse_packed(path.name, where)
    if not path.exists():
        if is_pattern(str(path)):
            return _kinds_of_pattern(path)
        raise CorpusError(f"{where}: expected a file or folder, got nothing there; check the path")
    _refuse_store(path, where)
    return (
        _kinds_of_folder(path, kind, has_options) if path.is_dir() else _kinds_of_file(path, kind, has_options, where)
    )


def _kinds_of_pattern(path: Path) -> list[str]:
    """The kind that the end of a pattern says, else that of the files that it stands for."""
    kinds = (("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES))
    found = [kind for kind, suffixes in kinds if has_suffix(path.name, suffixes)]
    if found:
        return found
    names = [entry.name for entry in find_files(path, ()).entries]
    return [kind for kind, suffixes in kinds if names and all(has_suffix(name, suffixes) for name in names)]


def _kinds_of_folder(path: Path, kind: str | None, has_options: bool) -> list[str]:
    if (path / ZARR_METADATA).is_file():
        return ["arrays"]
    found = ["images"] if first_image(path) is not None else []
    found += ["idx"] if idx_files(path) else []
    for of_files, suffixes in (("webdataset", TAR_SUFFIXES), ("parquet", PARQUET_SUFFIXES)):
        # below the folder only where it holds nothing else: folders of many images are slow to walk
        if first_file(path, suffixes, only_top=bool(found) and kind != of_files) is not None:
            found.append(of_files)
    wants_text = kind == "text" or (has_options and not found)
    return [*found, "text"] if wants_text and first_text(path) is not None else found


def _kinds_of_file(path: Path, kind: str | None, has_options: bool, where: str) -> list[str]:
    with path.open("rb") as file:
        magic = file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
    if not magic:
        raise CorpusError(f"{where}: expected a corpus, got an empty file; take another copy")
    suffix = path.suffix.lower()
    if magic.startswith(NPY_MAGIC):
        return ["tokens"] if kind == "tokens" or holds_ids(path) else ["arrays"]
    if magic[_TAR_MAGIC_AT:] == _TAR_MAGIC or suffix in TAR_SUFFIXES:
        return ["webdataset"]
    if magic.startswith(_PARQUET_MAGIC) or suffix in PARQUET_SUFFIXES:
        return ["parquet"]
    if magic.startswith((b"PK\x03\x04", _HDF5_MAGIC)) or suffix in (*HDF5_SUFFIXES, ".npy", ".npz"):
        return ["arrays"]
    if (kind == "tokens" or (has_options and suffix == TOKENS_SUFFIX)) and not magic.startswith(GZIP_MAGIC):
        return ["tokens"]
    if _looks_like_idx(path, magic):
        return ["idx"]
    if suffix == TOKENS_SUFFIX:
        return ["tokens"]
    return ["text"] if suffix in TEXT_SUFFIXES else []


def _refuse_packed(name: str, where: str) -> None:
    """Refuse a tar that is packed as a whole."""
    if has_suffix(name, _PACKED_TARS):
        raise CorpusError(
            f"{where}: expected plain .tar files, whose members are read where they lie, got packed ones; unpack them "
            "to .tar"
        )


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
        raise _is_store(where)


def _is_store(where: str) -> CorpusError:
    return CorpusError(
        f"{where}: expected the samples, got a store of soft targets; give it as --targets, and the corpus as --data"
    )


def only_kind(found: list[str], path: Path | str, where: str) -> str:
    """The one kind that was found.

    Raises:
        CorpusError: there are two, or none; the message says what is there.
    """
    if len(found) == 1:
        return found[0]
    if found:
        raise CorpusError(f"{where}: expected one kind of corpus, got {' and '.join(found)}; say which: --corpus-kind")
    if isinstance(path, str) or not path.exists():
        raise CorpusError(
            f"{where}: expected a pattern that ends with .tar or .parquet, got another; say the kind: --corpus-kind"
        )
    if path.is_dir():
        raise _strange_folder(path, where)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise CorpusError(f"{where}: expected a folder of images, got one image; give the folder '{path.parent}'")
    with path.open("rb") as file:
        start = file.read(4)
    pickled = ", which may be a pickle" if start[:1] == b"\x80" else ""
    raise CorpusError(
        f"{where}: expected a folder of images, an IDX file, a .npy, .npz, HDF5 or Zarr array, .tar or .parquet files, "
        f"a .bin of token ids, or .txt or .jsonl text, got a file that starts with {start.hex(' ')}{pickled}; save the "
        "samples as one of these"
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
    return CorpusError(
        f"{where}: expected images ({', '.join(IMAGE_SUFFIXES)}), IDX files, .tar or .parquet files, a Zarr array, or "
        f"with --sequence-length text ({', '.join(TEXT_SUFFIXES)}), got {describe_files(path)}; give a folder that "
        "holds samples"
    )
