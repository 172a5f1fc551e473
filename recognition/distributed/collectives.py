"""Every collective of training, each with its backward stated. No other file calls one.

One rule explains all gradients here: the loss is the mean over the global batch and is computed
alike on every rank; DistributedDataParallel averages the backbone's gradients. So the gather's
backward multiplies by W, and the gradient of the class rows, which live on one rank only, is
never scaled.

Letters: W ranks, b rows of this rank, B rows of all ranks, D embedding.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import DistError, ProcessGroup

from data_tools.common.errors import UserError
from recognition.distributed.step_timer import communication

# torch 2.13 renamed both; the old names warn there, the new ones are absent before.
_all_gather: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class LostContact(RuntimeError):
    """A collective failed because another rank can no longer be reached. Its __cause__ is the error
    of the library."""


@contextlib.contextmanager
def naming_loss(group: ProcessGroup) -> Iterator[None]:
    """Turn the library's errors inside the body into LostContact.

    gloo raises a bare RuntimeError (torch 2.13), nccl and the store a DistError. At world size 1
    there is no other rank to lose, so errors pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if group.size() == 1 or not (type(error) is RuntimeError or isinstance(error, DistError)):
            raise
        raise LostContact(str(error)) from error


@contextlib.contextmanager
def _exchange(group: ProcessGroup) -> Iterator[None]:
    """Surround a collective: its time counts as communication, its errors become LostContact."""
    with communication(), naming_loss(group):
        yield


def world_group() -> ProcessGroup:
    """The default process group, or a group of this process alone if none was initialised."""
    return dist.distributed_c10d._get_default_group() if dist.is_initialized() else _lone_group()


@functools.cache
def _lone_group() -> ProcessGroup:
    atexit.register(_lone_group.cache_clear)  # its threads must end before the interpreter
    store = dist.HashStore()
    group = dist.ProcessGroup(store, 0, 1)
    backend = dist.ProcessGroupGloo(store, 0, 1, timedelta(minutes=5))
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


# --- The head -------------------------------------------------------------------------------------


def gather_batch(
    local_x: Tensor,  # [b, D]
    labels: Tensor,  # int64 [b]
    rows_per_rank: Sequence[int] | None,
    group: ProcessGroup,
    dtype: torch.dtype,  # of the result and of the gradient's sum
    sent_dtype: torch.dtype | None = None,  # embeddings travel in it; None: their own, or `dtype`
) -> tuple[Tensor, Tensor]:
    """The embeddings and labels of all ranks, in rank order: [B, D], and int64 [B] on the host.

    Forward: one all-gather of B * (D * itemsize + 8) bytes, the labels packed beside the rows;
    two where the labels lie in host memory and the embeddings do not, so that the GPU need not wait
    for the host. Backward: one reduce-scatter (sum), times W, of B * D elements of `dtype`.
    rows_per_rank: b of every rank; None means that all are equal. Ranks with fewer rows are padded.
    """
    counts = _counts(local_x, rows_per_rank, group)
    own = local_x.dtype if local_x.dtype.itemsize < dtype.itemsize else dtype
    sent = local_x.detach().to(sent_dtype or own).contiguous()
    if labels.device == sent.device:
        packed = torch.cat([_as_bytes(labels[:, None].contiguous()), _as_bytes(sent)], 1)
        every = _gather(packed, counts, group)
        x = _from_bytes(every[:, 8:], sent.dtype)
        all_labels = _from_bytes(every[:, :8], torch.int64)[:, 0].cpu()
    else:
        x = _gather(sent, counts, group)
        all_labels = _gather(labels, counts, group).cpu()
    return _GatherRows.apply(local_x, x.to(dtype), counts, group), all_labels


