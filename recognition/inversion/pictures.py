"""Images of an inversion as PNG files.

Letters: b images.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from data_tools.common import files
from data_tools.images.decode import decode
from recognition.backbones.input import INPUT_SIZE


def as_pixels(images: Tensor) -> np.ndarray:  # [b, 3, 112, 112] in [-1, 1]
    """uint8 RGB [b, 112, 112, 3]; what is beyond is clipped."""
    pixels = (images.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round()
    return pixels.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def grid(pixels: np.ndarray, most: int = 64) -> np.ndarray:  # uint8 [b, 112, 112, 3]
    """The first `most` side by side, nearly a square; white where none is left."""
    pixels = pixels[:most]
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    canvas = np.full((rows * INPUT_SIZE, columns * INPUT_SIZE, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (side * INPUT_SIZE for side in divmod(i, columns))
        canvas[y : y + INPUT_SIZE, x : x + INPUT_SIZE] = image
    return canvas


def write(path: Path, pixels: np.ndarray) -> None:  # uint8 RGB [h, w, 3]
    """A PNG file, complete or not at all, that only its owner may read."""
    encoded = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1]
    files.write_private(path, encoded.tobytes())


def read(path: Path) -> np.ndarray:
    """uint8 RGB [112, 112, 3]. Raises: ValueError, OSError."""
    return decode(files.read_bytes(path), INPUT_SIZE, str(path))
