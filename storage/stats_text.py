"""What the figures of a store say to a person, in some lines."""

import heapq
from collections.abc import Sequence

from storage.console import format_bytes, format_count
from storage.scan import Stats, class_label

SHOWN_CLASSES = 10
SHOWN_REASONS = 10
NAME_CHARACTERS = 24


def stats_text(figures: Stats) -> str:
    """What `stats` gave, in some lines."""
    lines = [f"{figures.path}: {format_count(figures.num_sealed_rows)} rows sealed of {format_count(figures.num_rows)}"]
    if figures.num_tokens is not None:
        num_positions = figures.num_sealed_rows * figures.num_positions
        lines.append(
            f"  tokens           {format_count(figures.num_tokens)} of {format_count(num_positions)} positions; the "
            "others are masked, or in rows without targets"
        )
    lines.append(f"  without targets  {format_count(figures.num_refused)}")
    lines += [
        f"    {format_count(item.num_rows)} x {item.reason} (row {item.row}: {item.key})"
        for item in figures.refused[:SHOWN_REASONS]
    ]
    lines.append(f"  entropy          {figures.entropy.mean:.4g} nats in the mean, at T = 1")
    lines += [
        f"  kept at T = {kept.temperature:<4g} {100 * kept.mean:.4g} % in the mean, at least {100 * kept.p5:.4g} % "
        f"in 95 % of {figures.counted}, {100 * kept.min:.4g} % in the worst"
        for kept in figures.kept_mass
    ]
    if figures.agreement is not None and figures.agreement.num_rows:
        agreed, known = figures.agreement.num_agreed, figures.agreement.num_rows
        share = f"{100 * agreed / known:.2f} %"
        target = "hard target met " if figures.sequences is None else "next token met  "
        lines.append(f"  {target} {share} ({format_count(agreed)} of {format_count(known)})")
    if figures.hard_target_nll is not None:
        target = "hard targets" if figures.sequences is None else "next tokens"
        lines.append(f"  teacher's loss   {figures.hard_target_nll:.4g} nats on the {target}, in the mean")
    if figures.num_top1_ties:
        ties = f"{format_count(figures.num_top1_ties)} {figures.counted}"
        lines.append(f"  top-1 ties       {ties}, counted for the lowest class")
    order = heapq.nsmallest(
        SHOWN_CLASSES, range(figures.num_classes), key=lambda index: (-figures.top1_counts[index], index)
    )
    kind = "class" if figures.sequences is None else "id"
    unnamed = f"{kind} " if figures.class_names is None else ""
    shown = [
        f"{unnamed}{class_label(figures, i)[:NAME_CHARACTERS]}: {format_count(figures.top1_counts[i])}"
        for i in order
        if figures.sequences is None or figures.top1_counts[i]
    ]
    others = figures.num_classes - len(shown)
    more = f", and {format_count(others)} {'classes' if kind == 'class' else 'ids'} more" if others else ""
    lines.append(f"  top-1            {', '.join(shown)}{more}")
    lines += _mass_lines(figures)
    for unit, costs in (("row  ", figures.bytes_per_row), ("token", figures.bytes_per_token)):
        if costs is not None:
            by_size = sorted(costs.items(), key=lambda pair: -pair[1])
            lines.append(f"  bytes a {unit}    {sum(costs.values()):,.1f}: " + _costs(by_size))
    if figures.head_bytes:
        lines.append(f"  head             {format_bytes(figures.head_bytes)}, once")
    return "\n".join(lines)


def _mass_lines(figures: Stats) -> list[str]:
    """The mass of each class, and the diagnosis: classes that students of the store will hardly ever answer."""
    mass, lines = figures.class_mass, []
    if figures.class_mass_unknown is not None:
        lines.append(f"  class mass       not known at T = 1: {figures.class_mass_unknown}")
    elif mass is not None and figures.sequences is None and figures.num_classes > 1:
        lines.append(
            f"  class mass       {_range(figures, mass.mean)} in the mean, at T = 1; an equal share is "
            f"{100 / figures.num_classes:.3g} %"
            + (f"; {100 * mass.tail:.3g} % is in tails, of which classes is not known" if mass.tail else "")
        )
        lines.append(
            f"  of other rows    {_range(figures, mass.elsewhere)}: a class's mass in rows of other top-1, what is "
            "left of it where its own are not learned from"
        )
    if figures.starved_classes:
        lines.append(_starved_line(figures))
    return lines


def _range(figures: Stats, shares: Sequence[float | None]) -> str:
    """The least and the largest of the classes' shares."""
    known = {index: share for index, share in enumerate(shares) if share is not None}
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return " to ".join(f"{100 * known[index]:.3g} % ({_said(figures, index)})" for index in (low, high))


def _starved_line(figures: Stats) -> str:
    mass, starved = figures.class_mass, figures.starved_classes
    shares = ["" if mass is None else f" {100 * mass.mean[index]:.3g} %" for index in starved[:SHOWN_CLASSES]]
    shown = ", ".join(_said(figures, index) + share for index, share in zip(starved, shares, strict=False))
    more = f" and {format_count(len(starved) - SHOWN_CLASSES)} more" if len(starved) > SHOWN_CLASSES else ""
    counted = f"{format_count(len(starved))} of {format_count(figures.num_classes)}"
    return (
        f"  starved classes  {counted} have less than a tenth of an equal share of the "
        f"{'top-1' if mass is None else 'mass'}: {shown}{more}; students of this store will hardly ever answer them: "
        "studenttrain calibrate mends that"
    )


def _said(figures: Stats, index: int) -> str:
    """A class, in a line of others."""
    unnamed = "class " if figures.class_names is None else ""
    return f"{unnamed}{class_label(figures, index)[:NAME_CHARACTERS]}"


def _costs(costs: list[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {count:,.1f}" for name, count in costs)
