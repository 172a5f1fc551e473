"""The rows of the class matrix that one step uses: unit centres piece by piece, and one gradient.

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding, n classes of a piece.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| along the last axis, and |x| [..., 1]. A zero vector stays zero, its slope finite."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > torch.finfo(x.dtype).tiny, norm, 1.0), norm


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

    def __len__(self) -> int:
        return len(self.weight if self.index is None else self.index)

    def read(self, where: slice | Tensor) -> Tensor:  # places in the sample -> [n, K, D]
        if self.index is None:
            return self.weight[where]
        return self.weight.index_select(0, self.index[where])

    def add_gradient(self, where: slice | Tensor, grad_unit: Tensor) -> None:
        """Add the gradient with respect to the unit centres at `where` (repeats allowed) [n, K, D].

        Through w_hat = w / |w|: dL/dw = (dL/dw_hat - <dL/dw_hat, w_hat> w_hat) / |w|.
        """
        centres, norm = unit(self.read(where))
        radial = (grad_unit * centres).sum(-1, keepdim=True)
        grad = (grad_unit - radial * centres) / torch.where(norm > 0, norm, 1.0)
        if isinstance(where, slice):
            self.gradient()[where] += grad
        else:
            self.gradient().index_add_(0, where, grad)

    def gradient(self) -> Tensor:
        """The gradient so far; zeros before the first contribution."""
        if self.grad is None:
            self.grad = self.weight.new_zeros(len(self), *self.weight.shape[1:])
        return self.grad


def merge_gradients(parts: list[SampledRows]) -> SampledRows:
    """The parts of several micro-steps as one: union of the rows, sum of their gradients."""
    if len(parts) == 1:
        return parts[0]
    weight = parts[0].weight
    grads = [part.gradient() for part in parts]
    rows = [part.rows for part in parts if part.rows is not None]
    if not rows:
        merged = SampledRows(weight, None)
        merged.grad = torch.stack(grads).sum(0)
        return merged
    union, place = np.unique(np.concatenate(rows), return_inverse=True)
    merged = SampledRows(weight, union)
    merged.gradient().index_add_(0, to_device(place, weight.device), torch.cat(grads))
    return merged


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    return torch.from_numpy(array).to(device, non_blocking=True)
