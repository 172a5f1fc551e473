"""The operations of fused.py as Triton programs, for GPUs of compute capability 8.0 and newer.

TRITON_INTERPRET=1, set before this file is imported, runs them on the CPU, a thread at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
MOST_EMBEDDING_SIZE = 4096  # one program holds a row in its registers
_ROW_NUMBERS = 4096  # numbers of the rows that such a program holds
_LINE_BYTES = 128  # of a row or class that a step of the products' loop reads

# Of a product's inputs, by the dtype of the sums.
DTYPES = {torch.bfloat16, torch.float16, torch.float32}
_SUMS = {dtype: tl.float32 for dtype in DTYPES} | {torch.float64: tl.float64}


class TileSizes(NamedTuple):
    """What one program computes of the logits."""

    rows: int
    classes: int
    warps: int
    stages: int  # steps of the products' loop that are being read

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}"


BLOCKS = [TileSizes(128, 128, 8, 3), TileSizes(128, 256, 8, 3), TileSizes(64, 256, 8, 3)]
# A program of more logits keeps more sums than there are registers, where the products of fp32
# numbers are exact: outside the matrix units.
_MOST_EXACT = 128 * 128


def blocks_for(dtype: torch.dtype) -> list[TileSizes]:
    """Those of BLOCKS worth a trial for products of this dtype."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return [b for b in BLOCKS if not exact or b.rows * b.classes <= _MOST_EXACT]


class TritonOperations:
    """See fused.Operations."""

    def __init__(self, blocks: TileSizes) -> None:
        self.blocks = blocks

    def unit_rows(
        self, weight: Tensor, index: Tensor | None, unit: Tensor, inverse: Tensor
    ) -> None:
        num, size = unit.shape
        options = row_options(size)
        _unit_rows[(triton.cdiv(num, options["ROWS"]),)](
            weight,
            inverse if index is None else index,
            unit,
            inverse,
            num,
            HAS_INDEX=index is not None,
            TINY=torch.finfo(weight.dtype).tiny,
            **options,
        )

    def masses(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None
    ) -> Tensor:
        class_blocks = triton.cdiv(len(unit), self.blocks.classes)
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = x.new_empty(class_blocks, len(x), dtype=wide)
        _masses[(self._num_programs(x, unit),)](
            x,
            unit,
            own,
            parts,
            len(x),
            len(unit),
            start,
            limit or 0.0,
            HAS_LIMIT=limit is not None,
            **product_options(self.blocks, x),
        )
        return parts.sum(0)

    def weights(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None, base: Tensor
    ) -> Tensor:
        stride = triton.cdiv(len(unit), 64) * 64  # whole lines, which the GEMMs want
        weights = x.new_empty(len(x), stride)
        _weights[(self._num_programs(x, unit),)](
            x,
            unit,
            own,
            base,
            weights,
            len(x),
            len(unit),
            start,
            stride,
            limit or 0.0,
            HAS_LIMIT=limit is not None,
            **product_options(self.blocks, x),
        )
        return weights[:, : len(unit)]

    def project(
        self, grad: Tensor, weight: Tensor, inverse: Tensor, factor: Tensor, out: Tensor
    ) -> None:
        num, size = grad.shape
        options = row_options(size)
        _project[(triton.cdiv(num, options["ROWS"]),)](
            grad, weight, inverse, factor, out, num, **options
        )

    def _num_programs(self, x: Tensor, unit: Tensor) -> int:
        blocks = self.blocks
        return triton.cdiv(len(x), blocks.rows) * triton.cdiv(len(unit), blocks.classes)


