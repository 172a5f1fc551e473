"""The learning rate, and what adapts when a run resumes at another world size, as elastic= chooses.

elastic=       global batch   images per process        accumulation   learning rate
batch_size     kept           adapts                    kept           kept
accumulation   kept           at most as at the start   adapts         kept
lr             adapts         kept                      kept           linear in the batch
auto           accumulation; with sync_bn=true batch_size, which keeps BatchNorm's statistics and
               thereby the loss curve

The linear rule is that of arXiv:1706.02677 section 2.1. With it the schedule counts images instead
of steps, so the run ends after the same number of images as planned at its start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recognition.config import Config


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


@dataclass(frozen=True)
class RescaledSchedule:
    """The schedule of a run whose batch has changed, as a function of the images seen."""

    first: Schedule  # the schedule at the first batch
    first_batch: int
    batch: int
    step: int  # completed when the batch changed
    samples_seen: int  # by then

    @property
    def total_steps(self) -> int:
        left = self.first.total_steps * self.first_batch - self.samples_seen
        return self.step + max(math.ceil(left / self.batch), 0)

    def lr_at(self, step: int) -> float:
        seen = self.samples_seen + (step - self.step) * self.batch
        return self.first.lr_at(seen / self.first_batch) * (self.batch / self.first_batch)


# --- Another world size ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedRun:
    """The configuration adapted to the world size, and the batch that the run began with."""

    cfg: Config
    first_batch: int  # global batch at the start of the run
    first_rows: int  # most images per process and micro-step at that start
    message: str = ""  # for the log, if the world size has changed

    def first(self) -> Config:
        """The configuration that defines the schedule: with elastic=lr that of the start."""
        if self.cfg.elastic != "lr":
            return self.cfg
        return dataclasses.replace(self.cfg, global_batch_size=self.first_batch)

    def schedule(
        self, first: Schedule, step: int, samples_seen: int
    ) -> Schedule | RescaledSchedule:
        """The schedule from `step` on; `first` is the one made from first()."""
        batch = self.cfg.global_batch_size
        if self.cfg.elastic != "lr" or batch is None:
            return first
        return RescaledSchedule(first, self.first_batch, batch, step, samples_seen)


def adapt(cfg: Config, manifest: Mapping[str, Any] | None, world: int) -> AdaptedRun:
    """Adapt the batch to `world` processes; manifest: of the checkpoint resumed from."""
    if manifest is None or _asked_anew(cfg, manifest):
        batch = cfg.global_batch(world)
        return AdaptedRun(cfg, batch, _rows(batch, world, cfg.accumulation))
    saved, batch = manifest["config"], manifest["global_batch"]
    rows = _rows(batch, manifest["world"], saved["accumulation"])
    first_batch, first_rows = saved.get("first_batch", batch), saved.get("first_rows", rows)
    rule = cfg.elastic
    if rule == "auto":
        rule = "batch_size" if cfg.sync_bn else "accumulation"
    if rule == "lr":
        batch = first_rows * world * cfg.accumulation
        if world * cfg.accumulation == first_batch // first_rows:
            batch = first_batch  # exactly as at the start, even if that did not divide evenly
        fitted = dataclasses.replace(cfg, global_batch_size=batch)
        how = f"lr times {batch / first_batch:g}, with the batch of {first_batch} -> {batch}"
    else:
        accumulation = cfg.accumulation
        if rule == "accumulation":
            while _rows(batch, world, accumulation) > first_rows:
                accumulation += 1
        fitted = dataclasses.replace(cfg, global_batch_size=batch, accumulation=accumulation)
        how = (
            f"the global batch stays {batch}, at most {_rows(batch, world, accumulation)} images "
            f"per process ({first_rows} at the start), accumulation {accumulation}"
        )
    same = (batch, fitted.accumulation) == (cfg.global_batch(world), cfg.accumulation)
    if manifest["world"] == world:
        return AdaptedRun(cfg if same and rule != "lr" else fitted, first_batch, first_rows)
    message = f"{manifest['world']} -> {world} processes, elastic={rule}: {how}"
    return AdaptedRun(fitted, first_batch, first_rows, message)


def _asked_anew(cfg: Config, manifest: Mapping[str, Any]) -> bool:
    """Whether the user asks for another batch than the run began with."""
    saved = manifest["config"]
    if cfg.global_batch_size is None:
        return cfg.batch_size != saved["batch_size"]
    return cfg.global_batch_size != saved.get("first_batch", manifest["global_batch"])


def _rows(batch: int, world: int, accumulation: int) -> int:
    return math.ceil(batch / (world * accumulation))
