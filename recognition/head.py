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
from recognition.losses.margin import Layer, Margin, Owned, Rows, Statistics
from recognition.losses.reduction import (
    Negatives,
    Targets,
    full_precision,
    log_sum_exp,
    piece_size,
    softplus_sum,
    target_cosines,
)
from recognition.rows import SampledRows, merge, to_device, unit
from recognition.sampling import hash_words, sample, shard_range

_INIT_STD = 0.01  # InsightFace's
_INIT_KEY = 2  # the purpose of this draw; the others' are in sampling.py, build.py and trainer.py
_MARGIN_KEY = 5  # of what a margin draws
_INIT_BLOCK = 1024  # classes drawn by one generator, so that the start is the same at every W


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
    class, for the margins that ask for them.

    A margin's learned numbers get a .grad from the backward, each rank its part; the row optimiser
    steps them too. Some margins (KappaFace) work at the end of an epoch of samples: whoever writes
    a loop of his own calls head.end_epoch() there, on every rank.

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
        if class_counts is not None:
            class_counts = _checked_counts(class_counts, num_classes)
        margin.bind(
            Layer(
                num_classes, self.shard, embedding_size, num_subcenters, sample_rate, class_counts
            )
        )
        self.votes: Tensor | None
        votes = torch.zeros(len(rows), num_subcenters, dtype=torch.int64)
        self.register_buffer("votes", votes if num_subcenters > 1 else None)  # of this epoch's rows
        self._nearest: list[tuple[Tensor, Tensor]] = []  # this step's votes: (local id, which), [m]
        self._open: list[SampledRows] = []  # of forwards since the last optimiser step
        self._done: SampledRows | None = None  # union and sum of their backwards
        self._micro_step = 0
        self._last: tuple[Tensor, Tensor] | None = None  # target cosine, what replaced it; [B]

    def forward(
        self,
        local_x: Tensor,  # [b, D]
        local_labels: Tensor,  # int64 [b]; in host memory they cost the GPU no synchronisation
        rows_per_rank: Sequence[int] | None = None,  # b of every rank; None: all equal
        local_features: Tensor | None = None,  # [b, D] what the margin observes; None: local_x
    ) -> Tensor:
        self._check(local_x, local_labels, local_features)
        with full_precision(local_x):
            x = collectives.gather_rows(local_x.to(self.weight.dtype), rows_per_rank, self.group)
            labels = collectives.gather_labels(local_labels, rows_per_rank, self.group)  # [B], host
            features = None
            if local_features is not None:
                features = local_features.detach().to(self.weight.dtype)
                features = collectives.gather_rows(features, rows_per_rank, self.group)
            return self._loss(x, labels, features)

    def _loss(self, x: Tensor, labels: Tensor, features: Tensor | None) -> Tensor:
        rows, targets, num_sampled = self._sample(labels)
        x, norm = unit(x)  # [B, D], [B, 1]
        cos_target, nearest = target_cosines(x, self.weight, rows, targets)
        held = torch.zeros_like(labels, dtype=torch.bool, device=x.device)
        held = held.index_fill_(0, targets.row, True)
        shared = self._share(cos_target, targets)  # [B, 1 + k]
        batch = Rows(
            cos_target=shared[:, 0],
            norm=_gradient_where(held, norm[:, 0]),
            label=to_device(labels.numpy(), x.device),
            class_values=shared[:, 1:],
            key=hash_words(self.seed, _MARGIN_KEY, self.step, self._micro_step),
        )
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self._observe(batch.constant(), x if features is None else unit(features)[0], targets)
            if self.votes is not None:
                self._nearest.append((targets.local_id, nearest))
            self._micro_step += 1

        negatives = Negatives(
            rows, targets, self.margin, batch.constant(), self._own_centres(rows, targets, len(x)),
            self.piece or piece_size(x, self.num_subcenters),
        )  # fmt: skip
        if learning and self.margin.needs_lse:
            self._rescale(x.detach(), negatives, num_sampled - 1)
        negatives = negatives._replace(margin=self.margin.frozen())
        replaced = self.margin.target(batch)  # [B]
        self._last = batch.cos_target.detach(), replaced.detach()
        # A number that the margin learns is known to every rank, and its gradient must count once.
        target = _gradient_where(held, self.margin.scale * replaced)
        loss = self._reduce(x, negatives, target).mean()
        for term in (self.margin.regularizer(batch), self._class_regularizer()):
            if term is not None:
                loss = loss + term
        return loss

    def _reduce(self, x: Tensor, negatives: Negatives, target: Tensor) -> Tensor:  # [B]
        """The loss of every row from the logits of its target and of the other classes."""
        zero = target.new_zeros(())
        if self.margin.reduction == "softmax":
            lse = log_sum_exp(x, self.weight, negatives)
            lse = collectives.merge_log_sum_exp(lse, self.group)
            # -log softmax of the target, log(1 + exp(lse - target)): never saturates.
            return torch.logaddexp(lse - target, zero)
        total = collectives.share(softplus_sum(x, self.weight, negatives), self.group)
        positive = self.margin.positive_weight * torch.logaddexp(-target, zero)
        return positive + self.margin.negative_weight * total

    def _share(self, cos_target: Tensor, targets: Targets) -> Tensor:
        """Target cosines and the margin's values of the classes, on every rank: [B, 1 + k]."""
        values = self.margin.class_values(targets.local_id)  # [m, k]
        if values is None:
            return collectives.share(cos_target[:, None], self.group)
        filled = values.new_zeros(len(cos_target), values.shape[1])
        filled = filled.index_copy(0, targets.row, values)
        return collectives.share(torch.cat([cos_target[:, None], filled], 1), self.group)

    @torch.no_grad()
    def _observe(self, batch: Rows, x: Tensor, targets: Targets) -> None:
        self.margin.observe(batch, x.detach(), Owned(targets.row, targets.local_id))

    @torch.no_grad()
    def _own_centres(self, rows: SampledRows, targets: Targets, num_rows: int) -> Tensor | None:
        """Unit centre [B, D] of every row's class, if the margin wants it. One all-reduce."""
        if not self.margin.needs_centres:
            return None
        centres, _ = rows.unit(targets.place)  # [m, 1, D]
        filled = centres.new_zeros(num_rows, self.embedding_size)
        return collectives.share(filled.index_copy_(0, targets.row, centres[:, 0]), self.group)

    @torch.no_grad()
    def _rescale(self, x: Tensor, negatives: Negatives, num_negatives: int) -> None:
        """A first pass at the scale that the step began with, for the margin to choose its own."""
        first = negatives._replace(margin=self.margin.frozen(committed=True))
        lse = collectives.merge_log_sum_exp(log_sum_exp(x, self.weight, first), self.group)
        self.margin.rescale(lse, negatives.batch, num_negatives)

    def _class_regularizer(self) -> Tensor | None:
        share = self.margin.class_regularizer()
        return None if share is None else collectives.share(share[None], self.group)[0]

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

    def margin_gradients(self) -> dict[str, Tensor]:
        """The gradient of the loss with respect to what the margin learns, by name.

        For a number of each class, of this shard's; for one of the model, the same on all ranks:
        one all-reduce for all of those. To be called by all ranks; a parameter without a gradient
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

    def end_step(self, found_inf: Tensor | None = None) -> SampledRows:
        """The rows of this optimiser step with their gradient; the next step draws anew.

        found_inf: [] not 0 if the step is skipped; what was seen in it is then dropped.
        """
        sampled = self._sampled()
        self._open.clear()
        self._done = None
        self._micro_step = 0
        self.step += 1
        self.margin.commit(found_inf)
        for local_id, nearest in self._nearest:
            vote = torch.ones_like(nearest)
            if found_inf is not None:
                vote = torch.where(found_inf > 0, 0, vote)
            assert self.votes is not None
            self.votes.index_put_((local_id, nearest), vote, accumulate=True)
        self._nearest = []
        return sampled

    def drop_step(self) -> None:
        """Forget the forwards since the last optimiser step, as if they had not been."""
        self._open.clear()
        self._done = None
        self._micro_step = 0
        self._nearest = []
        self.margin.commit(torch.ones((), device=self.weight.device))
        for parameter in self.margin.parameters():
            parameter.grad = None

    @torch.no_grad()
    def end_epoch(self) -> Statistics:
        """To be called by all ranks when an epoch of samples is over; what the log says of it."""
        statistics = self.margin.end_epoch(self._reduce_values)
        if self.votes is not None:
            of_dominant = torch.stack([self.votes.max(1).values.sum(), self.votes.sum()])
            dominant, every = self._reduce_values(of_dominant, "sum").double().unbind()
            statistics["dominant_subcenter_share"] = dominant / every
            self.votes.zero_()
        return statistics

    @torch.no_grad()
    def statistics(self) -> Statistics:
        """What the log says of the loss; to be called by all ranks.

        cos_target and margin are means over the last batch: the cosine to the own class, and by how
        much the loss lowered it.
        """
        statistics = self.margin.statistics(self._reduce_values)
        if self._last is not None:
            cos, replaced = self._last
            statistics |= {"cos_target": cos.mean(), "margin": (cos - replaced).mean()}
        return statistics

    def class_state(self) -> dict[str, Tensor]:
        """What is held for each class beside its centres, by name: [C_r, ...]."""
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

    def _sample(self, labels: Tensor) -> tuple[SampledRows, Targets, int]:
        """The sampled rows, the targets among them, and how many all ranks sample."""
        chosen = sample(
            labels.numpy(), self.num_classes, self.shard, self.sample_rate, self.seed, self.step
        )
        device = self.weight.device
        rows = None if chosen.classes is None else chosen.classes - self.shard[0]
        targets = Targets(
            to_device(chosen.owned, device),
            to_device(chosen.position, device),
            to_device(labels.numpy()[chosen.owned] - self.shard[0], device),
            chosen.position.tolist(),
        )
        return self._open_rows(rows), targets, chosen.total

    def _check(self, local_x: Tensor, labels: Tensor, features: Tensor | None) -> None:
        if local_x.dim() != 2 or local_x.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings of shape {tuple(local_x.shape)}: expected [b, {self.embedding_size}]"
            )
        if labels.shape != local_x.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for {len(local_x)} embeddings: expected [b]"
            )
        if features is not None and features.shape != local_x.shape:
            raise ValueError(
                f"features of shape {tuple(features.shape)} for embeddings of "
                f"{tuple(local_x.shape)}: expected the same"
            )
        if features is None and self.training and self.margin.encoder_momentum is not None:
            raise ValueError(
                "this margin observes a slow copy of the network (features='momentum'): pass its "
                "embeddings as local_features, or make the margin with features='epoch'"
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


def _checked_counts(class_counts: object, num_classes: int) -> np.ndarray:
    counts = np.asarray(class_counts)
    if counts.shape != (num_classes,):
        raise ValueError(f"class_counts of shape {counts.shape}, not ({num_classes},)")
    if counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise ValueError(f"class_counts of {counts.dtype}: whole numbers of images, none negative")
    return counts


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
