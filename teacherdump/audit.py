"""Score random rows of a store again, and say apart whether it is faithful, and what its encoding gave up.

Legend: N rows, P positions, R flat rows (N, or N P), C classes.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_OK, Array
from storage.console import Pass
from storage.corpus import Corpus, Preprocess, rows_of_store
from storage.corpus.defaults import check_preprocess
from storage.encodings import Hidden, encoding_from_json
from storage.errors import CorpusMismatchError, MismatchError, NotSealedError
from storage.head import head_digest
from storage.manifest import FUSED, Manifest
from storage.reader import Store, open_one_store
from storage.scan.members import bounds_of
from storage.sequences import flatten_positions
from teacherdump.audit_result import AuditResult
from teacherdump.audit_tally import Tally
from teacherdump.config import DumpConfig, Precision
from teacherdump.dump import Job, ReadBatch, read_rows
from teacherdump.faithful import Fresh, Held
from teacherdump.model_file import teacher_identity
from teacherdump.plan import cpu_batch_sequences, cpu_batch_size
from teacherdump.rescoring import is_given, parts_of, speak
from teacherdump.source import MOST_READERS, kept_head, open_data
from teacherdump.teacher import Said, Teacher, load_teacher

# How far a logit may move between two runs of one teacher, as a share of the largest of its row.
TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class AuditOptions:
    """What an audit looks at beside the store.

    Attributes:
        rows: how many, at least 1; all where the store has fewer.
        seed: of their choice.
        tolerance: how far a logit may move between two runs of the teacher, a share of the largest of its row, at
            least 0; None is 1e-4 for fp32, 1e-2 for fp16 and 5e-2 for bf16.

    Raises:
        ValueError: an option is out of range.
    """

    rows: int = 64
    seed: int = 0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows: expected at least 1, got {self.rows}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number from 0 to below 1, got {self.tolerance}")


def config_for(manifest: Manifest, **options: Any) -> DumpConfig:
    """The options of a dump that an audit needs; what the store says is taken from it.

    Args:
        manifest: of the store.
        options: of `DumpConfig`; `precision` None is the store's.
    """
    precision: Precision = options.pop("precision", None) or manifest.teacher.get("precision") or "fp32"
    combine = options.pop("combine", None)
    if combine is None and len(options["models"]) > 1:
        combine = manifest.teacher.get("combine")
    length = None if manifest.sequences is None else manifest.sequences.num_positions
    return DumpConfig(**options, precision=precision, combine=combine, sequence_length=length)


def audit(path: str | Path, config: DumpConfig, options: AuditOptions, bar: Pass | None = None) -> AuditResult:
    """Read random sealed rows, score their samples again as a dump does, and compare.

    Args:
        path: of the store; need not be finalized.
        config: teacher and corpus, from `config_for`.
        options: which rows, and how strictly.
        bar: told of the rows as they are done.

    Raises:
        StoreError: the store, the corpus or the teacher can't be used, or they have nothing to do with each other.
        ValueError: an option is out of range, or would be ignored.
    """
    with open_one_store(path) as store:
        _refuse_fused(store)
        _refuse_bounds(store)
        rows_N = choose_rows(store, options)
        corpus, preprocess = _open_corpus(store, config, rows_N)
        identity = teacher_identity(config.models, config.arch, config.combine, config.precision)
        teacher = load_teacher(
            config.models,
            config.arch,
            config.combine,
            config.device,
            config.precision,
            config.compile,
            config.trust_pickle,
        )
        tolerance = options.tolerance
        if tolerance is None:
            precisions = (config.precision, str(store.manifest.teacher.get("precision")))
            tolerance = max(TOLERANCES.get(precision, TOLERANCES["bf16"]) for precision in precisions)
        readers = config.readers or min(MOST_READERS, os.cpu_count() or 1)
        job = Job(corpus, preprocess, teacher, store.manifest, _batch_size(config, teacher, preprocess), readers)
        tally = Tally(store, corpus, _held(job, tolerance))
        with ThreadPoolExecutor(readers) as pool:
            for start in range(0, len(rows_N), job.batch_size):
                part_N = rows_N[start : start + job.batch_size]
                _audit_batch(job, store, read_rows(job, store.layout.shard_of(int(part_N[0])), part_N, pool), tally)
                if bar is not None:
                    bar.advance(len(part_N))
        return tally.result(_reasons(store, identity, tally.held), tuple(_notes(store, corpus, config.precision)))


def _refuse_fused(store: Store) -> None:
    """Refuse a store of a generalist with its specialists, or combined with one: no teacher says its numbers."""
    teacher = store.manifest.teacher
    members = teacher.get("members")
    parts = members if isinstance(members, list | tuple) else []
    if FUSED in [teacher.get("kind"), *(part.get("kind") for part in parts if isinstance(part, Mapping))]:
        raise MismatchError(
            f"{store.path}: expected a store of what its teachers said, got one whose teacher is a fused one, a "
            "generalist with its specialists; audit the generalist's store, which its lineage names, with the "
            "generalist"
        )


def _refuse_bounds(store: Store) -> None:
    """Refuse a store that was combined from others and is known within bounds: no teacher says its numbers."""
    if any(bounds_of(store.manifest).values()):
        raise MismatchError(
            f"{store.path}: expected a store of what its teachers said, got one that was combined from "
            f"{store.manifest.encoding.name} stores and is within bounds of it; audit each of these with its teacher"
        )


def choose_rows(store: Store, options: AuditOptions) -> NDArray[np.int64]:
    """Sealed rows, ascending, each with the same chance.

    Raises:
        NotSealedError: there are none yet.
    """
    shards = store.sealed_shards()
    if not shards:
        raise NotSealedError(
            f"{store.path}: expected at least one sealed shard, got none; wait until teacherdump run has sealed one"
        )
    bounds = [store.layout.shard_bounds(shard) for shard in shards]
    ends = np.cumsum([stop - start for start, stop in bounds])
    chosen = np.random.default_rng(options.seed).choice(int(ends[-1]), min(options.rows, int(ends[-1])), replace=False)
    chosen.sort()
    shard_N = np.searchsorted(ends, chosen, side="right")
    first_N = np.array([start for start, _ in bounds])[shard_N]
    before_N = np.concatenate([[0], ends])[shard_N]
    rows_N: NDArray[np.int64] = first_N + chosen - before_N
    return rows_N


def _open_corpus(store: Store, config: DumpConfig, rows_N: NDArray[np.int64]) -> tuple[Corpus, Preprocess]:
    """The corpus, read as the store says that it was."""
    manifest = store.manifest
    corpus = open_data(config)
    preprocess = Preprocess.from_json(manifest.preprocess)
    check_preprocess(preprocess, corpus)
    tokenizer = getattr(corpus, "tokenizer", None)
    if tokenizer is not None and manifest.sequences is not None and manifest.sequences.tokenizer is not None:
        there, here = manifest.sequences.tokenizer, tokenizer.fingerprint
        if here != there:
            raise MismatchError(
                f"{store.path}: expected the tokenizer that it was made with ({there[:12]}), got another "
                f"({here[:12]}); give --tokenizer that one"
            )
    corpus = rows_of_store(store, corpus)
    if rows_N[-1] >= corpus.num_samples:
        raise CorpusMismatchError(
            f"{store.path}: expected {manifest.num_rows} samples, got {corpus.num_samples} in the corpus "
            f"'{corpus.path}'; give the corpus that the store was made from"
        )
    return corpus, preprocess


def _batch_size(config: DumpConfig, teacher: Teacher, preprocess: Preprocess) -> int:
    if config.batch_size is not None:
        return config.batch_size
    if preprocess.kind == "tokens":
        size = cpu_batch_sequences(preprocess.shape[1] - 1)
    else:
        size = cpu_batch_size(4 * int(np.prod(preprocess.shape)))
    return min(size, teacher.max_batch or size)


def _held(job: Job, tolerance: float) -> Held:
    """The store and the teacher's head, where hidden states have to do with the store."""
    manifest, head = job.manifest, None
    if _hidden_encodings(manifest):
        head = kept_head(job.teacher.head(), manifest.num_classes)
    return Held(manifest, tolerance, head)


