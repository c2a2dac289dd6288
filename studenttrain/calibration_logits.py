"""A student's logits of a whole corpus, computed once and gone through as often as a calibration needs.

Legend: N batch, R distributions (N, or positions of sequences), C classes, K kept entries.

Memory is bounded: blocks beyond `MEMORY_BYTES` go to a file without a name beside the result, which is gone with the
process, and are read back one at a time.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.backends.files import clear_os_errors
from storage.corpus import Batch, Corpus, Preprocess, check_digests
from storage.errors import CorpusError, StudentError
from storage.reader import Store
from studenttrain.answers import answers, sequence_targets
from studenttrain.evaluate import read_ahead
from studenttrain.heads import Head
from studenttrain.targets import (
    DenseTargets,
    HiddenTargets,
    SampleTargets,
    SoftTargets,
    TopKTargets,
    build_targets,
    take_rows,
    target_arrays,
    target_head,
)

MEMORY_BYTES = 256 << 20

Block = Mapping[str, Tensor]


class Spool:
    """Blocks of tensors, written once and read in order as often as one likes. A context manager.

    Args:
        folder: where what does not fit into memory goes.
        memory_bytes: of the blocks that stay in memory.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._left = folder, memory_bytes
        self._blocks: list[Block | list[tuple[str, int, torch.dtype, tuple[int, ...]]]] = []
        self._file: Any = None

    @property
    def is_on_disk(self) -> bool:
        """Whether some of the blocks are in a file."""
        return self._file is not None

    def add(self, block: Block) -> None:
        """Append a block.

        Raises:
            OutOfSpaceError: the disk is full.
        """
        num_bytes = sum(value.numel() * value.element_size() for value in block.values())
        if self._file is None and num_bytes <= self._left:
            self._left -= num_bytes
            self._blocks.append({name: value.clone() for name, value in block.items()})
            return
        places = []
        with clear_os_errors(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by __exit__
            for name, value in block.items():
                places.append((name, self._file.tell(), value.dtype, tuple(value.shape)))
                self._file.write(value.contiguous().numpy().data.cast("B") if value.numel() else b"")
        self._blocks.append(places)

    def blocks(self) -> Iterator[Block]:
        """The blocks in order."""
        if self._file is not None:
            with clear_os_errors(self._folder):
                self._file.flush()
        for block in self._blocks:
            if isinstance(block, Mapping):
                yield block
            else:
                yield {name: self._read(offset, dtype, shape) for name, offset, dtype, shape in block}

    def _read(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        value = torch.empty(shape, dtype=dtype)
        if value.numel():
            data = os.pread(self._file.fileno(), value.numel() * value.element_size(), offset)
            value.flatten().view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return value

    def close(self) -> None:
        """Give memory and file back."""
        self._blocks.clear()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Gathered:
    """What a pass over a corpus saw.

    Attributes:
        num_samples: samples that were looked at.
        num_refused: of these, those that could not be decoded.
        num_distributions: logits that were kept: one a sample, or of sequences one a position with a target.
        digest: sha256 of the samples' digests in order.
        inputs: of a few samples.
    """

    num_samples: int
    num_refused: int
    num_distributions: int
    digest: str
    inputs: Tensor


class Targets:
    """The targets that a temperature is fitted to: hard ones of the corpus, or soft ones of a store.

    Args:
        corpus: whose samples they belong to.
        store: of soft targets at T = 1, made from these samples; None takes the corpus's hard targets, or the next
            tokens of sequences.
    """

    def __init__(self, corpus: Corpus, store: Store | None) -> None:
        self._corpus, self._store = corpus, store
        self._head: Head | None = None
        if store is not None:
            head, encoding = store.head(), store.manifest.encoding
            if head is not None:
                self._head = target_head(encoding, head)  # type: ignore[arg-type]
        self._hard = None if store is not None or corpus.hard_targets is None else corpus.hard_targets

    def of_batch(self, batch: Batch) -> "SoftTargets | Tensor":
        """The targets of all samples of a batch of ascending rows: soft ones, or int64 (R,), -1 where unknown."""
        if self._store is None:
            if self._corpus.sample_kind == "tokens":
                return sequence_targets(torch.from_numpy(batch.inputs))
            assert self._hard is not None
            return torch.from_numpy(self._hard[batch.rows_N].astype(np.int64))
        manifest, mask_NP = self._store.manifest, None
        arrays = read_rows(self._store, target_arrays(manifest), batch.rows_N)
        if manifest.sequences is not None and "position_ids" not in arrays:
            mask_NP = batch.inputs[:, 1, 1:] != 0
        return build_targets(manifest, arrays, 1.0, mask_NP=mask_NP, head=self._head)


def read_rows(store: Store, names: Sequence[str], rows_N: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Ascending rows of some arrays of a store; those of shards that are not sealed hold the fill value."""
    specs, sealed = {spec.name: spec for spec in store.manifest.arrays}, set(store.sealed_shards())
    ranges, positions, place = [], [], 0
    for run in np.split(rows_N, np.flatnonzero(np.diff(rows_N) != 1) + 1):
        for shard, first, end in store.layout.split(int(run[0]), int(run[-1]) + 1):
            if shard in sealed:
                ranges.append((first, end))
                positions.append(np.arange(place, place + end - first))
            place += end - first
    arrays = {name: specs[name].full(len(rows_N)) for name in names}
    if ranges:
        for name, values in arrays.items():
            store.read_scattered(name, ranges, values, np.concatenate(positions))
    return arrays


def gather(
    model: nn.Module,
    corpus: Corpus,
    preprocess: Preprocess,
    spool: Spool,
    *,
    rows_N: NDArray[np.int64],
    num_classes: int,
    store: Store | None,
    targets: Targets | None,
    device: torch.device,
    batch_size: int,
    readers: int,
    advance: Callable[[int], None],
) -> Gathered:
    """Put a student's logits of a corpus's samples into a spool, float32, the largest of each row 0.

    Args:
        model: the student, on the device, in evaluation mode.
        corpus: its hard targets are looked at only by `targets`.
        preprocess: how a sample becomes the student's input.
        spool: gets blocks as `calibration_fit` takes them.
        rows_N: of the samples, ascending.
        num_classes: of the student; what its logits have behind them is cut off.
        store: that the samples must be those of; None where there is none.
        targets: that a temperature is fitted to; None where none is.
        device: of the model.
        batch_size: samples of a batch, at least 1.
        readers: threads that read samples, at least 1.
        advance: called with the number of samples that each batch brought.

    Raises:
        StudentError: a logit is not finite.
        CorpusError: no sample can be decoded, or a hard target is none of the student's classes.
        CorpusMismatchError: a sample is not the one that the store's row was made from.
    """
    batches = [rows_N[start : start + batch_size] for start in range(0, len(rows_N), batch_size)]
    digest, num_refused, num_distributions = hashlib.sha256(), 0, 0
    kept: list[Tensor] = []
    with torch.inference_mode():
        for batch in read_ahead(corpus, batches, preprocess, readers):
            digest.update(batch.digests_N.astype("<u8").tobytes())
            if store is not None:
                stored_N = read_rows(store, ["sample_digest"], batch.rows_N)["sample_digest"]
                check_digests(stored_N, batch.digests_N, batch.rows_N, corpus, store.path)
            said = None if targets is None else targets.of_batch(batch)
            good = [position for position in range(len(batch.rows_N)) if position not in batch.errors]
            num_refused += len(batch.errors)
            advance(len(batch.rows_N))
            if not good:
                continue
            inputs = torch.from_numpy(batch.inputs[good])
            if not kept:
                kept.append(inputs[:4].clone())
            keep_R = _counted(inputs, corpus)
            rows_R = _flat_rows(good, len(keep_R) // len(good))
            start = 0
            for logits in answers(model, inputs.to(device), num_classes):
                logits_RC = logits.float().cpu()[:, :num_classes]
                part = slice(start, start + len(logits_RC))
                start = part.stop
                block = _block(logits_RC, keep_R[part], rows_R[part], said, corpus, num_classes)
                num_distributions += len(block["logits"])
                spool.add(block)
    if not num_distributions:
        raise CorpusError(
            f"corpus '{corpus.path}': expected samples to calibrate on, got {len(rows_N)} of which none can be used; "
            "give another corpus"
        )
    return Gathered(len(rows_N), num_refused, num_distributions, digest.hexdigest(), kept[0])


def _counted(inputs: Tensor, corpus: Corpus) -> Tensor:
    """Which flat rows count, bool (R,): all samples; of sequences the positions whose next token is of the document."""
    if corpus.sample_kind == "tokens":
        return sequence_targets(inputs) >= 0
    return torch.ones(len(inputs), dtype=torch.bool)


def _flat_rows(good: list[int], num_positions: int) -> Tensor:
    """Flat rows of the positions in a batch that were decoded."""
    return (torch.tensor(good)[:, None] * num_positions + torch.arange(num_positions)).flatten()


def _block(
    logits_RC: Tensor,
    keep_R: Tensor,
    rows_R: Tensor,
    said: "SoftTargets | Tensor | None",
    corpus: Corpus,
    num_classes: int,
) -> dict[str, Tensor]:
    """The flat rows that count, as a block of the spool."""
    if not bool(logits_RC.isfinite().all()):
        raise StudentError(
            f"student: expected finite logits, got others on the corpus '{corpus.path}'; give another student, or a "
            "corpus that it can take"
        )
    logits_RC = (logits_RC - logits_RC.amax(1, keepdim=True))[keep_R]
    rows_R = rows_R[keep_R]
    if said is None:
        return {"logits": logits_RC}
    if isinstance(said, Tensor):
        return {"logits": logits_RC, "expected": _expected_of_hard(logits_RC, said[rows_R], corpus, num_classes)}
    return {"logits": logits_RC, **_expected_of_soft(logits_RC, take_rows(said, rows_R))}


def _expected_of_hard(logits_RC: Tensor, hard_R: Tensor, corpus: Corpus, num_classes: int) -> Tensor:
    if int(hard_R.max()) >= num_classes:
        raise CorpusError(
            f"corpus '{corpus.path}': expected hard targets below the student's {num_classes} classes, got "
            f"{int(hard_R.max())}; give the labels of these classes"
        )
    expected_R = logits_RC.double().gather(1, hard_R.clamp(min=0)[:, None])[:, 0]
    return expected_R.masked_fill(hard_R < 0, torch.nan)


def _expected_of_soft(logits_RC: Tensor, targets: SoftTargets) -> dict[str, Tensor]:
    """sum_c p(c) z(c) of each row, and of topk the mass of the tail and the classes that are not in it."""
    wide_RC = logits_RC.double()
    if isinstance(targets, HiddenTargets):
        targets = targets.dense()
    if isinstance(targets, DenseTargets):
        values_RC = targets.values_NC.double().masked_fill(~targets.valid_N[:, None], 0.0)
        expected_R = (values_RC.softmax(1) * wide_RC).sum(1)
        return {"expected": expected_R.masked_fill(~targets.valid_N, torch.nan)}
    ids = targets.ids_NK if isinstance(targets, TopKTargets) else targets.ids_ND
    if isinstance(targets, SampleTargets):
        expected_R = (targets.probs_ND.double() * wide_RC.gather(1, ids.long())).sum(1)
        return {"expected": expected_R.masked_fill(~targets.valid_N, torch.nan)}
    probs_RK = targets.logprobs_NK.double().exp()
    expected_R = (probs_RK * wide_RC.gather(1, ids.long())).sum(1)
    return {
        "expected": expected_R.masked_fill(~targets.valid_N, torch.nan),
        "tail": targets.log_tail_N.double().exp(),
        "ids": ids.int(),
    }


def digest_of(values: NDArray[Any] | None) -> str | None:
    """sha256 of an array's bytes, or None of none."""
    return None if values is None else hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
