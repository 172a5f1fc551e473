"""The field's own algorithms written plainly: what ours must equal, and what it is timed against.

Pooling with one np.where per template, scikit-learn's roc_curve, Python loops over thresholds,
folds and probes. It imports nothing of ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

Array = NDArray[Any]


def pool(features: Array, templates: Array, medias: Array) -> tuple[Array, Array]:
    """(unique ids, L2-normalised templates): media mean, then sum, template by template."""
    ids = np.unique(templates)
    pooled = np.zeros((len(ids), features.shape[1]))
    for row, uid in enumerate(ids):
        (faces,) = np.where(templates == uid)
        own, own_media = features[faces], medias[faces]
        parts = []
        for medium, count in zip(*np.unique(own_media, return_counts=True), strict=True):
            (inside,) = np.where(own_media == medium)
            if count == 1:
                parts += [own[inside]]
            else:
                parts += [np.mean(own[inside], axis=0, keepdims=True)]
        pooled[row] = np.sum(np.array(parts), axis=0)
    return ids, normalize(pooled)


def scores(ids: Array, templates: Array, first: Array, second: Array, step: int = 100_000) -> Array:
    """The cosine of each pair of templates, looked up by their ids."""
    place = np.zeros((max(ids) + 1, 1), dtype=int)
    for row, uid in enumerate(ids):
        place[uid] = row
    result = np.zeros(len(first))
    for start in range(0, len(first), step):
        some = slice(start, start + step)
        one, other = templates[place[first[some]].ravel()], templates[place[second[some]].ravel()]
        result[some] = np.sum(one * other, -1).flatten()
    return result


def tars(labels: Array, values: Array, targets: Sequence[float]) -> tuple[Array, Array]:
    """(insightface, strict) at each target."""
    fpr, tpr, _ = roc_curve(labels, values)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    nearest = []
    for target in targets:
        _, index = min(list(zip(abs(fpr - target), range(len(fpr)), strict=True)))
        nearest.append(tpr[index])
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    strict = [tpr[np.where(fpr <= target)[0].max()] for target in targets]
    return np.array(nearest), np.array(strict)


def ten_fold(embeddings: Array, issame: Array) -> tuple[float, float, list[float], list[float]]:
    """(mean, std, accuracy of each fold, threshold of each fold) of rows 2i against 2i + 1."""
    unit = normalize(embeddings)
    return ten_fold_of(np.sum(np.square(unit[0::2] - unit[1::2]), 1), issame)


def ten_fold_of(distance: Array, issame: Array) -> tuple[float, float, list[float], list[float]]:
    """The same, from the squared distance of each pair."""
    thresholds = np.arange(0, 4, 0.01)
    accuracies: list[float] = []
    chosen: list[float] = []
    for train, test in KFold(n_splits=10, shuffle=False).split(np.arange(len(issame))):
        on_train = np.zeros(len(thresholds))
        for k, threshold in enumerate(thresholds):
            on_train[k] = accuracy(threshold, distance[train], issame[train])
        best = np.argmax(on_train)
        for threshold in thresholds:  # TPR and FPR of every threshold, for the ROC
            rates(threshold, distance[test], issame[test])
        accuracies.append(accuracy(thresholds[best], distance[test], issame[test]))
        chosen.append(thresholds[best])
    return float(np.mean(accuracies)), float(np.std(accuracies)), accuracies, chosen


def evaluate(embeddings: Array, issame: Array) -> tuple[Any, ...]:
    """All that InsightFace's `evaluate` computes: the ten folds, then VAL at FAR 1e-3."""
    unit = normalize(embeddings)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    return (*ten_fold_of(distance, issame), *val(distance, issame))


def val(distance: Array, issame: Array, target: float = 1e-3) -> tuple[float, float]:
    """(mean VAL, mean FAR) at the largest threshold with FAR <= target on the other folds."""
    thresholds = np.arange(0, 4, 0.001)
    vals, fars = [], []
    for train, test in KFold(n_splits=10, shuffle=False).split(np.arange(len(issame))):
        on_train = np.zeros(len(thresholds))
        for k, threshold in enumerate(thresholds):
            on_train[k] = rates(threshold, distance[train], issame[train])[1]
        chosen = thresholds[np.where(on_train <= target)[0].max()]
        value, far = rates(chosen, distance[test], issame[test])
        vals.append(value)
        fars.append(far)
    return float(np.mean(vals)), float(np.mean(fars))


def accuracy(threshold: float, distance: Array, issame: Array) -> float:
    """The share of the pairs that a threshold on the distance calls as they are."""
    called = np.less(distance, threshold)
    tp = np.sum(np.logical_and(called, issame))
    tn = np.sum(np.logical_and(np.logical_not(called), np.logical_not(issame)))
    return float(tp + tn) / distance.size


def rates(threshold: float, distance: Array, issame: Array) -> tuple[float, float]:
    """(true positive rate, false positive rate) of a threshold on the distance."""
    called = np.less(distance, threshold)
    tp, fp = np.sum(called & issame), np.sum(called & ~issame)
    return tp / max(1, np.sum(issame)), fp / max(1, np.sum(~issame))


def search(
    gallery: Array,
    gallery_ids: Array,
    probes: Array,
    probe_ids: Array,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (0.01, 0.1),
) -> dict[Any, float]:
    """One probe at a time against a gallery of one template a subject: the corrected rule."""
    similarity = np.dot(probes, gallery.T)
    found, mated, rivals, strangers = [], [], [], []
    for row, subject in enumerate(probe_ids):
        own = np.where(gallery_ids == subject)[0]
        if len(own) == 0:
            strangers.append(similarity[row].max())
            continue
        order = np.argsort(-similarity[row], kind="stable")
        found.append(np.where(gallery_ids[order] == subject)[0][0])
        mated.append(similarity[row, own[0]])
        rivals.append(np.delete(similarity[row], own[0]).max(initial=-np.inf))
    result: dict[Any, float] = {f"rank{k}": float(np.mean(np.array(found) < k)) for k in ranks}
    falling = np.sort(strangers)[::-1]
    is_first = np.array(mated) > np.array(rivals)
    for x in fpirs:
        threshold = falling[max(int(len(falling) * x) - 1, 0)]
        result[x] = float(np.mean(is_first & (np.array(mated) > threshold)))
    return result
