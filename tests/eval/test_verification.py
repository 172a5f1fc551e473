"""Against loops that spell the protocol out, and against scikit-learn's roc_curve."""

import numpy as np
import pytest
from sklearn.metrics import auc as sklearn_auc
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from eval import verification

FARS = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]


def pairs(rng, num_pairs, noise=1.0, dim=8):
    """Embeddings [2P, D] of pairs that share a direction when same, and issame [P]."""
    issame = rng.random(num_pairs) < rng.uniform(0.2, 0.8)
    first = rng.normal(size=(num_pairs, dim))
    second = np.where(issame[:, None], first, rng.normal(size=(num_pairs, dim)))
    embeddings = np.stack([first, second], axis=1).reshape(2 * num_pairs, dim)
    return embeddings + noise * rng.normal(size=embeddings.shape), issame


def plain_accuracy(embeddings, issame):
    """One fold and one threshold at a time, with scikit-learn's folds and normalisation."""
    unit = normalize(np.asarray(embeddings, dtype=np.float64))
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    accuracies, chosen = [], []
    for train, test in KFold(10, shuffle=False).split(distance):
        best, best_accuracy = None, -1.0
        for i in range(400):
            called = np.less(distance[train], i * 0.01)
            accuracy = float(np.sum(called == issame[train])) / len(train)
            if accuracy > best_accuracy:
                best, best_accuracy = i * 0.01, accuracy
        called = np.less(distance[test], best)
        accuracies.append(float(np.sum(called == issame[test])) / len(test))
        chosen.append(best)
    return np.mean(accuracies), np.std(accuracies), accuracies, chosen


def plain_val(embeddings, issame, target=1e-3):
    unit = normalize(np.asarray(embeddings, dtype=np.float64))
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    vals, fars, chosen = [], [], []
    for train, test in KFold(10, shuffle=False).split(distance):
        negatives = distance[train][~issame[train]]
        allowed = [
            t for t in np.arange(4000) * 0.001 if np.sum(negatives < t) <= target * len(negatives)
        ]
        chosen.append(max(allowed))
        called = distance[test] < chosen[-1]
        vals.append(np.sum(called & issame[test]) / max(1, np.sum(issame[test])))
        fars.append(np.sum(called & ~issame[test]) / max(1, np.sum(~issame[test])))
    return np.mean(vals), np.std(vals), np.mean(fars), chosen


@pytest.mark.parametrize("num_pairs", [10, 11, 37, 99, 600, 603])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_accuracy_equals_the_plain_definition_to_the_last_bit(num_pairs, noise):
    rng = np.random.default_rng([num_pairs, int(10 * noise)])
    embeddings, issame = pairs(rng, num_pairs, noise)
    result = verification.evaluate(embeddings, issame)
    mean, std, accuracies, chosen = plain_accuracy(embeddings, issame)
    assert result["accuracy_mean"] == mean
    assert result["accuracy_std"] == std
    assert result["fold_accuracy"] == accuracies
    assert result["best_thresholds"] == chosen


def plain_balanced(embeddings, issame):
    unit = normalize(np.asarray(embeddings, dtype=np.float64))
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    called = np.zeros(len(distance), bool)
    for train, test in KFold(10, shuffle=False).split(distance):
        scores = [
            balanced_accuracy_score(issame[train], distance[train] < t)
            for t in np.arange(400) * 0.01
        ]
        called[test] = distance[test] < np.arange(400)[np.argmax(scores)] * 0.01
    return balanced_accuracy_score(issame, called)


@pytest.mark.parametrize("share", [0.1, pytest.param(0.5, marks=pytest.mark.long)])
def test_balanced_accuracy_equals_the_plain_definition(share):
    rng = np.random.default_rng(int(100 * share))
    issame = rng.random(163) < share
    first, other = rng.normal(size=(2, 163, 16))
    second = np.where(issame[:, None], first, other) + rng.normal(size=(163, 16))
    embeddings = np.stack([first, second], axis=1).reshape(-1, 16)
    found = verification.balanced_accuracy(verification.distances(embeddings), issame)
    assert found == pytest.approx(plain_balanced(embeddings, issame), abs=1e-12)


def test_accepting_everything_is_worth_nothing_when_balanced():
    rng = np.random.default_rng(0)
    embeddings, issame = rng.normal(size=(2 * 1163, 32)), np.arange(1163) % 12 > 0
    assert verification.evaluate(embeddings, issame)["accuracy_mean"] > 0.9
    found = verification.balanced_accuracy(verification.distances(embeddings), issame)
    assert found == pytest.approx(0.5, abs=0.06)


