"""The target of an image: a class of the trained head, or an embedding.

Letters: W ranks, b images of this rank's batch, B of all ranks, C classes, D embedding size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError
from data_tools.union import open_all
from recognition import checkpoint, config
from recognition.checkpoint.reading import load_head
from recognition.checkpoint.tensors import readable
from recognition.head import PartialFC, multi_head


class Identity(Protocol):
    in_step: bool  # whether all ranks take each step together

    def loss(self, embeddings: Tensor, ids: np.ndarray, rows_per_rank: Sequence[int]) -> Tensor:
        """[] for embeddings [b, D] with the targets `ids` [b]; its gradient is that of the mean
        over these b."""


class ClosedSet:
    """The loss that the head of a run was trained with, over all of its classes.

    Its rows are frozen, sharded over the ranks of `group`; a rank without a batch takes part with
    no rows. The value is the mean over the images of all ranks.

    Raises:
        ValueError: the loss needs what the checkpoint does not hold.
        FileNotFoundError, Damaged: as the checkpoint.
    """

    in_step = True

    def __init__(self, path: str, group: ProcessGroup, device: torch.device, number: int) -> None:
        self.head = frozen_head(path, group, number).to(device)

    def loss(self, embeddings: Tensor, ids: np.ndarray, rows_per_rank: Sequence[int]) -> Tensor:
        self.head.sink = lambda *gradient: None  # no gradient of the class rows is kept
        labels = torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64))
        # The head's loss is the mean over B, and its gather multiplies by W. The collectives of the
        # backward need one factor on all ranks, so the arriving gradient is scaled.
        factor = sum(rows_per_rank) / (len(rows_per_rank) * max(len(embeddings), 1))
        own = embeddings.view_as(embeddings)
        own.register_hook(lambda gradient: gradient * factor)
        return self.head(own, labels, rows_per_rank)

    def end_step(self) -> None:
        self.head.drop_step()

    def take_part(self, rows_per_rank: Sequence[int]) -> None:
        """A step of a rank that has no batch in this round."""
        nothing = self.head.weight.new_zeros(0, self.head.embedding_size).requires_grad_(True)
        loss = self.loss(nothing, np.zeros(0, np.int64), rows_per_rank)
        torch.autograd.grad(loss, nothing)
        self.end_step()


class OpenSet:
    """Mean over the images of the squared distance to their targets, arXiv:1801.07698 section 3.3
    ("L2 between features").

    feature "unit": of the embeddings scaled to length 1, which is 2 - 2 cos; a stored embedding
    has often lost its length. "raw": unscaled.
    """

    in_step = False

    def __init__(self, targets: np.ndarray, feature: str, device: torch.device) -> None:  # [N, D]
        self.targets = torch.from_numpy(targets).to(device)
        self.feature = feature

    def loss(self, embeddings: Tensor, ids: np.ndarray, rows_per_rank: Sequence[int]) -> Tensor:
        x, t = embeddings, self.targets[torch.from_numpy(ids)].to(embeddings.dtype)
        if self.feature == "unit":
            x, t = nn.functional.normalize(x), nn.functional.normalize(t)
        return (x - t).square().sum(1).mean()


def head_facts(path: str, number: int) -> dict[str, Any]:
    """The manifest's facts of a head of a run. Raises: ValueError: there is no such head."""
    manifest = checkpoint.read_manifest(checkpoint.find(path))
    known = manifest["heads"]
    if not known or not checkpoint.row_files(manifest):
        raise UserError(
            f"{path} has no head: classes cannot be inverted, embeddings can (--embeddings, --data)"
        )
    if not 0 <= number < len(known):
        raise UserError(f"--head {number}: {path} has the heads 0 to {len(known) - 1}")
    return known[number]


def frozen_head(path: str, group: ProcessGroup, number: int = 0) -> PartialFC:
    """The head of a checkpoint in eval mode, this rank's rows; none of it learns."""
    facts = head_facts(path, number)
    place = checkpoint.find(path)
    saved = checkpoint.read_manifest(place)["config"]
    cfg = config.make({k: saved[k] for k in config.Config.__dataclass_fields__ if k in saved})
    counts = _class_counts(cfg, facts["num_classes"], number)
    if cfg.rec_heads:
        cfg = config.of_head(cfg, number)
    # The loss over all N classes, whatever was sampled in training.
    cfg = dataclasses.replace(
        cfg, sample_rate=1.0, num_subcenters=facts["num_subcenters"], head_storage="device"
    )
    head = multi_head.make_head(cfg, facts["num_classes"], counts, group, cfg.seed)
    checkpoint.verify(place, group)
    load_head(place, number, head)
    return head.eval().requires_grad_(False)


def _class_counts(cfg: config.Config, num_classes: int, number: int) -> np.ndarray | None:
    """Images of each class, which a margin may need; None if the data are not on this machine."""
    try:
        data = open_all(cfg.rec)
        counts = np.bincount(data.labels, minlength=data.num_classes)
        if cfg.rec_heads:
            firsts = multi_head.first_classes(data)
            counts = counts[firsts[number] : firsts[number + 1]]
    except (OSError, ValueError, IndexError):
        return None  # a margin that needs them raises
    return counts if len(counts) == num_classes else None


def centres(path: str, number: int = 0, block: int = 65536) -> Iterator[np.ndarray]:
    """The class centres of a head in order, [m, (K,) D] of up to `block` classes at a time."""
    place = checkpoint.find(path)
    for name, start, stop in checkpoint.row_files(checkpoint.read_manifest(place), number):
        with readable(place, name), safe_open(os.path.join(place, name), "pt") as file:
            rows = file.get_slice("weight")
            for first in range(0, stop - start, block):
                yield rows[first : first + block].float().numpy()
