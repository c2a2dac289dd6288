"""All specialists of a plan, trained from a store: what `studenttrain specialists fit` does."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from storage.backends.files import clear_os_errors, make_folder
from storage.console import format_count
from storage.errors import MismatchError, NotSealedError, PathError, StudentError
from storage.reader import Store
from studenttrain.checkpoint import CHECKPOINT, load_checkpoint
from studenttrain.checks import check_class_names, check_same_run, open_targets, store_identity
from studenttrain.ending import FitResult, ended_run
from studenttrain.export import CARD, load_card
from studenttrain.preparation import look_at_data, prepare
from studenttrain.selection import RowClasses, name_classes
from studenttrain.specialists.config import SpecialistsConfig
from studenttrain.specialists.plan import SpecialistsPlan, load_plan, write_plan
from studenttrain.specialists.sampling import RowCounts, check_has_classes, classes_of_rows, counts_of
from studenttrain.specialists.specialist import PLAN, Phase, phase_folder, write_phases
from studenttrain.specialists.specialty import Specialty
from studenttrain.train import fit


@dataclass(frozen=True)
class SpecialistResult:
    """What came of one specialist.

    Attributes:
        number: in the plan.
        classes: how its own classes are called.
        rows: that it was trained on.
        phases: what came of each, in order.
    """

    number: int
    classes: str
    rows: RowCounts
    phases: tuple[tuple[Phase, FitResult], ...]

    def __str__(self) -> str:
        parts = [f"specialist {self.number}: {self.classes}"]
        parts.append(f"{format_count(self.rows.own)} own rows and {format_count(self.rows.drawn)} others an epoch")
        for phase, result in self.phases:
            text = f"{phase}: {format_count(result.steps)} steps"
            figures = result.figures
            if figures is not None and figures.top1 is not None:
                text += f", {100 * figures.top1:.2f} % of {format_count(figures.num_samples)} own rows right"
            parts.append(text + (" (had ended already)" if result.already_ended else ""))
        return "; ".join(parts)


@dataclass(frozen=True)
class SpecialistsResult:
    """What came of all.

    Attributes:
        out: their folder.
        specialists: those that were asked for.
        num_planned: specialists of the plan.
    """

    out: str
    specialists: tuple[SpecialistResult, ...]
    num_planned: int

    def __str__(self) -> str:
        done = f"{len(self.specialists)} of {self.num_planned} specialists: {self.out}"
        return "\n".join([*map(str, self.specialists), done])


def fit_specialists(config: SpecialistsConfig, quiet: bool = False) -> SpecialistsResult:
    """Train the specialists of a plan, or go on with them where the same options stopped.

    Args:
        config: what is trained, on what, and how.
        quiet: print nothing but warnings.

    Raises:
        StoreError: something that the user can mend; the message says how.
        ValueError: options that contradict each other, or that would be ignored.
        Interrupted: SIGINT or SIGTERM stopped it; what was done is kept.
    """
    plan = load_plan(config.plan)
    numbers = _numbers(config, plan)
    with contextlib.closing(open_targets(config.targets, config.run(0, config.phases[0]).cache_settings)) as store:
        check_plan(plan, store, config.plan)
        check_store(store)
    out, say = Path(config.out), _say(quiet)
    is_begun = _check_folder(out, plan)
    owed = [number for number in numbers if not is_done(config, number)]
    told = look_once(config, plan, owed, quiet) if owed else None
    if not is_begun:
        with clear_os_errors(out):
            make_folder(out)
        write_plan(out / PLAN, plan)
    write_phases(out, config.phases)
    if (config.workers is None and config.scheduler is None) or not owed:
        for number in owed:
            named = name_classes(plan.specialists[number], plan.class_names)
            say(f"specialist {number} of {len(plan.specialists)}: {named}")
            train_one(config, plan, number, told, quiet)
    else:
        from studenttrain.specialists.parallel import train_on_workers

        train_on_workers(config.absolute(), plan, owed, say, quiet)
    return SpecialistsResult(
        config.out, tuple(_result(config, plan, number, owed) for number in numbers), len(plan.specialists)
    )


def train_one(
    config: SpecialistsConfig, plan: SpecialistsPlan, number: int, told: Any = None, quiet: bool = True
) -> None:
    """Train one specialist through its phases, or go on with it.

    Args:
        config: of all.
        plan: of all.
        number: which one.
        told: the class of each row, as `classes_of_rows` gives it; None reads it.
        quiet: print nothing but warnings.
    """
    specialty = Specialty(number, plan.specialists[number], config.own_share, told, is_checked=True)
    for phase in config.phases:
        fit(config.run(number, phase), quiet, specialty)


def is_done(config: SpecialistsConfig, number: int) -> bool:
    """Whether all phases of a specialist have ended.

    Raises:
        StudentError: it was begun with other options.
    """
    for phase in config.phases:
        run = config.run(number, phase)
        path = Path(run.out) / CHECKPOINT
        if not path.is_file():
            return False
        checkpoint = load_checkpoint(path)
        check_same_run(checkpoint["config"], run)
        share = (checkpoint["card"].get("specialist") or {}).get("own_share")
        if share != config.own_share:
            raise StudentError(
                f"run '{run.out}': expected --own-share {share}, with which it was begun, got {config.own_share:g}; "
                "give that to go on, or --out another folder"
            )
        if ended_run(Path(run.out), checkpoint["step"]) is None:
            return False
    return True


def look_once(config: SpecialistsConfig, plan: SpecialistsPlan, numbers: Sequence[int], quiet: bool) -> Any:
    """Hold the corpus against the store, once for all specialists; the class of each row, and what told it.

    Args:
        config: of all.
        plan: of all.
        numbers: of the specialists that are trained: what none could be made of is refused before the first. The first
            is built, to see that its model can be.
        quiet: print nothing but warnings.

    Raises:
        StoreError: something does not fit.
        ValueError: the phase `hard` without hard targets.
    """
    first, last = (config.run(numbers[0], phase) for phase in (config.phases[0], config.phases[-1]))
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_targets(config.targets, first.cache_settings))
        prepared = prepare(last if config.soft_epochs is not None else replace(last, alpha=None), store, stack)
        rows = RowClasses(store, prepared.corpus)
        if "hard" in config.phases and rows.by_top1:
            raise ValueError(
                f"epochs, steps: expected hard targets for them, got none in '{config.targets}' or '{config.data}'; "
                "give --soft-epochs alone, or hard targets: --labels"
            )
        told = classes_of_rows(rows)
        for number in numbers:
            specialty = Specialty(number, plan.specialists[number], config.own_share, told)
            specialty.check_init(first)
            narrowed = specialty.narrow(prepared, first.seed)
            if number == numbers[0]:
                specialty.build(first, narrowed, begins=True)
        look_at_data(prepared, quiet)
        return told


def check_plan(plan: SpecialistsPlan, store: Store, path: str) -> None:
    """Refuse a plan of another store.

    Raises:
        MismatchError: it is; the message says in what.
    """
    where = f"plan '{path}'"
    if plan.num_classes != store.manifest.num_classes:
        raise MismatchError(
            f"{where}: expected {store.manifest.num_classes} classes as in '{store.path}', got {plan.num_classes}; "
            "make a plan from this store: studenttrain specialists plan"
        )
    check_class_names(where, plan.class_names, store.manifest.class_names, f"store '{store.path}'")
    then, now = plan.store, store_identity(store)
    both = then.get("content_digest") is not None and now["content_digest"] is not None
    name = "content_digest" if both else "digest"
    if then.get(name) != now[name]:
        raise MismatchError(
            f"{where}: expected a plan of '{store.path}' ({name} {str(now[name])[:12]}), got one of another store "
            f"({str(then.get(name))[:12]}); give --targets that store, or make a plan from this one"
        )


def check_store(store: Store) -> None:
    """Refuse a store of sequences, and one that may still grow.

    Raises:
        StudentError: its rows have no class.
        NotSealedError: it is not finalized.
    """
    check_has_classes(store)
    if not store.finalized:
        raise NotSealedError(
            f"store '{store.path}': expected a finalized store, since a specialist's rows are counted, got one that "
            "may still grow; wait until its dump has ended, or finalize it at what is there: logitstore finalize"
        )


def _numbers(config: SpecialistsConfig, plan: SpecialistsPlan) -> tuple[int, ...]:
    count = len(plan.specialists)
    for number in config.specialists:
        if not 0 <= number < count:
            raise ValueError(f"specialist: expected 0 to {count - 1}, as in '{config.plan}', got {number}")
    return tuple(sorted(set(config.specialists))) or tuple(range(count))


def _check_folder(out: Path, plan: SpecialistsPlan) -> bool:
    """Whether the folder is of the same plan; where it is not, nothing is in it.

    Raises:
        PathError: it is of another plan, or of something else.
    """
    if (out / PLAN).is_file():
        if load_plan(out / PLAN) != plan:
            raise PathError(
                f"{out}: expected the folder of this plan, got one of another; give --out another folder, or the plan "
                f"that lies there: {out / PLAN}"
            )
        return True
    if out.exists() and not out.is_dir():
        raise PathError(f"{out}: expected a folder, or nothing, got a file; give --out another path")
    if out.is_dir() and (names := sorted(path.name for path in out.iterdir())):
        raise PathError(
            f"{out}: expected an empty folder or one of specialists, got '{names[0]}'; give --out another path"
        )
    return False


def _result(config: SpecialistsConfig, plan: SpecialistsPlan, number: int, owed: Sequence[int]) -> SpecialistResult:
    """What stands in the folder of a specialist that has ended."""
    found: list[tuple[Phase, FitResult]] = []
    for phase in config.phases:
        folder = phase_folder(Path(config.out), number, phase)
        result = ended_run(folder)
        if result is None:
            raise StudentError(
                f"specialist {number}: expected it to have ended in '{folder}', got no result there; give every worker "
                "the same place for --out"
            )
        found.append((phase, replace(result, already_ended=number not in owed)))
    specialist = load_card(folder / CARD).specialist
    assert specialist is not None
    named = name_classes(plan.specialists[number], plan.class_names)
    return SpecialistResult(number, named, counts_of(specialist["rows"]), tuple(found))


def _say(quiet: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    return say
