"""Soft losses: how far the student's distribution is from the stored one, and the hard loss beside them.

Legend: N rows, C classes, K kept entries, D places for drawn ids, B buckets: the classes of a dense row, or the kept
entries and the tail of a top-k row. p, q: teacher and student at the temperature T.

Every loss is one number a row, in nats, and a soft one is already times T^2, so that its gradient keeps its size while
T changes (Hinton, Vinyals and Dean 2015, section 2). The mean over the rows is the caller's, who counts them across
ranks. A row without targets (quarantined, or masked in its sequence) has the loss 0 and the gradient 0.

Here are the losses of logits that are there; `studenttrain.chunked` computes the same from hidden states, and never has
the logits of more than a few rows. What a student gets of the teacher is in `studenttrain.targets`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from storage.encodings import Encoding
from storage.errors import MismatchError
from studenttrain.targets import (
    DenseTargets,
    HiddenTargets,
    SampleTargets,
    SoftTargets,
    TopKTargets,
    build_targets,
    take_rows,
    target_arrays,
)

__all__ = [
    "COMPARED_LOSSES",
    "LOSSES",
    "TOPK_LOSSES",
    "DenseTargets",
    "HiddenTargets",
    "SampleTargets",
    "SoftTargets",
    "TopKTargets",
    "build_targets",
    "check_loss",
    "default_loss",
    "hard_loss",
    "soft_loss",
    "target_arrays",
    "uses_temperature",
]

# Where the teacher rules a class out (-inf) and the student does not, the reverse KL is infinite. It is taken as if the
# teacher's logit were the lowest of float16, the lowest that a float16 store holds of a finite one.
LOWEST_LOGIT = -65504.0

# Renormalised over the kept entries, the teacher's alone or both: biased, and there only to compare with.
COMPARED_LOSSES = ("truncated", "renormalised")

# The first of each is the default.
DENSE_LOSSES = ("kl", "reverse-kl", "jsd", "mse")
TOPK_LOSSES = ("tail-bucket", "reverse-kl", "jsd", *COMPARED_LOSSES)
SAMPLE_LOSSES = ("sampled-ce",)
LOSSES = tuple(dict.fromkeys(DENSE_LOSSES + SAMPLE_LOSSES + TOPK_LOSSES))

# Logits that a computation in chunks of rows has at once, float32: large enough for matrix products to run at full
# speed, small beside a batch's.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}


def rows_at_once(num_classes: int, device: torch.device, chunk_bytes: int | None = None) -> int:
    """Rows of a chunk whose float32 logits take about `chunk_bytes`, at least 1; None: as much as suits the device."""
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    return max(1, chunk_bytes // (4 * num_classes))


def default_loss(encoding: Encoding) -> str:
    """The soft loss that is exact on an encoding and has the teacher's distribution for its minimum."""
    of_encoding = {"topk": TOPK_LOSSES, "sample": SAMPLE_LOSSES}
    return of_encoding.get(encoding.name, DENSE_LOSSES)[0]


