"""A run that goes on at another number of processes: what of its batch stays and what follows.

elastic=       global batch   images per process   accumulation   learning rate
batch_size     stays          follows              stays          stays
accumulation   stays          at most the first    follows        stays
lr             follows        stays                stays          linear in the batch
auto           accumulation; with sync_bn=true batch_size, which leaves the statistics, and with
               them the curve, as they are

The linear rule: arXiv:1706.02677 section 2.1. Under it the schedule goes by images, not by steps:
the run ends after as many images as it would have seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recognition.config import Config
from recognition.run.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """The configuration as the number of processes makes it, and what the run began with."""

    cfg: Config
    first_batch: int  # images of a step over all processes, at the start of the run
    first_rows: int  # images per process and micro-step, at most, at the start of the run
    message: str = ""  # what follows the number of processes, where it changed

    def first(self) -> Config:
        """The configuration that the schedule is made of: under elastic=lr that of the start."""
        if self.cfg.elastic != "lr":
            return self.cfg
        return dataclasses.replace(self.cfg, global_batch_size=self.first_batch)

    def schedule(
        self, first: Schedule, step: int, samples_seen: int
    ) -> Schedule | RescaledSchedule:
        """The schedule after `step` steps, from the one made of first()."""
        batch = self.cfg.global_batch_size
        if self.cfg.elastic != "lr" or batch is None:
            return first
        return RescaledSchedule(first, self.first_batch, batch, step, samples_seen)

    def facts(self) -> dict[str, int]:
        return {"first_batch": self.first_batch, "first_rows": self.first_rows}


def plan(cfg: Config, manifest: Mapping[str, Any] | None, world: int) -> Plan:
    """What a run does with its batch on `world` processes; manifest: what it continues from."""
    if manifest is None or _asked_anew(cfg, manifest):
        batch = cfg.global_batch(world)
        return Plan(cfg, batch, _rows(batch, world, cfg.accumulation))
    saved, batch = manifest["config"], manifest["global_batch"]
    rows = _rows(batch, manifest["world"], saved["accumulation"])
    first_batch, first_rows = saved.get("first_batch", batch), saved.get("first_rows", rows)
    rule = cfg.elastic
    if rule == "auto":
        rule = "batch_size" if cfg.sync_bn else "accumulation"
    if rule == "lr":
        batch = first_rows * world * cfg.accumulation
        if world * cfg.accumulation == first_batch // first_rows:
            batch = first_batch  # as at the start, where it did not divide
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
        return Plan(cfg if same and rule != "lr" else fitted, first_batch, first_rows)
    message = f"{manifest['world']} -> {world} processes, elastic={rule}: {how}"
    return Plan(fitted, first_batch, first_rows, message)


def _asked_anew(cfg: Config, manifest: Mapping[str, Any]) -> bool:
    """Whether another batch was typed than that which the run began with."""
    saved = manifest["config"]
    if cfg.global_batch_size is None:
        return cfg.batch_size != saved["batch_size"]
    return cfg.global_batch_size != saved.get("first_batch", manifest["global_batch"])


def _rows(batch: int, world: int, accumulation: int) -> int:
    return math.ceil(batch / (world * accumulation))


@dataclass(frozen=True)
class RescaledSchedule:
    """The schedule of a run whose batch has changed, by the images that it has seen."""

    first: Schedule  # of the run at its first batch
    first_batch: int
    batch: int
    step: int  # completed when it changed
    samples_seen: int  # by then

    @property
    def total_steps(self) -> int:
        left = self.first.total_steps * self.first_batch - self.samples_seen
        return self.step + max(math.ceil(left / self.batch), 0)

    def lr_at(self, step: int) -> float:
        seen = self.samples_seen + (step - self.step) * self.batch
        return self.first.lr_at(seen / self.first_batch) * (self.batch / self.first_batch)
