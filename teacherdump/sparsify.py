"""Logits to what the encoding keeps, on the device that they are on: the only copy to the host is of the result.

Legend: N rows, C classes, K kept entries, T temperatures.

The reference, which this must meet, is `encode` of the encodings in `storage.encodings`; the formulas are those of
`storage/FORMAT.md`. Exponentials are float32 and their sums float64: float64 throughout doubles the cost and moves the
result by less than a float32 can say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.arrays import Array
from storage.encodings import Dense, Encoding, TopK
from storage.encodings.statistics import FLOAT16_LOWEST
from storage.encodings.values import ValueType

Sparsify = Callable[[Tensor, Tensor | None], dict[str, Tensor]]

# Why a row's logits are refused, as sums of these; 0 where they are finite (classes of -inf are allowed, but not all).
REFUSAL = "refusal"
HAS_NAN = 1
HAS_POSITIVE_INF = 2
NO_CLASS = 4

# Values that one pass works on: some float64 temporaries of this size must fit, in the cache of a CPU or on a device.
PASS_VALUES = {"cpu": 1 << 16, "cuda": 1 << 25}
LOWEST_EXPONENT = -104.0  # exp of less is 0 in float32


def build_sparsify(encoding: Encoding, temperatures: Sequence[float]) -> Sparsify:
    """What turns float32 logits (N, C), and hard targets (N,) or None, into the arrays of a store.

    The result holds every float and id that the encoding stores, on the logits' device, with ids as int32, and
    `refusal`, uint8 (N,): the sum of the reasons for which a row's logits are not kept. What such a row holds means
    nothing. Hard targets are -1 where unknown: their log-probability is NaN.
    """
    if not isinstance(encoding, Dense | TopK):
        raise ValueError(f"encoding: expected dense or topk, got {encoding.name}")  # noqa: TRY004 - it is a name
    k = encoding.k if isinstance(encoding, TopK) else None

    def sparsify(logits_NC: Tensor, hard_targets_N: Tensor | None) -> dict[str, Tensor]:
        pass_rows = max(1, PASS_VALUES.get(logits_NC.device.type, 1 << 16) // logits_NC.shape[1])
        parts = []
        for start in range(0, len(logits_NC), pass_rows):
            hard = None if hard_targets_N is None else hard_targets_N[start : start + pass_rows]
            parts.append(_sparsify(logits_NC[start : start + pass_rows], hard, k, encoding.values, temperatures))
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return sparsify


def _sparsify(
    logits_NC: Tensor, hard_targets_N: Tensor | None, k: int | None, values: ValueType, temperatures: Sequence[float]
) -> dict[str, Tensor]:
    logits_NC = logits_NC.float()
    max_logit_N = logits_NC.amax(1)  # NaN where the row has one
    refusal_N = logits_NC.isnan().any(1) * HAS_NAN
    refusal_N = refusal_N + (logits_NC == torch.inf).any(1) * HAS_POSITIVE_INF
    refusal_N = refusal_N + (max_logit_N == -torch.inf) * NO_CLASS
    centred_NC = logits_NC - max_logit_N[:, None]
    lse_1_N, entropy_N = _entropy(centred_NC)
    lse_NT = torch.stack([lse_1_N if value == 1 else _logsumexp(centred_NC, value) for value in temperatures], 1)
    found = {
        REFUSAL: refusal_N.to(torch.uint8),
        "max_logit": max_logit_N,
        "lse": lse_NT.float(),
        "entropy": entropy_N.half(),
    }
    if hard_targets_N is not None:
        known_N = centred_NC.gather(1, hard_targets_N.long().clamp(min=0)[:, None])[:, 0] - lse_1_N
        found["hard_target_logprob"] = _to_float16(torch.where(hard_targets_N >= 0, known_N, torch.nan))
    if k is None:
        return found | _stored_values(centred_NC, values)
    ids_NK = _top_ids(centred_NC, k)
    kept = _stored_values(centred_NC.gather(1, ids_NK), values)
    rest_NC = centred_NC.scatter(1, ids_NK, -torch.inf)
    tail_NT = torch.stack([_logsumexp(rest_NC, value) for value in temperatures], 1) - lse_NT
    return found | kept | {"ids": ids_NK.int(), "log_tail": tail_NT.float()}


def _logsumexp(centred_NC: Tensor, temperature: float) -> Tensor:
    """The log of sum exp(v / temperature), float64 (N,); -inf for a row of -inf."""
    top_N = centred_NC.amax(1)
    top_N = torch.where(top_N.isinf(), 0.0, top_N)
    exps_NC = (centred_NC - top_N[:, None]).div_(temperature).exp_()
    return exps_NC.sum(1, dtype=torch.float64).log() + top_N.double() / temperature


def _entropy(centred_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The lse at T = 1 and the entropy, nats, float64 (N,): lse + sum exp(v) (-v) / sum exp(v), all terms positive."""
    exps_NC = centred_NC.exp()
    total_N = exps_NC.sum(1, dtype=torch.float64)
    drop_NC = centred_NC.clamp(min=LOWEST_EXPONENT).neg_().mul_(exps_NC)
    lse_N = total_N.log()
    return lse_N, lse_N + drop_NC.sum(1, dtype=torch.float64) / total_N


