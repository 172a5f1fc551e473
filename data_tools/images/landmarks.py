"""The five points of faces, from a text file or from a directory of one file an image.

A file holds a line an image: its path, perhaps one number (a detector's score, a label), then
x1 y1 .. x5 y5, or 68 points in iBUG's order; fields are separated by tabs, spaces or commas, and a
path may hold spaces. Blank lines and lines that start with # are left out. Order of the points:
left eye, right eye, nose, left and right mouth corner, as seen in the image; pixels of the image.

A directory holds NAME_5loc_attri.txt (CALFW, CPLFW: five lines of x y), NAME.pts (AgeDB: 68 points)
or NAME.txt for the image NAME.jpg, in the image's own folder or all in one.

An image is found by its full relative path. Where the file's paths start higher or lower than the
image's, one of the two must end with the whole of the other, and the longest that does counts:
`001/frontal/05.jpg` finds `Images/001/frontal/05.jpg` and `frontal/05.jpg`, never
`002/frontal/05.jpg`. A line that fits two images, two lines that fit one, and a name that stands
twice are errors: a face aligned by another face's points ruins a result without a sign.
"""

import os
import posixpath
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files, text
from data_tools.common.errors import UserError, UserKeyError
from data_tools.images.image_table import Names

_FIVE, _IBUG = 10, 136  # numbers of 5 points and of 68
_SEPARATORS = str.maketrans("\t,", "  ")
_BESIDE = ("_5loc_attri.txt", ".pts", ".txt")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?(nan|inf)", re.I)
_SHOWN = 60  # characters of a line in a message


class Landmarks(Protocol):
    """See the top of the file."""

    path: Path

    def __getitem__(self, relative_path: str) -> NDArray[np.float32]:
        """[5, 2] of an image. Raises: UserKeyError without landmarks; UserError as get()."""

    def get(self, relative_path: str) -> NDArray[np.float32] | None:
        """[5, 2] of an image, None without landmarks.

        Raises: UserError if two lines fit the image, or the line was another image's already.
        """


def read_landmarks(path: str | Path) -> Landmarks:
    """The landmarks in a file or in a directory.

    Raises:
        UserError: a line of another form or a name on two lines, with file and line.
        OSError: there is nothing, or it cannot be read.
    """
    path = Path(path)
    return LandmarkDirectory(path) if files.is_dir(path) else LandmarkFile(path)


def points_of(landmarks: Landmarks, relative_paths: Sequence[str]) -> NDArray[np.float32]:
    """[N, 5, 2] of all images. Raises: UserError where one has none, with their number."""
    points = [landmarks.get(path) for path in relative_paths]
    absent = [path for path, five in zip(relative_paths, points, strict=True) if five is None]
    if absent:
        raise UserError(
            f"{landmarks.path}: no landmarks for {len(absent)} of {len(relative_paths)} images, "
            f"the first {absent[0]}"
        )
    return np.array([five for five in points if five is not None], np.float32).reshape(-1, 5, 2)


