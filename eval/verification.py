"""Verification of pairs, NumPy only: ten-fold accuracy, the exact ROC, TAR at a given FAR.

Letters: P pairs, D embedding size, F folds, T thresholds, U distinct scores.
A *score* grows with likeness; a *distance* is the squared L2 distance of unit vectors, 0 to 4.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

THRESHOLDS = np.arange(400) * 0.01  # [T] squared distances 0.00 .. 3.99 of the accuracy
VAL_THRESHOLDS = np.arange(4000) * 0.001  # [T] the finer ones of VAL@FAR
VAL_FAR = 1e-3


def distances(embeddings: ArrayLike) -> Floats:
    """Squared L2 distance of the embeddings 2i and 2i + 1, each of them L2-normalised first: [P].

    A row of zeros stays zero (it is divided by 1), so it lies at distance 1 from every other.

    Raises:
        ValueError: the shape is not [2P, D], or a row holds NaN, infinity or overflows its norm.
    """
    x = np.asarray(embeddings, dtype=np.float64)  # [2P, D]
    if x.ndim != 2 or len(x) % 2 or x.size == 0:
        raise ValueError(f"embeddings must be [2 * pairs, D], not {list(x.shape)}")
    norms = np.sqrt(np.einsum("nd,nd->n", x, x))  # [2P]
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise ValueError(
            f"embedding {row} (pair {row // 2}) is not finite: its norm is {norms[row]}"
        )
    unit = x / np.where(norms == 0, 1, norms)[:, None]
    return np.sum(np.square(unit[0::2] - unit[1::2]), axis=1)


def evaluate(embeddings: ArrayLike, issame: ArrayLike, folds: int = 10) -> dict:
    """The LFW protocol as InsightFace computes it, as plain floats and lists.

    embeddings [2P, D]: pair i is rows 2i and 2i + 1; issame [P]: the pair shows one person.
    A pair is called "same" where its distance is strictly below the threshold. Folds are contiguous
    blocks, the first P % F of them one pair longer. In each fold the threshold is the first of
    `THRESHOLDS` with the highest accuracy on the other folds.

    - accuracy_mean, accuracy_std: over the folds, the standard deviation with ddof 0
    - fold_accuracy, best_thresholds: [F]
    - val_mean, val_std, val_far_mean, val_thresholds [F]: VAL (the TAR) and FAR on each held-out
      fold at the largest of `VAL_THRESHOLDS` whose FAR on the other folds is <= 1e-3. InsightFace
      interpolates a step function there, which has no single answer; this rule has.
    - auc, eer: of the exact ROC over all pairs; None where one kind of pair is absent

    A rate without any pair to count is 0.

    Raises:
        ValueError: shapes that do not agree, labels other than 0 and 1, fewer pairs than folds,
            embeddings that are not finite.
    """
    distance = distances(embeddings)  # [P]
    same = _labels(issame, len(distance))
    fold = _folds(len(same), folds)  # [P]
    rows = np.arange(folds)
    num_same = np.bincount(fold[same], minlength=folds)  # [F]
    num_diff = np.bincount(fold[~same], minlength=folds)

    tp = _below(distance[same], fold[same], folds, THRESHOLDS)  # [F, T] on the held-out folds
    fp = _below(distance[~same], fold[~same], folds, THRESHOLDS)
    right = tp + num_diff[:, None] - fp
    best = np.argmax(right.sum(axis=0) - right, axis=1)  # [F] the first maximum of the other folds
    fold_accuracy = right[rows, best] / (num_same + num_diff)

    tp = _below(distance[same], fold[same], folds, VAL_THRESHOLDS)
    fp = _below(distance[~same], fold[~same], folds, VAL_THRESHOLDS)
    far = _rate(fp.sum(axis=0) - fp, (num_diff.sum() - num_diff)[:, None])  # [F, T] on the others
    last = np.sum(far <= VAL_FAR, axis=1) - 1  # [F] FAR never falls with T and is 0 at T = 0
    val = _rate(tp[rows, last], num_same)

    both = same.any() and not same.all()
    return {
        "accuracy_mean": float(np.mean(fold_accuracy)),
        "accuracy_std": float(np.std(fold_accuracy)),
        "fold_accuracy": fold_accuracy.tolist(),
        "best_thresholds": THRESHOLDS[best].tolist(),
        "val_mean": float(np.mean(val)),
        "val_std": float(np.std(val)),
        "val_far_mean": float(np.mean(_rate(fp[rows, last], num_diff))),
        "val_thresholds": VAL_THRESHOLDS[last].tolist(),
        "auc": auc(-distance, same) if both else None,
        "eer": eer(-distance, same) if both else None,
    }


def balanced_accuracy(distance: ArrayLike, issame: ArrayLike, folds: int = 10) -> float:
    """(TAR + 1 - FAR) / 2: what the accuracy would be with as many different pairs as same ones.

    distance [P] as `distances` gives it. In each fold of `evaluate` the threshold is the first of
    `THRESHOLDS` with the highest balanced accuracy on the other folds; TAR and FAR count the
    held-out pairs of all folds together, so a fold may lack one kind. Accepting everything gives
    0.5, whatever the shares of the two kinds.

    Raises:
        ValueError: as `evaluate`.
    """
    distance = np.asarray(distance, dtype=np.float64)
    same = _labels(issame, len(distance))
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


def roc(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """(FAR, TAR, threshold), each [U + 1]: the exact ROC, accepting where score >= threshold.

    One point for each distinct score, highest first, behind (0, 0, inf); nothing is dropped.

    Raises:
        ValueError: shapes that do not agree, labels other than 0 and 1, a NaN score, or only one
            kind of pair.
    """
    fp, tp, thresholds = _counts(scores, labels)
    return (
        np.concatenate(([0.0], fp / fp[-1])),
        np.concatenate(([0.0], tp / tp[-1])),
        np.concatenate(([np.inf], thresholds)),
    )


def tar_at_far(
    scores: ArrayLike, labels: ArrayLike, fars: ArrayLike, rule: str = "insightface"
) -> Floats:
    """TAR at each of `fars`: [len(fars)].

    rule "insightface": the point of the ROC whose FAR is *nearest* the target, hence possibly above
    it. Interior points where the second differences of FP and of TP are both zero are left out
    first (scikit-learn's drop_intermediate); of equally near points the one with the larger FAR
    counts, then with the larger TAR. This is what the published IJB tables hold.
    rule "strict": the largest TAR with FAR <= target.

    Raises:
        ValueError: as `roc`, or an unknown rule, or a target outside [0, 1].
    """
    if rule not in ("insightface", "strict"):
        raise ValueError(f"unknown rule {rule!r}: choose 'insightface' or 'strict'")
    if rule == "strict":
        return operating_points(scores, labels, fars)[0]
    targets = _targets(fars)
    fp, tp, _ = _counts(scores, labels)
    kept = np.ones(len(fp), dtype=bool)
    kept[1:-1] = (np.diff(fp, 2) != 0) | (np.diff(tp, 2) != 0)
    # Reversed, so that argmin meets the larger FAR (and at equal FAR the larger TAR) first.
    far = np.concatenate(([0.0], fp[kept] / fp[-1]))[::-1]
    tar = np.concatenate(([0.0], tp[kept] / tp[-1]))[::-1]
    return np.array([tar[np.argmin(np.abs(far - target))] for target in targets])


def operating_points(
    scores: ArrayLike, labels: ArrayLike, fars: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """(TAR, FAR, threshold), each [len(fars)]: the ROC's last point with FAR <= each target.

    The threshold accepts score >= threshold; inf accepts nothing.

    Raises:
        ValueError: as `roc`, or a target outside [0, 1].
    """
    targets = _targets(fars)
    far, tar, thresholds = roc(scores, labels)
    last = np.searchsorted(far, targets, side="right") - 1
    return tar[last], far[last], thresholds[last]


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the exact ROC: P(genuine score > impostor score), ties counting one half.

    Raises:
        ValueError: as `roc`.
    """
    far, tar, _ = roc(scores, labels)
    return float(np.trapezoid(tar, far))


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate: FAR where FAR = 1 - TAR, on straight lines between the ROC's points.

    Raises:
        ValueError: as `roc`.
    """
    far, tar, _ = roc(scores, labels)
    gap = far + tar - 1  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    return float(far[before] + share * (far[after] - far[before]))


def _counts(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """(FP, TP, threshold), each [U]: what scores >= threshold, highest threshold first."""
    score = np.asarray(scores)
    if score.ndim != 1 or np.isnan(score).any():
        raise ValueError(f"scores must be one row of numbers without NaN, not {list(score.shape)}")
    same = _labels(labels, len(score))
    if not same.any() or same.all():
        kind = "same" if same.any() else "different"
        raise ValueError(
            f"all {len(same)} pairs are {kind!r} pairs: a ROC needs both kinds; check the labels"
        )
    ordered = np.sort(score)
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))  # [U]
    thresholds = ordered[first]  # ascending
    at = np.bincount(np.searchsorted(thresholds, score[same]), minlength=len(first))
    tp = np.cumsum(at[::-1])
    fp = (len(score) - first)[::-1] - tp
    return fp, tp, thresholds[::-1]


def _folds(num_pairs: int, folds: int) -> NDArray:
    """[P]: the fold of each pair, in contiguous blocks, the first P % F of them one pair longer."""
    if not 2 <= folds <= num_pairs:
        raise ValueError(f"{num_pairs} pairs cannot be cut into {folds} folds; at least 2 folds")
    size, longer = divmod(num_pairs, folds)
    return np.repeat(np.arange(folds), [size + (f < longer) for f in range(folds)])


def _below(distance: Floats, fold: NDArray, folds: int, thresholds: NDArray) -> NDArray:
    """[F, T]: how many distances of each fold lie strictly below each threshold."""
    width = len(thresholds) + 1
    first_above = np.searchsorted(thresholds, distance, side="right")
    counts = np.bincount(fold * width + first_above, minlength=folds * width)
    return counts.reshape(folds, width).cumsum(axis=1)[:, :-1]


def _rate(part: NDArray, whole: NDArray) -> Floats:
    return part / np.maximum(whole, 1)


def _labels(labels: ArrayLike, num_pairs: int) -> NDArray[np.bool_]:
    given = np.asarray(labels)
    if given.shape != (num_pairs,):
        raise ValueError(f"{num_pairs} pairs need {num_pairs} labels, not {list(given.shape)}")
    same = given.astype(bool)
    if not np.array_equal(same, given):
        raise ValueError(f"labels must be 0 or 1, not {given[same != given][0]}")
    return same


def _targets(fars: ArrayLike) -> Floats:
    targets = np.atleast_1d(np.asarray(fars, dtype=np.float64))
    if targets.ndim != 1 or not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError(f"a FAR lies between 0 and 1: {fars!r}")
    return targets
