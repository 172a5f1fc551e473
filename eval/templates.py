"""Templates pooled from many images by media, and the scores of listed pairs, NumPy only."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError

Floats = NDArray[np.float64]

CHUNK = 256  # images pooled by one matrix product
TILE = 1024  # templates along each side of a tile of scores
DENSE = 0.01  # share of a tile's entries from which one matrix product beats separate dot products


def pool(
    features: Any,  # [N, D], an array, or an object that returns rows [n, D] for an index array
    template_ids: ArrayLike,  # [N] integers
    media_ids: ArrayLike,  # [N] integers; only images of one template share a medium
    weights: ArrayLike | None = None,  # [N], e.g. detector scores
    progress: Callable[[int], object] = lambda n: None,
) -> tuple[NDArray[np.int64], Floats]:
    """(ids [T] ascending, templates [T, D] float64, not normalised).

    A template is the sum over its media of the mean of weight * feature over the images of one
    medium: media pooling as in InsightFace's IJB scripts. The sums are float64 for features of any
    dtype.

    Raises:
        ValueError: the lengths do not agree, or a feature or weight is not finite.
    """
    template, media = np.asarray(template_ids), np.asarray(media_ids)
    num = len(features)
    weight = np.ones(num) if weights is None else np.asarray(weights, dtype=np.float64)
    if template.shape != (num,) or media.shape != (num,) or weight.shape != (num,) or not num:
        raise UserError(
            f"{num} features with {template.shape} template ids, {media.shape} media ids and "
            f"{weight.shape} weights"
        )
    order = np.lexsort((media, template))
    template, media, weight = template[order], media[order], weight[order]
    new_template = np.diff(template, prepend=template[0] - 1) != 0
    new_medium = new_template | (np.diff(media, prepend=media[0]) != 0)
    medium = np.cumsum(new_medium) - 1  # [N] from 0, in order
    weight = weight / np.bincount(medium)[medium]
    row = np.cumsum(new_template) - 1  # [N] row of the image's template
    pooled: Floats | None = None
    for start in range(0, num, CHUNK):
        some = order[start : start + CHUNK]
        x = np.asarray(features[some], dtype=np.float64)  # [n, D]
        if pooled is None:
            pooled = np.zeros((row[-1] + 1, x.shape[1]))
        # One product pools all templates of the chunk: row t holds the weights of t's images.
        local = row[start : start + CHUNK] - row[start]
        spread = np.zeros((local[-1] + 1, len(some)))
        spread[local, np.arange(len(some))] = weight[start : start + CHUNK]
        part = spread @ x
        if not np.isfinite(part).all():
            bad = some[~(np.isfinite(x).all(axis=1) & np.isfinite(weight[start : start + CHUNK]))]
            raise UserError(
                f"the feature or weight of image {bad[0] if len(bad) else some[0]} is not finite"
            )
        pooled[row[start] : row[start] + len(part)] += part
        progress(len(some))
    assert pooled is not None
    return template[new_template].astype(np.int64), pooled


def detector_weights(
    scores: ArrayLike, template_ids: ArrayLike, name: Callable[[int], object] = lambda t: t
) -> tuple[Floats, int]:
    """(weights [N] of the images, number of zero weights) from the scores [N] of a detector.

    The weight is the score, or 0 for scores below 0, which leaves the image out: a negative weight
    would invert its template. A template whose weights are all 0 would be empty.

    name: returns the name of a template id for the message.

    Raises:
        ValueError: no image of a template has a score above 0.
    """
    weights = np.maximum(np.asarray(scores, dtype=np.float64), 0)
    template = np.asarray(template_ids)
    empty = np.setdiff1d(template, template[weights > 0])
    if len(empty):
        raise UserError(
            f"no image of template {name(int(empty[0]))} has a detector score above 0 "
            f"({len(empty)} such templates): correct the scores, or do not use them"
        )
    return weights, int((weights == 0).sum())


def normalised(rows: ArrayLike) -> Floats:
    """The rows [T, D] scaled to length 1, float64; a row of zeros stays zero."""
    x = np.asarray(rows, dtype=np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", x, x))
    return x / np.where(norms == 0, 1, norms)[:, None]


def pair_scores(
    templates: NDArray, first: ArrayLike, second: ArrayLike, tile: int = TILE
) -> NDArray:
    """Dot products of the rows first[i] and second[i] of templates [T, D]: [P].

    The pairs are grouped by tiles of the score matrix. A tile with many pairs is computed by one
    matrix product, the others pair by pair; at most one tile is in memory. Templates that no pair
    names are left out.

    Raises:
        ValueError: a row does not exist.
    """
    x = np.asarray(templates)
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(f"the pairs must be two arrays [P], not {a.shape} and {b.shape}")
    if len(a) and not (0 <= min(a.min(), b.min()) and max(a.max(), b.max()) < len(x)):
        raise UserError(f"a pair names a row outside the {len(x)} templates")
    left, right, a, b = _compact(len(x), a, b)
    scores = np.empty(len(a), dtype=x.dtype)
    wide = -(-max(len(right), 1) // tile)
    order, bounds = _by_tile(a, b, tile, wide, -(-max(len(left), 1) // tile) * wide)
    for number in np.flatnonzero(np.diff(bounds)):
        some = order[bounds[number] : bounds[number + 1]]
        i0, j0 = (int(number) // wide) * tile, (int(number) % wide) * tile
        rows, columns = left[i0 : i0 + tile], right[j0 : j0 + tile]
        i, j = a[some] - i0, b[some] - j0
        if len(some) >= DENSE * len(rows) * len(columns):
            product = x[rows] @ x[columns].T  # [tile, tile]
            scores[some] = product[i, j]
        else:
            for start in range(0, len(some), CHUNK):
                part = slice(start, start + CHUNK)
                scores[some[part]] = np.einsum("pd,pd->p", x[rows[i[part]]], x[columns[j[part]]])
    return scores


def _compact(
    num: int, a: NDArray, b: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """(rows on the left, rows on the right, a and b as indices into them).

    Keeps the sides as given (a gallery against probes), unless using all rows on both sides with
    the lower row on the left, which fills half of a square, makes the score matrix smaller.
    """
    used_a, used_b = np.zeros(num, dtype=bool), np.zeros(num, dtype=bool)
    used_a[a], used_b[b] = True, True
    both = used_a | used_b
    if 2 * used_a.sum() * used_b.sum() > both.sum() ** 2:
        a, b = np.minimum(a, b), np.maximum(a, b)
        used_a = used_b = both
    place_a, place_b = (np.cumsum(used, dtype=np.int32) - np.int32(1) for used in (used_a, used_b))
    return np.flatnonzero(used_a), np.flatnonzero(used_b), place_a[a], place_b[b]


def _by_tile(
    a: NDArray, b: NDArray, tile: int, wide: int, tiles: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pairs ordered by tile, start of each tile [tiles + 1])."""
    # NumPy sorts 16-bit keys by radix sort, in a third of the time.
    kind: type[np.integer] = np.uint16 if tiles < 1 << 16 else np.int64
    number: NDArray[np.integer] = (a // tile).astype(kind)
    number *= kind(wide)
    number += (b // tile).astype(kind)
    order = np.argsort(number, kind="stable")
    counts = np.bincount(number, minlength=tiles)
    return order, np.concatenate(([0], np.cumsum(counts)))
