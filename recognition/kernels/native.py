"""The plain form on a CPU with its passes over memory compiled for the processor at hand.

The GEMMs stay the library's, and what the plain way keeps, computes again or leaves to autograd
stays as it is; recognition/passes.py has the rest.

Letters: B rows of the global batch, n classes of a piece, D embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recognition.losses.cutting import Piece
from recognition.losses.logits import Logits
from recognition.losses.products import product
from recognition.passes import Passes


class NativeLogits(Logits):
    """Logits whose plain way goes through `passes`; others go through torch."""

    def __init__(self, passes: Passes, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._passes = passes
        self._centres_room: Tensor | None = None  # [n, D]

    def _masses(self, piece: Piece, scaled: Tensor) -> Tensor:
        z, _ = self._products(piece, scaled)
        return self._passes.sum_exp(z, piece.inverse)

    def _slopes(self, piece: Piece, scaled: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, weight = self._products(piece, scaled)
        radial = self._passes.slopes(z, piece.inverse, along)
        return z, weight, radial

    def _products(self, piece: Piece, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """scaled @ w [B, n], -inf where the class is the row's own, and the centres w [n, D]."""
        weight, room = self._read_once(piece), self._room(piece, scaled)
        if not (self._is_written and self._kept_here(piece)):
            product(scaled, self._narrow(weight).T, room)
            if piece.own is not None:
                self._passes.leave_out(room, *piece.own)
        return room, weight

    def _read_once(self, piece: Piece) -> Tensor:  # [n, D]
        """The centres; the first time leaves their norms."""
        table, index = self.rows.source(piece.where)
        table = table.flatten(0, 1)
        if index is None:
            if not self._has_inverse:
                self._passes.read_rows(table, None, None, piece.inverse)
            return table
        if self._centres_room is None:  # the first piece is the largest
            self._centres_room = table.new_empty(piece.inverse.shape[0], table.shape[1])
        out = self._centres_room[: piece.inverse.shape[0]]
        if self._has_inverse:
            return torch.index_select(table, 0, index, out=out)
        self._passes.read_rows(table, index, out, piece.inverse)
        return out
