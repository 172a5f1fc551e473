"""Small training runs inside the rank pool, for the tests of trainer and checkpoint."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from recognition import checkpoint, config
from recognition.backbones import BACKBONES, MobileFaceNet
from recognition.distributed.runtime import Runtime
from recognition.run import build, saving, trainer
from recognition.run.logger import Logger

# A MobileFaceNet with every kind of layer, at a fifth of the time of mbf_tiny.
BACKBONES["mbf_test"] = partial(MobileFaceNet, (0, 1, 1, 1), width=8, expansion=8, head_width=32)

BASE = {
    "network": "mbf_test",
    "embedding_size": 32,
    "sample_rate": 0.5,
    "global_batch_size": 12,
    "lr": 0.05,
    "max_steps": 6,
    "log_every": 1,
    "num_workers": 1,
    "seed": 3,
}


def here() -> Runtime:
    world = dist.group.WORLD
    return Runtime(torch.device("cpu"), world, dist.get_rank(), dist.get_world_size())


def run(keys: dict, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Train and return every tensor of the end by name, class rows of all ranks among them.

    stop_after: save a checkpoint after that step and leave, as a killed run would have.
    """
    state = build.build(config.make(BASE | keys), here())
    if stop_after is None:
        trainer.train(state)
    else:
        with (
            trainer.make_loader(state) as loader,
            Logger(state.cfg.output, state.runtime.rank, state.step) as logger,
        ):
            batches = iter(loader)
            while state.step < stop_after:
                seen_before = state.samples_seen
                trainer.take_step(state, batches)
                trainer._end_epochs(state, logger, seen_before)
        saving.save_here(state)
    return tensors(state)


def tensors(state: build.TrainState) -> dict[str, torch.Tensor]:
    parts = state.parts
    named = {f"backbone.{k}": v.clone() for k, v in state.backbone.state_dict().items()}
    named |= checkpoint.optimizer_tensors(parts.backbone, parts.optimizer, parts.scaler)
    for prefix, head in parts.named_heads():
        named |= {prefix + name: value for name, value in head.margin().items()}
    if parts.encoder is not None:
        named |= {f"encoder.{k}": v for k, v in parts.encoder.state_dict().items()}
    for prefix, head in parts.named_heads():
        for name, local in head.rows().items():
            every: list = [None] * dist.get_world_size()
            dist.all_gather_object(every, local)
            named[prefix + ("rows" if name == "weight" else name)] = torch.cat(every)
    return named


def first_loss(keys: dict) -> float:
    """Loss of the next step of a run, without changing its directory."""
    state = build.build(config.make(BASE | keys), here())
    with trainer.make_loader(state) as loader:
        loss, _ = trainer.take_step(state, iter(loader))
    return loss.item()
