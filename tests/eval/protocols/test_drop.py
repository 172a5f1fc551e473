"""What is lost between two embedders on the same pairs."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.verification_bin import PairSet
from eval.protocols import drop
from tests.eval.made import tinted


def test_far_that_a_set_can_show():
    assert [drop.far_of(n) for n in (3, 49, 50, 500, 4999, 5000, 3_000_000)] == pytest.approx(
        [1, 1, 0.1, 0.01, 0.01, 0.001, 1e-5]
    )


def test_thinned_sets_keep_pairs_together():
    pairs = PairSet("made", [bytes([i]) for i in range(100)], np.arange(50) % 3 == 0)
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
    pairs = PairSet("made", encoded, np.array(issame))
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


def test_all_pairs_of_some_people():
    """Against loops over pairs."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 112, 112, 3), dtype=np.uint8)
    people = np.arange(30) % 6
    table = {id_: random.normal(size=8) + 2 * np.eye(8)[people[i]] for i, id_ in enumerate(
        images[:, 0, 0].astype(int).dot([65536, 256, 1]))}  # fmt: skip

    def network(noise):
        def forward(batch):
            keys = batch[:, 0, 0].astype(int).dot([65536, 256, 1])
            return np.stack([table[key] + noise * np.sin(np.arange(8) * key) for key in keys])

        return forward

    found = drop.of_people(network(0), network(0.5), images, people, [0.1, 0.01], batch_size=7)
    for forward, tars in ((network(0), found["torch"]), (network(0.5), found["file"])):
        e = forward(images)
        e /= np.linalg.norm(e, axis=1, keepdims=True)
        same, other = [], []
        for i in range(30):
            for j in range(i):
                (same if people[i] == people[j] else other).append(e[i] @ e[j])
        for far, tar in zip([0.1, 0.01], tars, strict=True):
            accepted = [t for t in sorted(same + other) if np.mean(np.array(other) >= t) <= far]
            assert tar == pytest.approx(np.mean(np.array(same) >= min(accepted)))
    assert found["pairs"] == 435 and found["same"] == len(same) == 60
    assert found["tar_drop"] == pytest.approx(
        [100 * (a - b) for a, b in zip(found["torch"], found["file"], strict=True)]
    )
