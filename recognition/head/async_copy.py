"""Copies of table rows between the host's memory and the device, beside the step.

One thread and, on a GPU, one stream do them in the order in which they were asked for, so what is
stored is stored before the rows are loaded again. Rows pass through two buffers of pinned memory,
which is what makes a copy to a GPU asynchronous; the tables themselves need not be pinned. Where
the device is the CPU, the same path runs without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recognition.head.class_rows import Tables, to_device

BUFFER_BYTES = 32 << 20  # of each of the two

TableRows = slice | Tensor  # of a table on the host: a part of it, or int64 [n]


class PendingCopy:
    """A copy that has been queued."""

    def __init__(self, future: Future[torch.cuda.Event | None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Make what is queued on the device from now on wait for the copy; raises its error."""
        event = self._future.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def finish(self) -> None:
        """Return when it is done; raises its error."""
        event = self._future.result()
        if event is not None:
            event.synchronize()


class CopyQueue:
    """Copies in the order in which they are queued, each beginning after what the device has been
    given so far."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        # A thread begins on GPU 0 and would open a context there, whatever the process's own is.
        self._thread = ThreadPoolExecutor(
            1, "class-rows", initializer=lambda: torch.cuda.set_device(device) if is_cuda else None
        )
        self._buffers = [
            _Buffer(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda))
            for _ in range(2)
        ]
        self.rows_loaded = self.rows_stored = 0  # of "weight"

    def load(
        self, tables: Mapping[str, Tensor], rows: TableRows, into: Mapping[str, Tensor]
    ) -> PendingCopy:
        """Copy rows of tables on the host, each [n, numbers], to the device."""
        return self._queue(self._load, tables, rows, into)

    def store(
        self, tables: Mapping[str, Tensor], rows: TableRows, source: Mapping[str, Tensor]
    ) -> PendingCopy:
        """Copy rows on the device, each [n, numbers], to those of the tables on the host."""
        return self._queue(self._store, tables, rows, source)

    def _queue(self, copy: Callable[..., None], *arguments: Any) -> PendingCopy:
        ready = None if self._stream is None else torch.cuda.current_stream().record_event()
        return PendingCopy(self._thread.submit(self._work, copy, ready, *arguments))

    @torch.no_grad()
    def _work(
        self, copy: Callable[..., None], ready: torch.cuda.Event | None, *arguments: Any
    ) -> torch.cuda.Event | None:
        stream = self._stream
        if stream is None or ready is None:
            copy(*arguments)
            return None
        with torch.cuda.stream(stream):
            stream.wait_event(ready)  # what the step has asked of the device before
            copy(*arguments)
            return stream.record_event()

    def _load(
        self, tables: Mapping[str, Tensor], rows: TableRows, into: Mapping[str, Tensor]
    ) -> None:
        for name, target in into.items():
            for number, (start, stop) in enumerate(self._chunks(target)):
                with self._buffers[number % 2].of(target[start:stop], self._stream) as part:
                    if isinstance(rows, slice):
                        part.copy_(tables[name][rows.start + start : rows.start + stop])
                    else:
                        torch.index_select(tables[name], 0, rows[start:stop], out=part)
                    target[start:stop].copy_(part, non_blocking=True)
        self.rows_loaded += len(into["weight"]) if "weight" in into else 0

    def _store(
        self, tables: Mapping[str, Tensor], rows: TableRows, source: Mapping[str, Tensor]
    ) -> None:
        for name, new in source.items():
            chunks = self._chunks(new)
            waiting: tuple[int, int, Tensor, _Buffer] | None = None
            for number, (start, stop) in enumerate([*chunks, (0, 0)]):  # one ahead of the host
                coming = None
                if stop:
                    buffer = self._buffers[number % 2]
                    with buffer.of(new[start:stop], self._stream) as part:
                        part.copy_(new[start:stop], non_blocking=True)
                    coming = start, stop, part, buffer
                if waiting is not None:
                    first, last, part, buffer = waiting
                    buffer.wait()
                    if isinstance(rows, slice):
                        tables[name][rows.start + first : rows.start + last] = part
                    else:
                        tables[name].index_copy_(0, rows[first:last], part)
                waiting = coming
        self.rows_stored += len(source["weight"]) if "weight" in source else 0

    def _chunks(self, rows: Tensor) -> list[tuple[int, int]]:
        size = max(self._buffers[0].num_bytes // max(rows[:1].nbytes, 1), 1)
        return [(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


class _Buffer:
    """Memory that a copy passes through; free again when its event has happened."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._event: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        return len(self._memory)

    @contextlib.contextmanager
    def of(self, rows: Tensor, stream: torch.cuda.Stream | None) -> Iterator[Tensor]:
        """Memory of the shape of `rows`, once the copy before has left it."""
        self.wait()
        yield self._memory[: rows.nbytes].view(rows.dtype).view(rows.shape)
        if stream is not None:
            self._event = stream.record_event()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
            self._event = None


