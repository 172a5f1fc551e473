"""What a head starts with, the checks of what it is given, and which sub-centres its rows use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data_tools.common.draws import Purpose, hash_words
from data_tools.common.errors import UserError, UserTypeError

_INIT_STD = 0.01  # InsightFace's
_INIT_BLOCK = 1024  # classes drawn by one generator, so that the start is the same at every W
_INIT_THREADS = 16  # at most; torchrun's OMP_NUM_THREADS=1 does not bind them


def initial_rows(shard: tuple[int, int], num_subcenters: int, size: int, seed: int) -> Tensor:
    """Normal(0, 0.01) rows [C_r, K, D], a function of (seed, class id): the same at every W.

    Each block of classes has a generator of its own, so all cores draw them.
    """
    start, stop = shard
    rows = torch.empty(stop - start, num_subcenters, size)

    def draw(block: int) -> None:
        low = block * _INIT_BLOCK
        generator = torch.Generator().manual_seed(hash_words(seed, Purpose.CENTRES, block) >> 1)
        drawn = torch.empty(_INIT_BLOCK, num_subcenters, size)
        drawn.normal_(0.0, _INIT_STD, generator=generator)
        first, last = max(start, low), min(stop, low + _INIT_BLOCK)
        rows[first - start : last - start] = drawn[first - low : last - low]

    with ThreadPoolExecutor(min(_INIT_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(draw, range(start // _INIT_BLOCK, -(-stop // _INIT_BLOCK))):
            pass  # raises what a thread raised
    return rows


def check_layer(
    num_classes: int, world: int, sample_rate: float, embedding_size: int, num_subcenters: int
) -> None:
    """Raises: ValueError for arguments that no head can have."""
    if not 0.0 <= sample_rate <= 1.0:
        raise UserError(f"sample_rate={sample_rate}: a share of the classes, 0 to 1")
    if num_classes < world:
        raise UserError(
            f"{num_classes} classes cannot be sharded over {world} ranks: start at most "
            f"{num_classes} processes"
        )
    if embedding_size < 1 or num_subcenters < 1:
        raise UserError(f"{embedding_size=} and {num_subcenters=} must be positive")


def checked_counts(class_counts: object, num_classes: int) -> np.ndarray:
    counts = np.asarray(class_counts)
    if counts.shape != (num_classes,):
        raise UserError(f"class_counts of shape {counts.shape}, not ({num_classes},)")
    if counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise UserError(f"class_counts of {counts.dtype}: whole numbers of images, none negative")
    return counts


def check_batch(
    local_x: Tensor, labels: Tensor, features: Tensor | None, embedding_size: int, num_classes: int
) -> None:
    """Raises: ValueError, TypeError for embeddings, labels or features that are not this head's."""
    if local_x.dim() != 2 or local_x.shape[1] != embedding_size:
        raise UserError(
            f"embeddings of shape {tuple(local_x.shape)}: expected [b, {embedding_size}]"
        )
    if labels.shape != local_x.shape[:1]:
        raise UserError(
            f"labels of shape {tuple(labels.shape)} for {len(local_x)} embeddings: expected [b]"
        )
    if features is not None and features.shape != local_x.shape:
        raise UserError(
            f"features of shape {tuple(features.shape)} for embeddings of "
            f"{tuple(local_x.shape)}: expected the same"
        )
    if labels.dtype != torch.int64:
        raise UserTypeError(f"labels are {labels.dtype}: expected torch.int64 class ids")
    wrong = (labels < 0) | (labels >= num_classes)
    if labels.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"a label is outside [0, {num_classes})")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(
            f"label {int(labels[row])} at row {row} is outside [0, {num_classes}): "
            "the labels do not fit num_classes"
        )


class Votes:
    """How many rows of an epoch were nearest to each sub-centre of their class: int64 [C_r, K],
    which the head holds and saves with the classes. The rows of a step count once it is taken."""

    def __init__(self) -> None:
        self._nearest: list[tuple[Tensor, Tensor]] = []  # of this step: (local id, which), [m]

    def add(self, local_id: Tensor, nearest: Tensor) -> None:
        self._nearest.append((local_id, nearest))

    def commit(self, counts: Tensor, found_inf: Tensor | None) -> None:
        """found_inf: [] not 0 if the step is skipped."""
        for local_id, nearest in self._nearest:
            vote = torch.ones_like(nearest)
            if found_inf is not None:
                vote = torch.where(found_inf > 0, 0, vote)
            counts.index_put_((local_id, nearest), vote, accumulate=True)
        self._nearest = []

    def drop(self) -> None:
        self._nearest = []


def dominant(counts: Tensor) -> Tensor:
    """[2]: rows at the dominant sub-centre of their class, and all rows."""
    return torch.stack([counts.max(1).values.sum(), counts.sum()])
