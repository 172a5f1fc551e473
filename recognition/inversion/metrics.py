"""Numbers on synthesised faces, NumPy only.

Letters: n images or queries, N a gallery, D embedding or feature size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from data_tools.common.errors import UserError


def unit(x: np.ndarray) -> np.ndarray:  # [n, D] -> float64 [n, D]
    """Rows of length 1; a row of zeros stays."""
    x = np.asarray(x, dtype=np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def likeness(
    embeddings: np.ndarray,  # [n, D] of the synthesised faces
    gallery: Iterable[np.ndarray],  # blocks [m, D] or [m, K, D] that follow one another
    own: np.ndarray,  # int64 [n] each one's place in the gallery
) -> dict[str, Any]:
    """Cosine to the own entry, and how often the own entry is the nearest of all.

    The nearest of an entry's K centres counts. A tie with another entry counts as a miss. chance is
    1 / N.
    """
    x = unit(embeddings)
    own = np.asarray(own)
    mine, best = np.full(len(x), -np.inf), np.full(len(x), -np.inf)
    first = 0
    for block in gallery:
        rows = np.asarray(block)
        flat = unit(rows.reshape(-1, rows.shape[-1]))
        cos = (x @ flat.T).reshape(len(x), len(rows), -1).max(2)  # [n, m]
        here = np.flatnonzero((own >= first) & (own < first + len(rows)))
        mine[here] = cos[here, own[here] - first]
        cos[here, own[here] - first] = -np.inf
        best = np.maximum(best, cos.max(1, initial=-np.inf))
        first += len(rows)
    assert first > own.max()
    found = mine > best
    return {
        "cosine_mean": float(mine.mean()),
        "cosine_5th_percentile": float(np.percentile(mine, 5)),
        "identity_rate": float(found.mean()),
        "gallery": first,
        "chance": 1 / first,
        "times_chance": float(found.mean() * first),
        "images": len(x),
    }


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:  # [n, D], [m, D]
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the FID of two sets of features
    (arXiv:1706.08500 eq. 6), S with n - 1.

    With S_i = A_i' A_i the trace of the root is the sum of the singular values of A1 A2', which
    needs no matrix root and holds for n <= D too. Covariances of few images are of low rank and the
    distance is then biased upwards: compare only sets of the same size.

    Raises:
        ValueError: fewer than two images in a set, sizes that differ, or NaN.
    """
    one, other = (np.asarray(x, dtype=np.float64) for x in (one, other))
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UserError(f"features {list(one.shape)} and {list(other.shape)}: one width is wanted")
    if min(len(one), len(other)) < 2:
        raise UserError(f"{len(one)} and {len(other)} images: a covariance needs two of each")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise UserError("a feature is not finite")
    a, b = _root(one), _root(other)
    gap = one.mean(0) - other.mean(0)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    value = gap @ gap + np.square(a).sum() + np.square(b).sum() - 2 * root
    return max(float(value), 0.0)


def _root(features: np.ndarray) -> np.ndarray:
    """A [min(n, D), D] with A' A the covariance of the features [n, D]."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    upper: np.ndarray = np.linalg.qr(centred, mode="r")  # type: ignore[assignment]
    return upper
