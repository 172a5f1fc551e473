"""The rows of the class matrix that one step uses, read piece by piece, and their one gradient.

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding, n classes of a piece.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recognition.sampling import Draw
from recognition.tables import Tables

# Takes the gradient [n, K, D] of rows of the tables, a slice or int64 [n] of them; what was read of
# them, which it may change; and [n * K] how much of each centre is to be taken off its gradient, or
# None: nothing.
Sink = Callable[[Tables, slice | Tensor, Tensor, Tensor, Tensor | None], None]


def take_off(grad: Tensor, rows: Tensor, radial: Tensor | None) -> None:
    """grad - radial * rows, in place: the gradient through w / |w| does not point along w.
    grad, rows: [n, K, D]; radial: [n * K]."""
    if radial is not None:
        grad.flatten(0, 1).addcmul_(rows.flatten(0, 1), radial[:, None], value=-1)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / n along the last axis, and n = |x| [..., 1]; n is 1 where |x| is 0, so 0 stays 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > torch.finfo(x.dtype).tiny, norm, 1.0)
    return x / norm, norm


class Pool:
    """Memory that is lent from step to step: fresh pages cost the operating system's time."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """An unwritten tensor of `like`'s dtype and device."""
        for place, tensor in enumerate(self._free):
            if (tensor.shape, tensor.dtype, tensor.device) == (shape, like.dtype, like.device):
                return self._free.pop(place)
        self._free.clear()  # sizes have changed: do not hold the old ones beside the new
        return like.new_empty(shape)

    def give(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._free.append(tensor)


class SampledRows:
    """The centres of the sampled classes, read from the weight when asked for, never copied whole.

    The gradient of the loss with respect to the raw rows is collected here, one tensor [S, K, D]
    for all of its sources, so autograd never adds two of that size. With a sink there is none: the
    sink takes the gradient of each piece as it is finished.
    """

    def __init__(
        self,
        weight: Tensor,  # [n, K, D]
        tables: Tables,  # the weight and its optimiser state, for whoever updates them
        index: Tensor | None = None,  # int64 [S] of the weight; None: all of them, in order
        missed: np.ndarray | None = None,  # int64 ids, the last of the sample: the draw missed them
        pool: Pool | None = None,
        sink: Sink | None = None,
    ) -> None:
        self.weight, self.tables = weight.detach(), tables
        self.index, self.sink = index, sink
        self.missed = np.empty(0, np.int64) if missed is None else missed
        self.grad: Tensor | None = None  # [S, K, D]
        self._pool = pool or Pool()
        self._version = self._current_version()
        self._scratch: Tensor | None = None  # [n, K, D]
        self._adds = False  # to a gradient that is there
        self.is_finished = False  # a backward has been here
        self.is_lent = False  # somebody may keep the gradient

    def _current_version(self) -> int:
        """Another number after each change of the weight."""
        return self.weight._version

    def __len__(self) -> int:
        return len(self.weight if self.index is None else self.index)

    @property
    def like(self) -> Tensor:
        """A tensor [any, K, D] of the weight's dtype on the device that computes."""
        return self.weight

    def ids(self) -> Tensor | None:
        """int64 [S] classes of this rank that are sampled; None: all, in order."""
        return self.index

    def places(self, missed: np.ndarray) -> np.ndarray:
        """Where in the weight some classes stand that the draws missed."""
        return missed

    def at(self, where: slice) -> slice | Tensor:
        """The rows of the weight at some places of the sample."""
        return where if self.index is None else self.index[where]

    def read(self, where: slice) -> Tensor:
        """The centres [n, K, D] at some places of the sample; do not change them."""
        rows = self.at(where)
        return self.weight[rows] if isinstance(rows, slice) else self.weight.index_select(0, rows)

    def read_few(self, place: Tensor, on_host: list[int]) -> Tensor:
        """The centres [m, K, D] at places of the sample, which are told twice."""
        return self.weight.index_select(0, place if self.index is None else self.index[place])

    def source(self, where: slice) -> tuple[Tensor, Tensor | None]:
        """A tensor [*, K, D], and which of its rows these centres are: int64 [n], or all."""
        rows = self.at(where)
        return (self.read(where), None) if isinstance(rows, slice) else (self.weight, rows)

    def begin_gradient(self) -> None:
        """Before the pieces of a backward.

        Raises:
            RuntimeError: the weight has changed since the forward.
        """
        if self.sink is not None and self.is_finished:
            raise RuntimeError("a backward of this forward has updated the class rows already")
        if self._current_version() != self._version:
            raise RuntimeError("the class rows were changed between a forward and its backward")
        self._adds, self.is_finished = self.grad is not None, True
        if self.grad is None and self.sink is None:
            self.grad = self._pool.take(self.weight, len(self), *self.weight.shape[1:])

    def room(self, where: slice) -> Tensor:
        """Where the gradient [n, K, D] of a piece is to be written."""
        if self.grad is not None and not self._adds:
            return self.grad[where]
        return self._scratch_for(where)

    def _scratch_for(self, where: slice) -> Tensor:
        num = where.stop - where.start
        if self._scratch is None or len(self._scratch) < num:
            self._scratch = self.like.new_empty(num, *self.weight.shape[1:])
        return self._scratch[:num]

    def add_gradient(
        self, where: slice, grad: Tensor, read: Tensor, radial: Tensor | None = None
    ) -> None:
        """What stands in room(where) is finished but for what is to be taken off it, radial
        [n * K] of each centre; read: what read(where) gave, no longer wanted."""
        if self.sink is not None:
            self.sink(self.tables, self.at(where), grad, read, radial)
            self._version = self._current_version()
            return
        take_off(grad, read, radial)
        self._collect(where, grad)

    def _collect(self, where: slice, grad: Tensor) -> None:
        if self._adds:  # else it stands there
            self.gradient()[where] += grad

    def gradient(self) -> Tensor:
        """The gradient so far.

        Raises:
            RuntimeError: a sink has taken it.
        """
        if self.grad is None:
            raise RuntimeError("update_in_backward keeps no gradient of the class rows")
        return self.grad

    def with_gradient(
        self, grad: Tensor, index: Tensor | None = None, missed: np.ndarray | None = None
    ) -> SampledRows:
        """Such rows with a gradient, of another sample where one is given."""
        rows = copy.copy(self)
        rows.sink, rows._scratch, rows.is_lent = None, None, False
        rows.grad, rows.is_finished = grad, True
        if index is not None and missed is not None:
            rows.index, rows.missed = index, missed
        return rows

    def recycle(self) -> None:
        """The gradient has served: the next step may have its memory."""
        if not self.is_lent:
            self._pool.give(self.grad)
        self.grad = None


