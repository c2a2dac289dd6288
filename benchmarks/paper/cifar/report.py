"""The specialists' part of docs/paper.md, and its picture, from the figures of a result file.

python -m benchmarks.paper.cifar.report          # prints it, and puts it into docs/paper.md
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cifar.experiment import PHASES, own_accuracy
from benchmarks.paper.table import PAGE, markdown_table, put_into, spread
from benchmarks.result import RESULTS

BEGIN, END = "<!-- specialists: python -m benchmarks.paper.cifar.report -->", "<!-- end of the specialists -->"
# Relative change of accuracy in the paper's table 4, by the number of specialists that cover a sample's class.
PAPER_CHANGE = {0: 0.0, 1: 3.4, 2: 7.4, 3: 8.8, 4: 10.5, 5: 11.1, 6: 11.3, 7: 12.8, 8: 13.6, 9: 16.6}
NUM_SHOWN = 20


def tables(figures: Mapping[str, Any]) -> str:
    """All tables of the experiment as Markdown."""
    parts = (clusters, summary, by_covering, dustbins, overfitting, students)
    return "\n".join(part(figures) for part in parts)


def summary(figures: Mapping[str, Any]) -> str:
    """What the specialists are worth on the test rows: the paper's table 3."""
    before = figures["phases"]["hard"]["test"]
    rows = [
        ("generalist alone", "25.0", "43.1", _percent(before["generalist"]["top1"]), own_accuracy(before, "own_before"))
    ]
    for phase in PHASES:
        tried = figures["phases"][phase]["test"]
        change = relative_change(tried)
        paper = ("26.1 (+4.4 %)", "45.9") if phase == "hard" else ("", "")
        name = "with specialists, hard targets" if phase == "hard" else "then on soft targets"
        ours = f"{_percent(tried['fused']['top1'])} ({change:+.1f} %)"
        rows.append((name, *paper, ours, own_accuracy(tried, "own_after")))
    head = ["test accuracy in %", "paper, all", "paper, own classes", "ours, all", "ours, own classes"]
    return markdown_table(head, [(*row[:4], _percent(row[4])) for row in rows])


def by_covering(figures: Mapping[str, Any]) -> str:
    """Test rows by the number of specialists that have their class: the paper's table 4."""
    lines = {phase: figures["phases"][phase]["test"]["by_covering"] for phase in PHASES}
    rows = []
    for hard, soft in zip(*(lines[phase] for phase in PHASES), strict=True):
        paper = PAPER_CHANGE.get(hard["num_specialists"])
        changes = [_change(line) for line in (hard, soft)]
        accuracy = _percent(hard["right_before"] / hard["num_known"])
        shown = "" if paper is None else f"{paper:+.1f} %"
        rows.append((str(hard["num_specialists"]), f"{hard['num_known']:,}", accuracy, *changes, shown))
    head = ["specialists with the class", "test rows", "generalist right, %", "hard", "then soft", "paper"]
    return markdown_table(head, rows)


def overfitting(figures: Mapping[str, Any]) -> str:
    """Own rows that are right among own classes, of rows that were learned from and of others, after each phase."""
    named = {"seen": "learned from", "held": "held out", "test": "test"}
    head = ["right among own classes, %", *named.values(), "learned from minus test"]
    rows = []
    for which, phase, name in (
        ("own_before", "hard", "generalist"), ("own_after", "hard", "hard targets"), ("own_after", "soft", "then soft"),
    ):  # fmt: skip
        found = [own_accuracy(figures["phases"][phase][corpus], which) for corpus in named]
        rows.append((name, *map(_percent, found), _percent(found[0] - found[2])))
    return markdown_table(head, rows)


def dustbins(figures: Mapping[str, Any]) -> str:
    """What the fusion is worth with dustbins moved as the held-out rows would have it, and how sure they are."""
    rows = []
    for phase in PHASES:
        held, test = (figures["dustbin"][phase][name] for name in ("held", "test"))
        best = max(held["moved"], key=lambda by: (held["moved"][by]["top1"], -abs(float(by))))
        tops = [_percent(tried["moved"][by]["top1"]) for by in ("0", best) for tried in (held, test)]
        sure = [_percent(test["dustbin"][name]) for name in ("true", "generalist", "specialists")]
        rows.append(
            ("hard targets" if phase == "hard" else "then soft", *tops[:2], f"{float(best):+g}", *tops[2:], *sure)
        )
    head = [
        "fused, %", "held out", "test", "moved by", "held out", "test", "in the dustbin, %", "says the generalist",
        "say the specialists",
    ]  # fmt: skip
    return markdown_table(head, rows)


