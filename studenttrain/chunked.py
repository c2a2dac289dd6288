"""The losses of `studenttrain.loss` from hidden states and a head: logits exist for a chunk of rows at a time.

Legend: R rows (flat positions), r of them that take part, n rows of a chunk, C classes, W hidden width.

With 150,000 classes, the logits of a batch and what autograd keeps beside them are many times what the model takes. But
a loss of a row depends on few numbers: its logits at the target's entries, and a logsumexp or two. So a chunk's logits
are made, reduced, turned into their own gradient, multiplied into the gradients of the hidden states and of the head,
and overwritten by the next chunk's. What is left is one gradient of the head, however many chunks there are.

That happens in the forward pass where the caller says what the losses are multiplied with, and takes three products
with the head, as the plain way does. Otherwise it happens in the backward pass, and the chunk's logits are made twice.
Source: fused linear cross entropy of Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from studenttrain.chunk_losses import chunk_losses, num_scratch
from studenttrain.heads import Head
from studenttrain.loss import check_fits, rows_at_once
from studenttrain.targets import SoftTargets, take_rows

WEIGHT_TOLERANCE = 1e-4  # relative; float32 keeps 1e-7, and a caller has a few roundings


def chunked_losses(
    head: Head,
    hidden_RW: Tensor,
    targets: SoftTargets | None,
    name: str | None,
    hard_targets_R: Tensor | None = None,
    *,
    weights: tuple[float, float] | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The soft and the hard loss of each row, (R,) and (R,), as `soft_loss` and `hard_loss` give them of the logits.

    Under autocast the products with the head run in its type, and the losses in float32. Rows that have neither target
    take part in nothing.

    Args:
        head: of the student; gradients reach its weight and its bias.
        hidden_RW: the student's hidden states, float.
        targets: of the same rows, or None: the soft losses are then 0.
        name: of the soft loss; not looked at without targets.
        hard_targets_R: true classes, -1 where unknown, or None: the hard losses are then 0.
        weights: of each soft and each hard loss in what is minimised, 0 or above, up to a factor that both share. The
            gradients are then computed along with the losses, which saves a product with the head; for this sum alone.
        chunk_bytes: about what the float32 logits of a chunk take; None: what suits the device.

    Raises:
        ValueError: there are no targets at all, no such loss on these, or a weight is not a number that can be used;
            when going backward: something else than the weighted sum is minimised.
    """
    if targets is None and hard_targets_R is None:
        raise ValueError("targets: expected soft ones, hard ones or both, got neither; give some")
    if weights is not None and not (min(weights) >= 0 and 0 < max(weights) < math.inf):
        raise ValueError(f"weights: expected two numbers, none below 0 and one above, got {weights}; mend them")
    counted_R = torch.zeros(len(hidden_RW), dtype=torch.bool, device=hidden_RW.device)
    if targets is not None:
        assert name is not None
        check_fits(name, targets)
        counted_R |= targets.valid_N
    if hard_targets_R is not None:
        counted_R |= hard_targets_R >= 0
    rows_r = counted_R.nonzero()[:, 0]
    device_type, is_whole = hidden_RW.device.type, len(rows_r) == len(hidden_RW)
    is_autocast = torch.is_autocast_enabled(device_type)
    task = _Task(
        scale=head.scale,
        soft_cap=head.soft_cap,
        dtype=torch.get_autocast_dtype(device_type) if is_autocast else hidden_RW.dtype,
        targets=targets,
        name=name or "",
        hard_targets_R=hard_targets_R,
        rows_r=None if is_whole else rows_r,
        chunk_rows=rows_at_once(head.num_classes, hidden_RW.device, chunk_bytes),
        weights=None if weights is None else (weights[0] / max(weights), weights[1] / max(weights)),
        has_grad=torch.is_grad_enabled(),
    )
    hidden_rW = hidden_RW if is_whole else hidden_RW[rows_r]
    soft_r, hard_r = _Chunked.apply(hidden_rW, head.weight_CW, head.bias_C, task)  # type: ignore[no-untyped-call]
    if is_whole:
        return soft_r, hard_r
    zeros_R = soft_r.new_zeros(len(hidden_RW))
    return zeros_R.index_copy(0, rows_r, soft_r), zeros_R.index_copy(0, rows_r, hard_r)


