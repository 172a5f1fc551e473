"""How long a run takes and what it writes: steps, hours, disk.

Letters: N images, C classes, K sub-centres, D embedding size.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from data_tools.common import files
from data_tools.common.errors import UserError
from launch.planner.backbone_memory import backbone_sizes
from recognition.config import Config

_FP32, _INT64 = 4, 8
_RECORD = (
    6000  # bytes of an aligned JPEG of 112 x 112; three sets of real faces average 4.7 to 6.4 kB
)


class Pace(NamedTuple):
    """Images per second of all GPUs together."""

    images_per_second: float
    source: str  # where the number comes from


class Course(NamedTuple):
    steps: int
    batch: int  # images of an optimiser step
    batch_per_gpu: int  # images that a GPU holds at once
    epochs: float
    hours: float | None  # None: no pace was stated
    disk: dict[str, float]  # bytes, by part
    unmeasured: list[str]  # what the numbers assume


def course(cfg: Config, num_classes: int, num_images: int, gpus: int, pace: Pace | None) -> Course:
    """Steps, hours and bytes on the disk of the run that `cfg` describes.

    Raises:
        KeyError, TypeError, ValueError: there is no such network, or it takes no `network_args`.
    """
    steps, batch = cfg.total_steps(num_images, gpus), cfg.global_batch(gpus)
    seconds = steps * batch / pace.images_per_second if pace else None
    shards = [file for rec in cfg.recs if files.is_dir(rec) for file in Path(rec).glob("*.rec")]
    records = sum(file.stat().st_size for file in shards)
    each, count = checkpoint_bytes(cfg, num_classes), _num_checkpoints(cfg, steps)
    unmeasured = []
    if not records:
        unmeasured.append(f"shards: {_RECORD / 1000:g} kB an image, since rec is not here")
    if pace:
        unmeasured.append(f"hours: {pace.source}; verifications and saves come on top")
    return Course(
        steps,
        batch,
        math.ceil(batch / gpus / cfg.accumulation),
        steps * batch / num_images,
        None if seconds is None else seconds / 3600,
        {
            "shards": records or num_images * _RECORD,
            f"{count} checkpoints": each * count,
            "embeddings, if stored": num_images * cfg.embedding_size * _FP32,
        },
        unmeasured,
    )


def checkpoint_bytes(cfg: Config, num_classes: int) -> float:
    """The bytes of one checkpoint: weights and optimiser state of the classes and the backbone."""
    states = 2 if cfg.optimizer == "adamw" else 1
    rows = num_classes * cfg.num_subcenters
    votes = rows * _INT64 if cfg.num_subcenters > 1 else 0  # of sub-centres, for the log
    backbone = backbone_sizes(cfg, 1)
    return (
        rows * cfg.embedding_size * _FP32 * (1 + states)
        + votes
        + backbone.weights * (1 + states)
        + backbone.statistics
    )


def _num_checkpoints(cfg: Config, steps: int) -> int:
    """The most that lie in the run directory at once: the new one is complete before one goes."""
    saved = math.ceil(steps / cfg.checkpoint_every)
    lasting = steps // cfg.keep_every if cfg.keep_every else 0
    return min(saved, cfg.keep_checkpoints + 1 + lasting + (cfg.keep_best is not None))


def measured_pace(run: str, gpus: int) -> Pace:
    """The pace of a finished or running training, scaled to `gpus` processes.

    Raises:
        FileNotFoundError: `run` has no metrics.jsonl.
        UserError: the training has logged no step yet.
    """
    lines = files.read_bytes(Path(run) / "metrics.jsonl").decode().splitlines()
    paces = [r["images_per_second"] for line in lines if "loss" in (r := json.loads(line))]
    if not paces:
        raise UserError(f"--measured {run}: its metrics.jsonl holds no training step yet")
    world = json.loads(files.read_bytes(Path(run) / "config.json"))["world"]
    median = statistics.median(paces[len(paces) // 2 :])
    return Pace(
        median * gpus / world,
        f"{run} made {median:.0f} images/s on {world} processes; the pace may not scale so evenly",
    )