def students(figures: Mapping[str, Any]) -> str:
    """What one student keeps of the whole."""
    whole = figures["phases"]["soft"]["test"]
    generalist, fused = whole["generalist"]["top1"], whole["fused"]["top1"]
    names = {
        "fused": "from all together", "generalist": "from the generalist's targets", "hard": "from hard targets",
    }  # fmt: skip
    rows = [("the generalist", f"{100 * generalist:.2f}", ""), ("all together", *_against([fused], generalist))]
    rows += [(f"student {name}", *_against(figures["students"][kind], generalist)) for kind, name in names.items()]
    return markdown_table(["test accuracy, %", "", "against the generalist"], rows)


def _against(values: Sequence[float], generalist: float) -> tuple[str, str]:
    """Accuracies in %, and how many points their mean is above another one."""
    return spread([100 * value for value in values], 2), f"{100 * (statistics.mean(values) - generalist):+.2f}"


def clusters(figures: Mapping[str, Any]) -> str:
    """Clusters of classes, and how many of their pairs share a superclass."""
    rows = []
    named = {
        "correlation": "20 clusters, on the correlation", "covariance": "20 clusters, on the covariance (the paper's)",
        "specialists": "the specialists' sets, which overlap",
    }  # fmt: skip
    for name, text in named.items():
        found = figures["clusters"][name]["superclasses"]
        share = f"{found['num_same']} of {found['num_pairs']} ({_percent(found['num_same'] / found['num_pairs'])} %)"
        chance = f"{found['chance']:.1f} ({found['chance_p5']:.0f}-{found['chance_p95']:.0f})"
        rows.append((text, share, chance))
    head = ["", "pairs of one superclass", "by chance (p5-p95)"]
    sets = figures["clusters"]["correlation"]["classes"]
    listed = [f"- {', '.join(name.replace('_', ' ') for name in classes)}" for classes in sets[:NUM_SHOWN]]
    return markdown_table(head, rows) + "\n" + "\n".join(listed) + "\n"


def relative_change(tried: Mapping[str, Any]) -> float:
    """Change of the accuracy by the specialists, in % of what it was."""
    before, after = tried["generalist"]["top1"], tried["fused"]["top1"]
    return float(100 * (after - before) / before)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _change(line: Mapping[str, Any]) -> str:
    relative = line["relative_change"]
    return f"{line['change']:+d}" + ("" if relative is None else f" ({100 * relative:+.1f} %)")


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Relative change by covering specialists beside the paper's, and own rows before and after the soft phase."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for phase, color in zip(PHASES, ("tab:blue", "tab:orange"), strict=True):
        lines = [line for line in figures["phases"][phase]["test"]["by_covering"] if line["right_before"] >= 100]
        left.plot(
            [line["num_specialists"] for line in lines], [100 * line["relative_change"] for line in lines], "o-",
            color=color, label="hard targets" if phase == "hard" else "then soft targets",
        )  # fmt: skip
    most = max(line["num_specialists"] for line in lines)
    left.plot(
        range(most + 1), [PAPER_CHANGE[count] for count in range(most + 1)], "s--", color="0.6", label="the paper"
    )
    left.axhline(0, color="0.8", linewidth=0.8)
    left.set(xlabel="specialists with the true class", ylabel="relative change of accuracy, %")
    left.set_xticks(range(most + 1))
    left.legend(frameon=False)
    named = {"generalist": ("own_before", "hard"), "hard": ("own_after", "hard"), "then soft": ("own_after", "soft")}
    for corpus, color, shift in (("seen", "0.7", -0.2), ("test", "tab:blue", 0.2)):
        heights = [100 * own_accuracy(figures["phases"][phase][corpus], which) for which, phase in named.values()]
        label = "rows learned from" if corpus == "seen" else "test rows"
        bars = right.bar([place + shift for place in range(len(named))], heights, 0.38, color=color, label=label)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_xticks(range(len(named)), list(named))
    right.set(ylabel="right among own classes, %", ylim=(50, 105))
    right.legend(frameon=False, ncols=2, loc="upper left")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_into(page: Path, text: str) -> None:
    """Put the tables into a page, where that is there."""
    if page.exists():
        page.write_text(put_into(page.read_text(), text, BEGIN, END))


def main() -> None:
    """Print the tables, put them into the page, and draw."""
    figures = json.loads((RESULTS / "paper_cifar.json").read_text())["figures"]
    text = tables(figures)
    write_into(PAGE, text)
    draw(figures, RESULTS / "paper-cifar.png")
    print(text)


if __name__ == "__main__":
    main()
