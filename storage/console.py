"""What the three command lines print, and how they fail: progress, units, one line for an error.

Progress and errors go to stderr, results to stdout, so that a command's result can be piped.
"""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Protocol

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from storage.errors import StoreError
from storage.interruption import Interrupted

PLAIN_LINE_EVERY_S = 30.0
EXIT_STORE_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# C0 but for the line end and the tab, DEL, C1, lone surrogates, and marks of the direction of writing.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}


class Pass(Protocol):
    """A long pass that is under way."""

    def advance(self, count: int) -> None:
        """So many more units are done."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar, such as the loss."""


class _Rate(ProgressColumn):
    """Rate and time left, in the units that the rest of the output uses."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """`12,000 rows/s, 3 min 20 s left`."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        left = "" if task.time_remaining is None else f", {format_duration(task.time_remaining)} left"
        return Text(f"{format_rate(speed, self.unit)}{left}")


class _OnTerminal:
    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, note="")

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


class _InLog:
    """One plain line now and then."""

    def __init__(self, total: int | None, unit: str, label: str, every_s: float) -> None:
        self._total, self._unit, self._label, self._every_s = total, unit, label, every_s
        self._done, self._text = 0, ""
        self._start = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            click.echo(self._line(now), err=True)

    def note(self, text: str) -> None:
        self._text = text

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        of = "" if self._total is None else f" of {format_count(self._total)}"
        line = f"{self._label}: {format_count(self._done)}{of} {self._unit}, {format_rate(rate, self._unit)}"
        if self._total is not None and rate > 0:
            line += f", {format_duration((self._total - self._done) / rate)} left"
        return f"{line}, {self._text}" if self._text else line


class _Silent:
    def advance(self, count: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextlib.contextmanager
def progress(
    total: int | None, unit: str, label: str, *, quiet: bool = False, every_s: float = PLAIN_LINE_EVERY_S
) -> Iterator[Pass]:
    """A progress bar with rate and time left on a terminal; elsewhere one plain line now and then, on stderr.

    Args:
        total: units of the whole pass, or None where that is not known.
        unit: what is counted, in the plural, such as `rows`.
        label: what is done, such as `dumping`.
        quiet: show nothing.
        every_s: seconds between two plain lines.
    """
    if quiet:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _InLog(total, unit, label, every_s)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _OnTerminal(bar, label, total)


def format_count(count: int) -> str:
    """A whole number with its thousands apart.

    Example:
        >>> format_count(60000)
        '60,000'
    """
    return f"{count:,}"


def format_plural(count: int, thing: str) -> str:
    """A whole number of things.

    Example:
        >>> format_plural(1, "shard"), format_plural(2000, "shard")
        ('1 shard', '2,000 shards')
    """
    return f"{format_count(count)} {thing}" + ("" if count == 1 else "s")


def format_bytes(num_bytes: float) -> str:
    """Bytes in the decimal unit that suits them.

    Example:
        >>> format_bytes(1_234_000), format_bytes(12)
        ('1.23 MB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"


def format_rate(per_second: float, unit: str) -> str:
    """So many units a second.

    Example:
        >>> format_rate(12345.6, "rows"), format_rate(0.5, "steps")
        ('12,346 rows/s', '0.5 steps/s')
    """
    return f"{per_second:,.0f} {unit}/s" if per_second >= 100 else f"{per_second:.3g} {unit}/s"


def format_duration(seconds: float) -> str:
    """A time in the two units that suit it.

    Example:
        >>> format_duration(3725), format_duration(200), format_duration(2.51)
        ('1 h 02 min', '3 min 20 s', '2.5 s')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` (10^6) or `2GiB` (2^30).

    Raises:
        ValueError: it is not such a size, or not above zero.

    Example:
        >>> parse_size("1.5 GB"), parse_size("2MiB")
        (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]i?|)b?\s*", text, re.IGNORECASE)
    size = round(float(match[1]) * (_DECIMAL | _BINARY)[match[2].lower()]) if match else 0
    if size <= 0:
        raise ValueError(f"size: expected bytes such as 500MB or 2GiB, got {text!r}")
    return size


def printable(text: str) -> str:
    r"""Text without what a terminal would obey: control characters, and what turns the direction of writing.

    Example:
        >>> printable("a class \x1b[2J of its own")
        'a class \\x1b[2J of its own'
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def command_errors(is_resumed: bool = False) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code.

    1 for a `StoreError` or an error of the operating system, 2 for a `ValueError` (an option that can't be), 130 for an
    interruption (143 for SIGTERM). A reader that hung up, as `head` does, is no error.

    Args:
        is_resumed: whether the same command goes on where it was interrupted.
    """
    try:
        yield
    except StoreError as error:
        _fail(str(error), EXIT_STORE_ERROR)
    except ValueError as error:
        _fail(str(error), EXIT_USAGE)
    except MemoryError as error:
        text = f"memory: expected enough for this, got {error or 'too little'}; use smaller shards, or more memory"
        _fail(text, EXIT_STORE_ERROR)
    except BrokenPipeError:
        # python would try to flush stdout once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", EXIT_STORE_ERROR)
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would only break off the way out
        click.echo(str(stop), err=True)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        click.echo("interrupted" + ("; run the same command again to go on" if is_resumed else ""), err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    raise SystemExit(code) from None
