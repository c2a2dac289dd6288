"""What a run dumps: the corpus, who the teacher is, what is in the store already; then the teacher itself.

torch is imported only when the teacher is loaded.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.backends import backend_for
from storage.corpus import Corpus, Preprocess, default_preprocess, open_corpus, read_batch
from storage.corpus.matching import Advances
from storage.corpus.sequences import TokenCorpus
from storage.encodings import HeadArrays, Hidden
from storage.errors import CorpusError, MismatchError, TeacherError
from storage.head import head_digest
from storage.layout import Layout
from storage.manifest import Manifest, store_arrays
from storage.reader import Store
from storage.records import MANIFEST
from storage.sequences import Sequences
from teacherdump.config import DumpConfig
from teacherdump.model_file import teacher_identity
from teacherdump.plan import choose_layout

if TYPE_CHECKING:
    from torch import Tensor

    from studenttrain.heads import Head
    from teacherdump.dump import Job
    from teacherdump.teacher import Teacher

NUM_PROBE_ROWS = 4
MOST_READERS = 8
SLOW_BATCH = 8  # rows: a program exported for fewer is worth a note
VERSIONS_OF = ("torch", "numpy", "zarr", "h5py", "logitstore")

Say = Callable[[str], object]


@dataclass(frozen=True)
class Source:
    """What a run dumps, as far as it can be told without loading the teacher.

    Attributes:
        config: the options.
        corpus: opened.
        preprocess: how its samples become inputs.
        identity: who the teacher is.
        existing: the manifest of the store that is there, or None.
        planned_rows: rows that shards and chunks are chosen for; None for those of the corpus.
        is_proven: whether a store before this one shows that teacher and corpus go together.
    """

    config: DumpConfig
    corpus: Corpus
    preprocess: Preprocess
    identity: Mapping[str, Any]
    existing: Manifest | None
    planned_rows: int | None = None
    is_proven: bool = False

    @property
    def is_tokens(self) -> bool:
        """Whether the samples are sequences of tokens."""
        return self.corpus.sample_kind == "tokens"

    def manifest(
        self,
        num_classes: int,
        provenance: Mapping[str, Any],
        hidden: Hidden | None = None,
        num_padded: int | None = None,
    ) -> Manifest:
        """The manifest of the store; what is not asked for otherwise is as in the store that is there.

        Args:
            num_classes: of the teacher's logits, or entries of the vocabulary.
            provenance: of the run.
            hidden: what the teacher's head makes of the encoding `hidden`; None takes that of the store that is there.
            num_padded: entries of the teacher's output behind the vocabulary; None takes those of the store there.
        """
        config, corpus, there = self.config, self.corpus, self.existing
        if hidden is None and there is not None and isinstance(there.encoding, Hidden):
            hidden = there.encoding
        encoding = config.build_encoding(hidden or Hidden(1))  # a store of something else differs in any case
        sequences = self._sequences(num_padded)
        has_hard_targets = corpus.hard_targets is not None
        arrays = store_arrays(encoding, num_classes, len(config.temperatures), has_hard_targets, sequences)
        if there is not None and config.shard_rows is None and config.chunk_rows is None:
            layout = Layout(corpus.num_samples, there.shard_rows, there.chunk_rows)
        else:
            num_positions = 1 if sequences is None else sequences.num_positions
            planned = self.planned_rows or corpus.num_samples
            layout = choose_layout(planned, arrays, config.shard_rows, config.chunk_rows, num_positions)
        compressor = config.choose_compressor()
        if there is not None and config.compressor is None:
            compressor = there.compressor
        return Manifest(
            num_rows=corpus.num_samples,
            num_classes=num_classes,
            shard_rows=layout.shard_rows,
            chunk_rows=layout.chunk_rows,
            encoding=encoding,
            temperatures=config.temperatures,
            teacher=self.identity,
            corpus={"kind": corpus.kind, "fingerprint": corpus.fingerprint, "num_samples": corpus.num_samples},
            preprocess=self.preprocess.to_json(),
            class_names=corpus.class_names,
            has_hard_targets=has_hard_targets,
            compressor=compressor,
            provenance=provenance,
            sequences=sequences,
        )

    def _sequences(self, num_padded: int | None) -> Sequences | None:
        corpus, there = self.corpus, self.existing
        if not isinstance(corpus, TokenCorpus):
            return None
        if num_padded is None:
            num_padded = 0 if there is None or there.sequences is None else there.sequences.num_padded
        tokenizer = None if corpus.tokenizer is None else corpus.tokenizer.fingerprint
        return Sequences(corpus.sequence_length, self.config.store_tokens, tokenizer, num_padded)


def open_data(config: DumpConfig, files: Sequence[str] | None = None, progress: Advances | None = None) -> Corpus:
    """The corpus that the options name, or some of its files.

    Args:
        config: the options.
        files: names of the files, in order; None takes all.
        progress: told of each file that is indexed.

    Raises:
        StoreError: it can't be used.
        ValueError: an option would be ignored.
    """
    return open_corpus(
        config.data,
        config.corpus_kind,
        config.labels,
        config.array,
        config.sequence_options,
        files=files,
        columns=config.columns,
        progress=progress,
    )


def open_source(
    config: DumpConfig,
    corpus: Corpus | None = None,
    progress: Advances | None = None,
    like: Preprocess | None = None,
) -> Source:
    """The corpus, the teacher's identity and the store that is there.

    Args:
        config: the options.
        corpus: of some of the files of the corpus that the options name; None opens all of that.
        progress: told of each file that is indexed.
        like: the preprocessing of images that were dumped before these, and are like them.

    Raises:
        StoreError: one of them can't be used.
        ValueError: an option would be ignored.
    """
    identity = teacher_identity(config.models, config.arch, config.combine, config.precision)
    corpus = corpus or open_data(config, progress=progress)
    preprocess = default_preprocess(
        corpus,
        config.image_size,
        config.mean,
        config.std,
        resize=config.resize,
        shorter_side=config.shorter_side,
        interpolation=config.interpolation,
        channels=config.channels,
        scale=config.scale,
        like=like,
    )
    backend = backend_for(config.out)
    existing = None
    if backend.exists() and backend.get_record(MANIFEST) is not None:
        with Store(backend) as store:
            existing = store.manifest
    return Source(config, corpus, preprocess, identity, existing)


@dataclass(frozen=True)
class TeacherQuestion:
    """What a teacher is tried with: all that must be known of the corpus for it. Small, and can be pickled.

    Attributes:
        where: how an error names the corpus.
        inputs: of the first samples, as the teacher takes them.
        is_tokens: whether the samples are sequences of tokens.
        vocab_size: entries of their vocabulary, or None where nobody says it.
        has_several_documents: whether a sequence may hold more than one.
        wants_head: whether the head is kept beside hidden states.
    """

    where: str
    inputs: np.ndarray[Any, Any]
    is_tokens: bool
    vocab_size: int | None
    has_several_documents: bool
    wants_head: bool


@dataclass(frozen=True)
class TeacherAnswer:
    """What a teacher was found to be. Small but for the head, and can be pickled.

    Attributes:
        num_outputs: logits that it gives.
        num_classes: of these, the ones that are kept.
        max_batch: rows that it takes in one pass, or None for any number.
        device: what it runs on, as the provenance names it.
        head: its head, where it was wanted.
        hidden: what the head makes of the encoding `hidden`.
        notes: what a person should know, a line each.
    """

    num_outputs: int
    num_classes: int
    max_batch: int | None
    device: str
    head: HeadArrays | None
    hidden: Hidden | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Settled:
    """What a run is settled on once the teacher was tried.

    Attributes:
        manifest: of the store.
        batch_size: rows of one forward pass.
        head: what a store of hidden states keeps once; else None.
    """

    manifest: Manifest
    batch_size: int
    head: HeadArrays | None


def load_teacher_of(config: DumpConfig) -> "Teacher":
    """The teacher that the options name, on its device.

    Raises:
        StoreError: it can't be used.
    """
    from teacherdump.teacher import load_teacher

    return load_teacher(
        config.models,
        config.arch,
        config.combine,
        config.device,
        config.precision,
        config.compile,
        config.trust_pickle,
    )


def prepare(source: Source, say: Say, teacher: "Teacher | None" = None) -> "Job":
    """The teacher loaded, where it is not yet, and tried on the first samples, and all that a shard is dumped from.

    Raises:
        StoreError: the teacher can't be used, or does not fit the corpus.
        ValueError: an option contradicts what the teacher is.
    """
    from teacherdump.batch_size import choose_batch_size
    from teacherdump.dump import Job

    config, preprocess = source.config, source.preprocess
    teacher = teacher or load_teacher_of(config)
    rows = np.arange(num_probe_rows(source, teacher.max_batch))
    inputs = read_batch(source.corpus, rows, preprocess).inputs
    answer = try_teacher(teacher, teacher_question(source, inputs))
    settled = settle(
        source, answer, lambda most: choose_batch_size(teacher, preprocess.shape, most, source.is_tokens), say
    )
    num_readers = config.readers or min(MOST_READERS, os.cpu_count() or 1)
    return Job(
        source.corpus,
        preprocess,
        teacher,
        settled.manifest,
        settled.batch_size,
        num_readers,
        settled.head,
        config.alarms,
        source.is_proven,
    )


def num_probe_rows(source: Source, max_batch: int | None) -> int:
    """First samples that a teacher is tried on."""
    return min(NUM_PROBE_ROWS, source.corpus.num_samples, max_batch or NUM_PROBE_ROWS)


def teacher_question(source: Source, inputs: np.ndarray[Any, Any]) -> TeacherQuestion:
    """What the teacher of a run is tried with; `inputs` are of the first samples."""
    corpus, is_tokens = source.corpus, isinstance(source.corpus, TokenCorpus)
    return TeacherQuestion(
        where=f"corpus '{corpus.path}'",
        inputs=inputs,
        is_tokens=is_tokens,
        vocab_size=corpus.vocab_size if isinstance(corpus, TokenCorpus) else None,
        has_several_documents=isinstance(corpus, TokenCorpus) and corpus.has_several_documents,
        wants_head=source.config.encoding == "hidden",
    )


def settle(source: Source, answer: TeacherAnswer, choose: Callable[[int], int], say: Say) -> Settled:
    """The manifest and the batch size of a run whose teacher was tried.

    Args:
        source: what is dumped.
        answer: of the teacher.
        choose: the batch size for shards of so many rows, asked only where nobody says it.
        say: told of what a person should know.

    Raises:
        StoreError: the teacher does not fit the corpus or the store that is there.
        ValueError: an option contradicts what the teacher is.
    """
    config, there, num_classes = source.config, source.existing, answer.num_classes
    for note in answer.notes:
        say(f"note: {note}")
    if there is not None and num_classes != there.num_classes:
        raise MismatchError(
            f"{config.out}: expected {there.num_classes} classes, as the store has them, got {num_classes} from the "
            "teacher; the code behind --arch has changed: give --out another path"
        )
    _check_classes(source.corpus, num_classes)
    num_padded = answer.num_outputs - num_classes
    draft = source.manifest(num_classes, {}, answer.hidden, num_padded)
    max_batch = answer.max_batch
    if config.batch_size is not None and config.batch_size > (max_batch or config.batch_size):
        raise ValueError(
            f"batch_size: expected at most {max_batch}, for which the program was exported, got "
            f"{config.batch_size}; leave --batch-size out, or export it with a dynamic first dimension"
        )
    batch_size = config.batch_size or (None if there is None else _begun_with(there, "batch_size"))
    if batch_size is None:
        batch_size = choose(min(draft.shard_rows, draft.num_rows))
    if max_batch is not None and max_batch < SLOW_BATCH:
        say(
            f"note: the program was exported for batches of {max_batch}, which is slow; "
            "export it with a dynamic first dimension"
        )
    provenance = _provenance(source, answer.device, batch_size)
    return Settled(source.manifest(num_classes, provenance, answer.hidden, num_padded), batch_size, answer.head)


def try_teacher(teacher: "Teacher", question: TeacherQuestion) -> TeacherAnswer:
    """A teacher tried on the first samples.

    Raises:
        StoreError: it can't be used, or does not fit the corpus.
    """
    import torch

    from studenttrain.heads import find_head
    from teacherdump.teacher import probe_teacher, probe_tokens

    head = teacher.head() if question.wants_head else None
    inputs_N = torch.from_numpy(question.inputs).to(teacher.device)
    if question.is_tokens:
        for member in teacher.members:
            owner = find_head(member.module)
            if owner is not None:  # before an id that it does not know is looked up in it
                _vocabulary(question, owner.output_head().num_classes)
        probe = probe_tokens(teacher, inputs_N, question.has_several_documents)
    else:
        probe = probe_teacher(teacher, inputs_N)
    num_classes = _vocabulary(question, probe.num_classes)
    kept = None if head is None else kept_head(head, num_classes)
    device = teacher.device
    return TeacherAnswer(
        num_outputs=probe.num_classes,
        num_classes=num_classes,
        max_batch=teacher.max_batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        head=kept,
        hidden=None if head is None or kept is None else _hidden_encoding(head, kept),
        notes=tuple(probe.notes),
    )


def kept_head(head: "Head", num_classes: int) -> HeadArrays:
    """The head as it is stored: as it is where numpy has its type, else in float32."""
    import torch

    def kept(values: "Tensor") -> np.ndarray[Any, Any]:
        values = values.detach().cpu()
        array: np.ndarray[Any, Any] = (values if values.dtype == torch.float16 else values.float()).numpy()
        return array

    head = head.cut(num_classes)
    return HeadArrays(kept(head.weight_CW), None if head.bias_C is None else kept(head.bias_C))


def _hidden_encoding(head: "Head", kept: HeadArrays) -> Hidden:
    return Hidden(
        width=head.width,
        scale=float(head.scale),
        soft_cap=None if head.soft_cap is None else float(head.soft_cap),
        has_bias=kept.bias_C is not None,
        head_sha256=head_digest(kept),
    )


def _vocabulary(question: TeacherQuestion, num_outputs: int) -> int:
    """Entries of the vocabulary: as the tokenizer or an option says, else all that the teacher gives."""
    known = question.vocab_size
    if known is None:
        return num_outputs
    if known > num_outputs:
        raise TeacherError(
            f"{question.where}: expected a teacher of its vocabulary, {known} tokens, got one of {num_outputs}; "
            "give the teacher's own tokenizer"
        )
    return known


def _check_classes(corpus: Corpus, num_classes: int) -> None:
    """Refuse a teacher whose classes can't be those of the corpus."""
    where, names, hard_targets = f"corpus '{corpus.path}'", corpus.class_names, corpus.hard_targets
    if names is not None and len(names) != num_classes:
        raise TeacherError(
            f"{where}: expected as many classes as the teacher has ({num_classes}), got {len(names)} ({names[0]!r} to "
            f"{names[-1]!r}); give the teacher of this corpus, or a corpus of its classes; where the folders are no "
            "classes of the teacher: --labels none"
        )
    if hard_targets is not None and int(hard_targets.max()) >= num_classes:
        row = int((hard_targets >= num_classes).argmax())
        raise CorpusError(
            f"{where}: row {row} ({corpus.key(row)!r}): expected a hard target below {num_classes}, the teacher's "
            f"classes, got {hard_targets[row]}; give the labels of its classes, or the teacher of these, or ignore "
            "them: --labels none"
        )


def _provenance(source: Source, device: str, batch_size: int) -> dict[str, Any]:
    """When, on what and with which software: no paths and no names of machines."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": [Path(path).name for path in source.config.models],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS_OF},
        "device": device,
        "batch_size": batch_size,
        "compile": source.config.compile,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _begun_with(manifest: Manifest, name: str) -> int | None:
    value = manifest.provenance.get(name)
    return value if isinstance(value, int) and value >= 1 else None
