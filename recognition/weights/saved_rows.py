"""The class rows of a head that was trained elsewhere; each rank reads only its own.

Letters: C classes there, K sub-centres, D embedding size, n rows asked for.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.common import files
from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.checkpoint.tensors import readable
from recognition.distributed import store_exchange
from recognition.weights.foreign import dense, read_torch

_BLOCK = 1 << 16  # rows read at a time
_SHARD = r"_gpu_(\d+)\.pt$"  # how the name of a shard of arcface_torch ends


class _Piece(NamedTuple):
    """The rows of consecutive classes, in one file."""

    size: int  # rows
    read: Callable[[int, int], Tensor]  # the rows [low, high) of them


class SavedRows:
    """Class rows in files, by class id; `rows[ids]` reads the blocks that hold those."""

    def __init__(self, pieces: Sequence[_Piece], shape: tuple[int, ...], origin: str) -> None:
        self.shape, self.origin = shape, origin  # of one row: (D,) or (K, D); for the log
        self._pieces = pieces
        self._starts = np.cumsum([0] + [piece.size for piece in pieces])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, ids: np.ndarray) -> Tensor:  # int64 [n] -> [n, (K,) D]
        rows = torch.zeros(len(ids), *self.shape)
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        for piece, start in zip(self._pieces, self._starts.tolist(), strict=False):
            for low in range(start, start + piece.size, _BLOCK):
                high = min(low + _BLOCK, start + piece.size)
                first, last = np.searchsorted(ascending, [low, high])
                if first == last:
                    continue
                wanted = ascending[first:last]
                lowest = int(wanted[0])
                block = piece.read(lowest - start, int(wanted[-1]) + 1 - start)
                rows = rows.to(torch.promote_types(rows.dtype, block.dtype))
                chosen = block[torch.from_numpy(wanted - lowest)]
                rows[torch.from_numpy(order[first:last])] = chosen.to(rows.dtype)
        return rows


def open_rows(source: str) -> SavedRows:
    """The class rows of a run of ours, or of arcface_torch's shards, in the order of the classes.

    The classes of a run with several heads are numbered head by head. The files of a run are not
    checked here: call verify() first.

    Raises:
        FileNotFoundError: neither is at `source`.
        Damaged: a checkpoint whose files do not hold every class once.
        ValueError: the rows are not those of one head.
        OSError: they cannot be read.
    """
    path = checkpoint_at(source)
    return _of_checkpoint(path, source) if path else _of_shards(source)


def checkpoint_at(source: str) -> str | None:
    """The checkpoint at or in `source`; None if it is no run of ours. Raises: OSError."""
    try:
        return checkpoint.find(source)
    except FileNotFoundError:
        return None


def verify(source: str, group: ProcessGroup) -> None:
    """Compare the files of class rows with their hashes, each rank a share of the bytes.

    Raises:
        Damaged: on every rank alike, naming the files.
        OSError: some rank cannot read them.
    """
    found = store_exchange.run_on_all_ranks(group, "find init_head", lambda: checkpoint_at(source))
    path = found[group.rank()]
    if path is not None:
        checkpoint.verify(path, group, lambda name: "rows-" in name)


def _of_checkpoint(path: str, source: str) -> SavedRows:
    manifest = checkpoint.read_manifest(path)
    pieces, shapes = [], []
    for k in range(len(manifest["heads"])):
        rows = checkpoint.all_rows(path, manifest, k)
        shapes.append(_row_shape(path, rows[0].name))
        pieces += [_slice_of(path, name, stop - start, shapes[-1]) for name, start, stop in rows]
    if len(set(shapes)) > 1:
        counts = [head["num_classes"] for head in manifest["heads"]]
        said = ", ".join(str([n, *shape]) for n, shape in zip(counts, shapes, strict=True))
        raise UserError(f"init_head={source}: its heads have rows of several shapes: {said}")
    return SavedRows(pieces, shapes[0], f"the checkpoint {path}")


def _row_shape(path: str, name: str) -> tuple[int, ...]:
    with readable(path, name), safe_open(os.path.join(path, name), "pt") as file:
        return tuple(file.get_slice("weight").get_shape()[1:])


def _slice_of(path: str, name: str, count: int, shape: tuple[int, ...]) -> _Piece:
    def read(low: int, high: int) -> Tensor:
        with readable(path, name), safe_open(os.path.join(path, name), "pt") as file:
            weight = file.get_slice("weight")
            if tuple(weight.get_shape()) != (count, *shape):
                said = f"{os.path.join(path, name)}: weight is {weight.get_shape()}"
                raise checkpoint.Damaged(said)
            return weight[low:high]

    return _Piece(count, read)


def _of_shards(source: str) -> SavedRows:
    by_rank = _shards_at(source)
    if max(by_rank) >= len(by_rank):
        others = (rank for rank in range(max(by_rank)) if rank not in by_rank)
        absent = list(itertools.islice(others, 4))  # a name may hold any number
        raise UserError(
            f"init_head={source}: the shards of ranks {absent} are missing, of the ranks up to "
            f"{max(by_rank)}: the head is not whole"
        )
    paths = [by_rank[rank] for rank in sorted(by_rank)]
    shapes = [tuple(_shard(path).shape) for path in paths]
    sizes = [shape[0] for shape in shapes]
    # C // W rows on each rank and one more on the first C % W, as arcface_torch cuts them.
    if (
        len({shape[1:] for shape in shapes}) > 1
        or sorted(sizes, reverse=True) != sizes
        or (sizes[0] - sizes[-1] > 1)
    ):
        said = ", ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"init_head={source}: these are not the shards of one head: {said}")
    pieces = [_part_of(path, count) for path, count in zip(paths, sizes, strict=True)]
    return SavedRows(pieces, shapes[0][1:], f"{len(paths)} shards of arcface_torch in {source}")


def _part_of(path: str, count: int) -> _Piece:
    return _Piece(count, lambda low, high: _shard(path)[low:high].float())


def _shards_at(source: str) -> dict[int, str]:
    """The files of arcface_torch's ranks at a directory or pattern, by rank."""
    pattern = os.path.join(source, "*_gpu_*.pt") if files.is_dir(source) else source
    directory, name = os.path.split(pattern)
    if glob.has_magic(directory):
        paths = glob.glob(pattern)
    else:
        names = fnmatch.filter(files.names(directory or "."), name)
        paths = [os.path.join(directory, name) for name in names]
    by_rank: dict[int, str] = {}
    for path in paths:
        if found := re.search(_SHARD, path):
            if int(found[1]) in by_rank:
                raise UserError(
                    f"init_head={source}: two shards are of rank {found[1]}: give those of one head"
                )
            by_rank[int(found[1])] = path
    if not by_rank:
        raise FileNotFoundError(
            f"init_head={source}: neither a run with a checkpoint, softmax_fc_gpu_*.pt files, an "
            ".onnx nor `features`"
        )
    return by_rank


def _shard(path: str) -> Tensor:
    """The class rows in the file of one rank, mapped where torch.save wrote a zip."""
    content = read_torch(path, mapped=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict_softmax_fc"), dict):
        content = content["state_dict_softmax_fc"]
    found = content if isinstance(content, Tensor) else None
    if isinstance(content, dict):
        found = content.get("weight")
    if not isinstance(found, Tensor) or found.ndim != 2:
        names = list(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: no class rows `weight` [C, D] in it, but {names}")
    return dense(found, path)
