"""What the backbone holds on a GPU, for the planner: found on tensors that have no memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recognition.backbones import make_backbone
from recognition.backbones.input import INPUT_SIZE
from recognition.backbones.vit import VisionTransformer
from recognition.config import Config
from recognition.precision import autocast

_FP32 = 4


def backbone_bytes(cfg: Config, rows: int) -> dict[str, float]:
    """Bytes by part, of a process with `rows` images at once.

    Raises:
        KeyError, TypeError, ValueError: no such network, or none that takes `network_args`.
    """
    arguments = tuple(sorted(cfg.network_args.items()))
    precision = "bf16" if cfg.precision == "auto" else cfg.precision  # of a GPU of today
    weights, of_one, more = _sizes(cfg.network, cfg.embedding_size, arguments, precision)
    activations = of_one + (rows - 1) * more
    return {
        "backbone: weights": weights,
        "backbone: gradient": weights,
        "backbone: optimiser state": weights * (2 if cfg.optimizer == "adamw" else 1),
        "backbone: activations": activations,
    }


@functools.cache
def _sizes(
    name: str, embedding_size: int, arguments: tuple[tuple[str, Any], ...], precision: str
) -> tuple[float, float, float]:
    """Bytes of the weights, of what a forward of one image leaves for the backward, and of what
    each further image adds."""
    with torch.device("meta"):  # where initialising looks at no value
        network = make_backbone(name, embedding_size, dict(arguments))
    weights = sum(p.numel() for p in network.parameters()) * _FP32
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        two, four = (_kept_with_checkpointing(network, rows, precision) for rows in (2, 4))
    return weights, two - (four - two) / 2, (four - two) / 2


def _kept_with_checkpointing(network: nn.Module, rows: int, precision: str) -> float:
    images = torch.empty(rows, 3, INPUT_SIZE, INPUT_SIZE)
    kept = _kept(network, images, precision)
    if isinstance(network, VisionTransformer) and network.checkpointing:
        network.checkpointing = False  # the backward computes one block at a time again
        kept += (_kept(network, images, precision) - kept) / len(network.blocks)
        network.checkpointing = True
    return kept


def _kept(network: nn.Module, images: torch.Tensor, precision: str) -> float:
    """Bytes that autograd keeps of a forward for its backward, the parameters left out."""
    own = {tensor.untyped_storage()._cdata for tensor in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no name comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    inputs = [  # checkpointed blocks hold theirs, which autograd does not say
        block.register_forward_pre_hook(lambda _, given: [keep(one) for one in given] and None)
        for block in _checkpointed(network)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(precision, images.device):
            network(images)
    for handle in inputs:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


def _checkpointed(network: nn.Module) -> list[nn.Module]:
    """The blocks whose activations the backward recomputes."""
    if not (isinstance(network, VisionTransformer) and network.checkpointing):
        return []
    assert isinstance(network.blocks, nn.ModuleList)
    return list(network.blocks)
