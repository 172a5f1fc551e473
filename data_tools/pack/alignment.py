"""Faces aligned while they are packed: by landmarks that are known, or found by a detector.

Landmarks: a text file, see landmarks.py, or those in a classic InsightFace `.lst`; pixels of the
image as stored, turned by its EXIF orientation if it has one.

Detector: an ONNX file of YuNet or SCRFD, see detectors.py.
"""

from dataclasses import dataclass

import numpy as np

from data_tools.common.errors import UserError
from data_tools.images.template import warp
from data_tools.pack.detectors import find_face


@dataclass(frozen=True, slots=True)
class Aligner:
    """Takes an image to its face of size x size."""

    size: int = 112
    detector: str | None = None  # path of the ONNX file

    def face(self, image: np.ndarray, points: np.ndarray | None) -> tuple[np.ndarray, int]:
        """The aligned face, and how many faces there are: those found, or 1 if `points` are given.

        uint8 RGB [h, w, 3] -> [size, size, 3]. Raises: UserError without a face in it.
        """
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
