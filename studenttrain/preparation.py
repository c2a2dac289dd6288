"""What a run needs before its first step, opened and held against the store, cheap checks first."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from storage.console import progress
from storage.corpus import (
    Corpus,
    Preprocess,
    SequenceOptions,
    TokenCorpus,
    check_preprocess,
    load_tokenizer,
    open_corpus,
    rows_of_store,
    verify_corpus,
    verify_hard_targets,
)
from storage.corpus.growing import GrowingCorpus
from storage.corpus.labels import NO_LABELS
from storage.corpus.opening import find_kind
from storage.corpus.parquet_columns import Columns
from storage.corpus.stored import StoredTokens
from storage.corpus.without import whole_corpus
from storage.errors import CorpusError, MismatchError, PathError, StudentError
from storage.reader import Store
from storage.series import Series
from studenttrain.checkpoint import CHECKPOINT
from studenttrain.checks import (
    Objective,
    check_class_names,
    check_hard_targets,
    check_row_count,
    check_same_classes,
    check_tokenizer,
    choose_objective,
    open_targets,
    say_meeting,
    store_identity,
)
from studenttrain.config import FitConfig
from studenttrain.epochs import EPOCHS
from studenttrain.export import CARD, StudentCard, fill_weights, load_card, load_student, say_difference
from studenttrain.metrics import METRICS, TENSORBOARD
from studenttrain.models import build_model
from studenttrain.selection import RowClasses, RowSelection, choose_classes
from studenttrain.specialists.collapse import OwnClasses

MAX_READERS = 8
MOST_TIMES_ITS_ROWS = 1000  # a store of so many times the samples of its corpus is not looked at further
LOCK = ".lock"
# What a run makes before its first checkpoint, and may leave behind without one.
BEGINNING = frozenset(
    {LOCK, METRICS, TENSORBOARD, EPOCHS, *(f".{name}.partial" for name in (METRICS, CHECKPOINT, EPOCHS))}
)


@dataclass(frozen=True)
class Validation:
    """What the student is tried on after each epoch.

    Attributes:
        corpus: with hard targets, or with a store, or both.
        store: targets stored from it by the teacher, or None.
        hard_targets: int32, of each sample, instead of the corpus's own; None takes these.
    """

    corpus: Corpus
    store: Store | None
    hard_targets: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that a run reads, found to fit together.

    Attributes:
        store: the soft targets.
        corpus: the samples that they belong to; the store's own tokens, where no other is given.
        preprocess: how a sample becomes the student's input, as the store says.
        hard_targets: int32 (num_rows,), -1 where unknown, of the corpus or else the store; None where none has any.
        objective: what is minimised.
        validation: what the student is tried on, or None.
        card: what the student will be.
        readers: threads that read samples.
        selection: the rows that the student sees; None for all.
        own: the classes of a specialist; None for a student of all of the store's.
    """

    store: Store
    corpus: Corpus
    preprocess: Preprocess
    hard_targets: NDArray[np.int32] | None
    objective: Objective
    validation: Validation | None
    card: StudentCard
    readers: int
    selection: RowSelection | None = None
    own: OwnClasses | None = None

    @property
    def is_tokens(self) -> bool:
        """Whether the rows are sequences, whose hard targets are their own next tokens."""
        return self.store.manifest.sequences is not None

    @property
    def own_hard_targets(self) -> NDArray[np.int32] | None:
        """The hard targets, where the store has none, so that nothing else tells whether they are the same ones."""
        return None if self.store.manifest.has_hard_targets else self.hard_targets


