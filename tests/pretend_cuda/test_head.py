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


def possible(case: str) -> list[Way]:
    alone = case in ("interface-dd", "interface-dc")  # they compare one centre a class
    return [way for way in ALL if not (alone and way.subcenters > 1)]


def selection() -> dict[str, list[Way]]:
    """A few ways for each loss: every loss meets every value of every option, and over all losses
    every pair of two options' values occurs that occurs in ALL."""
    wanted = set().union(*map(_pairs, ALL))
    chosen: dict[str, list[Way]] = {}
    for number, case in enumerate(CASES):
        ways = possible(case)
        order = random.Random(number).sample(ways, len(ways))
        values, chosen[case] = set().union(*map(_values, ways)), []
        while values:
            best = max(
                order, key=lambda way: (len(_values(way) & values), len(_pairs(way) & wanted))
            )
            chosen[case].append(best)
            values -= _values(best)
            wanted -= _pairs(best)
    return chosen


def _values(way: Way) -> set:
    return {*enumerate(way)}


def _pairs(way: Way) -> set:
    return {*itertools.combinations(enumerate(way), 2)}


SELECTION = selection()


def test_the_selected_ways_hold_every_pair_of_options():
    chosen = [way for ways in SELECTION.values() for way in ways]
    assert len(chosen) < 6 * len(CASES)
    assert set().union(*map(_pairs, chosen)) == set().union(*map(_pairs, ALL))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_clean(case):
    """No wait of the host, no mix of devices, no race of streams."""
    jobs = [(case, way) for way in SELECTION[case]]
    assert pool.run(1, scenes_head.steps, jobs) == [{}]


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("further", [{"threshold": 0.2}, {"micro_steps": 3, "sample_rate": 0.0}])
def test_other_steps_are_clean(further, storage):
    jobs = [(case, Way(storage=storage, **further)) for case in ("arcface", "circle")]
    assert pool.run(1, scenes_head.steps, jobs) == [{}]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_clean_in_every_way(case):
    ways = possible(case)
    for start in range(0, len(ways), 100):
        jobs = [(case, way) for way in ways[start : start + 100]]
        assert pool.run(1, scenes_head.steps, jobs) == [{}]
