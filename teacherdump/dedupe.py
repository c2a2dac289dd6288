"""Samples that are labelled already: known by 64-bit hashes, of their keys or of their bytes.

Legend: N rows, K known hashes.

A hash is 8 bytes in memory. Two different keys among K share one with a probability of about K^2 / 2^65: 1 in 37,000
for 3 x 10^7, 1 in 37 for 10^9. Where that happens, the later sample is left out though nothing was labelled for it; no
target can come to belong to another sample by it.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.corpus import Corpus, sample_digests

Hashes = NDArray[np.uint64]


class Known:
    """Hashes of the samples of all members so far, sorted."""

    def __init__(self) -> None:
        self._hashes_K: Hashes = np.zeros(0, np.uint64)

    def __len__(self) -> int:
        return len(self._hashes_K)

    def add(self, parts: Iterable[Hashes]) -> None:
        """Take up the hashes of members; 0 stands for a sample that could not be read, which is never known."""
        joined = np.concatenate([self._hashes_K, *parts])
        joined.sort(kind="stable")  # runs that are sorted already are merged
        self._hashes_K = joined[np.searchsorted(joined, 0, "right") :]

    def repeated(self, hashes_N: Hashes) -> NDArray[np.int64]:
        """Ascending places of the samples that are known, or that an earlier one among them is equal to."""
        places_N = np.searchsorted(self._hashes_K, hashes_N)
        is_known_N = np.zeros(len(hashes_N), bool)
        inside_N = places_N < len(self._hashes_K)
        is_known_N[inside_N] = self._hashes_K[places_N[inside_N]] == hashes_N[inside_N]
        is_first_N = np.zeros(len(hashes_N), bool)
        is_first_N[np.unique(hashes_N, return_index=True)[1]] = True
        return np.flatnonzero((is_known_N | ~is_first_N) & (hashes_N != 0))


def sample_hashes(corpus: Corpus, by: str, num_readers: int) -> Hashes:
    """What each sample of a corpus is compared by, uint64 (N,).

    Args:
        corpus: the samples.
        by: `key`, or `digest` of the bytes, for which each sample is read; 0 where one can't be.
        num_readers: threads that read samples.
    """
    if by == "digest":
        with ThreadPoolExecutor(num_readers) as pool:
            return sample_digests(corpus, 0, corpus.num_samples, pool)
    keys = (corpus.key(row).encode("utf-8", "backslashreplace") for row in range(corpus.num_samples))
    return np.fromiter((xxhash.xxh3_64_intdigest(key) or 1 for key in keys), np.uint64, corpus.num_samples)
