"""The reduction over a shard's classes in which no [B, n] of fp32 is written or read.

A piece of classes takes, in the forward, one pass that makes its centres unit rows in the dtype of
the products, and one program that is their GEMM with the batch, the exponentials and the sums over
classes: it leaves a number a row. The backward computes the logits again into softmax weights of
the products' dtype, from which the library's GEMMs make both gradients, summed in fp32, and one
pass takes the centres' through their normalisation.

One program for the weights and both gradients would save the [B, n] of them, 6 bytes a logit,
where the four products of D = 512 are 4096 operations a logit; but it needs a fifth product, or
atomic sums that differ from run to run.

Letters: B rows of the global batch, n classes of a piece, D embedding.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from recognition.losses.cutting import Piece
from recognition.losses.logits import Logits
from recognition.losses.margin import Margin
from recognition.losses.products import add_product, product

_LOG2_E = math.log2(math.e)


class Operations(Protocol):
    """What a fused form is made of. z2 = x @ unit.T: logits to the base 2, computed in fp32 or
    wider; `own` int64 [B]: the place in the sample of each row's class, -1 if it is not there;
    start: place of the piece's first class; limit: z2 above it count as 0 and have no gradient."""

    def unit_rows(
        self,
        weight: Tensor,  # [*, D]
        index: Tensor | None,  # int64 [n] rows of it; None: all, n of them
        unit: Tensor,  # [n, D] is written: w / |w|, 0 where w is 0
        inverse: Tensor,  # [n] is written: 1 / |w|, 1 where w is 0
    ) -> None: ...

    def masses(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None
    ) -> Tensor:
        """Sum over the piece's classes, but for the own one, of 2^z2: [B]."""

    def weights(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None, base: Tensor
    ) -> Tensor:
        """2^(z2 - base) in x's dtype, 0 for the own class: [B, n]. base: [B]."""

    def project(
        self, grad: Tensor, weight: Tensor, inverse: Tensor, factor: Tensor, out: Tensor
    ) -> None:
        """out = g - (g . w_hat) w_hat, with g = factor * inverse * grad: [n, D]. factor: []."""


class FusedLogits(Logits):
    """Logits whose margin leaves the negatives' cosines alone but for the inter-class filter, with
    one centre a class; all others take the plain way."""

    def __init__(self, operations: Operations, *arguments: Any) -> None:
        rows, targets, num_rows, size, _, pool, dtype = arguments
        super().__init__(rows, targets, num_rows, size, 0, pool, dtype)  # nothing is kept
        self.operations = operations

    def is_fused(self) -> bool:
        return self.kind == "softmax" and why_not(self.margin) is None and self.needs_no_base()

    def log_sum_exp(self, x: Tensor) -> Tensor:  # [B]
        if not self.is_fused():
            return super().log_sum_exp(x)
        scaled, own = self._to_base_2(x), self._own(len(x))
        self.mass = x.new_zeros(len(x))
        for piece in self._pieces():
            weight, index = self.rows.source(piece.where)
            unit = self._unit(piece, weight.flatten(0, 1), index)
            start = piece.where.start
            self.mass += self.operations.masses(scaled, unit, own, start, self._limit())
        return self.mass.log()

    def backward(self, x: Tensor, learned: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if not self.is_fused():
            return super().backward(x, learned)
        assert self.mass is not None
        self.rows.begin_gradient()
        total = torch.zeros_like(x)
        own_pull, own_grad, _ = self._target_gradients(x)
        scaled, own = self._to_base_2(x), self._own(len(x))
        has_negatives = self.mass > 0
        base = torch.where(has_negatives, self.mass, 1.0).log2()
        push = x.new_zeros(len(x)) if self.push is None else self.push
        share = torch.where(has_negatives, push * self.margin.scale, 0.0)
        # As large as the products' dtype bears: fp16 loses what is below 6e-8.
        largest = share.abs().max()
        largest = torch.where(largest > 0, largest, 1.0)
        pulling = (x * (share / largest)[:, None]).to(self.dtype)
        own_inverse = self.inverse[self.targets.place]
        own_grad /= (own_inverse * largest)[:, None]  # what project() multiplies by
        for piece in self._pieces():
            weight = self._read(piece)
            unit = self._unit(piece, weight, None)
            start = piece.where.start
            spread = self.operations.weights(scaled, unit, own, start, self._limit(), base)
            add_product(total, spread, unit)
            flat = product(spread.T, pulling, torch.empty_like(weight))
            if piece.own is not None:
                flat.index_add_(0, self._column[piece.targets], own_grad[piece.targets])
            grad = self.rows.room(piece.where)  # [n, 1, D]
            inverse = piece.inverse
            self.operations.project(flat, weight, inverse, largest, grad.flatten(0, 1))
            self.rows.add_gradient(piece.where, grad, weight.view_as(grad))
        total.mul_(share[:, None]).index_add_(0, self.targets.row, own_pull)
        self.pull = self.push = None
        return total, [torch.zeros_like(number) for number in learned]

    def _to_base_2(self, x: Tensor) -> Tensor:
        """x whose products with unit rows are logits to the base 2."""
        return (x * (self.margin.scale * _LOG2_E)).to(self.dtype)

    def _own(self, num_rows: int) -> Tensor:
        own = self.targets.place.new_full((num_rows,), -1)
        return own.index_copy_(0, self.targets.row, self.targets.place)

    def _limit(self) -> float | None:
        threshold = self.margin.interclass_filtering_threshold
        return threshold * float(self.margin.scale) * _LOG2_E if threshold else None

    def _unit(self, piece: Piece, weight: Tensor, index: Tensor | None) -> Tensor:  # [n, D]
        inverse = piece.inverse
        unit = weight.new_empty(len(inverse), weight.shape[1], dtype=self.dtype)
        self.operations.unit_rows(weight, index, unit, inverse)
        return unit


def why_not(margin: Margin) -> str | None:
    """What of this margin a fused form cannot do; None: it can do all."""
    if margin.reduction != "softmax":
        return "its loss is one-vs-all, no softmax"
    if type(margin).negatives is not Margin.negatives:
        return "it changes the logits of other classes"
    if margin.needs_lse or not isinstance(margin.scale, int | float):
        return "its scale is no constant"
    return None
