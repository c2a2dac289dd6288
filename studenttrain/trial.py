"""A trained student on a corpus: what `studenttrain eval` does."""

import contextlib
from pathlib import Path

from storage.console import progress
from storage.corpus import Preprocess, open_corpus
from studenttrain.checks import check_class_names, check_hard_targets, check_row_count, check_same_classes, open_targets
from studenttrain.config import check_not_empty
from studenttrain.distributed import join_world
from studenttrain.evaluate import DEFAULT_BATCH_SIZE, evaluate
from studenttrain.export import load_student
from studenttrain.figures import EvalFigures
from studenttrain.preparation import check_student_input, default_readers


def try_student(
    checkpoint: str,
    data: str,
    *,
    targets: str | None = None,
    labels: str | None = None,
    corpus_kind: str | None = None,
    array: str | None = None,
    device: str = "auto",
    batch_size: int = DEFAULT_BATCH_SIZE,
    readers: int | None = None,
    quiet: bool = False,
) -> EvalFigures:
    """How well a student does on a corpus.

    Args:
        checkpoint: folder of a run, a `.safetensors` file with its card beside it, or a checkpoint.
        data: path of the corpus.
        targets: store made from it, for the agreement with the teacher.
        labels: file of its hard targets; None finds them.
        corpus_kind: None finds it.
        array: name of the array, where there are several.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1; None is one a core, at most 8.
        quiet: show no progress.

    Raises:
        StoreError: the student, the corpus or the store can't be used, or they don't fit each other.
        ValueError: an option is out of range.
    """
    for name, value in (("batch_size", batch_size), ("readers", readers)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    for name, path in (("checkpoint", checkpoint), ("data", data), ("targets", targets), ("labels", labels)):
        check_not_empty(name, path)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(device))
        model, card = load_student(Path(checkpoint))
        corpus = open_corpus(data, corpus_kind, labels, array)
        preprocess = Preprocess.from_json(card.preprocess)
        check_student_input(preprocess, corpus, "--data")
        where = f"student '{checkpoint}'"
        check_class_names(f"corpus '{data}'", corpus.class_names, card.class_names, where)
        check_hard_targets(corpus, card.num_classes)
        store = None
        if targets is not None:
            store = stack.enter_context(open_targets(targets))
            check_row_count(store, corpus)
            check_same_classes(store, card.num_classes, card.class_names, where)
        with progress(corpus.num_samples, "samples", "evaluating", quiet=quiet or not world.is_main) as bar:
            return evaluate(
                model.to(world.device),
                corpus,
                preprocess,
                world,
                store=store,
                batch_size=batch_size,
                readers=readers or default_readers(),
                advance=bar.advance,
            )
