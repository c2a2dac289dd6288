"""Corpora: ordered, indexed sets of samples, read as numpy.

`open_corpus` finds what a path holds; `default_preprocess` says how its samples become a model's input; `read_batch`
reads rows; `verify_corpus` holds a corpus against the store that was made from it. Sequences of tokens are a
`TokenCorpus`, opened with `SequenceOptions`.
"""

from storage.corpus.defaults import check_preprocess, default_preprocess
from storage.corpus.files import FileEntry, list_files
from storage.corpus.matching import check_digests, rows_of_store, verify_corpus, verify_hard_targets
from storage.corpus.opening import CORPUS_KINDS, open_corpus
from storage.corpus.parquet_columns import Columns
from storage.corpus.preprocess import Preprocess
from storage.corpus.protocol import Corpus, SampleError
from storage.corpus.reading import Batch, read_batch, sample_digest, sample_digests
from storage.corpus.sequences import SequenceOptions, TokenCorpus, check_ids
from storage.corpus.tokenizer import Tokenizer, load_tokenizer
from storage.corpus.without import without_rows

__all__ = [
    "CORPUS_KINDS",
    "Batch",
    "Columns",
    "Corpus",
    "FileEntry",
    "Preprocess",
    "SampleError",
    "SequenceOptions",
    "TokenCorpus",
    "Tokenizer",
    "check_digests",
    "check_ids",
    "check_preprocess",
    "default_preprocess",
    "list_files",
    "load_tokenizer",
    "open_corpus",
    "read_batch",
    "rows_of_store",
    "sample_digest",
    "sample_digests",
    "verify_corpus",
    "verify_hard_targets",
    "without_rows",
]
