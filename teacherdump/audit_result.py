"""What an audit found, for people and for machines."""

from dataclasses import asdict, dataclass
from typing import Any

from storage.console import format_count, format_plural

SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Failure:
    """A row that is not faithful.

    Attributes:
        row: in the store.
        key: of its sample.
        reason: what is wrong, and by how much.
    """

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One thing that was held against the teacher or the corpus.

    Attributes:
        worst: the largest difference over what is allowed of it; above 1 fails, and infinity is what has no measure.
        num_failed: rows that failed.
    """

    worst: float
    num_failed: int


@dataclass(frozen=True)
class Truncation:
    """What the encoding gave up at a temperature, over the distributions that were scored.

    Attributes:
        temperature: of these.
        kl_mean: KL(teacher || what is read), nats, the mean; None for draws, of which it is not finite.
        kl_worst: the largest.
        kept_mean: mass on the classes that are told apart, the mean; None for draws.
        kept_least: the smallest.
        gradient_error: of one distribution, root mean square, over the gradient of a student that knows nothing.
    """

    temperature: float
    kl_mean: float | None
    kl_worst: float | None
    kept_mean: float | None
    kept_least: float | None
    gradient_error: float


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        path: of the store.
        encoding: of the store, as its manifest has it.
        num_rows: rows that were looked at.
        num_scored: of these, with targets.
        num_positions: distributions that were compared.
        tolerance: that was used.
        checks: by name.
        id_overlap: share of kept ids that are among the k largest now; None without topk.
        truncation: a line a temperature.
        reasons: why the store as a whole is not faithful: another teacher, another head.
        failures: rows that are not faithful, in order.
        notes: what a person should know.
    """

    path: str
    encoding: dict[str, Any]
    num_rows: int
    num_scored: int
    num_positions: int
    tolerance: float
    checks: dict[str, Check]
    id_overlap: float | None
    truncation: tuple[Truncation, ...]
    reasons: tuple[str, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the store is faithful, as far as was looked."""
        return not self.failures and not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Every figure, `ok` first; what is infinite as None."""
        value = {"ok": self.ok, **asdict(self)}
        for check in value["checks"].values():
            check["worst"] = None if check["worst"] == float("inf") else check["worst"]
        return value

    def summary(self) -> str:
        """A table for a person."""
        lines = [f"note: {note}" for note in self.notes]
        lines.append(
            f"{self.path}: {format_plural(self.num_rows, 'row')} looked at, {format_count(self.num_scored)} with "
            f"targets, {format_plural(self.num_positions, 'distribution')} scored again"
        )
        lines.append(f"faithful?  difference over what is allowed (tolerance {self.tolerance:g}); up to 1 is faithful")
        for name, check in self.checks.items():
            worst = "differs" if check.worst == float("inf") else f"{check.worst:.3g}"
            failed = f"   FAILS in {format_plural(check.num_failed, 'row')}" if check.num_failed else ""
            lines.append(f"  {name:<20} {worst:>8}{failed}")
        if self.id_overlap is not None:
            lines.append(f"  {'kept ids':<20} {100 * self.id_overlap:>7.4g}% are among the largest now")
        if self.truncation:
            lines.append("given up by the encoding, which is no fault")
        lines += [_truncation_line(part) for part in self.truncation]
        lines += [f"not faithful: {reason}" for reason in self.reasons]
        lines += [f"not faithful: row {it.row} ({it.key!r}): {it.reason}" for it in self.failures[:SHOWN_FAILURES]]
        if len(self.failures) > SHOWN_FAILURES:
            lines.append(f"... and {format_plural(len(self.failures) - SHOWN_FAILURES, 'row')} more: --json gives all")
        lines.append("faithful, as far as was looked" if self.ok else "not faithful")
        return "\n".join(lines)


def _truncation_line(part: Truncation) -> str:
    error = f"gradient off by {100 * part.gradient_error:.3g} %"
    if part.kl_mean is None or part.kl_worst is None or part.kept_mean is None or part.kept_least is None:
        return f"  at T = {part.temperature:g}: {error} a distribution, in the mean by nothing"
    return (
        f"  at T = {part.temperature:g}: {part.kl_mean:.3g} nats lost in the mean, {part.kl_worst:.3g} at worst; "
        f"{100 * part.kept_mean:.4g} % of the mass kept, {100 * part.kept_least:.4g} % at worst; {error}"
    )
