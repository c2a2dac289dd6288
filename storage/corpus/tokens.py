"""Flat token ids in a file: a 1-D `.npy`, or a `.bin` of a stated type; both are mapped, not read."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.corpus.labels import NPY_MAGIC, one_line
from storage.corpus.protocol import Array
from storage.corpus.sequences import (
    SequenceOptions,
    TokenCorpus,
    check_num_tokens,
    open_tokenizer,
    starts_behind,
    token_corpus,
)
from storage.corpus.tables import open_table
from storage.corpus.tokenizer import BYTES
from storage.errors import CorpusError

TOKENS_SUFFIX = ".bin"

# The first number of a `.bin` that llm.c writes, and the bytes of the header that it begins.
_LLMC_MAGIC, _LLMC_HEADER_BYTES = 20240520, 1024


def open_tokens(path: Path, options: SequenceOptions) -> TokenCorpus:
    """The sequences of token ids in a file.

    Args:
        path: a 1-D `.npy` of integers, or a file of nothing but ids of the type `options.dtype`, little-endian.
        options: sequence length and type; where documents begin; which tokenizer made the ids.

    Raises:
        CorpusError: it is no such file, or the boundaries do not fit it.
        ValueError: an option would be ignored.
    """
    where = f"corpus '{path}'"
    options = absolute_paths(options)
    if options.text_field is not None:
        raise ValueError(f"text_field: expected a corpus of text for {options.text_field!r}, got tokens; leave it out")
    tokenizer = open_tokenizer(options)
    ids_T = _open_ids(path, options.dtype, where)
    check_num_tokens(len(ids_T), where)
    _check_type(ids_T, options.vocab_size or (None if tokenizer is None else tokenizer.vocab_size), where)
    if options.boundaries is not None:
        starts_D = _read_boundaries(options.boundaries, len(ids_T))
    elif options.separator is not None:
        starts_D = starts_behind(ids_T, options.separator)
        if len(starts_D) == 1 and ids_T[-1] != options.separator:
            raise CorpusError(
                f"{where}: expected documents that end with the separator {options.separator}, got none; give the id "
                "that ends a document, or no separator for one document"
            )
    else:
        starts_D = np.zeros(1, np.int64)
    return token_corpus("tokens", path, options, ids_T, starts_D, tokenizer, open_tokens)


def absolute_paths(options: SequenceOptions) -> SequenceOptions:
    """The options with paths that mean the same in another folder."""
    tokenizer, boundaries = options.tokenizer, options.boundaries
    return replace(
        options,
        tokenizer=tokenizer if tokenizer in (None, BYTES) else os.path.abspath(tokenizer),  # noqa: PTH100
        boundaries=None if boundaries is None else os.path.abspath(boundaries),  # noqa: PTH100
    )


def holds_ids(path: Path) -> bool:
    """Whether a file is a `.npy` of one axis of integers."""
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, EOFError):
        return False
    return len(shape) == 1 and dtype.kind in "iu"


def _open_ids(path: Path, dtype: str | None, where: str) -> Array:
    if path.is_dir():
        raise CorpusError(f"{where}: expected a file of token ids, got a folder; give the file")
    with path.open("rb") as file:
        start = file.read(len(NPY_MAGIC))
    if start == NPY_MAGIC:
        if dtype is not None:
            raise ValueError(f"token_dtype: expected none for a .npy, which says its type, got {dtype}; leave it out")
        values = np.asarray(open_table(path, None, where)[0])
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise CorpusError(
                f"{where}: expected token ids, integers of shape (T,), got {values.dtype} of shape {values.shape}; "
                "save the ids of all documents as one flat array"
            )
        return values
    if dtype is None:
        raise CorpusError(
            f"{where}: expected the type of its ids, which it does not say, got none; give --token-dtype, uint16 for "
            "most vocabularies of up to 65,536 ids"
        )
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width or not size:
        raise CorpusError(
            f"{where}: expected ids of {width} bytes ({dtype}), got {size} bytes, which is no whole number of them; "
            "give the type that it was written with, or take another copy"
        )
    if int.from_bytes(start[:4], "little") == _LLMC_MAGIC and size > _LLMC_HEADER_BYTES:
        raise CorpusError(
            f"{where}: expected nothing but ids, got the header of llm.c before them; cut its {_LLMC_HEADER_BYTES} "
            f"bytes off: tail -c +{_LLMC_HEADER_BYTES + 1} FILE"
        )
    return np.asarray(np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r"))


def _check_type(ids_T: Array, vocab_size: int | None, where: str) -> None:
    """Refuse a type that can't hold every id of the vocabulary: larger ids were wrapped when they were written."""
    largest = int(np.iinfo(ids_T.dtype).max)
    if vocab_size is not None and vocab_size - 1 > largest:
        raise CorpusError(
            f"{where}: expected ids of a type that holds a vocabulary of {vocab_size}, got {ids_T.dtype.name}, which "
            f"ends at {largest}; write them as {np.min_scalar_type(vocab_size - 1)}, or give their own tokenizer"
        )


def _read_boundaries(name: str, num_tokens: int) -> NDArray[np.int64]:
    """Offsets at which documents begin, the first at 0, of a `.npy`."""
    where = f"boundaries '{name}'"
    path = Path(name)
    if not path.is_file():
        raise CorpusError(f"{where}: expected a .npy file of offsets, got nothing there; check the path")
    if not holds_ids(path):
        raise CorpusError(
            f"{where}: expected a .npy of the offset at which each document begins, integers of shape (D,), got "
            "another file or array; save them as one flat array"
        )
    try:
        values = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise CorpusError(
            f"{where}: expected a whole .npy file, got a truncated one ({one_line(error)}); take another copy"
        ) from error
    if not len(values):
        raise CorpusError(f"{where}: expected at least one offset, got none; leave them out for one document")
    unordered = np.flatnonzero(values[1:] <= values[:-1])
    if len(unordered):
        place = int(unordered[0])
        raise CorpusError(
            f"{where}: expected ascending offsets, got {values[place]} and then {values[place + 1]} at {place + 1}; "
            "sort them, and leave out those of empty documents"
        )
    if values[0] < 0 or values[-1] >= num_tokens:
        wrong = values[0] if values[0] < 0 else values[-1]
        raise CorpusError(
            f"{where}: expected offsets from 0 to {num_tokens - 1}, the last token, got {wrong}; give where documents "
            "begin, in tokens, without the end of the last"
        )
    starts_D = values.astype(np.int64)
    return starts_D if starts_D[0] == 0 else np.concatenate([np.zeros(1, np.int64), starts_D])
