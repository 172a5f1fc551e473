"""Likely mistakes in the data and the options, which a run reports at its start."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

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
    frozen = [_frozen(state.backbone)] if state.cfg.freeze else []
    return [*_images(state), *_lr(state.cfg), *_scales(state), *frozen]


def _images(state: TrainState) -> Iterator[str]:
    num_images, num_classes = len(state.data), state.data.num_classes
    batch = state.cfg.global_batch(state.runtime.world)
    if num_images < batch:
        yield (
            f"warning: {num_images} images are fewer than the batch of {batch}: a step sees the "
            "same image more than once, and an epoch is less than a step; lower global_batch_size"
        )
    per_class = np.bincount(state.data.labels, minlength=num_classes)  # [C]
    empty, single = int((per_class == 0).sum()), int((per_class == 1).sum())
    filled = num_classes - empty
    if empty:
        yield (
            f"warning: {empty} of {num_classes} classes have no image (the labels have gaps, or "
            "num_classes is too large): the head holds rows for them that nothing trains; packing "
            "the images again numbers the classes without gaps"
        )
    if filled == 1:
        yield "warning: only 1 class has images: there is nothing to tell apart"
    if single:
        mostly = 2 * single > filled
        yield (
            f"{'warning: ' if mostly else ''}{single} of {filled} classes with images have a "
            "single image" + (": the loss hardly falls for the first epochs" if mostly else "")
        )


def _lr(cfg: Config) -> Iterator[str]:
    usual = _USUAL_LR[cfg.optimizer]
    low = cfg.lr < usual / _FAR_LR and cfg.init_from is None  # fine-tuning uses small rates
    if low or cfg.lr > usual * _FAR_LR:
        yield (
            f"warning: lr={cfg.lr:g} is far {'below' if low else 'above'} the usual {usual:g} of "
            f"optimizer={cfg.optimizer}"
        )


def _scales(state: TrainState) -> Iterator[str]:
    for name, part in zip(multi_head.head_names(state.cfg), state.parts.heads, strict=True):
        margin = part.head.margin
        known = inspect.signature(type(margin)).parameters
        usual = known["scale"].default if "scale" in known else None
        scale = getattr(margin, "scale", None)
        if not (isinstance(usual, int | float) and isinstance(scale, int | float)):
            continue  # the loss has no scale, or learns it
        if not usual / _FAR_SCALE <= scale <= usual * _FAR_SCALE:
            yield (
                f"warning: {name and f'{name}: '}scale={scale:g} is far from the usual {usual:g} "
                f"of {type(margin).__name__}"
            )


def _frozen(backbone: nn.Module) -> str:
    named = dict(backbone.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    share = sum(named[name].numel() for name in frozen) / sum(p.numel() for p in named.values())
    listed = ", ".join(frozen[:_NAMES]) + (f" ... {frozen[-1]}" if len(frozen) > _NAMES else "")
    return (
        f"freeze: {len(frozen)} of {len(named)} parameters of the backbone, {100 * share:.0f} % of "
        f"its numbers, are not trained: {listed}"
    )
