"""What training changes in an image; every draw is a hash of (seed, position in the stream).

A position is passed once, so each epoch draws afresh, and the draw is the same at every world
size and after a resume (order.py says what a position is).
"""

import numpy as np

from data_tools.order import keyed_hash

_FLIP = 1  # the purpose of this draw; 0 is the order of samples


def flip_mask(seed: int, positions: np.ndarray) -> np.ndarray:
    """bool [b]: which images to mirror left to right, half of them, for the int64 positions [b]."""
    return (keyed_hash(seed, _FLIP, positions) >> np.uint64(63)).astype(bool)
