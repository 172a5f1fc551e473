"""Which sub-centre of its class each row of an epoch was nearest to.

Letters: C_r classes of this rank, K sub-centres, m rows of the batch whose class is here.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Votes:
    """Counts in `held` int64 [C_r, K], which the head saves with the classes. Those of a step count
    once it is taken."""

    def __init__(self) -> None:
        self._nearest: list[tuple[Tensor, Tensor]] = []  # of this step: (local id, which), [m]

    def look(self, local_id: Tensor, nearest: Tensor) -> None:
        self._nearest.append((local_id, nearest))

    def commit(self, held: Tensor, found_inf: Tensor | None) -> None:
        """found_inf: [] not 0 if the step is skipped."""
        for local_id, nearest in self._nearest:
            vote = torch.ones_like(nearest)
            if found_inf is not None:
                vote = torch.where(found_inf > 0, 0, vote)
            held.index_put_((local_id, nearest), vote, accumulate=True)
        self._nearest = []

    def drop(self) -> None:
        self._nearest = []


def dominant(held: Tensor) -> Tensor:
    """[2]: rows at the dominant sub-centre of their class, and all rows."""
    return torch.stack([held.max(1).values.sum(), held.sum()])
