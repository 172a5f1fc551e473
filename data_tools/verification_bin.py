"""The pairs of InsightFace's verification sets: `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin`.

Letters: P pairs, 2P images (pair i is images 2i and 2i + 1).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools import unpickle
from data_tools.common.errors import UserError


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


def _image_bytes(image: object, where: str) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, unpickle.Array) and image.dtype == "u1" and image.is_row():
        return image.data
    raise UserError(f"{where} is neither bytes nor a uint8 array of one row or column")
