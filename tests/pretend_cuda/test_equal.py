"""Two ranks of unequal batches on the pretend devices train as two on the CPU, bit for bit."""

from __future__ import annotations

import pytest

from tests.pretend_cuda import pool, scenes_equal
from tests.pretend_cuda.scenes_head import Way
from tests.recognition.losses.cases import CASES

WAYS = [
    Way(sample_rate=1.0),
    Way(optimizer="adamw"),
    Way(storage="host", in_backward=True),
    Way(storage="host", sample_rate=1.0, optimizer="adamw", in_backward=True),
    Way(form="fused", threshold=0.2),
    Way(micro_steps=2, subcenters=3),
    Way(storage="host", micro_steps=2, optimizer="adamw"),
    Way(storage="host", sample_rate=1.0, micro_steps=2),
]


def jobs(case: str) -> list[tuple[str, Way]]:
    alone = case in ("interface-dd", "interface-dc")  # they compare one centre a class
    return [(case, way) for way in WAYS if not (alone and way.subcenters > 1)]


@pytest.mark.parametrize("case", ["arcface", "curricularface", "kappaface", "sphereface2"])
def test_ranks_on_the_device_train_as_on_the_cpu(case):
    assert pool.run(2, scenes_equal.differences, jobs(case)) == [{}, {}]


@pytest.mark.parametrize("start", range(0, len(CASES), 8))
def test_every_loss_trains_as_on_the_cpu(start):
    some = [(case, WAYS[number % 5]) for number, case in enumerate(CASES)][start : start + 8]
    assert pool.run(2, scenes_equal.differences, some) == [{}, {}]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_loss_trains_as_on_the_cpu_in_every_way(case):
    assert pool.run(2, scenes_equal.differences, jobs(case)) == [{}, {}]
