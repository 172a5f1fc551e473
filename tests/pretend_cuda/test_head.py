"""A step of the head does not wait for the host, mix devices or race, for every loss and way."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.pretend_cuda import pool, scenes_head
from tests.pretend_cuda.scenes_head import Way
from tests.recognition.losses.cases import CASES

ALL = [
    way
    for way in itertools.starmap(
        Way,
        itertools.product(
            ("plain", "fused"), ("device", "host"), (1.0, 0.3), ("sgd", "adamw"),
            ("fp32", "bf16", "fp16"), (1, 3), (False, True), (1, 3),
        ),
    )
    if way.is_possible()
]  # fmt: skip


def pairwise(ways: list[Way], seed: int) -> list[Way]:
    """Some of the ways, in which every pair of two options' values stands that stands in any."""
    wanted = {pair for way in ways for pair in _pairs(way)}
    order, chosen = random.Random(seed).sample(ways, len(ways)), []
    while wanted:
        best = max(order, key=lambda way: len(_pairs(way) & wanted))
        chosen.append(best)
        wanted -= _pairs(best)
    return chosen


def _pairs(way: Way) -> set:
    return set(itertools.combinations(enumerate(way), 2))


def test_the_pairwise_ways_hold_every_pair_of_options():
    chosen = pairwise(ALL, 1)
    assert len(chosen) < len(ALL) / 5
    assert {p for way in chosen for p in _pairs(way)} == {p for way in ALL for p in _pairs(way)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_clean(case):
    seed = list(CASES).index(case)  # another selection for each loss
    jobs = [(case, way) for way in pairwise(ALL, seed)]
    jobs += [(case, Way(threshold=0.2)), (case, Way(labels_on="host", storage="host"))]
    assert pool.run(1, scenes_head.steps, jobs) == [{}]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_clean_in_every_way(case):
    for start in range(0, len(ALL), 100):
        jobs = [(case, way) for way in ALL[start : start + 100]]
        assert pool.run(1, scenes_head.steps, jobs) == [{}]
