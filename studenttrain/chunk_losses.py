"""The losses of a chunk of rows, and the gradient of its logits, in the memory of a few arrays of their size.

Legend: n rows, C classes, K kept entries or places for drawn ids.

Targets of few entries, and hard ones, depend on a row's logits through a few of them and through a logsumexp or two.
The gradient of a logsumexp is a softmax, which is what computing it leaves behind. So autograd runs over the few
numbers alone, with the formulas of `studenttrain.loss`, and what it says of them is spread over the row.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from studenttrain.loss import bucket_loss, hard_loss, lse_and_softmax, sampled_loss, soft_loss
from studenttrain.targets import DenseTargets, HiddenTargets, SampleTargets, SoftTargets, TopKTargets

FewTargets = TopKTargets | SampleTargets
Losses = tuple[Tensor, Tensor, Tensor | None]


def num_scratch(name: str, targets: SoftTargets | None, hard_targets_n: Tensor | None) -> int:
    """How many arrays of the logits' size `chunk_losses` wants to write to."""
    if isinstance(targets, (DenseTargets, HiddenTargets)) and name != "kl":
        return 0
    return 1 + (hard_targets_n is not None and targets is not None and targets.temperature != 1)


def chunk_losses(
    name: str,
    logits_nC: Tensor,
    targets: SoftTargets | None,
    hard_targets_n: Tensor | None,
    weights: Sequence[Tensor] | None,
    scratch: Sequence[Tensor],
) -> Losses:
    """Soft losses (n,), hard losses (n,), and the gradient (n, C) of their sum, each times its weight.

    Args:
        name: of a soft loss that fits the targets.
        logits_nC: of the student, float32 or better: overwritten.
        targets: of the same rows, or None: the soft losses are then 0.
        hard_targets_n: int64, -1 where unknown, or None: the hard losses are then 0.
        weights: of each soft loss (n,) and of each hard one (n,); None: there is no gradient.
        scratch: as many arrays (n, C) as `num_scratch` says, of the logits' dtype; the gradient may be one of them.
    """
    if isinstance(targets, HiddenTargets):
        targets = targets.dense()
    if isinstance(targets, DenseTargets) and name == "kl":
        return _full_kl(logits_nC, targets, hard_targets_n, weights, scratch)
    if isinstance(targets, DenseTargets):
        return _losses_of_all(name, logits_nC, targets, hard_targets_n, weights)
    return _losses_of_few(name, logits_nC, targets, hard_targets_n, weights, scratch)


def _losses_of_all(
    name: str,
    logits_nC: Tensor,
    targets: DenseTargets,
    hard_targets_n: Tensor | None,
    weights: Sequence[Tensor] | None,
) -> Losses:
    """Losses that depend on every logit: autograd runs over all of the chunk."""

    def losses(logits_nC: Tensor) -> tuple[Tensor, Tensor]:
        soft_n = soft_loss(name, logits_nC, targets)
        return soft_n, torch.zeros_like(soft_n) if hard_targets_n is None else hard_loss(logits_nC, hard_targets_n)

    soft_n, hard_n, grads = _with_gradients(losses, [logits_nC], weights)
    return soft_n, hard_n, grads[0] if grads else None


def _full_kl(
    logits_nC: Tensor,
    targets: DenseTargets,
    hard_targets_n: Tensor | None,
    weights: Sequence[Tensor] | None,
    scratch: Sequence[Tensor],
) -> Losses:
    """The full forward KL, sum p (v - z) / T - lse(v / T) + lse(z / T), and its gradient q - p, times T^2."""
    temperature = targets.temperature
    target_n1, at_target_n = _at_target(logits_nC, hard_targets_n)
    at_one = lse_and_softmax(logits_nC, scratch[1]) if len(scratch) > 1 else ()
    if temperature != 1:
        logits_nC.div_(temperature)
    values_nC = targets.values_NC / temperature
    teacher_lse_n, p_nC = lse_and_softmax(values_nC)
    lse_n, grad_nC = lse_and_softmax(logits_nC, scratch[0])
    # what the teacher rules out counts nothing, whatever the student makes of it
    difference_nC = values_nC.sub_(logits_nC).masked_fill_(p_nC == 0, 0.0)
    loss_n = torch.linalg.vecdot(p_nC, difference_nC) - teacher_lse_n + lse_n
    soft_n = torch.where(targets.valid_N, loss_n * temperature**2, 0.0)
    hard_n = torch.zeros_like(soft_n)
    if hard_targets_n is not None:
        hard_n = torch.where(hard_targets_n >= 0, (at_one[0] if at_one else lse_n) - at_target_n, 0.0)
    if weights is None:
        return soft_n, hard_n, None
    grad_soft_n = torch.where(targets.valid_N, weights[0] * temperature, 0.0)
    grad_hard_n = torch.zeros_like(soft_n)
    if hard_targets_n is not None:
        grad_hard_n = torch.where(hard_targets_n >= 0, weights[1], 0.0)
    grad_nC.mul_((grad_soft_n if at_one else grad_soft_n + grad_hard_n)[:, None])
    grad_nC.addcmul_(p_nC, grad_soft_n[:, None], value=-1)
    if at_one:
        grad_nC.addcmul_(at_one[1], grad_hard_n[:, None])
    return soft_n, hard_n, grad_nC.scatter_add_(1, target_n1, -grad_hard_n[:, None])


