"""What is known of N images before any is read: their names and columns of numbers, no objects.

A name is bytes; all names are one block, so that 42 million of them cost what their letters cost.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

_HASHED = 1 << 16  # names hashed at a time


class Names:
    """n byte strings in one block."""

    def __init__(self, block: bytearray, ends: np.ndarray) -> None:
        self._block = block
        self._ends = ends  # int64 [n]

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        lengths = array("i")
        block = bytearray()
        for name in names:
            block += name
            lengths.append(len(name))
        return cls(block, np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._block[self._ends[i - 1] if i else 0 : self._ends[i]])

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends:
            yield bytes(self._block[start:end])
            start = end

    def select(self, indices: np.ndarray) -> "Names":
        return Names.of(self[i] for i in indices.tolist())

    def hashes(self) -> np.ndarray:
        """uint64 [n]: equal names are equal, others practically never (64 bits of BLAKE2)."""
        found = np.empty(len(self), np.uint64)
        names = iter(self)
        for start in range(0, len(found), _HASHED):  # a join holds all that it joins as objects
            some = itertools.islice(names, _HASHED)
            digests = b"".join([hashlib.blake2b(name, digest_size=8).digest() for name in some])
            found[start : start + _HASHED] = np.frombuffer(digests, np.uint64)
        return found


def repeated(names: Names) -> list[tuple[int, int]]:
    """(i, j) for every name i that stands again at j > i, its next place, in order of i."""
    hashes = names.hashes()
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    at = np.flatnonzero(hashes[1:] == hashes[:-1])
    return sorted(zip(order[at].tolist(), order[at + 1].tolist(), strict=True))


def back_slashes(number: int, path: object, what: str = "paths") -> str:
    """What to say of paths that were written with back slashes."""
    return f"{path}: the back slashes in {number} of its {what} are read as slashes"


def number_by_name(names: list[bytes], labels: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The names sorted, and `labels` (positions in `names`) as positions in the sorted ones."""
    order = sorted(range(len(names)), key=names.__getitem__)
    number = np.empty(len(names), np.int64)
    number[order] = np.arange(len(names))
    return [names[k] for k in order], number[labels]
