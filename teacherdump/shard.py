"""A shard while its batches come in: what is kept of each row, and which rows hold no targets.

Legend: N rows of a batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.corpus.protocol import Samples
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from teacherdump.sparsify import HAS_NAN, HAS_POSITIVE_INF, NO_CLASS, REFUSAL

if TYPE_CHECKING:
    from teacherdump.dump import Job, SoftTargets


@dataclass(frozen=True, eq=False)
class EncodedShard:
    """A shard that is ready to be written.

    Attributes:
        shard: its index.
        arrays: every array of the manifest, with the shard's rows.
        quarantine: the rows without targets, in order.
        seconds_read: that reading its batches took.
        seconds_teacher: that the teacher took for them.
    """

    shard: int
    arrays: dict[str, Array]
    quarantine: list[QuarantineEntry]
    seconds_read: float
    seconds_teacher: float


class ShardBuffer:
    """The arrays of one shard while its batches come in."""

    def __init__(self, job: "Job", shard: int) -> None:
        self._corpus, self._manifest, self._shard = job.corpus, job.manifest, shard
        self._start, self._stop = job.manifest.layout.shard_bounds(shard)
        self._num_rows = 0
        rows = self._stop - self._start
        self._arrays = {spec.name: np.empty((rows, *spec.row_shape), spec.dtype) for spec in job.manifest.arrays}
        self._quarantine: list[QuarantineEntry] = []
        self._seconds_read = self._seconds_teacher = 0.0

    @property
    def is_full(self) -> bool:
        """Whether every row is there."""
        return self._num_rows == self._stop - self._start

    def put(self, said: "SoftTargets") -> None:
        """Take the next batch of rows, and quarantine those without targets."""
        rows = slice(self._num_rows, self._num_rows + len(said.read.batch.rows_N))
        views = {name: values[rows] for name, values in self._arrays.items()}
        self._quarantine += fill_rows(views, said, self._manifest, self._corpus)
        self._num_rows = rows.stop
        self._seconds_read += said.read.seconds
        self._seconds_teacher += said.seconds

    def encoded(self) -> EncodedShard:
        """The shard, once it is full."""
        return EncodedShard(self._shard, self._arrays, self._quarantine, self._seconds_read, self._seconds_teacher)


def fill_rows(
    out: Mapping[str, Array], said: "SoftTargets", manifest: Manifest, corpus: Samples
) -> list[QuarantineEntry]:
    """Put all that a store keeps of a batch into arrays of its rows; gives the rows without targets, in order."""
    read, arrays, batch = said.read, said.arrays, said.read.batch
    refusal_N = np.bitwise_or.reduce(arrays[REFUSAL].reshape(len(batch.rows_N), -1), axis=1)
    reasons = {
        int(position): what_is_wrong(int(refusal_N[position])) for position in np.flatnonzero(refusal_N)
    } | batch.errors
    refused = sorted(reasons)
    for spec in manifest.arrays:
        if spec.name in arrays:
            part = out[spec.name]
            part[...] = arrays[spec.name].reshape(part.shape)
            part[refused] = spec.fill_value
    out["sample_digest"][...] = batch.digests_N
    if "token_ids" in out:
        out["token_ids"][...], out["position_ids"][...] = batch.inputs.swapaxes(0, 1)
    if manifest.has_hard_targets and read.hard_targets_R is not None:
        out["hard_target"][...] = read.hard_targets_R.numpy()
    out["status"][...] = STATUS_OK
    quarantine = []
    for position in refused:
        out["status"][position] = STATUS_UNDECODABLE if position in batch.errors else STATUS_NOT_FINITE
        row = int(batch.rows_N[position])
        quarantine.append(QuarantineEntry(row, corpus.key(row), reasons[position]))
    return quarantine


def what_is_wrong(refusal: int) -> str:
    """Why a row's logits are refused, in words."""
    if refusal & (HAS_NAN | HAS_POSITIVE_INF | NO_CLASS):
        what = "NaN" if refusal & HAS_NAN else "+inf" if refusal & HAS_POSITIVE_INF else "-inf for every class"
        return f"logits are not finite: {what}"
    return "the hidden state is not finite as it would be stored; with --values float32 it may be"
