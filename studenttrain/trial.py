"""A trained student on a corpus: what `studenttrain eval` does."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.console import progress
from storage.corpus import Corpus, Preprocess, SequenceOptions, TokenCorpus
from storage.corpus.parquet_columns import Columns
from storage.corpus.stored import StoredTokens
from storage.corpus.without import whole_corpus
from storage.errors import MismatchError
from storage.reader import Store
from studenttrain.checks import check_class_names, check_hard_targets, check_row_count, check_same_classes, open_targets
from studenttrain.config import check_not_empty
from studenttrain.distributed import join_world
from studenttrain.evaluate import DEFAULT_BATCH_SIZE, evaluate
from studenttrain.export import StudentCard, load_student
from studenttrain.figures import EvalFigures
from studenttrain.preparation import check_student_input, default_readers, open_data


def try_student(
    checkpoint: str,
    data: str | None = None,
    *,
    targets: str | None = None,
    labels: str | None = None,
    corpus_kind: str | None = None,
    array: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    device: str = "auto",
    batch_size: int = DEFAULT_BATCH_SIZE,
    readers: int | None = None,
    tokenizer: str | None = None,
    token_dtype: str | None = None,
    boundaries: str | None = None,
    separator: int | None = None,
    text_field: str | None = None,
    quiet: bool = False,
) -> EvalFigures:
    """How well a student does on a corpus.

    Args:
        checkpoint: folder of a run, a `.safetensors` file with its card beside it, or a checkpoint.
        data: path of the corpus; None takes the tokens that the store `targets` keeps.
        targets: store made from it, for the agreement with the teacher.
        labels: file of its hard targets; None finds them.
        corpus_kind: None finds it.
        array: name of the array, where there are several.
        image_column: column of encoded images in Parquet files; None finds it.
        label_column: column of class numbers in Parquet files; None finds it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1; None is one a core, at most 8.
        tokenizer: of a corpus of text, or of token ids.
        token_dtype: type of the ids in a `.bin`.
        boundaries: `.npy` of the offsets at which documents begin.
        separator: id of the token that ends a document.
        text_field: field of a JSONL line that holds its text.
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
        where = f"student '{checkpoint}'"
        if card.specialist is not None:
            raise MismatchError(
                f"{where}: expected a student of all classes, got a specialist, which knows {card.num_classes - 1} and "
                "a dustbin; give the folder of all specialists to studenttrain specialists eval"
            )
        store = None if targets is None else stack.enter_context(open_targets(targets))
        if store is not None:
            check_same_classes(store, card.num_classes, card.class_names, where)
        options = {
            "tokenizer": tokenizer,
            "token_dtype": token_dtype,
            "boundaries": boundaries,
            "separator": separator,
            "text_field": text_field,
        }
        if data is None:
            corpus = _stored_corpus(
                store,
                card,
                {
                    **options,
                    "corpus_kind": corpus_kind,
                    "labels": labels,
                    "array": array,
                    "image_column": image_column,
                    "label_column": label_column,
                },
            )
        else:
            columns = Columns(image_column, label_column)
            corpus = open_data(data, corpus_kind, labels, array, sequence_options_of(card, options), store, columns)
        preprocess = Preprocess.from_json(card.preprocess)
        check_student_input(preprocess, corpus, "--data")
        check_tokenizers(card, corpus, store, where)
        check_class_names(f"corpus '{data}'", corpus.class_names, card.class_names, where)
        check_hard_targets(corpus, card.num_classes)
        if store is not None:
            check_row_count(store, corpus)
        with progress(corpus.num_samples, "samples", "evaluating", quiet=quiet or not world.is_main) as bar:
            return evaluate(
                model.to(world.device),
                corpus,
                preprocess,
                world,
                num_classes=card.num_classes,
                store=store,
                batch_size=batch_size,
                readers=readers or default_readers(),
                advance=bar.advance,
            )


def sequence_options_of(card: StudentCard, options: Mapping[str, Any]) -> SequenceOptions | None:
    """How a corpus of tokens or text is read for a language model; None for other students."""
    if card.sequences is not None:
        return SequenceOptions(
            length=card.sequences["num_positions"],
            tokenizer=options["tokenizer"],
            dtype=options["token_dtype"],
            boundaries=options["boundaries"],
            separator=options["separator"],
            text_field=options["text_field"],
            vocab_size=None if options["tokenizer"] is not None else card.num_classes,
        )
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected a language model beside it, got another student; leave it out")
    return None


def _stored_corpus(store: Store | None, card: StudentCard, ignored: Mapping[str, Any]) -> Corpus:
    """The tokens that the store keeps, where no corpus is given."""
    if store is None or card.sequences is None:
        raise ValueError("data: expected a corpus to try the student on, got none; give it: --data")
    for name, value in ignored.items():
        if value is not None:
            raise ValueError(f"{name}: expected --data beside it, got none; give the corpus, or leave this out")
    return StoredTokens(store)


def check_tokenizers(card: StudentCard, corpus: Corpus, store: Store | None, where: str) -> None:
    """Refuse a corpus, or a store, of another tokenizer than the student's."""
    expected = None if card.sequences is None else card.sequences["tokenizer"]
    found: dict[str, str | None] = {}
    whole = whole_corpus(corpus)
    if isinstance(whole, TokenCorpus) and whole.tokenizer is not None:
        found[f"corpus '{corpus.path}'"] = whole.tokenizer.fingerprint
    if store is not None and store.manifest.sequences is not None:
        found[f"store '{store.path}'"] = store.manifest.sequences.tokenizer
    for whose, fingerprint in found.items():
        if None not in (expected, fingerprint) and fingerprint != expected:
            raise MismatchError(
                f"{whose}: expected the tokenizer that {where} learned with (fingerprint {str(expected)[:12]}), got "
                f"another ({str(fingerprint)[:12]}): the same id is another token there; use a corpus of that tokenizer"
            )