def _top_ids(centred_NC: Tensor, k: int) -> Tensor:
    """Ids (N, K) of the k largest values, downward, ties to the lower id, int64.

    `torch.topk` leaves the order of equal values open, and which of them are in at the border. So it is given keys that
    are all different: the bits of a value that is not positive rise as it falls, and below them stands the id.
    """
    magnitude_NC = (centred_NC + 0.0).view(torch.int32).bitwise_and(0x7FFF_FFFF)  # + 0.0: minus zero is zero
    keys_NC = magnitude_NC.long().neg_().bitwise_left_shift_(32)
    keys_NC -= torch.arange(keys_NC.shape[1], device=keys_NC.device)
    return keys_NC.topk(k, dim=1, sorted=True).indices


def _stored_values(centred_NK: Tensor, values: ValueType) -> dict[str, Tensor]:
    """Centred values as they are stored, as `storage.encodings.dense.stored_values` does it."""
    if values == "float32":
        return {"values": centred_NK}
    if values == "float16":
        return {"values": _to_float16(centred_NK)}
    range_N = -centred_NK.masked_fill(centred_NK == -torch.inf, 0.0).amin(1)
    clipped_NK = torch.maximum(centred_NK, -range_N[:, None])
    safe_N = torch.where(range_N > 0, range_N, 1.0)
    quantised_NK = (clipped_NK * -255.0 / safe_N[:, None]).round()
    return {"values": quantised_NK.nan_to_num(0.0, 255.0, 0.0).to(torch.uint8), "value_range": range_N}


def _to_float16(values: Tensor) -> Tensor:
    """Float16: finite values below its range become its lowest value, -inf stays."""
    clamped = values.clamp(min=FLOAT16_LOWEST)
    return torch.where(values == -torch.inf, values, clamped).half()


@dataclass(frozen=True)
class HostArrays:
    """Arrays on their way to the host.

    Attributes:
        tensors: where they arrive.
        arrived: what tells that they have; None where they are there already.
    """

    tensors: Mapping[str, Tensor]
    arrived: torch.cuda.Event | None

    def wait(self) -> dict[str, Array]:
        """The arrays, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return {name: np.asarray(tensor) for name, tensor in self.tensors.items()}


def copy_to_host(tensors: Mapping[str, Tensor]) -> HostArrays:
    """Start the copy of a device's tensors into pinned memory, and don't wait for it."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return HostArrays(tensors, None)
    host = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    arrived = torch.cuda.Event()
    arrived.record()
    return HostArrays(host, arrived)