@dataclass(frozen=True)
class _Task:
    """All that the losses depend on beside the hidden states and the head's weights."""

    scale: float
    soft_cap: float | None
    dtype: torch.dtype  # of the products with the head
    targets: SoftTargets | None
    name: str
    hard_targets_R: Tensor | None  # noqa: N815
    rows_r: Tensor | None  # that take part, of R; None: all
    chunk_rows: int
    weights: tuple[float, float] | None  # the larger one is 1
    has_grad: bool

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of the logits that are reduced, and of the losses."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def targets_of(self, rows: slice) -> tuple[SoftTargets | None, Tensor | None]:
        """The targets of a chunk; `rows` are numbered among those that take part."""
        chosen = rows if self.rows_r is None else self.rows_r[rows]
        targets = None if self.targets is None else take_rows(self.targets, chosen)
        return targets, None if self.hard_targets_R is None else self.hard_targets_R[chosen].long()


class _Chunked(torch.autograd.Function):
    """Losses of rows that all take part, with respect to their hidden states, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, hidden_rW: Tensor, weight_CW: Tensor, bias_C: Tensor | None, task: _Task) -> Any:
        needs = ctx.needs_input_grad[:3] if task.has_grad and task.weights is not None else (False,) * 3
        pieces = _Pieces(hidden_rW, weight_CW, bias_C, task, needs)
        soft_r, hard_r = hidden_rW.new_zeros(2, len(hidden_rW), dtype=task.loss_dtype)
        with torch.autocast(hidden_rW.device.type, enabled=False):
            for rows in pieces.chunks():
                ones_n = soft_r.new_ones(rows.stop - rows.start)
                weights = [weight * ones_n for weight in task.weights] if task.weights and any(needs) else None
                soft_r[rows], hard_r[rows] = pieces.losses(rows, weights)
        ctx.task = task
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden_rW, weight_CW, bias_C)]
        if any(needs):
            ctx.grads = pieces.grads
        else:
            ctx.save_for_backward(hidden_rW, weight_CW, bias_C)
        return soft_r, hard_r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_soft_r: Tensor, grad_hard_r: Tensor) -> Any:
        task: _Task = ctx.task
        if task.weights is None:
            hidden_rW, weight_CW, bias_C = ctx.saved_tensors
            pieces = _Pieces(hidden_rW, weight_CW, bias_C, task, ctx.needs_input_grad[:3])
            with torch.autocast(hidden_rW.device.type, enabled=False):
                for rows in pieces.chunks():
                    pieces.losses(rows, [grad_soft_r[rows], grad_hard_r[rows]])
            grads = pieces.grads
        else:
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                raise RuntimeError("chunked losses: expected one backward pass, got a second one; leave out weights")
            factor = _common_factor(grad_soft_r, grad_hard_r, task.weights)
            grads = [None if grad is None else grad.mul_(factor) for grad in grads]
        found = [None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *found, None


def _common_factor(grad_soft_r: Tensor, grad_hard_r: Tensor, weights: tuple[float, float]) -> Tensor:
    """What the weighted sum that the gradients were computed for is multiplied with in what is minimised.

    Raises:
        ValueError: it is another sum.
    """
    grads_2r = torch.stack([grad_soft_r, grad_hard_r])
    factor = grads_2r[weights.index(1.0), :1].sum()  # 0 where there is no row
    distance_2r = (grads_2r - factor * grads_2r.new_tensor(weights)[:, None]).abs()
    if (distance_2r > WEIGHT_TOLERANCE * factor.abs()).any():
        raise ValueError(
            f"weights: expected {weights[0]:g} of each soft and {weights[1]:g} of each hard loss, as given, to be "
            "minimised, got another sum; give the weights that are used, or none"
        )
    return factor


class _Pieces:
    """The head's product, the losses of its chunks, and the gradients, in memory that every chunk uses again."""

    def __init__(
        self, hidden_rW: Tensor, weight_CW: Tensor, bias_C: Tensor | None, task: _Task, needs: Sequence[bool]
    ) -> None:
        self.task, self.hidden_rW = task, hidden_rW
        self.weight_CW = weight_CW.to(task.dtype)
        self.bias_C = None if bias_C is None else bias_C.to(task.dtype)
        # fresh memory costs as much as the arithmetic: everything of a chunk's size is taken once
        size_nC = (min(task.chunk_rows, len(hidden_rW)), len(weight_CW))
        self.product_nC = weight_CW.new_empty(size_nC, dtype=task.dtype)
        is_same = task.dtype == task.loss_dtype
        self.logits_nC = self.product_nC if is_same else weight_CW.new_empty(size_nC, dtype=task.loss_dtype)
        scratch = num_scratch(task.name, task.targets, task.hard_targets_R)
        self.scratch = [torch.empty_like(self.logits_nC) for _ in range(scratch)]
        self.tanh_nC = None if task.soft_cap is None else torch.empty_like(self.logits_nC)
        # float32 or better, whatever the weights are: many chunks are added up
        self.grads = [
            torch.zeros_like(value, dtype=task.loss_dtype) if need and value is not None else None
            for value, need in zip((hidden_rW, weight_CW, bias_C), needs, strict=True)
        ]

    def chunks(self) -> list[slice]:
        """The chunks of rows, in order."""
        num_rows, step = len(self.hidden_rW), self.task.chunk_rows
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]

    def losses(self, rows: slice, weights: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Soft and hard losses of a chunk; the gradients of their sum, each times its weight, are added to `grads`."""
        logits_nC = self._logits(rows)
        targets, hard_targets_n = self.task.targets_of(rows)
        scratch = [buffer_nC[: len(logits_nC)] for buffer_nC in self.scratch]
        soft_n, hard_n, grad_nC = chunk_losses(self.task.name, logits_nC, targets, hard_targets_n, weights, scratch)
        if grad_nC is not None:
            self._add_gradient(rows, grad_nC)
        return soft_n, hard_n

    def _logits(self, rows: slice) -> Tensor:
        """`Head.logits` of a chunk, float32 or better, its linear layer in the dtype of products."""
        task, hidden_nW = self.task, self.hidden_rW[rows].to(self.task.dtype)
        product_nC = self.product_nC[: len(hidden_nW)]
        if self.bias_C is None:
            torch.mm(hidden_nW, self.weight_CW.t(), out=product_nC)
        else:
            torch.addmm(self.bias_C, hidden_nW, self.weight_CW.t(), out=product_nC)
        logits_nC = self.logits_nC[: len(hidden_nW)]
        if logits_nC.dtype != product_nC.dtype:
            logits_nC.copy_(product_nC)
        if task.scale != 1:
            logits_nC.mul_(task.scale)
        if self.tanh_nC is not None and task.soft_cap is not None:
            tanh_nC = torch.tanh(logits_nC.div_(task.soft_cap), out=self.tanh_nC[: len(hidden_nW)])
            torch.mul(tanh_nC, task.soft_cap, out=logits_nC)
        return logits_nC

    def _add_gradient(self, rows: slice, grad_nC: Tensor) -> None:
        """Carry the gradient of a chunk's logits, which is overwritten, through the head."""
        task, hidden_nW = self.task, self.hidden_rW[rows].to(self.task.dtype)
        if self.tanh_nC is not None:
            tanh_nC = self.tanh_nC[: len(grad_nC)]
            grad_nC.mul_(tanh_nC.square_().neg_().add_(1))
        if task.scale != 1:
            grad_nC.mul_(task.scale)
        if grad_nC.dtype != task.dtype:
            grad_nC = self.product_nC[: len(grad_nC)].copy_(grad_nC)
        grad_hidden_rW, grad_weight_CW, grad_bias_C = self.grads
        if grad_hidden_rW is not None:
            grad_hidden_rW[rows] = grad_nC @ self.weight_CW
        if grad_weight_CW is not None and grad_weight_CW.dtype == task.dtype:
            grad_weight_CW.addmm_(grad_nC.t(), hidden_nW)
        elif grad_weight_CW is not None:
            grad_weight_CW += grad_nC.t() @ hidden_nW
        if grad_bias_C is not None:
            grad_bias_C += grad_nC.sum(0, dtype=grad_bias_C.dtype)
