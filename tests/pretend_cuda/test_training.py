"""A whole training step does not wait for the host, mix devices or race."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_tools import shards
from tests.pretend_cuda import pool, scenes_training

RUNS = {
    "plain": {},
    "bf16, clip": {"precision": "bf16", "clip_norm": 5.0},
    "fp16, accumulation": {"precision": "fp16", "accumulation": 2},
    "adamw, sync_bn": {"optimizer": "adamw", "sync_bn": True},
    "compile, update_in_backward": {"compile": True, "update_in_backward": True},
    "rows in host memory": {"head_storage": "host", "loss_spike_factor": 3.0},
    "slow encoder": {"margin": "kappaface", "margin_args": {"features": "momentum"}},
}
LONG = {
    "r18": {"network": "r18", "precision": "bf16", "clip_norm": 5.0},
    "mbf": {"network": "mbf", "sync_bn": True},
    "vit": {"network": "vit_t", "optimizer": "adamw", "clip_norm": 1.0},
}


def check(rec, keys):
    ((wrong, _, loss),) = pool.run(1, scenes_training.steps, str(rec), keys)
    assert wrong == []
    assert math.isfinite(loss)


@pytest.mark.parametrize("run", RUNS)
def test_a_step_is_clean(run, shards_dir):
    check(shards_dir, RUNS[run])


def test_a_step_with_a_teacher_copies_its_embeddings_without_a_wait(shards_dir, tmp_path):
    images = shards.open(shards_dir).num_images
    rows = np.random.default_rng(1).normal(size=(images, 32)).astype(np.float32)
    np.save(tmp_path / "teacher.npy", rows)
    check(shards_dir, {"teacher": str(tmp_path / "teacher.npy"), "teacher_loss": "feature"})


def test_a_step_of_two_ranks_is_clean(shards_dir):
    answers = pool.run(2, scenes_training.steps, str(shards_dir), {"sync_bn": True})
    assert [wrong for wrong, _, _ in answers] == [[], []]
    assert answers[0][2] == answers[1][2]


@pytest.mark.parametrize(
    "keys, products",
    [
        ({"precision": "bf16"}, "bf16"),
        ({}, "bf16"),  # precision=auto is bf16 on such a GPU
        ({"precision": "bf16", "head_precision": "full"}, "full"),
        ({"precision": "fp16"}, "full"),
        ({"precision": "fp32", "head_precision": "bf16"}, "bf16"),
    ],
)
def test_the_heads_products_are_bf16_where_the_run_is(keys, products, shards_dir):
    ((dtype, said, messages),) = pool.run(1, scenes_training.products, str(shards_dir), keys)
    assert (dtype == "torch.bfloat16") == (products == "bf16")
    assert said == products
    is_automatic = products == "bf16" and "head_precision" not in keys
    assert any("head_precision=auto" in line for line in messages) == is_automatic


@pytest.mark.long
@pytest.mark.parametrize("run", LONG)
def test_a_step_of_a_real_network_is_clean(run, shards_dir):
    check(shards_dir, LONG[run])
