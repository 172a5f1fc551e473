"""The standard sharded head, written plainly: what launch/bench/head.py measures ours against.

It does what arcface_torch's Partial FC does, in the same places, with our own words: embeddings and
labels are gathered with one collective each, and the embeddings' gradient comes back by one reduce
per rank; the sample is a `rand` over all local classes, topk and sort; the logits [B, S] of the
sampled classes stand in fp32, are clamped, given their margin, scaled and turned into probabilities
in passes over the whole; the gradient of the weight is dense, and SGD with momentum moves every
row, sampled or not. CosFace is its margin.

Letters: W ranks, b rows per rank, B all rows, D embedding, C_r classes of this rank, S sampled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class DenseHead(nn.Module):
    """The loss of this rank's rows of embeddings and labels, as arcface_torch computes it."""

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        scale: float = 64.0,
        margin: float = 0.4,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank, world = dist.get_rank(), dist.get_world_size()
        size, remainder = divmod(num_classes, world)
        self.num_local = size + (rank < remainder)
        self.start = size * rank + min(rank, remainder)
        self.sample_rate, self.num_sample = sample_rate, int(sample_rate * self.num_local)
        self.scale, self.margin = scale, margin
        self.dtype = dtype  # of the logits' product under autocast; None: as the tensors are
        self.weight = nn.Parameter(torch.normal(0, 0.01, (self.num_local, embedding_size)))

    def forward(self, local_x: Tensor, local_labels: Tensor) -> Tensor:
        x = torch.cat(_Gather.apply(local_x, dist.get_world_size()))  # [B, D]
        gathered = [torch.zeros_like(local_labels) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local_labels)
        labels = torch.cat(gathered)
        here = (self.start <= labels) & (labels < self.start + self.num_local)
        labels[~here] = -1
        labels[here] -= self.start
        weight: Tensor = self.weight
        if self.sample_rate < 1:
            weight = self.weight[self._sample(labels, here)]  # [S, D]; its backward is dense
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            logits = F.linear(F.normalize(x), F.normalize(weight))  # [B, S]
        logits = logits.float().clamp(-1, 1)
        row = torch.where(labels != -1)[0]
        logits[row, labels[row]] = logits[row, labels[row]] - self.margin
        logits = logits * self.scale
        return _CrossEntropy.apply(logits, labels[:, None])

    @torch.no_grad()
    def _sample(self, labels: Tensor, here: Tensor) -> Tensor:
        positive = torch.unique(labels[here])
        index = positive
        if len(positive) <= self.num_sample:
            drawn = torch.rand(self.num_local).to(labels.device)
            drawn[positive] = 2.0
            index = torch.topk(drawn, self.num_sample)[1].sort()[0]
        labels[here] = torch.searchsorted(index, labels[here])
        return index


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, local_x: Tensor, world: int) -> tuple[Tensor, ...]:
        every = [torch.zeros_like(local_x) for _ in range(world)]
        dist.all_gather(every, local_x)
        return tuple(every)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        grads = [grad.contiguous() for grad in outer]
        for rank, grad in enumerate(grads):
            dist.reduce(grad, rank)
        return grads[dist.get_rank()] * len(grads), None


class _CrossEntropy(Function):
    """Mean of -log softmax over the classes of all ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:  # [B, S], [B, 1] or -1
        peak = logits.max(1, keepdim=True)[0]
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        probabilities = logits.sub_(peak).exp_()
        total = probabilities.sum(1, keepdim=True)
        dist.all_reduce(total)
        probabilities.div_(total)
        row = torch.where(labels != -1)[0]
        own = probabilities.new_zeros(len(probabilities), 1)
        own[row] = probabilities[row].gather(1, labels[row])
        dist.all_reduce(own)
        ctx.save_for_backward(row, probabilities, labels)
        return own.clamp_min_(1e-30).log_().mean() * -1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        row, probabilities, labels = ctx.saved_tensors
        one_hot = probabilities.new_zeros(len(row), probabilities.shape[1])
        one_hot.scatter_(1, labels[row], 1)
        probabilities[row] -= one_hot
        probabilities.div_(len(probabilities))
        return probabilities * grad.item(), None