def _as_bytes(rows: Tensor) -> Tensor:  # [b, n] -> uint8 [b, n * itemsize]
    return rows.view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def _from_bytes(packed: Tensor, dtype: torch.dtype) -> Tensor:  # uint8 [b, n * itemsize] -> [b, n]
    # Flat first: the stride of a lone row, which is not copied, need not be a multiple of itemsize.
    return packed.reshape(-1).view(dtype).view(len(packed), packed.shape[1] // dtype.itemsize)


def gather_rows(
    local_x: Tensor, rows_per_rank: Sequence[int] | None, group: ProcessGroup
) -> Tensor:
    """The embeddings of all ranks: [b, D] -> [B, D], in rank order.

    Forward: one all-gather. Backward: one reduce-scatter (sum), times W. Bytes: B * D elements
    each way.
    """
    counts = _counts(local_x, rows_per_rank, group)
    return _GatherRows.apply(local_x, _gather(local_x, counts, group), counts, group)


def share(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, known to all: values that one rank holds and that are zeros
    elsewhere, or every rank's part of a sum.

    Forward: one all-reduce (sum) of all its elements. Backward: none; the gradient passes
    unchanged, so it reaches the graph of the rank that holds the value and dies in the zeros of
    the others.
    """
    return _Share.apply(values, group)


def merge_log_sum_exp(local: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """log(sum over ranks of exp(local)): [B] -> [B], and this rank's share of the sum [B], which is
    the slope with respect to `local`; -inf (a rank without a class) is neutral. No gradient.

    Two all-reduces of B elements: the largest over the ranks, then the sum of exp(local - largest).
    A gather of all ranks' values would take W * B elements, half a gigabyte at W = 1024.
    """
    peak = largest_over_ranks(local, group)
    nobody = peak == -torch.inf  # no rank has a class for this row: -inf - -inf is not a number
    part = (local - peak).exp_().masked_fill_(nobody, 0.0)  # a NaN stays, and reaches all ranks
    total = sum_over_ranks(part, group)
    return peak + total.log(), part.div_(total).masked_fill_(nobody, 0.0)


class _GatherRows(Function):
    @staticmethod
    def forward(
        ctx: Any, local_x: Tensor, gathered: Tensor, counts: Sequence[int], group: ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.group, ctx.dtype = counts, group, local_x.dtype
        return gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, rank, world = ctx.counts, ctx.group.rank(), ctx.group.size()
        most = max(counts)
        padded = grad.contiguous()
        if min(counts) < most:
            padded = grad.new_zeros(world, most, *grad.shape[1:])
            for source, rows in zip(padded, grad.split(counts), strict=True):
                source[: len(rows)] = rows
            padded = padded.flatten(0, 1)
        local = padded.new_empty(most, *grad.shape[1:])
        with _exchange(ctx.group):
            _reduce_scatter(local, padded, group=ctx.group)
        return (local[: counts[rank]] * world).to(ctx.dtype), None, None, None


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        return sum_over_ranks(values, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _counts(x: Tensor, rows_per_rank: Sequence[int] | None, group: ProcessGroup) -> list[int]:
    counts = [len(x)] * group.size() if rows_per_rank is None else [int(n) for n in rows_per_rank]
    if len(counts) != group.size() or counts[group.rank()] != len(x):
        raise UserError(
            f"rows_per_rank={counts} does not describe this batch: {group.size()} ranks, "
            f"{len(x)} rows on rank {group.rank()}"
        )
    return counts


def _gather(local: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    most = max(counts)
    padded = local.detach().contiguous()
    if len(local) < most:
        padded = torch.cat([padded, padded.new_zeros(most - len(local), *local.shape[1:])])
    every = padded.new_empty(group.size() * most, *local.shape[1:])
    with _exchange(group):
        _all_gather(every, padded, group=group)
    if min(counts) == most:
        return every
    return torch.cat([rows[:n] for rows, n in zip(every.split(most), counts, strict=True)])


# --- The loop -------------------------------------------------------------------------------------


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace each tensor by its mean over the ranks. One all-reduce of all their elements."""
    if tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        with _exchange(group):
            dist.all_reduce(flat, group=group)
        flat /= group.size()
        means = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(  # few kernels, where one for each tensor is a sixth of a step's
            list(tensors), [mean.view_as(t) for t, mean in zip(tensors, means, strict=True)]
        )


def largest_over_ranks(values: Tensor, group: ProcessGroup) -> Tensor:
    """The maximum over the ranks, the same on all: how ranks agree on one rank's decision."""
    largest = values.detach().clone()
    with _exchange(group):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def start_largest(value: int, group: ProcessGroup) -> Callable[[], int]:
    """Start computing the maximum over the ranks; call the result to wait for it and get it. One
    asynchronous all-reduce of 8 bytes in host memory."""
    largest = torch.tensor(value)
    with naming_loss(group):
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=group, async_op=True)

    def fetch() -> int:
        with naming_loss(group):
            work.wait()
        return int(largest)

    return fetch


def sum_over_ranks(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, the same on all, without gradient. One all-reduce."""
    total = values.detach().clone(memory_format=torch.contiguous_format)
    with _exchange(group):
        dist.all_reduce(total, group=group)
    return total


def gather_objects(value: object, group: ProcessGroup) -> list:
    """Every rank's value, small and picklable, in rank order. Ranks trust each other."""
    if group.size() == 1:
        return [value]
    values: list = [None] * group.size()
    with naming_loss(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gather_parts(local: Tensor, rows_per_rank: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows of all ranks, [n_r, ...] -> [sum n_r, ...], without gradient. One all-gather."""
    return _gather(local, rows_per_rank, group)
