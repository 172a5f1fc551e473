"""The heads of a run: one over all classes, or one for each data set with a loss of its own.

With a head for each set no image of one is ever compared with a class of another: the answer to
people who are in several sets, whose two classes one head would drive apart. The backbone learns
from all: loss = sum over sets k of loss_weight_k * (n_k / n) * loss_k, with n_k of the n rows of a
batch from set k, which is the mean over the rows where all weights are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError
from data_tools.load.order import Order
from data_tools.shards import Shards
from data_tools.union import Union
from recognition.config import Config, of_head
from recognition.head import PartialFC
from recognition.head.chunked_softmax import plain_kernel
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import Margin, make_margin


class MultiHeadLoss(NamedTuple):
    """The loss of a micro-batch, and that of each head without its weight."""

    total: Tensor  # []
    by_head: Tensor  # [heads]


def make_heads(
    cfg: Config, data: Shards | Union, group: ProcessGroup, head_precision: str | None = None
) -> list[PartialFC]:
    """The heads that `cfg` asks for, on the CPU in fp32. head_precision: as of limits_of().

    Raises:
        ValueError: the number of heads is not that of the sets, or their slow encoders differ.
        KeyError, TypeError, ValueError: a margin or its arguments, with the head's number.
    """
    counts = np.bincount(data.labels, minlength=data.num_classes)
    if not cfg.rec_heads:
        return [make_head(cfg, len(counts), counts, group, cfg.seed, head_precision)]
    firsts = first_classes(data)
    if len(cfg.rec_heads) != len(firsts) - 1:
        raise UserError(
            f"rec_heads has {len(cfg.rec_heads)} heads and rec {len(firsts) - 1} data sets: one "
            "for each, {} for the settings of the run"
        )
    heads = []
    for k, (start, stop) in enumerate(zip(firsts[:-1], firsts[1:], strict=True)):
        own = of_head(cfg, k)
        try:
            local_counts, seed = counts[start:stop], cfg.seed + k
            heads.append(make_head(own, stop - start, local_counts, group, seed, head_precision))
        except (KeyError, TypeError, ValueError) as error:
            raise type(error)(f"rec_heads[{k}]: {error.args[0]}") from error
    encoder_momentum(heads)
    return heads


def make_head(
    cfg: Config,
    num_classes: int,
    class_counts: np.ndarray | None,  # int64 [C]
    group: ProcessGroup,
    seed: int,
    head_precision: str | None = None,
) -> PartialFC:
    """One head with the margin that `cfg` names, on the CPU in fp32."""
    return PartialFC(
        make_run_margin(cfg),
        cfg.embedding_size,
        num_classes,
        cfg.sample_rate,
        cfg.num_subcenters,
        group,
        seed,
        class_counts,
        cfg.head_storage,
        limits_of(cfg, head_precision),
    )


def limits_of(cfg: Config, head_precision: str | None = None) -> MemoryLimits:
    """head_precision: "full" or "bf16", what the run has made of "auto"; None: as `cfg` says, where
    "auto" is "full"."""
    is_narrow = (head_precision or cfg.head_precision) == "bf16"
    stored = None if cfg.head_stored_mib is None else cfg.head_stored_mib << 20
    dtype = torch.bfloat16 if is_narrow else None
    return MemoryLimits(stored, dtype=dtype, kernel=plain_kernel)  # until the run chooses


def make_run_margin(cfg: Config) -> Margin:
    arguments = dict(cfg.margin_args)
    if cfg.interclass_filtering_threshold:
        if "interclass_filtering_threshold" in arguments:
            raise UserError("interclass_filtering_threshold is in margin_args too: keep one")
        arguments["interclass_filtering_threshold"] = cfg.interclass_filtering_threshold
    return make_margin(cfg.margin, arguments)


def first_classes(data: Shards | Union) -> list[int]:
    """The first class of each set in the numbering of all, and their total: [sets + 1]."""
    sets = data.sets if isinstance(data, Union) else [data]
    return np.cumsum([0, *(one.num_classes for one in sets)]).tolist()


def encoder_momentum(heads: Sequence[PartialFC]) -> float | None:
    """How slowly the copy of the backbone follows that the heads observe; None if none does.

    Raises:
        ValueError: two heads want different ones.
    """
    wanted = {head.margin.encoder_momentum for head in heads} - {None}
    if len(wanted) > 1:
        raise UserError(
            f"the losses of rec_heads want slow encoders of momentum {sorted(map(str, wanted))}: "
            "a run has one"
        )
    return wanted.pop() if wanted else None


def shares(cfg: Config, data: Shards | Union) -> list[int]:
    """Of a batch, for each set; [] where all are one stream. Heads of their own need shares: how
    many rows each has is then known beforehand, by size unless the run says otherwise."""
    if cfg.rec_heads and not cfg.rec_shares:
        return list(data.sizes) if isinstance(data, Union) else [1]
    return cfg.rec_shares


def check_rows(cfg: Config, order: Order, world: int) -> None:
    """Raises: ValueError if a head could be without a row in some micro-step."""
    if not cfg.rec_heads:
        return
    rows = cfg.global_batch(world) // cfg.accumulation
    least = min(rows * share // sum(order.shares) for share in order.shares)
    if least < 2:
        raise UserError(
            f"a micro-batch of {rows} rows leaves {least} for one of the sets "
            f"(shares {list(order.shares)}): a head needs 2, so enlarge the batch or rec_shares"
        )


def multi_head_loss(
    cfg: Config,
    heads: Sequence[PartialFC],
    embeddings: Tensor,  # [b, D] of this rank, set by set
    labels: Tensor,  # int64 [b] in the numbering of all classes
    rows: Sequence[Sequence[int]],  # [W][sets] rows of each rank
    features: Tensor | None,  # [b, D] of the slow encoder
) -> MultiHeadLoss:
    """The loss of a micro-batch; its collectives are those of each head in turn."""
    if not cfg.rec_heads:
        loss = heads[0](embeddings, labels, [sum(own) for own in rows], features)
        return MultiHeadLoss(loss, loss.detach()[None])
    num_rows = sum(map(sum, rows))
    mine = rows[heads[0].group.rank()]
    losses, weighted, start, first_class = [], [], 0, 0
    for k, head in enumerate(heads):
        part = slice(start, start + mine[k])
        counts = [own[k] for own in rows]
        own_features = None
        if features is not None and head.margin.encoder_momentum is not None:
            own_features = features[part]
        loss = head(embeddings[part], labels[part] - first_class, counts, own_features)
        weighted.append(loss * (cfg.rec_heads[k].get("loss_weight", 1.0) * sum(counts) / num_rows))
        losses.append(loss.detach())
        start, first_class = part.stop, first_class + head.num_classes
    return MultiHeadLoss(torch.stack(weighted).sum(), torch.stack(losses))


def epochs_over(order: Order, num_heads: int, before: int, after: int) -> list[int | None]:
    """Of each head the epoch of its images that ended between two counts of samples seen, or None.

    One head over several sets counts as if they were one.
    """
    sizes = order.sizes if num_heads > 1 else (sum(order.sizes),)
    then, now = (order.count(seen) if num_heads > 1 else [seen] for seen in (before, after))
    return [
        b // size if b // size > a // size else None
        for a, b, size in zip(then, now, sizes, strict=True)
    ]


def head_names(cfg: Config) -> list[str]:
    """What the log calls each head: the directory of its set, in full where two are alike."""
    if not cfg.rec_heads:
        return [""]
    short = [rec.rstrip("/").rpartition("/")[2] for rec in cfg.recs]
    return short if len(set(short)) == len(short) else list(cfg.recs)
