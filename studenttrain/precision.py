"""The arithmetic of the student's forward pass: float32, or autocast to a smaller type."""

import contextlib
from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device does not train in.

    Raises:
        ValueError: fp16 on a CPU, where nothing scales the loss for it.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision: expected fp32 or bf16 on {device.type}, got fp16; fp16 needs --device cuda")


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which matrix products and convolutions run in that precision; weights stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def build_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small fp16 gradients from vanishing: a loss scale that adapts; it does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