def _hidden_encodings(manifest: Manifest) -> list[Hidden]:
    """The store's encoding, and those that its rows went through, where they are hidden states."""
    before = [encoding_from_json(origin["encoding"]) for origin in manifest.lineage or ()]
    return [encoding for encoding in (manifest.encoding, *before) if isinstance(encoding, Hidden)]


def _reasons(store: Store, identity: dict[str, Any], held: Held) -> Iterator[str]:
    there, here = str(store.manifest.teacher.get("digest")), str(identity["digest"])
    if there != here:
        yield (
            f"teacher: expected the one that made the store (digest {there[:12]}), got another (digest {here[:12]}); "
            "where every number below its limit is, it says the same from another file"
        )
    for encoding in _hidden_encodings(store.manifest):
        if held.head is not None and head_digest(held.head) != encoding.head_sha256:
            yield "head: expected the teacher's head in the store, got another; dump it again"


def _notes(store: Store, corpus: Corpus, precision: Precision) -> Iterator[str]:
    manifest = store.manifest
    if manifest.corpus.get("fingerprint") != corpus.fingerprint:
        yield "the corpus's index is another than when the store was made; its samples are compared one by one"
    then = manifest.teacher.get("precision")
    if then != precision:
        yield f"the teacher ran in {then} then, and in {precision} now"


