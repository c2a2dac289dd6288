"""What a student gets of the teacher: the stored arrays of each encoding, decoded on the student's device.

Legend: N rows, P positions, R = N * P flat rows, C classes, K kept entries, D places for drawn ids, W hidden width,
T temperatures.

The targets of sequences are flat: row n * P + t holds position t of sequence n, the distribution of its token t + 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.arrays import STATUS_OK
from storage.encodings import Hidden, Sample, check_temperature
from storage.encodings.hidden import HeadArrays
from storage.manifest import Manifest
from studenttrain.heads import Head


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


@dataclass(frozen=True)
class SampleTargets:
    """Classes that were drawn from the teacher's distribution, and the share of the draws that each had.

    Attributes:
        ids_ND: classes, int64; behind the last that was drawn, any class.
        probs_ND: shares p^, float, 0 behind the last; they sum to one, and in the mean over the draws they are p.
        valid_N: bool, whether the row has targets.
        temperature: of the draws, above 0.
    """

    ids_ND: Tensor  # noqa: N815
    probs_ND: Tensor  # noqa: N815
    valid_N: Tensor  # noqa: N815
    temperature: float


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's last hidden states of some rows, and its head: its logits, computed for a few rows at a time.

    Attributes:
        hidden_NW: hidden states, float; any finite number where not valid.
        head: of the teacher, on the same device, float32 or better.
        valid_N: bool, whether the row has targets.
        temperature: above 0.
    """

    hidden_NW: Tensor  # noqa: N815
    head: Head
    valid_N: Tensor  # noqa: N815
    temperature: float

    def dense(self) -> DenseTargets:
        """The same as logits, in the head's dtype, which all rows together must have room for."""
        with torch.no_grad(), torch.autocast(self.hidden_NW.device.type, enabled=False):
            logits_NC = self.head.logits(self.hidden_NW.to(self.head.weight_CW.dtype))
            return DenseTargets(logits_NC - logits_NC.amax(1, keepdim=True), self.valid_N, self.temperature)


SoftTargets = DenseTargets | TopKTargets | SampleTargets | HiddenTargets
AnyTargets = TypeVar("AnyTargets", bound=SoftTargets)


def take_rows(targets: AnyTargets, rows: Tensor | slice) -> AnyTargets:
    """The targets of some rows, given by a slice or by their numbers."""
    values = {option.name: getattr(targets, option.name) for option in fields(targets)}
    taken: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(targets, **taken)


def target_arrays(manifest: Manifest) -> tuple[str, ...]:
    """Names of the stored arrays that `build_targets` needs, in order."""
    of_encoding = {
        "dense": {"values"},
        "topk": {"values", "ids", "lse", "log_tail"},
        "sample": {"ids", "counts"},
        "hidden": {"hidden"},
    }[manifest.encoding.name]
    stored = {spec.name for spec in manifest.arrays}
    return tuple(sorted({"status"} | of_encoding | ({"value_range", "position_ids"} & stored)))


def target_head(encoding: Hidden, arrays: HeadArrays, device: torch.device | str = "cpu") -> Head:
    """The teacher's head of a `hidden` store, float32, on the device: made once, and given to each `build_targets`."""
    weight_CW = torch.as_tensor(arrays.weight_CW).to(device, torch.float32)
    bias_C = None if arrays.bias_C is None else torch.as_tensor(arrays.bias_C).to(device, torch.float32)
    return Head(weight_CW, bias_C, encoding.scale, encoding.soft_cap)


