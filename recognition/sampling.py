"""Which classes a rank holds and which of them it samples this step: pure index arithmetic.

No communication, no state: every function is determined by its arguments, so all ranks agree on the
sample without a word between them, and it is the same at every number of ranks.

Letters: W ranks, C classes, B rows of the global batch, S sampled classes on this rank,
n cells of the draw, m rows of the batch whose class this rank holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_MASK = (1 << 64) - 1
_DRAW = 1  # the purpose of this draw, so that no other shares its key


def shard_range(num_classes: int, world: int, rank: int) -> tuple[int, int]:
    """The classes [start, stop) that `rank` holds; the first C mod W ranks hold one more."""
    size, remainder = divmod(num_classes, world)
    start = rank * size + min(rank, remainder)
    return start, start + size + (rank < remainder)


class Sample(NamedTuple):
    """What one rank computes logits for in one step."""

    classes: np.ndarray | None  # int64 [S] global ids, each once; None: the whole shard in order
    owned: np.ndarray  # int64 [m] rows of the batch whose class is here, ordered by `position`
    position: np.ndarray  # int64 [m] place of those rows' classes in `classes`
    total: int  # sampled classes of all ranks


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
    ascending. Work and memory are O(S + B log B).
    """
    start, stop = shard
    owned = np.flatnonzero((labels >= start) & (labels < stop))
    if sample_rate >= 1.0:
        position = labels[owned] - start
        order = np.argsort(position, kind="stable")
        return Sample(None, owned[order], position[order], num_classes)

    cells = _Cells(num_classes, sample_rate, seed, step)
    drawn = [cells.drawn(first, last, shift) for first, last, shift in cells.segments(start, stop)]
    classes = np.concatenate(drawn) if drawn else np.empty(0, np.int64)

    here = labels[owned]
    undrawn = ~cells.is_drawn(labels)  # [B]
    missed = np.unique(here[undrawn[owned]])
    classes_and_missed = np.concatenate([classes, missed])
    position = np.searchsorted(classes, here)
    found = position < len(classes)
    found[found] = classes[position[found]] == here[found]
    position[~found] = len(classes) + np.searchsorted(missed, here[~found])
    order = np.argsort(position, kind="stable")
    total = cells.num + len(np.unique(labels[undrawn]))
    return Sample(classes_and_missed, owned[order], position[order], total)


class _Cells:
    """The draw of one step: n cells over the rotated class axis u = (class - offset) mod C."""

    def __init__(self, num_classes: int, sample_rate: float, seed: int, step: int) -> None:
        self.num_classes = num_classes
        # The small term keeps 0.1 * 30 = 3.0000000000000004 from becoming four cells.
        self.num = math.ceil(sample_rate * num_classes - 1e-9)
        self.key = hash_words(seed, _DRAW, step)
        self.offset = hash_words(self.key, _MASK) % num_classes

    def segments(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Cells [first, last) whose picks are classes of [start, stop), and the shift from u to
        class.

        At most two runs (the rotation wraps once), in the order of the class ids. Only the two
        cells at the ends of a run can reach over its border; their picks decide whether they
        belong.
        """
        if self.num == 0:
            return []
        wrap = min(max(self.offset, start), stop)
        runs = [(start, wrap, self.offset - self.num_classes), (wrap, stop, self.offset)]
        segments = []
        for low, high, shift in runs:
            if low == high:
                continue
            first, last = (int(c) for c in self._cell_of(np.array([low - shift, high - 1 - shift])))
            first += int(self._pick(np.array([first]))[0]) < low - shift
            last -= int(self._pick(np.array([last]))[0]) >= high - shift
            segments.append((first, last + 1, shift))
        return segments

    def drawn(self, first: int, last: int, shift: int) -> np.ndarray:
        return self._pick(np.arange(first, max(first, last))) + shift

    def is_drawn(self, classes: np.ndarray) -> np.ndarray:
        if self.num == 0:
            return np.zeros(len(classes), bool)
        u = (classes - self.offset) % self.num_classes
        return self._pick(self._cell_of(u)) == u

    def _cell_of(self, u: np.ndarray) -> np.ndarray:
        return ((u + 1) * self.num - 1) // self.num_classes

    def _pick(self, cell: np.ndarray) -> np.ndarray:
        """int64 rotated position picked in each cell [floor(k C / n), floor((k+1) C / n))."""
        low = cell * self.num_classes // self.num
        size = (cell + 1) * self.num_classes // self.num - low
        bits = _hash_array(self.key, cell) >> np.uint64(32)
        return low + ((bits * size.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def hash_words(*words: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser, chained): the key of a random draw."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def _hash_array(key: int, words: np.ndarray) -> np.ndarray:
    """hash_words(key', word) for every word: uint64, wrapping arithmetic."""
    state = (words.astype(np.uint64) ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)