def prepare(config: FitConfig, store: Store, stack: contextlib.ExitStack) -> Prepared:
    """Open what the options name, and hold it against the store; no sample is read but a few for their size.

    Args:
        config: the options.
        store: the soft targets.
        stack: closes what is opened here.

    Raises:
        StoreError: something does not fit.
        ValueError: options that contradict each other, or that would be ignored.
    """
    sequence = sequence_options(config, store)
    corpus = _open_data(config, store, sequence)
    preprocess = stored_preprocess(store)
    check_preprocess(preprocess, corpus)
    _check_tokenizers(config, store, corpus)
    check_class_names(
        f"corpus '{config.data}'", corpus.class_names, store.manifest.class_names, f"store '{store.path}'"
    )
    hard_targets = check_hard_targets(corpus, store.manifest.num_classes)
    if hard_targets is None and store.manifest.has_hard_targets:
        if store.manifest.num_rows > MOST_TIMES_ITS_ROWS * corpus.num_samples:
            check_row_count(store, corpus)  # before there is memory for each row that the manifest claims
        hard_targets = stored_hard_targets(store)
    has_hard_targets = hard_targets is not None and bool((hard_targets >= 0).any())
    if isinstance(store, Series):  # what is known of the first rows must not decide for all
        has_hard_targets = store.manifest.has_hard_targets
    objective = choose_objective(config, store.manifest, has_hard_targets or store.manifest.sequences is not None)
    selection = choose_classes(config.only_classes, config.without_classes, RowClasses(store, corpus))
    return Prepared(
        store=store,
        corpus=corpus,
        preprocess=preprocess,
        hard_targets=hard_targets,
        objective=objective,
        validation=_open_validation(config, store, preprocess, sequence, stack),
        card=StudentCard(
            student=config.student,
            input_shape=preprocess.shape,
            num_classes=store.manifest.num_classes,
            class_names=store.manifest.class_names,
            preprocess=dict(store.manifest.preprocess),
            store=store_identity(store),
            sequences=None if store.manifest.sequences is None else store.manifest.sequences.to_json(),
            rows=None if selection is None else selection.to_json(),
        ),
        readers=config.readers or default_readers(),
        selection=selection,
    )


def sequence_options(config: FitConfig, store: Store) -> SequenceOptions | None:
    """How a corpus of tokens or text is read for a store of sequences; None for other stores.

    Raises:
        ValueError: an option of sequences beside a store without.
    """
    sequences = store.manifest.sequences
    if sequences is not None:
        return SequenceOptions(
            length=sequences.num_positions,
            tokenizer=config.tokenizer,
            dtype=config.token_dtype,
            boundaries=config.boundaries,
            separator=config.separator,
            text_field=config.text_field,
            vocab_size=None if config.tokenizer is not None else store.manifest.num_classes,
        )
    for name in ("tokenizer", "token_dtype", "boundaries", "separator", "text_field"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}: expected a store of sequences, got '{store.path}', which has none; leave it out")
    return None


def _open_data(config: FitConfig, store: Store, sequence: SequenceOptions | None) -> Corpus:
    """The corpus that is named, or the tokens that the store keeps."""
    if config.data is not None:
        return open_data(config.data, config.corpus_kind, config.labels, config.array, sequence, store, config.columns)
    if sequence is None:
        raise ValueError("data: expected the corpus that the store was made from, got none; give it: --data")
    for name in ("token_dtype", "separator", "text_field"):
        if getattr(config, name) is not None and config.val_data is None:
            raise ValueError(f"{name}: expected --data or --val-data beside it, got neither; leave it out")
    return StoredTokens(store)


def open_data(
    path: str,
    kind: str | None,
    labels: str | None,
    array: str | None,
    sequence: SequenceOptions | None,
    store: Store | None,
    columns: Columns | None = None,
) -> Corpus:
    """The corpus at a path; beside a series, of the files that its members cover; beside a part, a part of it.

    Raises:
        CorpusError: it can't be used.
        ValueError: options that the corpus has no use for.
    """
    if not isinstance(store, Series):
        corpus = open_corpus(path, kind, labels, array, sequence, columns=columns)
        return corpus if store is None else rows_of_store(store, corpus)
    if labels is not None and labels != NO_LABELS:
        raise ValueError(
            f"labels: expected none beside a series of stores, whose corpus grows, got '{labels}'; leave them out: "
            f"'{store.path}' keeps the hard targets that it was dumped with"
        )
    kind = kind or str(store.manifest.corpus["kind"])
    return GrowingCorpus(
        store, lambda files: open_corpus(path, kind, labels, array, sequence, files=files, columns=columns)
    )


def _check_tokenizers(config: FitConfig, store: Store, corpus: Corpus) -> None:
    """Refuse a corpus or a student of another tokenizer than the store's."""
    if store.manifest.sequences is None:
        return
    whole = whole_corpus(corpus)
    if isinstance(whole, TokenCorpus) and whole.tokenizer is not None:
        check_tokenizer(store, whole.tokenizer.fingerprint, f"corpus '{config.data}'")
    if config.tokenizer is not None:
        check_tokenizer(store, load_tokenizer(config.tokenizer).fingerprint, f"tokenizer '{config.tokenizer}'")
    folder = config.student.removeprefix("hf:")
    if folder != config.student and (Path(folder) / "tokenizer.json").is_file():
        check_tokenizer(store, load_tokenizer(folder).fingerprint, f"student '{config.student}'")


def default_readers() -> int:
    """Threads that read samples: one for each core, at most 8."""
    return min(MAX_READERS, len(os.sched_getaffinity(0)))


