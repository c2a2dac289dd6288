"""How a corpus is followed, and what came of it."""

import math
from dataclasses import dataclass

from storage.console import format_bytes, format_count, format_duration, format_plural
from storage.series_records import DEDUPES, SUFFIXES

MEMBER_ROWS = 1 << 17


@dataclass(frozen=True)
class FollowOptions:
    """How a corpus is followed.

    Attributes:
        settle: seconds for which a file must not have changed before it counts as whole, at least 0.
        poll: seconds between two looks for new files, above 0.
        idle: seconds without anything new after which the run ends; None for never.
        member_rows: rows of a member at most, at least 1; a file is never cut.
        dedupe: `key` or `digest`: by what a sample is left out that an earlier one is equal to; None keeps all.
        suffix: of the members, `.zarr` or `.h5`; None takes that of the series, or `.zarr`.

    Raises:
        ValueError: an option is out of range.
    """

    settle: float = 10.0
    poll: float = 10.0
    idle: float | None = None
    member_rows: int = MEMBER_ROWS
    dedupe: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("settle", 0.0), ("idle", 0.0)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name}: expected seconds, at least 0, got {value}")
        if not 0 < self.poll < math.inf:
            raise ValueError(f"poll: expected seconds above 0, got {self.poll}")
        if self.member_rows < 1:
            raise ValueError(f"member_rows: expected at least 1, got {self.member_rows}")
        if self.dedupe not in (None, *DEDUPES):
            raise ValueError(f"dedupe: expected {' or '.join(DEDUPES)}, got {self.dedupe!r}")
        if self.suffix not in (None, *SUFFIXES):
            raise ValueError(f"member_format: expected {' or '.join(SUFFIXES)}, got {self.suffix!r}")


@dataclass
class FollowResult:
    """What a run did, and where the series stands.

    Attributes:
        path: of the series.
        num_members: stores in it.
        num_rows: rows of these.
        num_new_members: stores that this run began or went on with.
        num_new_rows: rows that this run sealed.
        num_new_bytes: bytes of stores that this run added.
        num_refused: rows without targets, in the stores that this run wrote to.
        num_left_out: samples that this run left out, since an earlier one is equal.
        num_unusable: files that could not be opened, as of the last look.
        seconds: that the run took.
        limit: what ended it, such as `--limit-hours 2`; None where nothing did.
    """

    path: str
    num_members: int = 0
    num_rows: int = 0
    num_new_members: int = 0
    num_new_rows: int = 0
    num_new_bytes: int = 0
    num_refused: int = 0
    num_left_out: int = 0
    num_unusable: int = 0
    seconds: float = 0.0
    limit: str | None = None

    def summary(self) -> str:
        """What the run did and where the series stands, some lines for a person."""
        did = f"dumped {format_count(self.num_new_rows)} rows in {format_duration(self.seconds)}"
        details = [format_plural(self.num_new_members, "store"), f"{format_count(self.num_refused)} rows refused"]
        if self.num_left_out:
            details.append(f"{format_count(self.num_left_out)} samples left out")
        if self.num_unusable:
            details.append(f"{format_plural(self.num_unusable, 'file')} not usable")
        there = f"{format_plural(self.num_members, 'store')}, {format_count(self.num_rows)} rows"
        lines = [f"{did}: {', '.join(details)}, {format_bytes(self.num_new_bytes)}", f"{self.path}: {there}"]
        why = f"stopped by {self.limit}" if self.limit else "nothing new came"
        return "\n".join([*lines, f"{why}; run the same command again to go on"])
