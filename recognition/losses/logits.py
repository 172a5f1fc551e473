"""The logits of one forward: computed piece by piece, and their gradient in one backward.

Where the margin leaves the other classes' cosines alone (most do), a piece is one GEMM whose result
becomes exp(scale * cos) in place, and the backward adds two GEMMs to it; the norms of the centres
act on the [B, n] product, so no normalised copy of them is made. Margins that change the negatives
take the general way: cosines, their formula, and autograd through it, a piece at a time.

Letters: B rows of the global batch, S sampled classes of this rank, n of a piece, K sub-centres,
D embedding, m rows of the batch whose class is on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from recognition.losses.cutting import Piece, Targets, cut
from recognition.losses.margin import Margin, Rows
from recognition.losses.products import add_product, product
from recognition.rows import Pool, SampledRows


class Logits:
    """What a forward's logits are computed from, and what its backward needs of them."""

    margin: Margin  # frozen: both times the same state
    batch: Rows  # constant
    centres: Tensor | None = None  # [B, D] unit centre of each row's class, if the margin wants it

    def __init__(
        self,
        rows: SampledRows,
        targets: Targets,
        num_rows: int,  # B
        size: int,  # classes of a piece
        stored_bytes: int,  # of results kept for the backward; the rest is computed again
        pool: Pool,
        dtype: torch.dtype | None = None,  # of the GEMMs' inputs; None: the weight's
    ) -> None:
        self.rows, self.targets, self.size = rows, targets, size
        weight = rows.like
        self.num_subcenters = weight.shape[1]
        self.dtype = dtype or weight.dtype
        self.inverse = weight.new_empty(len(rows) * self.num_subcenters)  # 1 / |w|; [S * K]
        self.nearest: Tensor | None = None  # int64 [m] sub-centre of each target
        self.own_cos: Tensor | None = None  # [m] cosine to it
        self.pull: Tensor | None = None  # [B] gradient of the target cosines
        self.push: Tensor | None = None  # [B] gradient of the reduction
        self.peak: Tensor | None = None  # [B] base of the exponentials; None: it is 0
        self.mass: Tensor | None = None  # [B] sum of exp(z - base)
        self.kind: Literal["softmax", "sigmoid"] = "softmax"
        self._pool = pool
        self._has_inverse = False
        columns = size * self.num_subcenters
        piece_bytes = max(num_rows * columns * weight.element_size(), 1)
        self._num_kept = min(stored_bytes // piece_bytes, -(-len(rows) // size))
        self._kept: Tensor | None = None
        if self._num_kept:
            self._kept = pool.take(weight, self._num_kept, num_rows * columns)
        self._is_written = False  # what is kept
        self._scaled: Tensor | None = None  # scale * x of the plain way, narrow; [B, D]
        self._column = targets.place % size  # int64 [m] of each target in its piece
        self._owned: Tensor | None = None
        self._cut: list[Piece] | None = None
        self._spares: dict[int, Tensor] = {}
        self._rooms: dict[tuple[int, int], Tensor] = {}  # views of them

    def learned(self, margin: Margin) -> list[Tensor]:
        return [p for p in margin.parameters() if p.dim() == 0]

    def is_plain(self) -> bool:
        """z = scale * cos, without a base."""
        return self.kind == "softmax" and self.margin.leaves_negatives and self.needs_no_base()

    def needs_no_base(self) -> bool:
        """The scale is a number that exp bears: |z| <= scale."""
        scale, info = self.margin.scale, torch.finfo(self.rows.like.dtype)
        return (
            self.num_subcenters == 1
            and not self.margin.needs_lse
            and isinstance(scale, int | float)
            and scale + math.log(max(len(self.rows), 1)) < math.log(info.max) - 2
            and -scale > math.log(info.tiny) + 2
        )

    def owned(self) -> Tensor:
        """The centres [m, K, D] of the targets."""
        if self._owned is None:
            self._owned = self.rows.read_few(self.targets.place, self.targets.place_list)
        return self._owned

    # --- Forward ---

    def target_cosines(self, x: Tensor) -> tuple[Tensor, Tensor]:  # -> [B], int64 [m]
        centres = self.owned()  # [m, K, D]
        norm = _norm(centres)
        cos, nearest = (torch.einsum("md,mkd->mk", x[self.targets.row], centres) / norm).max(1)
        self.nearest, self.own_cos = nearest, cos
        return x.new_zeros(len(x)).index_copy_(0, self.targets.row, cos), nearest

    def log_sum_exp(self, x: Tensor) -> Tensor:  # [B]
        self.mass = x.new_zeros(len(x))
        if self.is_plain():
            self.peak = None
            scaled = self._scaled = (x * self.margin.scale).to(self.dtype)
            for piece in self._pieces():
                self.mass += self._masses(piece, scaled)
            self._is_written = self._kept is not None
            return self.mass.log()
        peak = x.new_full((len(x),), -torch.inf)  # the largest z so far
        for z in self._general(x):
            higher = torch.maximum(peak, z.amax(1))
            base = _finite(higher)
            self.mass = self.mass * (peak - base).exp() + z.sub_(base[:, None]).exp_().sum(1)
            peak = higher
        # The backward's exp(z - peak) / mass is right to a rounding; exp(z - lse) has that of lse.
        self.peak = _finite(peak)
        return peak + self.mass.log()

    def softplus_sum(self, x: Tensor) -> Tensor:  # [B]
        total = x.new_zeros(len(x))
        for z in self._general(x):
            total += torch.logaddexp(z, z.new_zeros(())).sum(1)
        return total

    def _masses(self, piece: Piece, scaled: Tensor) -> Tensor:  # [B]
        """Sum over the piece of exp(z), where z is plain; scaled: scale * x, narrow."""
        z, _ = self._cosines(piece, scaled)
        return self._exponentials(z, piece, self._kept_here(piece)).sum(1)

    def _exponentials(self, z: Tensor, piece: Piece, apart: bool) -> Tensor:
        """exp(z) [B, n], 0 where the class is the row's own. apart: z is still wanted."""
        e = torch.exp(z, out=self._spare(1, *z.shape)) if apart else z.exp_()
        if piece.own is not None:
            e[piece.own] = 0.0
        return e

    def _general(self, x: Tensor) -> Iterator[Tensor]:
        """z [B, n] of each piece, -inf where the class is the row's own."""
        narrow = x.to(self.dtype)
        for piece in self._pieces():
            cos, _ = self._cosines(piece, narrow)
            z = self._logit(self._nearest(cos)[0], piece)
            if piece.own is not None:
                z[piece.own] = -torch.inf
            yield z
        self._is_written = self._kept is not None

    def _kept_here(self, piece: Piece) -> bool:
        return piece.number < self._num_kept

    def _cosines(self, piece: Piece, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n * K], and the centres [n * K, D] that they are with; not to be changed.
        narrow: the rows of the batch, to scale where the cosines are to be so."""
        weight = self._read(piece)
        room = self._room(piece, narrow)
        if self._is_written and self._kept_here(piece):
            return room, weight
        cos = product(narrow, self._narrow(weight).T, room)
        return cos.mul_(self._inverse(piece, weight)), weight

    def _logit(self, cos: Tensor, piece: Piece) -> Tensor:
        own_cos = None
        if self.centres is not None:
            weight = self._read(piece)
            own_cos = (self.centres @ weight.T).mul_(self._inverse(piece, weight))
        margin = self.margin
        return margin.scale * margin.filtered_negatives(cos, self.batch, own_cos)

    def _nearest(self, cos: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cosine to the nearest sub-centre [B, n], and which one it is (None for K = 1)."""
        if self.num_subcenters == 1:
            return cos, None
        return cos.view(len(cos), -1, self.num_subcenters).max(2)

    # --- Backward ---

    def backward(self, x: Tensor, learned: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Gradients of x [B, D] and of the learned numbers; that of the centres goes to `rows`."""
        self.rows.begin_gradient()
        self._has_inverse = True
        own_pull, own_grad, own_radial = self._target_gradients(x)
        assert self.nearest is not None
        own_column = self._column * self.num_subcenters + self.nearest
        push = x.new_zeros(len(x)) if self.push is None else self.push
        grads = [torch.zeros_like(number) for number in learned]
        plain = self.is_plain()
        share = push
        if self.kind == "softmax":
            assert self.mass is not None
            share = torch.where(self.mass > 0, push / self.mass, 0.0)  # no negatives: no gradient
        if plain:
            share = share * self.margin.scale
            assert self._scaled is not None
            scaled, pulling, along = self._scaled, x * share[:, None], share / self.margin.scale
        else:
            scaled, pulling, along = x.to(self.dtype), x, share
        pulling, total = pulling.to(self.dtype), torch.zeros_like(x)
        for piece in self._pieces():
            # radial: what each centre is pulled along itself, which its norm takes no part in.
            if plain:
                spread, weight, radial = self._slopes(piece, scaled, along)
            else:
                cos, weight = self._cosines(piece, scaled)
                spread = self._through_formula(cos, piece, share, learned, grads)
                radial = cos.mul_(spread).sum(0)
                spread = torch.mul(spread, piece.inverse, out=spread)
            spread = spread.to(self.dtype)
            add_product(total, spread, self._narrow(weight))
            grad = self.rows.room(piece.where)  # [n, K, D]
            flat = product(spread.T, pulling, grad.flatten(0, 1))
            if piece.own is not None:
                columns = own_column[piece.targets]
                flat.index_add_(0, columns, own_grad[piece.targets])
                radial.index_add_(0, columns, own_radial[piece.targets])
            radial.mul_(piece.inverse).mul_(piece.inverse)
            self.rows.add_gradient(piece.where, grad, weight.view_as(grad), radial)
        if plain:
            total.mul_(share[:, None])
        total.index_add_(0, self.targets.row, own_pull)
        self._pool.give(self._kept)
        self._kept, self._is_written, self._num_kept = None, False, 0
        self.pull = self.push = self._owned = None
        self._spares, self._rooms = {}, {}
        return total, grads

    def _slopes(self, piece: Piece, scaled: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where z is plain: exp(z) / |w| [B, n], the centres [n, D], and [n] of each the sum over
        the rows of along * z * exp(z). along: [B]."""
        z, weight = self._cosines(piece, scaled)
        spread = self._exponentials(z, piece, apart=True)
        radial = torch.mv(z.mul_(spread).T, along)
        return torch.mul(spread, piece.inverse, out=spread), weight, radial

    def _target_gradients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The targets' part in the gradient of their rows of x [m, D], and in that of their centres
        [m, D], before what points along these is taken off: [m], times |w|^2."""
        row = self.targets.row
        assert self.nearest is not None and self.own_cos is not None
        inverse = self.inverse[self.targets.place * self.num_subcenters + self.nearest]  # [m]
        pull = x.new_zeros(len(row)) if self.pull is None else self.pull[row]
        weight = (pull * inverse)[:, None]
        return weight * self._nearest_owned(), x[row].mul_(weight), pull * self.own_cos

    def _nearest_owned(self) -> Tensor:
        """The centre [m, D] of each target, the nearest of K."""
        if self.num_subcenters == 1:
            return self.owned()[:, 0]
        assert self.nearest is not None
        which = self.nearest[:, None, None].expand(-1, 1, self.rows.like.shape[2])
        return self.owned().gather(1, which)[:, 0]

    def _through_formula(
        self,
        cos: Tensor,  # [B, n * K]
        piece: Piece,
        share: Tensor,
        learned: list[Tensor],
        grads: list[Tensor],
    ) -> Tensor:
        """The gradient of `cos`; that of the learned numbers is added to theirs."""
        nearest_cos, nearest = self._nearest(cos)
        nearest_cos = nearest_cos.detach()
        with torch.enable_grad():
            z = self._logit(nearest_cos.requires_grad_(), piece)
        if self.kind == "sigmoid":
            slope = torch.sigmoid(z.detach()).mul_(share[:, None])
        else:
            assert self.peak is not None
            slope = (z.detach() - self.peak[:, None]).exp_().mul_(share[:, None])
        if piece.own is not None:
            slope[piece.own] = 0.0
        grad, *more = torch.autograd.grad(z, [nearest_cos, *learned], slope, allow_unused=True)
        for total, part in zip(grads, more, strict=True):
            total += 0.0 if part is None else part
        if nearest is None:
            return grad
        wide = grad.new_zeros(*grad.shape, self.num_subcenters)
        return wide.scatter_(2, nearest[..., None], grad[..., None]).flatten(1)

    # --- Pieces ---

    def _pieces(self) -> Iterator[Piece]:
        """Once through the sample. The first time leaves the norms of the centres."""
        if self._cut is None:
            self._cut = [*cut(self.targets, self._column, self.inverse, len(self.rows), self.size)]
        yield from self._cut
        self._has_inverse = True

    def _read(self, piece: Piece) -> Tensor:  # [n * K, D]
        return self.rows.read(piece.where).flatten(0, 1)

    def _inverse(self, piece: Piece, weight: Tensor) -> Tensor:  # [n * K]
        if not self._has_inverse:
            torch.reciprocal(_norm(weight), out=piece.inverse)
        return piece.inverse

    def _narrow(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def _room(self, piece: Piece, narrow: Tensor) -> Tensor:
        """Memory for [B, n * K] of a piece: of what is kept, or of this moment."""
        columns = piece.inverse.shape[0]
        if self._kept is not None and self._kept_here(piece):
            return self._kept[piece.number, : narrow.shape[0] * columns].view(-1, columns)
        return self._spare(0, narrow.shape[0], columns)

    def _spare(self, which: int, num_rows: int, columns: int) -> Tensor:
        """One of two memories [B, n * K] of this moment, the same for all pieces."""
        room = self._rooms.get((which, columns))
        if room is None:
            if which not in self._spares:  # the first piece is the largest
                self._spares[which] = self.inverse.new_empty(num_rows * columns)
            room = self._spares[which][: num_rows * columns].view(num_rows, columns)
            self._rooms[which, columns] = room
        return room


def _norm(centres: Tensor) -> Tensor:
    """|w| along the last axis, 1 where it is 0."""
    norm = torch.linalg.vector_norm(centres, dim=-1)
    return norm.masked_fill_(norm <= torch.finfo(norm.dtype).tiny, 1.0)


def _finite(peak: Tensor) -> Tensor:
    """A base for the exponentials: the largest logit so far, 0 where there is none."""
    return torch.where(peak == -torch.inf, 0.0, peak)
