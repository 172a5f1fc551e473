"""The sample of classes: the same at every world size, even, fresh, and without gaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_tools.common.draws import hash_words
from data_tools.load.order import rank_slice
from recognition.head.device_storage import drawn_by_torch
from recognition.head.sampling import Draw, sample


def drawn(num_classes, rate, step, world=1, labels=()):
    """Global ids of all ranks' samples, in rank order."""
    parts = []
    for rank in range(world):
        shard = rank_slice(num_classes, world, rank)
        got = sample(np.array(labels, np.int64), num_classes, shard, rate, 7, step)
        parts.append(np.arange(*shard) if got.classes is None else got.classes)
    return np.concatenate(parts)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 103])
def test_shards_cover_the_classes_and_differ_by_one_at_most(world):
    shards = [rank_slice(103, world, rank) for rank in range(world)]
    assert [s for s, _ in shards[1:]] == [e for _, e in shards[:-1]]
    assert (shards[0][0], shards[-1][1]) == (0, 103)
    sizes = [e - s for s, e in shards]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("num_classes", [1, 2, 103, 1000])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1, 0.3, 0.9, 1.0])
def test_every_world_size_draws_the_same(num_classes, rate):
    labels = np.random.default_rng(3).integers(0, num_classes, 9)
    for step in range(20):
        alone = drawn(num_classes, rate, step, 1, labels)
        assert len(np.unique(alone)) == len(alone)
        assert np.isin(labels, alone).all()
        for world in (2, 3, 7):
            assert sorted(drawn(num_classes, rate, step, world, labels)) == sorted(alone)


def test_rows_point_at_their_class():
    labels = np.random.default_rng(0).integers(0, 1000, 64)
    for rank in range(3):
        shard = rank_slice(1000, 3, rank)
        got = sample(labels, 1000, shard, 0.1, 1, 2)
        assert (got.classes[got.position] == labels[got.owned]).all()
        mine = (labels >= shard[0]) & (labels < shard[1])
        assert sorted(got.owned) == np.flatnonzero(mine).tolist()
        assert (np.diff(got.position) >= 0).all()


@pytest.mark.parametrize("rate, count", [(0.3, 31), (0.1, 11), (0.5, 52), (30 * 0.1 / 103, 3)])
def test_as_many_as_the_rate_says(rate, count):
    assert all(len(drawn(103, rate, step)) == count for step in range(50))


@pytest.mark.parametrize("steps", [6000, pytest.param(20000, marks=pytest.mark.long)])
def test_every_class_is_drawn_equally_often_and_pairs_are_not_tied(steps):
    num_classes, rate = 60, 0.25
    counts = np.zeros(num_classes)
    pairs = np.zeros((num_classes, num_classes))
    for step in range(steps):
        classes = drawn(num_classes, rate, step)
        counts[classes] += 1
        pairs[np.ix_(classes, classes)] += 1
    expected = math.ceil(rate * num_classes) / num_classes
    deviation = (expected * (1 - expected) / steps) ** 0.5
    assert np.abs(counts / steps - expected).max() < 4.5 * deviation  # 60 draws: p < 0.001
    # 15 cells of four classes, their borders as often at any place: two classes at a distance of
    # four or more are drawn independently, nearer ones as often as a border parts them.
    i, j = np.triu_indices(num_classes, 1)
    distance = np.minimum(j - i, num_classes - (j - i))
    together = expected**2 * np.minimum(distance, 4) / 4
    deviation = (together * (1 - together) / steps) ** 0.5
    assert np.abs(pairs[i, j] / steps - together).max() < 5 * deviation.max()  # 1770: p < 0.001
    assert (np.abs(pairs[i, j] / steps - together) < 5.5 * deviation).all()


def test_cells_that_do_not_divide_draw_evenly_too():
    """Every class of 1003 at rate 0.1: the sum of squares of the deviations, as chi-square's."""
    num_classes, rate, steps = 1003, 0.1, 4000
    counts = np.zeros(num_classes)
    for step in range(steps):
        counts[drawn(num_classes, rate, step)] += 1
    share = math.ceil(rate * num_classes) / num_classes
    squares = ((counts - steps * share) ** 2).sum() / (steps * share * (1 - share))
    # Mean C - 1 but for the fixed size of a draw, deviation sqrt(2 C): five of them.
    assert abs(squares - num_classes) < 5 * (2 * num_classes) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_positives_are_always_in_and_change_no_negative(rate):
    for step in range(200):
        labels = np.random.default_rng(step).integers(0, 500, 32)
        alone, beside = set(drawn(500, rate, step)), drawn(500, rate, step, 3, labels)
        assert set(beside) == alone | set(labels) and len(set(beside)) == len(beside)


def test_every_step_and_seed_draws_afresh():
    first = set(drawn(1000, 0.1, 0))
    overlaps = [len(first & set(drawn(1000, 0.1, step))) for step in range(1, 200)]
    assert 5 < np.mean(overlaps) < 15  # chance: 100 * 0.1
    assert max(overlaps) < 40


def test_large_class_counts_do_not_overflow():
    num_classes = 100_000_000
    shard = rank_slice(num_classes, 1024, 1023)
    got = sample(np.array([num_classes - 1, 0]), num_classes, shard, 0.1, 1, 5)
    assert len(got.classes) == pytest.approx(0.1 * num_classes / 1024, rel=0.01)
    assert got.classes.min() >= shard[0] and got.classes.max() < shard[1]
    assert got.classes[got.position[0]] == num_classes - 1


def test_hash_separates_its_words():
    seen = {hash_words(a, b) for a in range(100) for b in range(100)}
    assert len(seen) == 10_000
    assert hash_words(1, 2) != hash_words(2, 1)


@pytest.mark.parametrize("num_classes, rate", [(103, 0.3), (100_000_000, 1e-5), (7, 0.0)])
def test_the_gpus_draw_is_the_hosts(num_classes, rate):
    """In torch's int64, whose shifts are arithmetic: computed here on the CPU."""
    for step in range(20):
        for rank in range(3):
            draw = Draw(num_classes, rank_slice(num_classes, 3, rank), rate, 7, step)
            device = torch.device("cpu")
            assert drawn_by_torch(device, draw).tolist() == draw.classes().tolist()
