"""From a store to a plan: its covariance in one pass, clusters of classes, and what is known of each."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.console import format_count, format_plural
from storage.errors import PathError, StudentError
from storage.reader import Store, open_store
from storage.scan.covariance import Covariance, check_temperature_one, covariance
from storage.scan.passes import Progress
from storage.urls import check_local
from studenttrain.specialists.clusters import ClusterOptions, Clusters, check_scikit_learn, find_clusters
from studenttrain.specialists.plan import SpecialistsPlan, load_plan, write_plan

LINE = 110  # characters of a printed one
NUM_SHOWN = 30  # classes that are listed


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan, and what it was made from.

    Attributes:
        plan: which classes each specialist has.
        clusters: what is known of each.
        covariance: of the store's distributions.
        notes: what a user should know, a sentence each.
    """

    plan: SpecialistsPlan
    clusters: Clusters
    covariance: Covariance
    notes: tuple[str, ...]


def plan_specialists(
    store: Store, options: ClusterOptions, *, num_workers: int | None = None, progress: Progress | None = None
) -> Planned:
    """A plan for a store, by what its sealed rows say.

    Args:
        store: open for reading.
        options: how classes are put together.
        num_workers: threads that read; by default one for each core, at most 8.
        progress: called with the number of rows that were read, now and then.

    Raises:
        ValueError: an option is out of range for so many classes.
        StudentError: scikit-learn is not installed, or there are no clusters.
        StoreError: the store can't tell the covariance of its distributions; see `covariance`.
    """
    from studenttrain.checks import store_identity  # brings torch

    options.check(store.manifest.num_classes)
    check_scikit_learn()
    check_temperature_one(store)
    identity = store_identity(store)
    found = covariance(store, num_workers=num_workers, progress=progress)
    clusters = find_clusters(found.covariance_CC, options)
    plan = SpecialistsPlan(
        num_classes=store.manifest.num_classes,
        class_names=store.manifest.class_names,
        store=identity,
        specialists=tuple(cluster.classes for cluster in clusters.specialists),
        how=_how(options, found, clusters),
    )
    return Planned(plan, clusters, found, tuple(_notes(store, options, found, clusters)))


def _how(options: ClusterOptions, found: Covariance, clusters: Clusters) -> dict[str, Any]:
    """What a plan says of how it was made."""
    counts_C = found.class_counts_C
    return {
        "method": f"k-means on the columns of the {options.on} matrix",
        "options": vars(options),
        "software": {name: version(name) for name in ("scikit-learn", "numpy")},
        "num_distributions": found.num_distributions,
        "counted_by": "hard target" if found.num_by_target else "top-1",
        "mean_tail": found.mean_tail,
        "biased_within": found.biased_within,
        "figures": [
            {
                "num_rows": int(counts_C[list(cluster.classes)].sum()),
                "within": cluster.within,
                "outside": cluster.outside,
            }
            for cluster in clusters.specialists
        ],
    }


def _notes(store: Store, options: ClusterOptions, found: Covariance, clusters: Clusters) -> list[str]:
    notes = []
    if store.num_sealed_rows < store.manifest.num_rows:
        notes.append(
            f"the store is not finished: {format_count(store.num_sealed_rows)} of "
            f"{format_count(store.manifest.num_rows)} rows are in the plan"
        )
    if found.mean_tail:
        notes.append(
            f"of topk rows only the kept classes count: {100 * found.mean_tail:.2g} % of the probability is left out"
        )
    if found.biased_within:
        notes.append(
            "draws are unbiased for a class, not for two at once: an entry of the covariance is off by up to "
            f"{found.biased_within:.2g}"
        )
    if clusters.num_small:
        notes.append(
            f"{format_plural(clusters.num_small, 'cluster')} of fewer than {options.min_classes} classes: no "
            "specialists (--min-classes)"
        )
    if clusters.num_same:
        notes.append(f"{format_plural(clusters.num_same, 'cluster')} with the classes of another, or with none")
    if clusters.apart:
        notes += _apart(clusters.apart, found)
    return notes


def _apart(classes: Sequence[int], found: Covariance) -> list[str]:
    """Why some classes are in no cluster."""
    num_still = sum(found.covariance_CC[label, label] <= 0 for label in classes)
    num_alone = len(classes) - num_still
    notes = []
    if num_still:
        notes.append(f"{_num_classes(num_still)} with the same probability in every row: in no specialist")
    if num_alone:
        are = "that is" if num_alone == 1 else "that are"
        notes.append(f"{_num_classes(num_alone)} {are} confused with no other one: in no specialist")
    return notes


