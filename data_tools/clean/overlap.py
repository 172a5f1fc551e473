"""`overlap`: what a training set shares with a test set, and the relabel index that drops it.

A benchmark with its people in training is no benchmark. Three ways to find them:

- the same pixels: by a hash of the decoded image;
- near copies (another encoding, a little contrast): perceptual hashes, at most --bits apart;
- the same person: with --features of both sets (by one network), an image of the training set
  whose cosine to an image of the test set is at least --cosine. Which cosine means one person
  depends on the network: look at the pairs listed in --pairs before you believe it.

TEST is whatever pack reads, or a verification .bin. Dropped are the images found, or with
--identities everybody of whom an image was found.
"""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_tools import relabel, shards
from data_tools.clean.features import FeatureStore
from data_tools.common import cli, files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.parallel import Advance, run_tasks
from data_tools.decisions import before_cleaning, write_decision
from data_tools.images.decode import decode_any_size
from data_tools.sources.source import Images, RecordSource, open_source
from data_tools.verification_bin import load_bin

_TASK = 4096  # images
_BLOCK = 4096  # rows of a product of features
_Found = tuple[str, np.ndarray, np.ndarray | None]  # way, pairs [p, 2], cosines [p]


_BANDS = 4  # of 16 bits: hashes that differ in fewer bits than bands are equal in one of them


def pixel_hash(image: np.ndarray) -> int:
    """64 bits of the BLAKE2 of the shape and pixels, uint8 [h, w, 3]."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest(), "little")


def perceptual_hash(image: np.ndarray) -> int:
    """pHash of RGB uint8 [h, w, 3], 64 bits; near copies differ in few of them.

    The image in grey at 32 x 32, its cosine transform (DCT-II), of the 8 x 8 lowest frequencies a
    bit each, set where it is above their median (without the mean).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "little")


