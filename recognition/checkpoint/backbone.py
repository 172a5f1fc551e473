"""The network of a checkpoint alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from data_tools.common.errors import UserError
from recognition.backbones import make_backbone
from recognition.checkpoint.directory import Damaged, find, older, read_manifest
from recognition.checkpoint.tensors import read

_SHOWN = 8  # names of a kind that an error lists


def load_backbone(path: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run directory (its newest checkpoint) or checkpoint, and its config.

    The module is on the CPU, in fp32 and eval mode.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not what was written; the message names the file and the checkpoint before.
    """
    checkpoint = find(path)
    try:
        manifest = read_manifest(checkpoint)
        state = read(checkpoint, "model.safetensors", manifest)
    except Damaged as error:
        raise Damaged(f"{error}{older(checkpoint)}") from error
    config = manifest["config"]
    arguments = config.get("network_args", {})
    module = make_backbone(config["network"], config["embedding_size"], arguments)
    load_state(module, state, checkpoint)
    return module.float().eval(), config


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, every name and shape of it.

    Raises:
        ValueError: listing the names that are missing, unexpected, or of another shape.
    """
    if wrong := misfit(module, state, source):
        raise UserError(wrong)
    module.load_state_dict(dict(state))


def misfit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> str:
    """What of a state does not fit a network, for a person; "" if all does."""
    own = module.state_dict()
    problems = (
        [f"missing {name}" for name in own if name not in state],
        [f"unexpected {name}" for name in state if name not in own],
        [
            f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    )
    if count := sum(map(len, problems)):
        shown = [line for kind in problems for line in kind[:_SHOWN]]
        listed = "\n  ".join(shown) + ("\n  ..." if count > len(shown) else "")
        return f"{source} does not fit this network ({count} names):\n  {listed}"
    return ""
