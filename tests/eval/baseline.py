"""The field's own algorithms written plainly: what ours must equal, and what it is timed against.

Pooling with one np.where per template, scikit-learn's roc_curve, Python loops over thresholds,
folds and probes. It imports nothing of ours.
"""

import numpy as np
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize


def pool(features, templates, medias):
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


def scores(ids, templates, first, second, step=100_000):
    place = np.zeros((max(ids) + 1, 1), dtype=int)
    for row, uid in enumerate(ids):
        place[uid] = row
    result = np.zeros(len(first))
    for start in range(0, len(first), step):
        some = slice(start, start + step)
        one, other = templates[place[first[some]].ravel()], templates[place[second[some]].ravel()]
        result[some] = np.sum(one * other, -1).flatten()
    return result


def tars(labels, values, targets):
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


def ten_fold(embeddings, issame):
    """(mean, std, accuracy of each fold, threshold of each fold) of rows 2i against 2i + 1."""
    unit = normalize(embeddings)
    return ten_fold_of(np.sum(np.square(unit[0::2] - unit[1::2]), 1), issame)


def ten_fold_of(distance, issame):
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen = [], []
    for train, test in KFold(n_splits=10, shuffle=False).split(np.arange(len(issame))):
        on_train = np.zeros(len(thresholds))
        for k, threshold in enumerate(thresholds):
            on_train[k] = accuracy(threshold, distance[train], issame[train])
        best = np.argmax(on_train)
        for threshold in thresholds:  # TPR and FPR of every threshold, for the ROC
            rates(threshold, distance[test], issame[test])
        accuracies.append(accuracy(thresholds[best], distance[test], issame[test]))
        chosen.append(thresholds[best])
    return np.mean(accuracies), np.std(accuracies), accuracies, chosen


def evaluate(embeddings, issame):
    """All that InsightFace's `evaluate` computes: the ten folds, then VAL at FAR 1e-3."""
    unit = normalize(embeddings)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    return (*ten_fold_of(distance, issame), *val(distance, issame))


def val(distance, issame, target=1e-3):
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
    return np.mean(vals), np.mean(fars)


def accuracy(threshold, distance, issame):
    called = np.less(distance, threshold)
    tp = np.sum(np.logical_and(called, issame))
    tn = np.sum(np.logical_and(np.logical_not(called), np.logical_not(issame)))
    return float(tp + tn) / distance.size


def rates(threshold, distance, issame):
    called = np.less(distance, threshold)
    tp, fp = np.sum(called & issame), np.sum(called & ~issame)
    return tp / max(1, np.sum(issame)), fp / max(1, np.sum(~issame))


def search(gallery, gallery_ids, probes, probe_ids, ranks=(1, 5, 10), fpirs=(0.01, 0.1)):
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
    found, mated, rivals = np.array(found), np.array(mated), np.array(rivals)
    result = {f"rank{k}": np.mean(found < k) for k in ranks}
    strangers = np.sort(strangers)[::-1]
    for x in fpirs:
        threshold = strangers[max(int(len(strangers) * x) - 1, 0)]
        result[x] = np.mean((mated > rivals) & (mated > threshold))
    return result
