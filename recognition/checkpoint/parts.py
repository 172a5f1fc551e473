"""What a checkpoint holds, as the run uses it, and the files that it goes into.

Letters: C_r classes of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from recognition.checkpoint.optimizer import optimizer_tensors
from recognition.head import PartialFC
from recognition.optim import RowAdamW, RowSGD
from recognition.precision import LossScaler

MAY_LACK = ("votes",)  # for the log alone; the first checkpoints did not have them


@dataclass
class HeadParts:
    """A head and the optimiser of its rows."""

    head: PartialFC
    row_optimizer: RowSGD | RowAdamW

    def rows(self) -> dict[str, Tensor]:
        """All that is held by class, [C_r, ...]: centres, optimiser state, loss state."""
        self.head.settle()
        state = self.row_optimizer.state | self.head.class_state()
        return {"weight": self.head.weight.detach()} | state

    def margin(self) -> dict[str, Tensor]:
        """What the loss and its optimiser keep for the whole model."""
        return self.head.model_state() | self.row_optimizer.model_state

    def keeps_by_class(self) -> bool:
        """Whether the loss keeps something for each class."""
        return any(name.startswith("margin.") for name in self.rows())

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        head = self.head
        return {
            "num_classes": head.num_classes,
            "embedding_size": head.embedding_size,
            "num_subcenters": head.num_subcenters,
            "step": head.step,
            "row_state": sorted(n for n in self.rows() if n not in ("weight", *MAY_LACK)),
            "margin_state": sorted(self.margin()),
            "margin": type(head.margin).__name__,
        }


@dataclass
class Parts:
    """All that moves in a run: the backbone, usually one head, and their optimisers."""

    backbone: nn.Module
    optimizer: Optimizer
    heads: list[HeadParts]
    scaler: LossScaler | None = None
    encoder: nn.Module | None = None  # the slow copy of the backbone that a margin observes

    @property
    def head(self) -> PartialFC:
        """The head, where there is one."""
        (only,) = self.heads
        return only.head

    @property
    def row_optimizer(self) -> RowSGD | RowAdamW:
        """The optimiser of its rows, where there is one head."""
        (only,) = self.heads
        return only.row_optimizer

    @property
    def group(self) -> ProcessGroup:
        return self.heads[0].head.group

    def named_heads(self) -> list[tuple[str, HeadParts]]:
        """Every head with what its files' names begin with: nothing where there is one."""
        several = len(self.heads) > 1
        return [(f"head{i}-" if several else "", part) for i, part in enumerate(self.heads)]

    def files(self) -> dict[str, Mapping[str, Tensor]]:
        """The files that this rank writes, {name: its tensors}."""
        first = self.group.rank() == 0
        files: dict[str, Mapping[str, Tensor]] = {}
        for prefix, part in self.named_heads():
            start, stop = part.head.shard
            files[f"{prefix}rows-{start}-{stop}.safetensors"] = part.rows()
            if first and part.margin():
                files[f"{prefix}margin.safetensors"] = part.margin()
        if first and self.encoder is not None:
            files["encoder.safetensors"] = self.encoder.state_dict()
        if first:
            files["model.safetensors"] = self.backbone.state_dict()
            files["optimizer.safetensors"] = optimizer_tensors(
                self.backbone, self.optimizer, self.scaler
            )
        return files
