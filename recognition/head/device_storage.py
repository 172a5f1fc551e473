"""The class rows and their optimiser state in the memory of the device that computes.

recognition/head/host_storage.py holds them in the host's instead, behind the same interface.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from data_tools.common.draws import hash_tensor
from recognition.head.class_rows import ClassRows, Pool, Sink, Tables, to_device
from recognition.head.sampling import Draw, Sample


class Storage(ABC):
    """Where a head holds its class rows and the state of their optimiser, between the steps."""

    moves_with_head: bool  # head.to(device) moves the weight as it does any parameter
    state: dict[str, Tensor]  # of the row optimiser, by name: [C_r, ...]

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """The weight [C_r, (K,) D]; it has every update after settle()."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor [any, K, D] of the rows' dtype on the device that computes."""

    @abstractmethod
    def rows(
        self,
        sample: Sample,
        shard: tuple[int, int],
        next_draw: Callable[[], Draw],  # of the step after this one
        pool: Pool,
        sink: Sink | None,
    ) -> ClassRows:
        """The class rows of a sample."""

    def attach(self, state: dict[str, Tensor]) -> None:
        """Hold the state of a row optimiser beside the rows."""
        self.state = state

    def move(self, like: Tensor) -> None:
        """Compute on the device of `like` and in its dtype, where the weight does not move."""
        return

    def commit(self) -> None:
        """To be called when the rows of a step are updated."""
        return

    def settle(self) -> None:
        """Return when the weight and the state have every update."""
        return

    def drop(self) -> None:
        """To be called before the weight or the state are changed from outside."""
        return


class MemoryTables(Tables):
    """Tables in the memory of the device that computes, updated in place."""

    def version(self) -> int:
        return self.tensors()["weight"]._version

    def read(self, rows: slice | Tensor) -> Tensor:
        weight = self.tensors()["weight"].unflatten(1, self.like.shape[1:])
        return weight[rows] if isinstance(rows, slice) else weight.index_select(0, rows)

    @contextlib.contextmanager
    def updating(
        self, rows: slice | Tensor, weight: Tensor | None = None, found_inf: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        tables, parts = self.tensors(), {}
        for name, table in tables.items():
            if name == "weight" and weight is not None:
                parts[name] = weight
            elif isinstance(rows, slice):
                parts[name] = table[rows] if found_inf is None else table[rows].clone()
            else:
                parts[name] = table.index_select(0, rows)
        yield parts
        for name, table in tables.items():
            new = parts[name]
            if found_inf is not None:
                new = torch.where(found_inf > 0, table[rows], new)
            elif isinstance(rows, slice):  # it is the table's own memory
                continue
            if isinstance(rows, slice):
                table[rows] = new
            elif table.device.type == "cpu":  # a quarter less time than index_copy_
                table.numpy()[rows.numpy()] = new.numpy()
            else:
                table.index_copy_(0, rows, new)
        self.changed()

    def changed(self) -> None:
        # Not every change counts as one by itself: torch._fused_sgd_'s and numpy's do not.
        increment_version(list(self.tensors().values()))


class DeviceStorage(MemoryTables, Storage):
    """Storage in the memory of the device that computes, whose tables a step uses as they are."""

    moves_with_head = True

    def __init__(self, weight: nn.Parameter, num_subcenters: int) -> None:
        self._weight, self._num_subcenters = weight, num_subcenters  # [C_r, (K,) D]
        self.state = {}

    @property
    def parameter(self) -> nn.Parameter:
        return self._weight

    @property
    def like(self) -> Tensor:
        weight = self._weight.detach()
        return weight if self._num_subcenters > 1 else weight[:, None]

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self._weight.detach().flatten(1)} | {
            name: table.flatten(1) for name, table in self.state.items()
        }

    def rows(
        self,
        sample: Sample,
        shard: tuple[int, int],
        next_draw: Callable[[], Draw],
        pool: Pool,
        sink: Sink | None,
    ) -> ClassRows:
        index, missed = None, sample.missed - shard[0]
        if sample.draw is not None:
            device = self.like.device
            drawn = drawn_on(device, sample.draw) - shard[0]
            index = torch.cat([drawn, to_device(missed, device)])
        return ClassRows(self, index, missed, pool, sink)


def drawn_on(device: torch.device, draw: Draw) -> Tensor:
    """draw.classes() as a tensor on the device: int64 [num]. On a GPU it is computed there, so that
    neither the hash of millions of cells nor their copy waits for the host."""
    if device.type == "cpu":
        return torch.from_numpy(draw.classes())
    return drawn_by_torch(device, draw)


def drawn_by_torch(device: torch.device, draw: Draw) -> Tensor:
    """draw.classes() computed by torch: int64 [num]."""
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    for first, last, shift in draw.runs:
        cell = torch.arange(first, last, device=device)
        bits = hash_tensor(draw.key, cell) >> 32 & 0xFFFFFFFF
        parts.append(draw.pick(cell, bits) + shift)
    return torch.cat(parts)