def test_distances_that_fall_on_thresholds_are_not_below_them():
    # Unit vectors at right angles lie at exactly 2.00, equal ones at 0.00: "same" needs d < t.
    east, north = [1.0, 0.0], [0.0, 3.0]
    embeddings = np.array([east, east, east, north] * 10)
    issame = np.array([True, False] * 10)
    result = verification.evaluate(embeddings, issame)
    assert result["accuracy_mean"] == 1.0
    assert result["best_thresholds"] == [0.01] * 10  # the first that is above 0, not 0.00


def test_val_uses_the_largest_threshold_within_the_far():
    rng = np.random.default_rng(3)
    embeddings, issame = pairs(rng, 4000, noise=0.4)
    result = verification.evaluate(embeddings, issame)
    mean, std, far, chosen = plain_val(embeddings, issame)
    assert result["val_mean"] == mean and result["val_std"] == std
    assert result["val_far_mean"] == far
    assert result["val_thresholds"] == chosen
    assert 0 < result["val_mean"] < 1


def test_val_allows_a_far_of_exactly_the_target():
    # Each of two folds: 1000 different pairs, one of them equal vectors, the others at distance 2.
    east, north = [1.0, 0.0], [0.0, 1.0]
    different = [east, east] + [east, north] * 999
    same = [east, east] * 500
    issame = np.array(([False] * 1000 + [True] * 500) * 2)
    result = verification.evaluate(np.array((different + same) * 2), issame, folds=2)
    assert result["val_thresholds"] == [2.0, 2.0]  # the largest that 2.00 is not below
    assert result["val_mean"] == 1.0 and result["val_far_mean"] == 1e-3


def test_rows_of_zeros_and_float32_rows():
    embeddings = np.zeros((40, 4), dtype=np.float32)
    embeddings[0::2, 0] = 5
    assert verification.distances(embeddings).tolist() == [1.0] * 20
    rng = np.random.default_rng(0)
    wide, issame = pairs(rng, 50)
    narrow = wide.astype(np.float32)
    assert verification.evaluate(narrow, issame) == verification.evaluate(
        narrow.astype(np.float64), issame
    )


def test_one_kind_of_pair_has_an_accuracy_but_no_roc():
    rng = np.random.default_rng(0)
    embeddings, _ = pairs(rng, 30)
    issame = np.ones(30, dtype=bool)
    result = verification.evaluate(embeddings, issame)
    assert result["auc"] is None and result["eer"] is None
    assert result["accuracy_mean"] == plain_accuracy(embeddings, issame)[0]


@pytest.mark.parametrize(
    "embeddings, issame, message",
    [
        (np.ones((19, 4)), np.ones(10), "2 \\* pairs"),
        (np.ones((20,)), np.ones(10), "2 \\* pairs"),
        (np.ones((20, 4)), np.ones(9), "10 pairs need 10 labels"),
        (np.ones((20, 4)), np.full(10, 2), "0 or 1, not 2"),
        (np.ones((18, 4)), np.ones(9), "9 pairs cannot be split into 10 folds"),
        (np.ones((0, 4)), np.ones(0), "2 \\* pairs"),
    ],
)
def test_bad_shapes_and_labels_are_refused(embeddings, issame, message):
    with pytest.raises(ValueError, match=message):
        verification.evaluate(embeddings, issame)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_embeddings_without_a_finite_norm_are_named(bad):
    embeddings = np.ones((40, 4))
    embeddings[7, 2] = bad
    with pytest.raises(ValueError, match="embedding 7 \\(pair 3\\)"):
        verification.evaluate(embeddings, np.ones(20))


def nearest_by_sklearn(scores, labels, fars):
    """The rule of the IJB scripts on scikit-learn's curve."""
    fpr, tpr, _ = roc_curve(labels, scores)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    return [tpr[min(zip(abs(fpr - x), range(len(fpr)), strict=True))[1]] for x in fars]


def largest_within(scores, labels, fars):
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return [tpr[fpr <= x].max() for x in fars]


def random_case(seed):
    """Scores and labels from 2 to 600 pairs: continuous, heavily tied or constant."""
    rng = np.random.default_rng(seed)
    num = int(rng.choice([2, 3, 4, 7, 30, 200, 600]))
    labels = rng.random(num) < rng.choice([0.05, 0.3, 0.5, 0.9])
    labels[:2] = [True, False]
    scores = rng.normal(size=num) + labels * rng.choice([0.0, 0.5, 3.0])
    levels = rng.choice([0, 1, 2, 5, 20])
    if levels:
        scores = np.round(scores * levels) / levels
    if rng.random() < 0.1:
        scores = np.zeros(num)
    if rng.random() < 0.3:
        scores = scores.astype(np.float32)
    fars = np.concatenate((FARS, rng.random(4), [0.0, 1.0, 1 / max(1, np.sum(~labels))]))
    return scores, labels, fars


