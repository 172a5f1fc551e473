"""The rows of the class matrix that one step uses, and their one gradient.

A forward reads the centres of its sampled classes chunk by chunk from tables, which the backward or
the row optimiser updates; where the tables are held is behind the interface Tables.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor


class Tables(ABC):
    """The class rows and their optimiser state, as a step reads and updates them.

    storage.MemoryTables holds them in the memory of the device that computes; lane.StreamedTables
    in the host's, from which they pass through the device in chunks.
    """

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor [any, K, D] of the rows' dtype on the device that computes."""

    @property
    def gradient_like(self) -> Tensor:
        """A tensor [any, K, D] where the gradient of a sample is to be held."""
        return self.like

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The whole rows as "weight", and the state by name: [any, numbers of a row]."""

    def __len__(self) -> int:
        return len(self.tensors()["weight"])

    @abstractmethod
    def version(self) -> int:
        """Another number after each change of the rows."""

    def class_ids(self, rows: Tensor) -> Tensor:
        """int64 [n] the classes of this rank that some rows are of."""
        return rows

    def find(self, classes: np.ndarray) -> np.ndarray:
        """int64 [n] the rows of some classes of this rank."""
        return classes

    @abstractmethod
    def read(self, rows: slice | Tensor) -> Tensor:
        """The centres [n, K, D] of some rows, a part of them or int64 [n]; not to be changed."""

    def read_few(self, rows: Tensor, on_host: list[int]) -> Tensor:
        """The centres [m, K, D] of targets. on_host: their places in the sample, which are the rows
        where all classes are sampled."""
        return self.read(rows)

    @abstractmethod
    def updating(
        self, rows: slice | Tensor, weight: Tensor | None = None, found_inf: Tensor | None = None
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """Some rows of all tables, by name [n, numbers of a row]; what the block makes of them in
        place is in the tables afterwards.

        weight: these rows of "weight", where they have been read already. found_inf: [] not 0 if
        the tables are to stay as they are.
        """

    @abstractmethod
    def changed(self) -> None:
        """To be called after an update in place."""


# Takes the gradient [n, K, D] of rows of the tables, a part of them or int64 [n]; what was read of
# them, which it may change; and [n * K] how much of each centre is to be subtracted from its
# gradient, or None: nothing.
Sink = Callable[[Tables, slice | Tensor, Tensor, Tensor, Tensor | None], None]


class Pool:
    """Memory that is reused from step to step: fresh pages cost the operating system's time."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """An unwritten tensor of `like`'s dtype and device."""
        for number, tensor in enumerate(self._free):
            if (tensor.shape, tensor.dtype, tensor.device) == (shape, like.dtype, like.device):
                return self._free.pop(number)
        self._free.clear()  # sizes have changed: do not hold the old ones beside the new
        return like.new_empty(shape)

    def give(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._free.append(tensor)


class ClassRows:
    """The centres of the sampled classes, read from the tables when needed, never copied whole.

    The gradient of the loss with respect to the raw rows is collected here, one tensor [S, K, D]
    for all of its sources, so autograd never adds two of that size. With a sink there is none: the
    sink takes the gradient of each chunk as it is finished.
    """

    def __init__(
        self,
        tables: Tables,
        index: Tensor | None = None,  # int64 [S] rows of the tables; None: all of them, in order
        missed: np.ndarray | None = None,  # int64 ids of the last ones: positives the draw missed
        pool: Pool | None = None,
        sink: Sink | None = None,
        is_in_order: bool = False,  # the index is 0, 1, 2, ..., but not of all classes
    ) -> None:
        self.tables, self.index, self.sink = tables, index, sink
        self.missed = np.empty(0, np.int64) if missed is None else missed
        self.grad: Tensor | None = None  # [S, K, D]
        self.is_finished = False  # a backward has been here
        self.is_lent = False  # somebody may keep the gradient
        self._pool = pool or Pool()
        self._is_in_order = is_in_order or index is None
        self._version = tables.version()
        self._scratch: Tensor | None = None  # [n, K, D]
        self._adds = False  # to a gradient that is there

    def __len__(self) -> int:
        return len(self.tables if self.index is None else self.index)

    @property
    def like(self) -> Tensor:
        """A tensor [any, K, D] of the rows' dtype on the device that computes."""
        return self.tables.like

    def ids(self) -> Tensor | None:
        """int64 [S] classes of this rank that are sampled; None: all, in order."""
        return None if self.index is None else self.tables.class_ids(self.index)

    def at(self, where: slice) -> slice | Tensor:
        """The rows of the tables at some places of the sample."""
        return where if self._is_in_order or self.index is None else self.index[where]

    def read(self, where: slice) -> Tensor:
        """The centres [n, K, D] at some places of the sample; do not change them."""
        return self.tables.read(self.at(where))

    def read_few(self, place: Tensor, on_host: list[int]) -> Tensor:
        """The centres [m, K, D] at some places of the sample, given on the device and the host."""
        rows = place if self.index is None else self.index[place]
        return self.tables.read_few(rows, on_host)

    def source(self, where: slice) -> tuple[Tensor, Tensor | None]:
        """A tensor [any, K, D] that has the centres at some places of the sample, and which of its
        rows they are, int64 [n]; None: all."""
        rows = self.at(where)
        if isinstance(rows, slice):
            return self.tables.read(rows), None
        return self.tables.read(slice(None)), rows

    # --- The gradient ---

    def begin_gradient(self) -> None:
        """To be called before the chunks of a backward.

        Raises:
            RuntimeError: the rows have changed since the forward.
        """
        if self.sink is not None and self.is_finished:
            raise RuntimeError("a backward of this forward has updated the class rows already")
        if self.tables.version() != self._version:
            raise RuntimeError("the class rows were changed between a forward and its backward")
        self._adds, self.is_finished = self.grad is not None, True
        if self.grad is None and self.sink is None:
            like = self.tables.gradient_like
            self.grad = self._pool.take(like, len(self), *like.shape[1:])

    def room(self, where: slice) -> Tensor:
        """Where the gradient [n, K, D] of a chunk is to be written."""
        if self._is_written_in_place():
            return self.gradient()[where]
        num = where.stop - where.start
        if self._scratch is None or len(self._scratch) < num:
            self._scratch = self.like.new_empty(num, *self.like.shape[1:])
        return self._scratch[:num]

    def _is_written_in_place(self) -> bool:
        return self.grad is not None and not self._adds and self.grad.device == self.like.device

    def add_gradient(
        self, where: slice, grad: Tensor, read: Tensor, radial: Tensor | None = None
    ) -> None:
        """Add what was written to room(where), less radial [n * K] times each centre.

        read: what read(where) gave; it is no longer needed.
        """
        if self.sink is not None:
            self.sink(self.tables, self.at(where), grad, read, radial)
            self._version = self.tables.version()
            return
        subtract_radial(grad, read, radial)
        if self._is_written_in_place():
            return
        held = self.gradient()
        if self._adds:
            held[where] += grad.to(held.device)
        else:
            held[where] = grad

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
    ) -> ClassRows:
        """Such rows with a gradient, of another sample where one is given."""
        rows = copy.copy(self)
        rows.sink, rows._scratch, rows.is_lent = None, None, False
        rows.grad, rows.is_finished = grad, True
        if index is not None and missed is not None:
            rows.index, rows.missed, rows._is_in_order = index, missed, False
        return rows

    def recycle(self) -> None:
        """The gradient has been used: the next step may have its memory."""
        if not self.is_lent:
            self._pool.give(self.grad)
        self.grad = None


