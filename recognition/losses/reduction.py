"""Cosines to the classes of a shard, reduced to one number per row, in pieces that fit a cache.

No tensor of all the shard's logits exists: the backward computes each piece again.

Letters: B rows of the global batch, S sampled classes of this rank, n of a piece, K sub-centres,
D embedding, m rows of the batch whose class is on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recognition.losses.margin import Margin, Rows
from recognition.rows import SampledRows

# Bytes of one [B, n] piece. On two cores 1 to 8 MiB measure alike; below, the GEMMs are too small.
_PIECE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
_LEAST_PIECE = 256


class Targets(NamedTuple):
    """The rows of the batch whose class is on this rank, ordered by that class's place."""

    row: Tensor  # int64 [m]
    place: Tensor  # int64 [m] in the sample
    place_list: list[int]  # the same, on the host


def target_cosines(x: Tensor, weight: Tensor, rows: SampledRows, targets: Targets) -> Tensor:
    """Cosine of each row to its own class, the nearest of K sub-centres: [B], 0 if not held here.

    x: unit rows [B, D]. Call it, and the next, outside autocast. The gradient of the centres goes
    to rows.grad, none to `weight`, which only ties the result to the graph when x needs no
    gradient.
    """
    return _TargetCosines.apply(x, weight, rows, targets)


def negatives_log_sum_exp(
    x: Tensor,  # [B, D] unit rows
    weight: Tensor,
    rows: SampledRows,
    targets: Targets,
    margin: Margin,
    batch: Rows,
    piece: int | None = None,  # classes of a piece; None: from the cache
) -> Tensor:
    """log(sum over the shard's sampled classes j != y of exp(scale * negatives(cos_j))): [B].

    -inf for a row without a negative here. Forward: one GEMM per piece; backward: three.
    """
    size = piece or piece_size(x, rows.weight.shape[1])
    constant = Rows(*(field.detach() for field in batch))
    return _NegativesLogSumExp.apply(x, weight, rows, targets, margin, constant, size)


def piece_size(x: Tensor, num_subcenters: int) -> int:
    """Classes of a piece: so many that its logits take _PIECE_BYTES, at least _LEAST_PIECE."""
    row_bytes = max(len(x), 1) * num_subcenters * x.element_size()
    return max(_PIECE_BYTES["cuda" if x.is_cuda else "cpu"] // row_bytes, _LEAST_PIECE)


class _TargetCosines(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: SampledRows, targets: Targets) -> Tensor:
        centres, _ = rows.unit(targets.place)  # [m, K, D]
        cos, nearest = torch.einsum("md,mkd->mk", x[targets.row], centres).max(1)
        ctx.save_for_backward(x, nearest)
        ctx.rows, ctx.targets = rows, targets
        return x.new_zeros(len(x)).index_copy_(0, targets.row, cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [B]
        x, nearest = ctx.saved_tensors
        rows, (row, place, _) = ctx.rows, ctx.targets
        centres, norm = rows.unit(place)
        pull = grad[row, None]  # [m, 1]
        index = nearest[:, None, None].expand(-1, 1, x.shape[1])  # [m, 1, D]
        grad_x = torch.zeros_like(x).index_copy_(0, row, pull * centres.gather(1, index)[:, 0])
        grad_centres = torch.zeros_like(centres).scatter_(1, index, (pull * x[row])[:, None])
        rows.add_gradient(place, grad_centres, centres, norm)
        return grad_x, None, None, None


class _NegativesLogSumExp(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rows: SampledRows,
        targets: Targets,
        margin: Margin,
        batch: Rows,
        size: int,
    ) -> Tensor:
        peak = x.new_full((len(x),), -torch.inf)  # the largest z so far
        mass = x.new_zeros(len(x))  # sum of exp(z - peak)
        for where, own in _pieces(rows, targets, size):
            centres, _ = rows.unit(where)
            cos, _ = _nearest(x, centres)
            z = margin.scale * margin.filtered_negatives(cos, batch)
            z[own] = -torch.inf
            higher = torch.maximum(peak, z.amax(1))
            base = _finite(higher)
            mass = mass * (peak - base).exp() + z.sub_(base[:, None]).exp_().sum(1)
            peak = higher
        # The backward's exp(z - peak) / mass is right to a rounding; exp(z - lse) has that of lse.
        ctx.save_for_backward(x, _finite(peak), mass)
        ctx.arguments = rows, targets, margin, batch, size
        return peak + mass.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [B]
        x, base, mass = ctx.saved_tensors
        rows, targets, margin, batch, size = ctx.arguments
        grad_x = torch.zeros_like(x)
        rows.gradient()  # a rank without a single sampled class has one too
        weight = torch.where(mass > 0, grad / mass, 0.0)  # a row without negatives gets none
        with full_precision(x):
            for where, own in _pieces(rows, targets, size):
                centres, norm = rows.unit(where)
                cos, nearest = _nearest(x, centres)
                with torch.enable_grad():
                    cos.requires_grad_()
                    z = margin.scale * margin.filtered_negatives(cos, batch)
                grad_z = (z.detach() - base[:, None]).exp_()  # [B, n]
                grad_z[own] = 0.0
                grad_z.mul_(weight[:, None])
                (grad_cos,) = torch.autograd.grad(z, cos, grad_z)
                spread = _spread(grad_cos, nearest, centres.shape[1])  # [B, n * K]
                flat = centres.flatten(0, 1)
                grad_x.addmm_(spread, flat)
                rows.add_gradient(where, (spread.T @ x).view_as(centres), centres, norm)
        return grad_x, None, None, None, None, None, None


def _pieces(
    rows: SampledRows, targets: Targets, size: int
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Each piece of the sample, and the (row, column) of the targets that lie in it."""
    first = 0
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        last = first
        while last < len(targets.place_list) and targets.place_list[last] < stop:
            last += 1
        yield slice(start, stop), (targets.row[first:last], targets.place[first:last] - start)
        first = last


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cosine to the nearest sub-centre [B, n], and which one it is (None for K = 1)."""
    n, num_subcenters, _ = centres.shape
    cos = x @ centres.flatten(0, 1).T
    if num_subcenters == 1:
        return cos, None
    return cos.view(len(x), n, num_subcenters).max(2)


def _spread(grad: Tensor, nearest: Tensor | None, num_subcenters: int) -> Tensor:
    """The gradient of the nearest sub-centre's cosine, laid out over all of them: [B, n * K]."""
    if nearest is None:
        return grad
    wide = grad.new_zeros(*grad.shape, num_subcenters)
    return wide.scatter_(2, nearest[..., None], grad[..., None]).flatten(1)


def _finite(peak: Tensor) -> Tensor:
    """A base for the exponentials: the largest logit so far, 0 where there is none."""
    return torch.where(peak == -torch.inf, 0.0, peak)


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: logits of scale 64 need fp32, bf16 ones are off by a quarter."""
    return torch.autocast(x.device.type, enabled=False)
