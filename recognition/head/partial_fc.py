"""PartialFC: the classification layer, its classes sharded over the ranks and sampled each step.

Letters, in all files of the head: W ranks, b rows of this rank, B rows of all, D embedding,
C classes, C_r of this rank, S sampled of this rank, n of a chunk or of an update, K sub-centres,
m targets: rows of the batch whose class is on this rank; k values of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from data_tools.common.draws import Purpose, hash_words
from data_tools.common.errors import UserError
from data_tools.load.order import rank_slice
from recognition.distributed import collectives
from recognition.head.chunked_softmax import Formula, Kernel, plain_kernel
from recognition.head.chunks import Chunks, TargetCosines, Targets, chunk_size
from recognition.head.class_rows import ClassRows, MicroSteps, Pool, Sink, to_device, unit
from recognition.head.device_storage import DeviceStorage, Storage
from recognition.head.host_storage import HostStorage
from recognition.head.init import (
    Votes,
    check_batch,
    check_layer,
    checked_counts,
    dominant,
    initial_rows,
)
from recognition.head.kernels.cpu_library import CpuLibrary
from recognition.head.reduction import full_precision, reduce_over_ranks, reduced_logits
from recognition.head.sampling import Draw, sample
from recognition.losses.margin import Layer, Margin, Owned, Rows, Statistics

STORAGES: dict[str, Callable[[nn.Parameter, int], Storage]] = {
    "device": DeviceStorage,
    "host": HostStorage,
}


@dataclass(frozen=True)
class MemoryLimits:
    """How the head computes. None of these changes a result beyond rounding."""

    stored_bytes: int | None = None  # kept from the forward for the backward; None: by the device
    chunk_size: int | None = None  # classes of a chunk of the logits; None: from the cache
    dtype: torch.dtype | None = None  # of the GEMMs' inputs; sums and logits stay as the weight
    kernel: Kernel | None = None  # None: the first forward takes plain, or on a CPU what pays
    cpu_library: CpuLibrary | None = None  # compiled, for the update of the rows

    def stored_on(self, is_cuda: bool) -> int:
        """Bytes of results that a head on this kind of device keeps. A chunk that is kept costs the
        backward two GEMMs instead of three."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return 1 << 30 if is_cuda else 16 << 20


