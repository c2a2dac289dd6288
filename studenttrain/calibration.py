"""A student calibrated without labels: biases that give each class its share, and a temperature.

Legend: N batch, R distributions, C classes.

A student learns the prior of its transfer set. Where that lacks classes, their logits are too low for what the student
will meet, though it knows them from soft targets (Hinton, Vinyals and Dean 2015, section 3). Biases raise them again.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.backends.files import clear_os_errors
from storage.console import progress
from storage.corpus import Corpus, Preprocess
from storage.errors import PathError, StudentError
from storage.reader import Store, open_store
from studenttrain.answers import answers
from studenttrain.calibration_config import CalibrationConfig
from studenttrain.calibration_data import open_calibration_data, open_made_from, selected_rows
from studenttrain.calibration_fit import fit_temperature, match_biases, mean_mass, sampling_slack, shift_biases
from studenttrain.calibration_fold import check_folded, check_not_tied, fold, last_layer
from studenttrain.calibration_logits import Gathered, Spool, Targets, digest_of, gather
from studenttrain.calibration_prior import UNIFORM, Prior, read_prior
from studenttrain.calibration_result import CalibrationResult
from studenttrain.checks import store_identity, weights_digest
from studenttrain.distributed import choose_device
from studenttrain.evaluate import BATCH_POSITIONS
from studenttrain.export import CARD, PROGRAM, WEIGHTS, StudentCard, export_student, load_card, load_student
from studenttrain.heads import Head
from studenttrain.preparation import default_readers

# What says that a calibration is the same: the rest is worked out from it.
ASKED = ("method", "slack_asked", "temperature_from", "student", "data", "prior", "targets")
LOSSES = {"labels": "NLL of the hard targets", "targets": "cross entropy to the stored targets"}
FILES = frozenset({WEIGHTS, CARD, PROGRAM})


def calibrate(config: CalibrationConfig, *, quiet: bool = False) -> CalibrationResult:
    """Calibrate a student, and write it as one that is used like any other.

    The temperature comes first, then the biases of what it gives. Logits of the corpus are computed once, and kept in
    memory, or beyond 256 MiB in a file in `out` that has no name.

    Args:
        config: the options.
        quiet: show no progress.

    Raises:
        StoreError: the student, the corpus, the prior or the store can't be used, or they don't fit each other.
        ValueError: an option that the corpus has no use for, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("calibrate: expected one process, got several of torchrun's; run it without torchrun")
    device, where = choose_device(config.device), f"student '{config.checkpoint}'"
    model, card = load_student(Path(config.checkpoint))
    head = _layer_to_fold_into(model, card, config, where)
    with contextlib.ExitStack() as stack:
        store = None
        if config.targets is not None:
            is_read = config.temperature == "targets"
            store = stack.enter_context(open_made_from(config.targets, card, where, is_read=is_read))
        selected = selected_rows(config, card, store, where)
        needs_labels = selected is not None and selected.needs_labels
        corpus = open_calibration_data(config, card, store, where, needs_labels=needs_labels)
        folder = _checked_folder(config)
        prior = None if config.prior is None else _read_prior(config.prior, card, where, quiet)
        data = {"kind": corpus.kind, "fingerprint": corpus.fingerprint, "rows": card.rows if selected else None}
        asked: dict[str, Any] = {
            "method": None if prior is None else config.method or "match",
            "slack_asked": config.slack,
            "temperature_from": config.temperature,
            "student": weights_digest(model.state_dict()),
            "data": data,
            "prior": None if prior is None else dict(prior.source),
            "targets": None if store is None else store_identity(store),
        }
        _check_same(folder, asked)
        rows_N = np.arange(corpus.num_samples) if selected is None else selected.rows(corpus)
        with clear_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        spool = stack.enter_context(Spool(folder))
        gathered = _gather(model.to(device), card, corpus, rows_N, store, spool, config, device, quiet)
        data |= _data_of(gathered, corpus, config)
        was_there = _check_same(folder, asked)
        record: Mapping[str, Any] = {**asked, "earlier": card.calibration}
        record = _held(folder) if was_there else {**record, **_fitted(spool, prior, asked, gathered)}
    before_NC = _logits(model.cpu(), gathered.inputs, card)
    bias_C = None if record["bias"] is None else np.array(record["bias"])
    fold(head, record["temperature"], bias_C)
    check_folded(before_NC, _logits(model, gathered.inputs, card), record["temperature"], bias_C, where)
    card = replace(card, calibration=record)
    reason = export_student(folder, model, card)
    files = (WEIGHTS, CARD) if reason is not None else (WEIGHTS, CARD, PROGRAM)
    return CalibrationResult(config.out, card, None if prior is None else prior.note, files, reason, was_there)


def _layer_to_fold_into(model: nn.Module, card: StudentCard, config: CalibrationConfig, where: str) -> Head:
    """The last layer of a student that can be calibrated as it is asked for."""
    if card.specialist is not None:
        raise StudentError(
            f"{where}: expected a student of all classes, got a specialist, whose dustbin has no share of its own; "
            "calibrate the generalist, or the student that the whole is distilled into"
        )
    head = last_layer(model, card.num_classes, where, needs_bias=config.prior is not None)
    if config.temperature != "none":
        check_not_tied(model, head, where)
    return head