def merge(first: SampledRows, second: SampledRows) -> SampledRows:
    """The rows and gradients of two micro-steps as one: union and sum.

    Micro-steps share what was drawn and differ in the positives that the draw missed.
    """
    if first.index is None or second.index is None:
        first.gradient().add_(second.gradient())
        return first
    device, drawn = first.weight.device, len(first) - len(first.missed)
    missed = np.union1d(first.missed, second.missed)
    index = torch.cat([first.index[:drawn], to_device(first.places(missed), device)])
    grad = first.weight.new_zeros(len(index), *first.weight.shape[1:])
    for part in (first, second):
        grad[:drawn] += part.gradient()[:drawn]
        place = to_device(drawn + np.searchsorted(missed, part.missed), device)
        grad.index_add_(0, place, part.gradient()[drawn:])
    return first.with_gradient(grad, index, missed)


def drawn_on(device: torch.device, draw: Draw) -> Tensor:
    """draw.classes() as a tensor on the device: int64 [num]. On a GPU it is computed there, so that
    neither the hash of millions of cells nor their copy waits for the host."""
    if device.type == "cpu":
        return torch.from_numpy(draw.classes())
    return drawn_by_torch(device, draw)


def drawn_by_torch(device: torch.device, draw: Draw) -> Tensor:
    """draw.classes() in torch's int64, whose products wrap as the host's uint64 do."""
    parts = [torch.empty(0, dtype=torch.int64, device=device)]
    for first, last, shift in draw.runs:
        cell = torch.arange(first, last, device=device)
        low = cell * draw.num_classes // draw.num_cells
        size = (cell + 1) * draw.num_classes // draw.num_cells - low
        state = (cell ^ _signed(draw.key)) + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
        bits = _shifted(state ^ _shifted(state, 31), 32)
        parts.append(low + (bits * size >> 32) + shift)
    return torch.cat(parts)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """A logical shift to the right, where torch's is arithmetic."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits for the stream
    return tensor.to(device, non_blocking=True)
