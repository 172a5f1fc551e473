"""A sample of classes cut into the pieces that the reduction goes through.

Letters: S sampled classes of this rank, n of a piece, K sub-centres, m rows of the batch whose
class is on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """The rows of the batch whose class is on this rank, ordered by that class's place."""

    row: Tensor  # int64 [m]
    place: Tensor  # int64 [m] in the sample
    local_id: Tensor  # int64 [m] in the shard
    place_list: list[int]  # the same as `place`, on the host


class Piece(NamedTuple):
    number: int
    where: slice  # of the sample
    own: tuple[Tensor, Tensor] | None  # (row, column) of the targets in it; None: there are none
    targets: slice  # those targets
    inverse: Tensor  # [n * K] of 1 / |w|, written by the first pass


def cut(
    targets: Targets,
    column: Tensor,  # int64 [m] of each target in its piece
    inverse: Tensor,  # [S * K]
    num: int,  # S
    size: int,  # n; the last piece may have fewer
) -> Iterator[Piece]:
    """The pieces in order, with views of what is of each."""
    each, first = len(inverse) // max(num, 1), 0  # K
    for number, start in enumerate(range(0, num, size)):
        stop, last = min(start + size, num), first
        while last < len(targets.place_list) and targets.place_list[last] < stop:
            last += 1
        own = None
        if last > first:
            own = targets.row[first:last], column[first:last]
        yield Piece(
            number, slice(start, stop), own, slice(first, last), inverse[start * each : stop * each]
        )
        first = last