def _gather(
    model: nn.Module,
    card: StudentCard,
    corpus: Corpus,
    rows_N: NDArray[np.int64],
    store: Store | None,
    spool: Spool,
    config: CalibrationConfig,
    device: torch.device,
    quiet: bool,
) -> Gathered:
    """One pass over the samples: their logits, and the targets that a temperature is fitted to."""
    targets = None
    if config.temperature != "none":
        targets = Targets(corpus, store if config.temperature == "targets" else None)
    with progress(len(rows_N), "samples", "calibrating", quiet=quiet) as bar:
        return gather(
            model,
            corpus,
            Preprocess.from_json(card.preprocess),
            spool,
            rows_N=rows_N,
            num_classes=card.num_classes,
            store=store,
            targets=targets,
            device=device,
            batch_size=_batch_size(config, card),
            readers=config.readers or default_readers(),
            advance=bar.advance,
        )


def _fitted(spool: Spool, prior: Prior | None, asked: Mapping[str, Any], gathered: Gathered) -> dict[str, Any]:
    """Temperature, then biases, and the figures before and after."""
    found: dict[str, Any] = {"temperature": 1.0, "loss": None, "bias": None, "mass": None, "fit": None}
    if asked["temperature_from"] != "none":
        temperature = fit_temperature(spool.blocks)
        of = LOSSES[asked["temperature_from"]]
        found |= {
            "temperature": temperature.temperature,
            "loss": {"of": of, "before": temperature.before, "after": temperature.after},
        }
    if prior is None:
        return found
    temperature = found["temperature"]
    prior_C = prior.probs_C
    before_C = mean_mass(spool.blocks, np.zeros(len(prior_C)), temperature)
    num_passes: int | None = None
    slack: float | None = None
    if asked["method"] == "shift":
        _check_mass(before_C)
        bias_C = shift_biases(before_C, prior_C)
    else:
        slack = asked["slack_asked"]
        if slack is None:
            slack = 0.0 if prior.samples == gathered.digest else 1.0
        counts = [count for count in (gathered.num_distributions, prior.num_counted) if count is not None]
        fit = match_biases(spool.blocks, prior_C, temperature, sampling_slack(prior_C, slack, *counts))
        bias_C, num_passes = fit.bias_C, fit.num_passes
    after_C = mean_mass(spool.blocks, bias_C, temperature)
    mass = {"before": before_C.tolist(), "after": after_C.tolist(), "prior": prior_C.tolist()}
    error = float(abs(after_C / prior_C - 1).max())
    return found | {
        "bias": bias_C.tolist(),
        "mass": mass,
        "fit": {"num_passes": num_passes, "slack": slack, "error": error},
    }


def _check_mass(mass_C: NDArray[np.float64]) -> None:
    if not (mass_C > 0).all():
        raise StudentError(
            f"student: expected some mass for each class over --data, got none for class {int(np.argmin(mass_C))}, "
            "from which no bias can be told; use --method match, on data in which the class occurs"
        )


def _read_prior(text: str, card: StudentCard, where: str, quiet: bool) -> Prior:
    num_rows = None
    if text != UNIFORM and not text.endswith(".json"):
        with open_store(text) as store:
            num_rows = store.num_sealed_rows
    with progress(num_rows, "rows", "counting the prior", quiet=quiet) as bar:
        return read_prior(text, card, where, bar.advance)


def _checked_folder(config: CalibrationConfig) -> Path:
    """The folder of the result, which need not be there yet.

    Raises:
        PathError: it is no folder, or holds something else than a calibrated student.
    """
    folder, advice = Path(config.out), "give --out a new folder"
    with clear_os_errors(folder):
        try:
            names = {path.name for path in folder.iterdir()}
        except FileNotFoundError:
            return folder
        except NotADirectoryError as error:
            raise PathError(f"{config.out}: expected a folder, or nothing, got a file; {advice}") from error
    foreign = sorted(names - FILES - {f".{name}.partial" for name in FILES})
    if foreign:
        others = " and others" if len(foreign) > 1 else ""
        raise PathError(
            f"{config.out}: expected an empty folder, or that of a calibrated student, got '{foreign[0]}'{others}; "
            f"{advice}"
        )
    return folder


def _check_same(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the folder holds the calibration that is asked for, as far as that is known yet.

    Raises:
        StudentError: it holds another student.
    """
    if not (folder / CARD).is_file():
        return False
    advice = "give --out another folder"
    then = load_card(folder / CARD).calibration
    if then is None:
        raise StudentError(f"{folder}: expected a calibrated student, or nothing, got another student; {advice}")
    for name in ASKED:
        mine, theirs = asked[name], then[name]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            theirs = {key: theirs.get(key) for key in mine}
        if mine != theirs:
            raise StudentError(
                f"{folder}: expected the calibration that it holds, got another ({name} differs); {advice}"
            )
    return True


def _held(folder: Path) -> Mapping[str, Any]:
    """The calibration that a folder holds, of another batch size by some last bits."""
    record = load_card(folder / CARD).calibration
    assert record is not None
    return record


def _data_of(gathered: Gathered, corpus: Corpus, config: CalibrationConfig) -> dict[str, Any]:
    """What is known of the corpus once it was read."""
    labels = corpus.hard_targets if config.temperature == "labels" else None
    return {
        "digest": gathered.digest,
        "num_samples": gathered.num_samples,
        "num_refused": gathered.num_refused,
        "num_distributions": gathered.num_distributions,
        "labels": digest_of(labels),
    }


def _batch_size(config: CalibrationConfig, card: StudentCard) -> int:
    if card.sequences is None:
        return config.batch_size
    return max(1, min(config.batch_size, BATCH_POSITIONS // int(card.sequences["num_positions"])))


def _logits(model: nn.Module, inputs: Tensor, card: StudentCard) -> Tensor:
    """Logits (R, C) of a few inputs, on the CPU."""
    with torch.no_grad():
        return torch.cat([logits.float()[:, : card.num_classes] for logits in answers(model, inputs, card.num_classes)])
