"""The class rows and their optimiser state in the host's memory: what a step samples of them is on
the device, and nothing else, so that a device trains more classes than it could hold.

With sample_rate < 1 the rows of a step are staged on the device with their state: the drawn ones
while the step before is at work, for the draw is known beforehand; the batch's own classes that the
draw missed when the batch comes. A row that the step before updates as well is taken over from
there, on the device, so that no number differs from DeviceStorage's. With sample_rate 1 all rows
pass through the device in pieces (recognition/streamed.py).

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from recognition.lane import Arrival, Lane
from recognition.rows import Pool, SampledRows, Sink, to_device
from recognition.sampling import Draw, Sample
from recognition.streamed import Pieces, StreamedRows
from recognition.tables import Tables


class Stage(Tables):
    """The rows of one step on the device: the drawn ones, ascending, and then those of the batches
    that the draw missed, in the order in which they came."""

    def __init__(self, draw: Draw, drawn: np.ndarray, memory: dict[str, Tensor]) -> None:
        self.draw, self.drawn = draw, drawn  # int64, ids on this rank
        self.missed = np.empty(0, np.int64)
        self.memory = memory  # [at least S, numbers of a row]
        self.arrival: Arrival | None = None  # of the drawn rows
        self.updates = 0

    def __len__(self) -> int:
        return len(self.drawn) + len(self.missed)

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: table[: len(self)] for name, table in self.memory.items()}

    def changed(self) -> None:
        self.updates += 1

    def ids(self) -> np.ndarray:
        return np.concatenate([self.drawn, self.missed])

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Where some ids stand: int64, -1 for those that are not here."""
        places = _find(self.drawn, ids)
        order = np.argsort(self.missed)
        among = _find(self.missed[order], ids)
        later = among >= 0
        places[later] = len(self.drawn) + order[among[later]]
        return places


class StagedRows(SampledRows):
    """A sample of a stage: its weight is the stage's."""

    def __init__(
        self,
        stage: Stage,
        storage: HostStorage,
        missed: np.ndarray,
        pool: Pool,
        sink: Sink | None,
    ) -> None:
        self._stage, self._storage, like = stage, storage, storage.like
        weight = stage.tensors()["weight"].unflatten(1, like.shape[1:])
        place = np.concatenate([np.arange(len(stage.drawn)), stage.find(missed)])
        super().__init__(weight, stage, to_device(place, like.device), missed, pool, sink)
        # A step of one forward has nothing else in the stage: its pieces need no index.
        self._in_order = len(place) == len(stage) and bool((np.diff(place) == 1).all())

    def _current_version(self) -> int:
        return self._stage.updates + self._storage.version()

    def ids(self) -> Tensor:
        ids = np.concatenate([self._stage.drawn, self.missed])
        return to_device(ids, self.weight.device)

    def places(self, missed: np.ndarray) -> np.ndarray:
        return self._stage.find(missed)

    def at(self, where: slice) -> slice | Tensor:
        return where if self._in_order else super().at(where)

    def with_gradient(
        self, grad: Tensor, index: Tensor | None = None, missed: np.ndarray | None = None
    ) -> SampledRows:
        rows = super().with_gradient(grad, index, missed)
        assert isinstance(rows, StagedRows)
        rows._in_order = self._in_order and index is None
        return rows


