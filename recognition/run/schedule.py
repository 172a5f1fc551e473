"""Learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step."""

    kind: str  # "polynomial" | "step" | "cosine"
    lr: float  # after the warm-up
    total_steps: int
    warmup_steps: int = 0
    power: float = 1.0  # exponent of the polynomial
    milestones: Sequence[int] = ()  # steps after which "step" multiplies by gamma
    gamma: float = 0.1

    def lr_at(self, step: float) -> float:
        """The learning rate of the step that follows `step` completed steps.

        Linear warm-up to lr over warmup_steps; then lr * (1 - p)^power, lr * (1 + cos(pi p)) / 2,
        or lr * gamma^(milestones passed), with p the completed fraction of the steps after warm-up.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        after = max(self.total_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / after, 1.0)
        if self.kind == "polynomial":
            return self.lr * (1.0 - done) ** self.power
        if self.kind == "cosine":
            return self.lr * (1.0 + math.cos(math.pi * done)) / 2
        return self.lr * self.gamma ** sum(step >= milestone for milestone in self.milestones)
