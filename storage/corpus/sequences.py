"""Flat token ids packed into sequences: where each begins, where each document in it begins, and what pads the last.

Row r holds the tokens from r * P to r * P + P: the P that a model reads and, one further, the target of the last of
them. Consecutive rows share one token, so that each token but the first is a target once.

Legend: N rows, P positions that a model reads, T tokens, D documents.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from storage.corpus.idx import take_rows
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import Array, SampleError, SampleKind, TokenType, check_row
from storage.corpus.tokenizer import Tokenizer, load_tokenizer
from storage.errors import CorpusError

# Token ids are read as uint32.
MAX_VOCAB_SIZE = 2**32

# Positions of the longest sequence.
MAX_LENGTH = 2**24

# Tokens that are looked through at once for a separator.
_SCAN_TOKENS = 2**22


@dataclass(frozen=True)
class SequenceOptions:
    """How a corpus of tokens or text is read, and cut into sequences.

    Attributes:
        length: positions of a sequence that a model reads, from 1 to 2^24; a sample holds one token more.
        tokenizer: `bytes`, a `tokenizers` JSON file, or a folder with a tokenizer.json. Text needs one; of token ids it
            says which tokenizer made them.
        dtype: type of an id in a `.bin` file: uint8, uint16, uint32, int32 or int64, little-endian.
        boundaries: a `.npy` of the ascending offsets at which the documents of a corpus of tokens begin.
        separator: the id that ends a document and belongs to it. In a corpus of tokens it is looked for; to each
            document of text it is appended.
        text_field: name of the text in a line of JSONL; None is `text`.
        vocab_size: ids must be below it; None is what the tokenizer says, or no limit.

    Raises:
        ValueError: an option is out of range, or contradicts another.
    """

    length: int
    tokenizer: str | None = None
    dtype: str | None = None
    boundaries: str | None = None
    separator: int | None = None
    text_field: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_LENGTH:
            raise ValueError(f"sequence_length: expected 1 to {MAX_LENGTH} positions, got {self.length}")
        if self.dtype is not None and self.dtype not in get_args(TokenType):
            raise ValueError(f"token_dtype: expected {', '.join(get_args(TokenType))}, got {self.dtype!r}")
        if self.boundaries is not None and self.separator is not None:
            raise ValueError(
                f"boundaries: expected them or a separator, got '{self.boundaries}' and the separator "
                f"{self.separator}; leave one out"
            )
        if self.vocab_size is not None and not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size: expected 1 to {MAX_VOCAB_SIZE}, got {self.vocab_size}")
        if self.separator is not None and not 0 <= self.separator < MAX_VOCAB_SIZE:
            raise ValueError(f"separator: expected a token id from 0 to {MAX_VOCAB_SIZE - 1}, got {self.separator}")
        if self.text_field == "":
            raise ValueError("text_field: expected the name of a field, got nothing; leave it out for 'text'")


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Token ids cut into sequences. A sample is uint32 (2, P + 1): token ids, and each one's place in its document.

    A token's place is counted from the start of the sequence, or of its document where that begins inside it, so that
    token t + 1 belongs to the document of token t only where its place is not 0. What pads the last sequence is token 0
    at place 0. A sample's key is the offset of its first and of its last token; its bytes are those of its array.

    Attributes:
        kind: `tokens`, `text` or `parquet`.
        path: where it is, absolute, or a URL.
        options: what it was opened with, with absolute paths.
        ids_T: all token ids: mapped from a file, or in memory.
        starts_D: offset of each document's first token, the first 0; one document where no boundaries are known.
        tokenizer: what turned the text into ids, where that is known.
        fingerprint: sha256 of kind, tokens, sequence length, type, tokenizer and document boundaries, as hex.
        num_ignored: files in the folder that are no text.
        opener: opens it again, in another process.
    """

    sample_kind: ClassVar[SampleKind] = "tokens"
    class_names: ClassVar[None] = None
    hard_targets: ClassVar[None] = None

    kind: str
    path: Path | str
    options: SequenceOptions
    ids_T: Array = field(repr=False)  # noqa: N815
    starts_D: NDArray[np.int64] = field(repr=False)  # noqa: N815
    tokenizer: Tokenizer | None
    fingerprint: str
    num_ignored: int
    opener: Callable[[Any, SequenceOptions], "TokenCorpus"] = field(repr=False)

    @property
    def sequence_length(self) -> int:
        """Positions P of a sequence; a sample holds P + 1 tokens."""
        return self.options.length

    @property
    def num_tokens(self) -> int:
        """Tokens in the corpus."""
        return len(self.ids_T)

    @property
    def num_samples(self) -> int:
        """Sequences in the corpus."""
        return num_sequences(self.num_tokens, self.sequence_length)

    @property
    def num_documents(self) -> int:
        """Documents in the corpus that hold a token; 1 where no boundaries are known."""
        return len(self.starts_D)

    @property
    def vocab_size(self) -> int | None:
        """Ids are below it: the option, else what the tokenizer says; None where neither is given."""
        if self.options.vocab_size is not None or self.tokenizer is None:
            return self.options.vocab_size
        return self.tokenizer.vocab_size

    @property
    def has_several_documents(self) -> bool:
        """Whether among the tokens of some sequence that a model reads there are two documents."""
        return has_several_documents(self.starts_D, self.sequence_length)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sample_bytes(self.sequence_length)

    def key(self, row: int) -> str:
        """Offsets of the first and the last token, the last of them shared with the next sequence."""
        check_row(row, self.num_samples)
        start = row * self.sequence_length
        return f"{start}-{min(start + self.sequence_length, self.num_tokens - 1)}"

    def read_raw(self, row: int) -> bytes:
        """The token ids, then their places, little-endian uint32."""
        check_row(row, self.num_samples)
        return self.read_rows(np.array([row], np.int64)).tobytes()

    def decode(self, raw: bytes) -> NDArray[np.uint32]:
        """Token ids and places (2, P + 1) of a sample's bytes."""
        return decode_sample(raw, self.sequence_length)

    def read_rows(self, rows_N: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Token ids and places of some sequences, uint32 (N, 2, P + 1).

        Raises:
            CorpusError: an id is negative, or not below `vocab_size`; the message names it.
        """
        ids_NP = read_ids(self.ids_T, rows_N, self.sequence_length)
        check_ids(ids_NP, rows_N, self.vocab_size, f"corpus '{self.path}'")
        samples = np.empty((len(rows_N), 2, self.sequence_length + 1), "<u4")
        samples[:, 0] = ids_NP
        samples[:, 1] = position_ids(self.starts_D, rows_N, self.sequence_length, self.num_tokens)
        return samples

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers; the whole is opened once a process that reads of it."""
        return part_of(self, start, stop)

    def __reduce__(self) -> tuple[Callable[..., "TokenCorpus"], tuple[Any, ...]]:
        return self.opener, (self.path, self.options)


def sample_bytes(length: int) -> int:
    """Bytes of a sample of P positions: its token ids and their places, uint32.

    Example:
        >>> sample_bytes(7)
        64
    """
    return 8 * (length + 1)


def decode_sample(raw: bytes, length: int) -> NDArray[np.uint32]:
    """Token ids and places (2, P + 1) of a sample's bytes.

    Raises:
        SampleError: they are too many, or too few.
    """
    if len(raw) != sample_bytes(length):
        raise SampleError(f"expected {sample_bytes(length)} bytes of a sequence, got {len(raw)}; take another copy")
    return np.frombuffer(raw, "<u4").reshape(2, length + 1)


def token_corpus(
    kind: str,
    path: Path | str,
    options: SequenceOptions,
    ids_T: Array,
    starts_D: NDArray[np.int64],
    tokenizer: Tokenizer | None,
    opener: Callable[[Any, SequenceOptions], TokenCorpus],
    num_ignored: int = 0,
) -> TokenCorpus:
    """The corpus of some token ids, with its fingerprint; see `TokenCorpus`."""
    index = {
        "kind": kind,
        "num_tokens": len(ids_T),
        "sequence_length": options.length,
        "dtype": ids_T.dtype.newbyteorder("<").str,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "boundaries": sha256(starts_D.astype("<i8").tobytes()).hexdigest(),
    }
    fingerprint = sha256(json.dumps(index).encode()).hexdigest()
    return TokenCorpus(kind, path, options, ids_T, starts_D, tokenizer, fingerprint, num_ignored, opener)


def open_tokenizer(options: SequenceOptions) -> Tokenizer | None:
    """The tokenizer that the options name, if they name one, held against the rest of them.

    Raises:
        CorpusError: it can't be opened.
        ValueError: a vocabulary that is smaller than the tokenizer's, or a separator outside of it.
    """
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    if tokenizer is not None and options.vocab_size is not None and options.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size: expected at least the {tokenizer.vocab_size} ids of the tokenizer '{tokenizer.name}', got "
            f"{options.vocab_size}; leave it out"
        )
    limit = options.vocab_size or (MAX_VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size)
    if options.separator is not None and options.separator >= limit:
        raise ValueError(
            f"separator: expected a token id below {limit}, the size of the vocabulary, got {options.separator}; give "
            "the id that ends a document"
        )
    return tokenizer


