"""Which classes a rank holds and which of them it samples this step: pure index arithmetic.

Every function is determined by its arguments, so all ranks agree on the sample without
communication, and it is the same at every number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from data_tools.common.draws import Purpose, hash_array, hash_words

if TYPE_CHECKING:
    from torch import Tensor

Index = TypeVar("Index", np.ndarray, "Tensor")


class Sample(NamedTuple):
    """What one rank computes logits for in one step."""

    draw: Draw | None  # None: the whole shard in order
    missed: np.ndarray  # int64 global ids of the positives that the draw missed, ascending
    owned: np.ndarray  # int64 [m] rows of the batch whose class is here, ordered by `position`
    position: np.ndarray  # int64 [m] place of those rows' classes in `classes`
    total: int  # sampled classes of all ranks

    @property
    def classes(self) -> np.ndarray | None:
        """int64 [S] global ids, each once, first the drawn ones; None: the whole shard in order."""
        return None if self.draw is None else np.concatenate([self.draw.classes(), self.missed])


def sample(
    labels: np.ndarray,  # int64 [B], global class ids of the global batch
    num_classes: int,
    shard: tuple[int, int],
    sample_rate: float,
    seed: int,
    step: int,
) -> Sample:
    """All positives of the shard, and a draw of negatives that depends on (seed, step) alone.

    The class axis, rotated by a keyed offset, is cut into n = ceil(sample_rate * C) cells; a
    keyed hash picks one class in each; a rank keeps those it holds. Every class is drawn with
    probability n / C. The drawn classes come first, then the positives that the draw missed, both
    ascending. Work and memory here are O(B log B), because the place of a drawn class follows from
    its cell; the S drawn classes are written down by Draw, on the host or on a GPU.
    """
    order = np.argsort(labels, kind="stable")
    low, high = np.searchsorted(labels[order], shard)
    owned = order[low:high]  # ascending by class
    here = labels[owned]
    if sample_rate >= 1.0:
        return Sample(None, np.empty(0, np.int64), owned, here - shard[0], num_classes)

    draw = Draw(num_classes, shard, sample_rate, seed, step)
    drawn = draw.holds(labels)  # bool [B]
    first = np.diff(labels[order], prepend=-1) > 0  # of its class, in ascending order
    total = draw.num_cells + int((first & ~drawn[order]).sum())
    missed = np.flatnonzero(first[low:high] & ~drawn[owned])
    number = np.cumsum(first[low:high] & ~drawn[owned]) - 1  # of the missed class of a row
    position = np.where(drawn[owned], draw.places(here), draw.num + number)
    ascending = np.argsort(position, kind="stable")
    return Sample(draw, here.take(missed), owned[ascending], position[ascending], total)


class Draw:
    """The negatives of one step on one rank: the picks of n cells over the rotated class axis
    u = (class - offset) mod C.

    Invariants:
        Cell k is [floor(k C / n), floor((k + 1) C / n)) of u. The n cells are disjoint, none is
        empty, and together they cover the axis.
        Each cell has exactly one pick, a function of (seed, step, k) alone. So all ranks agree on
        the n drawn classes at every world size, and no class is drawn twice.
        `runs` are ordered by class id and do not overlap; their picks are exactly the drawn classes
        of this shard. So `num` over all ranks adds up to `num_cells`, and classes() ascends.
        holds(c) is true exactly where some rank's classes() contains c, and for a drawn class c of
        this shard classes()[places(c)] == c.
    """

    def __init__(
        self, num_classes: int, shard: tuple[int, int], sample_rate: float, seed: int, step: int
    ) -> None:
        self.num_classes = num_classes
        # The small term keeps 0.1 * 30 = 3.0000000000000004 from becoming four cells.
        self.num_cells = math.ceil(
            sample_rate * num_classes - 1e-9
        )  # n: drawn on all ranks together
        self.key = hash_words(seed, Purpose.CLASSES, step)
        self.offset = hash_words(self.key, -1) % num_classes
        # Runs of cells [first, last) whose picks are classes of this shard, and the shift from u
        # to class.
        self.runs = list(self._runs(*shard)) if self.num_cells else []
        self.num = sum(last - first for first, last, _ in self.runs)  # drawn on this rank

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """At most two (the rotation wraps once), in the order of the class ids. Only the two cells
        at the ends of a run can reach over its border; their picks decide whether they belong."""
        wrap = min(max(self.offset, start), stop)
        spans = [(start, wrap, self.offset - self.num_classes), (wrap, stop, self.offset)]
        for low, high, shift in spans:
            if low == high:
                continue
            first, last = (int(c) for c in self._cell_of(np.array([low - shift, high - 1 - shift])))
            first += int(self._pick(np.array([first]))[0]) < low - shift
            last -= int(self._pick(np.array([last]))[0]) >= high - shift
            yield first, max(first, last + 1), shift

    def classes(self) -> np.ndarray:
        """int64 [num] global ids, ascending."""
        picks = [self._pick(np.arange(first, last)) + shift for first, last, shift in self.runs]
        return np.concatenate(picks) if picks else np.empty(0, np.int64)

    def holds(self, classes: np.ndarray) -> np.ndarray:
        """Which of any classes, of this rank or not, are drawn."""
        if self.num_cells == 0:
            return np.zeros(len(classes), bool)
        u = (classes - self.offset) % self.num_classes
        return self._pick(self._cell_of(u)) == u

    def places(self, classes: np.ndarray) -> np.ndarray:
        """The places in classes() of drawn classes of this rank; for others, any number."""
        if self.num_cells == 0:
            return np.zeros(len(classes), np.int64)
        cell = self._cell_of((classes - self.offset) % self.num_classes)
        places, before = np.zeros(len(classes), np.int64), 0
        for first, last, shift in self.runs:
            u = classes - shift
            in_run = (u >= 0) & (u < self.num_classes)
            places = np.where(in_run, before + cell - first, places)
            before += last - first
        return places

    def _cell_of(self, u: np.ndarray) -> np.ndarray:
        return ((u + 1) * self.num_cells - 1) // self.num_classes

    def _pick(self, cell: np.ndarray) -> np.ndarray:
        """int64 rotated position picked in each cell [floor(k C / n), floor((k+1) C / n))."""
        return self.pick(cell, (hash_array(self.key, cell) >> np.uint64(32)).astype(np.int64))

    def pick(self, cell: Index, bits: Index) -> Index:
        """The position that 32 random bits pick in each cell, all int64."""
        low = cell * self.num_classes // self.num_cells
        size = (cell + 1) * self.num_classes // self.num_cells - low
        return low + (bits * size >> 32)
