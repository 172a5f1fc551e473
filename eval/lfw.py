"""The LFW family: pairs of aligned faces from a .bin or a pairs.txt, embedded and scored.

Letters: P pairs, 2P images (pair i is images 2i and 2i + 1), D embedding size, n images of a batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.decode import decode
from eval import unpickle, verification

SIZE = 112  # pixels, both sides
EXTENSIONS = (".jpg", ".jpeg", ".png")

Image = tuple[str, int]  # a name of the list and the number behind it
Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # RGB [n, 112, 112, 3] -> [n, D]


class PairSet(NamedTuple):
    name: str
    encoded: list[bytes]  # 2P image files
    issame: NDArray[np.bool_]  # [P]
    missing: tuple[str, ...] = ()  # pairs left out because an image is absent, one text each


def load_bin(path: str | Path) -> PairSet:
    """The pairs of an InsightFace `.bin`: a pickle of (2P encoded images, P booleans).

    Images are bytes, Python-2 strings or 1-D uint8 arrays.

    Raises:
        ValueError: truncated, damaged, a pickle that asks for anything beyond that, or counts that
            do not agree; the message names the file.
        OSError: the file cannot be read.
    """
    content = unpickle.load(path)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise ValueError(f"{path}: a pickle of (images, issame) is expected")
    images, labels = content
    if isinstance(labels, unpickle.Array) and labels.dtype == "b1" and len(labels.shape) == 1:
        labels = [value != 0 for value in labels.data]
    if not isinstance(images, tuple | list) or not isinstance(labels, tuple | list):
        raise ValueError(f"{path}: images and issame must be lists")
    if not labels or len(images) != 2 * len(labels):
        raise ValueError(
            f"{path}: {len(images)} images for {len(labels)} pairs; each pair has two images"
        )
    for i, label in enumerate(labels):
        if not isinstance(label, int) or label not in (0, 1):
            # Its type only: the text of nested lists that share parts can be endless.
            kind = type(label).__name__
            raise ValueError(f"{path}: issame[{i}] ({kind}) is neither a boolean nor 0 or 1")
    encoded = [_image_bytes(image, f"{path}: image {i}") for i, image in enumerate(images)]
    return PairSet(Path(path).stem, encoded, np.array(labels, dtype=bool))


def load_pairs(pairs_txt: str | Path, image_dir: str | Path) -> PairSet:
    """The pairs of a list in LFW's own format whose images lie in `image_dir`.

    A line is `name n1 n2` (same) or `name1 n1 name2 n2` (different); image n of a name is
    `<name>/<name>_<n as four digits>.jpg` (or .jpeg, .png). A first line of numbers, `folds n` of
    view 2 or `n` of view 1, is checked against what follows: n pairs of each kind in each fold.
    Pairs keep their order, hence LFW's ten folds stay its folds; but view 1 has no folds, all same
    pairs come first, and so its pairs are dealt out evenly, else a fold would hold one kind only.
    A pair with an absent image is left out and named in `missing`.

    Raises:
        ValueError: a line of another form, a count that differs from the first line, or not one
            pair with both images.
        OSError: the list or an image cannot be read.
    """
    numbers, pairs = _read_list(Path(pairs_txt))
    files: dict[Image, bytes | None] = {}
    for image in {image for _, *both in pairs for image in both}:
        files[image] = _read_image(Path(image_dir), *image)
    encoded: list[bytes] = []
    issame: list[bool] = []
    missing: list[str] = []
    for line, first, second in pairs:
        a, b = files[first], files[second]
        if a is None or b is None:
            absent = " and ".join(_stem(*x) for x in (first, second) if files[x] is None)
            missing.append(f"{pairs_txt}:{line}: no image {absent}")
            continue
        encoded += [a, b]
        issame.append(first[0] == second[0])
    if not issame:
        raise ValueError(
            f"{image_dir}: none of the {len(pairs)} pairs of {pairs_txt} has both images; "
            f"expected e.g. {Path(image_dir) / pairs[0][1][0] / _stem(*pairs[0][1])}.jpg"
        )
    if len(numbers) == 1:
        order = _evenly(np.array(issame))
        encoded = [encoded[2 * i + side] for i in order for side in (0, 1)]
        issame = [issame[i] for i in order]
    return PairSet(Path(pairs_txt).stem, encoded, np.array(issame), tuple(missing))


def embed(
    forward: Forward, encoded: Sequence[bytes], batch_size: int, where: str = ""
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(flip_sum [n, D], norms [n, 2]): e(image) + e(mirrored image), and the two norms, float64.

    One batch of images is decoded at a time, ahead of the network.

    Raises:
        ValueError: an image that cannot be decoded, named by its number after `where`.
    """
    if not encoded:  # a process may get no image of a small set: its rows still need their width
        width = forward(np.zeros((1, SIZE, SIZE, 3), dtype=np.uint8)).shape[1]
        return np.zeros((0, width)), np.zeros((0, 2))
    sums, norms = [], []
    for images in _batches(encoded, batch_size, where):
        plain = np.asarray(forward(images), dtype=np.float64)  # [n, D]
        mirrored = np.ascontiguousarray(images[:, :, ::-1])
        flipped = np.asarray(forward(mirrored), dtype=np.float64)
        sums.append(plain + flipped)
        norms.append(np.linalg.norm(np.stack([plain, flipped], axis=1), axis=2))
    return np.concatenate(sums), np.concatenate(norms)


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
    if isinstance(image, unpickle.Array) and image.dtype == "u1" and len(image.shape) == 1:
        return image.data
    raise ValueError(f"{where} is neither bytes nor a 1-D uint8 array")


