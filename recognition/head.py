"""PartialFC: the classification layer, its classes sharded over the ranks and sampled each step.

Letters: W ranks, b rows of this rank, B rows of all, D embedding, C classes, C_r of this rank,
S sampled of this rank, K sub-centres.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from recognition import collectives
from recognition.losses.margin import Margin, Rows
from recognition.losses.reduction import (
    Targets,
    full_precision,
    negatives_log_sum_exp,
    target_cosines,
)
from recognition.rows import SampledRows, merge, to_device, unit
from recognition.sampling import hash_words, sample, shard_range

_INIT_STD = 0.01  # InsightFace's
_INIT_KEY = 2  # the purpose of this draw; the others' are in sampling.py, build.py and trainer.py
_INIT_BLOCK = 1024  # classes drawn by one generator, so that the start is the same at every W


class PartialFC(nn.Module):
    """Margin softmax over sharded, sampled classes (Partial FC, arXiv:2203.15565).

    `loss = head(local_embeddings, local_labels)` is the mean over the global batch, the same
    number on every rank, and the gradients are those of the dense layer restricted to the sampled
    classes, at every number of ranks. After `loss.backward()`:
        head.sampled_classes  int64 [S], global ids of this rank's sampled classes
        head.sampled_grad     [S, (K,) D], gradient of the loss with respect to their rows
    Over micro-steps the two are union and sum. `weight` never gets a .grad: the row optimisers of
    recognition/optim.py step the sampled rows alone, end the step and clear the two.

    sample_rate: share of the classes drawn as negatives each step; the batch's own classes always
    take part. The draw depends on (seed, step) only; `step` counts the optimiser steps and is
    saved.
    """

    def __init__(
        self,
        margin: Margin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        num_subcenters: int = 1,
        group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.group = collectives.world_group() if group is None else group
        rank, world = self.group.rank(), self.group.size()
        if not 0.0 <= sample_rate <= 1.0:
            raise ValueError(f"sample_rate={sample_rate}: a share of the classes, 0 to 1")
        if num_classes < world:
            raise ValueError(
                f"{num_classes} classes cannot be sharded over {world} ranks: start at most "
                f"{num_classes} processes"
            )
        if embedding_size < 1 or num_subcenters < 1:
            raise ValueError(f"{embedding_size=} and {num_subcenters=} must be positive")
        self.margin = margin
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.num_subcenters = sample_rate, num_subcenters
        self.seed = seed
        self.step = 0
        self.piece: int | None = None  # classes of a piece of the reduction; None: from the cache
        self.shard = shard_range(num_classes, world, rank)
        rows = _initial_rows(self.shard, num_subcenters, embedding_size, seed)
        self.weight = nn.Parameter(rows if num_subcenters > 1 else rows[:, 0])  # [C_r, (K,) D]
        self._open: list[SampledRows] = []  # of forwards since the last optimiser step
        self._done: SampledRows | None = None  # union and sum of their backwards

    def forward(
        self,
        local_x: Tensor,  # [b, D]
        local_labels: Tensor,  # int64 [b]; in host memory they cost the GPU no synchronisation
        rows_per_rank: Sequence[int] | None = None,  # b of every rank; None: all equal
    ) -> Tensor:
        self._check(local_x, local_labels)
        with full_precision(local_x):
            return self._loss(local_x.to(self.weight.dtype), local_labels, rows_per_rank)

    def _loss(
        self, local_x: Tensor, local_labels: Tensor, rows_per_rank: Sequence[int] | None
    ) -> Tensor:
        x = collectives.gather_rows(local_x, rows_per_rank, self.group)  # [B, D]
        labels = collectives.gather_labels(local_labels, rows_per_rank, self.group)  # [B], host

        rows, targets = self._sample(labels)
        x, norm = unit(x)
        cos_target = target_cosines(x, self.weight, rows, targets)
        held = torch.zeros_like(labels, dtype=torch.bool, device=x.device)
        held = held.index_fill_(0, targets.row, True)
        batch = Rows(
            cos_target=collectives.share_rows(cos_target, self.group),
            norm=_gradient_where(held, norm[:, 0]),
            label=to_device(labels.numpy(), x.device),
        )
        target = self.margin.scale * self.margin.target(batch)  # [B]
        negatives = collectives.merge_log_sum_exp(
            negatives_log_sum_exp(x, self.weight, rows, targets, self.margin, batch, self.piece),
            self.group,
        )
        # -log softmax of the target, log(1 + exp(negatives - target)): never saturates.
        return torch.logaddexp(negatives - target, torch.zeros_like(target)).mean()

    @property
    def sampled_classes(self) -> Tensor:
        index = self._sampled().index
        if index is None:
            return torch.arange(*self.shard, device=self.weight.device)
        return index + self.shard[0]

    @property
    def sampled_grad(self) -> Tensor:
        grad = self._sampled().gradient()
        return grad if self.num_subcenters > 1 else grad[:, 0]

    def end_step(self) -> SampledRows:
        """The rows of this optimiser step with their gradient; the next step draws anew."""
        sampled = self._sampled()
        self._open.clear()
        self._done = None
        self.step += 1
        return sampled

    def _sampled(self) -> SampledRows:
        self._collect()
        if self._done is None:
            raise RuntimeError("no gradient of sampled classes: call loss.backward() first")
        return self._done

    def _collect(self) -> None:
        """Add what backwards have left in the open forwards to the sum."""
        for rows in self._open:
            if rows.grad is None or (self._done is not None and rows.grad is self._done.grad):
                continue
            if self._done is None:
                self._done = SampledRows(rows.weight, rows.rows)
                self._done.grad = rows.grad
            else:
                self._done = merge(self._done, rows)
            rows.grad = None

    def _open_rows(self, rows: np.ndarray | None) -> SampledRows:
        """The sampled rows of a forward, their gradient to be collected."""
        weight = self.weight if self.num_subcenters > 1 else self.weight[:, None]  # [C_r, K, D]
        opened = SampledRows(weight, rows)
        if torch.is_grad_enabled():
            self._collect()
            if rows is None and self._done is not None:
                opened.grad = self._done.grad  # all rows: later backwards add in place
            self._open.append(opened)
        return opened

    def _sample(self, labels: Tensor) -> tuple[SampledRows, Targets]:
        chosen = sample(
            labels.numpy(), self.num_classes, self.shard, self.sample_rate, self.seed, self.step
        )
        device = self.weight.device
        rows = None if chosen.classes is None else chosen.classes - self.shard[0]
        targets = Targets(
            to_device(chosen.owned, device),
            to_device(chosen.position, device),
            chosen.position.tolist(),
        )
        return self._open_rows(rows), targets

    def _check(self, local_x: Tensor, labels: Tensor) -> None:
        if local_x.dim() != 2 or local_x.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings of shape {tuple(local_x.shape)}: expected [b, {self.embedding_size}]"
            )
        if labels.shape != local_x.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for {len(local_x)} embeddings: expected [b]"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"labels are {labels.dtype}: expected torch.int64 class ids")
        wrong = (labels < 0) | (labels >= self.num_classes)
        if labels.device.type != "cpu":
            torch._assert_async(~wrong.any(), f"a label is outside [0, {self.num_classes})")
        elif wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"label {int(labels[row])} at row {row} is outside [0, {self.num_classes}): "
                "the labels do not fit num_classes"
            )

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, "
            f"shard={self.shard}, sample_rate={self.sample_rate}, "
            f"num_subcenters={self.num_subcenters}"
        )


def _gradient_where(held: Tensor, values: Tensor) -> Tensor:
    """`values` [B], their gradient only in the rows whose class this rank holds: it counts once."""
    return torch.where(held, values, values.detach())


def _initial_rows(shard: tuple[int, int], num_subcenters: int, size: int, seed: int) -> Tensor:
    """Normal(0, 0.01) rows [C_r, K, D], a function of (seed, class id): the same at every W."""
    start, stop = shard
    rows = torch.empty(stop - start, num_subcenters, size)
    for block in range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK)):
        low = block * _INIT_BLOCK
        generator = torch.Generator().manual_seed(hash_words(seed, _INIT_KEY, block) >> 1)
        drawn = torch.empty(_INIT_BLOCK, num_subcenters, size)
        drawn.normal_(0.0, _INIT_STD, generator=generator)
        first, last = max(start, low), min(stop, low + _INIT_BLOCK)
        rows[first - start : last - start] = drawn[first - low : last - low]
    return rows
