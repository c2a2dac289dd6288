"""The pilot of the alarms: rows from all over the corpus through the teacher, before anything is written.

Rows that lie far apart tell what a shard can't: of a corpus that is sorted by class, a shard may well be of one class.

Legend: N rows, P positions (1 where a row is one distribution), R flat rows, C classes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array
from storage.console import format_count
from storage.corpus.protocol import spread_rows
from storage.encodings import Dense
from storage.errors import CorpusError, TeacherError
from storage.manifest import Manifest
from storage.records import QuarantineEntry
from teacherdump.alarms import (
    LEAST_ROWS,
    LEAST_SEQUENCES,
    Look,
    are_probabilities,
    count_at_end,
    distinct_rows,
    findings,
    raise_alarms,
    signature_of,
    status_findings,
)
from teacherdump.dump import Job, ReadBatch, read_rows
from teacherdump.pilot import pilot_rows
from teacherdump.shard import what_is_wrong
from teacherdump.sparsify import REFUSAL, Sparsify, TeacherRows, build_sparsify

SHARE_OF_CORPUS = 16  # of a small corpus the pilot takes one row in so many, but no fewer than tell something


def pilot_alarm(job: Job, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Score some rows from all over the corpus, and stop a run that would go wrong. Nothing of it is written.

    Args:
        job: what is to be dumped, with the alarms that are on; with none, nothing is scored.
        is_stopped: asked between batches; once it says so, nothing more is looked at.

    Raises:
        AlarmError: something is wrong.
        CorpusError: no sample can be decoded.
        TeacherError: no sample is given finite logits.
    """
    if not job.alarms:
        return
    rows_N = choose_rows(job.manifest, job.batch_size)
    sparsify = build_sparsify(Dense("float32"), job.manifest.temperatures)
    parts: list[_Seen] = []
    with ThreadPoolExecutor(job.num_readers, "pilot") as pool:
        for start in range(0, len(rows_N), job.batch_size):
            if is_stopped():
                return
            read = read_rows(job, 0, rows_N[start : start + job.batch_size], pool)
            parts.append(_seen(job, read, sparsify))
    status_N = np.concatenate([part.status_N for part in parts])
    where = f"pilot of {format_count(len(rows_N))} rows"
    found = list(status_findings(status_N, is_spread=True))
    name = "undecodable" if status_N[0] == STATUS_UNDECODABLE else "not-finite"
    if not (status_N == STATUS_OK).any() and len(rows_N) >= _least(job.manifest) and name in job.alarms:
        _refuse(next(part.first_refused for part in parts if part.first_refused is not None), len(rows_N), status_N[0])
    look = _look(parts)
    found += findings(look, job.manifest, is_spread=True)
    raise_alarms(found, job.alarms, where)


def choose_rows(manifest: Manifest, batch_size: int) -> NDArray[np.int64]:
    """The rows of a pilot, in order: at most 256, and of a small corpus a share.

    A teacher that was compiled is given whole batches, as in the dump: what it is compiled for depends on the first
    shapes that it sees, and so may the last bits of what it says.
    """
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    most = pilot_rows(num_positions, manifest.num_classes)
    num_rows = max(_least(manifest), min(most, manifest.num_rows // SHARE_OF_CORPUS))
    if manifest.provenance.get("compile"):
        num_rows = -(-num_rows // batch_size) * batch_size
    kind = str(manifest.corpus.get("kind"))
    return np.array(spread_rows(manifest.num_rows, min(num_rows, manifest.num_rows), kind), np.int64)


def _least(manifest: Manifest) -> int:
    """Rows that tell something."""
    return LEAST_ROWS if manifest.sequences is None else LEAST_SEQUENCES


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the alarms need of a batch: of its flat rows some figures each, never all of their logits at once."""

    status_N: Array  # noqa: N815
    digests_N: Array  # noqa: N815
    hard_target_N: Array | None  # noqa: N815
    figures: dict[str, Array]
    counts: Array
    first_refused: QuarantineEntry | None


def _seen(job: Job, read: ReadBatch, sparsify: Sparsify) -> _Seen:
    parts: list[dict[str, Array]] = []
    counts = np.zeros(3, np.int64)
    for said in job.speak(read):
        with torch.inference_mode():
            kept = {name: values.cpu().numpy() for name, values in sparsify(TeacherRows(said.logits_RC)).items()}
        values_RC = kept.pop("values")
        is_ok_R = kept[REFUSAL] == 0
        if getattr(job.manifest.encoding, "values", None) == "float16" and job.manifest.encoding.name != "hidden":
            counts += count_at_end(values_RC[is_ok_R])
        kept |= {"top": values_RC.argmax(1), "signature": signature_of(values_RC[:, None])[:, 0]}
        kept["is_probability"] = are_probabilities(said.logits_RC.float().cpu().numpy())
        parts.append(kept)
    batch, num_rows = read.batch, len(read.batch.rows_N)
    figures = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    figures = {name: values.reshape(num_rows, -1, *values.shape[1:]) for name, values in figures.items()}
    refusal_N = np.bitwise_or.reduce(figures.pop(REFUSAL), axis=1)
    status_N = np.where(refusal_N != 0, STATUS_NOT_FINITE, STATUS_OK).astype(np.uint8)
    status_N[list(batch.errors)] = STATUS_UNDECODABLE
    first = None
    if (status_N != STATUS_OK).any():
        at = int((status_N != STATUS_OK).argmax())
        reason = batch.errors.get(at) or what_is_wrong(int(refusal_N[at]))
        first = QuarantineEntry(int(batch.rows_N[at]), job.corpus.key(int(batch.rows_N[at])), reason)
    hard_N = None
    if job.manifest.sequences is None and read.hard_targets_R is not None:
        hard_N = read.hard_targets_R.numpy()
    return _Seen(status_N, batch.digests_N, hard_N, figures, counts, first)


def _look(parts: list[_Seen]) -> Look:
    status_N = np.concatenate([part.status_N for part in parts])
    kept = distinct_rows(np.flatnonzero(status_N == STATUS_OK), np.concatenate([part.digests_N for part in parts]))
    figures: dict[str, Any] = {
        name: np.concatenate([part.figures[name] for part in parts])[kept] for name in parts[0].figures
    }
    hard = [part.hard_target_N for part in parts if part.hard_target_N is not None]
    counts = np.sum([part.counts for part in parts], axis=0)
    return Look(
        max_logit_NP=figures["max_logit"].astype(np.float64),
        lse_NPT=figures["lse"].astype(np.float64),
        entropy_NP=figures["entropy"].astype(np.float64),
        top_NP=figures["top"],
        signature_NPS=figures["signature"],
        hard_target_N=None if not hard else np.concatenate(hard)[kept],
        num_values=int(counts[0]),
        num_at_end=int(counts[1]),
        num_near_end=int(counts[2]),
        is_probability_NP=figures["is_probability"],
    )


def _refuse(first: QuarantineEntry, num_rows: int, status: int) -> None:
    """Nothing at all can be kept: say what is wrong with the first of them."""
    where = f"row {first.row} ({first.key!r})"
    if status == STATUS_UNDECODABLE:
        raise CorpusError(
            f"{where}: expected some of {num_rows} samples from all over the corpus to be usable, got none: "
            f"{first.reason}; check the corpus and its preprocessing; nothing was written"
        )
    raise TeacherError(
        f"{where}: expected finite logits for some of {num_rows} samples from all over the corpus, got none: "
        f"{first.reason}; check the teacher, its --precision and the preprocessing; nothing was written"
    )
