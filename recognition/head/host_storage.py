"""The class rows and their optimiser state in the host's memory: what a step samples of them is on
the device, and nothing else, so that a device trains more classes than it could hold.

With sample_rate < 1 the rows of a step are staged on the device with their state: the drawn ones
while the step before is computed, for the draw is known beforehand; the batch's own classes that
the draw missed when the batch comes. A row that the step before updates as well is copied from its
stage, on the device, so that no number differs from DeviceStorage's. With sample_rate 1 all rows
are streamed through the device in chunks (async_copy.StreamedTables).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from recognition.head.async_copy import CopyQueue, PendingCopy, StreamedTables
from recognition.head.class_rows import ClassRows, Pool, Sink, to_device
from recognition.head.device_storage import MemoryTables, Storage
from recognition.head.sampling import Draw, Sample


class Stage(MemoryTables):
    """The rows of one step on the device: the drawn ones, ascending, and then those of the batches
    that the draw missed, in the order in which they came."""

    def __init__(
        self,
        draw: Draw,
        drawn: np.ndarray,  # int64, ids on this rank
        memory: dict[str, Tensor],  # [at least S, numbers of a row]
        storage: HostStorage,
    ) -> None:
        self.draw, self.drawn, self.memory = draw, drawn, memory
        self.missed = np.empty(0, np.int64)
        self.arrival: PendingCopy | None = None  # of the drawn rows
        self._storage, self._updates = storage, 0

    @property
    def like(self) -> Tensor:
        return self._storage.like

    def version(self) -> int:
        return self._updates + self._storage.version()

    def __len__(self) -> int:
        return len(self.drawn) + len(self.missed)

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: table[: len(self)] for name, table in self.memory.items()}

    def changed(self) -> None:
        self._updates += 1

    def ids(self) -> np.ndarray:
        return np.concatenate([self.drawn, self.missed])

    def class_ids(self, rows: Tensor) -> Tensor:
        return to_device(self.ids(), rows.device)[rows]

    def find(self, classes: np.ndarray) -> np.ndarray:
        """Their rows: int64, -1 for those that are not here."""
        places = _find(self.drawn, classes)
        order = np.argsort(self.missed)
        among = _find(self.missed[order], classes)
        later = among >= 0
        places[later] = len(self.drawn) + order[among[later]]
        return places


class HostStorage(Storage):
    """Storage in the host's memory; copies to the device and back run beside the step."""

    moves_with_head = False

    def __init__(self, weight: nn.Parameter, num_subcenters: int) -> None:
        self._weight = weight  # [C_r, (K,) D]
        self._shape = num_subcenters, weight.shape[-1]
        self._like = weight.detach().new_empty(0, *self._shape)
        self.state = {}
        self._copies: CopyQueue | None = None
        self._stream: StreamedTables | None = None
        self._current: Stage | None = None
        self._next: Stage | None = None
        self._previous: Stage | None = None  # its rows are being stored
        self._stored: PendingCopy | None = None
        self._free: list[dict[str, Tensor]] = []
        self._most_missed = 0  # of all micro-steps of a step: a stage that grows waits for copies
        self._version = -1  # of the tables as the stages know them

    def move(self, like: Tensor) -> None:
        self.drop()
        self._free.clear()
        self._weight.data = self._weight.data.to(like.dtype)
        self._like = like.detach().new_empty(0, *self._shape)
        self._copies = None

    def attach(self, state: dict[str, Tensor]) -> None:
        self.drop()
        self._free.clear()
        self.state = state
        self._version = self.version()

    @property
    def parameter(self) -> nn.Parameter:
        return self._weight

    @property
    def like(self) -> Tensor:
        return self._like

    @property
    def copies(self) -> CopyQueue:
        if self._copies is None:
            self._copies = CopyQueue(self.like.device)
        return self._copies

    def tables(self) -> dict[str, Tensor]:
        """All rows, on the host: [C_r, numbers of a row]."""
        held = {"weight": self._weight.data} | self.state
        return {name: table.data.flatten(1) for name, table in held.items()}

    def rows(
        self,
        sample: Sample,
        shard: tuple[int, int],
        next_draw: Callable[[], Draw],
        pool: Pool,
        sink: Sink | None,
    ) -> ClassRows:
        if self._version != self.version():
            self.drop()
        if sample.draw is None:
            return self._all_rows(pool, sink)
        missed = sample.missed - shard[0]
        stage = self._stage_of(sample.draw, shard, len(missed))
        self._add(stage, missed)
        if torch.is_grad_enabled() and self._next is None:
            self._fetch_ahead(next_draw(), shard, len(missed))
        place = np.concatenate([np.arange(len(stage.drawn)), stage.find(missed)])
        # A step of one forward has nothing else in the stage: its chunks need no index.
        is_in_order = len(place) == len(stage) and bool((np.diff(place) == 1).all())
        index = to_device(place, self.like.device)
        return ClassRows(stage, index, missed, pool, sink, is_in_order)

    def _all_rows(self, pool: Pool, sink: Sink | None) -> ClassRows:
        if self._stream is None:
            self._stream = StreamedTables(self._weight, self.tables(), self._like, self.copies)
        self._stream.begin()
        return ClassRows(self._stream, None, None, pool, sink)

    def commit(self) -> None:
        """Begin to store the updated rows."""
        if (stage := self._current) is None:
            return
        ids = torch.from_numpy(stage.ids())
        self._release(self._previous)
        self._stored = self.copies.store(self.tables(), ids, stage.tensors())
        self._previous, self._current = stage, None

    def settle(self) -> None:
        if self._stored is not None:
            self._stored.finish()
        if self._stream is not None:
            self._stream.settle()

    def drop(self) -> None:
        """Keep nothing of the tables: they are about to be changed from outside, or were."""
        self.settle()
        if self._next is not None and self._next.arrival is not None:
            self._next.arrival.finish()
        for stage in (self._current, self._next, self._previous):
            self._release(stage)
        if self._stream is not None:
            self._stream.changed()
        self._current = self._next = self._previous = self._stored = self._stream = None
        self._version = self.version()

    def bytes_on_device(self) -> int:
        stages = [self._current, self._next, self._previous]
        held = [stage.memory for stage in stages if stage is not None] + self._free
        staged = sum(table.nbytes for memory in held for table in memory.values())
        return staged + (0 if self._stream is None else self._stream.bytes_on_device())

    def version(self) -> int:
        """Another number after each change of the tables from outside."""
        return sum(tensor._version for tensor in (self._weight, *self.state.values()))

    # --- The stages of sampled rows ---

    def _stage_of(self, draw: Draw, shard: tuple[int, int], num_missed: int) -> Stage:
        """The stage of this draw, its drawn rows as the updates so far have left them."""
        if self._current is not None and self._current.draw.key == draw.key:
            return self._current
        self._release(self._current)  # of a step that ended without an update
        stage, self._next = self._next, None
        if stage is None or stage.draw.key != draw.key:
            if stage is not None and stage.arrival is not None:
                stage.arrival.finish()
            self._release(stage)
            stage = self._begin(draw, shard, num_missed)
        assert stage.arrival is not None
        stage.arrival.wait()
        self._current = stage
        if self._previous is not None:  # updated after these rows were read, or while they were
            self._take_over(stage, stage.drawn, 0, self._previous)
        return stage

    def _fetch_ahead(self, draw: Draw, shard: tuple[int, int], num_missed: int) -> None:
        # Behind the storing of the stage before this one, whose memory it may have.
        self._release(self._previous)
        self._previous = None
        self._next = self._begin(draw, shard, num_missed)

    def _begin(self, draw: Draw, shard: tuple[int, int], num_missed: int) -> Stage:
        drawn = draw.classes() - shard[0]
        stage = Stage(draw, drawn, self._memory(len(drawn), num_missed), self)
        target = {name: table[: len(drawn)] for name, table in stage.memory.items()}
        stage.arrival = self.copies.load(self.tables(), torch.from_numpy(drawn), target)
        return stage

    def _add(self, stage: Stage, missed: np.ndarray) -> None:
        """Stage the classes of a batch that are not there yet."""
        new = missed[stage.find(missed) < 0]
        first, num = len(stage), len(new)
        if first + num > len(stage.memory["weight"]):
            memory = self._memory(len(stage.drawn), len(stage.missed) + num)
            for name, table in memory.items():
                table[:first] = stage.memory[name][:first]
            stage.memory = memory
        stage.missed = np.concatenate([stage.missed, new])
        if num == 0:
            return
        here = np.empty(0, np.int64)
        if self._previous is not None:  # its rows on the host are being written
            here = np.flatnonzero(self._previous.find(new) >= 0)
        elif self._stored is not None:
            self._stored.finish()
        device, elsewhere = self.like.device, np.delete(np.arange(num), here)
        rows, place = torch.from_numpy(new[elsewhere]), to_device(first + elsewhere, device)
        for name, table in self.tables().items():
            read = to_device(table.index_select(0, rows).numpy(), device)
            stage.memory[name].index_copy_(0, place, read)
        self.copies.rows_loaded += len(elsewhere)
        if self._previous is not None:
            self._take_over(stage, new, first, self._previous)

    def _take_over(self, stage: Stage, ids: np.ndarray, first: int, source: Stage) -> None:
        """Copy those of `ids`, which stand in the stage from `first` on, that `source` has."""
        places = source.find(ids)
        found = np.flatnonzero(places >= 0)
        place = to_device(first + found, self.like.device)
        theirs = to_device(places[found], self.like.device)
        for name, table in stage.memory.items():
            table.index_copy_(0, place, source.memory[name].index_select(0, theirs))

    def _memory(self, num_drawn: int, num_missed: int) -> dict[str, Tensor]:
        """Room for so many rows, and for as many missed ones as the micro-steps of a step have had;
        new memory for twice as many, for their number varies."""
        self._most_missed = max(self._most_missed, num_missed)
        num_missed = self._most_missed
        for place, memory in enumerate(self._free):
            if len(memory["weight"]) >= num_drawn + num_missed:
                return self._free.pop(place)
        if self._free:  # too small: before a larger one is made it must not be in use
            self.settle()
            self._free.clear()
        num = num_drawn + 2 * num_missed + 1
        return {
            name: self.like.new_empty(num, table.shape[1]) for name, table in self.tables().items()
        }

    def _release(self, stage: Stage | None) -> None:
        if stage is not None:
            stage.changed()  # for a backward that comes too late
            self._free.append(stage.memory)


def _find(ascending: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The places of ids among ascending ones: int64, -1 for those that are absent."""
    if len(ascending) == 0:
        return np.full(len(ids), -1)
    places = np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)
    return np.where(ascending[places] == ids, places, -1)
