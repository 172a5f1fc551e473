"""The LFW family as InsightFace packs it: the pairs of a .bin, embedded and scored.

Other lists of pairs are read in eval/protocols/pair_lists.py.

Letters: P pairs, 2P images (pair i is images 2i and 2i + 1), D embedding size, n images of a batch.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.verification_bin import PairSet
from eval import verification
from eval.embedders import extract
from eval.embedders.images import SIZE, Encoded

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # RGB [n, 112, 112, 3] -> [n, D]


def embed(
    forward: Forward,
    encoded: Sequence[bytes],
    batch_size: int,
    where: str = "",
    resize: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(flip_sum [n, D], norms [n, 2]): e(image) + e(mirrored image), and the two norms, float64.

    One batch of images is decoded at a time, ahead of the network.

    Raises:
        ValueError: an image that cannot be decoded, or is of another size than the network's and
            not to be resized, named by its number after `where`.
    """
    if not encoded:  # a process may get no image of a small set: its rows still need their width
        width = forward(np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8)).shape[1]
        return np.zeros((0, width)), np.zeros((0, 2))

    def views(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return images, np.ascontiguousarray(images[:, :, ::-1])

    starts = range(0, len(encoded), batch_size)
    ranges = [range(i, min(i + batch_size, len(encoded))) for i in starts]
    sums, norms = [], []
    for _, pair in extract.batches(Encoded(where, encoded, resize), ranges, views, threads=1):
        plain, flipped = (np.asarray(forward(x), dtype=np.float64) for x in pair)  # [n, D]
        sums.append(plain + flipped)
        norms.append(np.linalg.norm(np.stack([plain, flipped], axis=1), axis=2))
    return np.concatenate(sums), np.concatenate(norms)


def count_resized(pairs: PairSet, resize: bool) -> int:
    """How many images of the set have to be resized.

    Raises:
        ValueError: one is of another size than the network's and not to be resized.
    """
    return Encoded(f"{pairs.name}.bin", pairs.encoded, resize).num_resized()


def score(flip_sum: ArrayLike, norms: ArrayLike, issame: ArrayLike) -> dict:
    """`verification.evaluate` of the flip sums [2P, D], and xnorm, the mean of norms [2P, 2].

    Raises:
        ValueError: as `verification.evaluate`.
    """
    return {
        **verification.evaluate(flip_sum, issame),
        "xnorm": float(np.mean(np.asarray(norms, dtype=np.float64))),
    }
