"""Identification 1:N, NumPy only: closed-set ranks and open-set TPIR at FPIR on one gallery.

Letters: G gallery templates, Q probes, D embedding size, M non-mated probes.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FPIRS = (0.01, 0.1)
CHUNK_BYTES = 64 << 20  # of similarities held at once


def evaluate(
    gallery: ArrayLike, gallery_ids: ArrayLike, probes: ArrayLike, probe_ids: ArrayLike
) -> dict:
    """Ranks of the mated probes, and their identification rate at the FPIRs 0.01 and 0.1.

    gallery [G, D], probes [Q, D]: templates as they are to be compared, the score being their dot
    product (normalise first for cosines; float64 in, float64 scores). gallery_ids [G], probe_ids
    [Q]: the subjects. A probe is *mated* where its subject is in the gallery; its mated score is
    the best among that subject's templates.

    - rank1, rank5, rank10: share of mated probes whose subject comes up within that many gallery
      templates; among equal scores the earlier template comes first
    - tpir_at_fpir[x], threshold_at_fpir[x]: the threshold is element max(int(M * x) - 1, 0) of the
      non-mated probes' highest scores, descending; TPIR is the share of mated probes whose mated
      score is above it and above every score of another subject, both strictly. This is the
      corrected rule of InsightFace's ijb_evals.py; None without non-mated probes.
    - counts: gallery, probes, mated, nonmated

    Raises:
        ValueError: shapes that do not agree, NaN, or no mated probe.
    """
    gallery, subjects = _templates("gallery", gallery, gallery_ids)
    probes, wanted = _templates("probes", probes, probe_ids)
    if gallery.shape[1] != probes.shape[1]:
        raise ValueError(f"gallery has {gallery.shape[1]} columns, probes have {probes.shape[1]}")
    names, subject = np.unique(subjects, return_inverse=True)  # [G] index into names
    place = np.minimum(np.searchsorted(names, wanted), len(names) - 1)  # [Q]
    mated = names[place] == wanted
    if not mated.any():
        raise ValueError(f"none of the {len(probes)} probes has its subject in the gallery")

    mated_score = np.empty(len(probes))
    other_score = np.empty(len(probes))  # the best score of another subject
    rank = np.zeros(len(probes), dtype=np.int64)
    dtype = np.result_type(gallery, probes, np.float32)
    step = max(1, CHUNK_BYTES // (len(gallery) * dtype.itemsize))
    for start in range(0, len(probes), step):
        rows = np.arange(start, min(start + step, len(probes)))
        scores = probes[rows].astype(dtype) @ gallery.T.astype(dtype, copy=False)  # [q, G]
        own = (subject == place[rows, None]) & mated[rows, None]
        best = np.argmax(np.where(own, scores, -np.inf), axis=1)  # [q]
        top = scores[np.arange(len(rows)), best][:, None]  # [q, 1]
        mated_score[rows] = top[:, 0]
        other_score[rows] = np.max(scores, axis=1, initial=-np.inf, where=~own)
        before = (scores > top) | ((scores == top) & (np.arange(len(gallery)) < best[:, None]))
        rank[rows] = 1 + before.sum(axis=1)

    impostors = np.sort(other_score[~mated])[::-1]  # [M] of non-mated probes everyone is another
    found = mated_score[mated] > other_score[mated]
    tpir: dict[float, float | None] = {}
    thresholds: dict[float, float | None] = {}
    for x in FPIRS:
        tpir[x] = thresholds[x] = None
        if len(impostors):
            threshold = impostors[max(int(len(impostors) * x) - 1, 0)]
            thresholds[x] = float(threshold)
            tpir[x] = float(np.mean(found & (mated_score[mated] > threshold)))
    return {
        **{f"rank{k}": float(np.mean(rank[mated] <= k)) for k in (1, 5, 10)},
        "tpir_at_fpir": tpir,
        "threshold_at_fpir": thresholds,
        "counts": {
            "gallery": len(gallery),
            "probes": len(probes),
            "mated": int(mated.sum()),
            "nonmated": len(impostors),
        },
    }


def _templates(name: str, features: ArrayLike, ids: ArrayLike) -> tuple[NDArray, NDArray]:
    array, subjects = np.asarray(features), np.asarray(ids)
    if array.ndim != 2 or array.size == 0 or subjects.shape != (len(array),):
        raise ValueError(
            f"{name} must be [templates, D] with one id each, not {list(array.shape)} with "
            f"{list(subjects.shape)} ids"
        )
    if np.isnan(array).any():
        row = int(np.flatnonzero(np.isnan(array).any(axis=1))[0])
        raise ValueError(f"{name}: template {row} holds NaN")
    return array, subjects
