"""The initial class centres of a new run.

Letters: C classes, C_r of this rank, D embedding size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines
from data_tools.images.decode import decode
from data_tools.shards import Shards
from data_tools.union import Union
from recognition.head import PartialFC
from recognition.weights.networks import open_embedder
from recognition.weights.saved_rows import open_rows

_IMAGES_OF_A_CLASS = 16  # whose mean is its centre, at most
_BATCH = 64  # images
_ID, _DIGITS = re.compile(r"-?[0-9]+"), 18  # of an id in the label map; more do not fit int64


@torch.no_grad()
def start_centres(
    head: PartialFC,
    source: str,
    label_map: str | None,
    data: Shards | Union,
    embed: Callable[
        [np.ndarray[Any, Any]], np.ndarray[Any, Any]
    ],  # uint8 [n, 112, 112, 3] -> [n, D]
    resize: bool = False,
) -> int:
    """Fill this rank's class centres as `init_head` says; returns how many were filled.

    source: "features", the mean direction of up to 16 images of each class under the backbone; an
        .onnx, the same under that network; a run or checkpoint directory of ours; or a directory
        or pattern of partial-FC shards of arcface_torch (softmax_fc_gpu_*.pt or
        checkpoint_gpu_*.pt, one a rank, in the order of their numbers).
    label_map: a text file, a line for each class here: its id there, or -1 for none.

    A centre gets the length of its random start; a class without a source keeps that start. Each
    rank reads only the rows of its own classes.

    Raises:
        ValueError: shapes that do not fit, rows of zeros or NaN, or another number of classes
            and no map.
        FileNotFoundError: nothing at `source`.
    """
    start, stop = head.shard
    head.settle()
    length = head.weight.norm(dim=-1, keepdim=True)  # [C_r, (K,) 1]
    if source == "features" or source.endswith(".onnx"):
        if label_map is not None:
            raise UserError(
                f"init_label_map goes with a head of other identities; init_head={source} takes "
                "the images of the classes here: leave the map out"
            )
        ids, rows = _means(
            data, start, stop, embed if source == "features" else open_embedder(source), resize
        )
    else:
        there = open_rows(source)
        chosen = _mapped(label_map, len(there), head.num_classes, source, (start, stop))
        ids = np.flatnonzero(chosen >= 0)
        rows = there[chosen[ids]]
    if not len(ids):  # no class of this rank has a source
        return 0
    if rows.shape[-1] != head.embedding_size or (
        rows.ndim == 3 and rows.shape[1:] != head.weight.shape[1:]
    ):
        raise UserError(
            f"init_head={source}: its rows are {list(rows.shape[1:])}, this head's "
            f"{list(head.weight.shape[1:])}"
        )
    wrong = ~rows.isfinite().flatten(1).all(1) | ~rows.ne(0).any(-1).reshape(len(rows), -1).all(1)
    if wrong.any():
        first = start + int(ids[wrong.numpy()][0])
        raise UserError(
            f"init_head={source}: its row for class {first} is zero or not finite "
            f"({int(wrong.sum())} such rows on this rank): the file is damaged, or the "
            "network that made it diverged"
        )
    if rows.ndim < head.weight.ndim:
        rows = rows[:, None].expand(-1, head.num_subcenters, -1)
    unit = nn.functional.normalize(rows.to(head.weight), dim=-1)
    index = torch.from_numpy(ids).to(head.weight.device)
    head.weight[index] = unit * length[index]
    return len(ids)


def origin(source: str) -> str:
    """Where init_head takes class centres from, for the log."""
    if source == "features" or source.endswith(".onnx"):
        network = "the network of the start" if source == "features" else source
        return f"the mean direction of up to {_IMAGES_OF_A_CLASS} images each under {network}"
    return open_rows(source).origin


def _mapped(
    label_map: str | None, there: int, here: int, source: str, shard: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """int64 [C_r]: which row of the source each class of this rank takes, -1 for none."""
    if label_map is None:
        if there != here:
            raise UserError(
                f"init_head={source} has {there} classes, the data {here}: map them, "
                "init_label_map=FILE with a line for each class here: its id there, or -1"
            )
        return np.arange(*shard)
    try:
        lines = [
            (number, _ID.fullmatch(line.strip())) for number, line in numbered_lines(label_map)
        ]
    except (UserError, OSError) as error:
        raise UserError(f"init_label_map={label_map}: {error}") from error
    for number, found in lines:
        if found is None or len(found[0]) > _DIGITS:
            what = "is not one class id, a whole number or -1" if found is None else "is too large"
            raise UserError(f"init_label_map={label_map}: line {number} {what}")
    ids = np.array([int(found[0]) for _, found in lines if found is not None], dtype=np.int64)
    if len(ids) != here or ids.min(initial=0) < -1 or ids.max(initial=-1) >= there:
        raise UserError(
            f"init_label_map={label_map}: {len(ids)} lines from {ids.min(initial=0)} to "
            f"{ids.max(initial=-1)}; expected {here} lines from -1 to {there - 1}"
        )
    return ids[slice(*shard)]


def _means(
    data: Shards | Union,
    start: int,
    stop: int,
    embed: Callable[[Any], np.ndarray[Any, Any]],
    resize: bool,
) -> tuple[np.ndarray[Any, Any], Tensor]:
    """(local ids [m], sum of the unit embeddings of their images [m, D]) of classes with some."""
    labels = np.asarray(data.labels)
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], np.arange(start, stop + 1))
    picked = [
        order[a : min(b, a + _IMAGES_OF_A_CLASS)] for a, b in zip(first, first[1:], strict=False)
    ]
    images = np.concatenate([np.zeros(0, np.int64), *picked])
    owner = np.repeat(np.arange(stop - start), [len(part) for part in picked])
    sums: Tensor | None = None
    for at in range(0, len(images), _BATCH):
        chunk = images[at : at + _BATCH]
        pixels = np.stack(
            [decode(data[int(i)][1], where=f"image {i}", resize=resize) for i in chunk]
        )
        x = nn.functional.normalize(torch.from_numpy(embed(pixels)).double(), dim=1)
        sums = x.new_zeros(stop - start, x.shape[1]) if sums is None else sums
        sums.index_add_(0, torch.from_numpy(owner[at : at + _BATCH]), x)
    ids = np.unique(owner)
    rows = torch.zeros(0, 1) if sums is None else sums[torch.from_numpy(ids)]
    return ids, rows
