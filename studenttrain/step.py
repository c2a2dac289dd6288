"""One optimizer step on stored targets: rows to the device, forward, losses, backward, update.

Legend: N rows of a batch, R flat rows: N, or the positions of N sequences, C classes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.arrays import Array
from storage.manifest import Manifest
from storage.sequences import target_mask
from studenttrain.answers import language_inputs, sequence_targets
from studenttrain.checks import Objective
from studenttrain.chunked import chunked_losses
from studenttrain.distributed import World
from studenttrain.heads import Head, find_head
from studenttrain.language import sequence_logits, sequence_output
from studenttrain.learner import Learner, forward_errors
from studenttrain.loss import SoftTargets, build_targets, hard_loss, soft_loss
from studenttrain.precision import Precision, autocast
from studenttrain.specialists.collapse import OwnClasses
from studenttrain.stream import StudentBatch


@dataclass(frozen=True)
class LearningBatch:
    """A rank's rows of a batch, on the device: only those that can be learned from.

    Attributes:
        inputs: float32 (N, ...); or token ids, int64 (N, P).
        targets: soft ones of the flat rows, or None where alpha is 0.
        hard_targets_R: int64, -1 where unknown or masked; or None where alpha is 1.
        position_ids_NP: of token ids; None of other inputs, and where each row is one document.
        own: the classes of a specialist, which the targets are of; None where they are of all classes.
    """

    inputs: Tensor
    targets: SoftTargets | None
    hard_targets_R: Tensor | None  # noqa: N815
    position_ids_NP: Tensor | None = None  # noqa: N815
    own: OwnClasses | None = None


@dataclass(frozen=True)
class Counts:
    """Flat rows of one optimizer step, over all its batches and ranks.

    Attributes:
        rows: that are learned from; of sequences the positions whose target is in their document.
        hard: of these, rows with a known hard target.
    """

    rows: int
    hard: int


def count_rows(group: Sequence[StudentBatch], objective: Objective, hard_targets: NDArray[np.int32] | None) -> Counts:
    """Rows of a group of batches, of this rank alone."""
    rows = hard = 0
    for batch in group:
        if batch.is_tokens:
            num_positions = int(target_mask(batch.inputs[:, 1])[batch.valid_N].sum())
            rows, hard = rows + num_positions, hard + num_positions
            continue
        rows += int(batch.valid_N.sum())
        if objective.is_hard:
            hard += int((batch.valid_N & (hard_targets_of(batch, hard_targets) >= 0)).sum())
    return Counts(rows, hard)


def hard_targets_of(batch: StudentBatch, hard_targets: NDArray[np.int32] | None) -> NDArray[np.int32]:
    """The hard targets of a batch: those in the store, else those of the corpus."""
    if batch.hard_targets_N is not None:
        return batch.hard_targets_N
    assert hard_targets is not None
    return hard_targets[batch.rows_N]


def load_batch(
    batch: StudentBatch,
    manifest: Manifest,
    objective: Objective,
    hard_targets: NDArray[np.int32] | None,
    device: torch.device,
    head: Head | None = None,
    own: OwnClasses | None = None,
) -> LearningBatch:
    """A batch on the device. Rows that the teacher refused are left out, whatever is minimised.

    Args:
        batch: as the stream gives it.
        manifest: of the store.
        objective: what is minimised.
        hard_targets: of the whole corpus, where the store has none.
        device: of the student.
        head: of the teacher, on the device, where its hidden states are stored.
        own: the classes of a specialist, which the targets are brought to; None leaves them as they are.
    """
    refused = None if batch.valid_N.all() else np.flatnonzero(batch.valid_N)

    def moved(values: Array) -> Tensor:
        return torch.from_numpy(values if refused is None else values[refused]).to(device, non_blocking=True)

    targets = hard_targets_N = None
    if objective.is_soft:
        arrays = {name: moved(values) for name, values in batch.arrays.items()}
        mask_NP = None
        if manifest.sequences is not None and not manifest.sequences.has_tokens:
            mask_NP = moved(target_mask(batch.inputs[:, 1]))
        targets = build_targets(manifest, arrays, objective.temperature, device, mask_NP=mask_NP, head=head)
        targets = targets if own is None else own.soft(targets)
    if batch.is_tokens:
        return _load_sequences(moved(batch.inputs), targets, objective)
    if objective.is_hard:
        hard_targets_N = moved(hard_targets_of(batch, hard_targets)).long()
        hard_targets_N = hard_targets_N if own is None else own.hard(hard_targets_N)
    return LearningBatch(moved(batch.inputs), targets, hard_targets_N, own=own)


def _load_sequences(samples_N2Q: Tensor, targets: SoftTargets | None, objective: Objective) -> LearningBatch:
    """Samples of tokens as a model reads them: the last token of each is a target only."""
    hard_targets_R = sequence_targets(samples_N2Q) if objective.is_hard else None
    token_ids_NP, position_ids_NP = language_inputs(samples_N2Q)
    return LearningBatch(token_ids_NP, targets, hard_targets_R, position_ids_NP)


class BatchLoader:
    """Brings batches to the device, each with those that lie ready behind it.

    After a step nothing of what loading needs is left in the processor's caches, so the first batch takes several times
    as long as those after it.

    Args:
        load: brings one to the device.
        ready: batches that will be asked for soon; those of a stream, as they change.
    """

    def __init__(self, load: Callable[[StudentBatch], LearningBatch], ready: Collection[StudentBatch]) -> None:
        self._load, self._ready = load, ready
        self._loaded: dict[StudentBatch, LearningBatch] = {}

    def __call__(self, batch: StudentBatch) -> LearningBatch:
        """A batch on the device."""
        if batch not in self._loaded:
            self._loaded |= {it: self._load(it) for it in (batch, *self._ready) if it not in self._loaded}
        return self._loaded.pop(batch)


def train_step(
    learner: Learner,
    group: Sequence[StudentBatch],
    load: Callable[[StudentBatch], LearningBatch],
    objective: Objective,
    counts: Counts,
    world: World,
    *,
    lr: float,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
) -> Tensor:
    """One optimizer step, on one batch or on several that are added up.

    Args:
        learner: moved on by a step.
        group: this rank's slices of the batches.
        load: brings a batch to the device.
        objective: what is minimised.
        counts: rows of the group over all ranks, which the losses are divided by.
        world: the ranks that step together.
        lr: learning rate.
        precision: of the forward pass.
        clip_norm: largest norm of the gradient; None clips nothing.

    Returns:
        On the device, (3,): this rank's share of the mean soft loss and of the mean hard one, and the gradient's norm
        where it is clipped, else 0.
    """
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    total = torch.zeros(3, device=world.device)
    for index, batch in enumerate(group):
        with (
            world.without_sync(learner.trained, skip=index + 1 < len(group)),
            forward_errors(learner.step + 1, len(batch.rows_N)),
        ):
            soft, hard = losses_of(learner, load(batch), objective, counts, precision)
            # DDP averages over the ranks, while the shares of all ranks are to be added up
            loss = (objective.alpha * soft + (1 - objective.alpha) * hard) * world.size
            learner.scaler.scale(loss).backward()
        total[0] += soft.detach()
        total[1] += hard.detach()
    if clip_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        total[2] = nn.utils.clip_grad_norm_(learner.student.parameters(), clip_norm)
    learner.update()
    return total


def losses_of(
    learner: Learner, batch: LearningBatch, objective: Objective, counts: Counts, precision: Precision
) -> tuple[Tensor, Tensor]:
    """A batch's shares of the mean soft loss and of the mean hard loss, float32; 0 where one takes no part."""
    if not len(batch.inputs):
        nothing = learner.idle(batch.inputs)
        return nothing, nothing
    if not batch.inputs.dtype.is_floating_point:
        return _losses_of_sequences(learner, batch, objective, counts, precision)
    with autocast(precision, batch.inputs.device):
        logits_NC = learner.trained(batch.inputs)
    soft = hard = torch.zeros((), device=batch.inputs.device)
    if batch.targets is not None:
        soft_logits_NC = logits_NC if batch.own is None else batch.own.soft_logits(logits_NC, batch.targets)
        soft = soft_loss(objective.loss, soft_logits_NC, batch.targets).sum() / counts.rows
    if batch.hard_targets_R is not None:
        hard = hard_loss(logits_NC, batch.hard_targets_R).sum() / max(1, counts.hard)
    return soft, hard


