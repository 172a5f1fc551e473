"""Sets of faces by number, each decoded when it is asked for: never all held as pixels.

Letters: N images.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.common.errors import UserError
from data_tools.decode import decode, decode_any_size
from eval import align

SIZE = 112  # pixels, both sides
AS_GIVEN = "none: images are taken as aligned to the ArcFace template, 112 x 112"
FIVE_POINTS = (
    "five points to the ArcFace template, 112 x 112: similarity by Umeyama in float32, "
    "OpenCV 4 warpAffine, bilinear, black beyond the border"
)


class ImageSet(Protocol):
    name: str
    alignment: str  # AS_GIVEN or FIVE_POINTS

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        """RGB [112, 112, 3]; any thread may ask. Raises: ValueError naming a broken image."""

    def digest(self) -> str:
        """sha256 of what decides the pixels: the same for the same data."""


class Encoded:
    """Image files held in memory, as a verification .bin has them."""

    def __init__(self, name: str, encoded: Sequence[bytes]) -> None:
        self.name, self.encoded, self.alignment = name, encoded, AS_GIVEN

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return decode(self.encoded[i], SIZE, f"{self.name} image {i}".lstrip())

    def digest(self) -> str:
        total = hashlib.sha256()
        for image in self.encoded:
            total.update(struct.pack("<q", len(image)) + image)
        return total.hexdigest()


class Files:
    """Image files of a directory, aligned by their landmarks where there are any.

    points [N, 5, 2]: in pixels of the files; without them the images must be aligned and square.
    The digest takes names, sizes and times of change, not contents: reading 10 M files only to
    name them would take as long as embedding them on a GPU.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        paths: Sequence[str],  # [N] relative to root
        points: NDArray[np.float32] | None = None,
    ) -> None:
        assert points is None or points.shape == (len(paths), 5, 2)
        self.name, self.root, self.paths, self.points = name, str(root), paths, points
        self.alignment = AS_GIVEN if points is None else FIVE_POINTS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        path = os.path.join(self.root, self.paths[i])
        with open(path, "rb") as file:
            content = file.read()
        if self.points is None:
            return decode(content, SIZE, path)
        image = decode_any_size(content, path)
        try:
            return align.warp(image, self.points[i], SIZE)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def digest(self) -> str:
        total = hashlib.sha256()
        for path in self.paths:
            state = os.stat(os.path.join(self.root, path))
            total.update(path.encode(errors="surrogateescape"))
            total.update(struct.pack("<qq", state.st_size, state.st_mtime_ns))
        if self.points is not None:
            total.update(np.ascontiguousarray(self.points).tobytes())
        return total.hexdigest()


class Subset:
    """Some images of a set, by their numbers."""

    def __init__(self, whole: ImageSet, numbers: Sequence[int], name: str) -> None:
        self.whole, self.numbers = whole, numbers
        self.name, self.alignment = name, whole.alignment

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return self.whole[self.numbers[i]]

    def digest(self) -> str:
        chosen = np.asarray(self.numbers, dtype=np.int64).tobytes()
        return hashlib.sha256(self.whole.digest().encode() + chosen).hexdigest()
