"""The files that a corpus is made of, on disk or behind a URL.

A folder, one file, or a pattern with braces and wildcards gives names relative to a folder, in a fixed order. Nothing
is opened for that. Links that lead out of the folder are refused.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from storage.corpus.patterns import expand_braces, fixed_folder, has_wildcard, is_pattern, matcher
from storage.errors import CorpusError
from storage.remote import Place, is_url, open_place, split_url
from storage.urls import checked_url

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TAR_SUFFIXES = (".tar",)
PARQUET_SUFFIXES = (".parquet",)

# Kinds that are made of many files, so that some of them make a corpus too, with the suffixes of these.
FILE_KINDS = {"images": IMAGE_SUFFIXES, "webdataset": TAR_SUFFIXES, "parquet": PARQUET_SUFFIXES}

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})

_MANY_REQUESTS = 16
_FIRST_WORD = re.compile(r"[A-Za-z]+")


class FileEntry(NamedTuple):
    """A file of a corpus.

    Attributes:
        name: below the folder of the corpus, with `/` between its parts.
        num_bytes: its size.
        version: what changes when the file does: its time on disk, its tag behind a URL.
    """

    name: str
    num_bytes: int
    version: str


@dataclass(frozen=True)
class FoundFiles:
    """Files in order.

    Attributes:
        folder: what their names are relative to: absolute, or a URL.
        entries: the files.
        num_ignored: other files in the folder.
        example: name of one of these, or nothing.
    """

    folder: Path | str
    entries: list[FileEntry]
    num_ignored: int = 0
    example: str = ""


def list_files(path: str | Path, kind: str) -> list[FileEntry]:
    """The files that a corpus is made of by now, in its order, without opening them; none is no error.

    Args:
        path: a folder, one file, a pattern, or a URL of one of these.
        kind: `images`, `webdataset` or `parquet`.

    Raises:
        CorpusError: there is no such folder, or a link in it leads out of it.
        RemoteError: the URL can't be listed.
        ValueError: another kind, which is one file.
    """
    if kind not in FILE_KINDS:
        raise ValueError(f"kind: expected {' or '.join(FILE_KINDS)}, whose corpora are many files, got {kind!r}")
    return find_files(absolute(path), FILE_KINDS[kind]).entries


def absolute(path: str | Path) -> Path | str:
    """A path that means the same in another folder; of a URL its text.

    Raises:
        PathError: a URL that can't be used, such as one that carries credentials.
    """
    if is_url(path):
        return checked_url(str(path))
    return Path(os.path.abspath(path))  # noqa: PTH100 - links in the path stay as the user gave them


def find_files(path: Path | str, suffixes: tuple[str, ...]) -> FoundFiles:
    """The files of some suffixes at a path: those below a folder, sorted; one file; or those that a pattern names.

    Raises:
        CorpusError: nothing is there, a name that a pattern spells out is not there, or a link leads out of the folder.
        RemoteError: the URL can't be listed.
    """
    if isinstance(path, str):
        return _find_remote(path, suffixes)
    if path.is_dir():
        return _walk(path, suffixes)
    if path.exists():
        return FoundFiles(path.parent, [_local_entry(path.parent, path.name)])
    if is_pattern(str(path)):
        return _find_pattern(path)
    raise CorpusError(f"corpus '{path}': expected a file or folder, got nothing there; check the path")


def choose_files(found: FoundFiles, names: Sequence[str] | None, where: str) -> FoundFiles:
    """The files of these names, in this order; all where there are no names.

    Raises:
        CorpusError: one of them is not there.
        ValueError: one is named twice, or there is none.
    """
    if names is None:
        return found
    if not names or len(set(names)) != len(names):
        raise ValueError(f"files: expected names, each once, got {len(names)} with {len(set(names))} different ones")
    there = {entry.name: entry for entry in found.entries}
    missing = next((name for name in names if name not in there), None)
    if missing is not None:
        raise CorpusError(
            f"{where}: expected the file {missing!r}, got none of that name in '{found.folder}'; put it back"
        )
    return FoundFiles(found.folder, [there[name] for name in names], found.num_ignored, found.example)


def check_one_split(found: FoundFiles, where: str) -> None:
    """Refuse files of several splits, such as train and test, that are given as one corpus.

    Raises:
        CorpusError: they are.
    """
    words = {(_FIRST_WORD.match(entry.name.rpartition("/")[2]) or [""])[0].lower() for entry in found.entries}
    if len(words) > 1 and words <= SPLITS:
        first = max(words)
        raise CorpusError(
            f"{where}: expected files of one split, got {', '.join(sorted(words))}; "
            f"give a pattern for one of them: '{found.folder}/{first}*'"
        )


def walk_files(root: Path) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every visible entry below a folder that is not a folder, with its path below it; links are not followed."""
    pending = [(os.fspath(root), "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, f"{prefix}{entry.name}/"))
                else:
                    yield entry, prefix + entry.name


def first_file(path: Path, suffixes: tuple[str, ...], only_top: bool = False) -> str | None:
    """Name of some visible file of these suffixes below a folder, or in it alone; None where there is none."""
    if only_top:
        names = (name for name in sorted(os.listdir(path)) if not name.startswith("."))  # noqa: PTH208
        return next((name for name in names if has_suffix(name, suffixes) and (path / name).is_file()), None)
    return next((name for entry, name in walk_files(path) if has_suffix(name, suffixes) and entry.is_file()), None)


def check_link(file: str, name: str, path: Path, where: str) -> None:
    """Refuse a link that leads out of the folder, to a folder, or nowhere.

    Raises:
        CorpusError: it does.
    """
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(os.path.realpath(path)):
        raise CorpusError(
            f"{where}: expected links that stay inside the folder, got {name!r}, which leads to '{target}'; "
            "copy what it leads to"
        )
    if not target.is_file():
        what = "a folder, whose files would be there twice" if target.is_dir() else "nothing"
        raise CorpusError(f"{where}: expected links to files, got {name!r}, which leads to {what}; remove the link")


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends with one of the suffixes, in small or capital letters."""
    return name.lower().endswith(suffixes)


def _local_entry(folder: Path, name: str) -> FileEntry:
    status = (folder / name).stat()
    return FileEntry(name, status.st_size, str(status.st_mtime_ns))


def _walk(path: Path, suffixes: tuple[str, ...]) -> FoundFiles:
    where, entries, num_ignored, example = f"corpus '{path}'", [], 0, ""
    for entry, name in walk_files(path):
        is_one = has_suffix(name, suffixes)
        if entry.is_symlink() and (is_one or entry.is_dir()):
            check_link(entry.path, name, path, where)
        if is_one and entry.is_file():
            status = entry.stat()
            entries.append(FileEntry(name, status.st_size, str(status.st_mtime_ns)))
        else:
            num_ignored += 1
            example = min(example or name, name)
    entries.sort(key=lambda entry: os.fsencode(entry.name))
    return FoundFiles(path, entries, num_ignored, example)


def _find_pattern(path: Path) -> FoundFiles:
    """The files that a pattern on disk stands for."""
    where = f"corpus '{path}'"
    start, rest = fixed_folder(str(path))
    folder = Path(start or "/")
    if not folder.is_dir():
        raise CorpusError(f"{where}: expected a pattern inside a folder, got no folder '{folder}'; check the path")
    names: list[str] = []
    for spelled in expand_braces(rest):
        if not has_wildcard(spelled):
            names.append(spelled)
            continue
        matching = matcher(spelled)
        names += sorted((name for _, name in walk_files(folder) if matching.fullmatch(name)), key=os.fsencode)
    _check_names(names, where)
    entries = []
    for name in names:
        file = folder / name
        if not file.is_file():
            raise _not_there(where, name)
        if file.is_symlink():
            check_link(os.fspath(file), name, folder, where)
        entries.append(_local_entry(folder, name))
    return FoundFiles(folder, entries)


def _not_there(where: str, name: str) -> CorpusError:
    return CorpusError(f"{where}: expected the file {name!r}, which it names, got nothing there; check the pattern")


def _check_names(names: Iterable[str], where: str) -> None:
    """Refuse names that leave the folder, or stand there twice."""
    seen = set()
    for name in names:
        if ".." in name.split("/"):
            raise CorpusError(f"{where}: expected names below a folder, got {name!r}; leave '..' out behind a wildcard")
        if name in seen:
            raise CorpusError(f"{where}: expected each file once, got {name!r} twice; name it once")
        seen.add(name)


def _find_remote(url: str, suffixes: tuple[str, ...]) -> FoundFiles:
    """The files below a URL, the one at it, or those that a pattern stands for."""
    where = f"corpus '{url}'"
    if is_pattern(url):
        folder, rest = fixed_folder(url)
        place = open_place(folder)
        spelled = list(expand_braces(rest))
        if any(map(has_wildcard, spelled)):
            return _matching(place, spelled, where)
        return FoundFiles(folder, _sizes(place, spelled, where))
    if has_suffix(url, suffixes) and url.count("/") > 3:
        folder, name = split_url(url)
        size = open_place(folder).size(name)
        if size is not None:
            return FoundFiles(folder, [FileEntry(name, size, "")])
    place = open_place(url)
    if place.is_read_only:
        what = "a folder" if not has_suffix(url, suffixes) else "nothing there"
        raise CorpusError(
            f"{where}: expected a file over HTTP, which can't list what is in a folder, got {what}; name the files, as "
            "in train-{0000..0146}.tar, or use s3://, gs:// or az://"
        )
    entries, num_ignored, example = [], 0, ""
    for entry in place.list():
        if any(part.startswith(".") for part in entry.key.split("/")) or not entry.key or entry.key.endswith("/"):
            continue
        if has_suffix(entry.key, suffixes):
            entries.append(FileEntry(entry.key, entry.num_bytes, entry.version))
        else:
            num_ignored += 1
            example = min(example or entry.key, entry.key)
    entries.sort(key=lambda entry: os.fsencode(entry.name))
    return FoundFiles(place.url, entries, num_ignored, example)


def _matching(place: Place, spelled: Sequence[str], where: str) -> FoundFiles:
    """The files that patterns with wildcards stand for."""
    if place.is_read_only:
        raise CorpusError(
            f"{where}: expected names over HTTP, which can't list what is in a folder, got a wildcard; name the files, "
            "as in train-{0000..0146}.tar, or use s3://, gs:// or az://"
        )
    there = {entry.key: FileEntry(entry.key, entry.num_bytes, entry.version) for entry in place.list()}
    entries = []
    for pattern in spelled:
        if not has_wildcard(pattern) and pattern not in there:
            raise _not_there(where, pattern)
        matching = matcher(pattern)
        entries += [there[name] for name in sorted(there, key=os.fsencode) if matching.fullmatch(name)]
    _check_names((entry.name for entry in entries), where)
    return FoundFiles(place.url, entries)


def _sizes(place: Place, names: Sequence[str], where: str) -> list[FileEntry]:
    """The entries of names that are spelled out, asked for one by one."""
    _check_names(names, where)

    def entry(name: str) -> FileEntry:
        size = place.size(name)
        if size is None:
            raise _not_there(where, name)
        return FileEntry(name, size, "")

    with ThreadPoolExecutor(_MANY_REQUESTS, "sizes") as pool:
        return list(pool.map(entry, names))