def _at_target(logits_nC: Tensor, hard_targets_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hard targets (n, 1), any class where they are unknown, and the logits there (n,)."""
    if hard_targets_n is None:
        hard_targets_n = torch.zeros(len(logits_nC), dtype=torch.int64, device=logits_nC.device)
    target_n1 = hard_targets_n.clamp(min=0)[:, None]
    return target_n1, logits_nC.gather(1, target_n1)[:, 0]


def _losses_of_few(
    name: str,
    logits_nC: Tensor,
    targets: FewTargets | None,
    hard_targets_n: Tensor | None,
    weights: Sequence[Tensor] | None,
    scratch: Sequence[Tensor],
) -> Losses:
    """Losses that depend on a few logits and a logsumexp or two: autograd runs over these."""
    temperature, ids_nK = 1.0 if targets is None else targets.temperature, _ids_of(targets, logits_nC)
    target_n1 = (
        ids_nK.new_zeros((len(logits_nC), 1)) if hard_targets_n is None else hard_targets_n.clamp(min=0)[:, None]
    )
    at_target_n = logits_nC.gather(1, target_n1)[:, 0]
    # logsumexp and softmax at T = 1, where the hard loss can't take those of the soft one
    at_one = lse_and_softmax(logits_nC, scratch[1]) if len(scratch) > 1 else ()
    if temperature != 1:
        logits_nC.div_(temperature)
    entries_nK = logits_nC.gather(1, ids_nK)
    if isinstance(targets, TopKTargets):
        logits_nC.scatter_(1, ids_nK, -math.inf)
    lse_n, grad_nC = lse_and_softmax(logits_nC, scratch[0])

    def losses(entries_nK: Tensor, lse_n: Tensor, at_target_n: Tensor, *lse_at_one: Tensor) -> tuple[Tensor, Tensor]:
        soft_n = _soft_loss_of_few(name, entries_nK, lse_n, targets)
        if hard_targets_n is None:
            return soft_n, torch.zeros_like(soft_n)
        if lse_at_one:
            (lse_n,) = lse_at_one
        elif isinstance(targets, TopKTargets):
            lse_n = torch.cat([entries_nK, lse_n[:, None]], 1).logsumexp(1)
        return soft_n, torch.where(hard_targets_n >= 0, lse_n - at_target_n, 0.0)

    soft_n, hard_n, grads = _with_gradients(losses, [entries_nK, lse_n, at_target_n, *at_one[:1]], weights)
    if not grads:
        return soft_n, hard_n, None
    grad_nC.mul_((grads[1] / temperature)[:, None])
    if at_one:
        grad_nC.addcmul_(at_one[1], grads[3][:, None])
    grad_nC.scatter_add_(1, ids_nK, grads[0] / temperature)
    grad_nC.scatter_add_(1, target_n1, grads[2][:, None])
    return soft_n, hard_n, grad_nC


def _with_gradients(
    losses: Callable[..., tuple[Tensor, Tensor]], values: Sequence[Tensor], weights: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Soft and hard losses of some values, and the gradients of the weighted sum; none without weights."""
    if weights is None:
        return *losses(*values), ()
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        soft_n, hard_n = losses(*leaves)
        total = (weights[0] * soft_n + weights[1] * hard_n).sum()
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    return soft_n.detach(), hard_n.detach(), grads


def _soft_loss_of_few(name: str, entries_nK: Tensor, lse_n: Tensor, targets: FewTargets | None) -> Tensor:
    """The soft loss of the student's logits at the targets' ids, over T, and a logsumexp; 0 without targets."""
    if targets is None:
        return torch.zeros_like(lse_n)
    if isinstance(targets, SampleTargets):
        loss_n = sampled_loss(entries_nK, lse_n, targets)
    else:
        loss_n = bucket_loss(name, entries_nK, lse_n, targets)
    return torch.where(targets.valid_N, loss_n, 0.0)


def _ids_of(targets: FewTargets | None, logits_nC: Tensor) -> Tensor:
    """The ids that the soft loss looks at, (n, K): of top-k each once in a row, (n, 0) without targets."""
    if targets is None:
        return torch.zeros((len(logits_nC), 0), dtype=torch.int64, device=logits_nC.device)
    if isinstance(targets, SampleTargets):
        return targets.ids_ND
    # a row without soft targets may have one id all along, and still take part with a hard target
    some_K = torch.arange(targets.ids_NK.shape[1], device=logits_nC.device)
    return torch.where(targets.valid_N[:, None], targets.ids_NK, some_K)
