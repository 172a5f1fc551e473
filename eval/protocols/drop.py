"""What a network loses by being stored in another form: two embedders on the same pairs.

Letters: P pairs, 2P images, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_tools.common.errors import UserError
from data_tools.verification_bin import PairSet
from eval import verification
from eval.embedders.extract import batches
from eval.embedders.images import Encoded
from eval.roc import curve, points_on

Forward = Callable[[np.ndarray], np.ndarray]  # uint8 RGB [n, 112, 112, 3] -> [n, D]

_FEWEST_ACCEPTS = 5  # false accepts behind the FAR at which TAR is compared


def thinned(pairs: PairSet, most: int) -> PairSet:
    """At most `most` pairs, evenly spread over the set's order, hence over its folds."""
    if len(pairs.issame) <= most:
        return pairs
    kept = np.unique(np.linspace(0, len(pairs.issame) - 1, most).round().astype(int))
    encoded = [pairs.encoded[2 * i + side] for i in kept for side in (0, 1)]
    return PairSet(pairs.name, encoded, pairs.issame[kept])


def far_of(num_different: int) -> float:
    """The smallest power of ten at which so many pairs of two people still give five accepts."""
    return float(10.0 ** -np.floor(np.log10(max(num_different / _FEWEST_ACCEPTS, 1.0))))


def compare(
    before: Forward,
    after: Forward,
    pairs: PairSet,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda count: None,
    resize: bool = False,
) -> dict[str, Any]:
    """Ten-fold accuracy and TAR of both networks (images alone, no mirror), and what is lost.

    Drops are points: 100 (before - after); negative where the second is better. The FAR is the
    smallest that the set shows with five false accepts, by the strict rule (FAR at most that).
    """
    ranges = _ranges(len(pairs.encoded), batch_size)
    parts: list[list[np.ndarray]] = [[], []]
    faces = Encoded(pairs.name, pairs.encoded, resize)
    for _, images in batches(faces, ranges, lambda x: x, threads=1):
        for found, forward in zip(parts, (before, after), strict=True):
            found.append(forward(images).astype(np.float64))
        progress(len(images))
    embeddings = [np.concatenate(found) for found in parts]  # [2P, D] each
    for which, e in zip(("first", "second"), embeddings, strict=True):
        lengths = np.linalg.norm(e, axis=1)
        if wrong := int((~np.isfinite(lengths) | (lengths == 0)).sum()):
            raise UserError(
                f"{pairs.name}: the {which} network gives {wrong} of {len(e)} images an embedding "
                "that is zero or not finite"
            )
    far = far_of(int((~pairs.issame).sum()))
    scores = []
    for e in embeddings:
        e = e / np.linalg.norm(e, axis=1, keepdims=True)
        cosine = (e[0::2] * e[1::2]).sum(1)
        tar = points_on(curve(cosine, pairs.issame), [far])[0][0]
        accuracy = verification.evaluate(e, pairs.issame)["accuracy_mean"]
        scores.append({"accuracy": float(accuracy), "tar": float(tar)})
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in embeddings]
    cosine = (unit[0] * unit[1]).sum(1)  # [2P] of the same image
    return {
        "set": pairs.name,
        "pairs": len(pairs.issame),
        "far": far,
        "torch": scores[0],
        "file": scores[1],
        "accuracy_drop": 100 * (scores[0]["accuracy"] - scores[1]["accuracy"]),
        "tar_drop": 100 * (scores[0]["tar"] - scores[1]["tar"]),
        "cosine": {"min": float(cosine.min()), "mean": float(cosine.mean())},
    }


def of_people(
    before: Forward,
    after: Forward,
    images: np.ndarray,  # uint8 RGB [n, 112, 112, 3]
    people: np.ndarray,  # [n] whom each shows
    fars: Sequence[float],
    batch_size: int = 32,
) -> dict[str, Any]:
    """TAR of both networks over all pairs of the images, and what is lost, at each FAR.

    All n (n - 1) / 2 pairs: the strict rule's threshold rests on some thousands of false accepts
    where a list of drawn pairs has thirty, so that a loss of a tenth of a point can be told.
    """
    scores, units = [], []
    first, second = np.triu_indices(len(images), 1)
    same = people[first] == people[second]
    for forward in (before, after):
        e = np.concatenate(
            [forward(images[r.start : r.stop]) for r in _ranges(len(images), batch_size)]
        )
        units.append(e / np.linalg.norm(e, axis=1, keepdims=True))
        cosine = (units[-1] @ units[-1].T)[first, second]
        scores.append(points_on(curve(cosine, same), fars)[0])
    cosine = (units[0] * units[1]).sum(1)
    return {
        "pairs": len(same),
        "same": int(same.sum()),
        "far": list(fars),
        "torch": scores[0].tolist(),
        "file": scores[1].tolist(),
        "tar_drop": (100 * (scores[0] - scores[1])).tolist(),
        "cosine": {"min": float(cosine.min()), "mean": float(cosine.mean())},
    }


def _ranges(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]