class LandmarkFile:
    """The landmarks of n images in one block: no object an image, millions of lines fit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = array("q")  # [n] number of the line of each
        self._points = array("f")  # [10 n]
        self._names = Names.of(self._read())
        hashes = self._names.hashes()
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._suffixes: dict[int, tuple[NDArray, NDArray]] = {}  # by number of parts
        self._used: dict[int, str] = {}  # row -> the image that took it
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first, second = sorted(self._order[twice[0] : twice[0] + 2].tolist())
            raise UserError(
                f"{path}: two lines for {os.fsdecode(self._names[first])!r}: "
                f"{self._lines[first]} and {self._lines[second]}; keep one"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, relative_path: str) -> NDArray[np.float32]:
        points = self.get(relative_path)
        if points is None:
            example = f"; its first name is {os.fsdecode(self._names[0])!r}" if len(self) else ""
            raise UserKeyError(f"{self.path}: no landmarks of {relative_path!r}{example}")
        return points

    def get(self, relative_path: str) -> NDArray[np.float32] | None:
        row = self._row(normalised(relative_path))
        return None if row is None else self._of(row)

    def points_of(self, names: Names) -> tuple[NDArray[np.float32], int]:
        """[n, 5, 2] of the images of these names, NaN without; lines of no image.

        Raises: as get().
        """
        result = np.full((len(names), 5, 2), np.nan, np.float32)
        if not len(self):
            return result, 0
        wanted = names.hashes()
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        known = self._sorted[at] == wanted
        rows = self._order[at]
        rows[~known] = -1
        for i in np.flatnonzero(~known).tolist():
            row = self._row(normalised(os.fsdecode(names[i])))
            rows[i] = -1 if row is None else row
        images = np.flatnonzero(rows >= 0)
        taken = rows[images]
        if len(taken) and (counts := np.bincount(taken)).max() > 1:
            row = int(counts.argmax())
            one, other = (os.fsdecode(names[i]) for i in images[taken == row][:2].tolist())
            raise UserError(self._two_images(row, one, other))
        result[images] = np.frombuffer(self._points, np.float32).reshape(-1, 5, 2)[taken]
        return result, len(self) - len(taken)

    def _of(self, row: int) -> NDArray[np.float32]:
        return np.array(self._points[_FIVE * row : _FIVE * (row + 1)], np.float32).reshape(5, 2)

    def _row(self, name: str) -> int | None:
        """The row of an image, None without. Raises: UserError if it is not the only choice."""
        exact = self._find(self._sorted, self._order, name)
        if exact:
            return self._take(exact[0], name)
        parts = name.split("/")
        longer = self._find(*self._by_suffix(len(parts)), name)
        if len(longer) > 1:
            one, other = (os.fsdecode(self._names[row]) for row in longer[:2])
            raise UserError(
                f"{self.path}: {name!r} is the end of the names of {len(longer)} lines, "
                f"{self._lines[longer[0]]} ({one!r}) and {self._lines[longer[1]]} ({other!r}): "
                f"name the image by its whole path"
            )
        if longer:
            return self._take(longer[0], name)
        for start in range(1, len(parts)):
            shorter = self._find(self._sorted, self._order, "/".join(parts[start:]))
            if shorter:
                return self._take(shorter[0], name)
        return None

    def _take(self, row: int, name: str) -> int:
        other = self._used.setdefault(row, name)
        if other != name:
            raise UserError(self._two_images(row, other, name))
        return row

    def _two_images(self, row: int, one: str, other: str) -> str:
        return (
            f"{self.path}: line {self._lines[row]}: {os.fsdecode(self._names[row])!r} fits two "
            f"images, {one!r} and {other!r}: write whole paths"
        )

    def _find(self, hashes: NDArray, rows: NDArray, name: str) -> list[int]:
        """The rows with this hash, in order of their lines."""
        wanted = Names.of([os.fsencode(name)]).hashes()[0]
        start = np.searchsorted(hashes, wanted)
        stop = np.searchsorted(hashes, wanted, side="right")
        return sorted(rows[start:stop].tolist())

    def _by_suffix(self, parts: int) -> tuple[NDArray, NDArray]:
        """Sorted hashes of the last `parts` parts of all longer names, and their rows."""
        if parts not in self._suffixes:
            rows = array("q")

            def ends() -> Iterator[bytes]:
                for row, name in enumerate(self._names):
                    split = name.rsplit(b"/", parts)
                    if len(split) > parts:
                        rows.append(row)
                        yield b"/".join(split[1:])

            hashes = Names.of(ends()).hashes()
            order = np.argsort(hashes, kind="stable")
            self._suffixes[parts] = hashes[order], np.array(rows, np.int64)[order]
        return self._suffixes[parts]

    def _read(self) -> Iterator[bytes]:
        for number, line in text.numbered_lines(self.path, errors="surrogateescape"):
            if line.startswith("#"):
                continue
            name, numbers = _split(line)
            where = f"{self.path}: line {number}"
            if not name or len(numbers) not in (_FIVE, _FIVE + 1, _IBUG, _IBUG + 1):
                self._refuse(where, line, len(numbers))
            self._points.extend(five_points(numbers[len(numbers) % 2 :], where).ravel().tolist())
            self._lines.append(number)
            yield os.fsencode(normalised(name))

    def _refuse(self, where: str, line: str, count: int) -> NoReturn:
        raise UserError(
            f"{where}: {line[:_SHOWN]!r} is not: path [score] x1 y1 .. x5 y5; {count} numbers "
            f"are neither five points (10) nor 68 (136)"
        )


class LandmarkDirectory:
    """A directory of one file an image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._used: dict[Path, str] = {}  # file -> the image that took it

    def __getitem__(self, relative_path: str) -> NDArray[np.float32]:
        points = self.get(relative_path)
        if points is None:
            stem = posixpath.splitext(normalised(relative_path))[0]
            tried = ", ".join(stem + ending for ending in _BESIDE)
            raise UserKeyError(f"{self.path}: no landmarks of {relative_path!r}: none of {tried}")
        return points

    def get(self, relative_path: str) -> NDArray[np.float32] | None:
        name = normalised(relative_path)
        parts = posixpath.splitext(name)[0].split("/")
        for start in range(len(parts)):  # the longest path that there is
            for ending in _BESIDE:
                path = self.path / ("/".join(parts[start:]) + ending)
                if files.is_file(path):
                    return self._read(path, name)
        return None

    def _read(self, path: Path, name: str) -> NDArray[np.float32]:
        other = self._used.setdefault(path, name)
        if other != name:
            raise UserError(
                f"{path} fits two images, {other!r} and {name!r}: put the landmarks into folders "
                f"as the images are"
            )
        # .pts opens with "version: 1", "n_points: 68" and braces around the points.
        rows = [line.translate(_SEPARATORS).split() for line in text.read_lines(path)]
        numbers = [x for row in rows if len(row) == 2 and ":" not in row[0] for x in row]
        return five_points(numbers, str(path))


