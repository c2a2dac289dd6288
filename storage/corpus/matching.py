"""Hold a corpus against the store that was made from it: each row's target must belong to its sample.

Legend: N rows.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.corpus.protocol import Corpus
from storage.corpus.reading import sample_digests
from storage.corpus.without import rows_from
from storage.errors import CorpusMismatchError, MismatchError

if TYPE_CHECKING:
    from storage.reader import Store

# Rows whose digests are compared at once.
_BLOCK_ROWS = 4096


class Advances(Protocol):
    """What shows how far a pass is, such as `storage.console.progress` gives."""

    def advance(self, count: int, /) -> object:
        """That many more are done."""


def check_digests(
    stored_N: NDArray[np.uint64],
    digests_N: NDArray[np.uint64],
    rows_N: NDArray[np.int64],
    corpus: Corpus,
    where: str,
) -> None:
    """Refuse samples that are not those that the rows were made from.

    Args:
        stored_N: digests in the store; rows with 0, whose sample could not be read at the dump, are passed over.
        digests_N: digests of the samples in the corpus, 0 where one can't be read.
        rows_N: the rows.
        corpus: where the samples are, for their keys.
        where: path of the store, for the message.

    Raises:
        CorpusMismatchError: one differs; the message names the lowest row and its key.
    """
    wrong_N = (stored_N != digests_N) & (stored_N != 0)
    if not wrong_N.any():
        return
    rows_M, stored_M, digests_M = rows_N[wrong_N], stored_N[wrong_N], digests_N[wrong_N]
    lowest = int(rows_M.argmin())
    row, digest = int(rows_M[lowest]), digests_M[lowest]
    partners = np.flatnonzero((stored_M == digest) & (digests_M == stored_M[lowest]))
    if digest == 0:
        guess = "the sample can't be read any more"
    elif len(partners):
        other = int(rows_M[partners[0]])
        guess = f"it was swapped with row {other} ({corpus.key(other)!r})"
    elif (stored_N == digest).any():
        other = int(rows_N[np.flatnonzero(stored_N == digest)[0]])
        moved = "a sample before it was removed" if other > row else "a sample before it was added"
        guess = f"it is the sample of row {other}: {moved}, or the order changed"
    else:
        guess = "the sample was replaced, or the order changed"
    raise CorpusMismatchError(_differs(where, row, corpus, int(stored_M[lowest]), int(digest), guess))


def rows_of_store(store: "Store", corpus: Corpus) -> Corpus:
    """The samples that a store's rows are of: the corpus, or some rows of it where the store is a part of another.

    Raises:
        CorpusMismatchError: the store is a part, and the corpus has another number of samples than its manifest says.
    """
    manifest = store.manifest
    if not manifest.is_part:
        return corpus
    first, total = manifest.first_row, manifest.corpus.get("num_samples")
    if corpus.num_samples != total or first + manifest.num_rows > corpus.num_samples:
        raise CorpusMismatchError(
            f"{store.path}: expected a corpus of {total} samples, of which the store has {first} to "
            f"{first + manifest.num_rows - 1}, got {corpus.num_samples} in the corpus '{corpus.path}'; use the corpus "
            "that the store was made from"
        )
    return rows_from(corpus, first, manifest.num_rows)


def verify_corpus(
    store: "Store", corpus: Corpus, progress: Advances | None = None, pool: Executor | None = None
) -> None:
    """Read every sample of the sealed rows, and refuse a corpus that is not the one that the store was made from.

    Args:
        store: its sealed shards are compared.
        corpus: where the samples are said to be.
        progress: told how many more rows are compared, block by block.
        pool: threads that share the reading.

    Raises:
        MismatchError: other class names, or the same in another order.
        CorpusMismatchError: a sample differs, or their number does; the message names the first row that differs.
    """
    _check_class_names(store, corpus)
    num_rows = store.manifest.num_rows
    count = f"{num_rows} samples as in the store, got {corpus.num_samples}"
    for start, stop in _blocks(store):
        end = min(stop, corpus.num_samples)
        if start < end:
            stored_N = store.read(["sample_digest"], start, end)["sample_digest"]
            try:
                digests_N = sample_digests(corpus, start, end, pool)
                check_digests(stored_N, digests_N, np.arange(start, end), corpus, store.path)
            except CorpusMismatchError as error:
                if corpus.num_samples != num_rows:
                    raise CorpusMismatchError(f"{error}; there should be {count}") from error
                raise
        if progress is not None:
            progress.advance(stop - start)
    if corpus.num_samples < num_rows:
        raise CorpusMismatchError(
            f"{store.path}: expected {count}: the corpus '{corpus.path}' has no row {corpus.num_samples}; "
            "use the corpus that the store was made from"
        )
    if corpus.num_samples > num_rows:
        raise CorpusMismatchError(
            f"{store.path}: expected {count}: the corpus '{corpus.path}' goes on with row {num_rows} "
            f"({corpus.key(num_rows)!r}); use the corpus that the store was made from"
        )


def verify_hard_targets(store: "Store", corpus: Corpus) -> None:
    """Refuse hard targets that are not those that the store was made with; nothing to do where either has none.

    Raises:
        CorpusMismatchError: one differs; the message names the first row and its key.
    """
    if not store.manifest.has_hard_targets or corpus.hard_targets is None:
        return
    for start, stop in _blocks(store):
        stop = min(stop, corpus.num_samples)
        if start >= stop:
            continue
        stored_N = store.read(["hard_target"], start, stop)["hard_target"]
        found_N = corpus.hard_targets[start:stop]
        different = np.flatnonzero(stored_N != found_N)
        if len(different):
            row = start + int(different[0])
            raise CorpusMismatchError(
                f"{store.path}: row {row} ({corpus.key(row)!r}): expected the hard target {stored_N[row - start]}, got "
                f"{found_N[row - start]} in the corpus '{corpus.path}'; use the labels that the store was made with"
            )


def _blocks(store: "Store") -> Iterator[tuple[int, int]]:
    """Sealed rows, some at a time."""
    for shard in store.sealed_shards():
        start, stop = store.layout.shard_bounds(shard)
        for first in range(start, stop, _BLOCK_ROWS):
            yield first, min(first + _BLOCK_ROWS, stop)


def _check_class_names(store: "Store", corpus: Corpus) -> None:
    stored, found = store.manifest.class_names, corpus.class_names
    if stored is None or found is None or stored == found:
        return
    number = next((n for n, (one, two) in enumerate(zip(stored, found, strict=False)) if one != two), None)
    if number is None:
        what = f"{len(stored)} classes, got {len(found)}"
    else:
        order = "in another order" if set(stored) == set(found) else "other classes"
        what = f"class {number} to be {stored[number]!r}, got {found[number]!r} ({order})"
    raise MismatchError(
        f"{store.path}: expected {what} in the corpus '{corpus.path}'; use the corpus that the store was made from"
    )


def _differs(where: str, row: int, corpus: Corpus, stored: int, digest: int, guess: str) -> str:
    return (
        f"{where}: row {row} ({corpus.key(row)!r}): expected the sample that it was made from (digest {stored:016x}), "
        f"got {f'digest {digest:016x}' if digest else 'none'} in the corpus '{corpus.path}': {guess}; use the corpus "
        "that the store was made from"
    )