def _audit_batch(job: Job, store: Store, read: ReadBatch, tally: Tally) -> None:
    """Compare one batch of rows."""
    manifest, rows_N = job.manifest, read.batch.rows_N
    stored = _read_scattered(store, rows_N)
    tally.compare_samples(read, stored)
    flat = flatten_positions(manifest.sequences, stored)
    num_positions = 1 if manifest.sequences is None else manifest.sequences.num_positions
    has_targets_N = stored["status"] == STATUS_OK
    gives_targets_N = ~np.isin(np.arange(len(rows_N)), list(read.batch.errors))
    start = 0
    for said in speak(job, read.inputs, bool(_hidden_encodings(manifest))):
        if said.logits_RC.shape[1] != manifest.num_classes:
            raise MismatchError(
                f"{store.path}: expected a teacher of {manifest.num_classes} classes, got one of "
                f"{said.logits_RC.shape[1]}; give the teacher that made the store"
            )
        for part in parts_of(said, manifest.num_classes):
            rows_R = np.arange(start, start + len(part.logits_RC)) // num_positions
            is_given_R = is_given(part, manifest.encoding)
            np.logical_and.at(gives_targets_N, rows_R, is_given_R)
            some = slice(start, start + len(rows_R))
            chosen_R = np.flatnonzero(has_targets_N[rows_R] & is_given_R)
            _compare(read, part, some, rows_R, chosen_R, flat, tally)
            start = some.stop
    tally.compare_refusals(rows_N, has_targets_N, gives_targets_N)


def _compare(
    read: ReadBatch,
    said: Said,
    some: slice,
    rows_R: NDArray[np.int64],
    chosen_R: NDArray[np.int64],
    flat: dict[str, Array],
    tally: Tally,
) -> None:
    """Compare the chosen of some flat rows of a batch with what the teacher says of them."""
    if not len(chosen_R):
        return
    index = torch.from_numpy(chosen_R).to(said.logits_RC.device)

    def taken(values_R: Tensor | None) -> Tensor | None:
        return None if values_R is None else values_R[some].to(index.device)[index]

    hidden_RW = None if said.hidden_RW is None else said.hidden_RW[index]
    fresh = Fresh(said.logits_RC[index], hidden_RW, taken(read.uniform_R), taken(read.hard_targets_R))
    stored = {name: values[some][chosen_R] for name, values in flat.items()}
    tally.compare_values(read.batch.rows_N[rows_R[chosen_R]], fresh, stored)


def _read_scattered(store: Store, rows_N: NDArray[np.int64]) -> dict[str, Array]:
    """Every array of some rows, ascending, a run of neighbours at a time."""
    names = [spec.name for spec in store.manifest.arrays]
    runs = np.split(rows_N, np.flatnonzero(np.diff(rows_N) != 1) + 1)
    parts = [store.read(names, int(run[0]), int(run[-1]) + 1) for run in runs]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
