"""The logits of the classes other than a row's own, reduced to one number per row, and back.

Where the margin leaves these classes' cosines alone (most do), a chunk is one GEMM whose result
becomes exp(scale * cos) in place, and the backward adds two GEMMs to it; the norms of the centres
act on the [B, n] product, so no normalised copy of them is made. Margins that change the negatives
take the general way: cosines, their formula, and autograd through it, a chunk at a time.

Three interfaces say what may vary: a Reducer is one of these ways, a Kernel picks the way for a
forward, and ChunkPasses is what the quick way does beside its GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from recognition.head.chunks import Chunk, Chunks, TargetCosines
from recognition.losses.margin import Margin, Rows


class Formula(NamedTuple):
    """What the logits of the other classes follow from, in the forward and the backward alike."""

    margin: Margin  # frozen
    batch: Rows  # constant
    centres: Tensor | None = None  # [B, D] unit centre of each row's class, if the margin wants it

    def logits(self, cos: Tensor, centre_cos: Tensor | None) -> Tensor:  # [B, n] -> [B, n]
        return self.margin.scale * self.margin.filtered_negatives(cos, self.batch, centre_cos)


class Reducer(Protocol):
    """The reduction of one forward over the classes of this rank, and its backward."""

    def reduce(self, x: Tensor) -> Tensor:
        """[B] over this rank's sampled classes j != y, of z_j = scale * negatives(cos_j):
        log(sum of exp(z_j)) for a "softmax" margin, -inf where there is no such class, and the sum
        of log(1 + exp(z_j)) for a "sigmoid" one. x: [B, D], unit rows."""

    def gradients(
        self,
        x: Tensor,
        own: TargetCosines,
        pull: Tensor,  # [m] gradient of the target cosines
        push: Tensor,  # [B] gradient of what reduce() returned
        learned: list[Tensor],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradient of x [B, D] and those of the margin's learned numbers; that of the class
        rows goes to chunks.class_rows. It walks the chunks once, after reduce()."""


class Kernel(Protocol):
    """How a head computes its reduction: plain_kernel(), or one of recognition/kernels."""

    def __call__(self, chunks: Chunks, formula: Formula) -> Reducer: ...


