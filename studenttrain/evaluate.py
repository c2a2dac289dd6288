"""How well a student does on a corpus: top-1, agreement with the teacher, NLL and calibration error.

Legend: N batch, C classes, R flat rows: N, or the positions of all sequences.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.arrays import STATUS_OK
from storage.corpus import Batch, Corpus, Preprocess, check_digests, read_batch
from storage.errors import CorpusError
from storage.reader import Store
from studenttrain.answers import answers, sequence_targets
from studenttrain.distributed import World
from studenttrain.figures import REFUSED, SAMPLES, EvalFigures, Tally
from studenttrain.precision import Precision, autocast
from studenttrain.top1 import stored_top1

DEFAULT_BATCH_SIZE = 512
BATCH_POSITIONS = 8192  # of sequences together, whatever is asked for
TEACHER_BYTES = 32 << 20  # of log-probabilities that are looked at together


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    preprocess: Preprocess,
    world: World,
    *,
    num_classes: int | None = None,
    store: Store | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    precision: Precision = "fp32",
    readers: int = 1,
    advance: Callable[[int], None] | None = None,
    hard_targets: NDArray[np.int32] | None = None,
) -> EvalFigures:
    """What a student does on all samples of a corpus, in one pass; each rank takes its share of the batches.

    Of sequences every position counts as a sample whose hard target is the next token of its document.

    Args:
        model: the student, on the world's device; it is left in the mode that it came in.
        corpus: what it is tried on; figures against hard targets need its hard targets.
        preprocess: how a sample becomes the student's input.
        world: the ranks that evaluate together, each with the same arguments.
        num_classes: of the student; what its logits have behind them is cut off. None keeps all.
        store: targets stored from this corpus, for the agreement with the teacher.
        batch_size: samples of one batch of a rank, at least 1.
        precision: of the student's forward pass.
        readers: threads that read samples, at least 1.
        advance: called with the number of samples that each batch brought.
        hard_targets: of each sample; None takes those of the corpus, where it has any.

    Raises:
        CorpusMismatchError: a sample is not the one that the store's row was made from.
        CorpusError: a hard target is not one of the student's classes.
    """
    tally, was_training = Tally(), model.training
    stated = corpus.hard_targets if hard_targets is None else hard_targets
    hard_targets_N = None if stated is None else torch.from_numpy(stated.astype(np.int64))
    is_tokens = corpus.sample_kind == "tokens"
    if is_tokens:
        batch_size = max(1, min(batch_size, BATCH_POSITIONS // preprocess.shape[1]))
    starts = range(world.rank * batch_size, corpus.num_samples, world.size * batch_size)
    batches = [np.arange(start, min(start + batch_size, corpus.num_samples)) for start in starts]
    model.eval()
    try:
        with torch.inference_mode():
            for batch in read_ahead(corpus, batches, preprocess, readers):
                rows_N = batch.rows_N
                teacher_top1_N = None if store is None else _checked_top1(store, corpus, batch)
                good = [position for position in range(len(rows_N)) if position not in batch.errors]
                tally.add_refused(len(batch.errors))
                if advance is not None:
                    advance(len(rows_N))
                if not good:
                    continue
                inputs = torch.from_numpy(batch.inputs[good])
                if is_tokens:
                    known_R: Tensor | None = sequence_targets(inputs)
                else:
                    known_R = None if hard_targets_N is None else hard_targets_N[torch.from_numpy(rows_N[good])]
                top1_R = None if teacher_top1_N is None else teacher_top1_N.view(len(rows_N), -1)[good].flatten()
                with autocast(precision, world.device):
                    start = 0
                    for logits_RC in answers(model, inputs.to(world.device), num_classes):
                        part = slice(start, start + len(logits_RC))
                        start = part.stop
                        _check_known(known_R, logits_RC.shape[1], corpus)
                        _count(tally, logits_RC, _part(known_R, part), _part(top1_R, part), is_tokens)
    finally:
        model.train(was_training)
    return tally.over(world).figures()


def _check_known(known_R: Tensor | None, num_classes: int, corpus: Corpus) -> None:
    """Refuse hard targets that are no classes of the student."""
    if known_R is not None and int(known_R.max()) >= num_classes:
        raise CorpusError(
            f"{corpus.path}: expected hard targets below the student's {num_classes} classes, got "
            f"{int(known_R.max())}; give the corpus, or the labels, of these classes"
        )


def _part(values_R: Tensor | None, part: slice) -> Tensor | None:
    return None if values_R is None else values_R[part]


def _count(tally: Tally, logits_RC: Tensor, known_R: Tensor | None, top1_R: Tensor | None, only_known: bool) -> None:
    """Count some flat rows; of sequences only those whose target is in their document."""
    if only_known:
        assert known_R is not None
        counted_R = known_R >= 0
        logits_RC, known_R = logits_RC[counted_R.to(logits_RC.device)], known_R[counted_R]
        top1_R = None if top1_R is None else top1_R[counted_R]
    tally.add(logits_RC, known_R, top1_R)


def evaluate_teacher(store: Store, hard_targets: NDArray[np.int32]) -> EvalFigures | None:
    """What the stored targets themselves do against hard targets at T = 1; None where T = 1 is not exact in the store.

    None too for draws, which are no distribution to be held against a target, and for hidden states, whose logits would
    all have to be computed again.

    Args:
        store: its sealed rows are read.
        hard_targets: int32 (num_rows,), -1 where unknown.
    """
    manifest, tally = store.manifest, Tally()
    exact = manifest.encoding.exact_temperatures(manifest.temperatures)
    if (exact is not None and 1.0 not in exact) or manifest.encoding.name not in ("dense", "topk"):
        return None
    names = [spec.name for spec in manifest.arrays if spec.name not in ("sample_digest", "hard_target", "entropy")]
    step = max(1, TEACHER_BYTES // (8 * manifest.num_classes))
    for shard in store.sealed_shards():
        first, end = store.layout.shard_bounds(shard)
        for start in range(first, end, step):
            stop = min(start + step, end)
            arrays = store.read(names, start, stop)
            good_N = arrays["status"] == STATUS_OK
            arrays = {name: values[good_N] for name, values in arrays.items()}
            tally.sums[SAMPLES] += int(good_N.sum())
            tally.sums[REFUSED] += int((~good_N).sum())
            _add_teacher(tally, store, arrays, hard_targets[start:stop][good_N].astype(np.int64))
    return tally.figures()


def _add_teacher(tally: Tally, store: Store, arrays: dict[str, Any], hard_targets_N: NDArray[np.int64]) -> None:
    """Count the teacher's answers in some rows."""
    if not len(hard_targets_N):
        return
    manifest = store.manifest
    logprobs = manifest.encoding.logprobs(arrays, 1.0, manifest.temperatures)
    hard_N = torch.from_numpy(hard_targets_N)
    if "ids" in arrays:
        top1_N, confidence_N = arrays["ids"][:, 0].astype(np.int64), np.exp(logprobs[:, 0])
        missing_N = np.full(len(hard_targets_N), np.nan, np.float32)
        nll_N = -arrays.get("hard_target_logprob", missing_N).astype(np.float32)
    else:
        top1_N, confidence_N = logprobs.argmax(1), np.exp(logprobs.max(1))
        nll_N = -np.take_along_axis(logprobs, np.maximum(hard_targets_N, 0)[:, None], 1)[:, 0]
    tally.add_answers(torch.from_numpy(top1_N), torch.from_numpy(confidence_N), torch.from_numpy(nll_N), hard_N)


