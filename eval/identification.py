"""Identification 1:N, NumPy only: closed-set ranks and open-set TPIR at FPIR.

Letters: G gallery templates, M non-mated probes, K ranks; the others are in eval/__init__.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
CHUNK_BYTES = 64 << 20  # of similarities in memory at a time


class Search(NamedTuple):
    """The result of searching one gallery for every probe; each array is [Q]."""

    mated: NDArray[np.bool_]  # the probe's subject is in the gallery
    rank: NDArray[np.int64]  # of the probe's subject, 1 is first; 0 where not mated
    mated_score: NDArray[np.float64]  # -inf where not mated
    other_score: NDArray[np.float64]  # the best score of another subject
    best_own: NDArray[np.int64]  # gallery row of mated_score; -1 where not mated
    best_other: NDArray[np.int64]  # gallery row of other_score
    num_gallery: int  # templates


def evaluate(
    gallery: ArrayLike,
    gallery_ids: ArrayLike,
    probes: ArrayLike,
    probe_ids: ArrayLike,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> dict:
    """Ranks of the mated probes, and their identification rate at each FPIR.

    gallery [G, D], probes [Q, D]: templates. Their score is the dot product, so normalise them
    first to compare cosines; float64 templates give float64 scores. gallery_ids [G], probe_ids
    [Q]: the subjects. A probe is *mated* if its subject is in the gallery; its mated score is
    the highest among that subject's templates.

    - rank1, rank5, rank10: share of mated probes whose subject is among that many best gallery
      templates; among equal scores the earlier template ranks first
    - tpir_at_fpir[x], threshold_at_fpir[x]: the threshold is element max(int(M * x) - 1, 0) of the
      non-mated probes' highest scores, descending; TPIR is the share of mated probes whose mated
      score is strictly above it and strictly above every score of another subject. This is the
      corrected rule of InsightFace's ijb_evals.py; None without non-mated probes.
    - counts: gallery, probes, mated, nonmated

    Raises:
        ValueError: the shapes do not agree, a value is NaN, or no probe is mated.
    """
    return summarise(search(gallery, gallery_ids, probes, probe_ids), ranks, fpirs)


def search(
    gallery: ArrayLike, gallery_ids: ArrayLike, probes: ArrayLike, probe_ids: ArrayLike
) -> Search:
    """Search the gallery for every probe, with CHUNK_BYTES of memory; arguments as `evaluate`.

    Raises:
        ValueError: as `evaluate`.
    """
    gallery, subjects = _templates("gallery", gallery, gallery_ids)
    probes, wanted = _templates("probes", probes, probe_ids)
    if gallery.shape[1] != probes.shape[1]:
        raise UserError(f"gallery has {gallery.shape[1]} columns, probes have {probes.shape[1]}")
    names, subject = np.unique(subjects, return_inverse=True)  # [G] index into names
    place = np.minimum(np.searchsorted(names, wanted), len(names) - 1)  # [Q]
    mated = names[place] == wanted
    if not mated.any():
        raise UserError(f"none of the {len(probes)} probes has its subject in the gallery")

    order = np.argsort(subject, kind="stable")  # [G] groups the templates by subject
    bounds = np.searchsorted(subject[order], np.arange(len(names) + 1))
    best_own = np.full(len(probes), -1)
    best_other = np.empty(len(probes), dtype=np.int64)
    mated_score = np.full(len(probes), -np.inf)
    other_score = np.empty(len(probes))  # the best score of another subject
    rank = np.zeros(len(probes), dtype=np.int64)
    dtype = np.result_type(gallery, probes, np.float32)
    transposed = gallery.T.astype(dtype, copy=False)  # [D, G]
    step = max(1, CHUNK_BYTES // (len(gallery) * dtype.itemsize))
    for start in range(0, len(probes), step):
        scores = probes[start : start + step].astype(dtype, copy=False) @ transposed  # [q, G]
        chunk = slice(start, start + len(scores))
        found = np.flatnonzero(mated[chunk])  # [m] rows with a subject in the gallery
        if len(found):
            row, column, first = _own(place[chunk][found], order, bounds)
            own = scores[found[row], column]
            top = np.maximum.reduceat(own, first)  # [m]
            scores[found[row], column] = -np.inf  # only scores of other subjects remain
            limit = np.full((len(scores), 1), np.inf, dtype=dtype)
            limit[found, 0] = top
            better = np.count_nonzero(scores > limit, axis=1)[found]
            equal = np.count_nonzero(scores == limit, axis=1)[found]
            highest = np.flatnonzero(own == top[row])  # np.unique below takes the earliest per row
            best = column[highest[np.unique(row[highest], return_index=True)[1]]]  # [m]
            for k in np.flatnonzero(equal):  # among equal scores the earlier template ranks first
                better[k] += np.count_nonzero(scores[found[k], : best[k]] == top[k])
            best_own[start + found] = best
            mated_score[start + found] = top
            rank[start + found] = 1 + better
        best_other[chunk] = scores.argmax(axis=1)
        other_score[chunk] = scores[np.arange(len(scores)), best_other[chunk]]
    return Search(mated, rank, mated_score, other_score, best_own, best_other, len(gallery))


def summarise(found: Search, ranks: Sequence[int] = RANKS, fpirs: Sequence[float] = FPIRS) -> dict:
    """The numbers that `evaluate` returns, computed from a search."""
    mated = found.mated
    impostors = np.sort(found.other_score[~mated])[::-1]  # [M] their best score of any subject
    right = found.mated_score[mated] > found.other_score[mated]
    tpir: dict[float, float | None] = {}
    thresholds: dict[float, float | None] = {}
    for x in fpirs:
        tpir[x] = thresholds[x] = None
        if len(impostors):
            threshold = impostors[max(int(len(impostors) * x) - 1, 0)]
            thresholds[x] = float(threshold)
            tpir[x] = float(np.mean(right & (found.mated_score[mated] > threshold)))
    return {
        **{f"rank{k}": float(np.mean(found.rank[mated] <= k)) for k in ranks},
        "tpir_at_fpir": tpir,
        "threshold_at_fpir": thresholds,
        "counts": {
            "gallery": found.num_gallery,
            "probes": len(mated),
            "mated": int(mated.sum()),
            "nonmated": len(impostors),
        },
    }


def mean_of(
    searches: Sequence[Search], ranks: Sequence[int] = RANKS, fpirs: Sequence[float] = FPIRS
) -> dict:
    """Ranks and TPIR over all galleries of a protocol, as InsightFace's ijb_evals.py reports them.

    A rank is the share of all mated searches (each probe is mated in one gallery of IJB-B and -C).
    The TPIR is the plain mean of the galleries' TPIRs, or None if any of them is None.
    """
    mated = np.concatenate([found.rank[found.mated] for found in searches])
    each = [summarise(found, ranks, fpirs)["tpir_at_fpir"] for found in searches]
    whole = {x: all(tpir[x] is not None for tpir in each) for x in fpirs}
    return {
        **{f"rank{k}": float(np.mean(mated <= k)) for k in ranks},
        "tpir_at_fpir": {
            x: float(np.mean([tpir[x] for tpir in each])) if whole[x] else None for x in fpirs
        },
    }


def cmc(searches: Sequence[Search], most: int = 50) -> NDArray[np.float64]:
    """[K]: share of the mated searches that find their subject within 1 .. K ranks."""
    rank = np.concatenate([found.rank[found.mated] for found in searches])
    return np.cumsum(np.bincount(rank, minlength=most + 1)[1 : most + 1]) / len(rank)


def legacy(
    gallery: ArrayLike,
    gallery_ids: ArrayLike,
    probes: ArrayLike,
    probe_ids: ArrayLike,
    ranks: Sequence[int] = RANKS,
    fars: Sequence[float] = FPIRS,
) -> dict:
    """The old rule of InsightFace's ijb_1n.py on the joined galleries; its rate is not an FPIR.

    rankK: as in `evaluate`. recall_at_far[x]: share of probes whose mated score is above the
    threshold, the ceil(x * Q)-th largest of *all* scores between different subjects.

    Raises:
        ValueError: as `evaluate`; a subject has two gallery templates, or a probe has none.
    """
    gallery, subjects = _templates("gallery", gallery, gallery_ids)
    probes, wanted = _templates("probes", probes, probe_ids)
    names, counts = np.unique(subjects, return_counts=True)
    if counts.max() > 1:
        raise UserError(
            f"subject {names[counts > 1][0]} has several gallery templates: the old "
            "rule needs one per subject"
        )
    absent = ~np.isin(wanted, names)
    if absent.any():
        raise UserError(
            f"probe subject {wanted[absent][0]} is in no gallery: the old rule needs "
            "every probe mated"
        )
    found = search(gallery, subjects, probes, wanted)
    most = [int(np.ceil(x * len(probes))) for x in fars]
    keep = min(max(most), len(probes) * (len(gallery) - 1))
    if keep < 1:
        raise UserError("the old rule needs scores between different subjects")
    column = np.argsort(subjects, kind="stable")[np.searchsorted(names, wanted)]
    top = np.empty(0)
    step = max(1, CHUNK_BYTES // (8 * len(gallery)))
    for start in range(0, len(probes), step):
        scores = probes[start : start + step] @ gallery.T
        scores[np.arange(len(scores)), column[start : start + step]] = -np.inf
        top = np.concatenate([top, scores.ravel()])
        if len(top) > keep:
            top = np.partition(top, len(top) - keep)[len(top) - keep :]
    top = np.sort(top)[::-1]
    return {
        **{f"rank{k}": float(np.mean(found.rank <= k)) for k in ranks},
        "recall_at_far": {
            x: float(np.mean(found.mated_score > top[min(k, len(top)) - 1]))
            for x, k in zip(fars, most, strict=True)
        },
    }


def _own(
    place: NDArray, order: NDArray, bounds: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, column, start of each row): the gallery templates of the subjects `place` [m]."""
    counts = bounds[place + 1] - bounds[place]
    first = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(place)), counts)
    column = order[bounds[place][row] + np.arange(len(row)) - first[row]]
    return row, column, first


def _templates(name: str, features: ArrayLike, ids: ArrayLike) -> tuple[NDArray, NDArray]:
    array, subjects = np.asarray(features), np.asarray(ids)
    if array.ndim != 2 or array.size == 0 or subjects.shape != (len(array),):
        raise UserError(
            f"{name} must be [templates, D] with one id each, not {list(array.shape)} with "
            f"{list(subjects.shape)} ids"
        )
    if np.isnan(array).any():
        row = int(np.flatnonzero(np.isnan(array).any(axis=1))[0])
        raise UserError(f"{name}: template {row} contains NaN")
    return array, subjects
