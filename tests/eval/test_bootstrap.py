"""The intervals: against a plain loop over resamples, and whether they cover."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from eval import bootstrap, roc


def scored(seed, num=600, gap=2.0, digits=8):
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 2 == 0
    return np.round(rng.normal(size=num) + gap * labels, digits), labels


@pytest.mark.parametrize("digits", [8, 1])
def test_equals_a_plain_loop_over_the_same_resamples(digits):
    values, labels = scored(0, 80, digits=digits)
    found = bootstrap.intervals(values, labels, [0.05, 0.1], resamples=60, seed=5)
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    rng = np.random.default_rng(5)
    weight = np.empty((60, 80))
    for kind in (labels, ~labels):
        weight[:, kind] = rng.multinomial(40, np.full(40, 1 / 40), size=60)
    tars, eers, aucs = [], [], []
    for row in weight.astype(int):
        one, other = np.repeat(values, row), np.repeat(labels, row)
        tars.append(roc.tar_at_far(one, other, [0.05, 0.1], "strict"))
        eers.append(roc.eer(one, other))
        aucs.append(roc_auc_score(other, one))
    for i, x in enumerate((0.05, 0.1)):
        expected = np.quantile(np.array(tars)[:, i], [0.025, 0.975])
        np.testing.assert_allclose(found["tar_at_far"][x], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["auc"], np.quantile(aucs, [0.025, 0.975]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["eer"], np.quantile(eers, [0.025, 0.975]), rtol=0, atol=1e-12)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    from math import erf

    truth = 0.5 * (1 + erf(2.0 / 2))  # P(N(2, 1) > N(0, 1))
    inside = 0
    for seed in range(60):
        values, labels = scored(seed, 300)
        low, high = bootstrap.intervals(values, labels, [0.1], resamples=200)["auc"]
        inside += low <= truth <= high
    assert 50 <= inside <= 60  # 57 expected, four standard deviations below is 50


def test_accuracy_interval():
    right = np.array([True] * 90 + [False] * 10)
    low, high = bootstrap.accuracy_interval(right, np.arange(100) % 2 == 0)
    assert low < 0.9 < high and 0.08 < high - low < 0.16  # 4 sqrt(0.9 * 0.1 / 100) = 0.12
    assert bootstrap.accuracy_interval(np.ones(20), np.arange(20) % 2) == (1.0, 1.0)


def test_a_gain_counts_only_beyond_chance():
    values, labels = scored(0)
    better = values + 0.5 * labels
    assert bootstrap.separates_better(values, better, labels)
    assert not bootstrap.separates_better(better, values, labels)
    assert not bootstrap.separates_better(values, values, labels)
    noise = [np.random.default_rng(k).normal(size=600) for k in range(10)]
    real = [bootstrap.separates_better(values, values + 0.3 * x, labels) for x in noise]
    assert sum(real) <= 1
    assert bootstrap.separation([1, 3, 0, 0], [1, 1, 0, 0]) == pytest.approx(2 / np.sqrt(0.5))


def test_a_gain_shows_where_no_pair_is_in_error():
    values, labels = scored(0, gap=12.0)
    wider = np.where(labels, values + 1, values)
    assert roc.auc(values, labels) == roc.auc(wider, labels) == 1
    assert bootstrap.separates_better(values, wider, labels)


@pytest.mark.parametrize(
    "values, labels, message",
    [
        (np.ones(5), np.ones(5), "5 same and 0 different"),
        (np.ones(5), np.ones(4), "need 5 labels"),
        (np.ones(100_001), np.arange(100_001) % 2, "at most 100000"),
    ],
)
def test_refuses(values, labels, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.intervals(values, labels, [0.1])
