"""The operations of fused.py in torch, and by torch.compile: what a Triton program has to beat."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from recognition.head.chunks import product
from recognition.head.class_rows import unit


class TorchOperations:
    """See fused.Operations. compiled: each through torch.compile, so that all that follows a GEMM
    is one kernel; the first call of a dtype then takes seconds."""

    def __init__(self, compiled: bool = True) -> None:
        make: Callable = torch.compile(dynamic=True) if compiled else lambda function: function
        self._unit_rows = make(_unit_rows)
        self._sums, self._softmax, self._project = make(_sums), make(_softmax), make(_project)

    def unit_rows(
        self, weight: Tensor, index: Tensor | None, unit: Tensor, inverse: Tensor
    ) -> None:
        rows = weight if index is None else weight.index_select(0, index)
        self._unit_rows(rows, unit, inverse)

    def masses(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None
    ) -> Tensor:
        return self._sums(_logits(x, unit), own - start, limit)

    def weights(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None, base: Tensor
    ) -> Tensor:
        return self._softmax(_logits(x, unit), own - start, limit, base, x.dtype)

    def project(
        self, grad: Tensor, weight: Tensor, inverse: Tensor, factor: Tensor, out: Tensor
    ) -> None:
        self._project(grad, weight, inverse, factor, out)


def _logits(x: Tensor, unit: Tensor) -> Tensor:  # [B, n]
    wide = torch.promote_types(x.dtype, torch.float32)
    return product(x, unit.T, x.new_empty(len(x), len(unit), dtype=wide))


def _unit_rows(rows: Tensor, out: Tensor, inverse: Tensor) -> None:
    unit_rows, norm = unit(rows)
    out.copy_(unit_rows)
    inverse.copy_(norm[:, 0].reciprocal())


def _sums(z: Tensor, own: Tensor, limit: float | None) -> Tensor:
    if limit is not None:
        z = torch.where(z > limit, 0.0, z)
    return torch.where(_is_own(z, own), 0.0, z.exp2()).sum(1)


def _softmax(
    z: Tensor, own: Tensor, limit: float | None, base: Tensor, dtype: torch.dtype
) -> Tensor:
    weights = (z - base[:, None]).exp2()
    left_out = _is_own(z, own)
    if limit is not None:
        left_out = left_out | (z > limit)
    return torch.where(left_out, 0.0, weights).to(dtype)


def _project(grad: Tensor, weight: Tensor, inverse: Tensor, factor: Tensor, out: Tensor) -> None:
    grad = grad * (inverse * factor)[:, None]
    radial = (grad * weight).sum(1) * inverse * inverse
    out.copy_(grad - radial[:, None] * weight)


def _is_own(z: Tensor, own: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device) == own[:, None]


@functools.cache
def compiled_operations() -> TorchOperations:
    return TorchOperations()
