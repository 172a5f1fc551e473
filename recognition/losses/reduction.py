"""Cosines to the classes of a shard, reduced to one number per row, in pieces that fit a cache.

No tensor of all the shard's logits exists beyond a stated budget: the backward computes each piece
again, three GEMMs after the forward's one, or reads back what the budget let it keep, two.

Letters: B rows of the global batch, S sampled classes of this rank, n of a piece, K sub-centres,
D embedding, m rows of the batch whose class is on this rank.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recognition.losses.logits import Logits
from recognition.losses.margin import Margin


def gate(x: Tensor, weight: Tensor, logits: Logits, margin: Margin) -> Tensor:
    """x [B, D], unit rows, as the functions below want it.

    Its backward is that of all of them: it runs when the gradients of their results are known, goes
    through the pieces once and leaves the gradient of the centres in logits.rows; `weight` gets
    none and only ties the result to the graph when x needs no gradient.
    """
    return _Gate.apply(x, weight, logits, *logits.learned(margin))


def target_cosines(x: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """Cosine of each row to its own class, the nearest of K sub-centres: [B], 0 if not held here;
    and which sub-centre that is: int64 [m]. x: what gate() gave."""
    return _TargetCosines.apply(x, logits)


def log_sum_exp(x: Tensor, logits: Logits) -> Tensor:
    """log(sum over the shard's sampled classes j != y of exp(scale * negatives(cos_j))): [B].

    x: what gate() gave. -inf for a row without a negative here. One GEMM a piece, two with centres.
    """
    return _Reduced.apply(x, logits, "softmax")


def softplus_sum(x: Tensor, logits: Logits) -> Tensor:
    """Sum over the shard's sampled classes j != y of log(1 + exp(scale * negatives(cos_j))): [B].

    As log_sum_exp().
    """
    return _Reduced.apply(x, logits, "sigmoid")


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: logits of scale 64 need fp32, bf16 ones are off by a quarter."""
    return torch.autocast(x.device.type, enabled=False)


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, logits: Logits, *learned: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.logits, ctx.learned = logits, learned
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # [B, D]
        (x,) = ctx.saved_tensors
        with full_precision(x):
            grad_x, grads = ctx.logits.backward(x, list(ctx.learned))
        return grad_x + grad, None, None, *grads


class _TargetCosines(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        ctx.logits = logits
        cos, nearest = logits.target_cosines(x)
        ctx.mark_non_differentiable(nearest)
        return cos, nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[None, ...]:  # [B]
        ctx.logits.pull = grad
        return None, None


class _Reduced(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Logits, kind: Literal["softmax", "sigmoid"]) -> Tensor:
        ctx.logits = logits
        logits.kind = kind
        return logits.log_sum_exp(x) if kind == "softmax" else logits.softplus_sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # [B]
        ctx.logits.push = grad
        return None, None, None