def _batches(encoded: Sequence[bytes], batch_size: int, where: str) -> Iterator[NDArray[np.uint8]]:
    """uint8 RGB [n, 112, 112, 3], the next batch being decoded while one is in use."""

    def decoded(start: int) -> NDArray[np.uint8]:
        numbers = range(start, min(start + batch_size, len(encoded)))
        return np.stack([decode(encoded[i], SIZE, f"{where} image {i}".lstrip()) for i in numbers])

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(decoded, 0)
        for start in range(batch_size, len(encoded) + batch_size, batch_size):
            images = coming.result()
            if start < len(encoded):
                coming = ahead.submit(decoded, start)
            yield images


def _read_list(path: Path) -> tuple[list[int], list[tuple[int, Image, Image]]]:
    """The numbers of the first line, if it holds numbers, and (line number, image, image)."""
    lines = [(i, line.split()) for i, line in enumerate(path.read_text().splitlines(), 1)]
    lines = [(i, fields) for i, fields in lines if fields]
    numbers: list[int] = []
    if lines and len(lines[0][1]) <= 2 and all(field.isdecimal() for field in lines[0][1]):
        numbers = [int(field) for field in lines.pop(0)[1]]
    pairs = []
    for i, fields in lines:
        match fields:
            case [name, n1, n2] if n1.isdecimal() and n2.isdecimal():
                pairs.append((i, (name, int(n1)), (name, int(n2))))
            case [name1, n1, name2, n2] if n1.isdecimal() and n2.isdecimal():
                pairs.append((i, (name1, int(n1)), (name2, int(n2))))
            case _:
                raise ValueError(
                    f"{path}:{i}: {' '.join(fields)!r} is neither 'name n1 n2' nor "
                    "'name1 n1 name2 n2'"
                )
    if numbers and len(pairs) != 2 * math.prod(numbers):
        raise ValueError(
            f"{path}: {len(pairs)} pairs where its first line announces {2 * math.prod(numbers)}"
        )
    if not pairs:
        raise ValueError(f"{path}: no pairs in it")
    return numbers, pairs


def _evenly(issame: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order of the pairs [P] in which every stretch holds its share of both kinds."""
    place = np.empty(len(issame))
    for kind in (True, False):
        of_kind = np.flatnonzero(issame == kind)
        place[of_kind] = (np.arange(len(of_kind)) + 0.5) / len(of_kind)
    return np.argsort(place, kind="stable")


def _read_image(image_dir: Path, name: str, n: int) -> bytes | None:
    for extension in EXTENSIONS:
        path = image_dir / name / f"{_stem(name, n)}{extension}"
        if path.is_file():
            return path.read_bytes()
    return None


def _stem(name: str, n: int) -> str:
    return f"{name}_{n:04d}"