def _checked_top1(store: Store, corpus: Corpus, batch: Batch) -> Tensor:
    """The stored top-1 of a batch of consecutive rows, once its samples are found to be those of the store."""
    start, stop = int(batch.rows_N[0]), int(batch.rows_N[-1]) + 1
    sealed = store.sealed_shards()
    for shard, first, end in store.layout.split(start, stop):
        if shard in sealed:
            stored_N = store.read(["sample_digest"], first, end)["sample_digest"]
            place = slice(first - start, end - start)
            check_digests(stored_N, batch.digests_N[place], batch.rows_N[place], corpus, store.path)
    return torch.from_numpy(stored_top1(store, start, stop))


def read_ahead(
    corpus: Corpus, batches: list[NDArray[np.int64]], preprocess: Preprocess, readers: int
) -> Iterator[Batch]:
    """The batches in order, the next one read while this one is used.

    Args:
        corpus: what is read.
        batches: rows of each.
        preprocess: how a sample becomes an input.
        readers: threads that read samples, at least 1.
    """
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(readers))
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(ahead.shutdown, wait=False, cancel_futures=True)
        pending = [ahead.submit(read_batch, corpus, rows_N, preprocess, pool) for rows_N in batches[:2]]
        for following in range(2, len(batches) + 2):
            if not pending:
                return
            batch = pending.pop(0).result()
            if following < len(batches):
                pending.append(ahead.submit(read_batch, corpus, batches[following], preprocess, pool))
            yield batch
