"""What is known of a shard once it is sealed: the seal, its size, and where the time went."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np

from storage.arrays import STATUS_OK, Arrays
from storage.records import Seal

P = ParamSpec("P")
T = TypeVar("T")

KILLED = "the worker that ran this sample died"  # how the reason of a row begins that no other process should run
IN_PROCESS = "local"  # the worker of a run that dumps in its own process


@dataclass(frozen=True)
class ShardReport:
    """A sealed shard, and what it took. Small, and can be pickled.

    Attributes:
        seal: of the shard, with its quarantine.
        num_bytes: bytes on the disk; of HDF5, which does not say, the bytes before compression.
        seconds_read: that reading and decoding its batches took, in the thread that reads ahead.
        seconds_teacher: that the teacher and what is kept of its logits took: on CUDA measured by events on the
            device, elsewhere wall time.
        seconds_write: that encoding, writing and sealing took, in the thread that writes behind.
        mean_entropy: of the teacher's distributions at temperature 1, nats; None where every row was refused.
        worker: name of the worker that did it; `local` for the run itself.
    """

    seal: Seal
    num_bytes: int
    seconds_read: float
    seconds_teacher: float
    seconds_write: float
    mean_entropy: float | None
    worker: str = IN_PROCESS

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self.seal.stop - self.seal.start

    @property
    def num_refused(self) -> int:
        """Of these, rows without targets."""
        return len(self.seal.quarantine)


@dataclass
class Stopwatch:
    """Seconds that calls took in all; of one thread.

    Example:
        >>> watch = Stopwatch()
        >>> watch.time(max, 2, 3), watch.seconds >= 0
        (3, True)
    """

    seconds: float = 0.0
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    def time(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a call gives; its time is added, also where it raises."""
        start = self.clock()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += self.clock() - start


def mean_entropy(arrays: Arrays) -> float | None:
    """Mean entropy of the rows with targets, nats; None where there are none."""
    kept = arrays["entropy"][arrays["status"] == STATUS_OK]
    if not kept.size or np.isnan(kept).all():
        return None
    return float(np.nanmean(kept, dtype=np.float64))


def sealed_bytes(seal: Seal, row_bytes: int) -> int:
    """Bytes of a sealed shard on the disk; of HDF5, whose seal does not say, `row_bytes` for each row."""
    return sum(int(value["num_bytes"]) for value in seal.objects.values()) or (seal.stop - seal.start) * row_bytes
