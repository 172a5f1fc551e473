"""The number format of a run: of its parameters, of its pixels and of its multiplications."""

from __future__ import annotations

import torch

from recognition.distributed.runtime import bf16_is_fast

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: str, device: torch.device) -> str:
    """What "auto" means on a device; others as they are."""
    if precision != "auto":
        return precision
    return "bf16" if bf16_is_fast(device) else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Of parameters and pixels."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
