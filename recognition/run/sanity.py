"""Likely mistakes in the data and the options, which a run reports at its start."""

from __future__ import annotations

import inspect

import numpy as np
from torch import nn

from recognition.config import Config
from recognition.head import multi_head
from recognition.run.state import TrainState

# Usual values, and the factor from which a deviation is reported.
_USUAL_LR = {"sgd": 0.1, "adamw": 1e-3}
_FAR_LR = 20.0
_FAR_SCALE = 4.0
_NAMES = 3  # of frozen parameters that are listed


def lines(state: TrainState) -> list[str]:
    """Lines for the start of the log; "warning: " marks a likely mistake."""
    per_class = np.bincount(state.data.labels, minlength=state.data.num_classes)  # [C]
    batch = state.cfg.global_batch(state.runtime.world)
    found = [
        _batch(len(state.data), batch),
        *_classes(per_class),
        *_lr(state.cfg),
        *_scales(state),
        _frozen(state.backbone) if state.cfg.freeze else "",
    ]
    return [line for line in found if line]


def _batch(num_images: int, batch: int) -> str:
    if num_images >= batch:
        return ""
    return (
        f"warning: {num_images} images are fewer than the batch of {batch}: a step sees the same "
        "image more than once, and an epoch is less than a step; lower global_batch_size"
    )


def _classes(per_class: np.ndarray) -> list[str]:
    num_classes, found = len(per_class), []
    empty, single = int((per_class == 0).sum()), int((per_class == 1).sum())
    filled = num_classes - empty
    if empty:
        found.append(
            f"warning: {empty} of {num_classes} classes have no image (the labels have gaps, or "
            "num_classes is too large): the head holds rows for them that nothing trains; packing "
            "the images again numbers the classes without gaps"
        )
    if filled == 1:
        found.append(
            "warning: 1 class has images: there is nothing to tell apart, and the loss says nothing"
        )
    if single:
        mostly = 2 * single > filled
        found.append(
            f"{'warning: ' if mostly else ''}{single} of {filled} classes with images have a "
            "single image" + (": the loss hardly falls for the first epochs" if mostly else "")
        )
    return found


def _lr(cfg: Config) -> list[str]:
    usual = _USUAL_LR[cfg.optimizer]
    low = cfg.lr < usual / _FAR_LR and cfg.init_from is None  # fine-tuning uses small rates
    if not low and cfg.lr <= usual * _FAR_LR:
        return []
    return [
        f"warning: lr={cfg.lr:g} is far {'below' if low else 'above'} the usual {usual:g} of "
        f"optimizer={cfg.optimizer}"
    ]


def _scales(state: TrainState) -> list[str]:
    found = []
    for name, part in zip(multi_head.head_names(state.cfg), state.parts.heads, strict=True):
        margin = part.head.margin
        known = inspect.signature(type(margin)).parameters
        if "scale" not in known or not isinstance(known["scale"].default, int | float):
            continue
        usual, scale = float(known["scale"].default), getattr(margin, "scale", None)
        if not isinstance(scale, int | float):  # the scale is learned
            continue
        if not usual / _FAR_SCALE <= scale <= usual * _FAR_SCALE:
            found.append(
                f"warning: {name and f'{name}: '}scale={scale:g} is far from the usual {usual:g} "
                f"of {type(margin).__name__}"
            )
    return found


def _frozen(backbone: nn.Module) -> str:
    named = dict(backbone.named_parameters())
    still = [name for name, p in named.items() if not p.requires_grad]
    share = sum(named[name].numel() for name in still) / sum(p.numel() for p in named.values())
    listed = ", ".join(still[:_NAMES]) + (f" ... {still[-1]}" if len(still) > _NAMES else "")
    return (
        f"freeze: {len(still)} of {len(named)} parameters of the backbone, {100 * share:.0f} % of "
        f"its numbers, stay as they are: {listed}"
    )
