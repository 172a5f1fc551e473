"""The exact ROC of scored pairs, and the rates read from it, NumPy only.

A higher *score* means more alike.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError

Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """The exact ROC as counts, [U] each: one point per distinct score, highest score first."""

    fp: NDArray[np.int64]  # different pairs with score >= threshold
    tp: NDArray[np.int64]  # same pairs
    thresholds: NDArray

    @property
    def num_different(self) -> int:
        return int(self.fp[-1])

    @property
    def num_same(self) -> int:
        return int(self.tp[-1])


def curve(scores: ArrayLike, labels: ArrayLike) -> Curve:
    """The exact ROC of scores [P] and labels [P], from which the rest of this file is computed.

    Raises:
        ValueError: the shapes do not agree, a label is neither 0 nor 1, a score is NaN, or all
            pairs are of one kind.
    """
    score = np.asarray(scores)
    if score.dtype.kind != "f":
        score = score.astype(np.float64)
    if score.ndim != 1 or np.isnan(score).any():
        raise UserError(f"scores must be one row of numbers without NaN, not {list(score.shape)}")
    same = check_labels(labels, len(score))
    if not same.any() or same.all():
        kind = "same" if same.any() else "different"
        raise UserError(
            f"all {len(same)} pairs are {kind!r} pairs: a ROC needs both kinds; check the labels"
        )
    ordered = np.sort(score)
    starts = np.empty(len(ordered), dtype=bool)  # where a run of equal scores starts
    starts[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:])
    if starts.all():
        at_least = np.arange(1, len(ordered) + 1)  # [U] pairs with that score or a higher one
        thresholds = ordered[::-1]
    else:
        first = np.flatnonzero(starts)
        at_least = (len(ordered) - first)[::-1]
        thresholds = ordered[first][::-1]
    place = np.searchsorted(-thresholds, -np.sort(score[same])[::-1])  # of each same pair
    tp = np.zeros(len(thresholds), dtype=np.int64)
    where, count = np.unique(place, return_counts=True)
    tp[where] = count
    np.cumsum(tp, out=tp)
    return Curve(at_least - tp, tp, thresholds)


def roc(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """(FAR, TAR, threshold), each [U + 1]: the exact ROC, accepting where score >= threshold.

    The first point is (0, 0, inf); one point per distinct score follows, highest score first. No
    point is dropped.

    Raises:
        ValueError: as `curve`.
    """
    points = curve(scores, labels)
    return (
        np.concatenate(([0.0], points.fp / points.num_different)),
        np.concatenate(([0.0], points.tp / points.num_same)),
        np.concatenate(([np.inf], points.thresholds)),
    )


def tar_at_far(
    scores: ArrayLike, labels: ArrayLike, fars: ArrayLike, rule: str = "insightface"
) -> Floats:
    """TAR at each of `fars`: [len(fars)].

    rule "insightface": the point of the ROC whose FAR is *nearest* the target, which may exceed
    it. Interior points where the second differences of FP and of TP are both zero are dropped
    first (scikit-learn's drop_intermediate); among equally near points the one with the larger FAR
    wins, then the one with the larger TAR. The published IJB tables use this rule.
    rule "strict": the largest TAR with FAR <= target.

    Raises:
        ValueError: as `curve`; the rule is unknown, or a target is outside [0, 1].
    """
    return tar_on(curve(scores, labels), fars, rule)


def tar_on(points: Curve, fars: ArrayLike, rule: str = "insightface") -> Floats:
    """`tar_at_far` of an existing curve.

    Raises:
        ValueError: the rule is unknown, or a target is outside [0, 1].
    """
    targets = _targets(fars)
    if rule == "strict":
        return points_on(points, targets)[0]
    if rule != "insightface":
        raise UserError(f"unknown rule {rule!r}: 'insightface' or 'strict'")
    fp, tp, _ = points
    kept = np.ones(len(fp), dtype=bool)
    if len(fp) > 2:
        step = fp[1:] - fp[:-1]
        kept[1:-1] = step[1:] != step[:-1]
        np.subtract(tp[1:], tp[:-1], out=step)
        kept[1:-1] |= step[1:] != step[:-1]
    far = np.concatenate(([0], fp[kept])) / points.num_different
    tar = np.concatenate(([0], tp[kept])) / points.num_same
    nearest = []
    for target in targets:  # FAR never decreases: the nearest level is next to the target
        after = np.searchsorted(far, target)
        levels = far[max(after - 1, 0) : after + 1]
        level = levels[len(levels) - 1 - np.argmin(np.abs(levels - target)[::-1])]
        nearest.append(tar[np.searchsorted(far, level, side="right") - 1])
    return np.array(nearest)


def operating_points(
    scores: ArrayLike, labels: ArrayLike, fars: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """(TAR, FAR, threshold), each [len(fars)]: the ROC's last point with FAR <= each target.

    Accept a pair where score >= threshold; a threshold of inf accepts nothing.

    Raises:
        ValueError: as `curve`, or a target is outside [0, 1].
    """
    return points_on(curve(scores, labels), fars)


def points_on(points: Curve, fars: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """`operating_points` of an existing curve.

    Raises:
        ValueError: a target is outside [0, 1].
    """
    targets = _targets(fars)
    far = points.fp / points.num_different
    found = np.searchsorted(far, targets, side="right") - 1  # -1: the point (0, 0, inf)
    none = found < 0
    return (
        np.where(none, 0.0, points.tp[found] / points.num_same),
        np.where(none, 0.0, points.fp[found] / points.num_different),
        np.where(none, np.inf, points.thresholds[found]),
    )


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the exact ROC: P(genuine score > impostor score), ties counting one half.

    Raises:
        ValueError: as `curve`.
    """
    return area_of(curve(scores, labels))


def area_of(points: Curve) -> float:
    """`auc` of an existing curve."""
    fp, tp, _ = points
    # Trapezia between the points, starting at (0, 0); the sum is twice the area, in integers.
    doubled = float(fp[0]) * float(tp[0])
    doubled += float(np.dot((fp[1:] - fp[:-1]).astype(np.float64), tp[1:] + tp[:-1]))
    return doubled / 2 / points.num_different / points.num_same


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate: FAR where FAR = 1 - TAR, interpolated linearly between the ROC's points.

    Raises:
        ValueError: as `curve`.
    """
    return eer_of(curve(scores, labels))


def eer_of(points: Curve) -> float:
    """`eer` of an existing curve."""
    after = int(np.argmax(points.fp / points.num_different + points.tp / points.num_same - 1 >= 0))
    far = points.fp[[max(after - 1, 0), after]] / points.num_different
    tar = points.tp[[max(after - 1, 0), after]] / points.num_same
    if after == 0:
        far[0] = tar[0] = 0.0
    gap = far + tar - 1  # from below 0 to 0 or above
    return float(far[0] - gap[0] / (gap[1] - gap[0]) * (far[1] - far[0]))


def check_labels(labels: ArrayLike, num_pairs: int) -> NDArray[np.bool_]:
    given = np.asarray(labels)
    if given.shape != (num_pairs,):
        raise UserError(f"{num_pairs} pairs need {num_pairs} labels, not {list(given.shape)}")
    same = given.astype(bool)
    if not np.array_equal(same, given):
        raise UserError(f"labels must be 0 or 1, not {given[same != given][0]}")
    return same


def _targets(fars: ArrayLike) -> Floats:
    targets = np.atleast_1d(np.asarray(fars, dtype=np.float64))
    if targets.ndim != 1 or not ((targets >= 0) & (targets <= 1)).all():
        raise UserError(f"a FAR must be between 0 and 1: {fars!r}")
    return targets
