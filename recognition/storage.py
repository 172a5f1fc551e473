"""The class rows and their optimiser state in the memory of the device that computes.

recognition/host.py holds them in the host's instead, behind the same methods.

Letters: C_r classes of this rank, S sampled, K sub-centres, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from recognition.rows import Pool, SampledRows, Sink, drawn_on, to_device
from recognition.sampling import Draw, Sample
from recognition.tables import Tables


class DeviceStorage(Tables):
    def __init__(self, weight: nn.Parameter, num_subcenters: int) -> None:
        self._weight, self._num_subcenters = weight, num_subcenters  # [C_r, (K,) D]
        self.state: dict[str, Tensor] = {}  # of the row optimiser, [C_r, ...]

    @property
    def like(self) -> Tensor:
        """A tensor [any, K, D] of the rows' dtype on the device that computes."""
        weight = self._weight.detach()
        return weight if self._num_subcenters > 1 else weight[:, None]

    @property
    def parameter(self) -> nn.Parameter:
        return self._weight

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self._weight.detach().flatten(1)} | {
            name: table.flatten(1) for name, table in self.state.items()
        }

    def attach(self, state: dict[str, Tensor]) -> None:
        """Hold the state of a row optimiser beside the rows."""
        self.state = state

    def rows(
        self,
        chosen: Sample,
        shard: tuple[int, int],
        following: Callable[[], Draw],
        pool: Pool,
        sink: Sink | None,
    ) -> SampledRows:
        """The rows of a sample. following: the draw of the next step."""
        index, missed = None, chosen.missed - shard[0]
        if chosen.draw is not None:
            device = self.like.device
            drawn = drawn_on(device, chosen.draw) - shard[0]
            index = torch.cat([drawn, to_device(missed, device)])
        return SampledRows(self.like, self, index, missed, pool, sink)

    def commit(self) -> None:
        """The rows of a step are updated."""

    def settle(self) -> None:
        """Return when the tables hold every update."""

    def drop(self) -> None:
        """The tables are about to be changed from outside."""