def row_options(size: int) -> dict[str, Any]:
    width = triton.next_power_of_2(size)
    return {"D": size, "WIDTH": width, "ROWS": max(_ROW_NUMBERS // width, 1)}


def product_options(blocks: TileSizes, x: Tensor) -> dict[str, Any]:
    precise = torch.get_float32_matmul_precision() == "highest"
    return {
        "D": x.shape[1],
        "ROWS": blocks.rows,
        "CLASSES": blocks.classes,
        "DEPTH": _LINE_BYTES // x.element_size(),
        "SUMS": _SUMS[x.dtype],
        "PRECISION": "ieee" if precise else "tf32",
        "WIDEN": INTERPRETED,  # whose product takes bf16's bits for integers
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


# --- Programs -------------------------------------------------------------------------------------


@triton.jit
def _unit_rows(
    weight,
    index,
    unit,
    inverse,
    num,
    HAS_INDEX: tl.constexpr,
    TINY: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num)[:, None] & (column < D)[None, :]
    source = row.to(tl.int64)
    if HAS_INDEX:
        source = tl.load(index + row, mask=row < num, other=0)
    w = tl.load(weight + source[:, None] * D + column[None, :], mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(w * w, 1))
    over = 1.0 / tl.where(norm > TINY, norm, 1.0)
    tl.store(inverse + row, over, mask=row < num)
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(unit + place, (w * over[:, None]).to(unit.dtype.element_ty), mask=inside)


@triton.jit
def _project(
    grad,
    weight,
    inverse,
    factor,
    out,
    num,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    over = tl.load(inverse + row, mask=row < num, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0) * (over * tl.load(factor))[:, None]
    w = tl.load(weight + place, mask=inside, other=0.0)
    radial = tl.sum(g * w, 1) * over * over
    tl.store(out + place, g - radial[:, None] * w, mask=inside)


@triton.jit
def _logits(
    x,
    unit,
    num_rows,
    num,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # z2 of this program's rows and classes, and which these are; programs that follow each other
    # have the same classes.
    row_blocks = tl.cdiv(num_rows, ROWS)
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) // row_blocks) * CLASSES + tl.arange(0, CLASSES)
    depth = tl.arange(0, DEPTH)
    # What is beyond the end is read from the beginning, and its products are never used.
    x_at = x + (row % num_rows)[:, None] * D + depth[None, :]
    unit_at = unit + (column % num)[None, :] * D + depth[:, None]
    z = tl.zeros((ROWS, CLASSES), dtype=SUMS)
    for done in range(0, D, DEPTH):
        if D % DEPTH == 0:
            a = tl.load(x_at)
            b = tl.load(unit_at)
        else:
            a = tl.load(x_at, mask=depth[None, :] < D - done, other=0.0)
            b = tl.load(unit_at, mask=depth[:, None] < D - done, other=0.0)
        if WIDEN:
            a, b = a.to(SUMS), b.to(SUMS)
        z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=SUMS)
        x_at += DEPTH
        unit_at += DEPTH
    return z, row, column


@triton.jit
def _masses(
    x,
    unit,
    own,
    parts,
    num_rows,
    num,
    start,
    limit,
    HAS_LIMIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    z, row, column = _logits(
        x, unit, num_rows, num, D, ROWS, CLASSES, DEPTH, SUMS, PRECISION, WIDEN
    )
    own_column = tl.load(own + row, mask=row < num_rows, other=-1) - start
    e = tl.exp2(z)
    if HAS_LIMIT:
        e = tl.where(z > limit, 1.0, e)
    counts = (column[None, :] != own_column[:, None]) & (column < num)[None, :]
    block = tl.program_id(0) // tl.cdiv(num_rows, ROWS)
    tl.store(parts + block * num_rows + row, tl.sum(tl.where(counts, e, 0.0), 1), row < num_rows)


@triton.jit
def _weights(
    x,
    unit,
    own,
    base,
    weights,
    num_rows,
    num,
    start,
    stride,
    limit,
    HAS_LIMIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    z, row, column = _logits(
        x, unit, num_rows, num, D, ROWS, CLASSES, DEPTH, SUMS, PRECISION, WIDEN
    )
    own_column = tl.load(own + row, mask=row < num_rows, other=-1) - start
    p = tl.exp2(z - tl.load(base + row, mask=row < num_rows, other=0.0)[:, None])
    counts = column[None, :] != own_column[:, None]
    if HAS_LIMIT:
        counts = counts & (z <= limit)
    p = tl.where(counts, p, 0.0).to(weights.dtype.element_ty)
    inside = (row < num_rows)[:, None] & (column < num)[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(weights + place, p, mask=inside)
