"""The teacher's top-1 of stored rows, and how often it meets the hard target.

Legend: N rows, C classes, K kept entries, P positions, R flat rows: N, or N * P of sequences.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.arrays import STATUS_OK, Arrays
from storage.encodings import Hidden
from storage.errors import NotSealedError
from storage.reader import Store
from storage.scan.recompute import top1_classes
from storage.sequences import flatten_positions, next_tokens

# Rows whose top-1 is looked at before a run: enough for a share within 0.2 points, and a moment's reading.
MAX_SAMPLED_BYTES = 256 << 20


def stored_top1(store: Store, start: int, stop: int) -> NDArray[np.int64]:
    """The teacher's top-1 class (R,) of rows [start, stop); -1 where a row is not sealed or is quarantined.

    Ties go to the lower class, as in the store; uint8 values that lie within one step of each other tie too, and so do
    classes that were drawn as often.
    """
    manifest = store.manifest
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    top1_NP = np.full((stop - start, num_positions), -1, np.int64)
    for _, first, end in store.layout.split(start, stop):
        try:
            arrays = store.read(["status", *_answer_arrays(store)], first, end)
        except NotSealedError:
            continue
        class_R = _top1_of(store, flatten_positions(manifest.sequences, arrays))
        is_given_N = arrays["status"] == STATUS_OK
        top1_NP[first - start : end - start] = np.where(is_given_N[:, None], class_R.reshape(-1, num_positions), -1)
    return top1_NP.reshape(-1)


def _answer_arrays(store: Store) -> tuple[str, ...]:
    """The arrays that tell the top-1."""
    names = {"dense": ("values",), "topk": ("ids",), "sample": ("ids", "counts"), "hidden": ("hidden",)}
    return names[store.manifest.encoding.name]


def _top1_of(store: Store, arrays: Arrays) -> NDArray[np.int64]:
    """The top-1 of flat arrays."""
    encoding = store.manifest.encoding
    if encoding.name == "topk":
        return arrays["ids"][:, 0].astype(np.int64)
    if encoding.name == "sample":
        most_R = arrays["counts"].argmax(axis=1)
        return np.take_along_axis(arrays["ids"], most_R[:, None], axis=1)[:, 0].astype(np.int64)
    if isinstance(encoding, Hidden):
        head = store.head()
        assert head is not None
        found: NDArray[np.int64] = top1_classes(encoding, head, arrays["hidden"])
        return found
    is_distance = arrays["values"].dtype == np.uint8  # below the maximum
    top1_R: NDArray[np.int64] = arrays["values"].argmin(axis=1) if is_distance else arrays["values"].argmax(axis=1)
    return top1_R


def hard_targets_in(store: Store, start: int, stop: int) -> NDArray[np.int32]:
    """The next tokens (R,) of rows [start, stop) of a store that keeps its tokens, -1 where they are masked."""
    arrays = store.read(["token_ids", "position_ids"], start, stop)
    return next_tokens(arrays["token_ids"], arrays["position_ids"]).reshape(-1)


@dataclass(frozen=True)
class Meeting:
    """How often the stored top-1 is the hard target.

    Attributes:
        num_met: rows where it is.
        num_rows: rows, or positions, that were looked at: sealed, not quarantined, with a hard target.
        num_sealed_rows: rows that are sealed.
    """

    num_met: int
    num_rows: int
    num_sealed_rows: int

    def __str__(self) -> str:
        if not self.num_rows:
            return "no sealed row has a hard target"
        share = f"{100 * self.num_met / self.num_rows:.2f} % ({self.num_met} of {self.num_rows} rows)"
        sample = "" if self.num_rows >= self.num_sealed_rows else f", out of {self.num_sealed_rows} that are sealed"
        return f"{share}{sample}"


def meet_hard_targets(
    store: Store, hard_targets: NDArray[np.int32] | None, max_bytes: int = MAX_SAMPLED_BYTES
) -> Meeting:
    """Hold the stored top-1 against the hard targets, over all sealed rows or chunks spread evenly over them.

    Args:
        store: its sealed shards are read.
        hard_targets: int32 (num_rows,), -1 where unknown; None for a store of sequences that keeps their tokens.
        max_bytes: of soft targets that are read at most.
    """
    layout, shards = store.layout, store.sealed_shards()
    chunks = [layout.chunk_bounds(shard, chunk) for shard in shards for chunk in range(layout.num_chunks(shard))]
    row_bytes = max(spec.row_bytes for spec in store.manifest.arrays if spec.name in _answer_arrays(store))
    most = max(1, max_bytes // (row_bytes * store.manifest.chunk_rows))
    if len(chunks) > most:
        chunks = [chunks[int(index)] for index in np.linspace(0, len(chunks) - 1, most)]
    num_met = num_rows = 0
    for start, stop in chunks:
        top1_R = stored_top1(store, start, stop)
        hard_R = hard_targets_in(store, start, stop) if hard_targets is None else hard_targets[start:stop]
        counted_R = (top1_R >= 0) & (hard_R >= 0)
        num_rows += int(counted_R.sum())
        num_met += int((counted_R & (top1_R == hard_R)).sum())
    num_positions = 1 if store.manifest.sequences is None else store.manifest.sequences.num_positions
    return Meeting(num_met, num_rows, store.num_sealed_rows * num_positions)