@pytest.mark.parametrize("block", range(10))
def test_tar_at_far_equals_the_scikit_learn_rules(block):
    for seed in range(100 * block, 100 * block + 100):
        scores, labels, fars = random_case(seed)
        ours = verification.tar_at_far(scores, labels, fars)
        assert ours.tolist() == nearest_by_sklearn(scores, labels, fars), seed
        strict = verification.tar_at_far(scores, labels, fars, rule="strict")
        assert strict.tolist() == largest_within(scores, labels, fars), seed


def test_the_two_rules_differ_where_the_nearest_far_is_above_the_target():
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    labels = [1, 0, 1, 0, 1, 0]  # FAR moves in thirds
    assert verification.tar_at_far(scores, labels, [0.3]).tolist() == [2 / 3]
    assert verification.tar_at_far(scores, labels, [0.3], rule="strict").tolist() == [1 / 3]


def test_collinear_points_are_dropped_before_the_nearest_is_taken():
    # Impostors 0.8 .. 0.5 lie in one horizontal run from FAR 0 to 0.8. Its inner points are
    # dropped, so the nearest point to 0.41 is the far end of the run, where TAR is already 1.
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    labels = [1, 0, 0, 0, 0, 1, 0]
    far, tar, _ = verification.roc(scores, labels)
    assert tar[far == 0.4].tolist() == [0.5]
    assert verification.tar_at_far(scores, labels, [0.39, 0.4, 0.41]).tolist() == [0.5, 1.0, 1.0]
    assert verification.tar_at_far(scores, labels, [0.41], rule="strict").tolist() == [0.5]


def test_roc_auc_and_eer():
    for seed in range(200):
        scores, labels, _ = random_case(seed)
        fpr, tpr, thresholds = roc_curve(labels, scores, drop_intermediate=False)
        far, tar, ours = verification.roc(scores, labels)
        assert far.tolist() == fpr.tolist() and tar.tolist() == tpr.tolist()
        assert ours.tolist() == thresholds.tolist()
        assert verification.auc(scores, labels) == pytest.approx(sklearn_auc(fpr, tpr), abs=1e-12)
        assert verification.auc(scores, labels) == pytest.approx(
            roc_auc_score(labels, scores), abs=1e-12
        )
        eer = verification.eer(scores, labels)
        assert np.interp(eer, far, tar) == pytest.approx(1 - eer, abs=1e-9) or eer in far


def test_eer_by_hand():
    # (FAR, TAR): (0, 0) (0, 1/2) (1/2, 1/2) (1/2, 1) (1, 1): the line FAR = 1 - TAR is met at 1/2.
    assert verification.eer([4, 3, 2, 1], [1, 0, 1, 0]) == 0.5
    # A single step from (0, 0) to (1, 1) is met half way.
    assert verification.eer([1, 1, 1], [1, 0, 0]) == 0.5
    assert verification.eer([2, 1], [1, 0]) == 0.0
    assert verification.eer([1, 2], [1, 0]) == 1.0


def test_operating_points_keep_their_promise():
    rng = np.random.default_rng(0)
    labels = rng.random(5000) < 0.3
    scores = np.round(rng.normal(size=5000) + 2 * labels, 2)
    tar, far, thresholds = verification.operating_points(scores, labels, [1e-4, 1e-2, 0.5])
    assert (far <= [1e-4, 1e-2, 0.5]).all()
    for i in range(3):
        accepted = scores >= thresholds[i]
        assert tar[i] == np.sum(accepted & labels) / labels.sum()
        assert far[i] == np.sum(accepted & ~labels) / (~labels).sum()
    below = scores >= thresholds[1] - 0.011  # the next score down breaks the bound
    assert np.sum(below & ~labels) / (~labels).sum() > 1e-2


@pytest.mark.parametrize(
    "scores, labels, fars, rule, message",
    [
        ([1, 2], [1, 1], [0.1], "insightface", "all 2 pairs are 'same' pairs"),
        ([1, 2], [0, 0], [0.1], "strict", "all 2 pairs are 'different' pairs"),
        ([1, np.nan], [0, 1], [0.1], "insightface", "NaN"),
        ([1, 2], [0, 1, 1], [0.1], "insightface", "2 pairs need 2 labels"),
        ([1, 2], [0, 1], [1.5], "insightface", "between 0 and 1"),
        ([1, 2], [0, 1], [0.1], "nearest", "unknown rule 'nearest'"),
    ],
)
def test_tar_at_far_refuses(scores, labels, fars, rule, message):
    with pytest.raises(ValueError, match=message):
        verification.tar_at_far(scores, labels, fars, rule=rule)