def normalised(name: str) -> str:
    """A relative path without `./`, doubled and leading slashes: one spelling for one file."""
    return posixpath.normpath(name.strip().strip('"')).lstrip("/")


def five_points(fields: Sequence[str], where: str = "") -> NDArray[np.float32]:
    """[5, 2] from 10 numbers x1 y1 .. x5 y5, or from 136 of 68 points (iBUG's order).

    Of 68 points an eye is the mean of its two corners (36 and 39, 42 and 45), the nose is 30, the
    corners of the mouth are 48 and 54, as InsightFace's IJB scripts take them.

    Raises:
        UserError: another number of them, or one that is not finite, after `where`.
    """
    try:
        values = np.array(fields, dtype=np.float32)
    except ValueError as error:
        shown = " ".join(fields)[:_SHOWN]
        raise UserError(f"{where}: landmarks {shown!r} are not numbers") from error
    if values.size not in (_FIVE, _IBUG) or not np.isfinite(values).all():
        raise UserError(
            f"{where}: {values.size} numbers are neither five points (10) nor 68 (136), or one of "
            "them is not finite"
        )
    points = values.reshape(-1, 2)
    if len(points) == 68:
        left, right = (points[36] + points[39]) / 2, (points[42] + points[45]) / 2
        points = np.stack([left, right, points[30], points[48], points[54]])
    return points


def _split(line: str) -> tuple[str, list[str]]:
    """The name on a line, and the numbers after it."""
    if "\t" in line:
        name, _, rest = line.partition("\t")
        numbers = rest.translate(_SEPARATORS).split()
        if len(numbers) in (_FIVE, _FIVE + 1, _IBUG, _IBUG + 1):
            return name, numbers
    spaced = line.translate(_SEPARATORS)  # as long as the line: places stay
    fields = spaced.split()
    count = 0
    while count < len(fields) and _NUMBER.fullmatch(fields[-1 - count]):
        count += 1
    if not count:
        return line, []
    return line[: len(spaced.rsplit(None, count)[0])] if count < len(fields) else "", fields[
        -count:
    ]