def _losses_of_sequences(
    learner: Learner, batch: LearningBatch, objective: Objective, counts: Counts, precision: Precision
) -> tuple[Tensor, Tensor]:
    """What `losses_of` gives, of token ids: a chunk of positions at a time where the student has a head apart."""
    owner = find_head(learner.student)
    num_rows = max(1, counts.rows)  # every target of the step may be of another document
    with autocast(precision, batch.inputs.device):
        if owner is None:
            logits_NPC = sequence_logits(learner.trained, batch.inputs, batch.position_ids_NP)
            logits_RC = logits_NPC.flatten(0, 1)[:, : learner.num_classes]
        else:
            hidden_NPW = sequence_output(learner.trained, batch.inputs, batch.position_ids_NP, hidden_only=True)
            soft_R, hard_R = chunked_losses(
                owner.output_head().cut(learner.num_classes),
                hidden_NPW.flatten(0, 1),
                batch.targets,
                objective.loss,
                batch.hard_targets_R,
                weights=(objective.alpha / num_rows, (1 - objective.alpha) / max(1, counts.hard)),
            )
    if owner is None:
        nothing = torch.zeros((), device=batch.inputs.device)
        soft_R = nothing if batch.targets is None else soft_loss(objective.loss, logits_RC, batch.targets)
        hard_R = nothing if batch.hard_targets_R is None else hard_loss(logits_RC, batch.hard_targets_R)
    return soft_R.sum() / num_rows, hard_R.sum() / max(1, counts.hard)
