"""Knowledge distillation: a bigger network's embeddings as a second target beside the margin loss.

    loss = margin loss + teacher_weight * mean over the batch of d(student, teacher)

d is 1 - cos ("cosine") or the squared distance of the raw embeddings ("feature", the FitNets form,
arXiv:1412.6550, on the last layer). The teacher is a run, an ONNX recognition network or stored
embeddings, and is never trained.

Letters: W ranks, b rows of this rank, B of all, D embedding size, N images of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from data_tools.common import arrays, files
from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.distributed import collectives
from recognition.head.class_rows import to_device
from recognition.precision import autocast
from recognition.weights.foreign import WEIGHT_FILES
from recognition.weights.networks import open_embedder


class Teacher(Protocol):
    def __call__(self, pixels: Tensor, ids: np.ndarray) -> Tensor:
        """[b, D] for pixels [b, 3, 112, 112] in [-1, 1] of the images number `ids` [b]."""


def open_teacher(
    path: str, size: int, num_images: int, device: torch.device, precision: str
) -> Teacher:
    """The teacher at `path`: a run or checkpoint directory, an .onnx, or an .npy [N, D].

    Raises:
        FileNotFoundError, ValueError: nothing there, or another size or number of embeddings.
    """
    if path.endswith(".npy"):
        return Stored(path, size, num_images, device)
    if path.endswith(WEIGHT_FILES):
        raise UserError(
            f"teacher={path}: a file of weights does not name its network: give a run directory, "
            "an .onnx or an .npy"
        )
    if not files.exists(Path(path)):
        raise FileNotFoundError(f"teacher={path}: no such run directory, .onnx or .npy file")
    teacher: Teacher
    if path.endswith(".onnx"):
        teacher = OnnxTeacher(path, device)
    else:
        teacher = RunTeacher(path, device, precision)
    found = teacher(torch.zeros(2, 3, 112, 112, device=device), np.zeros(2, np.int64)).shape[1]
    if found != size:
        raise UserError(
            f"teacher={path} gives embeddings of {found}, the student of {size}: "
            f"embedding_size={found}"
        )
    return teacher


class RunTeacher:
    """The network of a run, in eval mode."""

    def __init__(self, path: str, device: torch.device, precision: str) -> None:
        module, _ = checkpoint.load_backbone(path)
        self.module = module.to(device, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        self.device, self.precision = device, precision

    @torch.no_grad()
    def __call__(self, pixels: Tensor, ids: np.ndarray) -> Tensor:
        with autocast(self.precision, self.device):
            return self.module(pixels.float()).float()


class OnnxTeacher:
    """Any ONNX network, with the input that its metadata or InsightFace's convention state."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.network, self.device = open_embedder(path), device

    def __call__(self, pixels: Tensor, ids: np.ndarray) -> Tensor:
        images = (pixels.float() * 127.5 + 127.5).round().to(torch.uint8)
        found = self.network(images.permute(0, 2, 3, 1).cpu().numpy())
        return to_device(found, self.device)


class Stored:
    """Row i of a file belongs to image i of the data set, mirrored or not."""

    def __init__(self, path: str, size: int, num_images: int, device: torch.device) -> None:
        try:
            self.rows = arrays.load_npy(path, mmap=True)
        except (UserError, OSError) as error:
            raise UserError(f"teacher={path} cannot be read as .npy: {error}") from error
        if not isinstance(self.rows, np.ndarray):
            raise UserError(f"teacher={path} is an .npz by its content: one array is wanted, .npy")
        if self.rows.shape != (num_images, size) or self.rows.dtype.kind != "f":
            raise UserError(
                f"teacher={path} holds {self.rows.dtype} {list(self.rows.shape)}: expected floats "
                f"[{num_images}, {size}], an embedding for each image of the data set"
            )
        self.path, self.device = path, device

    def __call__(self, pixels: Tensor, ids: np.ndarray) -> Tensor:
        rows = np.asarray(self.rows[ids], np.float32)
        if not np.isfinite(rows).all():  # here, because checking the whole file would take long
            wrong = ids[~np.isfinite(rows).all(1)]
            raise UserError(
                f"teacher={self.path}: the embedding of image {wrong[0]} is not finite: write the "
                "file again, or use the run itself as the teacher"
            )
        return to_device(rows, self.device)


def distillation_loss(
    student: Tensor,  # [b, D]
    teacher: Tensor,  # [b, D]
    kind: str,  # "cosine" | "feature"
    rows_per_rank: Sequence[int],
    group: ProcessGroup,
) -> Tensor:
    """[] the mean of d over all B rows, the same on every rank; its gradient is this rank's part.

    DDP averages the gradients over W ranks, so this rank's gradient is that of sum(d) * W / B.
    Forward: an all-reduce of one number. Backward: nothing.
    """
    x, t = student.to(torch.promote_types(student.dtype, torch.float32)), teacher.to(student.dtype)
    if kind == "cosine":
        x, t = nn.functional.normalize(x), nn.functional.normalize(t.to(x.dtype))
        distance = 1 - (x * t).sum(1)
    else:
        distance = (x - t.to(x.dtype)).square().sum(1)
    own = distance.sum() * len(rows_per_rank) / sum(rows_per_rank)
    everywhere = collectives.sum_over_ranks(distance.sum(), group) / sum(rows_per_rank)
    return everywhere + (own - own.detach())