class PartialFC(nn.Module):
    """Margin loss over sharded, sampled classes (Partial FC, arXiv:2203.15565).

    `loss = head(local_embeddings, local_labels)` is the mean over the global batch, the same
    number on every rank, and the gradients are those of the dense layer restricted to the sampled
    classes, at every number of ranks. After `loss.backward()`:
        head.sampled_classes  int64 [S], global ids of this rank's sampled classes
        head.sampled_grad     [S, (K,) D], gradient of the loss with respect to their rows
    Over micro-steps the two are union and sum. `weight` never gets a .grad: the row optimisers of
    recognition/optim.py step the sampled rows alone, end the step and clear the two.

    sample_rate: share of the classes drawn as negatives each step; the batch's own classes always
    take part. The draw depends on (seed, step) only; `step` counts the optimiser steps and is
    saved. num_subcenters: K centres a class, of which the nearest to a row counts (sub-center
    ArcFace, ECCV 2020); classes are sampled whole. class_counts: int64 [C], the images of each
    class, for the margins that ask for them. head_storage: "host" keeps the rows and their
    optimiser state in the host's memory, even after head.to("cuda"); the device then holds only the
    rows that a step samples. limits: memory and precision of the computation.

    A margin's learned numbers get a .grad from the backward, each rank its own part; the row
    optimiser steps them too. Some margins (KappaFace) need a call at the end of each epoch: your
    training loop must then call head.end_epoch() on every rank.

        head = PartialFC(MARGINS["adaface"](), 512, num_classes, sample_rate=0.2)
        rows = RowSGD(head)
        for images, labels in batches:  # labels int64 [b], global class ids
            loss = head(backbone(images), labels)  # backbone: DistributedDataParallel
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.step(lr=0.1)
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
        class_counts: np.ndarray | None = None,
        head_storage: Literal["device", "host"] = "device",
        limits: MemoryLimits = MemoryLimits(),  # noqa: B008  frozen
    ) -> None:
        super().__init__()
        self.group = collectives.world_group() if group is None else group
        rank, world = self.group.rank(), self.group.size()
        check_layer(num_classes, world, sample_rate, embedding_size, num_subcenters)
        self.margin = margin
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.sample_rate, self.num_subcenters = sample_rate, num_subcenters
        self.seed = seed
        self.step = 0
        self.limits = limits
        self.sink: Sink | None = None  # takes the gradient chunk by chunk in the next backward
        self.shard = rank_slice(num_classes, world, rank)
        rows = initial_rows(self.shard, num_subcenters, embedding_size, seed)
        weight = nn.Parameter(rows if num_subcenters > 1 else rows[:, 0])  # [C_r, (K,) D]
        self.weight = weight
        if head_storage not in STORAGES:
            raise UserError(f"{head_storage=}: one of {', '.join(STORAGES)}")
        self.storage: Storage = STORAGES[head_storage](weight, num_subcenters)
        if class_counts is not None:
            class_counts = checked_counts(class_counts, num_classes)
        margin.bind(
            Layer(
                num_classes, self.shard, embedding_size, num_subcenters, sample_rate, class_counts
            )
        )
        self.votes: Tensor | None
        votes = torch.zeros(len(rows), num_subcenters, dtype=torch.int64)
        self.register_buffer("votes", votes if num_subcenters > 1 else None)  # of this epoch's rows
        self._votes = Votes()
        self._micro_steps = MicroSteps()
        self._pool = Pool()
        self._micro_step = 0
        self._last: tuple[Tensor, Tensor] | None = None  # target cosine, what replaced it; [B]

    @property
    def device(self) -> torch.device:
        """The device that computes; with head_storage="host", `weight` is in the host's memory."""
        return self.storage.like.device

    def settle(self) -> None:
        """Return when `weight` and the row optimiser's state hold every update: to be called before
        they are read, because head_storage="host" stores updated rows in the background."""
        self.storage.settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialFC:
        if self.storage.moves_with_head:
            return super()._apply(fn, recurse)
        weight = self._parameters.pop("weight")
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        self.storage.move(fn(self.storage.like))
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.storage.drop()
        super()._load_from_state_dict(*arguments)

    def forward(
        self,
        local_x: Tensor,  # [b, D]
        local_labels: Tensor,  # int64 [b]; in host memory they cost the GPU no synchronisation
        rows_per_rank: Sequence[int] | None = None,  # b of every rank; None: all equal
        local_features: Tensor | None = None,  # [b, D] what the margin observes; None: local_x
    ) -> Tensor:
        check_batch(local_x, local_labels, local_features, self.embedding_size, self.num_classes)
        if local_features is None and self.training and self.margin.encoder_momentum is not None:
            raise UserError(
                "this margin observes a slow copy of the network (features='momentum'): pass its "
                "embeddings as local_features, or make the margin with features='epoch'"
            )
        with full_precision(local_x):
            self._choose_kernel(len(local_x))
            x, labels = collectives.gather_batch(
                local_x,
                local_labels,
                rows_per_rank,
                self.group,
                self.storage.like.dtype,
                self.limits.dtype,
            )
            features = None
            if local_features is not None:
                features = local_features.detach().to(self.storage.like.dtype)
                features = collectives.gather_rows(features, rows_per_rank, self.group)
            return self._loss(x, labels, features)

    def _choose_kernel(self, num_rows: int) -> None:
        """At the first forward, on all ranks, unless the limits name one."""
        if self.limits.kernel is None:
            if self.device.type == "cpu":
                from recognition.head.kernels.autotune import choose  # which imports this file

                choose("auto", self, num_rows * self.group.size())
            self.limits = replace(self.limits, kernel=self.limits.kernel or plain_kernel)

    @property
    def _kernel(self) -> Kernel:
        assert self.limits.kernel is not None  # forward() chose one
        return self.limits.kernel

    def _loss(self, x: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
        chunks, num_sampled = self._sample(labels)
        targets = chunks.targets
        x, norm = unit(x)  # [B, D], [B, 1]
        held = torch.zeros_like(labels, dtype=torch.bool, device=x.device)
        held = held.index_fill_(0, targets.row, True)
        label = to_device(labels.numpy(), x.device)
        key = hash_words(self.seed, Purpose.MARGIN, self.step, self._micro_step)
        class_values = self.margin.class_values(targets.local_id)  # [m, k]
        if class_values is None:
            class_values = x.new_zeros(len(targets.row), 0)
        learning = self.training and torch.is_grad_enabled()

        def batch_of(shared: Tensor) -> Rows:
            """What the margin sees of the batch, from what the ranks have shared."""
            own_norm = _gradient_where(held, norm[:, 0])
            return Rows(shared[:, 0], own_norm, label, shared[:, 1:], key)

        def formula_of(shared: Tensor, cosines: TargetCosines) -> Formula:
            """That of the other classes' logits, once the margin has observed the batch."""
            batch = batch_of(shared).constant()
            if learning:
                observed = x.detach() if features is None else unit(features)[0]
                self._observe(batch, observed, targets, cosines)
            formula = Formula(self.margin.frozen(), batch, self._target_centres(chunks, len(x)))
            if learning and self.margin.needs_lse:
                return self._rescaled(x.detach(), chunks, formula, num_sampled - 1)
            return formula

        shared, reduced = reduced_logits(
            x,
            self.storage.parameter,
            class_values,
            [p for p in self.margin.parameters() if p.dim() == 0],
            chunks,
            formula_of,
            self._kernel,
            self.group,
        )
        batch = batch_of(shared)
        replaced = self.margin.target(batch)  # [B]
        self._last = batch.cos_target.detach(), replaced.detach()
        # A number that the margin learns is known to every rank, and its gradient must count once.
        target = _gradient_where(held, self.margin.scale * replaced)
        loss = self._row_losses(target, reduced).mean()
        for term in (self.margin.regularizer(batch), self._class_regularizer()):
            if term is not None:
                loss = loss + term
        return loss

    def _row_losses(self, target: Tensor, reduced: Tensor) -> Tensor:  # [B]
        """From the logits of the rows' own classes and the reduction over the others."""
        zero = target.new_zeros(())
        if self.margin.reduction == "softmax":
            # -log softmax of the target, log(1 + exp(lse - target)): never saturates.
            return torch.logaddexp(reduced - target, zero)
        positive = self.margin.positive_weight * torch.logaddexp(-target, zero)
        return positive + self.margin.negative_weight * reduced

    def _observe(self, batch: Rows, x: Tensor, targets: Targets, cosines: TargetCosines) -> None:
        """A forward that learns: what follows from this batch is kept when the step is taken."""
        self.margin.observe(batch, x, Owned(targets.row, targets.local_id))
        if self.votes is not None:
            self._votes.add(targets.local_id, cosines.nearest)
        self._micro_step += 1

    def _target_centres(self, chunks: Chunks, num_rows: int) -> Tensor | None:
        """Unit centre [B, D] of every row's class, if the margin wants it. One all-reduce."""
        if not self.margin.needs_centres:
            return None
        centres, _ = unit(chunks.target_centres[:, 0])  # [m, D]
        filled = centres.new_zeros(num_rows, self.embedding_size)
        filled.index_copy_(0, chunks.targets.row, centres)
        return collectives.sum_over_ranks(filled, self.group)

    def _rescaled(self, x: Tensor, chunks: Chunks, formula: Formula, num_negatives: int) -> Formula:
        """The formula after a first pass at the scale that the step began with, from which the
        margin chooses its own."""
        before = formula._replace(margin=self.margin.frozen(committed=True))
        lse, _ = reduce_over_ranks(self._kernel(chunks, before), before, x, self.group)
        self.margin.rescale(lse, formula.batch, num_negatives)
        return formula._replace(margin=self.margin.frozen())

    def _class_regularizer(self) -> Tensor | None:
        share = self.margin.class_regularizer()
        return None if share is None else collectives.share(share[None], self.group)[0]

    @property
    def sampled_classes(self) -> Tensor:
        ids = self._micro_steps.sampled().ids()
        if ids is None:
            return torch.arange(*self.shard, device=self.device)
        return ids + self.shard[0]

    @property
    def sampled_grad(self) -> Tensor:
        sampled = self._micro_steps.sampled()
        sampled.is_lent = True  # the caller may keep it
        return self._as_weight(sampled.gradient())

    @property
    def has_begun(self) -> bool:
        """Whether there was a forward since the last optimiser step."""
        return bool(self._micro_steps.open)

    def gradient_in_passing(self) -> Tensor | None:
        """sampled_grad for use within the step, since its memory is reused afterwards; None where
        the backward has updated the rows."""
        sampled = self._micro_steps.sampled()
        return None if sampled.sink is not None else self._as_weight(sampled.gradient())

    def _as_weight(self, rows: Tensor) -> Tensor:  # [S, K, D]
        return rows if self.num_subcenters > 1 else rows[:, 0]

    def margin_gradients(self) -> dict[str, Tensor]:
        """The gradient of the loss with respect to what the margin learns, by name.

        For a number of each class, of this shard's; for one of the model, the same on all ranks:
        one all-reduce for all of those. Every rank calls it; a parameter without a gradient
        has zeros.
        """
        margin, grads = self.margin, {}
        for name, p in margin.named_parameters():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
        shared = [name for name in grads if name not in margin.per_class]
        if shared:
            total = torch.stack([grads[name] for name in shared])  # [n], numbers of the model
            total = collectives.sum_over_ranks(total, self.group)
            grads |= dict(zip(shared, total.unbind(), strict=True))
        return grads

    def end_step(self, found_inf: Tensor | None = None) -> ClassRows:
        """The rows of this optimiser step with their gradient; the next step draws anew.

        found_inf: [] not 0 if the step is skipped; what was seen in it is then dropped.
        """
        sampled = self._micro_steps.sampled()
        self._micro_steps.clear()
        self.sink = None
        self._micro_step = 0
        self.step += 1
        self.margin.commit(found_inf)
        if self.votes is not None:
            self._votes.commit(self.votes, found_inf)
        return sampled

    def drop_step(self) -> None:
        """Forget the forwards since the last optimiser step, as if they had not happened."""
        self._micro_steps.clear()
        self.sink = None
        self._micro_step = 0
        self._votes.drop()
        self.margin.commit(torch.ones((), device=self.device))
        for parameter in self.margin.parameters():
            parameter.grad = None
        self.storage.drop()

    @torch.no_grad()
    def end_epoch(self) -> Statistics:
        """Every rank calls this when an epoch of samples is over; it returns what to log of it."""
        statistics = self.margin.end_epoch(self._reduce_values)
        if self.votes is not None:
            most, every = self._reduce_values(dominant(self.votes), "sum").double().unbind()
            statistics["dominant_subcenter_share"] = most / every
            self.votes.zero_()
        return statistics

    @torch.no_grad()
    def statistics(self) -> Statistics:
        """What the log says of the loss; every rank calls it.

        cos_target and margin are means over the last batch: the cosine to the own class, and by how
        much the loss lowered it.
        """
        statistics = self.margin.statistics(self._reduce_values)
        if self._last is not None:
            cos, replaced = self._last
            statistics |= {"cos_target": cos.mean(), "margin": (cos - replaced).mean()}
        return statistics

    def class_state(self) -> dict[str, Tensor]:
        """The state of each class beside its centres, by name: [C_r, ...]."""
        margin = {f"margin.{name}": getattr(self.margin, name) for name in self.margin.per_class}
        state = margin | ({} if self.votes is None else {"votes": self.votes})
        return {name: tensor.detach() for name, tensor in state.items()}

    def model_state(self) -> dict[str, Tensor]:
        """The margin's state that is the same on all ranks, by name."""
        held = {*self.margin.per_class}
        state = self.margin.state_dict()
        return {f"margin.{name}": tensor for name, tensor in state.items() if name not in held}

    def _reduce_values(self, values: Tensor, operation: str) -> Tensor:
        over_ranks = {"sum": collectives.sum_over_ranks, "max": collectives.largest_over_ranks}
        return over_ranks[operation](values, self.group)

    def _sample(self, labels: Tensor) -> tuple[Chunks, int]:
        """The chunks of this forward's sampled classes, and how many classes all ranks sample."""
        chosen = sample(
            labels.numpy(), self.num_classes, self.shard, self.sample_rate, self.seed, self.step
        )
        device = self.device
        rows = self.storage.rows(chosen, self.shard, self._next_draw, self._pool, self.sink)
        stored_bytes = 0
        if torch.is_grad_enabled():
            self._micro_steps.add(rows)
            stored_bytes = self.limits.stored_on(self.device.type == "cuda")
        targets = Targets(
            to_device(chosen.owned, device),
            to_device(chosen.position, device),
            to_device(labels.numpy()[chosen.owned] - self.shard[0], device),
            chosen.position.tolist(),
        )
        size = self.chunk_size(len(labels))
        chunks = Chunks(
            rows, targets, len(labels), size, stored_bytes, self._pool, self.limits.dtype
        )
        return chunks, chosen.total

    def _next_draw(self) -> Draw:
        return Draw(self.num_classes, self.shard, self.sample_rate, self.seed, self.step + 1)

    def chunk_size(self, num_rows: int) -> int:
        """Classes of a chunk for a batch of B rows."""
        return self.limits.chunk_size or chunk_size(
            num_rows, self.storage.like, self.num_subcenters
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
