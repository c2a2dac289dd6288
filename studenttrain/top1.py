"""The teacher's top-1 of stored rows, and how often it meets the hard target.

Legend: N rows, C classes, K kept entries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.arrays import STATUS_OK
from storage.errors import NotSealedError
from storage.reader import Store

# Rows whose top-1 is looked at before a run: enough for a share within 0.2 points, and a moment's reading.
MAX_SAMPLED_BYTES = 256 << 20


def stored_top1(store: Store, start: int, stop: int) -> NDArray[np.int64]:
    """The teacher's top-1 class (N,) of rows [start, stop); -1 where a row is not sealed or is quarantined.

    Ties go to the lower class, as in the store; uint8 values that lie within one step of each other tie too.
    """
    top1_N = np.full(stop - start, -1, np.int64)
    name = "ids" if store.manifest.encoding.name == "topk" else "values"
    for _, first, end in store.layout.split(start, stop):
        try:
            arrays = store.read([name, "status"], first, end)
        except NotSealedError:
            continue
        if name == "ids":
            class_N = arrays["ids"][:, 0].astype(np.int64)
        elif arrays["values"].dtype == np.uint8:
            class_N = arrays["values"].argmin(axis=1)  # stored as distances below the maximum
        else:
            class_N = arrays["values"].argmax(axis=1)
        top1_N[first - start : end - start] = np.where(arrays["status"] == STATUS_OK, class_N, -1)
    return top1_N


@dataclass(frozen=True)
class Meeting:
    """How often the stored top-1 is the hard target.

    Attributes:
        num_met: rows where it is.
        num_rows: rows that were looked at: sealed, not quarantined, with a hard target.
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


def meet_hard_targets(store: Store, hard_targets: NDArray[np.int32], max_bytes: int = MAX_SAMPLED_BYTES) -> Meeting:
    """Hold the stored top-1 against the hard targets, over all sealed rows or chunks spread evenly over them.

    Args:
        store: its sealed shards are read.
        hard_targets: int32 (num_rows,), -1 where unknown.
        max_bytes: of soft targets that are read at most.
    """
    layout, shards = store.layout, store.sealed_shards()
    chunks = [layout.chunk_bounds(shard, chunk) for shard in shards for chunk in range(layout.num_chunks(shard))]
    row_bytes = max(spec.row_bytes for spec in store.manifest.arrays if spec.name in ("ids", "values"))
    most = max(1, max_bytes // (row_bytes * layout.chunk_rows))
    if len(chunks) > most:
        chunks = [chunks[int(index)] for index in np.linspace(0, len(chunks) - 1, most)]
    num_met = num_rows = 0
    for start, stop in chunks:
        top1_N, hard_N = stored_top1(store, start, stop), hard_targets[start:stop]
        counted_N = (top1_N >= 0) & (hard_N >= 0)
        num_rows += int(counted_N.sum())
        num_met += int((counted_N & (top1_N == hard_N)).sum())
    return Meeting(num_met, num_rows, store.num_sealed_rows)
