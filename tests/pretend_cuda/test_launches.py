"""How many kernels and copies a step launches: a GPU takes some five microseconds for each.

A changed number is no fault, but it must not pass unseen. If it is worth it, state the new number
here; the failing test prints it.
"""

from __future__ import annotations

import pytest

from tests.pretend_cuda import pool, scenes_head, scenes_training
from tests.pretend_cuda.scenes_head import Way

HEAD = {
    ("arcface", Way()): 253,
    ("arcface", Way(sample_rate=1.0)): 232,
    ("arcface", Way(in_backward=True)): 249,
    ("arcface", Way(precision="bf16", optimizer="adamw")): 284,
    ("arcface", Way(form="fused")): 310,
    ("arcface", Way(subcenters=3)): 295,
    ("adaface", Way()): 278,
    ("kappaface", Way()): 264,
}
TRAINING = [
    ({"precision": "fp32"}, 643),
    ({"precision": "bf16", "clip_norm": 5.0, "sync_bn": True}, 1907),
]


@pytest.mark.parametrize("case, way", HEAD, ids=str)
def test_a_step_of_the_head(case, way):
    """203 classes in pieces of 64, 12 rows, one rank."""
    assert pool.run(1, scenes_head.launches, case, way) == [HEAD[case, way]]


@pytest.mark.parametrize("keys, launches", TRAINING, ids=str)
def test_a_whole_step(keys, launches, shards_dir):
    """The network mbf_tiny, eight images, one rank."""
    assert pool.run(1, scenes_training.launches, str(shards_dir), keys) == [launches]
