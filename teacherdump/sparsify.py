"""Logits to what the encoding keeps, on the device that they are on: the only copy to the host is of the result.

Legend: N rows (of sequences, flat positions), C classes, K kept entries, D places of drawn ids, W width of a hidden
state, T temperatures.

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
from storage.encodings import Dense, Encoding, Hidden, Sample, TopK
from storage.encodings.statistics import FLOAT16_LOWEST
from storage.encodings.values import ValueType

# Why a row's logits are refused, as sums of these; 0 where they are finite (classes of -inf are allowed, but not all).
REFUSAL = "refusal"
HAS_NAN = 1
HAS_POSITIVE_INF = 2
NO_CLASS = 4
HIDDEN_NOT_FINITE = 8

# Values that one pass works on: some float64 temporaries of this size must fit, in the cache of a CPU or on a device.
PASS_VALUES = {"cpu": 1 << 16, "cuda": 1 << 25}
LOWEST_EXPONENT = -104.0  # exp of less is 0 in float32
SUMMED_RUN = 128  # values that are added up in float32
LEAST_SUM = 1e-30  # a sum of float32 exponentials below this has lost bits, or all of them, to underflow


@dataclass(frozen=True)
class TeacherRows:
    """What a teacher says of some rows, and what goes with them, all on one device.

    Attributes:
        logits_NC: float.
        hard_targets_N: the true classes, -1 where unknown; None where nothing is kept of them.
        uniform_N: float64 random numbers, for an encoding that draws; else None.
        hidden_NW: hidden states, for an encoding that keeps them; else None.
    """

    logits_NC: Tensor  # noqa: N815
    hard_targets_N: Tensor | None = None  # noqa: N815
    uniform_N: Tensor | None = None  # noqa: N815
    hidden_NW: Tensor | None = None  # noqa: N815

    def __getitem__(self, rows: slice) -> "TeacherRows":
        """Some of the rows."""
        given = (self.logits_NC, self.hard_targets_N, self.uniform_N, self.hidden_NW)
        return TeacherRows(*[None if values is None else values[rows] for values in given])  # type: ignore[arg-type]


Sparsify = Callable[[TeacherRows], dict[str, Tensor]]


def build_sparsify(encoding: Encoding, temperatures: Sequence[float]) -> Sparsify:
    """What turns a teacher's rows into the arrays of a store.

    The result holds every float and id that the encoding stores, on the logits' device, with ids as int32, and
    `refusal`, uint8 (N,): the sum of the reasons for which a row's logits are not kept. What such a row holds means
    nothing. Hard targets are -1 where unknown: their log-probability is NaN.
    """

    def sparsify(rows: TeacherRows) -> dict[str, Tensor]:
        num_rows, num_classes = rows.logits_NC.shape
        pass_rows = max(1, PASS_VALUES.get(rows.logits_NC.device.type, 1 << 16) // num_classes)
        parts = []
        for start in range(0, num_rows, pass_rows):
            part = rows[start : start + pass_rows]
            parts.append(_sparsify(part, encoding, temperatures))
        return joined(parts)

    return sparsify


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Arrays of rows one after the other, as one."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _sparsify(rows: TeacherRows, encoding: Encoding, temperatures: Sequence[float]) -> dict[str, Tensor]:
    logits_NC = rows.logits_NC.float()
    max_logit_N, top_N = logits_NC.max(1)  # NaN where the row has one, else inf where it has one
    refusal_N = max_logit_N.isnan() * HAS_NAN + (max_logit_N == torch.inf) * HAS_POSITIVE_INF
    refusal_N = refusal_N + (max_logit_N == -torch.inf) * NO_CLASS
    centred_NC = logits_NC - max_logit_N[:, None]
    has_tail = isinstance(encoding, TopK)
    ids_NK = _top_ids(centred_NC, encoding.k) if isinstance(encoding, TopK) else top_N[:, None]
    at_1 = _sums(centred_NC, 1.0, ids_NK, with_tail=has_tail, with_entropy=True)
    sums = [at_1 if value == 1 else _sums(centred_NC, value, ids_NK, with_tail=has_tail) for value in temperatures]
    found = {
        "max_logit": max_logit_N,
        "lse": torch.stack([part.lse_N for part in sums], 1).float(),
        "entropy": at_1.entropy_N.half(),
    }
    if rows.hard_targets_N is not None:
        hard_N = rows.hard_targets_N.long()
        known_N = centred_NC.gather(1, hard_N.clamp(min=0)[:, None])[:, 0] - at_1.lse_N
        found["hard_target_logprob"] = _to_float16(torch.where(hard_N >= 0, known_N, torch.nan))
    if isinstance(encoding, Sample):
        assert rows.uniform_N is not None
        found |= _drawn(centred_NC, temperatures[0], rows.uniform_N, encoding)
    elif isinstance(encoding, Hidden):
        assert rows.hidden_NW is not None
        stored_NW = rows.hidden_NW.to(torch.float16 if encoding.values == "float16" else torch.float32)
        refusal_N = refusal_N | (~stored_NW.isfinite().all(1)) * HIDDEN_NOT_FINITE
        found["hidden"] = stored_NW
    elif isinstance(encoding, TopK):
        found |= _stored_values(centred_NC.gather(1, ids_NK), encoding.values)
        found |= {"ids": ids_NK.int(), "log_tail": torch.stack([part.log_tail_N for part in sums], 1).float()}
    else:
        assert isinstance(encoding, Dense)
        found |= _stored_values(centred_NC, encoding.values)
    return found | {REFUSAL: refusal_N.to(torch.uint8)}


@dataclass(frozen=True)
class _Sums:
    """What one pass of exponentials at a temperature gives, float64 (N,).

    Attributes:
        lse_N: log sum exp(v / T).
        log_tail_N: the same over the entries that are not kept, less `lse_N`; unset where it is not asked for.
        entropy_N: at that temperature, nats; unset where it is not asked for.
    """

    lse_N: Tensor  # noqa: N815
    log_tail_N: Tensor  # noqa: N815
    entropy_N: Tensor  # noqa: N815


def _sums(
    centred_NC: Tensor, temperature: float, ids_NK: Tensor, *, with_tail: bool = False, with_entropy: bool = False
) -> _Sums:
    """One pass over the exponentials. The kept ones are added up apart, so the tail is never one minus the rest.

    Args:
        centred_NC: the largest of each row is 0.
        temperature: above 0.
        ids_NK: the entries that are kept, the largest among them.
        with_tail: whether the log of the tail is wanted too.
        with_entropy: whether the entropy is.
    """
    scaled_NC = centred_NC if temperature == 1 else centred_NC / temperature
    exps_NC = scaled_NC.exp()
    kept_NK = exps_NC.gather(1, ids_NK).double()
    tail_N = _sum(exps_NC.scatter_(1, ids_NK, 0.0))
    total_N = kept_NK.sum(1) + tail_N
    lse_N = total_N.log()
    entropy_N = log_tail_N = lse_N
    if with_entropy:  # lse + sum exp(v) (-v) / sum exp(v), all terms positive
        kept_drop_NK = scaled_NC.gather(1, ids_NK).double().clamp_(min=LOWEST_EXPONENT).mul_(kept_NK)
        drop_N = _sum(scaled_NC.clamp(min=LOWEST_EXPONENT).mul_(exps_NC)) + kept_drop_NK.sum(1)
        entropy_N = lse_N - drop_N / total_N
    if with_tail:
        log_tail_N, is_lost_N = tail_N.log(), tail_N < LEAST_SUM
        if bool(is_lost_N.any()):
            log_tail_N = torch.where(is_lost_N, _log_of_sum(scaled_NC.scatter(1, ids_NK, -torch.inf)), log_tail_N)
        log_tail_N = log_tail_N - lse_N
    return _Sums(lse_N, log_tail_N, entropy_N)


def _sum(values_NC: Tensor) -> Tensor:
    """Sum of each row, float64 (N,): short runs in float32, their sums in float64.

    As exact as a float32 can tell, and many times as fast on a CPU as to add up float32 numbers in float64.
    """
    num_rows, num_classes = values_NC.shape
    num_runs = num_classes // SUMMED_RUN
    runs_NG = values_NC[:, : num_runs * SUMMED_RUN].reshape(num_rows, num_runs, SUMMED_RUN).sum(2)
    rest_NG = values_NC[:, num_runs * SUMMED_RUN :].sum(1, keepdim=True)
    return torch.cat([runs_NG, rest_NG], 1).double().sum(1)


def _log_of_sum(scaled_NC: Tensor) -> Tensor:
    """The log of sum exp, float64 (N,), however small it is; -inf for a row of -inf."""
    top_N = scaled_NC.amax(1)
    top_N = torch.where(top_N.isinf(), 0.0, top_N)
    return _sum((scaled_NC - top_N[:, None]).exp_()).log() + top_N.double()


def _top_ids(centred_NC: Tensor, k: int) -> Tensor:
    """Ids (N, K) of the k largest values, downward, ties to the lower id, int64.

    `torch.topk` leaves the order of equal values open, and which of them are in at the border. The order is put right
    among the few that are kept; only rows with a tie at the border are looked through again, all entries told apart.
    """
    num_classes = centred_NC.shape[1]
    values_NB, ids_NB = centred_NC.topk(min(k + 1, num_classes), dim=1, sorted=False)  # one more: the border
    order_NB = _keys(values_NB, ids_NB).argsort(dim=1, descending=True)
    ids_NK = ids_NB.gather(1, order_NB[:, :k])
    if k < num_classes:
        last_two_N2 = values_NB.gather(1, order_NB[:, k - 1 :])
        tied_N = last_two_N2[:, 0] == last_two_N2[:, 1]
        if bool(tied_N.any()):
            ids_NK[tied_N] = _exact_top_ids(centred_NC[tied_N], k)
    return ids_NK


def _exact_top_ids(centred_NC: Tensor, k: int) -> Tensor:
    """What `_top_ids` gives, from keys of all entries."""
    ids_C = torch.arange(centred_NC.shape[1], device=centred_NC.device)
    return _keys(centred_NC, ids_C).topk(k, dim=1, sorted=True).indices


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Integers, all different, that fall as the value falls and, among equals, as the id rises.

    The bits of a value that is not positive rise as it falls; below them stands the id.
    """
    magnitude = (values + 0.0).view(torch.int32).bitwise_and(0x7FFF_FFFF)  # + 0.0: minus zero is zero
    return magnitude.long().neg_().bitwise_left_shift_(32).sub_(ids)


