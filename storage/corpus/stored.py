"""The sequences that a store keeps beside its targets, as a corpus: a student needs no other.

Legend: N rows, P positions, Q = P + 1 tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from storage.arrays import Array, Arrays
from storage.corpus.part import CorpusPart, part_of
from storage.corpus.protocol import SampleKind, check_row
from storage.corpus.sequences import decode_sample, sample_bytes
from storage.errors import CorpusError

if TYPE_CHECKING:
    from storage.reader import Store


@dataclass(frozen=True, eq=False)
class StoredTokens:
    """A store's own tokens: samples of sealed rows, uint32 (2, P + 1), token ids and each one's place in its document.

    They are held against the digests of the rows as those of any other corpus are.

    Attributes:
        store: it keeps its tokens.

    Raises:
        CorpusError: it does not.
    """

    store: "Store"

    kind: ClassVar[str] = "stored"
    sample_kind: ClassVar[SampleKind] = "tokens"
    class_names: ClassVar[None] = None
    hard_targets: ClassVar[None] = None
    num_ignored: ClassVar[int] = 0

    def __post_init__(self) -> None:
        sequences = self.store.manifest.sequences
        if sequences is None or not sequences.has_tokens:
            what = "rows that are no sequences" if sequences is None else "one that was made with --no-store-tokens"
            raise CorpusError(
                f"store '{self.store.path}': expected a store that keeps its samples' tokens, got {what}; give the "
                "corpus that it was made from: --data"
            )

    @property
    def path(self) -> Path:
        """The store."""
        return Path(self.store.path)

    @property
    def num_samples(self) -> int:
        """Rows of the store, sealed or not."""
        return self.store.manifest.num_rows

    @property
    def fingerprint(self) -> str:
        """That of the corpus that the store was made from."""
        return str(self.store.manifest.corpus["fingerprint"])

    @property
    def sequence_length(self) -> int:
        """Positions P of a sequence."""
        assert self.store.manifest.sequences is not None
        return self.store.manifest.sequences.num_positions

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return sample_bytes(self.sequence_length)

    def key(self, row: int) -> str:
        """The row."""
        check_row(row, self.num_samples)
        return str(row)

    def read_raw(self, row: int) -> bytes:
        """The token ids, then their places, little-endian uint32."""
        check_row(row, self.num_samples)
        return self.read_rows(np.array([row], np.int64)).tobytes()

    def decode(self, raw: bytes) -> Array:
        """Token ids and places (2, P + 1) of a sample's bytes."""
        return decode_sample(raw, self.sequence_length)

    def read_rows(self, rows_N: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Token ids and places of some sealed rows, uint32 (N, 2, P + 1).

        Raises:
            NotSealedError: one of them is not sealed.
            DamageError: a checksum does not hold.
        """
        samples = np.empty((len(rows_N), 2, self.sequence_length + 1), "<u4")
        breaks = np.flatnonzero(np.diff(rows_N) != 1) + 1
        for places in np.split(np.arange(len(rows_N)), breaks):
            if len(places):
                first, last = int(rows_N[places[0]]), int(rows_N[places[-1]])
                arrays = self.store.read(["token_ids", "position_ids"], first, last + 1)
                samples[places] = stored_samples(arrays)
        return samples

    def part(self, start: int, stop: int) -> CorpusPart:
        """Rows [start, stop) under their own numbers, read from the store that is opened again where they are used."""
        return part_of(self, start, stop, self)


def stored_samples(arrays: Arrays) -> NDArray[np.uint32]:
    """Samples, uint32 (N, 2, P + 1), of a store's rows of `token_ids` and `position_ids`."""
    token_ids_NQ, position_ids_NQ = arrays["token_ids"], arrays["position_ids"]
    samples = np.empty((len(token_ids_NQ), 2, token_ids_NQ.shape[1]), "<u4")
    samples[:, 0], samples[:, 1] = token_ids_NQ, position_ids_NQ
    return samples
