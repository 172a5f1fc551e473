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
from recognition.run.elastic import RescaledSchedule
from recognition.run.nonfinite import FiniteGuard, SkippingStep
from recognition.run.schedule import Schedule
from recognition.run.spikes import SpikeGuard, Window
from recognition.weights import distill


@dataclass
class TrainState:
    """A run in progress. `step` and `samples_seen` say where; the rest is what moves."""

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
    facts: dict[str, Any]  # what config.json says beside the configuration
    saved_by: int | None = None  # ranks that wrote the checkpoint it continues from
    loaded_step: int | None = None  # of that checkpoint
    elastic_message: str = ""  # what follows another number of processes
    messages: list[str] = field(default_factory=list)  # lines for the start of the log
    owes_verification: bool = False  # of the step that it continues after
    changes: list[str] = field(default_factory=list)  # against the run that saved it
    damaged: list[str] = field(default_factory=list)  # damaged checkpoints, what was wrong
    spikes: SpikeGuard | None = None
    skipped: list[Window] = field(default_factory=list)  # samples left out after spikes
    step: int = 0  # completed optimiser steps
    samples_seen: int = 0
    teacher: distill.Teacher | None = None
    head_losses: torch.Tensor | None = None  # [heads] of the last step, without their weights
    phases: Phases = field(init=False)  # of the steps' time
    step_backbone: SkippingStep = field(init=False)  # by parts.optimizer

    def __post_init__(self) -> None:
        self.step_backbone = SkippingStep(self.parts.optimizer, self.runtime.device)
        self.phases = Phases(self.runtime.device)
        first = next(p for p in self.parts.backbone.parameters() if p.requires_grad)
        # The last gradient that the backward finds: what follows is the end of its exchange.
        # Of the phases alone: what a hook holds is out of the collector's sight.
        enter = self.phases.enter
        first.register_post_accumulate_grad_hook(lambda _: enter("communication"))

    @property
    def backbone(self) -> nn.Module:
        return self.parts.backbone

    @property
    def head(self) -> PartialFC:
        """The head, where there is one."""
        return self.parts.head