def check_plan_path(path: Path, *, force: bool, options: ClusterOptions | None = None) -> None:
    """Refuse a path that a plan can't be written to, before a long pass.

    Args:
        path: of the plan.
        force: whether a plan that is there may be replaced by another one.
        options: of the new plan; another plan that was made with others would be refused in the end anyway.

    Raises:
        PathError: there is no such folder, or something there that is no plan.
        StudentError: there is a plan that was made otherwise.
    """
    if not path.absolute().parent.is_dir():
        raise PathError(f"{path}: expected a folder to write into, got none; make {path.parent} first")
    if not path.exists():
        return
    try:
        there = load_plan(path)
    except (StudentError, PathError):
        raise PathError(
            f"{path}: expected a plan of specialists, or nothing, got something else; give --out another path"
        ) from None
    made = there.how.get("options")
    if not force and options is not None and made != vars(options):
        different = _differences(made if isinstance(made, Mapping) else {}, vars(options))
        raise _is_another(path, f"one that was made with {different}" if made else "one that was made by hand")


def keep_plan(path: Path, plan: SpecialistsPlan, *, force: bool) -> bool:
    """Write a plan, unless it says what the one that is there says.

    Returns:
        Whether it was written.

    Raises:
        StudentError: there is another plan, and `force` is not given.
    """
    if path.exists():
        there = load_plan(path)
        if _says(there) == _says(plan):
            if there.store == plan.store and there.how == plan.how:
                return False
        elif not force:
            same_store = there.store.get("digest") == plan.store["digest"]
            raise _is_another(path, "one of other rows, or changed by hand" if same_store else "one of another store")
    write_plan(path, plan)
    return True


def _says(plan: SpecialistsPlan) -> tuple[Any, ...]:
    return plan.num_classes, plan.class_names, plan.specialists, plan.store.get("digest")


def _is_another(path: Path, got: str) -> StudentError:
    return StudentError(
        f"{path}: expected the plan that these options make, got {got}; give --out another path, or --force to "
        "replace it: specialists that were trained by it do not fit the new one"
    )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    different = [name for name in now if then.get(name) != now[name]]
    return ", ".join(f"--{name.replace('_', '-')} {then.get(name)}" for name in different)


def planned_text(path: str | Path, planned: Planned, *, is_written: bool) -> str:
    """What is printed of a plan: a line and its classes for each specialist, then the classes that none has."""
    plan, how = planned.plan, planned.plan.how
    what = f"{format_plural(len(plan.specialists), 'specialist')} for {format_count(plan.num_classes)} classes"
    seen = format_plural(int(how["num_distributions"]), "row")
    lines = [f"{path}{'' if is_written else ', as it was'}: {what}, by the {how['options']['on']} over {seen}"]
    lines += ["", " no  classes       rows  within  outside"]
    for number, (classes, figures) in enumerate(zip(plan.specialists, how["figures"], strict=True)):
        within, outside = (
            "-" if value is None else f"{value:+.3f}" for value in (figures["within"], figures["outside"])
        )
        lines.append(
            f"{number:>3}  {format_count(len(classes)):>7} {format_count(figures['num_rows']):>10}  {within:>6}  "
            f"{outside:>7}"
        )
        lines += _wrapped(_names(plan, classes), "     ")
    lines.append(f"rows are counted by the {how['counted_by']}; within, outside: mean correlation")
    if plan.uncovered:
        lines.append(f"in no specialist: {_num_classes(len(plan.uncovered))}")
        lines += _wrapped(_names(plan, plan.uncovered), "     ")
    return "\n".join(lines)


def _num_classes(count: int) -> str:
    return f"{format_count(count)} class" + ("" if count == 1 else "es")


def _names(plan: SpecialistsPlan, classes: Sequence[int]) -> str:
    names = plan.class_names
    shown = [str(label) if names is None else names[label] for label in classes[:NUM_SHOWN]]
    more = len(classes) - len(shown)
    return ", ".join([*shown, *([f"and {format_count(more)} more"] if more else [])])


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, LINE, initial_indent=indent, subsequent_indent=indent)


def plan_from_store(
    targets: str,
    out: str | Path,
    options: ClusterOptions,
    *,
    force: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Planned, bool]:
    """Plan specialists for a store, and write the plan.

    Args:
        targets: the store, or its URL.
        out: where the plan goes. One that is there and says the same is left.
        options: how classes are put together.
        force: replace another plan.
        num_workers: threads that read.
        progress: called with the number of rows that were read, now and then.

    Returns:
        The plan with what it was made from, and whether it was written.
    """
    check_local("plan", str(out))
    out = Path(out)
    check_plan_path(out, force=force, options=options)
    with open_store(targets) as store:
        planned = plan_specialists(store, options, num_workers=num_workers, progress=progress)
    return planned, keep_plan(out, planned.plan, force=force)
