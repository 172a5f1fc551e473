"""What the backbone holds on a GPU, for the planner: found on tensors that have no memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from recognition.backbones import make_backbone, shapes_alone
from recognition.backbones.input import INPUT_SIZE
from recognition.backbones.vit import VisionTransformer
from recognition.config import Config
from recognition.precision import autocast

_FP32 = 4


class BackboneSizes(NamedTuple):
    """Bytes of a backbone that has taken one batch, and of one number of its embeddings."""

    weights: float
    statistics: float  # floating-point buffers: BatchNorm's running means and variances
    activations: float  # what autograd keeps of a forward for the backward
    embedding_itemsize: int  # 2 under autocast


def backbone_bytes(cfg: Config, rows: int) -> dict[str, float]:
    """Bytes by part, of a process with `rows` images at once.

    Raises:
        KeyError, TypeError, ValueError: no such network, or none that takes `network_args`.
    """
    sizes = backbone_sizes(cfg, rows)
    return {
        "backbone: weights": sizes.weights,
        "backbone: gradient": sizes.weights,
        "backbone: optimiser state": sizes.weights * (2 if cfg.optimizer == "adamw" else 1),
        "backbone: activations": sizes.activations,
    }


def backbone_sizes(cfg: Config, rows: int) -> BackboneSizes:
    """Raises: as backbone_bytes()."""
    arguments = tuple(sorted(cfg.network_args.items()))
    precision = "bf16" if cfg.precision == "auto" else cfg.precision  # of a GPU of today
    sizes, more = _sizes(cfg.network, cfg.embedding_size, arguments, precision)
    return sizes._replace(activations=sizes.activations + (rows - 1) * more)


@functools.cache
def _sizes(
    name: str, embedding_size: int, arguments: tuple[tuple[str, Any], ...], precision: str
) -> tuple[BackboneSizes, float]:
    """Of one image, and the bytes of activations that each further image adds."""
    with shapes_alone():
        network = make_backbone(name, embedding_size, dict(arguments))
    weights = sum(p.numel() for p in network.parameters()) * _FP32
    statistics = sum(b.numel() for b in network.buffers() if b.is_floating_point()) * _FP32
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        two, itemsize = _kept_with_checkpointing(network, 2, precision)
        four, _ = _kept_with_checkpointing(network, 4, precision)
    more = (four - two) / 2
    return BackboneSizes(weights, statistics, two - more, itemsize), more


def _kept_with_checkpointing(network: nn.Module, rows: int, precision: str) -> tuple[float, int]:
    """As _kept(), with the activations of the one block that the backward computes at a time."""
    images = torch.empty(rows, 3, INPUT_SIZE, INPUT_SIZE)
    kept, itemsize = _kept(network, images, precision)
    if isinstance(network, VisionTransformer) and network.checkpointing:
        network.checkpointing = False
        kept += (_kept(network, images, precision)[0] - kept) / len(network.blocks)
        network.checkpointing = True
    return kept, itemsize


def _kept(network: nn.Module, images: torch.Tensor, precision: str) -> tuple[float, int]:
    """Bytes that autograd keeps of a forward for its backward, the parameters left out; and of one
    number of the embeddings."""
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
            embeddings = network(images)
    for handle in inputs:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values()), embeddings.dtype.itemsize


def _checkpointed(network: nn.Module) -> list[nn.Module]:
    """The blocks whose activations the backward recomputes."""
    if not (isinstance(network, VisionTransformer) and network.checkpointing):
        return []
    assert isinstance(network.blocks, nn.ModuleList)
    return list(network.blocks)
