"""Which of the backbone's parameters stand still, and the statistics that stand still with them."""

from __future__ import annotations

import fnmatch

from torch import nn

from data_tools.common.errors import UserError


def freeze(backbone: nn.Module, patterns: list[str]) -> list[str]:
    """Take the parameters whose names match (`layer1.*`) out of training; their names.

    A BatchNorm of which nothing is left to train also keeps its running statistics, and normalises
    by them, wherever train_mode() sets the mode.

    Raises:
        ValueError: a pattern that matches nothing, or all parameters are frozen.
    """
    names = [name for name, _ in backbone.named_parameters()]
    frozen = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise UserError(f"freeze={pattern!r} matches no parameter; they begin with {tops}")
        frozen.update(found)
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in backbone.parameters()):
        raise UserError(f"freeze={patterns} leaves nothing to train")
    return sorted(frozen)


def train_mode(backbone: nn.Module) -> None:
    """backbone.train(), but a BatchNorm without a parameter in training stays in eval mode.

    Its inputs may still drift where an earlier layer trains; its scale and shift are then those of
    the weights that it was frozen with, as in fine-tuning elsewhere.
    """
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
