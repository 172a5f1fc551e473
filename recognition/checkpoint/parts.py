"""What a checkpoint holds: the parts of a run as named tensors, and the files they go into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from data_tools.common.errors import UserError
from recognition.head import PartialFC
from recognition.optim import RowAdamW, RowSGD
from recognition.precision import LossScaler


@dataclass
class HeadParts:
    """A head and the optimiser of its rows."""

    head: PartialFC
    row_optimizer: RowSGD | RowAdamW

    def rows(self) -> dict[str, Tensor]:
        """Everything held per class of this rank, [C_r, ...]: centres, optimiser and loss state."""
        self.head.settle()
        state = self.row_optimizer.state | self.head.class_state()
        return {"weight": self.head.weight.detach()} | state

    def margin(self) -> dict[str, Tensor]:
        """What the loss and its optimiser hold for the whole model."""
        return self.head.model_state() | self.row_optimizer.model_state

    def facts(self) -> dict[str, Any]:
        """The head's entry in the manifest."""
        head = self.head
        return {
            "num_classes": head.num_classes,
            "embedding_size": head.embedding_size,
            "num_subcenters": head.num_subcenters,
            "step": head.step,
            # The votes for sub-centres are not named: they only go to the log.
            "row_state": sorted(name for name in self.rows() if name not in ("weight", "votes")),
            "margin_state": sorted(self.margin()),
            "margin": type(head.margin).__name__,
        }


@dataclass
class Parts:
    """Everything that training changes: the backbone, its heads, and their optimisers."""

    backbone: nn.Module
    optimizer: Optimizer
    heads: list[HeadParts]
    scaler: LossScaler | None = None
    encoder: nn.Module | None = None  # the slow copy of the backbone that a margin observes

    @property
    def head(self) -> PartialFC:
        """The head of a run that has only one."""
        (only,) = self.heads
        return only.head

    @property
    def group(self) -> ProcessGroup:
        return self.heads[0].head.group

    def named_heads(self) -> list[tuple[str, HeadParts]]:
        """Every head with the prefix of its files, which is empty if there is only one head."""
        several = len(self.heads) > 1
        return [(f"head{i}-" if several else "", part) for i, part in enumerate(self.heads)]

    def files(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of each file that this rank writes, by file name."""
        is_first = self.group.rank() == 0
        files: dict[str, Mapping[str, Tensor]] = {}
        for prefix, part in self.named_heads():
            start, stop = part.head.shard
            files[f"{prefix}rows-{start}-{stop}.safetensors"] = part.rows()
            if is_first and part.margin():
                files[f"{prefix}margin.safetensors"] = part.margin()
        if is_first and self.encoder is not None:
            files["encoder.safetensors"] = self.encoder.state_dict()
        if is_first:
            files["model.safetensors"] = self.backbone.state_dict()
            files["optimizer.safetensors"] = optimizer_tensors(
                self.backbone, self.optimizer, self.scaler
            )
        return files


# --- The backbone's optimiser ---------------------------------------------------------------------


def optimizer_tensors(
    backbone: nn.Module, optimizer: Optimizer, scaler: LossScaler | None
) -> dict[str, Tensor]:
    """The state of the backbone's optimiser, "<state>/<parameter>", and of the loss scale."""
    names = [name for name, _ in _trained(backbone)]
    tensors = {
        f"{key}/{names[index]}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if value is not None
    }
    if scaler is not None:
        tensors |= {f"scaler/{key}": value for key, value in scaler.state_dict().items()}
    return tensors


def load_optimizer(parts: Parts, tensors: Mapping[str, Tensor], source: str, started: bool) -> None:
    """Load what optimizer_tensors() returned.

    started: steps were taken before, so the optimiser must have a state.

    Raises:
        ValueError: a state belongs to no parameter, has another shape (the fused step would write
            beyond it), or is missing.
    """
    optimizer = parts.optimizer
    trained = {name: (i, p) for i, (name, p) in enumerate(_trained(parts.backbone))}
    scale: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "scaler":
            scale[name] = value
            continue
        if name not in trained:
            raise UserError(f"cannot resume from {source}: optimiser state of unknown {name}")
        index, parameter = trained[name]
        if value.shape != (() if kind == "step" else parameter.shape):
            raise UserError(f"cannot resume from {source}: {key} is {list(value.shape)}")
        if value.shape == parameter.shape:
            # The fused step walks both in memory order: the state needs the parameter's strides.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index, {})[kind] = value
    lacking = [name for name, (index, _) in trained.items() if index not in state]
    if lacking and (state or (started and optimizer.defaults.get("momentum", 1))):
        raise UserError(
            f"cannot resume from {source}: the optimiser's state of {len(lacking)} parameters is "
            f"missing, {lacking[0]} the first"
        )
    if parts.scaler is not None and scale:
        parts.scaler.load_state_dict(scale)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trained(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters in the order in which the optimiser numbers them."""
    return [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
