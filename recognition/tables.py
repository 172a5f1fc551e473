"""The class rows and their optimiser state as tables that an update reads and writes.

Letters: n rows of the tables, or those of an update.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


class Tables:
    """Tables in the memory of the device that computes: an update changes them in place."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The rows as "weight" and the state by name: [n, numbers of a row]."""
        raise NotImplementedError

    def take(
        self,
        rows: slice | Tensor,  # a part of them, or int64 [n]
        weight: Tensor | None,  # these rows of "weight", where they have been read already
        found_inf: Tensor | None,  # [] whether put() is to write nothing
    ) -> dict[str, Tensor]:
        """Some rows of all tables, to be changed and put()."""
        parts = {}
        for name, table in self.tensors().items():
            if name == "weight" and weight is not None:
                parts[name] = weight
            elif isinstance(rows, slice):
                parts[name] = table[rows] if found_inf is None else table[rows].clone()
            else:
                parts[name] = table.index_select(0, rows)
        return parts

    def put(
        self, rows: slice | Tensor, parts: Mapping[str, Tensor], found_inf: Tensor | None
    ) -> None:
        """What take() gave, changed."""
        for name, table in self.tensors().items():
            new = parts[name]
            if found_inf is not None:
                new = torch.where(found_inf > 0, table[rows], new)
            elif isinstance(rows, slice):  # it is the table's own memory
                continue
            if isinstance(rows, slice):
                table[rows] = new
            elif table.device.type == "cpu":  # a quarter less time than index_copy_
                table.numpy()[rows.numpy()] = new.numpy()
            else:
                table.index_copy_(0, rows, new)
        self.changed()

    def changed(self) -> None:
        """After an update: not every change counts as one by itself, torch._fused_sgd_ and numpy's
        do not."""
        increment_version(list(self.tensors().values()))