def build_targets(
    manifest: Manifest,
    arrays: Mapping[str, NDArray[Any] | Tensor],
    temperature: float,
    device: torch.device | str = "cpu",
    *,
    mask_NP: NDArray[Any] | Tensor | None = None,
    head: Head | None = None,
) -> SoftTargets:
    """The soft targets of stored rows: moved to the device as they are stored, then decoded there.

    Args:
        manifest: of their store.
        arrays: rows of the arrays that `target_arrays` names, in one order; others are not looked at.
        temperature: above 0; on top-k and sample one that the store declares.
        device: of the student's logits.
        mask_NP: bool, which positions have a target in their document; for sequences whose tokens are not stored.
        head: of the teacher, for `hidden`: from `target_head`.

    Returns:
        One row each, or for sequences one flat row a position: valid where the status is and the mask lets it.

    Raises:
        MismatchError: the temperature is not exact on the encoding.
        ValueError: it is not above 0; or the mask or the head is missing, or given where it would not be used.
    """
    check_temperature(manifest.encoding, temperature, manifest.temperatures)
    _check_given(manifest, has_mask=mask_NP is not None, has_head=head is not None)
    on_device = {name: torch.as_tensor(arrays[name]).to(device, non_blocking=True) for name in target_arrays(manifest)}
    valid_N = on_device["status"] == STATUS_OK
    if manifest.sequences is not None:
        if mask_NP is None:
            # compared as int32: torch knows few operations on the larger unsigned types
            mask_NP = on_device["position_ids"].to(torch.int32)[:, 1:] != 0
        mask_NP = torch.as_tensor(mask_NP).to(device, non_blocking=True)
        valid_N = (valid_N[:, None] & mask_NP).flatten()
        at_rows = {"status", "position_ids"}
        on_device = {name: values.flatten(0, 1) for name, values in on_device.items() if name not in at_rows}
    return _decoded(manifest, on_device, valid_N, temperature, head)


def _check_given(manifest: Manifest, *, has_mask: bool, has_head: bool) -> None:
    """Refuse a mask or a head that is missing or would not be used."""
    needs_mask = manifest.sequences is not None and not manifest.sequences.has_tokens
    if needs_mask and not has_mask:
        raise ValueError("mask_NP: expected the mask of sequences whose tokens are not stored, got none; give it")
    if has_mask and not needs_mask:
        raise ValueError("mask_NP: expected none, since the store says which positions count, got one; leave it out")
    needs_head = manifest.encoding.name == "hidden"
    if needs_head and not has_head:
        raise ValueError("head: expected the teacher's head beside hidden states, got none; take it from target_head")
    if has_head and not needs_head:
        raise ValueError(f"head: expected none with a {manifest.encoding.name} store, got one; leave it out")


def _decoded(
    manifest: Manifest, arrays: Mapping[str, Tensor], valid_N: Tensor, temperature: float, head: Head | None
) -> SoftTargets:
    """The targets of flat arrays. Rows without targets hold NaN: made 0, since 0 times NaN would still be NaN."""
    if head is not None:
        return HiddenTargets(torch.where(valid_N[:, None], arrays["hidden"], 0.0), head, valid_N, temperature)
    if isinstance(manifest.encoding, Sample):
        probs_ND = torch.where(valid_N[:, None], arrays["counts"].float() / manifest.encoding.draws, 0.0)
        return SampleTargets(arrays["ids"].to(torch.int64), probs_ND, valid_N, temperature)
    values_NK = torch.where(valid_N[:, None], _loaded_values(arrays), 0.0)
    if manifest.encoding.name == "dense":
        return DenseTargets(values_NK, valid_N, temperature)
    column = manifest.temperatures.index(temperature)
    lse_N = torch.where(valid_N, arrays["lse"][:, column], 0.0)
    log_tail_N = torch.where(valid_N, arrays["log_tail"][:, column], -math.inf)
    # values that lost bits don't sum to one any more: shared out over all buckets
    logprobs_NK = values_NK / temperature - lse_N[:, None]
    total_N = torch.logaddexp(logprobs_NK.logsumexp(1), log_tail_N)
    ids_NK = arrays["ids"].to(torch.int64)
    return TopKTargets(ids_NK, logprobs_NK - total_N[:, None], log_tail_N - total_N, valid_N, temperature)


def _loaded_values(arrays: Mapping[str, Tensor]) -> Tensor:
    """Centred float32 logits of stored ones, as `storage.encodings.dense.loaded_values` gives them."""
    values_NK = arrays["values"]
    if values_NK.dtype == torch.uint8:
        return values_NK.float() * (arrays["value_range"][:, None] / -255.0)
    return values_NK.float()
