"""All class rows pass through the device in pieces, held in the host's memory: sample_rate 1.

Letters: C_r classes of this rank, K sub-centres, D embedding, n classes of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recognition.lane import Arrival, Lane
from recognition.rows import Pool, SampledRows, Sink, to_device
from recognition.tables import Tables


class _Held(NamedTuple):
    where: slice
    rows: Tensor  # [n, numbers of a row]
    arrival: Arrival


class Pieces(Tables):
    """Pieces of tables on the host, each table's in turn in two places of the device: while one is
    computed with, the one that follows it comes."""

    def __init__(self, lane: Lane, tables: Mapping[str, Tensor], like: Tensor) -> None:
        self._lane, self._tables, self.like = lane, tables, like
        self._now: dict[str, _Held] = {}
        self._ahead: dict[str, _Held] = {}
        self._memory: dict[str, list[Tensor]] = {name: [] for name in tables}
        self._stored: Arrival | None = None
        self.updates = 0

    def begin(self) -> None:
        """What has come of the tables may have changed since."""
        self._now.clear()
        self._ahead.clear()

    def settle(self) -> None:
        """Return when what was put is in the tables."""
        if self._stored is not None:
            self._stored.finish()

    def bytes_on_device(self) -> int:
        return sum(memory.nbytes for both in self._memory.values() for memory in both)

    def read(self, name: str, where: slice) -> Tensor:
        """Rows of a table, until the piece after them is read."""
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
        """A piece, into the place that is not being computed with."""
        num, both = where.stop - where.start, self._memory[name]
        if not both or len(both[0]) < num:
            self.settle()
            numbers = self._tables[name].shape[1]
            both[:] = [self.like.new_empty(num, numbers) for _ in range(2)]
            self._now.pop(name, None)
        both.reverse()
        rows = both[0][:num]
        return _Held(where, rows, self._lane.load(self._tables, where, {name: rows}))

    def take(
        self, rows: slice | Tensor, weight: Tensor | None, found_inf: Tensor | None
    ) -> dict[str, Tensor]:
        assert isinstance(rows, slice)
        parts = {}
        for name in self._tables:
            if name == "weight" and weight is not None:
                parts[name] = weight
            else:
                part = self.read(name, rows)
                parts[name] = part if found_inf is None else part.clone()
        return parts

    def put(
        self, rows: slice | Tensor, parts: Mapping[str, Tensor], found_inf: Tensor | None
    ) -> None:
        assert isinstance(rows, slice)
        if found_inf is not None:
            for name, new in parts.items():
                old = self.read(name, rows)
                old.copy_(torch.where(found_inf > 0, old, new))
            parts = {name: self.read(name, rows) for name in parts}
        self.updates += 1
        self._stored = self._lane.store(self._tables, rows, parts)


class StreamedRows(SampledRows):
    """All rows, read piece by piece; their gradient, where there is one, is on the host too."""

    def __init__(self, weight: nn.Parameter, pieces: Pieces, pool: Pool, sink: Sink | None) -> None:
        self._pieces = pieces
        super().__init__(
            weight.detach().view(len(weight), *pieces.like.shape[1:]),
            pieces, None, np.empty(0, np.int64), pool, sink,
        )  # fmt: skip

    def _current_version(self) -> int:
        return self._pieces.updates + self.weight._version

    @property
    def like(self) -> Tensor:
        return self._pieces.like

    def read(self, where: slice) -> Tensor:
        return self._pieces.read("weight", where).unflatten(1, self.weight.shape[1:])

    def read_few(self, place: Tensor, on_host: list[int]) -> Tensor:
        self._pieces.settle()
        rows = self.weight.index_select(0, torch.tensor(on_host, dtype=torch.int64))
        return to_device(rows.numpy(), place.device)

    def room(self, where: slice) -> Tensor:
        return self._scratch_for(where)

    def _collect(self, where: slice, grad: Tensor) -> None:
        if self._adds:
            self.gradient()[where] += grad.to(self.weight.device)
        else:
            self.gradient()[where] = grad
