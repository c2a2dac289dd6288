"""Soft losses: how far the student's distribution is from the stored one, and the hard loss beside them.

Legend: N rows, C classes, K kept entries, B buckets: the classes of a dense row, or the kept entries and the tail of a
top-k row. p, q: teacher and student at the temperature T.

Every loss is one number a row, in nats, and a soft one is already times T^2, so that its gradient keeps its size while
T changes (Hinton, Vinyals and Dean 2015, section 2). The mean over the rows is the caller's, who counts them across
ranks. A row without targets (quarantined) has the loss 0 and the gradient 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from storage.arrays import STATUS_OK
from storage.encodings import Encoding, check_temperature
from storage.errors import MismatchError
from storage.manifest import Manifest

# Where the teacher rules a class out (-inf) and the student does not, the reverse KL is infinite. It is taken as if the
# teacher's logit were the lowest of float16, the lowest that a float16 store holds of a finite one.
LOWEST_LOGIT = -65504.0

# The first is the default. On top-k the last two are biased: they are there to compare with.
DENSE_LOSSES = ("kl", "reverse-kl", "jsd", "mse")
TOPK_LOSSES = ("tail-bucket", "reverse-kl", "jsd", "truncated", "renormalised")
LOSSES = tuple(dict.fromkeys(DENSE_LOSSES + TOPK_LOSSES))


def default_loss(encoding: Encoding) -> str:
    """The soft loss that is exact on an encoding and has the teacher's distribution for its minimum."""
    return DENSE_LOSSES[0] if encoding.name == "dense" else TOPK_LOSSES[0]


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
    if name in DENSE_LOSSES:
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


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's logits of some rows, on the device of the student.

    Attributes:
        values_NC: logits up to a constant of each row, float; finite or -inf where valid, any finite number elsewhere.
        valid_N: bool, whether the row has targets.
        temperature: above 0.
    """

    values_NC: Tensor  # noqa: N815
    valid_N: Tensor  # noqa: N815
    temperature: float

    @classmethod
    def of_logits(cls, logits_NC: Tensor, temperature: float) -> Self:
        """The targets of a live teacher's logits, centred as a store keeps them: float32 dense gives the same bits."""
        values_NC = logits_NC.detach().float()
        values_NC = values_NC - values_NC.amax(1, keepdim=True)
        return cls(values_NC, torch.ones(len(values_NC), dtype=torch.bool, device=values_NC.device), temperature)


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's log-probabilities of the kept entries of some rows, and of all others together.

    Attributes:
        ids_NK: classes, int64, each once in a valid row.
        logprobs_NK: log p of them at the temperature, float.
        log_tail_N: log of the mass that they leave, float, -inf where they leave none; with them it sums to one.
        valid_N: bool, whether the row has targets.
        temperature: above 0.
    """

    ids_NK: Tensor  # noqa: N815
    logprobs_NK: Tensor  # noqa: N815
    log_tail_N: Tensor  # noqa: N815
    valid_N: Tensor  # noqa: N815
    temperature: float


SoftTargets = DenseTargets | TopKTargets


def target_arrays(manifest: Manifest) -> tuple[str, ...]:
    """Names of the stored arrays that `build_targets` needs."""
    names = {"status", "values"} | ({"ids", "lse", "log_tail"} if manifest.encoding.name == "topk" else set())
    if any(spec.name == "value_range" for spec in manifest.arrays):
        names.add("value_range")
    return tuple(sorted(names))


def build_targets(
    manifest: Manifest,
    arrays: Mapping[str, NDArray[Any] | Tensor],
    temperature: float,
    device: torch.device | str = "cpu",
) -> SoftTargets:
    """The soft targets of stored rows: moved to the device as they are stored, then decoded there.

    Args:
        manifest: of their store.
        arrays: rows of the arrays that `target_arrays` names, in one order; others are not looked at.
        temperature: above 0; on top-k one that the store declares.
        device: of the student's logits.

    Raises:
        MismatchError: the temperature is not exact on the encoding.
        ValueError: it is not above 0.
    """
    check_temperature(manifest.encoding, temperature, manifest.temperatures)
    on_device = {name: torch.as_tensor(arrays[name]).to(device, non_blocking=True) for name in target_arrays(manifest)}
    valid_N = on_device["status"] == STATUS_OK
    # rows without targets hold NaN: made 0 here, since 0 times NaN would still be NaN in a gradient
    values_NK = torch.where(valid_N[:, None], _loaded_values(on_device), 0.0)
    if manifest.encoding.name == "dense":
        return DenseTargets(values_NK, valid_N, temperature)
    column = manifest.temperatures.index(temperature)
    lse_N = torch.where(valid_N, on_device["lse"][:, column], 0.0)
    log_tail_N = torch.where(valid_N, on_device["log_tail"][:, column], -math.inf)
    # values that lost bits don't sum to one any more: shared out over all buckets
    logprobs_NK = values_NK / temperature - lse_N[:, None]
    total_N = torch.logaddexp(logprobs_NK.logsumexp(1), log_tail_N)
    ids_NK = on_device["ids"].to(torch.int64)
    return TopKTargets(ids_NK, logprobs_NK - total_N[:, None], log_tail_N - total_N, valid_N, temperature)


def _loaded_values(arrays: Mapping[str, Tensor]) -> Tensor:
    """Centred float32 logits of stored ones, as `storage.encodings.dense.loaded_values` gives them."""
    values_NK = arrays["values"]
    if values_NK.dtype == torch.uint8:
        return values_NK.float() * (arrays["value_range"][:, None] / -255.0)
    return values_NK.float()


def soft_loss(name: str, logits_NC: Tensor, targets: SoftTargets) -> Tensor:
    """A soft loss of each row (N,), times T^2, float32 or better; 0 where the row has no targets.

    Args:
        name: one of `LOSSES` that fits the targets.
        logits_NC: the student's, of any float type, on the device of the targets.
        targets: of the same rows.

    Raises:
        ValueError: there is no such loss on these targets.
    """
    known = DENSE_LOSSES if isinstance(targets, DenseTargets) else TOPK_LOSSES
    if name not in known:
        raise ValueError(f"loss: expected one of {', '.join(known)} on {type(targets).__name__}, got {name!r}")
    with torch.autocast(logits_NC.device.type, enabled=False):
        logits_NC = logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()
        loss_N = _loss(name, logits_NC, targets)
        return torch.where(targets.valid_N, loss_N, 0.0)


def _loss(name: str, logits_NC: Tensor, targets: SoftTargets) -> Tensor:
    if isinstance(targets, DenseTargets):
        if name == "mse":
            return _squared_error(logits_NC, targets.values_NC)
        logp_NB = (targets.values_NC / targets.temperature).log_softmax(1)
        logq_NB = (logits_NC / targets.temperature).log_softmax(1)
    elif name == "truncated":
        logp_NB, logq_NB = _truncated(logits_NC, targets)
    elif name == "renormalised":
        logp_NB, logq_NB = _renormalised(logits_NC, targets)
    else:
        logp_NB, logq_NB = _with_tail(logits_NC, targets)
    if name == "reverse-kl":
        loss_N = _reverse_kl(logp_NB, logq_NB, LOWEST_LOGIT / targets.temperature)
    elif name == "jsd":
        loss_N = _jsd(logp_NB, logq_NB)
    else:
        loss_N = _forward_kl(logp_NB, logq_NB)
    return loss_N * targets.temperature**2


def hard_loss(logits_NC: Tensor, hard_targets_N: Tensor) -> Tensor:
    """Cross entropy of each row (N,) with its true class at T = 1, float32 or better; 0 where that is -1, unknown."""
    with torch.autocast(logits_NC.device.type, enabled=False):
        logits_NC = logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()
        return F.cross_entropy(logits_NC, hard_targets_N.long(), ignore_index=-1, reduction="none")


def _with_tail(logits_NC: Tensor, targets: TopKTargets) -> tuple[Tensor, Tensor]:
    """Logarithms of p and q over the kept entries and the tail; no tail where all classes are kept.

    The student's tail is reduced with the kept entries masked out, never as one minus the kept mass: nothing cancels.
    """
    scaled_NC = logits_NC / targets.temperature
    kept_NK = scaled_NC.gather(1, targets.ids_NK)
    if kept_NK.shape[1] == scaled_NC.shape[1]:
        return targets.logprobs_NK, kept_NK.log_softmax(1)
    rest_lse_N = scaled_NC.scatter(1, targets.ids_NK, -math.inf).logsumexp(1)
    lse_N = torch.logaddexp(kept_NK.logsumexp(1), rest_lse_N)
    logp_NB = torch.cat([targets.logprobs_NK, targets.log_tail_N[:, None]], 1)
    return logp_NB, torch.cat([kept_NK, rest_lse_N[:, None]], 1) - lse_N[:, None]


def _truncated(logits_NC: Tensor, targets: TopKTargets) -> tuple[Tensor, Tensor]:
    """Logarithms of p / M and q over the kept entries."""
    scaled_NC = logits_NC / targets.temperature
    return targets.logprobs_NK.log_softmax(1), scaled_NC.gather(1, targets.ids_NK) - scaled_NC.logsumexp(1)[:, None]


def _renormalised(logits_NC: Tensor, targets: TopKTargets) -> tuple[Tensor, Tensor]:
    """Logarithms of p / M and q / Q over the kept entries: what the student believes of the others has no gradient."""
    kept_NK = logits_NC.gather(1, targets.ids_NK) / targets.temperature
    return targets.logprobs_NK.log_softmax(1), kept_NK.log_softmax(1)


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
