"""Verification of pairs, NumPy only: ten-fold accuracy; the exact ROC is in eval/roc.py.

Letters: F folds, T thresholds; the others are in eval/__init__.py.
A higher *score* means more alike; a *distance* is the squared L2 distance of unit vectors, 0 to 4.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError
from eval.roc import (
    area_of,
    auc,
    check_labels,
    curve,
    eer,
    eer_of,
    operating_points,
    roc,
    tar_at_far,
)

__all__ = [
    "auc",
    "balanced_accuracy",
    "distances",
    "eer",
    "evaluate",
    "evaluate_distances",
    "held_out_answers",
    "operating_points",
    "pair_distances",
    "roc",
    "tar_at_far",
]

Floats = NDArray[np.float64]

THRESHOLDS = np.arange(400) * 0.01  # [T] squared distances 0.00 .. 3.99, for the accuracy
VAL_THRESHOLDS = np.arange(4000) * 0.001  # [T] finer ones, for VAL@FAR
VAL_FAR = 1e-3
_CHUNK_BYTES = 64 << 20  # of features gathered at a time
_CACHE_BYTES = 1 << 20


def distances(embeddings: ArrayLike) -> Floats:
    """Squared L2 distance between the L2-normalised embeddings 2i and 2i + 1: [P].

    A row of zeros stays zero (it is divided by 1), so its distance to every other row is 1.

    Raises:
        ValueError: the shape is not [2P, D], or a row's norm is not finite.
    """
    x = np.asarray(embeddings)  # [2P, D]
    if x.ndim != 2 or len(x) % 2 or x.size == 0:
        raise UserError(f"embeddings must be [2 * pairs, D], not {list(x.shape)}")
    whole = np.empty(len(x) // 2)
    step = 2 * max(1, _CACHE_BYTES // (32 * x.shape[1]))  # rows that fit in the cache
    for start in range(0, len(x), step):
        part = x[start : start + step].astype(np.float64)
        norms = np.sqrt(np.einsum("nd,nd->n", part, part))
        if not np.isfinite(norms).all():
            row = int(np.flatnonzero(~np.isfinite(norms))[0])
            raise UserError(
                f"embedding {start + row} (pair {(start + row) // 2}) is not finite: its norm is "
                f"{norms[row]}"
            )
        part /= np.where(norms == 0, 1, norms)[:, None]
        apart = np.subtract(part[0::2], part[1::2])
        np.square(apart, out=apart)
        np.sum(apart, axis=1, out=whole[start // 2 : (start + step) // 2])
    return whole


def pair_distances(features: ArrayLike, first: ArrayLike, second: ArrayLike) -> Floats:
    """`distances` between the rows first[i] and second[i] of features [N, D]: [P].

    Raises:
        ValueError: as `distances`, naming the row.
    """
    x = np.asarray(features)
    one, other = np.asarray(first), np.asarray(second)
    step = max(1, _CHUNK_BYTES // (32 * max(1, x.shape[1])))
    whole = np.empty(len(one))
    for start in range(0, len(one), step):
        some = slice(start, start + step)
        rows = np.stack([one[some], other[some]], axis=1).ravel()
        whole[some] = distances(x[rows])
    return whole


def held_out_answers(metrics: dict, distance: ArrayLike, issame: ArrayLike) -> NDArray[np.bool_]:
    """[P]: whether each pair is classified correctly at the threshold of its fold.

    metrics: as `evaluate` returns them.
    """
    thresholds = np.asarray(metrics["best_thresholds"])
    same = np.asarray(issame, dtype=bool)
    called = np.asarray(distance) < thresholds[_folds(len(same), len(thresholds))]
    return called == same


def evaluate(embeddings: ArrayLike, issame: ArrayLike, folds: int = 10) -> dict:
    """The metrics of the LFW protocol as InsightFace computes them, as plain floats and lists.

    embeddings [2P, D]: pair i is rows 2i and 2i + 1; issame [P]: the pair shows one person.
    A pair is classified "same" if its distance is strictly below the threshold. Folds are
    contiguous blocks, the first P % F of them one pair longer. In each fold the threshold is the
    first of `THRESHOLDS` with the highest accuracy on the other folds.

    - accuracy_mean, accuracy_std: over the folds, the standard deviation with ddof 0
    - fold_accuracy, best_thresholds: [F]
    - val_mean, val_std, val_far_mean, val_thresholds [F]: VAL (the TAR) and FAR on each held-out
      fold at the largest of `VAL_THRESHOLDS` whose FAR on the other folds is <= 1e-3. InsightFace
      interpolates a step function instead, which has no unique answer.
    - auc, eer: of the exact ROC over all pairs; None if one kind of pair is absent

    A rate over no pairs is 0.

    Raises:
        ValueError: the shapes do not agree, a label is neither 0 nor 1, there are fewer pairs than
            folds, or an embedding is not finite.
    """
    return evaluate_distances(distances(embeddings), issame, folds)


def evaluate_distances(distance: ArrayLike, issame: ArrayLike, folds: int = 10) -> dict:
    """`evaluate`, from squared distances [P]."""
    distance = np.asarray(distance, dtype=np.float64)
    same = check_labels(issame, len(distance))
    fold = _folds(len(same), folds)  # [P]
    rows = np.arange(folds)
    num_same = np.bincount(fold[same], minlength=folds)  # [F]
    num_diff = np.bincount(fold[~same], minlength=folds)

    tp = _below(distance[same], fold[same], folds, THRESHOLDS)  # [F, T] on the held-out folds
    fp = _below(distance[~same], fold[~same], folds, THRESHOLDS)
    right = tp + num_diff[:, None] - fp
    best = np.argmax(right.sum(axis=0) - right, axis=1)  # [F] first maximum over the other folds
    fold_accuracy = right[rows, best] / (num_same + num_diff)

    tp = _below(distance[same], fold[same], folds, VAL_THRESHOLDS)
    fp = _below(distance[~same], fold[~same], folds, VAL_THRESHOLDS)
    far = _rate(fp.sum(axis=0) - fp, (num_diff.sum() - num_diff)[:, None])  # [F, T] on the others
    last = np.sum(far <= VAL_FAR, axis=1) - 1  # [F] FAR grows with the threshold, from 0 at 0
    val = _rate(tp[rows, last], num_same)

    both = same.any() and not same.all()
    points = curve(-distance, same) if both else None
    return {
        "accuracy_mean": float(np.mean(fold_accuracy)),
        "accuracy_std": float(np.std(fold_accuracy)),
        "fold_accuracy": fold_accuracy.tolist(),
        "best_thresholds": THRESHOLDS[best].tolist(),
        "val_mean": float(np.mean(val)),
        "val_std": float(np.std(val)),
        "val_far_mean": float(np.mean(_rate(fp[rows, last], num_diff))),
        "val_thresholds": VAL_THRESHOLDS[last].tolist(),
        "auc": area_of(points) if points else None,
        "eer": eer_of(points) if points else None,
    }


def balanced_accuracy(distance: ArrayLike, issame: ArrayLike, folds: int = 10) -> float:
    """(TAR + 1 - FAR) / 2: the accuracy if there were as many different pairs as same ones.

    distance [P]: as `distances` returns it. In each fold of `evaluate` the threshold is the first
    of `THRESHOLDS` with the highest balanced accuracy on the other folds; TAR and FAR count the
    held-out pairs of all folds together, so a fold may lack one kind. Accepting every pair gives
    0.5 for any shares of the two kinds.

    Raises:
        ValueError: as `evaluate`.
    """
    distance = np.asarray(distance, dtype=np.float64)
    same = check_labels(issame, len(distance))
    fold = _folds(len(same), folds)  # [P]
    rows = np.arange(folds)
    tp = _below(distance[same], fold[same], folds, THRESHOLDS)  # [F, T] on the held-out folds
    fp = _below(distance[~same], fold[~same], folds, THRESHOLDS)
    num_same = np.bincount(fold[same], minlength=folds)  # [F]
    num_diff = np.bincount(fold[~same], minlength=folds)
    tar = _rate(tp.sum(axis=0) - tp, (num_same.sum() - num_same)[:, None])  # [F, T] on the others
    far = _rate(fp.sum(axis=0) - fp, (num_diff.sum() - num_diff)[:, None])
    best = np.argmax(tar - far, axis=1)  # [F]
    tar = _rate(tp[rows, best].sum(), num_same.sum())
    far = _rate(fp[rows, best].sum(), num_diff.sum())
    return float((tar + 1 - far) / 2)


def _folds(num_pairs: int, folds: int) -> NDArray:
    """[P]: the fold of each pair, in contiguous blocks, the first P % F of them one pair longer."""
    if not 2 <= folds <= num_pairs:
        raise UserError(f"{num_pairs} pairs cannot be split into {folds} folds; at least 2 folds")
    size, longer = divmod(num_pairs, folds)
    return np.repeat(np.arange(folds), [size + (f < longer) for f in range(folds)])


def _below(distance: Floats, fold: NDArray, folds: int, thresholds: NDArray) -> NDArray:
    """[F, T]: how many distances of each fold are strictly below each threshold."""
    width = len(thresholds) + 1
    first_above = np.searchsorted(thresholds, distance, side="right")
    counts = np.bincount(fold * width + first_above, minlength=folds * width)
    return counts.reshape(folds, width).cumsum(axis=1)[:, :-1]


def _rate(part: NDArray, whole: NDArray) -> Floats:
    return part / np.maximum(whole, 1)
