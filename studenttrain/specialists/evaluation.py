"""A generalist with its specialists on a corpus: what `studenttrain specialists eval` does.

Legend: N rows, C classes.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_OK
from storage.console import format_count, progress
from storage.corpus import Batch, Corpus, Preprocess, verify_hard_targets
from storage.corpus.parquet_columns import Columns
from storage.errors import MismatchError
from storage.reader import Store
from storage.series import Series
from studenttrain.checks import check_class_names, check_hard_targets, check_row_count, open_targets
from studenttrain.config import check_not_empty
from studenttrain.distributed import choose_device
from studenttrain.evaluate import DEFAULT_BATCH_SIZE, read_ahead
from studenttrain.preparation import check_student_input, default_readers, open_data, stored_hard_targets
from studenttrain.specialists.fused import FusedClassifier, load_folder, load_generalist
from studenttrain.specialists.fused_figures import FusedFigures, FusedTally
from studenttrain.specialists.fusion import DEFAULT_TOLERANCE
from studenttrain.specialists.generalist import batches_of, check_generalist_store, read_generalist
from studenttrain.specialists.plan import SpecialistsPlan
from studenttrain.specialists.specialist import Phase


@dataclass(frozen=True)
class TryOptions:
    """What is tried, and on what.

    Attributes:
        specialists: folder of `studenttrain specialists fit`.
        data: path of the corpus.
        targets: store that the generalist made from this corpus; this or `generalist`.
        generalist: folder of a run, a `.safetensors` file with its card beside it, or a checkpoint.
        labels: file of the corpus's hard targets; None finds them.
        corpus_kind: None finds it.
        array: name of the array, where there are several.
        image_column: column of encoded images in Parquet files; None finds it.
        label_column: column of class numbers in Parquet files; None finds it.
        phase: which specialists, `hard` or `soft`; None is the last phase that they were trained in.
        active_top: how many of the generalist's likeliest classes make a specialist active, at least 1.
        tolerance: the largest gradient that a row's fusion may be left with.
        every_row: let each specialist see all rows, so that its own figures are of all rows too.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1; None is one a core, at most 8.

    Raises:
        ValueError: an option is out of range, or options contradict each other.
    """

    specialists: str
    data: str
    targets: str | None = None
    generalist: str | None = None
    labels: str | None = None
    corpus_kind: str | None = None
    array: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    phase: Phase | None = None
    active_top: int = 1
    tolerance: float = DEFAULT_TOLERANCE
    every_row: bool = False
    device: str = "auto"
    batch_size: int = DEFAULT_BATCH_SIZE
    readers: int | None = None

    def __post_init__(self) -> None:
        for name in ("specialists", "data", "targets", "generalist", "labels"):
            check_not_empty(name, getattr(self, name))
        if (self.targets is None) == (self.generalist is None):
            got = "neither" if self.targets is None else "both"
            raise ValueError(f"targets: expected --targets or --generalist, one of the two, got {got}; give one")
        for name, value in (("batch_size", self.batch_size), ("readers", self.readers)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


def try_specialists(options: TryOptions, *, quiet: bool = False) -> FusedFigures:
    """How well a generalist does with its specialists on a corpus, beside the generalist alone.

    Args:
        options: what is tried, and on what.
        quiet: show no progress.

    Raises:
        StoreError: something can't be used, or things don't fit each other.
        ValueError: an option is out of range.
    """
    with contextlib.ExitStack() as stack:
        plan, specialists = load_folder(options.specialists, options.phase)
        store, model = None, None
        if options.targets is not None:
            store = stack.enter_context(open_targets(options.targets))
            check_generalist_store(store, plan, specialists)
        else:
            assert options.generalist is not None
            model, _ = load_generalist(options.generalist, plan, specialists)
        classifier = FusedClassifier(
            specialists,
            plan.num_classes,
            model,
            active_top=options.active_top,
            tolerance=options.tolerance,
            device=choose_device(options.device),
        )
        corpus, hard_targets = _open_corpus(options, plan, store)
        preprocess = Preprocess.from_json(specialists[0].card.preprocess)
        check_student_input(preprocess, corpus, "--data")
        if store is not None and store.num_sealed_rows < store.manifest.num_rows and not quiet:
            sealed, planned = format_count(store.num_sealed_rows), format_count(store.manifest.num_rows)
            click.echo(f"{store.path}: {sealed} of {planned} rows are sealed; these are tried", err=True)
        with progress(corpus.num_samples, "samples", "evaluating", quiet=quiet) as bar:
            return _count(classifier, corpus, hard_targets, preprocess, store, options, bar.advance)


def _open_corpus(
    options: TryOptions, plan: SpecialistsPlan, store: Store | None
) -> tuple[Corpus, NDArray[np.int32] | None]:
    """The corpus, and its hard targets or those of the store."""
    if isinstance(store, Series):
        raise MismatchError(
            f"store '{store.path}': expected one store of the corpus, got a series of them; give a member, and its "
            "part of the corpus"
        )
    columns = Columns(options.image_column, options.label_column)
    corpus = open_data(options.data, options.corpus_kind, options.labels, options.array, None, store, columns)
    check_class_names(f"corpus '{options.data}'", corpus.class_names, plan.class_names, "the plan of the specialists")
    hard_targets = check_hard_targets(corpus, plan.num_classes)
    if store is not None:
        check_row_count(store, corpus)
        verify_hard_targets(store, corpus)
        if hard_targets is None and store.manifest.has_hard_targets:
            hard_targets = stored_hard_targets(store)
    return corpus, hard_targets


def _count(
    classifier: FusedClassifier,
    corpus: Corpus,
    hard_targets: NDArray[np.int32] | None,
    preprocess: Preprocess,
    store: Store | None,
    options: TryOptions,
    advance: Callable[[int], None],
) -> FusedFigures:
    tally = FusedTally([it.classes for it in classifier.specialists], classifier.num_classes)
    if store is None:
        starts = range(0, corpus.num_samples, options.batch_size)
        batches = [np.arange(start, min(start + options.batch_size, corpus.num_samples)) for start in starts]
    else:
        batches = batches_of(store, store.sealed_shards(), options.batch_size)
    for batch in read_ahead(corpus, batches, preprocess, options.readers or default_readers()):
        good_N, generalist_NC = _usable(batch, corpus, store)
        tally.num_refused += int((~good_N).sum())
        if good_N.any():
            inputs = torch.from_numpy(batch.inputs[good_N])
            hard_N = None if hard_targets is None else torch.from_numpy(hard_targets[batch.rows_N[good_N]])
            tally.add(classifier.fuse(inputs, generalist_NC, every_row=options.every_row), hard_N)
        advance(len(batch.rows_N))
    return tally.figures(options.tolerance, every_row=options.every_row)


def _usable(batch: Batch, corpus: Corpus, store: Store | None) -> tuple[NDArray[Any], Tensor | None]:
    """Which rows of a batch have an answer, bool (N,), and what the store says of them."""
    good_N = np.ones(len(batch.rows_N), bool)
    good_N[list(batch.errors)] = False
    if store is None:
        return good_N, None
    logprobs_NC, status_N = read_generalist(store, corpus, batch)
    good_N &= status_N == STATUS_OK
    return good_N, torch.from_numpy(logprobs_NC[good_N])
