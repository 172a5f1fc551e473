"""The settings of an inversion, each with where its default comes from."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from data_tools.common.schema import check, option


@dataclass(frozen=True)
class Request:
    """What every kind of inversion is asked for, beside its settings."""

    out: Path = option(MISSING, "directory to make", metavar="DIR")
    ids: str | None = option(
        None,
        "which of them to invert: classes, rows of the embeddings, or people of the images by "
        "label",
        note="default: --count drawn by --seed",
        metavar="0-9,40",
    )
    count: int = option(256, "how many to draw", low=1, metavar="N")
    other: list[str] = option(
        [],
        "another network to measure with, a run directory or an .onnx; may be repeated",
        metavar="MODEL",
    )
    fid: str | None = option(
        None, "network whose output are the features of a Frechet distance", metavar="MODEL"
    )
    resize: bool = option(
        False, "the real faces are aligned at another size than 112 x 112: resize them"
    )
    save_every: int = option(
        500, "steps between two saved states, from which a killed run resumes", low=1, metavar="N"
    )
    picture_every: int = option(
        1000, "steps between two pictures of a batch, in OUT/progress", low=1, metavar="N"
    )


_paper = partial(option, note="the paper's")
_ours = partial(option, note="not in the paper: the plainest")


@dataclass(frozen=True)
class Settings:
    """Raises: UserError: a value that cannot be used, with its flag."""

    steps: int = _paper(20000, "steps of Adam", low=1)
    lr: float = _paper(0.25, "step size of Adam; pixels lie in [-1, 1]", low=0, open_ends="low")
    batch_size: int = _paper(
        256, "different identities at once, whose BatchNorm statistics are taken together", low=1
    )
    bn_weight: float = _paper(
        0.05, "weight of the BatchNorm prior; 0: without it, the ablation", low=0
    )
    tv_weight: float = _paper(1e-3, "weight of the total variation", low=0)
    l2_weight: float = _paper(1e-4, "weight of the length of the image", low=0)
    bn_form: Literal["std", "var"] = _paper(
        "std", "compare standard deviations, or variances as DeepInversion does"
    )
    bn_first: float = _paper(
        1.0, "weight of the first BatchNorm among the others; DeepInversion's code has 10", low=0
    )
    bn_last: bool = _ours(False, "also the BatchNorm of the embedding")
    feature: Literal["unit", "raw"] = _ours(
        "unit", "open set: the distance between unit embeddings, or between those of the network"
    )
    beta1: float = _ours(
        0.9,
        "of Adam; DeepInversion's code has 0.5, and 0.9 for 20k steps",
        low=0,
        high=1,
        open_ends="high",
    )
    beta2: float = _ours(0.999, "of Adam", low=0, high=1, open_ends="high")
    schedule: Literal["constant", "cosine"] = _ours(
        "constant", "of the step size; DeepInversion's code has cosine"
    )
    warmup: int = _ours(0, "steps in which lr rises; DeepInversion's code has 100", low=0)
    flip: bool = _ours(False, "mirror the batch in half of the steps")
    jitter: int = _ours(
        0, "most pixels by which a step rolls the batch; DeepInversion's code has 30", low=0
    )
    clip: bool = _ours(
        False, "keep pixels in [-1, 1] at each step; the PNG files are clipped in any case"
    )
    seed: int = _ours(0, "of the noise at the start and of the mirroring", low=0)

    def __post_init__(self) -> None:
        check(self)

    def lr_at(self, step: int) -> float:
        """Of the step that follows `step` steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))
