"""The plain form on a CPU with its passes over memory compiled for the processor at hand.

The GEMMs stay the library's, and what the plain form keeps, computes again or leaves to autograd
stays as it is; recognition/head/kernels/cpu_library.py has the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recognition.head.chunked_softmax import Formula, Reducer, reducer_of
from recognition.head.chunks import Chunk, Chunks, product
from recognition.head.kernels.cpu_library import CpuLibrary


def native_kernel(library: CpuLibrary, chunks: Chunks, formula: Formula) -> Reducer:
    """A logits.Kernel once `library` is bound: margins that need their formula go by torch."""
    return reducer_of(chunks, formula, NativePasses(library, chunks))


class NativePasses:
    """See logits.ChunkPasses; memory that is kept holds scaled @ w, -inf for a row's own class."""

    def __init__(self, library: CpuLibrary, chunks: Chunks) -> None:
        self._library, self._chunks = library, chunks
        self._centres: Tensor | None = None  # [n, D]

    def sum_exp(self, chunk: Chunk, scaled: Tensor) -> Tensor:
        z, _ = self._products(chunk, scaled)
        return self._library.sum_exp(z, chunk.inverse)

    def slopes(self, chunk: Chunk, scaled: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, weight = self._products(chunk, scaled)
        radial = self._library.slopes(z, chunk.inverse, along)
        return z, weight, radial

    def _products(self, chunk: Chunk, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """scaled @ w [B, n], -inf where the class is the row's own, and the centres w [n, D]."""
        weight, out = self._read(chunk), self._chunks.memory.of(chunk)
        if not self._chunks.is_kept(chunk):
            product(scaled, self._chunks.narrow(weight).T, out)
            if chunk.own is not None:
                self._library.leave_out(out, *chunk.own)
        return out, weight

    def _read(self, chunk: Chunk) -> Tensor:  # [n, D]
        """The centres; the first time leaves their norms."""
        table, index = self._chunks.class_rows.source(chunk.where)
        table, is_walked = table.flatten(0, 1), self._chunks.is_walked
        if index is None:
            if not is_walked:
                self._library.read_rows(table, None, None, chunk.inverse)
            return table
        if self._centres is None:  # the first chunk is the largest
            self._centres = table.new_empty(chunk.inverse.shape[0], table.shape[1])
        out = self._centres[: chunk.inverse.shape[0]]
        if is_walked:
            return torch.index_select(table, 0, index, out=out)
        self._library.read_rows(table, index, out, chunk.inverse)
        return out
