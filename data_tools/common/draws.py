"""Random draws as pure functions of keys: nothing is drawn in sequence, so no state is saved."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = np.uint64(_GOLDEN)  # 2^64 / golden ratio


class Purpose(enum.IntEnum):
    """What a draw of training is for: the first word of its key after the seed, so that no two
    kinds of draws share a key. Saved runs depend on the numbers."""

    CLASSES = 1  # the negatives of a step
    CENTRES = 2  # the class rows that a head starts with
    NETWORK = 3  # the weights that a backbone starts with
    DROPOUT = 4
    MARGIN = 5  # what a margin loss draws for a batch
    INVERSION_START = 6
    INVERSION_FLIP = 7
    INVERSION_JITTER = 8


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 [n] -> uint64 [n]: the finaliser of SplitMix64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def mix_tensor(x: Tensor) -> Tensor:
    """mix() of the bits of an int64 tensor; torch's products wrap, its right shift is
    arithmetic."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ shifted(x, 27)) * _signed(_SECOND)
    return x ^ shifted(x, 31)


def hash_words(*words: int) -> int:
    """A 64-bit hash of integers, by mix() over one after the other: the key of a random draw."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix((state ^ np.uint64(word & _MASK)) + GOLDEN)
    return int(state[0])


def hash_array(key: int, words: np.ndarray) -> np.ndarray:
    """hash_words() of each word on top of those that gave `key`: uint64 [n]."""
    return mix((words.astype(np.uint64) ^ np.uint64(key)) + GOLDEN)


def hash_tensor(key: int, words: Tensor) -> Tensor:
    """hash_array() of an int64 tensor, its bits as int64 [n]."""
    return mix_tensor((words ^ _signed(key)) + _signed(_GOLDEN))


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - (1 << 64) if word >= 1 << 63 else word
