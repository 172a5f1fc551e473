"""What the log says of a value that every class has: its mean and its distribution over all shards.

Letters: C_r classes of this shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recognition.losses.margin import Histogram, Reduce

_BINS = 50


def class_mean(values: Tensor, reduce: Reduce) -> Tensor:  # [C_r] -> []
    """The mean over the classes of all shards, float64."""
    wide = values.double()
    total, count = reduce(torch.stack([wide.sum(), wide.new_tensor(len(wide))]), "sum").unbind()
    return total / count


def class_histogram(values: Tensor, reduce: Reduce) -> Histogram:  # [C_r] ->
    """How the classes of all shards spread between their smallest and largest value."""
    wide = values.double()
    nothing = wide.new_tensor([-torch.inf])
    ends = torch.stack([torch.cat([wide, nothing]).max(), torch.cat([-wide, nothing]).max()])
    high, low = reduce(ends, "max") * wide.new_tensor([1, -1])
    width = torch.where(high > low, high - low, 1.0)  # all alike, or none
    place = ((wide - low) / width * _BINS).long().clamp(0, _BINS - 1)
    counts = wide.new_zeros(_BINS).index_add_(0, place, torch.ones_like(wide))
    edges = low + width * torch.linspace(0, 1, _BINS + 1, dtype=wide.dtype, device=wide.device)
    return Histogram(edges.nan_to_num(0.0, 0.0, 0.0), reduce(counts, "sum"))
