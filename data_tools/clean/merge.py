"""`merge`: one person under two labels, two people under one: proposals from features.

- The centre of a label is the mean of its normalised features. Two labels whose centres have a
  cosine of at least --same are proposed as one person (the lower label stays);
  so are chains of such.
- A label is cut in two by spherical 2-means from its two farthest images; if both parts have at
  least --min-images and their centres a cosine of at most --different, the smaller part is
  proposed as a person of its own.

Which cosines mean that depends on the network. The report holds both thresholds, and nothing is
applied: look at the pairs, then put the index in force with `relabel`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.clean.features import FeatureStore
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.schema import check_number
from data_tools.decisions import before_cleaning, write_decision

_BLOCK = 4096  # rows of a product of centres
_ROUNDS = 20  # of 2-means at most


def class_centres(
    x: FeatureStore, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Normalised means of normalised features, float32 [C, D]; zero for a class without images."""
    sums = np.zeros((num_classes, x.size), np.float32)
    for start in range(0, len(images), _BLOCK):
        some = slice(start, start + _BLOCK)
        np.add.at(sums, labels[some], x.unit(images[some]))
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(norms > 0, norms, 1)


def same_pairs(centres: np.ndarray, threshold: float) -> list[tuple[int, int, float]]:
    """(a, b, cosine), a < b, for the pairs of classes with centres at least that near."""
    found = []
    for start in range(0, len(centres), _BLOCK):
        for other in range(start, len(centres), _BLOCK):
            cos = centres[start : start + _BLOCK] @ centres[other : other + _BLOCK].T
            for a, b in np.argwhere(cos >= threshold).tolist():
                if start + a < other + b:
                    found.append((start + a, other + b, float(cos[a, b])))
    return found


def lowest_of_chain(pairs: list[tuple[int, int, float]], num_classes: int) -> np.ndarray:
    """For each class the lowest one that pairs join it to, int64 [C]."""
    root = np.arange(num_classes)

    def find(c: int) -> int:
        while root[c] != c:
            root[c] = root[root[c]]
            c = int(root[c])
        return c

    for a, b, _ in pairs:
        one, other = sorted((find(a), find(b)))
        root[other] = one
    return np.array([find(c) for c in range(num_classes)])


def halves(x: np.ndarray) -> tuple[np.ndarray, float]:
    """2-means on the sphere of x [n, D], n >= 2: which part, bool [n]; the centres' cosine."""
    far = int((x @ x.mean(0)).argmin())
    centres = np.stack([x[far], x[int((x @ x[far]).argmin())]])
    part = np.zeros(len(x), bool)
    for _ in range(_ROUNDS):
        now = (x @ centres.T).argmax(1) == 1
        if now.all() or not now.any():
            return np.zeros(len(x), bool), 1.0
        for k, mine in enumerate((~now, now)):
            mean = x[mine].mean(0)
            centres[k] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        if (now == part).all():
            break
        part = now
    return part, float(centres[0] @ centres[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory")
    parser.add_argument("features", type=Path, help="what embed made of it")
    parser.add_argument("out", type=Path, help="relabel index to write: the proposals")
    parser.add_argument(
        "--same",
        type=float,
        default=0.75,
        help="least cosine of two labels that are one person (0.75)",
    )
    parser.add_argument(
        "--different",
        type=float,
        default=0.2,
        help="largest cosine of two parts of a label that are two people (0.2)",
    )
    parser.add_argument(
        "--min-images", type=int, default=3, help="least number of images of each part (3)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not -1 <= args.different < args.same <= 1:
        raise UserError("--different and --same must be cosines, and --different below --same")
    check_number("--min-images", args.min_images, 1)
    data = shards.open(args.path)
    x, images = FeatureStore(args.features, data.fingerprint), before_cleaning(data)
    centres = class_centres(x, images, data.labels, data.num_classes)
    pairs = same_pairs(centres, args.same)
    new = lowest_of_chain(pairs, data.num_classes)[data.labels]
    order, ends = data.by_class()
    splits: list[dict[str, Any]] = []
    for c in range(data.num_classes):
        mine = order[ends[c] : ends[c + 1]]
        if len(mine) < 2 * args.min_images:
            continue
        part, cos = halves(x.unit(images[mine]))
        sizes = sorted((int(part.sum()), int((~part).sum())))
        if sizes[0] < args.min_images or cos > args.different:
            continue
        smaller = part if part.sum() <= (~part).sum() else ~part
        new[mine[smaller]] = data.num_classes + len(splits)
        splits.append({"class": c, "images": sizes, "cosine": cos})
    write_decision(args.out, data, new)
    names = data.identities
    print(
        f"{args.out}: proposed: {count(len(pairs), 'pair')} of labels that are one person (cosine "
        f">= {args.same}), {count(len(splits), 'label')} that are two (cosine <= {args.different})"
    )
    return {
        "relabel": str(args.out),
        "same": args.same,
        "different": args.different,
        "merge": [{"labels": [names[a], names[b]], "cosine": cos} for a, b, cos in pairs],
        "split": [{**split, "label": names[split["class"]]} for split in splits],
    }
