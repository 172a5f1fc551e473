"""The relabel index: what cleaning decided about the images of a set, as text.

    # arcline-relabel 1 of=<fingerprint of the set> images=<N> classes=<C>
    17<TAB>drop
    23<TAB>5

A line is (image, new class | drop); images count 0 .. N-1 and classes 0 .. C-1 as in the set
without the index, whatever was cleaned before; a class of C or more is a new one. Images that
no line names keep their class. What is left is numbered densely, in the order of the old numbers,
as sub-center ArcFace's drop.py does. DIR/relabel.txt is applied whenever DIR is opened.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines

NAME = "relabel.txt"
DROP = -1
_HEAD = re.compile(r"# arcline-relabel 1 of=([0-9a-f]+) images=([0-9]+) classes=([0-9]+)")
_LINE = re.compile(r"([0-9]{1,12})\t(drop|[0-9]{1,10})")


class Relabel(NamedTuple):
    """m decisions."""

    of: str  # fingerprint of the set
    num_images: int
    num_classes: int
    images: np.ndarray  # int64 [m], ascending
    classes: np.ndarray  # int64 [m], DROP or the new class


def read(path: Path) -> Relabel:
    """Read an index. Raises: UserError naming the file, and the line that has another form."""
    images, classes = [], []
    lines = numbered_lines(path)
    head = _HEAD.fullmatch(next(lines, (0, ""))[1].strip())
    if head is None:
        raise UserError(f"{path}: line 1 is not '# arcline-relabel 1 of=... images= classes='")
    for number, line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            raise UserError(f"{path}: line {number}: {line[:60]!r} is not image<TAB>class|drop")
        images.append(int(found[1]))
        classes.append(DROP if found[2] == "drop" else int(found[2]))
    of, num_images, num_classes = head[1], int(head[2]), int(head[3])
    index = np.array(images, np.int64)
    order = np.argsort(index, kind="stable")
    index = index[order]
    if len(index) and index[-1] >= num_images:
        raise UserError(f"{path}: image {index[-1]} of a set of {num_images}")
    twice = np.flatnonzero(index[1:] == index[:-1])
    if len(twice):
        raise UserError(
            f"{path}: two lines name image {index[twice[0]]} (and {len(twice) - 1} other images)"
        )
    return Relabel(of, num_images, num_classes, index, np.array(classes, np.int64)[order])


def write(path: Path, relabel: Relabel) -> None:
    """Write the index; whole or not at all. Raises: OSError naming the file."""
    with files.replacing(path, "w", encoding="ascii", newline="\n") as file:
        file.write(
            f"# arcline-relabel 1 of={relabel.of} images={relabel.num_images} "
            f"classes={relabel.num_classes}\n"
        )
        for image, to in zip(relabel.images.tolist(), relabel.classes.tolist(), strict=True):
            file.write(f"{image}\t{'drop' if to == DROP else to}\n")


def apply(relabel: Relabel, labels: np.ndarray) -> np.ndarray:
    """Labels [N] in the set's own numbering after the index, int64: DROP, or a class."""
    changed = np.array(labels, np.int64)
    changed[relabel.images] = relabel.classes
    return changed


def dense(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images kept [M], their labels numbered densely [M], and the old class of each new one [C].

    Raises: ValueError if nothing is kept.
    """
    kept = np.flatnonzero(labels != DROP)
    if not len(kept):
        raise UserError("the relabel index drops every image")
    classes, new = np.unique(labels[kept], return_inverse=True)
    return kept, new.astype(np.int64), classes


def check(relabel: Relabel, place: Path, of: str, num_images: int, num_classes: int) -> None:
    """Raises: ValueError if the index was made for another set."""
    if (relabel.of, relabel.num_images, relabel.num_classes) != (of, num_images, num_classes):
        raise UserError(
            f"{place} was made for a set {relabel.of} of {relabel.num_images} images and "
            f"{relabel.num_classes} classes, not for this one ({of}, {num_images}, {num_classes}): "
            f"remove it, or make it again"
        )
