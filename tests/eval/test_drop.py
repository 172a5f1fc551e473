"""What is lost between two embedders on the same pairs."""

from __future__ import annotations

import numpy as np
import pytest

from eval import drop, lfw
from tests.eval.made import tinted


def test_far_that_a_set_can_show():
    assert [drop.far_of(n) for n in (3, 49, 50, 500, 4999, 5000, 3_000_000)] == pytest.approx(
        [1, 1, 0.1, 0.01, 0.01, 0.001, 1e-5]
    )


def test_thinned_sets_keep_pairs_together():
    pairs = lfw.PairSet("made", [bytes([i]) for i in range(100)], np.arange(50) % 3 == 0)
    few = drop.thinned(pairs, 12)
    assert len(few.issame) == 12 and len(few.encoded) == 24
    for k in range(12):
        i = few.encoded[2 * k][0] // 2
        assert few.encoded[2 * k + 1] == bytes([2 * i + 1]) and few.issame[k] == pairs.issame[i]
    assert drop.thinned(pairs, 50) is pairs


def mean_colour(images):  # [n, 3], centred so that cosines tell hues apart
    return images.mean((1, 2)) - 128


def test_what_is_lost_is_told_in_points():
    encoded, issame = [], []
    for i in range(100):
        same = i % 2 == 0
        encoded += [tinted(i % 5, 2 * i), tinted((i + (0 if same else 2)) % 5, 2 * i + 1)]
        issame.append(same)
    pairs = lfw.PairSet("made", encoded, np.array(issame))
    counted = []
    same = drop.compare(mean_colour, mean_colour, pairs, progress=counted.append)
    assert same["accuracy_drop"] == same["tar_drop"] == 0 and sum(counted) == 200
    assert same["torch"]["accuracy"] > 0.95 and same["far"] == pytest.approx(0.1)
    assert same["cosine"]["min"] == pytest.approx(1)

    def blind(images):
        return np.ones((len(images), 3))

    lost = drop.compare(mean_colour, blind, pairs)
    assert lost["torch"] == same["torch"]
    assert lost["accuracy_drop"] == pytest.approx(
        100 * (lost["torch"]["accuracy"] - lost["file"]["accuracy"])
    )
    assert lost["file"] == {"accuracy": 0.5, "tar": 0.0}
    gained = drop.compare(blind, mean_colour, pairs)
    assert gained["tar_drop"] == -lost["tar_drop"]
