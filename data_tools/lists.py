"""The two kinds of `.lst` as sources; images are found relative to a root folder.

    im2rec       index<TAB>label[<TAB>label ...]<TAB>path      labels may read 3.000000
    InsightFace  aligned<TAB>path<TAB>label[<TAB>4 box numbers[<TAB>x1 .. x5 y1 .. y5]]

They are told apart by the first line. The class is the (first) label; identities are the labels
that occur, in order of their numbers. A path that stands twice counts once: the first line holds.
"""

import hashlib
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.common.errors import UserError
from data_tools.decode import is_image
from data_tools.files import Paths
from data_tools.listing import Names, repeated

_BOX, _POINTS = 4, 10
MAX_LABEL = 2**31


class ListSource(Paths):
    """See the top of the file.

    landmarks: float32 [N, 10] x1 .. x5 y1 .. y5, NaN where a line has none; None where no line has.
    unaligned: bool [N], images that the list says are not aligned yet.

    Raises: ValueError naming file and line of the first line that is of neither kind.
    """

    kind = "lst"

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self.skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.bins: list[Path] = []
        self._labels = array("q")
        self._unaligned = array("B")
        self._points = array("f")  # ten a line, once a line had some
        self._digest = hashlib.sha256()
        super().__init__(root or path.parent, Names.of(self._lines()))
        self.sha256 = self._digest.hexdigest()
        labels = np.frombuffer(self._labels, np.int64)
        unaligned = np.frombuffer(self._unaligned, bool)
        points = np.frombuffer(self._points, np.float32).reshape(-1, _POINTS)
        keep = self._first_of_each(labels)
        if not keep.any():
            raise UserError(f"{path}: no image in it")
        if not keep.all():
            self.names = self.names.select(np.flatnonzero(keep))
            labels = labels[keep]
        values, self.labels = _numbered(labels)
        self.identities = [str(value) for value in values.tolist()]
        self.unaligned = unaligned[keep]
        self.landmarks = points[keep] if len(points) else None
        del self._labels, self._unaligned, self._points, self._digest

    def _first_of_each(self, labels: np.ndarray) -> np.ndarray:
        """Which lines count, bool [N]."""
        again: dict[int, int] = {}
        for i, j in repeated(self.names):
            first = again.get(i, i)
            again[j] = first
            one, other = int(labels[first]), int(labels[j])
            label = f" with label {other} instead of {one}" if one != other else ""
            self.skipped.append((self.where(j), f"listed again{label}: the first line counts"))
        keep = np.ones(len(labels), bool)
        keep[list(again)] = False
        return keep

    def _lines(self) -> Iterator[bytes]:
        classic: bool | None = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                self._digest.update(line)
                fields = line.rstrip(b"\r\n").split(b"\t")
                if fields == [b""]:
                    continue
                if classic is None:
                    classic = fields[0] in (b"0", b"1") and len(fields) >= 3
                    classic = classic and _number(fields[1]) is None
                try:
                    name = self._classic(fields) if classic else self._im2rec(fields)
                except ValueError as error:
                    raise UserError(f"{self.path}: line {number}: {error}") from error
                yield name

    def _im2rec(self, fields: list[bytes]) -> bytes:
        if len(fields) < 3:
            raise UserError(f"{_shown(fields)} is not index<TAB>label<TAB>path")
        _class(fields[0])
        self._labels.append(_class(fields[1]))
        self._unaligned.append(0)
        return _image(fields[-1])

    def _classic(self, fields: list[bytes]) -> bytes:
        if len(fields) not in (3, 3 + _BOX, 3 + _BOX + _POINTS) or fields[0] not in (b"0", b"1"):
            raise UserError(
                f"{_shown(fields)} is not aligned(0 or 1)<TAB>path<TAB>label, with 4 numbers of a "
                f"box and 10 of landmarks after it or without"
            )
        name, label = _image(fields[1]), _class(fields[2])
        points = [_number(field) for field in fields[3 + _BOX :]]
        if None in points:
            raise UserError(f"{_shown(fields)}: a landmark is not a number")
        if points and not len(self._points):
            self._points.extend([math.nan] * (_POINTS * len(self._labels)))
        if points or len(self._points):
            self._points.extend(value or 0.0 for value in points or ())
            self._points.extend([math.nan] * (0 if points else _POINTS))
        self._labels.append(label)
        self._unaligned.append(fields[0] == b"0")
        return name


def _numbered(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur, ascending, and the place of each label [N] among them: int64.

    As np.unique, whose sort takes five times the memory of the labels.
    """
    if int(labels.max()) > 4 * len(labels) + 1_000_000:
        return np.unique(labels, return_inverse=True)
    occurs = np.zeros(int(labels.max()) + 1, bool)
    occurs[labels] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[labels]


def _image(name: bytes) -> bytes:
    if not is_image(os.fsdecode(name.rpartition(b"/")[2])):
        raise UserError(f"{name[:80]!r} is not the path of an image")
    return name


def _class(field: bytes) -> int:
    value = _number(field)
    if value is None or not 0 <= value < MAX_LABEL or value != int(value):
        raise UserError(f"{field[:40]!r} is not a whole number from 0 below 2^31")
    return int(value)


def _number(field: bytes) -> float | None:
    try:
        value = float(field)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _shown(fields: list[bytes]) -> str:
    return repr(b"\t".join(fields)[:80])
