"""The rows of the class matrix that one step uses: unit centres piece by piece, and one gradient.

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding, n classes of a piece.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / n along the last axis, and n = |x| [..., 1]; n is 1 where |x| is 0, so 0 stays 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > torch.finfo(x.dtype).tiny, norm, 1.0)
    return x / norm, norm


class SampledRows:
    """The centres of the sampled classes, read from the weight when asked for, never copied whole.

    The gradient of the loss with respect to the raw rows is collected here, one tensor [S, K, D]
    for both of its sources (targets and negatives), so autograd never adds two of that size.
    """

    def __init__(self, weight: Tensor, rows: np.ndarray | None) -> None:
        self.weight = weight.detach()  # [C_r, K, D]
        self.rows = rows  # int64 [S] of the weight, on the host; None: all of them, in order
        self.index = None if rows is None else to_device(rows, weight.device)
        self.grad: Tensor | None = None  # [S, K, D]
        self._version = self.weight._version

    def __len__(self) -> int:
        return len(self.weight if self.index is None else self.index)

    def unit(self, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """unit() of the centres at some places of the sample: [n, K, D] and [n, K, 1]."""
        if self.index is None:
            return unit(self.weight[where])
        return unit(self.weight.index_select(0, self.index[where]))

    def add_gradient(
        self,
        where: slice | Tensor,
        grad_unit: Tensor,  # [n, K, D] with respect to the unit centres at `where`, repeats allowed
        centres: Tensor,  # [n, K, D] and
        norm: Tensor,  # [n, K, 1], what unit(where) gave
    ) -> None:
        """Through w_hat = w / |w|: dL/dw = (dL/dw_hat - <dL/dw_hat, w_hat> w_hat) / |w|.

        Raises:
            RuntimeError: the weight has changed since the forward.
        """
        if self.weight._version != self._version:
            raise RuntimeError("the class rows were changed between a forward and its backward")
        radial = (grad_unit * centres).sum(-1, keepdim=True)
        grad = torch.addcmul(grad_unit, radial, centres, value=-1).div_(norm)
        if isinstance(where, slice):
            self.gradient()[where] += grad
        else:
            self.gradient().index_add_(0, where, grad)

    def gradient(self) -> Tensor:
        """The gradient so far; zeros before the first contribution."""
        if self.grad is None:
            self.grad = self.weight.new_zeros(len(self), *self.weight.shape[1:])
        return self.grad


def merge(first: SampledRows, second: SampledRows) -> SampledRows:
    """The rows and gradients of two micro-steps as one: union and sum."""
    if first.rows is None or second.rows is None:
        first.gradient().add_(second.gradient())
        return first
    device = first.weight.device
    union, place = np.unique(np.concatenate([first.rows, second.rows]), return_inverse=True)
    merged = SampledRows(first.weight, union)
    for part, where in ((first, place[: len(first)]), (second, place[len(first) :])):
        merged.gradient().index_add_(0, to_device(where, device), part.gradient())
    return merged


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits for the stream
    return tensor.to(device, non_blocking=True)
