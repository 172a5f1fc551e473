"""Sets of faces, indexed by number and decoded on demand, so never all in memory as pixels.

A set is identified by its content: its digest covers the bytes of all its images, so cached
embeddings are never used for other pixels.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.common.errors import UserError
from data_tools.images import template
from data_tools.images.decode import check_size, decode, decode_any_size, pixels_of

SIZE = 112  # pixels, both sides
AS_GIVEN = "none: images are taken as aligned to the ArcFace template, 112 x 112"
RESIZED = AS_GIVEN + "; square images of another size are resized to it, bicubic"
FIVE_POINTS = (
    "five points to the ArcFace template, 112 x 112: similarity by Umeyama in float32, "
    "OpenCV 4 warpAffine, bilinear, black beyond the border"
)


class ImageSet(Protocol):
    name: str
    alignment: str  # AS_GIVEN, RESIZED or FIVE_POINTS

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        """RGB [112, 112, 3]; thread-safe. Raises: ValueError naming a broken image."""

    def name_of(self, i: int) -> str:
        """What a person calls image i: its path, or its number."""

    def digest(self) -> str:
        """sha256 of everything that determines the pixels."""

    def num_resized(self) -> int:
        """How many images are resized; 0 if resizing is off.

        Raises: ValueError naming an image of another size if resizing is off.
        """


class Encoded:
    """Encoded images in memory, as a verification .bin contains them."""

    def __init__(self, name: str, encoded: Sequence[bytes], resize: bool = False) -> None:
        self.name, self.encoded, self._resize = name, encoded, resize
        self.alignment = RESIZED if resize else AS_GIVEN

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return decode(self.encoded[i], SIZE, self._where(i), self._resize)

    def name_of(self, i: int) -> str:
        return f"image {i}"

    def digest(self) -> str:
        total = hashlib.sha256()
        for image in self.encoded:
            total.update(struct.pack("<q", len(image)) + image)
        return total.hexdigest()

    def num_resized(self) -> int:
        return sum(
            _is_resized(image, self._where(i), self._resize) for i, image in enumerate(self.encoded)
        )

    def _where(self, i: int) -> str:
        return f"{self.name} image {i}".lstrip()


class Files:
    """Image files of a directory, aligned by their landmarks if given.

    points [N, 5, 2]: in pixels of the files; without them the images must be aligned already.
    resize: the images are aligned at another size and are resized. All files are read once before
    the embedding, for their digest and size, so an unaligned photograph is refused early.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        paths: Sequence[str],  # [N] relative to root
        points: NDArray[np.float32] | None = None,
        resize: bool = False,
    ) -> None:
        assert points is None or points.shape == (len(paths), 5, 2)
        self.name, self.root, self.paths, self.points = name, str(root), paths, points
        self._resize = resize
        unaligned = RESIZED if resize else AS_GIVEN
        self.alignment = unaligned if points is None else FIVE_POINTS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        path, content = self._read(i)
        if self.points is None:
            return decode(content, SIZE, path, self._resize)
        image = decode_any_size(content, path)
        try:
            return template.warp(image, self.points[i], SIZE)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def name_of(self, i: int) -> str:
        return self.paths[i]

    def digest(self) -> str:
        total = hashlib.sha256()
        for content, _ in self._scanned:
            total.update(content)
        if self.points is not None:
            total.update(np.ascontiguousarray(self.points).tobytes())
        return total.hexdigest()

    def num_resized(self) -> int:
        return 0 if self.points is not None else sum(other for _, other in self._scanned)

    def _read(self, i: int) -> tuple[str, bytes]:
        path = os.path.join(self.root, self.paths[i])
        try:
            with open(path, "rb") as file:
                return path, file.read()
        except OSError as error:  # the error of a read does not name the file
            raise OSError(error.errno, error.strerror, path) from error

    @cached_property
    def _scanned(self) -> list[tuple[bytes, bool]]:
        """(sha256, whether resized) of each file. Raises: ValueError as num_resized()."""

        def scan(i: int) -> tuple[bytes, bool]:
            path, content = self._read(i)
            other = self.points is None and _is_resized(content, path, self._resize)
            return hashlib.sha256(content).digest(), other

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return list(pool.map(scan, range(len(self.paths))))


def _is_resized(encoded: bytes, where: str, resize: bool) -> bool:
    """As check_size(). An unreadable image counts as not resized; decoding it raises the error."""
    try:
        width, height = pixels_of(encoded, where)
    except UserError:
        return False
    return check_size(width, height, SIZE, where, resize)


class Subset:
    """Some images of a set, by their numbers."""

    def __init__(self, whole: ImageSet, numbers: Sequence[int], name: str) -> None:
        self.whole, self.numbers = whole, numbers
        self.name, self.alignment = name, whole.alignment

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return self.whole[self.numbers[i]]

    def name_of(self, i: int) -> str:
        return self.whole.name_of(self.numbers[i])

    def digest(self) -> str:
        chosen = np.asarray(self.numbers, dtype=np.int64).tobytes()
        return hashlib.sha256(self.whole.digest().encode() + chosen).hexdigest()

    def num_resized(self) -> int:
        """How many images of the whole set are resized."""
        return self.whole.num_resized()
