"""Faces aligned while they are packed: by landmarks that are known, or found by a detector.

Landmarks: a text file, a line an image, `path [score] x1 y1 x2 y2 .. x5 y5`, separated by tabs (or
by spaces, where no path holds one); or those in a classic InsightFace `.lst`. Order: left eye,
right eye, nose, left and right mouth corner, as seen in the image; pixels of the image as stored,
turned by its EXIF orientation if it has one.

Detector: an ONNX file that `cv2.FaceDetectorYN` runs: OpenCV Zoo's YuNet, or one with its twelve
outputs (cls, obj, bbox, kps at strides 8, 16, 32) and BGR input of 0 to 255. It sees the image
reduced to `DETECT_SIDE`. Of several faces that one is taken whose box is large and central:
area - 2 (distance of its centre from the image's)^2 is largest, as InsightFace chooses.
"""

import functools
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_tools.listing import Names
from eval.align import warp

DETECT_SIDE = 640  # pixels, the longer side of what the detector sees
_SCORE, _NMS, _MOST = 0.6, 0.3, 100


@dataclass(frozen=True, slots=True)
class Aligner:
    """Takes an image to its face of size x size."""

    size: int = 112
    detector: str | None = None  # path of the ONNX file
    min_score: float = _SCORE  # of a face found

    def face(self, image: np.ndarray, points: np.ndarray | None) -> np.ndarray:
        """uint8 RGB [size, size, 3] of image [h, w, 3]. Raises: ValueError without a face in it."""
        if points is None:
            if self.detector is None:
                raise ValueError("no landmarks")
            points = detect(image, self.detector, self.min_score)
        return warp(image, points, self.size)


def detect(image: np.ndarray, detector: str, min_score: float = _SCORE) -> np.ndarray:
    """Five points float32 [5, 2] of the face in RGB [h, w, 3]. Raises: ValueError without one."""
    height, width = image.shape[:2]
    scale = min(1.0, DETECT_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    net = open_detector(detector)
    net.setInputSize(size)
    net.setScoreThreshold(min_score)
    _, found = net.detect(np.ascontiguousarray(small[:, :, ::-1]))
    if found is None:
        raise ValueError("no face found")
    centre = found[:, :2] + found[:, 2:4] / 2
    away = ((centre - np.array(size) / 2) ** 2).sum(1)
    best = found[np.argmax(found[:, 2] * found[:, 3] - 2 * away)]
    return best[4:14].reshape(5, 2) / np.array([size[0] / width, size[1] / height], np.float32)


@functools.cache
def open_detector(path: str) -> "cv2.FaceDetectorYN":
    """Raises: ValueError if OpenCV cannot run the file as a YuNet."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--detector {path}: no such file")
    try:
        net = cv2.FaceDetectorYN.create(path, "", (320, 320), _SCORE, _NMS, _MOST)
        net.detect(np.zeros((320, 320, 3), np.uint8))
    except cv2.error as error:
        raise ValueError(
            f"--detector {path}: not a face detector with YuNet's outputs: {error.err or error}"
        ) from error
    return net


def detector_sha256(path: str) -> str:
    open_detector(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        raise ValueError(f"{path}: two lines for {keys[int(order[twice[0]])]!r}")
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
                    raise ValueError(
                        f"{path}: line {number}: {text[:60]!r} is not: path [score] x1 y1 .. x5 y5"
                    ) from None
                values.extend(own)
                yield fields[0]

    names = Names.of(lines())
    return names, np.array(values, np.float32).reshape(-1, 5, 2)