def check_loss(encoding: Encoding, name: str) -> None:
    """Refuse a soft loss that an encoding does not allow.

    Raises:
        MismatchError: it can't be computed from what the encoding keeps; the message says why.
        ValueError: there is no loss of that name.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    if name in encoding.losses:
        return
    if name in SAMPLE_LOSSES:
        reason = "it is made for draws, and here the teacher's own probabilities are kept"
    elif encoding.name == "sample" and name != "mse":
        reason = "it is biased on draws: their shares equal the teacher's probabilities only in the mean"
    elif name in DENSE_LOSSES:
        reason = "it needs the teacher's logits of all classes"
    else:
        reason = "it is made for kept entries and a tail, and here every class is kept"
    allowed = ", ".join(loss for loss in LOSSES if loss in encoding.losses)
    raise MismatchError(
        f"loss: expected one that a {encoding.name} store allows ({allowed}), got {name}; {reason}: use one of them"
    )


def uses_temperature(name: str) -> bool:
    """Whether a soft loss depends on the temperature: logit matching does not."""
    return name != "mse"


def soft_loss(name: str, logits_NC: Tensor, targets: SoftTargets) -> Tensor:
    """A soft loss of each row (N,), times T^2, float32 or better; 0 where the row has no targets.

    Args:
        name: one of `LOSSES` that fits the targets.
        logits_NC: the student's, of any float type, on the device of the targets.
        targets: of the same rows.

    Raises:
        ValueError: there is no such loss on these targets.
    """
    check_fits(name, targets)
    with torch.autocast(logits_NC.device.type, enabled=False):
        if isinstance(targets, HiddenTargets):
            return _hidden_loss(name, logits_NC, targets)
        loss_N = _loss(name, _float32_or_better(logits_NC), targets)
        return torch.where(targets.valid_N, loss_N, 0.0)


def check_fits(name: str, targets: SoftTargets) -> None:
    """Refuse a soft loss that can't be computed on some targets.

    Raises:
        ValueError: there is no such loss on these targets.
    """
    known: tuple[str, ...] = DENSE_LOSSES
    if isinstance(targets, (TopKTargets, SampleTargets)):
        known = TOPK_LOSSES if isinstance(targets, TopKTargets) else SAMPLE_LOSSES
    if name not in known:
        raise ValueError(f"loss: expected one of {', '.join(known)} on {type(targets).__name__}, got {name!r}")


def hard_loss(logits_NC: Tensor, hard_targets_N: Tensor) -> Tensor:
    """Cross entropy of each row (N,) with its true class at T = 1, float32 or better; 0 where that is -1, unknown."""
    with torch.autocast(logits_NC.device.type, enabled=False):
        logits_NC = _float32_or_better(logits_NC)
        return F.cross_entropy(logits_NC, hard_targets_N.long(), ignore_index=-1, reduction="none")


def _float32_or_better(logits_NC: Tensor) -> Tensor:
    return logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()


def _hidden_loss(name: str, logits_NC: Tensor, targets: HiddenTargets) -> Tensor:
    """A loss on the teacher's logits, which are computed for a few rows at a time, and anew when going backward."""

    def of_rows(logits_NC: Tensor, targets: HiddenTargets) -> Tensor:
        return soft_loss(name, logits_NC, targets.dense())

    step = rows_at_once(logits_NC.shape[1], logits_NC.device)
    starts = range(0, max(1, len(logits_NC)), step)
    chunks = [(logits_NC[start : start + step], take_rows(targets, slice(start, start + step))) for start in starts]
    return torch.cat([checkpoint(of_rows, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def _loss(name: str, logits_NC: Tensor, targets: DenseTargets | TopKTargets | SampleTargets) -> Tensor:
    temperature = targets.temperature
    if isinstance(targets, TopKTargets):
        return bucket_loss(name, *kept_and_rest(logits_NC, targets.ids_NK, temperature), targets)
    if isinstance(targets, SampleTargets):
        scaled_NC = logits_NC / temperature
        return sampled_loss(scaled_NC.gather(1, targets.ids_ND), scaled_NC.logsumexp(1), targets)
    if name == "mse":
        return _squared_error(logits_NC, targets.values_NC)
    logp_NC = (targets.values_NC / temperature).log_softmax(1)
    logq_NC = (logits_NC / temperature).log_softmax(1)
    return _divergence(name, logp_NC, logq_NC, temperature)


def bucket_loss(name: str, kept_NK: Tensor, rest_lse_N: Tensor, targets: TopKTargets) -> Tensor:
    """A loss of `TOPK_LOSSES` of each row (N,), from the little that it depends on.

    Args:
        name: of the loss.
        kept_NK: the student's logits of the kept entries, over T.
        rest_lse_N: logsumexp of the others, over T: reduced with the kept entries masked out, never as one minus the
            kept mass, so that nothing cancels. -inf where there are none.
        targets: of the same rows.
    """
    logp_NB = targets.logprobs_NK
    logq_NB = torch.cat([kept_NK, rest_lse_N[:, None]], 1).log_softmax(1)
    if name == "truncated":  # p / M and q
        logp_NB, logq_NB = logp_NB.log_softmax(1), logq_NB[:, :-1]
    elif name == "renormalised":  # p / M and q / Q: what the student believes of the others has no gradient
        logp_NB, logq_NB = logp_NB.log_softmax(1), kept_NK.log_softmax(1)
    else:
        logp_NB = torch.cat([logp_NB, targets.log_tail_N[:, None]], 1)
    return _divergence(name, logp_NB, logq_NB, targets.temperature)


def sampled_loss(drawn_ND: Tensor, lse_N: Tensor, targets: SampleTargets) -> Tensor:
    """Forward cross entropy of the drawn shares with the student, - sum p^ log q of each row (N,), times T^2.

    Args:
        drawn_ND: the student's logits at the drawn ids, over T.
        lse_N: logsumexp of all of its logits, over T.
        targets: of the same rows.
    """
    logq_ND = torch.where(targets.probs_ND > 0, drawn_ND - lse_N[:, None], 0.0)
    return -(targets.probs_ND * logq_ND).sum(1) * targets.temperature**2


def kept_and_rest(logits_NC: Tensor, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits over T at some ids (N, K), each once a row, and the logsumexp of all others (N,), -inf if there are none.

    As fast as one softmax, forward and backward together, and with as much memory.
    """
    kept_NK, rest_lse_N = _KeptAndRest.apply(logits_NC, ids_NK, temperature)  # type: ignore[no-untyped-call]
    return kept_NK, rest_lse_N


def lse_and_softmax(logits_NC: Tensor, out_NC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logsumexp (N,) and softmax (N, C) in one pass for the exponentials, without a gradient.

    A row of -inf alone has the logsumexp -inf, and some softmax.

    Args:
        logits_NC: finite or -inf; the first one is changed where a row has nothing but -inf.
        out_NC: where to write the softmax; other memory than the logits'.
    """
    max_N = logits_NC.amax(1)
    empty_N = max_N.isneginf()
    logits_NC[:, 0].masked_fill_(empty_N, 0.0)
    softmax_NC = torch.softmax(logits_NC, 1) if out_NC is None else torch.softmax(logits_NC, 1, out=out_NC)
    return torch.where(empty_N, -math.inf, max_N - softmax_NC.amax(1).log()), softmax_NC


class _KeptAndRest(torch.autograd.Function):
    """See `kept_and_rest`. Autograd by itself would hold several arrays of the logits' size."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled_NC = logits_NC if temperature == 1 else logits_NC / temperature
        rest_lse_N, rest_NC = lse_and_softmax(scaled_NC.scatter(1, ids_NK, -math.inf))
        ctx.save_for_backward(rest_NC, ids_NK)
        ctx.temperature = temperature
        return scaled_NC.gather(1, ids_NK), rest_lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kept_NK: Tensor, grad_rest_N: Tensor) -> tuple[Tensor, None, None]:
        rest_NC, ids_NK = ctx.saved_tensors
        grad_NC = rest_NC * (grad_rest_N / ctx.temperature)[:, None]
        # added, not put: where a row has no targets, its ids may be one and the same
        return grad_NC.scatter_add_(1, ids_NK, grad_kept_NK / ctx.temperature), None, None


def _divergence(name: str, logp_NB: Tensor, logq_NB: Tensor, temperature: float) -> Tensor:
    if name == "reverse-kl":
        loss_N = _reverse_kl(logp_NB, logq_NB, LOWEST_LOGIT / temperature)
    elif name == "jsd":
        loss_N = _jsd(logp_NB, logq_NB)
    else:
        loss_N = _forward_kl(logp_NB, logq_NB)
    return loss_N * temperature**2


def _forward_kl(logp_NB: Tensor, logq_NB: Tensor) -> Tensor:
    """Forward KL, the sum of p log(p / q); a bucket that the teacher rules out contributes 0."""
    return (logp_NB.exp() * torch.where(logp_NB.isneginf(), 0.0, logp_NB - logq_NB)).sum(1)


def _reverse_kl(logp_NB: Tensor, logq_NB: Tensor, lowest: float) -> Tensor:
    """Reverse KL, the sum of q log(q / p); a bucket that the student rules out contributes 0."""
    logp_NB = torch.where(logp_NB.isneginf(), lowest, logp_NB)
    return (logq_NB.exp() * torch.where(logq_NB.isneginf(), 0.0, logq_NB - logp_NB)).sum(1)


def _jsd(logp_NB: Tensor, logq_NB: Tensor) -> Tensor:
    """Half the forward KL of p to the mean of p and q, and half that of q."""
    neither_NB = logp_NB.isneginf() & logq_NB.isneginf()
    log_mean_NB = torch.logaddexp(logp_NB, torch.where(neither_NB, 0.0, logq_NB)) - math.log(2)
    return 0.5 * (_forward_kl(logp_NB, log_mean_NB) + _forward_kl(logq_NB, log_mean_NB))


def _squared_error(logits_NC: Tensor, values_NC: Tensor) -> Tensor:
    """|z - v|^2 / (2 C) after removing each row's mean: T^2 KL as T goes to infinity.

    Classes that the teacher rules out (-inf) are not counted.
    """
    counted_NC = ~values_NC.isneginf()
    num_counted_N = counted_NC.sum(1)
    difference_NC = torch.where(counted_NC, logits_NC - values_NC, 0.0)
    mean_N = difference_NC.sum(1) / num_counted_N
    centred_NC = torch.where(counted_NC, difference_NC - mean_N[:, None], 0.0)
    return centred_NC.square().sum(1) / (2 * num_counted_N)