class _Held(NamedTuple):
    where: slice
    rows: Tensor  # [n, numbers of a row]
    arrival: PendingCopy


class StreamedTables(Tables):
    """Tables on the host, read chunk by chunk through two memories of each on the device: while one
    chunk is computed with, the next one is copied."""

    def __init__(
        self,
        weight: nn.Parameter,  # [C_r, (K,) D] on the host
        tables: Mapping[str, Tensor],  # it and its state, each [C_r, numbers of a row]
        like: Tensor,
        copies: CopyQueue,
    ) -> None:
        self._weight, self._tables, self._like, self._copies = weight, tables, like, copies
        self._now: dict[str, _Held] = {}
        self._ahead: dict[str, _Held] = {}
        self._memory: dict[str, list[Tensor]] = {name: [] for name in self._tables}
        self._stored: PendingCopy | None = None
        self._updates = 0

    @property
    def like(self) -> Tensor:
        return self._like

    @property
    def gradient_like(self) -> Tensor:
        return self._weight.detach().view(len(self), *self.like.shape[1:])

    def tensors(self) -> Mapping[str, Tensor]:
        return self._tables

    def version(self) -> int:
        return self._updates + self._weight._version

    def changed(self) -> None:
        self._updates += 1

    def begin(self) -> None:
        """To be called before a forward: chunks that were copied may have changed since."""
        self._now.clear()
        self._ahead.clear()

    def settle(self) -> None:
        """Return when the tables hold every update."""
        if self._stored is not None:
            self._stored.finish()

    def bytes_on_device(self) -> int:
        return sum(memory.nbytes for both in self._memory.values() for memory in both)

    def read(self, rows: slice | Tensor) -> Tensor:
        """The centres, until the next chunk is read."""
        assert isinstance(rows, slice)
        return self._read("weight", rows).unflatten(1, self.like.shape[1:])

    def read_few(self, rows: Tensor, on_host: list[int]) -> Tensor:
        self.settle()
        few = self.gradient_like.index_select(0, torch.tensor(on_host, dtype=torch.int64))
        return to_device(few.numpy(), rows.device)

    def _read(self, name: str, where: slice) -> Tensor:
        """Rows of a table [n, numbers of a row], until the next chunk of it is read."""
        now = self._now.get(name)
        if now is None or now.where != where:
            now = self._ahead.pop(name, None)
            if now is None or now.where != where:
                if now is not None:
                    now.arrival.finish()
                now = self._ask(name, where)
            now.arrival.wait()
            self._now[name] = now
            stop, size = where.stop, where.stop - where.start
            if stop < len(self._tables[name]):
                following = slice(stop, min(stop + size, len(self._tables[name])))
                self._ahead[name] = self._ask(name, following)
        return now.rows

    def _ask(self, name: str, where: slice) -> _Held:
        """Begin to copy a chunk into the memory that is not being computed with."""
        num, both = where.stop - where.start, self._memory[name]
        if not both or len(both[0]) < num:
            self.settle()
            numbers = self._tables[name].shape[1]
            both[:] = [self.like.new_empty(num, numbers) for _ in range(2)]
            self._now.pop(name, None)
        both.reverse()
        rows = both[0][:num]
        return _Held(where, rows, self._copies.load(self._tables, where, {name: rows}))

    @contextlib.contextmanager
    def updating(
        self, rows: slice | Tensor, weight: Tensor | None = None, found_inf: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        assert isinstance(rows, slice)
        parts = {} if weight is None else {"weight": weight}
        for name in [name for name in self._tables if name not in parts]:
            part = self._read(name, rows)
            parts[name] = part if found_inf is None else part.clone()
        yield parts
        if found_inf is not None:
            for name, new in parts.items():
                old = self._read(name, rows)
                parts[name] = old.copy_(torch.where(found_inf > 0, old, new))
        self.changed()
        self._stored = self._copies.store(self._tables, rows, parts)
