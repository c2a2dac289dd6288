"""What a run leaves behind when it has ended: exports, report, and what came of it."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from storage.console import format_count
from studenttrain.checkpoint import write_durably
from studenttrain.config import FitConfig
from studenttrain.distributed import World
from studenttrain.evaluate import evaluate_teacher
from studenttrain.export import CARD, PROGRAM, WEIGHTS, export_student
from studenttrain.figures import CalibrationBin, EvalFigures
from studenttrain.inspection import inspect
from studenttrain.learner import Learner
from studenttrain.metrics import METRICS, read_metrics
from studenttrain.preparation import Prepared
from studenttrain.report import REPORT, ReportData, write_report

RESULT = "result.json"


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        out: its folder.
        steps: optimizer steps done.
        num_rows_seen: rows learned from, a row counted as often as it came.
        figures: of the last validation, or None.
        files: names of what was written in the folder: exports and report.
        notes: what could not be written, and why.
        already_ended: whether the run had ended before it was called.
    """

    out: str
    steps: int
    num_rows_seen: int
    figures: EvalFigures | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    already_ended: bool = False

    @property
    def report(self) -> Path | None:
        """The report, or None where it was skipped."""
        return Path(self.out) / REPORT if REPORT in self.files else None

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object, without its folder."""
        value = dataclasses.asdict(self)
        return {name: value[name] for name in ("steps", "num_rows_seen", "figures", "files", "notes")}

    @classmethod
    def from_json(cls, out: str, value: Mapping[str, Any], already_ended: bool) -> Self:
        """The result of a JSON object."""
        figures = value["figures"]
        if figures is not None:
            figures = EvalFigures(**figures | {"bins": tuple(CalibrationBin(**entry) for entry in figures["bins"])})
        return cls(
            out,
            value["steps"],
            value["num_rows_seen"],
            figures,
            tuple(value["files"]),
            tuple(value["notes"]),
            already_ended,
        )

    def __str__(self) -> str:
        done = "had ended already: " if self.already_ended else ""
        lines = [f"{done}{format_count(self.steps)} steps, {format_count(self.num_rows_seen)} rows seen"]
        lines += [f"validation: {self.figures}"] if self.figures is not None else []
        lines += [f"{'report' if name == REPORT else 'export'}: {Path(self.out) / name}" for name in self.files]
        return "\n".join([*lines, *self.notes])


def ended_run(folder: Path, step: int | None = None) -> FitResult | None:
    """What came of a run, if it ended at the step of its checkpoint; None where something is still to be done.

    Args:
        folder: of the run.
        step: of its checkpoint; None takes a result for what it says.
    """
    try:
        value = json.loads((folder / RESULT).read_bytes())
        result = FitResult.from_json(str(folder), value, already_ended=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if step in (None, result.steps) else None


def end_run(
    config: FitConfig,
    prepared: Prepared,
    world: World,
    folder: Path,
    learner: Learner,
    figures: EvalFigures | None,
) -> FitResult:
    """Write exports, report and result; ranks other than the main one have nothing more to do.

    Args:
        config: the options of the run.
        prepared: what it read.
        world: this rank of how many.
        folder: where the run writes.
        learner: at its last step.
        figures: of the last validation, or None.
    """
    result = FitResult(str(folder), learner.step, learner.num_rows_seen, figures, (), ())
    if not world.is_main:
        return result
    student = copy.deepcopy(learner.result).cpu()
    reason = export_student(folder, student, prepared.card)
    files, notes = [WEIGHTS, CARD], []
    if reason is None:
        files.append(PROGRAM)
    else:
        notes.append(f"no {PROGRAM}: torch.export can't trace this student ({reason})")
    if prepared.own is not None:  # what a report shows is of all classes
        return _written(folder, dataclasses.replace(result, files=tuple(files), notes=tuple(notes)))
    try:
        data = _report_data(config, prepared, world, folder, learner, figures)
        files.append(write_report(folder, data).name)
    except ImportError as error:
        notes.append(
            f"no report: it needs {error.name}; pip install 'logitstore[report]', and remove {folder / RESULT} "
            "and run the same command again to have it"
        )
    return _written(folder, dataclasses.replace(result, files=tuple(files), notes=tuple(notes)))


def _written(folder: Path, result: FitResult) -> FitResult:
    """The result, once it stands in the folder: the run has ended."""
    write_durably(folder / RESULT, lambda file: file.write((json.dumps(result.to_json(), indent=2) + "\n").encode()))
    return result


def _report_data(
    config: FitConfig,
    prepared: Prepared,
    world: World,
    folder: Path,
    learner: Learner,
    figures: EvalFigures | None,
) -> ReportData:
    validation, store = prepared.validation, prepared.store
    shown, corpus, hard_targets = store, prepared.corpus, prepared.hard_targets
    if validation is not None and validation.store is not None:
        shown, corpus, hard_targets = validation.store, validation.corpus, validation.corpus.hard_targets
    inspection = inspect(
        learner.result, shown, corpus, prepared.preprocess, hard_targets, world.device, prepared.readers
    )
    teacher = None
    if validation is not None and validation.store is not None and hard_targets is not None:  # not of sequences
        teacher = evaluate_teacher(validation.store, hard_targets)
    looked_at = f"{format_count(inspection.figures.num_samples)} rows of the training corpus, spread over all"
    of_training = validation is None or validation.store is None
    if figures is not None and validation is not None:
        measured_on = f"the {format_count(figures.num_samples)} samples of the validation corpus '{config.val_data}'"
    else:
        figures, measured_on = inspection.figures, f"{looked_at}, which the student has learned from"
    if figures.agreement is None and inspection.figures.agreement is not None:
        figures = dataclasses.replace(figures, agreement=inspection.figures.agreement)
        measured_on += f"; the agreement on {looked_at}"
    exact = store.manifest.encoding.exact_temperatures(store.manifest.temperatures)
    return ReportData(
        title=f"{config.student} from {Path(config.targets).name}",
        summary=_summary(prepared, learner),
        settings={name: value for name, value in config.to_json().items() if value is not None},
        store=_store_rows(prepared),
        metrics=list(read_metrics(folder / METRICS)),
        figures=figures,
        measured_on=measured_on,
        teacher=teacher,
        views=inspection.views,
        views_of="Samples of the training corpus." if of_training else "Samples of the validation corpus.",
        only_declared=exact is not None,
    )


def _summary(prepared: Prepared, learner: Learner) -> dict[str, str]:
    objective = prepared.objective
    parts = []
    if objective.is_soft:
        parts.append(f"{objective.alpha:g} x {objective.loss} at T = {objective.temperature:g}")
    if objective.is_hard:
        parts.append(f"{1 - objective.alpha:g} x hard targets")
    num_weights = sum(parameter.numel() for parameter in learner.student.parameters())
    return {
        "objective": " + ".join(parts),
        "optimizer steps": format_count(learner.step),
        "rows seen": format_count(learner.num_rows_seen),
        "weights of the student": format_count(num_weights),
        "trained on": f"{learner.device}, torch {torch.__version__}",
    }


def _store_rows(prepared: Prepared) -> dict[str, Any]:
    store, manifest = prepared.store, prepared.store.manifest
    encoding = ", ".join(f"{name} {value}" for name, value in manifest.encoding.to_json().items() if name != "name")
    names = manifest.class_names
    return {
        "path": store.path,
        "content digest": store.content_digest or "not finalized yet",
        "manifest digest": prepared.card.store["digest"],
        "rows": f"{format_count(store.num_sealed_rows)} sealed of {format_count(manifest.num_rows)}",
        "classes": f"{manifest.num_classes}"
        + (f": {', '.join(names[:20])}{', …' * (len(names) > 20)}" if names else ""),
        "encoding": f"{manifest.encoding.name} ({encoding})",
        "declared temperatures": ", ".join(f"{value:g}" for value in manifest.temperatures),
        "teacher": ", ".join(f"{name} {value}" for name, value in manifest.teacher.items() if value is not None),
        "corpus": f"{manifest.corpus.get('kind')}, fingerprint {manifest.corpus.get('fingerprint')}",
        "preprocessing": json.dumps(dict(manifest.preprocess)),
        **({} if manifest.sequences is None else {"sequences": json.dumps(manifest.sequences.to_json())}),
    }
