"""Contact sheets: many faces in one PNG, each with a line of text."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.images.decode import decode_any_size
from data_tools.shards import Shards

_COLUMNS = 10
_SIDE = 112  # pixels of a face
_TEXT = 14  # pixels for a line
MAX_FACES = 1000


def write_sheet(
    path: Path,
    faces: Sequence[np.ndarray],  # uint8 RGB [h, w, 3] each
    titles: Sequence[str],
) -> None:
    """Raises: ValueError if there is no face, or the name is not a .png; OSError of the disk."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a sheet is a .png")
    if not faces:
        raise UserError(f"{path}: no face to show")
    columns = min(_COLUMNS, len(faces))
    rows = -(-len(faces) // columns)
    sheet = np.full((rows * (_SIDE + _TEXT), columns * _SIDE, 3), 255, np.uint8)
    for n, (face, title) in enumerate(zip(faces, titles, strict=True)):
        y, x = n // columns * (_SIDE + _TEXT), n % columns * _SIDE
        sheet[y : y + _SIDE, x : x + _SIDE] = cv2.resize(face, (_SIDE, _SIDE))
        cv2.putText(
            sheet,
            title[: _SIDE // 6],
            (x + 2, y + _SIDE + 10),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.32,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
    png = cv2.imencode(".png", sheet[:, :, ::-1])[1].tobytes()
    files.write_bytes(path, png)


def face(data: Shards, i: int) -> np.ndarray:
    """Image i of a set; grey with a cross where it cannot be decoded."""
    try:
        return decode_any_size(data[i][1], data.where(i))
    except ValueError:
        broken = np.full((_SIDE, _SIDE, 3), 200, np.uint8)
        cv2.line(broken, (0, 0), (111, 111), (200, 0, 0), 2)
        cv2.line(broken, (111, 0), (0, 111), (200, 0, 0), 2)
        return broken
