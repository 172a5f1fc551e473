"""The state of a run: configuration, data, network, heads, optimisers, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_tools.load.order import Order
from data_tools.shards import Shards
from data_tools.union import Union
from eval.protocols import lfw
from recognition import checkpoint
from recognition.config import Config
from recognition.distributed.runtime import Runtime
from recognition.distributed.step_timer import Phases
from recognition.head import PartialFC
from recognition.run.nonfinite import FiniteGuard, SkippingStep
from recognition.run.schedule import RescaledSchedule, Schedule
from recognition.run.spikes import SpikeGuard, Window
from recognition.weights import distill


@dataclass
class TrainState:
    """A run in progress: `step` and `samples_seen` are its position."""

    cfg: Config
    runtime: Runtime
    data: Shards | Union
    order: Order
    val_sets: list[lfw.PairSet]
    precision: str
    model: DistributedDataParallel
    parts: checkpoint.Parts
    schedule: Schedule | RescaledSchedule
    guard: FiniteGuard
    facts: dict[str, Any]  # recorded in config.json beside the configuration
    saved_by: int | None = None  # world size of the run that saved the checkpoint
    loaded_step: int | None = None  # step of the checkpoint that was loaded
    elastic_message: str = ""  # what the new world size changes
    messages: list[str] = field(default_factory=list)  # lines to log at the start
    owes_verification: bool = False  # the loaded step still has to be verified
    changes: list[str] = field(default_factory=list)  # of configuration since the checkpoint
    damaged: list[str] = field(default_factory=list)  # newer checkpoints that cannot be used
    spikes: SpikeGuard | None = None
    skipped: list[Window] = field(default_factory=list)  # samples skipped after spikes
    step: int = 0  # completed optimiser steps
    samples_seen: int = 0
    teacher: distill.Teacher | None = None
    head_losses: torch.Tensor | None = None  # [heads] of the last step, unweighted
    phases: Phases = field(init=False)  # where the time of each step goes
    step_backbone: SkippingStep = field(init=False)  # wraps parts.optimizer

    def __post_init__(self) -> None:
        self.step_backbone = SkippingStep(self.parts.optimizer, self.runtime.device)
        self.phases = Phases(self.runtime.device)
        first = next(p for p in self.parts.backbone.parameters() if p.requires_grad)
        # The backward computes this gradient last; what follows waits for the all-reduce.
        # The hook refers to `phases` only: the garbage collector does not see what it holds.
        enter = self.phases.enter
        first.register_post_accumulate_grad_hook(lambda _: enter("communication"))

    def is_due(self, every: int) -> bool:
        """Whether the present step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.schedule.total_steps

    @property
    def backbone(self) -> nn.Module:
        return self.parts.backbone

    @property
    def head(self) -> PartialFC:
        """The head of a run that has only one."""
        return self.parts.head