class ChunkPasses(Protocol):
    """The passes over a chunk's memory that ExpSums makes beside the two GEMMs of its gradients."""

    def sum_exp(self, chunk: Chunk, scaled: Tensor) -> Tensor:
        """Sum over the chunk's classes but for a row's own of exp(z), z = scaled @ w_hat: [B].
        scaled: scale * x [B, D], narrow."""

    def slopes(self, chunk: Chunk, scaled: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp(z) / |w| [B, n], 0 for a row's own class; the centres [n, D]; and the sum over the
        rows of along * z * exp(z), [n]. along: [B]."""


def plain_kernel(chunks: Chunks, formula: Formula) -> Reducer:
    """By torch's operations, on any device and for every margin."""
    return reducer_of(chunks, formula, TorchPasses(chunks))


def reducer_of(chunks: Chunks, formula: Formula, passes: ChunkPasses) -> Reducer:
    """The quick way with these passes where the margin allows it, else the general one."""
    margin = formula.margin
    if margin.reduction == "softmax" and margin.leaves_negatives and needs_no_base(chunks, margin):
        return ExpSums(chunks, formula, passes)
    return ThroughFormula(chunks, formula)


def needs_no_base(chunks: Chunks, margin: Margin) -> bool:
    """Whether sums of exp(z) stay within the dtype's range: |z| <= scale, which is a number."""
    scale, info = margin.scale, torch.finfo(chunks.inverse.dtype)
    return (
        chunks.num_subcenters == 1
        and not margin.needs_lse
        and isinstance(scale, int | float)
        and scale + math.log(max(len(chunks.class_rows), 1)) < math.log(info.max) - 2
        and -scale > math.log(info.tiny) + 2
    )


class ExpSums:
    """The quick way: z = scale * cos, and exp(z) needs no base."""

    def __init__(self, chunks: Chunks, formula: Formula, passes: ChunkPasses) -> None:
        self._chunks, self._scale, self._passes = chunks, formula.margin.scale, passes

    def reduce(self, x: Tensor) -> Tensor:
        scaled, self._mass = self._chunks.narrow(x * self._scale), x.new_zeros(len(x))
        for chunk in self._chunks:
            self._mass += self._passes.sum_exp(chunk, scaled)
        self._chunks.is_walked = True
        return self._mass.log()

    def gradients(
        self, x: Tensor, own: TargetCosines, pull: Tensor, push: Tensor, learned: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        chunks, total = self._chunks, torch.zeros_like(x)
        chunks.class_rows.begin_gradient()
        targets = chunks.target_gradients(x, own, pull)
        along = torch.where(self._mass > 0, push / self._mass, 0.0)  # no negatives: no gradient
        share = along * self._scale
        scaled, pulling = chunks.narrow(x * self._scale), chunks.narrow(x * share[:, None])
        for chunk in chunks:
            spread, weight, radial = self._passes.slopes(chunk, scaled, along)
            chunks.add_gradients(chunk, spread, weight, radial, pulling, total, targets)
        total.mul_(share[:, None]).index_add_(0, chunks.targets.row, targets.x)
        chunks.memory.release()
        return total, [None] * len(learned)


class TorchPasses:
    """A chunk that is kept keeps z. Where the GEMMs take bf16 numbers, it keeps exp(z) / |w| in
    bf16, in half the memory: that is what the GEMMs get, and z follows from it to within 2^-8."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks, self._memory = chunks, chunks.memory
        self._keeps_exp = chunks.dtype == torch.bfloat16 != chunks.inverse.dtype
        if self._keeps_exp:
            self._memory.keep_as(torch.bfloat16)

    def sum_exp(self, chunk: Chunk, scaled: Tensor) -> Tensor:
        z, _ = self._chunks.cosines(chunk, scaled)
        is_kept = self._memory.keeps(chunk)
        e = self._exponentials(z, chunk, apart=is_kept and not self._keeps_exp)
        if is_kept and self._keeps_exp:
            torch.mul(e, chunk.inverse, out=self._memory.kept(chunk))
        return e.sum(1)

    def slopes(self, chunk: Chunk, scaled: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._keeps_exp and self._chunks.is_kept(chunk):
            spread = self._memory.kept(chunk)
            e = torch.div(spread, chunk.inverse, out=self._memory.spare(chunk))
            radial = torch.mv(e.xlogy_(e).T, along)  # of exp(z) z, 0 where exp(z) is 0
            return spread, self._chunks.read(chunk), radial
        z, weight = self._chunks.cosines(chunk, scaled)
        spread = self._exponentials(z, chunk, apart=True)
        radial = torch.mv(z.mul_(spread).T, along)
        return torch.mul(spread, chunk.inverse, out=spread), weight, radial

    def _exponentials(self, z: Tensor, chunk: Chunk, apart: bool) -> Tensor:
        """exp(z) [B, n], 0 where the class is the row's own. apart: z is still needed."""
        e = torch.exp(z, out=self._memory.spare(chunk)) if apart else z.exp_()
        if chunk.own is not None:
            e.index_put_(chunk.own, e.new_zeros(()))  # a Python number would wait for the device
        return e


class ThroughFormula:
    """The general way: the margin's formula on each chunk of cosines, and autograd through it."""

    def __init__(self, chunks: Chunks, formula: Formula) -> None:
        self._chunks, self._formula = chunks, formula
        self._is_softmax = formula.margin.reduction == "softmax"

    def reduce(self, x: Tensor) -> Tensor:
        if not self._is_softmax:
            total = x.new_zeros(len(x))
            for z in self._logits(x):
                total += torch.logaddexp(z, z.new_zeros(())).sum(1)
            return total
        mass, peak = x.new_zeros(len(x)), x.new_full((len(x),), -torch.inf)
        for z in self._logits(x):
            higher = torch.maximum(peak, z.amax(1))  # the largest z so far
            base = _finite(higher)
            mass = mass * (peak - base).exp() + z.sub_(base[:, None]).exp_().sum(1)
            peak = higher
        # The backward's exp(z - peak) / mass is right to a rounding; exp(z - lse) has that of lse.
        self._mass, self._peak = mass, _finite(peak)
        return peak + mass.log()

    def _logits(self, x: Tensor) -> Iterator[Tensor]:
        """z [B, n] of each chunk, -inf where the class is the row's own."""
        x = self._chunks.narrow(x)
        for chunk in self._chunks:
            cos, _ = self._chunks.cosines(chunk, x)
            z = self._logit(self._nearest(cos)[0], chunk)
            if chunk.own is not None:
                z.index_put_(chunk.own, z.new_full((), -torch.inf))
            yield z
        self._chunks.is_walked = True

    def gradients(
        self, x: Tensor, own: TargetCosines, pull: Tensor, push: Tensor, learned: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        chunks, total = self._chunks, torch.zeros_like(x)
        chunks.class_rows.begin_gradient()
        targets = chunks.target_gradients(x, own, pull)
        share, narrow = push, chunks.narrow(x)
        if self._is_softmax:
            share = torch.where(self._mass > 0, push / self._mass, 0.0)  # no negatives: no gradient
        sums = [torch.zeros_like(number) for number in learned]
        for chunk in chunks:
            cos, weight = chunks.cosines(chunk, narrow)
            spread, parts = self._through_formula(cos, chunk, share, learned)
            for number, part in zip(sums, parts, strict=True):
                number += 0.0 if part is None else part
            radial = cos.mul_(spread).sum(0)
            spread = torch.mul(spread, chunk.inverse, out=spread)
            chunks.add_gradients(chunk, spread, weight, radial, narrow, total, targets)
        total.index_add_(0, chunks.targets.row, targets.x)
        chunks.memory.release()
        return total, [*sums]

    def _through_formula(
        self, cos: Tensor, chunk: Chunk, share: Tensor, learned: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients of `cos` [B, n * K] and of the learned numbers."""
        nearest_cos, nearest = self._nearest(cos)
        nearest_cos = nearest_cos.detach()
        with torch.enable_grad():
            z = self._logit(nearest_cos.requires_grad_(), chunk)
        if self._is_softmax:
            slope = (z.detach() - self._peak[:, None]).exp_().mul_(share[:, None])
        else:
            slope = torch.sigmoid(z.detach()).mul_(share[:, None])
        if chunk.own is not None:
            slope.index_put_(chunk.own, slope.new_zeros(()))
        grad, *parts = torch.autograd.grad(z, [nearest_cos, *learned], slope, allow_unused=True)
        if nearest is None:
            return grad, parts
        wide = grad.new_zeros(*grad.shape, self._chunks.num_subcenters)
        return wide.scatter_(2, nearest[..., None], grad[..., None]).flatten(1), parts

    def _logit(self, cos: Tensor, chunk: Chunk) -> Tensor:
        centre_cos = None
        if self._formula.centres is not None:
            weight = self._chunks.read(chunk)
            centre_cos = (self._formula.centres @ weight.T).mul_(chunk.inverse)
        return self._formula.logits(cos, centre_cos)

    def _nearest(self, cos: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cosine to the nearest sub-centre [B, n], and which one it is (None for K = 1)."""
        if self._chunks.num_subcenters == 1:
            return cos, None
        return cos.view(len(cos), -1, self._chunks.num_subcenters).max(2)


def _finite(peak: Tensor) -> Tensor:
    """A base for the exponentials: the largest logit so far, 0 where there is none."""
    return torch.where(peak == -torch.inf, 0.0, peak)
