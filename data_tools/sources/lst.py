"""The two kinds of `.lst` as sources; images are found relative to a root folder.

    im2rec       index<TAB>label[<TAB>label ...]<TAB>path      labels may read 3.000000
    InsightFace  aligned<TAB>path<TAB>label[<TAB>4 box numbers[<TAB>x1 .. x5 y1 .. y5]]

They are told apart by the first line. Every field may have blanks around it, as im2rec reads them.
The class is the (first) label; identities are the labels that occur, in order of their numbers. A
path that stands twice counts once (`./p0/0.jpg` and `p0/0.jpg` are one): the first line holds. Back
slashes, as Windows writes them, are read as slashes unless a file has that very name; hidden files
are skipped.
"""

import contextlib
import math
import os
import posixpath
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.common import content, files, text
from data_tools.common.errors import UserError
from data_tools.images.image_file import ending, is_hidden, is_image_name
from data_tools.images.image_table import Names, back_slashes, repeated
from data_tools.sources.folders import Paths
from data_tools.sources.labels import Listing, class_number, number, numbered

_BOX, _POINTS = 4, 10


class ListSource(Listing, Paths):
    """See the top of the file.

    landmarks: float32 [N, 10] x1 .. x5 y1 .. y5, NaN where a line has none; None where no line has.
    unaligned: bool [N], images that the list says are not aligned yet.

    Raises: ValueError naming file and line of the first line that is of neither kind.
    """

    kind = "lst"

    def __init__(self, path: Path, root: Path | None = None) -> None:
        Listing.__init__(self, path)
        self._labels = array("q")
        self._unaligned = array("B")
        self._points = array("f")  # ten a line, once a line had some
        self._root = root or path.parent
        self._hidden: list[int] = []
        self._slashes = 0  # paths with back slashes
        self._literal: bool | None = None  # whether a back slash is a letter of a name here
        Paths.__init__(self, self._root, Names.of(self._lines()))
        self.sha256 = files.sha256(path)
        if self._slashes:
            self.notes.append(back_slashes(self._slashes, path))
        labels = np.frombuffer(self._labels, np.int64)
        unaligned = np.frombuffer(self._unaligned, bool)
        points = np.frombuffer(self._points, np.float32).reshape(-1, _POINTS)
        keep = self._first_of_each(labels)
        if not keep.any():
            raise UserError(f"{path}: no image in it{content.hint(path)}")
        if not keep.all():
            self.names = self.names.select(np.flatnonzero(keep))
            labels = labels[keep]
        values, self.labels = numbered(labels)
        self.identities = [str(value) for value in values.tolist()]
        self.unaligned = unaligned[keep]
        self.landmarks = points[keep] if len(points) else None
        del self._labels, self._unaligned, self._points

    def _first_of_each(self, labels: np.ndarray) -> np.ndarray:
        """Which lines count, bool [N]."""
        again: dict[int, int] = {}
        for i, j in repeated(self.names):
            first = again.get(i, i)
            again[j] = first
            one, other = int(labels[first]), int(labels[j])
            label = f" with label {other} instead of {one}" if one != other else ""
            self.skipped.append((self.where(j), f"listed again{label}: the first line counts"))
        self.skipped += [(self.where(i), "a hidden file") for i in self._hidden if i not in again]
        keep = np.ones(len(labels), bool)
        keep[[*again, *self._hidden]] = False
        return keep

    def _lines(self) -> Iterator[bytes]:
        """The path of each line, its label joined to `_labels` on the way."""
        classic: bool | None = None
        for line_number, line in text.numbered_lines(self.path, errors="surrogateescape"):
            fields = [field.strip() for field in line.split("\t")]
            if classic is None:
                classic = fields[0] in ("0", "1") and len(fields) >= 3
                classic = classic and number(fields[1]) is None and not _is_text_label(fields)
            try:
                name = self._classic(fields) if classic else self._im2rec(fields)
            except ValueError as error:
                hint = content.hint(self.path) if line_number == 1 else ""
                raise UserError(f"{self.path}: line {line_number}: {error}{hint}") from error
            yield self._encoded(name)

    def _encoded(self, name: str) -> bytes:
        """The path of the line that was read last; one that is hidden is noted."""
        if is_hidden(name.rpartition("/")[2]):
            self._hidden.append(len(self._labels) - 1)
        return os.fsencode(name)

    def _im2rec(self, fields: list[str]) -> str:
        if len(fields) < 3:
            raise UserError(f"{_shown(fields)} is not index<TAB>label<TAB>path")
        class_number(fields[0])
        for field in fields[2:-1]:
            if number(field) is None:
                raise UserError(
                    f"{field[:40]!r} is among the labels and is not a number: is there a tab "
                    f"in the path?"
                )
        label, name = class_number(fields[1]), self._image(fields[-1])
        self._labels.append(label)
        self._unaligned.append(0)
        return name

    def _classic(self, fields: list[str]) -> str:
        if len(fields) not in (3, 3 + _BOX, 3 + _BOX + _POINTS) or fields[0] not in ("0", "1"):
            raise UserError(
                f"{_shown(fields)} is not aligned(0 or 1)<TAB>path<TAB>label, with 4 numbers of a "
                f"box and 10 of landmarks after it or without"
            )
        name, label = self._image(fields[1]), class_number(fields[2])
        points = [number(field) for field in fields[3 + _BOX :]]
        if None in points:
            raise UserError(f"{_shown(fields)}: a landmark is not a number")
        if points and not len(self._points):
            self._points.extend([math.nan] * (_POINTS * len(self._labels)))
        if points or len(self._points):
            self._points.extend(value or 0.0 for value in points or ())
            self._points.extend([math.nan] * (0 if points else _POINTS))
        self._labels.append(label)
        self._unaligned.append(fields[0] == "0")
        return name

    def _image(self, name: str) -> str:
        """The path of an image in its one spelling."""
        if "\\" in name:
            if self._literal is None:
                self._literal = files.exists(self._root / name)
            if not self._literal:
                self._slashes += 1
                name = name.replace("\\", "/")
        if "./" in name or "//" in name:
            name = posixpath.normpath(name)
        base = name.rpartition("/")[2]
        if not is_image_name(base) and not is_hidden(base) and (ending(base) or _is_value(base)):
            raise UserError(f"{name[:80]!r} is not the path of an image")
        return name


def _is_text_label(fields: list[str]) -> bool:
    """Whether a line is im2rec's with a text for its label, and not InsightFace's, whose second
    field is the path."""
    return len(fields) == 3 and is_image_name(fields[2]) and not is_image_name(fields[1])


def _is_value(field: str) -> bool:
    """Whether a field is empty or a number of any kind: no name of a file."""
    with contextlib.suppress(ValueError):
        float(field)
        return True
    return not field


def _shown(fields: list[str]) -> str:
    return repr("\t".join(fields)[:80])
