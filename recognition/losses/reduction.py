"""Cosines to the classes of a shard, reduced to one number per row, in pieces that fit a cache.

No tensor of all the shard's logits exists: the backward computes each piece again.

Letters: B rows of the global batch, S sampled classes of this rank, n of a piece, K sub-centres,
D embedding, m rows of the batch whose class is on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    local_id: Tensor  # int64 [m] in the shard
    place_list: list[int]  # the same, on the host


class Negatives(NamedTuple):
    """What the logits of the other classes are computed from, twice: forward and backward."""

    rows: SampledRows
    targets: Targets
    margin: Margin  # frozen: both times the same state
    batch: Rows  # constant
    centres: Tensor | None  # [B, D] unit centre of each row's class, if the margin wants it
    size: int  # classes of a piece


def target_cosines(
    x: Tensor, weight: Tensor, rows: SampledRows, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Cosine of each row to its own class, the nearest of K sub-centres: [B], 0 if not held here;
    and which sub-centre that is: int64 [m].

    x: unit rows [B, D]. Call it, and the next two, outside autocast. The gradient of the centres
    goes to rows.grad, none to `weight`, which only ties the result to the graph when x needs no
    gradient.
    """
    return _TargetCosines.apply(x, weight, rows, targets)


def log_sum_exp(x: Tensor, weight: Tensor, negatives: Negatives) -> Tensor:
    """log(sum over the shard's sampled classes j != y of exp(scale * negatives(cos_j))): [B].

    x: unit rows [B, D]. -inf for a row without a negative here. Forward: one GEMM per piece, two
    with centres; backward: three, four with centres.
    """
    return _reduce(_LogSumExp, x, weight, negatives)


def softplus_sum(x: Tensor, weight: Tensor, negatives: Negatives) -> Tensor:
    """Sum over the shard's sampled classes j != y of log(1 + exp(scale * negatives(cos_j))): [B].

    x: unit rows [B, D]. GEMMs as log_sum_exp().
    """
    return _reduce(_SoftplusSum, x, weight, negatives)


def _reduce(kind: type[Function], x: Tensor, weight: Tensor, negatives: Negatives) -> Tensor:
    learned = [p for p in negatives.margin.parameters() if p.dim() == 0]
    return kind.apply(x, weight, negatives, *learned)