def stored_preprocess(store: Store) -> Preprocess:
    """How the store says that a sample becomes an input.

    Raises:
        MismatchError: in a way that this release does not know.
    """
    try:
        return Preprocess.from_json(store.manifest.preprocess)
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"store '{store.path}': expected a preprocessing that this release knows, got another ({error}); "
            "install the release that made the store, or a newer one"
        ) from error


def check_student_input(preprocess: Preprocess, corpus: Corpus, option: str) -> None:
    """Refuse a corpus that can't become the student's input, though it need not be the one that the store is of.

    Raises:
        CorpusError: the corpus is of another kind, its samples are of another shape, or none can be read.
    """
    try:
        check_preprocess(preprocess, corpus)
    except CorpusError as error:
        # the advice is to give the store's own corpus, or samples of its shape: right for --data alone
        found, _, advice = str(error).rpartition("; ")
        if "that the store was made from" not in advice:
            raise
        shape = " x ".join(map(str, preprocess.shape))
        raise CorpusError(f"{found}; give {option} a corpus with the student's input, {shape}") from error


def stored_hard_targets(store: Store) -> NDArray[np.int32]:
    """The hard targets of a store's sealed rows, int32 (num_rows,), -1 elsewhere."""
    hard_targets = np.full(store.manifest.num_rows, -1, np.int32)
    for shard in store.sealed_shards():
        start, stop = store.layout.shard_bounds(shard)
        hard_targets[start:stop] = store.read(["hard_target"], start, stop)["hard_target"]
    return hard_targets


def _open_validation(
    config: FitConfig,
    store: Store,
    preprocess: Preprocess,
    sequence: SequenceOptions | None,
    stack: contextlib.ExitStack,
) -> Validation | None:
    if config.val_data is None:
        return None if config.val_targets is None else _stored_validation(config, store, preprocess, stack)
    of_validation = None if sequence is None else replace(sequence, boundaries=None)
    val_store = None if config.val_targets is None else _open_val_targets(config, store, stack)
    columns = _validation_columns(config, sequence is not None)
    corpus = open_data(config.val_data, None, config.val_labels, None, of_validation, val_store, columns)
    check_student_input(preprocess, corpus, "--val-data")
    names, whose = store.manifest.class_names, f"store '{store.path}'"
    check_class_names(f"corpus '{config.val_data}'", corpus.class_names, names, whose)
    hard_targets = check_hard_targets(corpus, store.manifest.num_classes)
    if val_store is None:
        if hard_targets is None and sequence is None:
            raise CorpusError(
                f"corpus '{config.val_data}': expected hard targets to validate on, got none; give --val-labels, or "
                "--val-targets"
            )
        return Validation(corpus, None)
    check_row_count(val_store, corpus)
    return Validation(corpus, val_store)


def _validation_columns(config: FitConfig, is_sequence: bool) -> Columns | None:
    """The columns of `data`, where the corpus for validation is Parquet too; labels from a file go before a column."""
    assert config.val_data is not None
    if config.columns == Columns() or find_kind(config.val_data, is_sequence) != "parquet":
        return None
    return config.columns if config.val_labels is None else replace(config.columns, label=None)


def _stored_validation(
    config: FitConfig, store: Store, preprocess: Preprocess, stack: contextlib.ExitStack
) -> Validation:
    """Validation on the tokens that a store keeps."""
    if store.manifest.sequences is None:
        raise ValueError("val_targets: expected val_data beside them, got none; give the corpus too")
    val_store = _open_val_targets(config, store, stack)
    corpus = StoredTokens(val_store)
    check_student_input(preprocess, corpus, "--val-targets")
    return Validation(corpus, val_store)


def _open_val_targets(config: FitConfig, store: Store, stack: contextlib.ExitStack) -> Store:
    """A store for validation, of the same classes, or tokens, and the same teacher."""
    path = config.val_targets
    assert path is not None
    val_store = stack.enter_context(open_targets(path, config.cache_settings))
    check_same_classes(val_store, store.manifest.num_classes, store.manifest.class_names, f"store '{store.path}'")
    of_validation = val_store.manifest.sequences
    check_tokenizer(store, None if of_validation is None else of_validation.tokenizer, f"store '{path}'")
    if val_store.manifest.teacher.get("digest") != store.manifest.teacher.get("digest"):
        raise MismatchError(
            f"store '{path}': expected targets of the teacher that made '{store.path}', got another's; "
            "dump the validation corpus with the same teacher"
        )
    return val_store


