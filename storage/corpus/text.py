"""Text and a tokenizer: JSONL with a document a line, plain text with a document a file, or a folder of such files."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from storage.corpus.files import check_link, walk_files
from storage.corpus.labels import one_line
from storage.corpus.sequences import (
    SequenceOptions,
    TokenCorpus,
    check_num_tokens,
    open_tokenizer,
    starts_of_lengths,
    token_corpus,
)
from storage.corpus.tokens import absolute_paths
from storage.errors import CorpusError

TEXT_SUFFIXES = (".txt", ".jsonl")

# Most tokens of a corpus of text, which are held in memory at 4 bytes each: 8 GiB.
MAX_TOKENS = 2**31

# Characters of documents that are handed to the tokenizer at once.
BATCH_CHARACTERS = 2**22


def open_text(path: Path, options: SequenceOptions) -> TokenCorpus:
    """The sequences of some text, which is tokenised here, once, into memory.

    At most 2^31 tokens (8 GiB) fit. A document is tokenised whole, which takes some 450 bytes a token while it lasts:
    what is larger is tokenised elsewhere and read as the kind `tokens`. Documents without a token are left out.

    Args:
        path: JSONL (`.jsonl`), plain text (any other suffix), or a folder with `.jsonl` and `.txt` files, which are
            taken in the order of their paths.
        options: sequence length, tokenizer, field, and the id to put behind each document.

    Raises:
        CorpusError: no tokenizer, nothing to read, or text that can't be read; the message names file and line.
        ValueError: an option would be ignored.
    """
    where = f"corpus '{path}'"
    options = absolute_paths(options)
    check_text_options(options, where)
    files, num_ignored = _text_files(path, where) if path.is_dir() else ([path], 0)
    if options.text_field is not None and not any(_is_jsonl(file) for file in files):
        raise ValueError(f"text_field: expected JSONL for {options.text_field!r}, got plain text; leave it out")
    texts = _batches(files, options.text_field or "text")
    return tokenise("text", path, options, texts, open_text, num_ignored)


def check_text_options(options: SequenceOptions, where: str) -> None:
    """Refuse options that text has no use for, and text without a tokenizer.

    Raises:
        CorpusError: there is no tokenizer.
        ValueError: an option would be ignored.
    """
    for name, value in (("token_dtype", options.dtype), ("boundaries", options.boundaries)):
        if value is not None:
            raise ValueError(f"{name}: expected a corpus of tokens for '{value}', got text; leave it out")
    if options.tokenizer is None:
        raise CorpusError(
            f"{where}: expected a tokenizer for the text, got none; give --tokenizer: bytes, a tokenizers JSON file or "
            "a folder with a tokenizer.json"
        )


def tokenise(
    kind: str,
    path: Path | str,
    options: SequenceOptions,
    texts: Iterable[list[str]],
    opener: Callable[[Any, SequenceOptions], TokenCorpus],
    num_ignored: int,
) -> TokenCorpus:
    """The sequences of documents, which are tokenised here, once, into memory.

    Args:
        kind: of the corpus.
        path: of the corpus.
        options: sequence length, tokenizer, and the id to put behind each document.
        texts: documents in order, some at a time.
        opener: opens the corpus again, in another process.
        num_ignored: files that are no text.

    Raises:
        CorpusError: fewer than two tokens, or more than fit.
    """
    tokenizer = open_tokenizer(options)
    assert tokenizer is not None
    buffer, lengths = bytearray(), []
    ending = b"" if options.separator is None else np.uint32(options.separator).tobytes()
    for batch in texts:
        for ids in tokenizer.encode(batch):
            if len(ids):
                buffer += ids.tobytes() + ending
                lengths.append(len(ids) + len(ending) // 4)
        if len(buffer) > 4 * MAX_TOKENS:
            raise CorpusError(
                f"corpus '{path}': expected at most {MAX_TOKENS} tokens, since text is tokenised in memory, got more; "
                "save the token ids as a .npy and use the kind tokens"
            )
    ids_T = np.frombuffer(buffer, np.uint32)
    check_num_tokens(len(ids_T), f"corpus '{path}'")
    return token_corpus(kind, path, options, ids_T, starts_of_lengths(lengths), tokenizer, opener, num_ignored)


def first_text(path: Path) -> str | None:
    """Name of some text file below a folder, or None where there is none."""
    return next((entry.path for entry, _ in walk_files(path) if entry.name.lower().endswith(TEXT_SUFFIXES)), None)


def _text_files(path: Path, where: str) -> tuple[list[Path], int]:
    """The text files below a folder, sorted, and the number of others."""
    names: list[bytes] = []
    num_ignored = 0
    for entry, name in walk_files(path):
        if not name.lower().endswith(TEXT_SUFFIXES):
            num_ignored += 1
            continue
        if entry.is_symlink():
            check_link(entry.path, name, path, where)
        names.append(os.fsencode(name))
    if not names:
        raise CorpusError(f"{where}: expected text ({', '.join(TEXT_SUFFIXES)}), got none; give a folder that holds it")
    return [path / os.fsdecode(name) for name in sorted(names)], num_ignored


def _is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _batches(files: list[Path], field: str) -> Iterator[list[str]]:
    """Documents in order, so many at once that a batch is neither large nor small."""
    texts: list[str] = []
    size = 0
    for file in files:
        for text in _read_jsonl(file, field) if _is_jsonl(file) else _read_plain(file):
            texts.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield texts
                texts, size = [], 0
    if texts:
        yield texts


def _read_plain(file: Path) -> Iterator[str]:
    """The one document of a plain file."""
    raw = file.read_bytes()
    if not raw:
        raise _empty(file)
    try:
        yield raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(file, line, error) from error


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    """The document of each line that is not blank."""
    is_empty = True
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.isspace():
                continue
            is_empty = False
            yield _text_of_line(raw, field, file, number)
    if is_empty:
        raise _empty(file)


def _text_of_line(raw: bytes, field: str, file: Path, number: int) -> str:
    where = f"text '{file}', line {number}"
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, error) from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{where}: expected a JSON object, got something else ({one_line(error)}); mend the line"
        ) from error
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: expected a JSON object, got {type(value).__name__}; mend the line")
    text = value.get(field)
    if not isinstance(text, str):
        names = ", ".join(repr(name) for name in list(value)[:6]) or "none"
        what = f"the fields {names}" if field not in value else type(text).__name__
        raise CorpusError(f"{where}: expected text in the field {field!r}, got {what}; say which field: --text-field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: expected text that UTF-8 holds, got half of a surrogate pair at character {error.start}; mend it"
        ) from error
    return text


def _empty(file: Path) -> CorpusError:
    return CorpusError(f"text '{file}': expected at least one document, got an empty file; remove it")


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(
        f"text '{file}', line {line}: expected UTF-8, got the byte 0x{error.object[error.start]:02x} ({error.reason}); "
        "save the file as UTF-8"
    )
