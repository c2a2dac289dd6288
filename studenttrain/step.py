"""One optimizer step on stored targets: rows to the device, forward, losses, backward, update.

Legend: N rows of a batch, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.arrays import Array
from storage.manifest import Manifest
from studenttrain.checks import Objective
from studenttrain.distributed import World
from studenttrain.learner import Learner, forward_errors
from studenttrain.loss import SoftTargets, build_targets, hard_loss, soft_loss
from studenttrain.precision import Precision, autocast
from studenttrain.stream import StudentBatch


@dataclass(frozen=True)
class LearningBatch:
    """A rank's rows of a batch, on the device: only those that can be learned from.

    Attributes:
        inputs: float32 (N, ...).
        targets: soft ones, or None where alpha is 0.
        hard_targets_N: int64, -1 where unknown; or None where alpha is 1.
    """

    inputs: Tensor
    targets: SoftTargets | None
    hard_targets_N: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class Counts:
    """Rows of one optimizer step, over all its batches and ranks.

    Attributes:
        rows: that are learned from.
        hard: of these, rows with a known hard target.
    """

    rows: int
    hard: int


def count_rows(group: Sequence[StudentBatch], objective: Objective, hard_targets: NDArray[np.int32] | None) -> Counts:
    """Rows of a group of batches, of this rank alone."""
    rows = hard = 0
    for batch in group:
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
) -> LearningBatch:
    """A batch on the device. Rows that the teacher refused are left out, whatever is minimised.

    Args:
        batch: as the stream gives it.
        manifest: of the store.
        objective: what is minimised.
        hard_targets: of the whole corpus, where the store has none.
        device: of the student.
    """
    refused = None if batch.valid_N.all() else np.flatnonzero(batch.valid_N)

    def moved(values: Array) -> Tensor:
        return torch.from_numpy(values if refused is None else values[refused]).to(device, non_blocking=True)

    targets = hard_targets_N = None
    if objective.is_soft:
        arrays = {name: moved(values) for name, values in batch.arrays.items()}
        targets = build_targets(manifest, arrays, objective.temperature, device)
    if objective.is_hard:
        hard_targets_N = moved(hard_targets_of(batch, hard_targets)).long()
    return LearningBatch(moved(batch.inputs), targets, hard_targets_N)


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
    with autocast(precision, batch.inputs.device):
        logits_NC = learner.trained(batch.inputs)
    soft = hard = torch.zeros((), device=batch.inputs.device)
    if batch.targets is not None:
        soft = soft_loss(objective.loss, logits_NC, batch.targets).sum() / counts.rows
    if batch.hard_targets_N is not None:
        hard = hard_loss(logits_NC, batch.hard_targets_N).sum() / max(1, counts.hard)
    return soft, hard
