"""Faces aligned while they are packed: by landmarks that are known, or found by a detector.

Landmarks: a text file, a line an image, `path [score] x1 y1 x2 y2 .. x5 y5`, separated by tabs (or
by spaces, where no path holds one); or those in a classic InsightFace `.lst`. Order: left eye,
right eye, nose, left and right mouth corner, as seen in the image; pixels of the image as stored,
turned by its EXIF orientation if it has one.

Detector: an ONNX file of YuNet or SCRFD, see detectors.py.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.common.errors import UserError
from data_tools.detectors import detect as detect
from data_tools.detectors import find_face
from data_tools.listing import Names
from eval.align import warp


@dataclass(frozen=True, slots=True)
class Aligner:
    """Takes an image to its face of size x size."""

    size: int = 112
    detector: str | None = None  # path of the ONNX file

    def face(self, image: np.ndarray, points: np.ndarray | None) -> np.ndarray:
        """uint8 RGB [size, size, 3] of image [h, w, 3]. Raises: ValueError without a face in it."""
        return self.face_of(image, points)[0]

    def face_of(self, image: np.ndarray, points: np.ndarray | None) -> tuple[np.ndarray, int]:
        """As face(), and how many faces the detector found; 1 where the points are given."""
        faces = 1
        if points is None:
            if self.detector is None:
                raise UserError("no landmarks")
            points, faces = find_face(image, self.detector)
        height, width = image.shape[:2]
        x, y = points.mean(0).tolist()
        if not (0 <= x < width and 0 <= y < height) and np.isfinite(points).all():
            raise UserError(
                f"the five points lie around ({x:.0f}, {y:.0f}), outside the image of "
                f"{width}x{height} pixels: were they found in another size of it?"
            )
        return warp(image, points, self.size), faces


def read_landmarks(path: Path, names: Names) -> tuple[np.ndarray, int]:
    """Points float32 [n, 5, 2] of the images of these names, NaN without; lines of no image.

    Raises: ValueError naming file and line of what is no landmarks, or names an image twice.
    """
    keys, points = _read(path)
    hashed = keys.hashes()
    order = np.argsort(hashed, kind="stable")
    hashed = hashed[order]
    twice = np.flatnonzero(hashed[1:] == hashed[:-1])
    if len(twice):
        raise UserError(f"{path}: two lines for {keys[int(order[twice[0]])]!r}")
    wanted = names.hashes()
    result = np.full((len(names), 5, 2), np.nan, np.float32)
    if len(hashed):
        at = np.minimum(np.searchsorted(hashed, wanted), len(hashed) - 1)
        known = hashed[at] == wanted
        result[known] = points[order[at[known]]]
        return result, len(hashed) - len(np.unique(at[known]))
    return result, 0


def _read(path: Path) -> tuple[Names, np.ndarray]:
    values = array("f")

    def lines() -> Iterator[bytes]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.strip(b"\r\n")
                if not text or text.startswith(b"#"):
                    continue
                fields = text.split(b"\t") if b"\t" in text else text.split()
                try:
                    if len(fields) not in (11, 12):
                        raise ValueError
                    own = [float(field) for field in fields[-10:]]
                    if not np.isfinite(own).all():
                        raise ValueError
                except ValueError:
                    raise UserError(
                        f"{path}: line {number}: {text[:60]!r} is not: path [score] x1 y1 .. x5 y5"
                    ) from None
                values.extend(own)
                yield fields[0]

    names = Names.of(lines())
    return names, np.array(values, np.float32).reshape(-1, 5, 2)