def merge(first: ClassRows, second: ClassRows) -> ClassRows:
    """The rows and gradients of two micro-steps as one: union and sum.

    Micro-steps share what was drawn and differ in the positives that the draw missed.
    """
    if first.index is None or second.index is None:
        first.gradient().add_(second.gradient())
        return first
    device, drawn = first.like.device, len(first) - len(first.missed)
    missed = np.union1d(first.missed, second.missed)
    index = torch.cat([first.index[:drawn], to_device(first.tables.find(missed), device)])
    grad = first.like.new_zeros(len(index), *first.like.shape[1:])
    for part in (first, second):
        grad[:drawn] += part.gradient()[:drawn]
        place = to_device(drawn + np.searchsorted(missed, part.missed), device)
        grad.index_add_(0, place, part.gradient()[drawn:])
    return first.with_gradient(grad, index, missed)


class MicroSteps:
    """The class rows of the micro-steps of one optimiser step: union and sum of their gradients.

    At most one gradient of the rows exists beside the sum, and none where all rows are sampled:
    there they share it.
    """

    def __init__(self) -> None:
        self.open: list[ClassRows] = []  # of forwards since the last optimiser step
        self.done: ClassRows | None = None  # union and sum of their backwards

    def add(self, rows: ClassRows) -> None:
        """A forward that learns has begun.

        Raises:
            RuntimeError: it is the second of a step whose backward updates the rows.
        """
        if rows.sink is not None and self.open:
            raise RuntimeError(
                "update_in_backward keeps no gradient to add to: one forward for each step, no "
                "accumulation"
            )
        self._collect()
        if rows.index is None and self.done is not None:
            rows.grad = self.done.grad  # all rows: later backwards add in place
        self.open.append(rows)

    def sampled(self) -> ClassRows:
        """Union and sum so far.

        Raises:
            RuntimeError: there was no backward.
        """
        self._collect()
        if self.done is None:
            raise RuntimeError("no gradient of sampled classes: call loss.backward() first")
        return self.done

    def clear(self) -> None:
        self.open.clear()
        self.done = None

    def _collect(self) -> None:
        """Add what backwards have left in the open forwards to the sum."""
        for rows in self.open:
            if rows.sink is not None:
                self.done = rows if rows.is_finished else None
            if rows.grad is None or (self.done is not None and rows.grad is self.done.grad):
                continue
            grad, rows.grad = rows.grad, None
            part = rows.with_gradient(grad)
            self.done = part if self.done is None else merge(self.done, part)


def subtract_radial(grad: Tensor, centres: Tensor, radial: Tensor | None) -> None:
    """grad - radial * centres, in place: the gradient through w / |w| is orthogonal to w.
    grad, centres: [n, K, D]; radial: [n * K]."""
    if radial is not None:
        grad.flatten(0, 1).addcmul_(centres.flatten(0, 1), radial[:, None], value=-1)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / n along the last axis, and n = |x| [..., 1]; n is 1 where |x| is 0, so 0 stays 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > torch.finfo(x.dtype).tiny, norm, 1.0)
    return x / norm, norm


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits for the stream
    return tensor.to(device, non_blocking=True)
