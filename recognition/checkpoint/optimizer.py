"""The state of the backbone's optimiser as tensors by name, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data_tools.common.errors import UserError
from recognition.precision import LossScaler


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


def load_optimizer(
    backbone: nn.Module,
    optimizer: Optimizer,
    scaler: LossScaler | None,
    tensors: Mapping[str, Tensor],
    source: str,
    started: bool,
) -> None:
    """Take the state that optimizer_tensors() gave.

    started: a step was taken before it did, so that there is a state.

    Raises:
        ValueError: it is of a parameter that the backbone lacks, of another shape (the fused step
            would write beyond it), or not of all.
    """
    place = {name: (i, p) for i, (name, p) in enumerate(_trained(backbone))}
    scale: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "scaler":
            scale[name] = value
            continue
        if name not in place:
            raise UserError(f"cannot resume from {source}: optimiser state of unknown {name}")
        index, parameter = place[name]
        if value.shape != (() if kind == "step" else parameter.shape):
            raise UserError(f"cannot resume from {source}: {key} is {list(value.shape)}")
        if value.shape == parameter.shape:
            # The fused step walks both in memory order: the state needs the parameter's strides.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(index, {})[kind] = value
    lacking = [name for name, (index, _) in place.items() if index not in state]
    if lacking and (state or (started and optimizer.defaults.get("momentum", 1))):
        raise UserError(
            f"cannot resume from {source}: it lacks the optimiser's state of {len(lacking)} "
            f"parameters, {lacking[0]} the first"
        )
    if scaler is not None and scale:
        scaler.load_state_dict(scale)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trained(backbone: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters in the order in which the optimiser counts them."""
    return [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
