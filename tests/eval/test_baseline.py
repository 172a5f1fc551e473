"""Hundreds of generated cases against the field's own algorithms, written plainly in
launch/bench/plain_metrics.py: ties, duplicates, tiny sets, one-sided sets."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from eval import identification, roc, templates, verification
from launch.bench import plain_metrics as baseline

FARS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]


def scored(rng):
    """Scores of 2 to 3000 pairs: continuous, rounded to a few levels, or doubled."""
    num = int(np.exp(rng.uniform(np.log(2), np.log(3000))))
    labels = rng.random(num) < rng.choice([0.01, 0.2, 0.5, 0.9])
    labels[rng.permutation(num)[:2]] = [True, False]
    values = rng.normal(size=num) + rng.choice([0, 1, 3, 10]) * labels
    kind = rng.integers(4)
    if kind == 1:
        values = np.round(values, int(rng.integers(0, 3)))
    elif kind == 2:
        half = rng.integers(0, num, num)
        values, labels = values[half], labels[half]
    elif kind == 3:
        values = values.astype(np.float32)
    if labels.all() or not labels.any():
        labels[0] = not labels[0]
    return values, labels


@pytest.mark.parametrize("seed", range(8))
def test_both_far_rules(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        values, labels = scored(rng)
        targets = FARS + list(rng.random(3))
        nearest, strict = baseline.tars(labels, values, targets)
        points = roc.curve(values, labels)
        np.testing.assert_array_equal(roc.tar_on(points, targets), nearest)
        np.testing.assert_array_equal(roc.tar_on(points, targets, "strict"), strict)
        assert roc.area_of(points) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)


def test_collinear_points_of_a_run_of_ties_are_dropped():
    # Diagonal and horizontal runs in which the two rules give different answers.
    values = np.repeat(np.arange(9.0, 0, -1), 2)
    labels = np.tile([True, False], 9)
    nearest, strict = baseline.tars(labels, values, [0.45])
    assert roc.tar_at_far(values, labels, [0.45])[0] == nearest[0]
    assert roc.tar_at_far(values, labels, [0.45], "strict")[0] == strict[0]
    assert nearest[0] != strict[0]


@pytest.mark.parametrize("seed", range(40))
def test_pooling(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 1500))
    features = rng.normal(size=(num, 7)).astype([np.float32, np.float64][seed % 2])
    ids = rng.integers(0, max(1, num // 4), num) * 3 + 5
    media = rng.integers(-2, 4, num) + 10 * ids  # several images of one medium, in any order
    weights = rng.random(num)
    found, pooled = templates.pool(features, ids, media, weights)
    wanted, expected = baseline.pool(features * weights[:, None], ids, media)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(templates.normalised(pooled), expected, rtol=0, atol=1e-6)
    plain = templates.pool(features.astype(np.float64), ids, media)[1]
    exact = baseline.pool(features.astype(np.float64), ids, media)[1]
    np.testing.assert_allclose(templates.normalised(plain), exact, rtol=0, atol=1e-13)


def test_a_template_without_direction_stays_zero():
    _, pooled = templates.pool(np.array([[1.0, 2.0], [-1.0, -2.0]]), [4, 4], [1, 2])
    np.testing.assert_array_equal(templates.normalised(pooled), [[0, 0]])


@pytest.mark.parametrize("seed", range(30))
def test_scores_of_pairs(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 400))
    x = templates.normalised(rng.normal(size=(num, 16)))
    pairs = int(rng.choice([0, 1, 50, 5000]))
    if seed % 3 == 0:  # a gallery against probes
        first, second = rng.integers(0, max(1, num // 5), pairs), rng.integers(0, num, pairs)
    else:
        first, second = rng.integers(0, num, (2, pairs))
    found = templates.pair_scores(x, first, second, tile=int(rng.choice([3, 64, 1024])))
    np.testing.assert_allclose(found, np.sum(x[first] * x[second], axis=1), rtol=0, atol=1e-14)
    if pairs > 1:
        ids = np.arange(num)
        plain = baseline.scores(ids, x, first, second)
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(12))
def test_ten_folds(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(10, 400))
    issame = rng.random(num) < 0.5
    first = rng.normal(size=(num, 8))
    second = np.where(issame[:, None], first, rng.normal(size=(num, 8)))
    second += rng.choice([0.3, 1.0]) * rng.normal(size=(num, 8))
    embeddings = np.stack([first, second], 1).reshape(-1, 8)
    if seed % 3 == 0:
        embeddings = np.round(embeddings)  # distances that come back
    mean, std, folds, chosen = baseline.ten_fold(embeddings, issame)
    found = verification.evaluate(embeddings, issame)
    assert found["accuracy_mean"] == mean and found["accuracy_std"] == std
    assert found["fold_accuracy"] == folds
    np.testing.assert_allclose(found["best_thresholds"], chosen, rtol=0, atol=1e-12)
    if seed < 3:
        *_, value, far = baseline.evaluate(embeddings, issame)
        np.testing.assert_allclose([found["val_mean"], found["val_far_mean"]], [value, far], 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_search(seed):
    rng = np.random.default_rng(seed)
    people, probes = int(rng.integers(1, 40)), int(rng.integers(2, 200))
    gallery = rng.normal(size=(people, 6))
    ids = rng.permutation(100)[:people]
    probe_ids = rng.integers(0, 100, probes)
    probe_ids[0], probe_ids[1] = ids[0], 1000  # at least one of both kinds
    probe = rng.normal(size=(probes, 6))
    if seed % 2:  # few levels: ties between subjects and with the threshold
        gallery, probe = np.sign(gallery), np.sign(probe)
    found = identification.evaluate(gallery, ids, probe, probe_ids)
    expected = baseline.search(gallery, ids, probe, probe_ids)
    for key in ("rank1", "rank5", "rank10"):
        assert found[key] == expected[key]
    for x in (0.01, 0.1):
        assert found["tpir_at_fpir"][x] == expected[x]


def test_the_old_rule_of_1n():
    rng = np.random.default_rng(0)
    gallery, ids = rng.normal(size=(30, 8)), rng.permutation(30)
    probe_ids = rng.integers(0, 30, 200)
    order = np.argsort(ids)
    probe = gallery[order[probe_ids]] + 1.2 * rng.normal(size=(200, 8))
    similarity = probe @ gallery.T
    own = similarity[np.arange(200), order[probe_ids]]
    others = np.sort(similarity[probe_ids[:, None] != ids])[::-1]
    found = identification.legacy(gallery, ids, probe, probe_ids)
    for x in (0.01, 0.1):
        assert found["recall_at_far"][x] == np.mean(own > others[int(np.ceil(x * 200)) - 1])
    rank = (similarity > own[:, None]).sum(axis=1)
    assert found["rank5"] == np.mean(rank < 5)
    with pytest.raises(ValueError, match="99 is in no gallery"):
        identification.legacy(gallery, ids, probe[:1], [99])
    with pytest.raises(ValueError, match="several gallery templates"):
        identification.legacy(gallery, np.zeros(30), probe[:1], [0])


def test_mean_over_galleries():
    eye = np.eye(4)
    one = identification.search(eye[:2], [0, 1], eye, [0, 1, 2, 3])
    other = identification.search(eye[2:], [2, 9], eye, [0, 1, 2, 3])
    found = identification.mean_of([one, other])
    assert found["rank1"] == 1.0  # 3 mated searches of 3
    assert found["tpir_at_fpir"][0.1] == 0.5  # a stranger looks like 9 of the second gallery
    np.testing.assert_array_equal(identification.cmc([one, other], 3), [1, 1, 1])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: templates.pool(np.ones((2, 3)), [1], [1, 2]), "2 features with"),
        (lambda: templates.pool(np.ones((0, 3)), [], []), "0 features"),
        (lambda: templates.pool(np.array([[1.0], [np.nan]]), [1, 2], [1, 2]), "image 1 is not fin"),
        (lambda: templates.pool(np.ones((2, 1)), [1, 2], [1, 2], [1, np.inf]), "image 1 is not f"),
        (lambda: templates.pair_scores(np.eye(3), [0, 3], [1, 2]), "outside the 3 templates"),
        (lambda: templates.pair_scores(np.eye(3), [0], [1, 2]), "two arrays"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message), np.errstate(invalid="ignore"):
        make()
