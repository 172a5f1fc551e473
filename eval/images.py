"""Sets of faces by number, each decoded when it is asked for: never all held as pixels.

Images are known by their content: the digest of a set is that of the bytes of all its images, so
that embeddings of other pixels are never taken for its own.

Letters: N images.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.common.errors import UserError
from data_tools.decode import decode, decode_any_size, pixels_of
from data_tools.image_size import check_size
from eval import align

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
        """RGB [112, 112, 3]; any thread may ask. Raises: ValueError naming a broken image."""

    def digest(self) -> str:
        """sha256 of what decides the pixels: the same for the same data."""

    def num_resized(self) -> int:
        """How many images are resized, 0 where that is not allowed.

        Raises: ValueError naming an image of another size that may not be resized.
        """


class Encoded:
    """Image files held in memory, as a verification .bin has them."""

    def __init__(self, name: str, encoded: Sequence[bytes], resize: bool = False) -> None:
        self.name, self.encoded, self._resize = name, encoded, resize
        self.alignment = RESIZED if resize else AS_GIVEN

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        return decode(self.encoded[i], SIZE, self._where(i), self._resize)

    def digest(self) -> str:
        total = hashlib.sha256()
        for image in self.encoded:
            total.update(struct.pack("<q", len(image)) + image)
        return total.hexdigest()

    def num_resized(self) -> int:
        return sum(
            check_size(*pixels_of(image, self._where(i)), SIZE, self._where(i), self._resize)
            for i, image in enumerate(self.encoded)
        )

    def _where(self, i: int) -> str:
        return f"{self.name} image {i}".lstrip()


class Files:
    """Image files of a directory, aligned by their landmarks where there are any.

    points [N, 5, 2]: in pixels of the files; without them the images must be aligned.
    resize: they are aligned at another size. All files are read once before they are embedded, for
    their digest and their size: a photograph that nobody aligned is refused before the work.
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
            return align.warp(image, self.points[i], SIZE)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def digest(self) -> str:
        total = hashlib.sha256()
        for content, _ in self._scanned:
            total.update(content)
        if self.points is not None:
            total.update(np.ascontiguousarray(self.points).tobytes())
        return total.hexdigest()

    def num_resized(self) -> int:
        return sum(other for _, other in self._scanned)

    def _read(self, i: int) -> tuple[str, bytes]:
        path = os.path.join(self.root, self.paths[i])
        with open(path, "rb") as file:
            return path, file.read()

    @cached_property
    def _scanned(self) -> list[tuple[bytes, bool]]:
        """(sha256, whether it is resized) of each file. Raises: ValueError as num_resized()."""

        def scan(i: int) -> tuple[bytes, bool]:
            path, content = self._read(i)
            other = self.points is None and check_size(
                *pixels_of(content, path), SIZE, path, self._resize
            )
            return hashlib.sha256(content).digest(), other

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return list(pool.map(scan, range(len(self.paths))))


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

    def num_resized(self) -> int:
        """Of the whole set."""
        return self.whole.num_resized()


def five_points(fields: Sequence[str], where: str = "") -> NDArray[np.float32]:
    """[5, 2] from 10 numbers x1 y1 .. x5 y5, or from 136 of 68 points (iBUG's order).

    Of 68 points an eye is the mean of its two corners (36 and 39, 42 and 45), the nose is 30, the
    corners of the mouth are 48 and 54, as InsightFace's IJB scripts take them.

    Raises:
        ValueError: another number of them, or one that is not finite, after `where`.
    """
    try:
        values = np.array(fields, dtype=np.float32)
    except ValueError as error:
        raise UserError(f"{where}: landmarks {' '.join(fields)!r} are not numbers") from error
    if values.size not in (10, 136) or not np.isfinite(values).all():
        raise UserError(
            f"{where}: {values.size} numbers are neither five points (10) nor 68 (136), or one of "
            "them is not finite"
        )
    points = values.reshape(-1, 2)
    if len(points) == 68:
        left, right = (points[36] + points[39]) / 2, (points[42] + points[45]) / 2
        points = np.stack([left, right, points[30], points[48], points[54]])
    return points


def read_landmarks(path: str | Path) -> Callable[[str], NDArray[np.float32] | None]:
    """name of an image -> its points [5, 2], or None where there are none.

    A file holds a line per image: its name, then x1 y1 .. x5 y5, with a score or label before them
    (`name score x1 ..`) where there is one. Names are matched by their last two parts, then the
    last alone. A directory holds a file per image: NAME_5loc_attri.txt (CALFW, CPLFW: five lines of
    x y) or NAME.pts (AgeDB: 68 points).

    Raises:
        ValueError: a line of another form, with its number.
        OSError: nothing there.
    """
    path = Path(path)
    if path.is_dir():
        return lambda name: _points_beside(path, name)
    table: dict[str, NDArray[np.float32]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.replace(",", " ").split()
        if fields:
            first = 2 if len(fields) % 2 == 0 else 1
            points = five_points(fields[first:], f"{path}:{number}")
            table["/".join(Path(fields[0]).parts[-2:])] = points
    alone = {Path(name).name: points for name, points in table.items()}
    whole = len(alone) == len(table)  # else a last part is ambiguous

    def look_up(name: str) -> NDArray[np.float32] | None:
        found = table.get("/".join(Path(name).parts[-2:]))
        return alone.get(Path(name).name) if found is None and whole else found

    return look_up


def _points_beside(directory: Path, name: str) -> NDArray[np.float32] | None:
    stem = Path(name).stem
    for candidate in (f"{stem}_5loc_attri.txt", f"{stem}.pts", f"{stem}.txt"):
        path = directory / candidate
        if path.is_file():
            lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
            # .pts opens with "version: 1", "n_points: 68" and braces around the points.
            values = [x for fields in lines if len(fields) == 2 and ":" not in fields[0]
                      for x in fields]  # fmt: skip
            return five_points(values, str(path))
    return None
