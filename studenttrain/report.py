"""The report of a run: one HTML file that opens anywhere, without a network."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studenttrain.checkpoint import write_durably
from studenttrain.figures import EvalFigures
from studenttrain.inspection import SampleView

REPORT = "report.html"
NONE = "\N{EN DASH}"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Attributes:
        title: what was trained.
        summary: name and value of what a reader wants to know first.
        settings: name and value of every option of the run.
        store: name and value of what the store is.
        metrics: lines of `metrics.jsonl`.
        figures: of the student at the end, or None where nothing could be measured.
        measured_on: what the figures were measured on, for a person.
        teacher: figures of the stored targets on the same samples, or None.
        views: samples with what teacher and student say of them.
        views_of: where the samples come from, for a person.
        only_declared: whether the store is exact at its declared temperatures only.
    """

    title: str
    summary: Mapping[str, str]
    settings: Mapping[str, Any]
    store: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    figures: EvalFigures | None
    measured_on: str
    teacher: EvalFigures | None
    views: Sequence[SampleView]
    views_of: str
    only_declared: bool


def write_report(folder: Path, data: ReportData) -> Path:
    """Write `report.html` into a folder.

    Raises:
        ImportError: jinja2 or matplotlib is not installed: they are the extra `report`.
        OutOfSpaceError: the disk is full.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        data=data,
        curves=_curves(data),
        calibration=_calibration(data),
        rows=_figure_rows(data),
        views=[_drawn(view) for view in data.views],
    )
    path = folder / REPORT
    write_durably(path, lambda file: file.write(page.encode()))
    return path


def _curves(data: ReportData) -> list[tuple[str, str]]:
    """Caption and picture of each curve that there are points for."""
    from studenttrain import plots

    train = [line for line in data.metrics if line["kind"] == "train"]
    validations = [line for line in data.metrics if line["kind"] == "validation"]
    found = []
    if train:
        found.append(("Training loss", _svg(plots.loss_curve(train))))
        found.append(("Learning rate", _svg(plots.rate_curve(train))))
    if any(line.get("top1") is not None for line in validations):
        teacher = data.teacher.top1 if data.teacher else None
        picture = plots.validation_curve(validations, "top1", "validation errors, %", teacher)
        found.append(("Validation errors", _svg(picture)))
    if any(line.get("agreement") is not None for line in validations):
        picture = plots.validation_curve(validations, "agreement", "disagreement, %", None)
        found.append(("Validation samples on which the student's top-1 is not the teacher's", _svg(picture)))
    return found


def _calibration(data: ReportData) -> str | None:
    from studenttrain import plots

    if data.figures is None or not data.figures.bins:
        return None
    return _svg(plots.reliability(data.figures.bins, data.teacher.bins if data.teacher else None))


def _figure_rows(data: ReportData) -> list[tuple[str, str, str]]:
    """Name, student's figure and teacher's figure of everything that was measured."""
    forms = {
        "top1": ("accuracy (top-1)", ".2%"),
        "num_errors": ("errors", "d"),
        "agreement": ("agreement with the teacher", ".2%"),
        "nll": ("NLL of the hard target, nats", ".4f"),
        "ece": ("calibration error (ECE, 15 bins)", ".4f"),
        "num_samples": ("samples", ",d"),
    }
    rows = [
        (label, _number(getattr(data.figures, name, None), form), _number(getattr(data.teacher, name, None), form))
        for name, (label, form) in forms.items()
    ]
    return [row for row in rows if row[1] != NONE or row[2] != NONE]


def _drawn(view: SampleView) -> dict[str, Any]:
    from studenttrain import plots

    picture = None if view.picture is None else f"data:image/png;base64,{base64.b64encode(view.picture).decode()}"
    drawing = _svg(plots.distributions(view.temperatures, view.labels, view.teacher_TB, view.student_TB))
    return {"view": view, "picture": picture, "drawing": drawing}


def _svg(data: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"