def near_pairs(one: np.ndarray, other: np.ndarray, most: int) -> np.ndarray:
    """All (i, j) whose hashes uint64 one[i] and other[j] differ in at most `most` < 4 bits.

    int64 [p, 2], sorted. Exact: hashes that differ in so few bits have one of four bands in common.
    """
    assert 0 <= most < _BANDS
    found = [np.empty((0, 2), np.int64)]
    for band in range(_BANDS):
        a = (one >> np.uint64(16 * band)).astype(np.uint16)
        b = (other >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(b, kind="stable")
        low = np.searchsorted(b[order], a, side="left")
        high = np.searchsorted(b[order], a, side="right")
        for i in np.flatnonzero(high > low).tolist():
            js = order[low[i] : high[i]]
            js = js[np.bitwise_count(other[js] ^ one[i]) <= most]
            found.append(np.column_stack([np.full(len(js), i), js]))
    return np.unique(np.concatenate(found), axis=0)


def hash_images(images: Images, workers: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 [n, 2], of pixels and perceptual, and which images have them, bool [n]."""
    cuts = np.split(np.arange(len(images)), range(_TASK, len(images), _TASK))
    tasks = [images.select(some) for some in cuts]
    results = run_tasks(_hash, tasks, workers, len(images), title)
    return np.concatenate([h for h, _ in results]), np.concatenate([ok for _, ok in results])


def _hash(images: Images, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    hashes = np.zeros((len(images), 2), np.uint64)
    readable = np.zeros(len(images), bool)
    for i in range(len(images)):
        try:
            image = decode_any_size(images.read(i))
        except ValueError:
            continue
        finally:
            advance(1)
        hashes[i] = pixel_hash(image), perceptual_hash(image)
        readable[i] = True
    return hashes, readable


def by_features(
    train: FeatureStore, train_images: np.ndarray, test: FeatureStore, cosine: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs int64 [p, 2]: each training position with its nearest test image at least that near."""
    y = test.unit(np.arange(test.num_images))
    pairs, values = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for start in range(0, len(train_images), _BLOCK):
        cos = train.unit(train_images[start : start + _BLOCK]) @ y.T  # [block, T]
        nearest = cos.argmax(1)
        value = cos[np.arange(len(cos)), nearest]
        near = np.flatnonzero(value >= cosine)
        pairs.append(np.column_stack([near + start, nearest[near]]))
        values.append(value[near])
    return np.concatenate(pairs), np.concatenate(values)


class _Encoded:
    """The images of a verification .bin."""

    def __init__(self, images: list[bytes], file: str) -> None:
        self._images, self._file = images, file

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> bytes:
        return os.fsencode(self.where(i))

    def where(self, i: int) -> str:
        return f"{self._file}: image {i}"

    def read(self, i: int) -> bytes:
        return self._images[i]

    def select(self, indices: np.ndarray) -> "_Encoded":
        return _Encoded([self._images[i] for i in indices.tolist()], self._file)


def _open_test(path: Path) -> Images:
    if path.suffix != ".bin":
        return open_source(path)
    return _Encoded(load_bin(path).encoded, path.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=Path, help="a data set directory")
    parser.add_argument("test", type=Path, help="whatever pack reads, or a verification .bin")
    parser.add_argument("out", type=Path, help="relabel index of TRAIN to write")
    parser.add_argument(
        "--bits",
        type=int,
        default=3,
        help="bits of 64 that may differ, 0 to 3 (default %(default)s)",
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="the features that embed computed for both sets",
    )
    parser.add_argument(
        "--cosine",
        type=float,
        default=0.7,
        help="least cosine of two images of one person (default %(default)s)",
    )
    parser.add_argument("--identities", action="store_true", help="drop whole identities")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="list every pair found")
    cli.add_workers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not 0 <= args.bits <= 3 or not -1 < args.cosine <= 1:
        raise UserError("--bits must be 0 to 3, and --cosine above -1 and at most 1")
    data = shards.open(args.train)
    train, test = RecordSource(args.train), _open_test(args.test)
    one, readable = hash_images(train, args.workers, "training set")
    other, test_readable = hash_images(test, args.workers, "test set")
    a, b = np.flatnonzero(readable), np.flatnonzero(test_readable)
    near = near_pairs(one[a, 1], other[b, 1], args.bits)
    near = np.column_stack([a[near[:, 0]], b[near[:, 1]]])
    known, at = np.unique(other[b, 0], return_index=True)
    place = np.minimum(np.searchsorted(known, one[a, 0]), max(len(known) - 1, 0))
    same = known[place] == one[a, 0] if len(known) else np.zeros(len(a), bool)
    exact = np.column_stack([a[same], b[at[place[same]]]])
    found: list[_Found] = [("pixels", exact, None), ("perceptual", near, None)]
    if args.features:
        features = FeatureStore(args.features[0], data.fingerprint), FeatureStore(args.features[1])
        if features[0].index["network"] != features[1].index["network"]:
            raise UserError(
                "the features of the two sets come from different networks: embed again"
            )
        if features[1].num_images != len(test):
            raise UserError(
                f"{args.features[1]} has {features[1].num_images} images, {args.test} {len(test)}"
            )
        images = before_cleaning(data)
        pairs, values = by_features(features[0], images, features[1], args.cosine)
        found.append(("cosine", pairs, values))
    hit = np.unique(np.concatenate([pairs[:, 0] for _, pairs, _ in found]))
    people = np.unique(data.labels[hit])
    drop = np.isin(data.labels, people) if args.identities else np.isin(np.arange(len(data)), hit)
    if drop.all():
        raise UserError("everything is shared with the test set: nothing would be left")
    write_decision(args.out, data, np.where(drop, relabel.DROP, data.labels))
    if args.pairs:
        _list_pairs(args.pairs, found, train, test)
    counts = {way: len(np.unique(pairs[:, 0])) for way, pairs, _ in found}
    print(
        f"{args.out}: shared with {args.test}: {count(len(hit), 'image')} of "
        f"{count(len(people), 'identity', 'identities')} "
        f"({', '.join(f'{way} {n}' for way, n in counts.items())}); "
        f"{count(int(drop.sum()), 'image')} to drop; unreadable: {int((~readable).sum())} and "
        f"{int((~test_readable).sum())}"
    )
    return {
        "relabel": str(args.out),
        "images": len(hit),
        "identities": len(people),
        "found": counts,
        "dropped": int(drop.sum()),
        "unreadable": [int((~readable).sum()), int((~test_readable).sum())],
    }


def _list_pairs(path: Path, found: list[_Found], train: Images, test: Images) -> None:
    with files.replacing(path) as file:
        for way, pairs, values in found:
            for n, (i, j) in enumerate(pairs.tolist()):
                value = "" if values is None else f"{values[n]:.4f}"
                line = f"{way}\t{i}\t{train.where(i)}\t{test.where(j)}\t{value}\n"
                file.write(os.fsencode(line))
