"""`view`: a contact sheet of an identity, of images by number, or of those like a given one."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards
from data_tools.clean.contact_sheet import MAX_FACES, face, write_sheet
from data_tools.clean.features import FeatureStore
from data_tools.common.errors import UserError, UserKeyError
from data_tools.common.messages import count
from data_tools.decisions import before_cleaning

_BLOCK = 65536  # rows searched at a time


def nearest(
    features: FeatureStore, images: np.ndarray, of: int, number: int
) -> list[tuple[int, float]]:
    """Positions in `images` and cosines of the nearest to images[of], itself first."""
    query = features.unit(images[of : of + 1])[0]
    cos = np.concatenate(
        [features.unit(images[s : s + _BLOCK]) @ query for s in range(0, len(images), _BLOCK)]
    )
    best = np.argsort(-cos, kind="stable")[:number]
    return [(int(i), float(cos[i])) for i in best]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a data set directory")
    parser.add_argument("out", type=Path, help="the sheet: FILE.png")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--identity", metavar="NAME", help="all images of this identity")
    what.add_argument("--label", type=int, metavar="C", help="all images of this class")
    what.add_argument("--images", type=int, nargs="+", metavar="I", help="these images")
    what.add_argument("--like", type=int, metavar="I", help="the nearest to image I by --features")
    parser.add_argument("--features", type=Path, help="what embed made, for --like")
    parser.add_argument("--most", type=int, default=100, help="faces on the sheet (100)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= args.most <= MAX_FACES:
        raise UserError(f"--most {args.most}: must be 1 to {MAX_FACES}")
    data = shards.open(args.path)
    chosen = _chosen(args, data)
    shown = chosen[: args.most]
    names = data.identities
    titles = [f"{i} {names[data.labels[i]]}{note}" for i, note in shown]
    write_sheet(args.out, [face(data, i) for i, _ in shown], titles)
    print(f"{args.out}: {len(shown)} of {count(len(chosen), 'image')}")
    return {"path": str(args.out), "shown": [i for i, _ in shown], "found": len(chosen)}


def _chosen(args: argparse.Namespace, data: shards.Shards) -> list[tuple[int, str]]:
    """The images, and what to add to their titles."""
    if args.like is not None:
        _check(args.like, data)
        if args.features is None:
            raise UserError("--like needs --features")
        features = FeatureStore(args.features, data.fingerprint)
        found = nearest(features, before_cleaning(data), args.like, args.most)
        return [(i, f" {cos:.2f}") for i, cos in found]
    if args.images:
        for i in args.images:
            _check(i, data)
        return [(i, "") for i in args.images]
    label = args.label
    if args.identity is not None:
        if args.identity not in data.identities:
            raise UserKeyError(f"{args.path} has no identity {args.identity!r}")
        label = data.identities.index(args.identity)
    images = np.flatnonzero(data.labels == label).tolist()
    if not images:
        raise UserKeyError(f"{args.path} has no image of class {label}")
    return [(i, "") for i in images]


def _check(i: int, data: shards.Shards) -> None:
    if not 0 <= i < len(data):
        raise UserKeyError(f"{data.path} has no image {i}: its images are 0 .. {len(data) - 1}")
