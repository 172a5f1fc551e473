"""The reduction over a shard's classes in which no [B, n] of fp32 is written or read.

A chunk of classes takes, in the forward, one pass that makes its centres unit rows in the dtype of
the products, and one program that is their GEMM with the batch, the exponentials and the sums over
classes: it leaves a number a row. The backward computes the logits again into softmax weights of
the products' dtype, from which the library's GEMMs make both gradients, summed in fp32, and one
pass takes the centres' through their normalisation.

One program for the weights and both gradients would save the [B, n] of them, 6 bytes a logit,
where the four products of D = 512 are 4096 operations a logit; but it needs a fifth product, or
atomic sums that differ from run to run.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from recognition.head.chunked_softmax import Formula, Reducer, needs_no_base, plain_kernel
from recognition.head.chunks import Chunk, Chunks, TargetCosines, add_product, product
from recognition.losses.margin import Margin, add_rows_

_LOG2_E = math.log2(math.e)


class Operations(Protocol):
    """What a fused form is made of. z2 = x @ unit.T: logits to the base 2, computed in fp32 or
    wider; `own` int64 [B]: the place in the sample of each row's class, -1 if it is not there;
    start: place of the chunk's first class; limit: z2 above it count as 0 and have no gradient."""

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
        """Sum over the chunk's classes, but for the own one, of 2^z2: [B]."""

    def weights(
        self, x: Tensor, unit: Tensor, own: Tensor, start: int, limit: float | None, base: Tensor
    ) -> Tensor:
        """2^(z2 - base) in x's dtype, 0 for the own class: [B, n]. base: [B]."""

    def project(
        self, grad: Tensor, weight: Tensor, inverse: Tensor, factor: Tensor, out: Tensor
    ) -> None:
        """out = g - (g . w_hat) w_hat, with g = factor * inverse * grad: [n, D]. factor: []."""


def fused_kernel(operations: Operations, chunks: Chunks, formula: Formula) -> Reducer:
    """A logits.Kernel once `operations` are bound: what they cannot do goes by the plain form."""
    if why_unsupported(formula.margin) is not None or not needs_no_base(chunks, formula.margin):
        return plain_kernel(chunks, formula)
    return FusedExpSums(operations, chunks, formula)


class FusedExpSums:
    """See logits.Reducer, for margins that leave the negatives' cosines alone but for the
    inter-class filter, with one centre a class. No product is kept."""

    def __init__(self, operations: Operations, chunks: Chunks, formula: Formula) -> None:
        self._operations, self._chunks = operations, chunks
        self._scale = float(formula.margin.scale)
        threshold = formula.margin.interclass_filtering_threshold
        self._limit = threshold * self._scale * _LOG2_E if threshold else None

    def reduce(self, x: Tensor) -> Tensor:
        scaled, own_place = self._to_base_2(x), self._own_place(len(x))
        self._mass = x.new_zeros(len(x))
        for chunk in self._chunks:
            weight, index = self._chunks.class_rows.source(chunk.where)
            unit = self._unit(chunk, weight.flatten(0, 1), index)
            self._mass += self._operations.masses(
                scaled, unit, own_place, chunk.where.start, self._limit
            )
        self._chunks.is_walked = True
        return self._mass.log()

    def gradients(
        self, x: Tensor, own: TargetCosines, pull: Tensor, push: Tensor, learned: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        chunks, targets, total = self._chunks, self._chunks.targets, torch.zeros_like(x)
        chunks.class_rows.begin_gradient()
        of_targets = chunks.target_gradients(x, own, pull)
        scaled, own_place = self._to_base_2(x), self._own_place(len(x))
        has_negatives = self._mass > 0
        base = torch.where(has_negatives, self._mass, 1.0).log2()
        share = torch.where(has_negatives, push * self._scale, 0.0)
        # As large as the products' dtype bears: fp16 loses what is below 6e-8.
        largest = share.abs().max()
        largest = torch.where(largest > 0, largest, 1.0)
        pulling = chunks.narrow(x * (share / largest)[:, None])
        # Divided by what project() multiplies by.
        of_centres = of_targets.centre / (chunks.inverse[targets.place] * largest)[:, None]
        for chunk in chunks:
            weight = chunks.read(chunk)
            unit = self._unit(chunk, weight, None)
            spread = self._operations.weights(
                scaled, unit, own_place, chunk.where.start, self._limit, base
            )
            add_product(total, spread, unit)
            flat = product(spread.T, pulling, torch.empty_like(weight))
            if chunk.own is not None:
                add_rows_(flat, of_targets.column[chunk.targets], of_centres[chunk.targets])
            grad = chunks.class_rows.room(chunk.where)  # [n, 1, D]
            self._operations.project(flat, weight, chunk.inverse, largest, grad.flatten(0, 1))
            chunks.class_rows.add_gradient(chunk.where, grad, weight.view_as(grad))
        total.mul_(share[:, None]).index_add_(0, targets.row, of_targets.x)
        return total, [None] * len(learned)

    def _to_base_2(self, x: Tensor) -> Tensor:
        """x whose products with unit rows are logits to the base 2."""
        return self._chunks.narrow(x * (self._scale * _LOG2_E))

    def _own_place(self, num_rows: int) -> Tensor:
        """int64 [B] place in the sample of each row's class, -1 if it is not there."""
        targets = self._chunks.targets
        own = targets.place.new_full((num_rows,), -1)
        return own.index_copy_(0, targets.row, targets.place)

    def _unit(self, chunk: Chunk, weight: Tensor, index: Tensor | None) -> Tensor:  # [n, D]
        unit = weight.new_empty(len(chunk.inverse), weight.shape[1], dtype=self._chunks.dtype)
        self._operations.unit_rows(weight, index, unit, chunk.inverse)
        return unit


def why_unsupported(margin: Margin) -> str | None:
    """What of this margin a fused form cannot do; None: it can do all."""
    if margin.reduction != "softmax":
        return "its loss is one-vs-all, no softmax"
    if type(margin).negatives is not Margin.negatives:
        return "it changes the logits of other classes"
    if margin.needs_lse or not isinstance(margin.scale, int | float):
        return "its scale is not constant"
    return None
