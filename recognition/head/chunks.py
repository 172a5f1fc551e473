"""The sampled classes of one forward, cut into chunks that fit a cache, and their matrix products.

No tensor of all the shard's logits exists beyond a stated budget: the backward computes the
products of a chunk again, or reads back those that the budget let the forward keep.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.common.files import is_file
from data_tools.common.text import read_text
from recognition.head.class_rows import ClassRows, Pool
from recognition.losses.margin import add_rows_

# On a GPU the products [B, n] pass through its memory in any case: chunks are large, so that few
# kernels are launched.
_GPU_BYTES = 128 << 20
_LEAST, _MOST = 128, 1 << 16
_STEP = 64  # n is a multiple of the GEMMs' tiles
_USUAL_L2 = 1 << 20


class Targets(NamedTuple):
    """The rows of the batch whose class is on this rank, ordered by that class's place."""

    row: Tensor  # int64 [m]
    place: Tensor  # int64 [m] in the sample
    local_id: Tensor  # int64 [m] in the shard
    place_list: list[int]  # the same as `place`, on the host


class TargetCosines(NamedTuple):
    """The cosine of each target row to its own class, and to which of the K sub-centres it is."""

    cos: Tensor  # [m] the largest of K
    nearest: Tensor  # int64 [m]


class TargetGradients(NamedTuple):
    """What the gradients of the target cosines add, before the radial part is taken off."""

    x: Tensor  # [m, D] to the rows of the batch
    centre: Tensor  # [m, D] to the centres
    radial: Tensor  # [m] what of it is along the centre, times |w|^2
    column: Tensor  # int64 [m] of the centre in its chunk


class Chunk(NamedTuple):
    number: int
    where: slice  # of the sample
    own: tuple[Tensor, Tensor] | None  # (row, column) of the targets in it; None: there are none
    targets: slice  # those targets
    inverse: Tensor  # [n * K] of 1 / |w|, written by the first pass


