"""A run that is stopped and continued is the one that was not, bit for bit, at the same number of
processes: every loss, at any step of an epoch, both loaders, every mode."""

from __future__ import annotations

import json

import pytest
import torch

from recognition.losses import MARGINS
from tests import ranks
from tests.recognition import runs
from tests.recognition.losses.cases import CASES

# 128 images in batches of 24: the epoch ends in step 6.
KEYS = {"precision": "fp32", "global_batch_size": 24, "max_steps": 8, "lr": 0.02}

MODES = {
    "fp16": {"precision": "fp16", "global_batch_size": 4, "max_steps": 4},
    "fp64, sync_bn": {"precision": "fp64", "sync_bn": True, "max_steps": 4},
    "bf16, AdamW": {"precision": "bf16", "optimizer": "adamw", "lr": 1e-3, "max_steps": 4},
    "accumulation, AdamW, dali": {
        "accumulation": 3, "optimizer": "adamw", "lr": 1e-3, "loader": "dali",
    },
    "augmented, block shuffle, dali": {
        "loader": "dali", "crop_augmentation_prob": 0.5, "shuffle_block": 5, "shuffle_window": 3,
    },
    "no clipping, cosine, warm-up": {
        "clip_norm": None, "schedule": "cosine", "warmup_epochs": 0.5, "sample_rate": 0.1,
    },
}  # fmt: skip


def check(keys, tmp_path, stops):
    unbroken = ranks.run(2, runs.run, keys | {"output": str(tmp_path / "unbroken")})[0]
    losses = logged(tmp_path / "unbroken")
    for stop in stops:
        own = keys | {"output": str(tmp_path / str(stop))}
        ranks.run(2, runs.run, own, stop)
        continued = ranks.run(2, runs.run, own)[0]
        assert unbroken.keys() == continued.keys()
        for name, value in unbroken.items():
            assert torch.equal(continued[name], value), f"{name}, stopped after step {stop}"
        assert logged(tmp_path / str(stop)) == losses[stop:]


def logged(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def test_every_loss_is_among_the_cases():
    assert {name for name, _ in CASES.values()} == set(MARGINS)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_loss(case, shards_dir, tmp_path):
    name, arguments = CASES[case]
    keys = KEYS | {"rec": str(shards_dir), "margin": name, "margin_args": arguments}
    check(keys, tmp_path, [4])


@pytest.mark.parametrize(
    "mode", [m if m == "fp16" else pytest.param(m, marks=pytest.mark.long) for m in MODES]
)
def test_every_mode(mode, shards_dir, tmp_path):
    check(KEYS | {"rec": str(shards_dir)} | MODES[mode], tmp_path, [2])


@pytest.mark.long
@pytest.mark.parametrize("loader", ["cpu", "dali"])
def test_stopped_at_any_step_of_an_epoch(loader, shards_dir, tmp_path):
    """KappaFace computes its margins at the end of the epoch, which is in step 6."""
    keys = KEYS | {"rec": str(shards_dir), "margin": "kappaface", "loader": loader}
    check(keys, tmp_path, range(1, 8))