def check_num_tokens(num_tokens: int, where: str) -> None:
    """Refuse a corpus in which there is nothing to predict.

    Raises:
        CorpusError: it has fewer than two tokens.
    """
    if num_tokens < 2:
        raise CorpusError(
            f"{where}: expected at least 2 tokens, one to read and one to predict, got {num_tokens}; give more"
        )


def num_sequences(num_tokens: int, length: int) -> int:
    """Sequences of `length` positions that predict each token but the first.

    Example:
        >>> num_sequences(9, 4), num_sequences(10, 4)
        (2, 3)
    """
    return -(-(num_tokens - 1) // length)


def read_ids(ids_T: Array, rows_N: NDArray[np.int64], length: int) -> Array:
    """Token ids (N, P + 1) of some sequences, in their own type; 0 behind the last token.

    Example:
        >>> read_ids(np.arange(10, 16), np.array([0, 1]), 3)
        array([[10, 11, 12, 13],
               [13, 14, 15,  0]])
    """
    num_whole = (len(ids_T) - 1) // length
    step = ids_T.strides[0]
    windows = as_strided(ids_T, (num_whole, length + 1), (length * step, step), writeable=False)
    is_whole_N = rows_N < num_whole
    if is_whole_N.all():
        return take_rows(windows, rows_N)
    ids_NP = np.zeros((len(rows_N), length + 1), ids_T.dtype)
    ids_NP[is_whole_N] = windows[rows_N[is_whole_N]]
    rest = ids_T[num_whole * length :]
    ids_NP[~is_whole_N, : len(rest)] = rest
    return ids_NP


def position_ids(
    starts_D: NDArray[np.int64], rows_N: NDArray[np.int64], length: int, num_tokens: int
) -> NDArray[np.int32]:
    """Place of each token of some sequences in its document inside the sequence, int32 (N, P + 1); 0 where padded.

    Args:
        starts_D: ascending offsets at which documents begin.
        rows_N: the sequences.
        length: positions P of one.
        num_tokens: tokens of the corpus; what lies behind them is padding.

    Example:
        >>> position_ids(np.array([0, 2, 6]), np.array([0, 1]), 4, 8)
        array([[0, 1, 0, 1, 2],
               [0, 1, 0, 1, 0]], dtype=int32)
    """
    places_P = np.arange(length + 1, dtype=np.int32)
    begins_N = rows_N * length
    firsts_N = np.searchsorted(starts_D, begins_N, "right")
    counts_N = np.searchsorted(starts_D, begins_N + length, "right") - firsts_N
    positions_NP = np.tile(places_P, (len(rows_N), 1))
    cut_M = np.flatnonzero(counts_N)
    if len(cut_M):
        counts_M = counts_N[cut_M]
        row_K = np.repeat(np.arange(len(cut_M)), counts_M)  # one for each document that begins inside a sequence
        before_M = np.cumsum(counts_M) - counts_M
        inside_K = starts_D[np.arange(len(row_K)) + (firsts_N[cut_M] - before_M)[row_K]] - begins_N[cut_M][row_K]
        begun_MP = np.zeros((len(cut_M), length + 1), np.int32)
        begun_MP[row_K, inside_K] = inside_K
        positions_NP[cut_M] -= np.maximum.accumulate(begun_MP, axis=1, out=begun_MP)
    if len(rows_N) and int(rows_N.max() + 1) * length >= num_tokens:
        positions_NP[begins_N[:, None] + places_P >= num_tokens] = 0
    return positions_NP


def has_several_documents(starts_D: NDArray[np.int64], length: int) -> bool:
    """Whether a document begins inside a sequence, not only at its first token or at its last target.

    Example:
        >>> has_several_documents(np.array([0, 8]), 4), has_several_documents(np.array([0, 7]), 4)
        (False, True)
    """
    return bool((starts_D % length != 0).any())


def starts_behind(ids_T: Array, separator: int) -> NDArray[np.int64]:
    """Offsets at which documents begin, the first at 0, each other one behind a separator.

    Example:
        >>> starts_behind(np.array([5, 0, 6, 7, 0]), 0)
        array([0, 2])
    """
    parts = [np.zeros(1, np.int64)]
    last = len(ids_T) - 1  # behind the last token nothing begins
    for start in range(0, last, _SCAN_TOKENS):
        found = np.flatnonzero(ids_T[start : min(start + _SCAN_TOKENS, last)] == separator)
        parts.append(found + (start + 1))
    return np.concatenate(parts)


def starts_of_lengths(lengths: Iterable[int]) -> NDArray[np.int64]:
    """Offsets at which documents of these lengths begin, without those that are empty.

    Example:
        >>> starts_of_lengths([3, 0, 2])
        array([0, 3])
    """
    lengths_D = np.fromiter(lengths, np.int64)
    lengths_D = lengths_D[lengths_D > 0]
    return np.cumsum(lengths_D) - lengths_D


def check_ids(ids_NP: Array, rows_N: NDArray[np.int64], vocab_size: int | None, where: str) -> None:
    """Refuse token ids that are negative or not below a vocabulary's size.

    Args:
        ids_NP: token ids of some sequences, (N, P + 1), of any integer type; `Batch.inputs[:, 0]` is.
        rows_N: the sequences.
        vocab_size: None is what uint32 holds.
        where: for the message, such as `corpus 'PATH'`.

    Raises:
        CorpusError: there is one; the message names its row, position and id.
    """
    limit, info = vocab_size or MAX_VOCAB_SIZE, np.iinfo(ids_NP.dtype)
    is_low = info.min < 0 and len(ids_NP) and int(ids_NP.min()) < 0
    if not is_low and (info.max < limit or not len(ids_NP) or int(ids_NP.max()) < limit):
        return
    wrong = np.argwhere((ids_NP < 0) | (ids_NP >= limit))
    place, position = (int(number) for number in wrong[rows_N[wrong[:, 0]].argmin()])
    raise CorpusError(
        f"{where}: row {int(rows_N[place])}, position {position}: expected token ids from 0 to {limit - 1}, got "
        f"{int(ids_NP[place, position])}; give ids of this vocabulary, and the type that they were written with"
    )
