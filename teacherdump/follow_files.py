"""Which files of a corpus that keeps growing are whole, and how they are cut into members. Arithmetic without I/O."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from storage.corpus import FileEntry
from storage.series_records import CoveredFile, FilesRecord

# How names of files end, or stems before their suffix, while something is still written to them.
UNFINISHED = (".tmp", ".temp", ".partial", ".part", ".crdownload", ".filepart", ".incomplete", ".download")


def is_unfinished(name: str) -> bool:
    """Whether a file's name says that it is still being written.

    Example:
        >>> [is_unfinished(name) for name in ("a.tar", "b/a.tar.part", "a.tmp.tar", "b/.a.tar", "part.tar")]
        [False, True, True, True, False]
    """
    last = name.rpartition("/")[2].lower()
    return last.startswith((".", "_")) or last.endswith(UNFINISHED) or last.rpartition(".")[0].endswith(UNFINISHED)


class Settling:
    """New files, until they have not changed for some time.

    Args:
        settle_s: seconds for which neither size nor version may change.
        clock: seconds that only grow.
    """

    def __init__(self, settle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle_s, self._clock = settle_s, clock
        self._since: dict[str, tuple[FileEntry, float]] = {}

    def settled(self, entries: Iterable[FileEntry]) -> list[FileEntry]:
        """Of the new files that are there now, those that are whole, in their order."""
        now, since, whole = self._clock(), {}, []
        for entry in entries:
            if is_unfinished(entry.name):
                continue
            before, start = self._since.get(entry.name, (None, now))
            if before != entry:
                start = now
            since[entry.name] = entry, start
            if now - start >= self._settle_s:
                whole.append(entry)
        self._since = since
        return whole

    @property
    def num_waiting(self) -> int:
        """Files that were there at the last look, whole or not."""
        return len(self._since)


def first_group(counts: Sequence[int], most_rows: int) -> int:
    """How many of the first files make the next member: as many as have `most_rows` rows, at least one.

    Example:
        >>> first_group([400, 500, 300], 1000), first_group([5000, 1], 1000)
        (2, 1)
    """
    total = 0
    for position, count in enumerate(counts):
        total += count
        if position and total > most_rows:
            return position
    return len(counts)


@dataclass(frozen=True)
class Change:
    """A covered file that is not as it was.

    Attributes:
        record: of the member that covers it.
        then: the file as it was.
        now: as it is; None where it is gone.
    """

    record: FilesRecord
    then: CoveredFile
    now: FileEntry | None

    @property
    def is_harmful(self) -> bool:
        """Whether it holds other bytes for certain: it is gone, or of another size."""
        return self.now is None or self.now.num_bytes != self.then.num_bytes

    @property
    def text(self) -> str:
        """What happened to it."""
        if self.now is None:
            return f"{self.then.name!r} is gone"
        if self.is_harmful:
            return f"{self.then.name!r} has {self.now.num_bytes} bytes, not {self.then.num_bytes}"
        return f"{self.then.name!r} was written again"


def changes(records: Iterable[FilesRecord], entries: Iterable[FileEntry]) -> list[Change]:
    """The covered files that are not as they were."""
    there = {entry.name: entry for entry in entries}
    found = []
    for record in records:
        for then in record.files:
            now = there.get(then.name)
            if now is None or (now.num_bytes, now.version) != (then.num_bytes, then.version):
                found.append(Change(record, then, now))
    return found
