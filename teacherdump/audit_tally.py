"""What an audit has found so far, check by check.

Legend: N rows, R distributions of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from storage.arrays import STATUS_OK, Array
from storage.corpus import Corpus
from storage.encodings import Hidden
from storage.reader import Store
from studenttrain.heads import Head
from teacherdump.audit_result import AuditResult, Check, Failure, Truncation
from teacherdump.distortion import Lost, Truth, lost, read_back
from teacherdump.dump import ReadBatch
from teacherdump.faithful import Fresh, Held, faithfulness, id_overlap
from teacherdump.from_store import head_on


@dataclass
class Tally:
    """What an audit has found so far. Rows are those of the store, once for each distribution that was compared."""

    store: Store
    corpus: Corpus
    held: Held
    num_rows: int = 0
    num_scored: int = 0
    num_positions: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    failed: dict[str, set[int]] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    overlap: list[NDArray[np.float64]] = field(default_factory=list)
    lost: dict[float, list[Lost]] = field(default_factory=dict)
    head: Head | None = None

    def note(self, name: str, rows: NDArray[np.int64], ratios: NDArray[np.float64], say: str) -> None:
        """Take in a check of some rows: each one's difference over what is allowed."""
        if not len(ratios):
            return
        self.worst[name] = max(self.worst.get(name, 0.0), float(ratios.max()))
        failed = self.failed.setdefault(name, set())
        for place in np.flatnonzero(ratios > 1).tolist():
            row = int(rows[place])
            failed.add(row)
            if row not in self.failures:
                text = say.format(ratio=f"{ratios[place]:.3g}")
                self.failures[row] = Failure(row, self.corpus.key(row), f"{name}: {text}")

    def compare_samples(self, read: ReadBatch, stored: dict[str, Array]) -> None:
        """Digests, and what else comes from the corpus alone."""
        batch = read.batch
        self.num_rows += len(batch.rows_N)
        self.num_scored += int((stored["status"] == STATUS_OK).sum())
        differs_N = stored["sample_digest"] != batch.digests_N
        self.note("sample digest", batch.rows_N, _as_ratio(differs_N), "expected that of the sample, got another")
        fresh: dict[str, Array] = {}
        if "token_ids" in stored:
            fresh = {"token_ids": batch.inputs[:, 0], "position_ids": batch.inputs[:, 1]}
        elif "hard_target" in stored and read.hard_targets_R is not None:
            fresh = {"hard_target": read.hard_targets_R.numpy()}
        is_readable_N = ~np.isin(np.arange(len(batch.rows_N)), list(batch.errors))
        for name, values in fresh.items():
            differs_N = (stored[name] != values).reshape(len(values), -1).any(1) & is_readable_N
            self.note(name, batch.rows_N, _as_ratio(differs_N), "expected what the corpus has, got something else")

    def compare_refusals(
        self, rows_N: NDArray[np.int64], has_targets_N: NDArray[np.bool_], gives_targets_N: NDArray[np.bool_]
    ) -> None:
        """That just those rows have no targets of which the teacher gives none."""
        for is_wrong_N, say in (
            (has_targets_N & ~gives_targets_N, "expected targets as in the store, got none from the teacher"),
            (~has_targets_N & gives_targets_N, "expected no targets as in the store, got some from the teacher"),
        ):
            self.note("status", rows_N, _as_ratio(is_wrong_N), say)

    def compare_values(self, rows_R: NDArray[np.int64], fresh: Fresh, flat: dict[str, Array]) -> None:
        """The numbers that the store keeps, and what is lost in them."""
        manifest, encoding = self.held.manifest, self.held.manifest.encoding
        if self.head is None and isinstance(encoding, Hidden):
            stored = self.store.head()
            assert stored is not None
            self.head = head_on(stored, encoding, fresh.logits_RC.device)
        with torch.inference_mode():
            for name, ratio_R in faithfulness(self.held, flat, fresh).items():
                self.note(name, rows_R, ratio_R, "off by {ratio} times what is allowed")
            if encoding.name == "topk":
                self.overlap.append(id_overlap(flat, fresh.logits_RC))
            for temperature in manifest.temperatures:
                read = read_back(encoding, flat, temperature, manifest.temperatures, self.head, fresh.logits_RC)
                self.lost.setdefault(temperature, []).append(lost(Truth.of(fresh.logits_RC, temperature), read))
        self.num_positions += len(rows_R)

    def result(self, reasons: Iterator[str], notes: tuple[str, ...]) -> AuditResult:
        """What was found."""
        checks = {name: Check(worst, len(self.failed[name])) for name, worst in self.worst.items()}
        return AuditResult(
            path=self.store.path,
            encoding=self.held.manifest.encoding.to_json(),
            num_rows=self.num_rows,
            num_scored=self.num_scored,
            num_positions=self.num_positions,
            tolerance=self.held.tolerance,
            checks=checks,
            id_overlap=float(np.concatenate(self.overlap).mean()) if self.overlap else None,
            truncation=tuple(_truncation(temperature, parts) for temperature, parts in self.lost.items()),
            reasons=tuple(reasons),
            failures=tuple(self.failures[row] for row in sorted(self.failures)),
            notes=notes,
        )


def _as_ratio(is_wrong_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(is_wrong_N, np.inf, 0.0)


def _truncation(temperature: float, parts: list[Lost]) -> Truncation:
    kl_R, kept_R = (np.concatenate([getattr(part, name) for part in parts]) for name in ("kl_R", "kept_R"))
    error, gradient = (sum(float(getattr(part, name).sum()) for part in parts) for name in ("error_R", "gradient_R"))
    is_known = not np.isnan(kl_R).any()
    return Truncation(
        temperature,
        float(kl_R.mean()) if is_known else None,
        float(kl_R.max()) if is_known else None,
        float(kept_R.mean()) if is_known else None,
        float(kept_R.min()) if is_known else None,
        float(np.sqrt(error / max(gradient, 1e-30))),
    )
