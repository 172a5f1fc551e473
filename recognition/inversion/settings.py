"""The knobs of an inversion, each with where its default comes from."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from data_tools.common.errors import UserError

PAPER = "the paper's"
UNSAID = "not in the paper: the plainest"


def _knob(default: Any, help: str, source: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "source": source, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Raises: ValueError for a value that cannot be, naming the flag."""

    steps: int = _knob(20000, "steps of Adam", PAPER)
    lr: float = _knob(0.25, "step size of Adam, pixels lying in [-1, 1]", PAPER)
    batch_size: int = _knob(
        256, "different identities at once, whose BatchNorm statistics are taken together", PAPER
    )
    bn_weight: float = _knob(0.05, "of the BatchNorm prior; 0: without it, the ablation", PAPER)
    tv_weight: float = _knob(1e-3, "of the total variation", PAPER)
    l2_weight: float = _knob(1e-4, "of the length of the image", PAPER)
    bn_form: str = _knob(
        "std", "compare standard deviations, or variances as DeepInversion does", PAPER,
        ("std", "var"),
    )  # fmt: skip
    bn_first: float = _knob(
        1.0, "weight of the first BatchNorm among the others; DeepInversion's code has 10", PAPER
    )
    bn_last: bool = _knob(False, "also the BatchNorm of the embedding", UNSAID)
    feature: str = _knob(
        "unit", "open set: the distance between unit embeddings, or as they come", UNSAID,
        ("unit", "raw"),
    )  # fmt: skip
    beta1: float = _knob(
        0.9, "of Adam; DeepInversion's code has 0.5, and 0.9 for 20k steps", UNSAID
    )
    beta2: float = _knob(0.999, "of Adam", UNSAID)
    schedule: str = _knob(
        "constant", "of the step size; DeepInversion's code has cosine", UNSAID,
        ("constant", "cosine"),
    )  # fmt: skip
    warmup: int = _knob(0, "steps in which lr rises; DeepInversion's code has 100", UNSAID)
    flip: bool = _knob(False, "mirror the batch in half of the steps", UNSAID)
    jitter: int = _knob(
        0, "pixels by which the batch is rolled at most; DeepInversion's code has 30", UNSAID
    )
    clip: bool = _knob(
        False, "keep pixels in [-1, 1] on the way; the PNG files are clipped anyway", UNSAID
    )
    seed: int = _knob(0, "of the noise at the start and of the mirroring", UNSAID)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{_flag(name)} {getattr(self, name)}: 1 or more")
        for name in ("bn_weight", "tv_weight", "l2_weight", "bn_first", "warmup", "jitter", "seed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"--{_flag(name)} {getattr(self, name)}: 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: from 0 to below 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"--lr {self.lr}: give a positive number")
        for knob in dataclasses.fields(self):
            choices = knob.metadata["choices"]
            if choices and getattr(self, knob.name) not in choices:
                raise UserError(f"{knob.name}={getattr(self, knob.name)!r}: one of {choices}")

    def lr_at(self, step: int) -> float:
        """Of the step that follows `step` steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each knob, its help with its default and source."""
    group = parser.add_argument_group("knobs")
    for knob in dataclasses.fields(Settings):
        told = f"{knob.metadata['help']} (default {knob.default}; {knob.metadata['source']})"
        flag = f"--{_flag(knob.name)}"
        if isinstance(knob.default, bool):
            group.add_argument(flag, action="store_true", help=told)
        else:
            group.add_argument(
                flag, type=type(knob.default), default=knob.default, help=told,
                choices=knob.metadata["choices"],
            )  # fmt: skip


def of_arguments(args: argparse.Namespace) -> Settings:
    return Settings(
        **{knob.name: getattr(args, knob.name) for knob in dataclasses.fields(Settings)}
    )


def _flag(name: str) -> str:
    return name.replace("_", "-")