def look_again(prepared: Prepared) -> None:
    """Take up what a series and its corpus grew by since.

    Raises:
        StoreError: a new member, or a file of it, does not fit.
    """
    prepared.store.refresh()
    if isinstance(prepared.corpus, GrowingCorpus):
        prepared.corpus.grow()


def with_all_rows(prepared: Prepared) -> Prepared:
    """The same, with the hard targets of all rows that a series has by now."""
    if not isinstance(prepared.store, Series):
        return prepared
    hard_targets = check_hard_targets(prepared.corpus, prepared.store.manifest.num_classes)
    if hard_targets is None and prepared.store.manifest.has_hard_targets:
        hard_targets = stored_hard_targets(prepared.store)
    return replace(prepared, hard_targets=hard_targets)


def look_at_data(prepared: Prepared, quiet: bool) -> None:
    """Hold all samples of the sealed rows, and their hard targets, against the store, and say how well these meet.

    Raises:
        CorpusMismatchError: a sample or a hard target differs; the message names the first row and its key.
    """
    store, corpus = prepared.store, prepared.corpus
    with (
        ThreadPoolExecutor(prepared.readers) as pool,
        progress(store.num_sealed_rows, "rows", "checking the corpus", quiet=quiet) as bar,
    ):
        verify_corpus(store, corpus, bar, pool)
    verify_hard_targets(store, corpus)
    sequences = store.manifest.sequences
    if prepared.hard_targets is not None or (sequences is not None and sequences.has_tokens):
        say_meeting(store, prepared.hard_targets, quiet)


def build_student(config: FitConfig, store: Store, input_shape: tuple[int, ...], begins: bool = True) -> nn.Module:
    """The student of the spec, for the store's classes and inputs, with random or given weights, on the CPU.

    Args:
        config: the options.
        store: what it will learn from.
        input_shape: of one input.
        begins: whether the run begins; where it goes on, the weights to begin with may be gone.

    Raises:
        StudentError: it can't be built, does not fit the store, or the weights are not its own.
        MismatchError: the weights are of other classes.
    """
    sequences, num_classes = store.manifest.sequences, store.manifest.num_classes
    if sequences is None:
        student = build_model(config.student, num_classes, input_shape)
    else:
        student = build_model(config.student, num_classes, num_positions=sequences.num_positions)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise StudentError(f"student '{config.student}': expected weights that learn, got none; give another student")
    if config.init is None or not (begins or Path(config.init).exists()):
        return student
    path = Path(config.init)
    card_path = path / CARD if path.is_dir() else path.with_name(CARD)
    if card_path.is_file():
        names, expected = load_card(card_path).class_names, store.manifest.class_names
        check_class_names(f"weights '{config.init}'", names, expected, f"store '{store.path}'")
    try:
        if path.suffix == ".safetensors":
            fill_weights(path, student)
        else:
            begun, _ = load_student(path)
            student.load_state_dict(begun.state_dict())
    except RuntimeError as error:
        raise StudentError(
            f"--init: expected weights of the same --student, '{config.student}', got others in '{config.init}' "
            f"({say_difference(error)}); give --init weights of that student, or --student as it was for these"
        ) from error
    return student


@contextlib.contextmanager
def hold_folder(out: str) -> Iterator[Path]:
    """The folder of a run, made where it is not there, and kept from a second `fit`; a process that dies gives it back.

    Raises:
        PathError: something else has its name, it holds something else, it can't be written, or another run holds it.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_no_foreign_files(folder)
        file = (folder / LOCK).open("w")
    except (FileExistsError, NotADirectoryError) as error:
        raise PathError(f"{out}: expected a folder, or nothing, got a file; give --out another path") from error
    except OSError as error:
        raise PathError(
            f"{out}: expected a folder that can be written, got '{error.strerror}'; give --out another path"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PathError(
                f"{out}: expected a folder that no other run writes to, got one in use; wait for it to end, or "
                "give --out another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield folder


def _check_no_foreign_files(folder: Path) -> None:
    """Refuse a folder whose files a run would overwrite, or stand between, though they are not of a run.

    Raises:
        PathError: it holds neither nothing nor a run.
    """
    names = {path.name for path in folder.iterdir()}
    is_begun = LOCK in names and names <= BEGINNING
    if not names or is_begun or (folder / CHECKPOINT).is_file():
        return
    foreign = sorted(names - BEGINNING) or sorted(names)
    others = " and others" if len(foreign) > 1 else ""
    raise PathError(
        f"{folder}: expected an empty folder or a run of studenttrain, got '{foreign[0]}'{others}; "
        "give --out another path"
    )
