"""Real faces that an inversion is compared with, and embeddings to invert.

Letters: N images, D embedding size, C identities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import shards, verification_bin
from data_tools.common import arrays, files
from data_tools.common.errors import UserError
from data_tools.images.decode import check_size, decode_any_size, resized
from data_tools.images.image_file import is_image_name
from data_tools.insightface import find_rec
from recognition.backbones.input import INPUT_SIZE

Embed = Callable[[np.ndarray], np.ndarray]  # uint8 RGB [n, 112, 112, 3] -> [n, D]

_BATCH = 64  # images
_NO_ONE = -1


class Faces:
    """Aligned images with a label each, decoded when asked for."""

    def __init__(
        self,
        path: str,
        labels: np.ndarray,
        get: Callable[[int], bytes],
        names: Sequence[str] = (),
        resize: bool = False,
    ) -> None:
        self.path, self.labels, self._get, self.names = path, labels, get, names
        self._resize = resize
        self._resized: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 RGB [n, 112, 112, 3]. Raises: ValueError naming an image that cannot be read."""
        return np.stack([self._pixels(int(i)) for i in numbers])

    def _pixels(self, i: int) -> np.ndarray:
        where, encoded = f"{self.path}: image {i}", self._get(i)
        image = decode_any_size(encoded, where)
        height, width = image.shape[:2]
        if check_size(width, height, INPUT_SIZE, where, self._resize):
            self._resized.add(i)
            return resized(image, INPUT_SIZE)
        return image

    def facts(self) -> dict[str, Any]:
        """How many images were resized so far, for the report, where that is allowed."""
        return {"resized_images": len(self._resized)} if self._resize else {}

    def embed(self, embed: Embed, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [n, D] of some of the images, not normalised.

        Raises:
            ValueError: `numbers` is empty, an image cannot be read, or an embedding is not finite.
        """
        numbers = np.asarray(numbers)
        if not len(numbers):
            raise UserError(f"{self.path} has no image of a labelled person")
        starts = range(0, len(numbers), _BATCH)
        rows = np.concatenate([embed(self.pixels(numbers[i : i + _BATCH])) for i in starts])
        return finite(rows, f"of image {{}} of {self.path}", numbers)

    def of_each(self, most: int) -> np.ndarray:
        """int64 [n]: up to `most` images of every identity, as images_of_each()."""
        return images_of_each(self.labels, most)


def images_of_each(labels: np.ndarray, most: int) -> np.ndarray:
    """int64 [n]: the first `most` images of every identity, identity by identity."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[(ordered != _NO_ONE) & (rank < most)]


def finite(rows: np.ndarray, what: str, numbers: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The embeddings [n, D] themselves. Raises: ValueError naming the first that is not finite."""
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise UserError(
            f"the embedding {what.format(numbers[int(wrong[0])])} is not finite ({len(wrong)} of "
            f"{len(rows)}): the network that made it is damaged or its training diverged"
        )
    return rows


def open_faces(path: str | Path, resize: bool = False) -> Faces:
    """Shards or an InsightFace directory; a .bin of pairs; or a folder DIR/<identity>/*.jpg, or of
    images alone.

    In a .bin the two images of a pair of one person are an identity, and the other pairs are left
    out: a person in two pairs counts as two.

    Raises:
        FileNotFoundError, ValueError: none of these, or it is damaged.
    """
    path = Path(path)
    if files.is_file(path) and path.suffix == ".bin":
        pairs = verification_bin.load_bin(path)
        same = np.repeat(np.asarray(pairs.issame), 2)
        labels = np.where(same, np.arange(len(same)) // 2, _NO_ONE)
        return Faces(str(path), labels, pairs.encoded.__getitem__, resize=resize)
    if not files.is_dir(path):
        raise FileNotFoundError(f"{path}: no shards, no .bin and no folder of images")
    if files.is_file(path / "index.json") or find_rec(path):
        data = shards.open(path)
        return Faces(str(path), np.asarray(data.labels), lambda i: data[i][1], _names(data), resize)
    images = sorted(
        file for file in files.below(path) if is_image_name(file.name) and files.is_file(file)
    )
    if not images:
        raise UserError(f"{path} holds neither shards nor images")
    people = [str(file.parent.relative_to(path)) for file in images]
    if len(set(people)) == 1:  # a folder of images alone: each its own
        people = [str(file.relative_to(path)) for file in images]
    names, labels = np.unique(people, return_inverse=True)
    return Faces(str(path), labels, lambda i: files.read_bytes(images[i]), names.tolist(), resize)


def _names(data: shards.Shards) -> Sequence[str]:
    try:
        return data.identities
    except (OSError, ValueError):
        return ()


def means(faces: Faces, embed: Embed, num_classes: int, most: int) -> np.ndarray:
    """float64 [C, D]: the mean direction of up to `most` images of each class; 0 without any."""
    numbers = np.sort(faces.of_each(most))
    rows = faces.embed(embed, numbers).astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    total = np.zeros((num_classes, rows.shape[1]))
    np.add.at(total, faces.labels[numbers], rows)
    return total


def load_embeddings(path: str | Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [N, D], int64 labels [N]) of an .npy, or an .npz with `embeddings` and maybe
    `labels`; without labels every row is an identity of its own.

    Raises:
        ValueError: another shape or dtype, NaN or infinity, or a row of zeros, naming the row.
        OSError: it cannot be read.
    """
    labels = None
    try:
        content = arrays.load_npy(path)
        if isinstance(content, np.lib.npyio.NpzFile):
            names = sorted(content)
            labels = content["labels"] if "labels" in names else None
            content = content["embeddings"] if "embeddings" in names else None
    except (UserError, OSError):
        raise
    except Exception as error:  # compressed arrays raise zipfile's, zlib's and tokenize's errors
        raise arrays.not_numbers(path, error) from error
    if content is None:
        raise UserError(f"{path} has {names}: `embeddings` is wanted")
    if content.ndim != 2 or content.shape[1] != size or content.dtype.kind != "f":
        raise UserError(
            f"{path}: {content.dtype} {list(content.shape)}; floats [N, {size}] are wanted, the "
            "embeddings of this network"
        )
    if not len(content):
        raise UserError(f"{path} holds no embedding")
    rows = content.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(wrong):
        raise UserError(f"{path}: row {wrong[0]} is not finite ({len(wrong)} such rows)")
    zero = np.flatnonzero(~rows.any(1))
    if len(zero):
        raise UserError(f"{path}: row {zero[0]} is all zeros, no direction ({len(zero)} rows)")
    if labels is None:
        return rows, np.arange(len(rows))
    if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: labels {labels.dtype} {list(labels.shape)}, not int [{len(rows)}]"
        )
    return rows, labels.astype(np.int64)