def piece_size(x: Tensor, num_subcenters: int) -> int:
    """Classes of a piece: so many that its logits take _PIECE_BYTES, at least _LEAST_PIECE."""
    row_bytes = max(len(x), 1) * num_subcenters * x.element_size()
    return max(_PIECE_BYTES["cuda" if x.is_cuda else "cpu"] // row_bytes, _LEAST_PIECE)


class _TargetCosines(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: SampledRows, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        centres, _ = rows.unit(targets.place)  # [m, K, D]
        cos, nearest = torch.einsum("md,mkd->mk", x[targets.row], centres).max(1)
        ctx.save_for_backward(x, nearest)
        ctx.rows, ctx.targets = rows, targets
        ctx.mark_non_differentiable(nearest)
        return x.new_zeros(len(x)).index_copy_(0, targets.row, cos), nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # [B]
        x, nearest = ctx.saved_tensors
        rows, row, place = ctx.rows, ctx.targets.row, ctx.targets.place
        centres, norm = rows.unit(place)
        pull = grad[row, None]  # [m, 1]
        index = nearest[:, None, None].expand(-1, 1, x.shape[1])  # [m, 1, D]
        grad_x = torch.zeros_like(x).index_copy_(0, row, pull * centres.gather(1, index)[:, 0])
        grad_centres = torch.zeros_like(centres).scatter_(1, index, (pull * x[row])[:, None])
        rows.add_gradient(place, grad_centres, centres, norm)
        return grad_x, None, None, None


class _LogSumExp(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, negatives: Negatives, *learned: Tensor
    ) -> Tensor:
        peak = x.new_full((len(x),), -torch.inf)  # the largest z so far
        mass = x.new_zeros(len(x))  # sum of exp(z - peak)
        for z in _logits(x, negatives):
            higher = torch.maximum(peak, z.amax(1))
            base = _finite(higher)
            mass = mass * (peak - base).exp() + z.sub_(base[:, None]).exp_().sum(1)
            peak = higher
        # The backward's exp(z - peak) / mass is right to a rounding; exp(z - lse) has that of lse.
        ctx.save_for_backward(x, _finite(peak), mass)
        ctx.negatives, ctx.learned = negatives, learned
        return peak + mass.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [B]
        x, base, mass = ctx.saved_tensors
        weight = torch.where(mass > 0, grad / mass, 0.0)  # a row without negatives gets none

        def slope(z: Tensor) -> Tensor:
            return (z - base[:, None]).exp_().mul_(weight[:, None])

        grad_x, grads = _backward(x, ctx.negatives, ctx.learned, slope)
        return grad_x, None, None, *grads


class _SoftplusSum(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, negatives: Negatives, *learned: Tensor
    ) -> Tensor:
        total = x.new_zeros(len(x))
        for z in _logits(x, negatives):
            total += torch.logaddexp(z, z.new_zeros(())).sum(1)
        ctx.save_for_backward(x)
        ctx.negatives, ctx.learned = negatives, learned
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [B]
        (x,) = ctx.saved_tensors

        def slope(z: Tensor) -> Tensor:
            return torch.sigmoid(z).mul_(grad[:, None])

        grad_x, grads = _backward(x, ctx.negatives, ctx.learned, slope)
        return grad_x, None, None, *grads


def _logits(x: Tensor, negatives: Negatives) -> Iterator[Tensor]:
    """z [B, n] of each piece, -inf where the class is the row's own."""
    for where, own in _pieces(negatives):
        centres, _ = negatives.rows.unit(where)
        cos, _ = _nearest(x, centres)
        z = _logit(cos, centres, negatives)
        z[own] = -torch.inf
        yield z


def _backward(
    x: Tensor, negatives: Negatives, learned: tuple[Tensor, ...], slope: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x [B, D] and of the learned numbers, given that of z [B, n] as a function of it;
    that of the centres is added to theirs."""
    rows = negatives.rows
    grad_x = torch.zeros_like(x)
    grads = [torch.zeros_like(number) for number in learned]
    rows.gradient()  # a rank without a single sampled class has one too
    with full_precision(x):
        for where, own in _pieces(negatives):
            centres, norm = rows.unit(where)
            cos, nearest = _nearest(x, centres)
            with torch.enable_grad():
                z = _logit(cos.requires_grad_(), centres, negatives)
            grad_z = slope(z.detach())
            grad_z[own] = 0.0
            grad_cos, *more = torch.autograd.grad(z, [cos, *learned], grad_z, allow_unused=True)
            for total, part in zip(grads, more, strict=True):
                total += 0.0 if part is None else part
            spread = _spread(grad_cos, nearest, centres.shape[1])  # [B, n * K]
            flat = centres.flatten(0, 1)
            grad_x.addmm_(spread, flat)
            rows.add_gradient(where, (spread.T @ x).view_as(centres), centres, norm)
    return grad_x, grads


def _logit(cos: Tensor, centres: Tensor, negatives: Negatives) -> Tensor:
    """z [B, n] of a piece from its cosines and its unit centres [n, K, D]."""
    own = negatives.centres
    centre_cos = None if own is None else own @ centres[:, 0].T
    margin = negatives.margin
    return margin.scale * margin.filtered_negatives(cos, negatives.batch, centre_cos)


def _pieces(negatives: Negatives) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Each piece of the sample, and the (row, column) of the targets that lie in it."""
    rows, targets, size = negatives.rows, negatives.targets, negatives.size
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
