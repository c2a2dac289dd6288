"""Parquet files with a column of texts, a document a row."""

from collections.abc import Iterator
from pathlib import Path

from storage.corpus.access import files_in
from storage.corpus.files import PARQUET_SUFFIXES, check_one_split, find_files
from storage.corpus.parquet_columns import find_text
from storage.corpus.parquet_files import ParquetFile, arrow_errors, group_rows, open_alone
from storage.corpus.sequences import SequenceOptions, TokenCorpus
from storage.corpus.text import BATCH_CHARACTERS, check_text_options, tokenise
from storage.corpus.tokens import absolute_paths
from storage.errors import CorpusError

# Documents that are read at once.
_BATCH_ROWS = 256


def open_parquet_text(path: Path | str, options: SequenceOptions) -> TokenCorpus:
    """The sequences of texts in Parquet files, which are tokenised here, once, into memory; see `open_text`.

    Args:
        path: one file, a folder of them, or a pattern, on disk or by URL.
        options: sequence length, tokenizer, `text_field` as the name of the column, and the id behind each document.

    Raises:
        CorpusError: no tokenizer, no column of texts, or a damaged file.
        ValueError: an option would be ignored.
    """
    where = f"corpus '{path}'"
    options = absolute_paths(options)
    check_text_options(options, where)
    found = find_files(path, PARQUET_SUFFIXES)
    if not found.entries:
        raise CorpusError(f"{where}: expected .parquet files, got none; give a folder, file or pattern of them")
    check_one_split(found, where)
    access = files_in(found.folder)
    files = [ParquetFile(access, entry.name, entry.num_bytes) for entry in found.entries]
    texts = (batch for file in files for batch in _texts(file, options.text_field))
    return tokenise("parquet", path, options, texts, open_parquet_text, found.num_ignored)


def _texts(file: ParquetFile, name: str | None) -> Iterator[list[str]]:
    """The documents of a file, some at a time; null is none."""
    group_rows(file)
    with arrow_errors(file.where):
        column = find_text(open_alone(file, None).schema_arrow, name, file.where)
        opened = open_alone(file, column)
    texts, size = list[str](), 0
    with arrow_errors(file.where):
        for batch in opened.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
            for value in batch.column(0):
                text = value.as_py()
                if text is None:
                    continue
                texts.append(text)
                size += len(text)
                if size >= BATCH_CHARACTERS:
                    yield texts
                    texts, size = [], 0
    if texts:
        yield texts
