"""What `studenttrain specialists eval` and `fuse` print."""

from collections.abc import Sequence

from storage.console import format_bytes, format_count, format_plural
from studenttrain.specialists.fuse_options import FuseResult
from studenttrain.specialists.fused_figures import CountLine, FusedFigures, SpecialistLine

NUM_NAMES = 3  # of a specialist's classes
NAME_CHARACTERS = 14


def evaluated_text(figures: FusedFigures, class_names: tuple[str, ...] | None) -> str:
    """Both classifiers, the table of the paper, and a line for each specialist."""
    lines = [f"generalist  {figures.generalist}", f"fused       {figures.fused}"]
    num_samples = figures.fused.num_samples
    lines.append(
        f"{_percent(figures.num_changed, num_samples)} of the answers changed; gradients within "
        f"{figures.residual:.1g} after {format_plural(figures.num_iterations, 'step')} at most"
    )
    if figures.num_refused:
        lines.append(f"{format_plural(figures.num_refused, 'sample')} without an answer, left out")
    if figures.by_covering:
        lines += ["", "specialists that have the true class", *_count_lines(figures.by_covering)]
    lines += ["", "active specialists", *_count_lines(figures.by_active)]
    lines += ["", *_specialist_lines(figures, class_names)]
    return "\n".join(lines)


def fused_text(result: FuseResult) -> str:
    """What was written: rows, how many of them specialists had a say in, bytes and digest."""
    encoding = dict(result.encoding)
    kept = " ".join([encoding.pop("name"), *(f"{name}={value}" for name, value in encoding.items())])
    refused = f", {format_count(result.num_quarantined)} without targets" if result.num_quarantined else ""
    lines = [
        f"{result.path}: {format_count(result.num_rows)} rows{refused}, {kept}, {format_bytes(result.num_bytes)}",
        f"content digest {result.content_digest}",
    ]
    if result.num_written:
        lines.insert(
            1,
            f"written now: {format_count(result.num_written)} rows, "
            f"{_percent(result.num_active, result.num_written)} of them with an active specialist, "
            f"{_percent(result.num_changed, result.num_written)} with another top-1; gradients within "
            f"{result.residual:.1g}",
        )
    return "\n".join(lines)


def _count_lines(lines: Sequence[CountLine]) -> list[str]:
    is_known = any(line.num_known for line in lines)
    head = f"{'number':>6} {'rows':>9} {'changed':>9}"
    found = [head + (f" {'before':>8} {'after':>8} {'right':>7} {'relative':>9}" if is_known else "")]
    for line in lines:
        text = f"{line.num_specialists:>6} {format_count(line.num_rows):>9} {format_count(line.num_changed):>9}"
        if is_known:
            relative = "-" if line.relative_change is None else f"{100 * line.relative_change:+.1f} %"
            text += (
                f" {_percent(line.right_before, line.num_known):>8} {_percent(line.right_after, line.num_known):>8} "
                f"{line.change:>+7,} {relative:>9}"
            )
        found.append(text)
    return found


def _specialist_lines(figures: FusedFigures, class_names: tuple[str, ...] | None) -> list[str]:
    is_known = any(line.num_seen for line in figures.specialists)
    seen = "all rows" if figures.every_row else "the rows that each was active for"
    if not is_known:
        lines = [f"{_begin(line)}  {names_of(line.classes, class_names)}" for line in figures.specialists]
        return [f"{'no':>3} {'classes':>7} {'active':>9}", *lines]
    columns = f"{'own rows':>9} {'before':>8} {'after':>8} {'precision':>9} {'recall':>8}"
    found = [
        f"specialists, on {seen}: top-1 of its own rows among its own classes, before and after; dustbin",
        f"{'no':>3} {'classes':>7} {'active':>9} {columns}",
    ]
    for line in figures.specialists:
        shares = [line.own_before, line.own_after, line.dustbin_precision, line.dustbin_recall]
        before, after, precision, recall = ("-" if it is None else f"{100 * it:.2f} %" for it in shares)
        found.append(
            f"{_begin(line)} {format_count(line.num_own):>9} {before:>8} {after:>8} {precision:>9} {recall:>8}  "
            f"{names_of(line.classes, class_names)}"
        )
    return found


def _begin(line: SpecialistLine) -> str:
    return f"{line.number:>3} {format_count(len(line.classes)):>7} {format_count(line.num_active):>9}"


def names_of(classes: Sequence[int], class_names: tuple[str, ...] | None) -> str:
    """The first of a specialist's classes, by name where they have one."""
    shown = [str(it) if class_names is None else class_names[it] for it in classes[:NUM_NAMES]]
    cut = [name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…" for name in shown]
    return ", ".join(cut) + (", ..." if len(classes) > NUM_NAMES else "")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"
