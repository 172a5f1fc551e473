"""The LFW family as InsightFace packs it: the pairs of a .bin, embedded and scored.

Other lists of pairs are read in eval/protocols/pair_lists.py.

Letters: P pairs, 2P images (pair i is images 2i and 2i + 1), D embedding size, n images of a batch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.common.errors import UserError
from eval import verification
from eval.embedders import extract, unpickle
from eval.embedders.images import SIZE, Encoded

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # RGB [n, 112, 112, 3] -> [n, D]


class PairSet(NamedTuple):
    name: str
    encoded: list[bytes]  # 2P image files
    issame: NDArray[np.bool_]  # [P]


def load_bin(path: str | Path) -> PairSet:
    """The pairs of an InsightFace `.bin`: a pickle of (2P encoded images, P booleans).

    Images are bytes, Python-2 strings or uint8 arrays [n], [n, 1] or [1, n] (as older OpenCV's
    imencode gave them); issame is a list or an array of bools or of integers 0 and 1.

    Raises:
        ValueError: truncated, damaged, a pickle that asks for anything beyond that, or counts that
            do not agree; the message names the file.
        OSError: the file cannot be read.
    """
    content = unpickle.load(path)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path}: a pickle of (images, issame) is expected")
    images, labels = content
    if isinstance(labels, unpickle.Array) and labels.is_row():
        labels = labels.values()
    if not isinstance(images, tuple | list) or not isinstance(labels, tuple | list):
        raise UserError(f"{path}: images and issame must be lists")
    if not labels or len(images) != 2 * len(labels):
        raise UserError(
            f"{path}: {len(images)} images for {len(labels)} pairs; each pair has two images"
        )
    for i, label in enumerate(labels):
        if not isinstance(label, int) or label not in (0, 1):
            # Its type only: the text of nested lists that share parts can be endless.
            kind = type(label).__name__
            raise UserError(f"{path}: issame[{i}] ({kind}) is neither a boolean nor 0 or 1")
    encoded = [_image_bytes(image, f"{path}: image {i}") for i, image in enumerate(images)]
    return PairSet(Path(path).stem, encoded, np.array(labels, dtype=bool))


def embed(
    forward: Forward, encoded: Sequence[bytes], batch_size: int, where: str = "",
    resize: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
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


def _image_bytes(image: object, where: str) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, unpickle.Array) and image.dtype == "u1" and image.is_row():
        return image.data
    raise UserError(f"{where} is neither bytes nor a uint8 array of one row or column")
