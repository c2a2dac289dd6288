"""What a calibration reads: the corpus, the store that was made from it, and which of its rows.

Legend: N rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.corpus import Corpus, Preprocess
from storage.corpus.labels import NO_LABELS
from storage.corpus.parquet_columns import Columns
from storage.encodings import check_temperature
from storage.errors import CorpusError
from storage.reader import Store
from studenttrain.calibration_config import CalibrationConfig
from studenttrain.checks import (
    check_class_names,
    check_hard_targets,
    check_row_count,
    check_same_classes,
    check_same_store,
    open_targets,
)
from studenttrain.export import StudentCard
from studenttrain.preparation import check_student_input, open_data
from studenttrain.selection import HARD_TARGETS, ClassSelection, RowClasses
from studenttrain.trial import check_tokenizers, sequence_options_of

OPTIONS_OF_SEQUENCES = ("tokenizer", "token_dtype", "boundaries", "separator", "text_field")


def open_made_from(path: str, card: StudentCard, where: str, *, is_read: bool) -> Store:
    """The store that `data` made; where its soft targets are read, they are exact at T = 1."""
    store = open_targets(path)
    try:
        check_same_classes(store, card.num_classes, card.class_names, where)
        if is_read:
            check_temperature(store.manifest.encoding, 1.0, store.manifest.temperatures)
    except BaseException:
        store.close()
        raise
    return store


def open_calibration_data(
    config: CalibrationConfig, card: StudentCard, store: Store | None, where: str, *, needs_labels: bool
) -> Corpus:
    """The corpus, without its labels where none is asked for."""
    options = {name: getattr(config, name) for name in OPTIONS_OF_SEQUENCES}
    sequence, needs_labels = sequence_options_of(card, options), needs_labels or config.temperature == "labels"
    if not needs_labels:
        for name in ("labels", "label_column"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}: expected --temperature labels beside it, got {config.temperature}: no label is read; "
                    "leave it out"
                )
    labels = config.labels if needs_labels or sequence is not None else NO_LABELS
    columns = Columns(config.image_column, config.label_column)
    corpus = open_data(config.data, config.corpus_kind, labels, config.array, sequence, store, columns)
    check_student_input(Preprocess.from_json(card.preprocess), corpus, "--data")
    check_tokenizers(card, corpus, store, where)
    if store is not None:
        check_row_count(store, corpus)
    if needs_labels and sequence is None:
        check_class_names(f"corpus '{config.data}'", corpus.class_names, card.class_names, where)
        hard_targets = check_hard_targets(corpus, card.num_classes)
        if hard_targets is None or not (hard_targets >= 0).any():
            raise CorpusError(
                f"corpus '{config.data}': expected hard targets to read, got none; give --labels, or calibrate without "
                "them: --temperature targets"
            )
    return corpus


@dataclass(frozen=True)
class SelectedRows:
    """The rows of the store that a student learned from, where these were not all."""

    store: Store
    said: Mapping[str, Any]

    @property
    def needs_labels(self) -> bool:
        """Whether only the corpus's labels tell them."""
        return self.said["by"] == HARD_TARGETS and not self.store.manifest.has_hard_targets

    def rows(self, corpus: Corpus) -> NDArray[np.int64]:
        """The rows, ascending, of those that are sealed."""
        is_without = "without_classes" in self.said
        classes = tuple(self.said["without_classes" if is_without else "only_classes"])
        sealed = self.store.sealed_shards()
        chosen_N = ClassSelection(classes, is_without, RowClasses(self.store, corpus)).chosen(0, sealed)
        bounds = [self.store.layout.shard_bounds(shard) for shard in sealed]
        return np.concatenate([start + np.flatnonzero(chosen_N[start:stop]) for start, stop in bounds])


def selected_rows(config: CalibrationConfig, card: StudentCard, store: Store | None, where: str) -> SelectedRows | None:
    """The rows that `shift` looks at: those that the student learned from. None of all, and for `match`.

    Raises:
        ValueError: the store that tells them is missing, or given where nothing is read of it.
        MismatchError: the student learned from another store.
    """
    if config.method == "shift" and card.rows is not None:
        if store is None:
            raise ValueError(
                f"targets: expected the store that {where} learned some rows of, since shift looks at these alone, got "
                "none; give it: --targets"
            )
        check_same_store(card.store, store)
        return SelectedRows(store, card.rows)
    if store is not None and config.temperature != "targets":
        raise ValueError(
            f"targets: expected --temperature targets beside it, or a student that learned from some of its rows, got "
            f"{where}, so that nothing would be read of it; leave it out"
        )
    return None