class HostStorage:
    """DeviceStorage's methods over tables in the host's memory."""

    def __init__(self, weight: nn.Parameter, num_subcenters: int) -> None:
        self.parameter = weight  # [C_r, (K,) D]
        self._shape = num_subcenters, weight.shape[-1]
        self.like = weight.detach().new_empty(0, *self._shape)
        self.state: dict[str, Tensor] = {}  # of the row optimiser, [C_r, ...]
        self._lane: Lane | None = None
        self._pieces: Pieces | None = None
        self._current: Stage | None = None
        self._next: Stage | None = None
        self._previous: Stage | None = None  # its rows are being stored
        self._stored: Arrival | None = None
        self._free: list[dict[str, Tensor]] = []
        self._version = -1  # of the tables as the stages know them

    def move(self, like: Tensor) -> None:
        """Compute on the device of `like` and in its dtype; the tables stay on the host."""
        self.drop()
        self._free.clear()
        self.parameter.data = self.parameter.data.to(like.dtype)
        self.like = like.detach().new_empty(0, *self._shape)
        self._lane = None

    def attach(self, state: dict[str, Tensor]) -> None:
        """Hold the state of a row optimiser beside the rows."""
        self.drop()
        self._free.clear()
        self.state = state
        self._version = self.version()

    @property
    def lane(self) -> Lane:
        if self._lane is None:
            self._lane = Lane(self.like.device)
        return self._lane

    def tables(self) -> dict[str, Tensor]:
        """All rows, on the host: [C_r, numbers of a row]."""
        held = {"weight": self.parameter.data} | self.state
        return {name: table.data.flatten(1) for name, table in held.items()}

    def rows(
        self,
        chosen: Sample,
        shard: tuple[int, int],
        following: Callable[[], Draw],
        pool: Pool,
        sink: Sink | None,
    ) -> SampledRows:
        """The rows of a sample. following: the draw of the next step."""
        if self._version != self.version():
            self.drop()
        if chosen.draw is None:
            return self._all_rows(pool, sink)
        missed = chosen.missed - shard[0]
        stage = self._stage_of(chosen.draw, shard, len(missed))
        self._add(stage, missed)
        if torch.is_grad_enabled() and self._next is None:
            self._fetch_ahead(following(), shard, len(missed))
        return StagedRows(stage, self, missed, pool, sink)

    def _all_rows(self, pool: Pool, sink: Sink | None) -> SampledRows:
        if self._pieces is None:
            self._pieces = Pieces(self.lane, self.tables(), self.like)
        self._pieces.begin()
        return StreamedRows(self.parameter, self._pieces, pool, sink)

    def commit(self) -> None:
        """The rows of a step are updated: begin to store them."""
        if (stage := self._current) is None:
            return
        ids = torch.from_numpy(stage.ids())
        self._release(self._previous)
        self._stored = self.lane.store(self.tables(), ids, stage.tensors())
        self._previous, self._current = stage, None

    def settle(self) -> None:
        """Return when the tables hold every update."""
        if self._stored is not None:
            self._stored.finish()
        if self._pieces is not None:
            self._pieces.settle()

    def drop(self) -> None:
        """The tables are about to be changed from outside, or were: nothing of them is kept."""
        self.settle()
        if self._next is not None and self._next.arrival is not None:
            self._next.arrival.finish()
        for stage in (self._current, self._next, self._previous):
            self._release(stage)
        if self._pieces is not None:
            self._pieces.updates += 1
        self._current = self._next = self._previous = self._stored = self._pieces = None
        self._version = self.version()

    def bytes_on_device(self) -> int:
        stages = [self._current, self._next, self._previous]
        held = [stage.memory for stage in stages if stage is not None] + self._free
        staged = sum(table.nbytes for memory in held for table in memory.values())
        return staged + (0 if self._pieces is None else self._pieces.bytes_on_device())

    def version(self) -> int:
        """Another number after each change of the tables from outside."""
        return sum(tensor._version for tensor in (self.parameter, *self.state.values()))

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
        stage = Stage(draw, drawn, self._memory(len(drawn), num_missed))
        target = {name: table[: len(drawn)] for name, table in stage.memory.items()}
        stage.arrival = self.lane.load(self.tables(), torch.from_numpy(drawn), target)
        return stage

    def _add(self, stage: Stage, missed: np.ndarray) -> None:
        """Stage the classes of a batch that are not there yet."""
        new = missed[stage.find(missed) < 0]
        first, num = len(stage), len(new)
        if first + num > len(stage.memory["weight"]):
            memory = self._memory(first, num)
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
        self.lane.rows_loaded += len(elsewhere)
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
        """Room for so many rows; as much again of missed ones, for their number varies."""
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