class ChunkMemory:
    """Memory for what is computed of a chunk: the first chunks keep it until the backward is over,
    the others share."""

    def __init__(
        self, like: Tensor, num_rows: int, columns: int, num: int, stored_bytes: int, pool: Pool
    ) -> None:
        self._like, self._num_rows, self._columns, self._pool = like, num_rows, columns, pool
        self._num, self._stored_bytes = num, stored_bytes
        self._kept: Tensor | None = None  # [chunks that are kept, B * columns]
        self._shared: dict[bool, Tensor] = {}  # [B * columns]
        self.keep_as(like.dtype)

    def keep_as(self, dtype: torch.dtype) -> None:
        """Keep numbers of this dtype. If it is not the one that is computed, of() is shared by all
        chunks, and what is to be kept is copied to kept()."""
        self._kept_like = self._like.new_empty(0, dtype=dtype)
        chunk_bytes = max(self._num_rows * self._columns * dtype.itemsize, 1)
        self._num_kept = min(self._stored_bytes // chunk_bytes, self._num)

    def keeps(self, chunk: Chunk) -> bool:
        return chunk.number < self._num_kept

    def of(self, chunk: Chunk) -> Tensor:  # [B, n * K]
        if self.keeps(chunk) and self._kept_like.dtype == self._like.dtype:
            return self.kept(chunk)
        return self._shared_by_all(chunk, is_spare=False)

    def kept(self, chunk: Chunk) -> Tensor:
        """[B, n * K] of a chunk that keeps its numbers, in the dtype of keep_as()."""
        if self._kept is None:
            shape = self._num_kept, self._num_rows * self._columns
            self._kept = self._pool.take(self._kept_like, *shape)
        return self._view(self._kept[chunk.number], chunk)

    def spare(self, chunk: Chunk) -> Tensor:
        """[B, n * K] beside of(chunk), until the next chunk."""
        return self._shared_by_all(chunk, is_spare=True)

    def _shared_by_all(self, chunk: Chunk, is_spare: bool) -> Tensor:
        if is_spare not in self._shared:
            self._shared[is_spare] = self._like.new_empty(self._num_rows * self._columns)
        return self._view(self._shared[is_spare], chunk)

    def _view(self, memory: Tensor, chunk: Chunk) -> Tensor:
        columns = len(chunk.inverse)
        return memory[: self._num_rows * columns].view(self._num_rows, columns)

    def release(self) -> None:
        """The backward is over: nothing is kept."""
        self._pool.give(self._kept)
        self._kept, self._num_kept, self._shared = None, 0, {}


class Chunks:
    """The chunks of one forward in order, their centres, and their products with the batch.

    The forward goes through them at least once and then sets `is_walked`: the norms of the centres
    are known, and the first chunks' products are kept as far as `stored_bytes` allows.
    """

    def __init__(
        self,
        class_rows: ClassRows,
        targets: Targets,
        num_rows: int,  # B
        size: int,  # classes of a chunk
        stored_bytes: int,  # of products kept for the backward; the rest is computed again
        pool: Pool,
        dtype: torch.dtype | None = None,  # of the GEMMs' inputs; None: the weight's
    ) -> None:
        weight = class_rows.like
        self.class_rows, self.targets = class_rows, targets
        self.num_subcenters = weight.shape[1]
        self.dtype = dtype or weight.dtype
        self.is_walked = False
        self.inverse = weight.new_empty(len(class_rows) * self.num_subcenters)  # 1 / |w|; [S * K]
        self._column = targets.place % size  # int64 [m] of each target in its chunk
        self._chunks = list(self._cut(size))
        self.memory = ChunkMemory(
            weight,
            num_rows,
            min(size, len(class_rows)) * self.num_subcenters,
            len(self._chunks),
            stored_bytes,
            pool,
        )

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    def _cut(self, size: int) -> Iterator[Chunk]:
        num, each, first = len(self.class_rows), self.num_subcenters, 0
        targets = self.targets
        for number, start in enumerate(range(0, num, size)):
            stop, last = min(start + size, num), first
            while last < len(targets.place_list) and targets.place_list[last] < stop:
                last += 1
            own = None
            if last > first:
                own = targets.row[first:last], self._column[first:last]
            inverse = self.inverse[start * each : stop * each]
            yield Chunk(number, slice(start, stop), own, slice(first, last), inverse)
            first = last

    # --- The centres of the targets ---

    @functools.cached_property
    def target_centres(self) -> Tensor:
        """[m, K, D] of the classes of the targets."""
        return self.class_rows.read_few(self.targets.place, self.targets.place_list)

    def target_cosines(self, x: Tensor) -> TargetCosines:
        centres = self.target_centres
        cos = torch.einsum("md,mkd->mk", x[self.targets.row], centres) / _norm(centres)
        return TargetCosines(*cos.max(1))

    def target_gradients(self, x: Tensor, own: TargetCosines, pull: Tensor) -> TargetGradients:
        """pull: [m] gradient of the target cosines. The norms of all centres are known."""
        centres = self.target_centres
        place = self.targets.place * self.num_subcenters + own.nearest
        weight = (pull * self.inverse[place])[:, None]  # [m, 1]
        if self.num_subcenters == 1:
            nearest = centres[:, 0]
        else:
            which = own.nearest[:, None, None].expand(-1, 1, centres.shape[2])
            nearest = centres.gather(1, which)[:, 0]
        column = self._column * self.num_subcenters + own.nearest
        return TargetGradients(
            weight * nearest, x[self.targets.row].mul_(weight), pull * own.cos, column
        )

    # --- The products of a chunk ---

    def read(self, chunk: Chunk) -> Tensor:
        """Its centres [n * K, D], not to be changed."""
        return self.class_rows.read(chunk.where).flatten(0, 1)

    def narrow(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the GEMMs' inputs."""
        return tensor.to(self.dtype)

    def cosines(self, chunk: Chunk, x: Tensor) -> tuple[Tensor, Tensor]:
        """x @ w_hat [B, n * K], and the centres w [n * K, D]; neither is to be changed beyond this
        pass. x: [B, D] narrow, unit rows or scaled ones, the same in every pass."""
        weight = self.read(chunk)
        out = self.memory.of(chunk)
        if self.is_kept(chunk):
            return out, weight
        product(x, self.narrow(weight).T, out)
        if not self.is_walked:
            torch.reciprocal(_norm(weight), out=chunk.inverse)
        return out.mul_(chunk.inverse), weight

    def is_kept(self, chunk: Chunk) -> bool:
        """Whether its memory has the products of an earlier pass."""
        return self.is_walked and self.memory.keeps(chunk)

    def add_gradients(
        self,
        chunk: Chunk,
        spread: Tensor,  # [B, n * K] gradient of x @ w of the rows in `pulling`
        weight: Tensor,  # [n * K, D]
        radial: Tensor,  # [n * K] what of the centres' gradient is along them, times |w|^2; changed
        pulling: Tensor,  # [B, D] narrow
        total: Tensor,  # [B, D] gradient of x, summed over the chunks; changed
        own: TargetGradients,
    ) -> None:
        """Two GEMMs: to the gradient of x, and to that of the chunk's centres with its targets'."""
        spread = self.narrow(spread)
        add_product(total, spread, self.narrow(weight))
        grad = self.class_rows.room(chunk.where)  # [n, K, D]
        flat = product(spread.T, pulling, grad.flatten(0, 1))
        if chunk.own is not None:
            column = own.column[chunk.targets]
            add_rows_(flat, column, own.centre[chunk.targets])
            add_rows_(radial, column, own.radial[chunk.targets])
        radial.mul_(chunk.inverse).mul_(chunk.inverse)
        self.class_rows.add_gradient(chunk.where, grad, weight.view_as(grad), radial)


# --- Products of narrow numbers with wide sums ----------------------------------------------------


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in `out`, whose dtype is that of the sums: fp32 of bf16 numbers, too."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed as product() does."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _norm(centres: Tensor) -> Tensor:
    """|w| along the last axis, 1 where it is 0."""
    norm = torch.linalg.vector_norm(centres, dim=-1)
    return norm.masked_fill_(norm <= torch.finfo(norm.dtype).tiny, 1.0)


# --- The size of a chunk --------------------------------------------------------------------------


def chunk_size(num_rows: int, weight: Tensor, num_subcenters: int) -> int:
    """Classes of a chunk of this weight for a batch of B rows."""
    size, bytes_each = weight.shape[-1], weight.element_size()
    return size_for(num_rows, size, num_subcenters, bytes_each, weight.is_cuda)


def size_for(
    num_rows: int, embedding_size: int, num_subcenters: int, bytes_each: int, is_cuda: bool
) -> int:
    """n: the centres of a chunk, their gradient and their logits fill the second-level caches of
    the threads at work twice over: GEMMs of fewer are no quicker, and every chunk has its cost."""
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
    if is_file(path):
        found = re.fullmatch(r"(\d+)([KM])", read_text(path).strip())
        if found:
            return int(found[1]) << {"K": 10, "M": 20}[found[2]]
    return _USUAL_L2
