"""Bootstrap confidence intervals for the metrics of a set of pairs, NumPy only.

Same and different pairs are resampled separately, with replacement, so every resample has as many
of each kind as the set.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError
from eval.roc import check_labels

RESAMPLES = 1000
LEVEL = 0.95
MOST_PAIRS = 100_000  # with more pairs an interval takes minutes to compute and is very narrow
_CHUNK = 1 << 22  # weights in memory at a time

Interval = tuple[float, float]


def intervals(
    scores: ArrayLike,
    labels: ArrayLike,
    fars: Sequence[float],
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict:
    """Percentile intervals (low, high) of TAR at each of `fars` (FAR <= target), EER and AUC.

    Returns {"tar_at_far": {far: interval}, "eer": interval, "auc": interval}. The result depends
    only on the arguments.

    Raises:
        ValueError: as `roc.curve`, or there are more than MOST_PAIRS pairs.
    """
    score = np.asarray(scores, dtype=np.float64)
    same = check_labels(labels, len(score))
    if len(score) > MOST_PAIRS:
        raise UserError(f"{len(score)} pairs are too many to bootstrap: at most {MOST_PAIRS}")
    order = np.argsort(-score, kind="stable")
    score, same = score[order], same[order]
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # [U] end of each equal run
    num_same, num_different = int(same.sum()), int((~same).sum())
    if not num_same or not num_different:
        raise UserError(f"{num_same} same and {num_different} different pairs: give both kinds")
    rng = np.random.default_rng(seed)
    found: dict[str, list[NDArray]] = {"tar": [], "eer": [], "auc": []}
    step = max(1, _CHUNK // len(score))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        weight = np.empty((rows, len(score)))
        for kind, number in ((same, num_same), (~same, num_different)):
            weight[:, kind] = rng.multinomial(number, np.full(number, 1 / number), size=rows)
        zero = np.zeros((rows, 1))
        tar = np.cumsum(weight * same, axis=1)[:, last] / num_same
        far = np.cumsum(weight * ~same, axis=1)[:, last] / num_different
        tar, far = np.hstack([zero, tar]), np.hstack([zero, far])  # [r, U + 1]
        # Each rate is one quotient of two integers, so a FAR of exactly the target compares equal.
        at = [np.count_nonzero(far <= x, axis=1) - 1 for x in fars]
        found["tar"].append(np.stack([tar[np.arange(rows), i] for i in at], axis=1))
        found["auc"].append(np.asarray(np.trapezoid(tar, far, axis=1)))
        found["eer"].append(_eer(far, tar))
    tails = [(1 - level) / 2, (1 + level) / 2]
    tar = np.quantile(np.concatenate(found["tar"]), tails, axis=0)  # [2, len(fars)]
    return {
        "tar_at_far": {x: (float(tar[0, i]), float(tar[1, i])) for i, x in enumerate(fars)},
        "eer": _pair(np.quantile(np.concatenate(found["eer"]), tails)),
        "auc": _pair(np.quantile(np.concatenate(found["auc"]), tails)),
    }


def accuracy_interval(
    correct: ArrayLike,
    labels: ArrayLike,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The interval of the accuracy, given which answers on the held-out folds are `correct` [P].

    The thresholds of the folds stay fixed; only the pairs vary. Because same and different pairs
    are resampled separately, the number of correct answers of each kind is binomial.
    """
    right = np.asarray(correct, dtype=bool)
    same = check_labels(labels, len(right))
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for kind in (same, ~same):
        if kind.any():
            total += rng.binomial(int(kind.sum()), right[kind].mean(), size=resamples)
    return _pair(np.quantile(total / len(right), [(1 - level) / 2, (1 + level) / 2]))


def separation(scores: ArrayLike, labels: ArrayLike) -> float:
    """d' = (mean of same - mean of different) / sqrt(mean of the two variances).

    Unlike accuracy and AUC, d' still distinguishes good networks that misclassify hardly any pair.
    """
    values, same = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    spread = np.sqrt((values[same].var() + values[~same].var()) / 2)
    return float((values[same].mean() - values[~same].mean()) / max(spread, 1e-12))


def separates_better(
    scores: ArrayLike, others: ArrayLike, labels: ArrayLike, resamples: int = 400, seed: int = 0
) -> bool:
    """Whether `others` [P] have a larger `separation` than `scores` [P], beyond chance.

    True if they do in 99 % of the resamples. A resample takes the same pairs from both.
    """
    one, other = np.asarray(scores), np.asarray(others)
    same = check_labels(labels, len(one))
    rng = np.random.default_rng(seed)
    kinds = [np.flatnonzero(kind) for kind in (same, ~same)]
    ahead = 0
    for _ in range(resamples):
        some = np.concatenate([rng.choice(kind, len(kind)) for kind in kinds])
        ahead += separation(other[some], same[some]) > separation(one[some], same[some])
    return ahead >= 0.99 * resamples


def _eer(far: NDArray, tar: NDArray) -> NDArray[np.float64]:
    gap = far + tar - 1  # [r, U + 1] rises from -1 to 1
    after = np.argmax(gap >= 0, axis=1)
    rows = np.arange(len(far))
    before = after - 1
    share = -gap[rows, before] / (gap[rows, after] - gap[rows, before])
    return far[rows, before] + share * (far[rows, after] - far[rows, before])


def _pair(values: NDArray) -> Interval:
    return float(values[0]), float(values[1])
