"""A teacher whose logits come from a store: stored rows to logits on a device, and these to another encoding's arrays.

Legend: R flat rows, C classes, W width of a hidden state.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from storage.arrays import Array, Arrays
from storage.encodings import Dense, Encoding, HeadArrays, Hidden, TopK
from storage.encodings.dense import loaded_values
from storage.manifest import Manifest
from studenttrain.heads import Head
from teacherdump.sparsify import TeacherRows, build_sparsify
from teacherdump.teacher import CHUNK_VALUES, find_device

FromStore = Callable[[Arrays, Array | None], dict[str, Array]]
"""Flat arrays of a store, and the random numbers of its rows where the encoding draws, to flat arrays of another."""


def head_on(head: HeadArrays, encoding: Hidden, device: torch.device) -> Head:
    """A store's head on a device, float32."""

    def moved(values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device).float()

    bias_C = None if head.bias_C is None else moved(head.bias_C)
    return Head(moved(head.weight_CW), bias_C, encoding.scale, encoding.soft_cap)


def build_from_store(
    manifest: Manifest, head: HeadArrays | None, encoding: Encoding, temperatures: Sequence[float], device: str
) -> FromStore:
    """What makes the arrays of another encoding from a store's.

    Of a float32 dense store they are, bit for bit, what the teacher's own logits give: a centred logit is what an
    encoding works on in any case.

    Args:
        manifest: of the store, dense or hidden.
        head: of a hidden store; else None.
        encoding: of the result.
        temperatures: of the result.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: there is no such device here.
    """
    there, where = manifest.encoding, find_device(device)
    on_device = None if head is None or not isinstance(there, Hidden) else head_on(head, there, where)
    keeps_codes = isinstance(there, Dense) and there.values == "uint8" == getattr(encoding, "values", None)
    # codes are taken over as they are: to quantise them once more would move them once more
    made = TopK(encoding.k, "float32") if keeps_codes and isinstance(encoding, TopK) else encoding
    sparsify = build_sparsify(made, temperatures)
    step = max(1, CHUNK_VALUES.get(where.type, CHUNK_VALUES["cpu"]) // manifest.num_classes)

    def encode(flat: Arrays, uniform_R: Array | None) -> dict[str, Array]:
        parts = []
        num_rows = len(flat["max_logit"])
        for start in range(0, num_rows, step):
            part = {name: values[start : start + step] for name, values in flat.items()}
            uniform = None if uniform_R is None else torch.from_numpy(uniform_R[start : start + step]).to(where)
            with torch.inference_mode():
                found = sparsify(_rows(part, on_device, where, uniform))
            arrays = {name: values.cpu().numpy() for name, values in found.items()}
            parts.append(arrays | (_codes(part, arrays, encoding) if keeps_codes else {}))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return encode


def _rows(part: Arrays, head: Head | None, device: torch.device, uniform_R: Tensor | None) -> TeacherRows:
    if head is None:
        return TeacherRows(torch.from_numpy(loaded_values(part)).to(device), None, uniform_R)
    hidden_RW = torch.from_numpy(np.ascontiguousarray(part["hidden"])).to(device).float()
    return TeacherRows(head.logits(hidden_RW), None, uniform_R, hidden_RW)


def _codes(part: Arrays, arrays: Arrays, encoding: Encoding) -> dict[str, Array]:
    """The bytes of a uint8 store as they are: all of a row's, or those of the kept entries."""
    codes = part["values"]
    if isinstance(encoding, TopK):
        codes = np.take_along_axis(codes, arrays["ids"].astype(np.int64), axis=1)
    return {"values": codes, "value_range": part["value_range"]}