def _drawn(centred_NC: Tensor, temperature: float, uniform_N: Tensor, encoding: Sample) -> dict[str, Tensor]:
    """Distinct ids (N, D) of the systematic draws, ascending, and how often each came, as `encodings.sample` does it.

    The point (u + j) / draws falls to the first class whose cumulated probability is above it: looked up, so that only
    the cumulated sum goes over all classes.
    """
    num_rows, num_classes = centred_NC.shape
    cdf_NC = centred_NC.double().div_(temperature).exp_().cumsum(1)
    points_J = torch.arange(encoding.draws, device=centred_NC.device, dtype=torch.float64)
    total_N1 = cdf_NC[:, -1:]
    points_NJ = (uniform_N[:, None] + points_J) / encoding.draws * total_N1
    # rounding must not take a point to the end: behind the last class with any mass
    points_NJ = torch.minimum(points_NJ, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    drawn_NJ = torch.searchsorted(cdf_NC, points_NJ, right=True).clamp_(max=num_classes - 1)
    is_new_NJ = torch.ones_like(drawn_NJ)
    is_new_NJ[:, 1:] = drawn_NJ[:, 1:] != drawn_NJ[:, :-1]
    place_NJ = is_new_NJ.cumsum(1) - 1
    places = encoding.num_places(num_classes)
    counts_ND = torch.zeros(num_rows, places, dtype=torch.int64, device=centred_NC.device)
    counts_ND.scatter_add_(1, place_NJ, torch.ones_like(place_NJ))
    ids_ND = torch.zeros_like(counts_ND).scatter_(1, place_NJ, drawn_NJ)
    return {"ids": ids_ND.int(), "counts": counts_ND.to(torch.uint8)}


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
