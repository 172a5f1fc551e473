"""Freezes parameters of the backbone, with the statistics of the BatchNorms that they belong to."""

from __future__ import annotations

import fnmatch

from torch import nn

from data_tools.common.errors import UserError


def freeze(backbone: nn.Module, patterns: list[str]) -> list[str]:
    """Freeze the parameters whose names match (`layer1.*`); returns their names.

    A BatchNorm without a trained parameter also keeps its running statistics, and normalises by
    them, as train_mode() sets it.

    Raises:
        ValueError: a pattern matches nothing, or all parameters are frozen.
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
    """backbone.train(), except that a BatchNorm with all parameters frozen stays in eval mode.

    Its inputs may still drift if an earlier layer trains, as usual in fine-tuning.
    """
    backbone.train()
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
