"""How many classes a piece of the reduction holds: from the cache, not by the user.

Letters: B rows of the global batch, n classes of a piece, K sub-centres, D embedding.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from data_tools.common import files

# On a GPU the products [B, n] pass through its memory in any case: pieces are large, so that few
# kernels are launched.
_GPU_BYTES = 128 << 20
_LEAST, _MOST = 128, 1 << 16
_STEP = 64  # n is a multiple: the GEMMs' tiles
_USUAL_L2 = 1 << 20


def piece_size(num_rows: int, weight: Tensor, num_subcenters: int) -> int:
    """Classes of a piece of this weight for a batch of B rows."""
    size, bytes_each = weight.shape[-1], weight.element_size()
    return size_for(num_rows, size, num_subcenters, bytes_each, weight.is_cuda)


def size_for(
    num_rows: int, embedding_size: int, num_subcenters: int, bytes_each: int, is_cuda: bool
) -> int:
    """n: the centres of a piece, their gradient and their logits fill the second-level caches of
    the threads at work twice over: the GEMMs are no quicker on less, and a piece has its price."""
    numbers = num_subcenters * (2 * embedding_size + max(num_rows, 1))  # of a class
    if is_cuda:
        numbers, memory = num_subcenters * max(num_rows, 1), _GPU_BYTES
    else:
        memory = 2 * l2_bytes() * torch.get_num_threads()
    size = memory // (numbers * bytes_each) // _STEP * _STEP
    return min(max(size, _LEAST), _MOST)


@functools.cache
def l2_bytes() -> int:
    """Second-level cache of a core; 1 MiB where the system does not say."""
    path = "/sys/devices/system/cpu/cpu0/cache/index2/size"
    if files.exists(path):
        with open(path) as file:
            found = re.fullmatch(r"(\d+)([KM])", file.read().strip())
        if found:
            return int(found[1]) << {"K": 10, "M": 20}[found[2]]
    return _USUAL_L2
