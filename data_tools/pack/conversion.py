"""An encoded image of a source -> the encoded face that is packed.

| input | what is packed |
|---|---|
| a JPEG of size x size, grey or RGB | its own bytes, if they can be decoded |
| another image of size x size | decoded, a JPEG of the quality asked for |
| an image of another size | none: it is skipped, see decode.check_size() |
| `resize`, and square | decoded, resized (bicubic), a JPEG of the quality asked for |
| `pass_through` | the bytes of the image, whose pixels are not looked at |
| `pass_through` and `resize` | the bytes of any square image |
| a JPEG of four channels (CMYK, YCCK) | always a JPEG of its RGB: decoders differ on it |
| 16 bits a channel | the high byte of each, unless passed through |
| an alpha channel | dropped, the colours as they are, unless passed through |
| an EXIF orientation | ignored: aligned faces are pixels; followed with `exif="follow"` |
| more than MAX_PIXELS (decode.py) | refused before it is decoded, passed through or not |
| points or a detector (`align`) | the face in it, warped to size x size; its bytes are never kept |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.common.errors import UserError
from data_tools.common.parallel import Advance
from data_tools.images.decode import (
    check_jpeg,
    check_pixels,
    check_size,
    decode_any_size,
    resized,
    size_of,
)
from data_tools.images.image_file import channels_of, has_exif
from data_tools.pack.alignment import Aligner
from data_tools.sources.source import Images

_JPEG = b"\xff\xd8"
_STEP = 32  # images between two reports of progress


@dataclass(frozen=True, slots=True)
class Conversion:
    size: int = 112  # pixels
    quality: int = 95  # of images that have to be encoded again
    pass_through: bool = False
    exif: str = "ignore"  # or "follow"
    aligner: Aligner | None = None
    resize: bool = False  # square images of another size are faces that are aligned


class Pointed:
    """Images whose five points are known."""

    def __init__(self, images: Images, points: np.ndarray) -> None:
        self._images = images
        self.points = points  # float32 [n, 5, 2], NaN where unknown

    def __len__(self) -> int:
        return len(self._images)

    def name(self, i: int) -> bytes:
        return self._images.name(i)

    def where(self, i: int) -> str:
        return self._images.where(i)

    def read(self, i: int) -> bytes:
        return self._images.read(i)

    def select(self, indices: np.ndarray) -> "Pointed":
        return Pointed(self._images.select(indices), self.points[indices])


class Converted(NamedTuple):
    """Image i of the images given."""

    i: int
    encoded: bytes
    resized: bool  # it was not size x size
    faces: int  # that a detector found; 1 where none was asked


def convert(
    encoded: bytes, how: Conversion, where: str = "", points: np.ndarray | None = None
) -> tuple[bytes, bool, int]:
    """The bytes to pack, whether the image was of another size, and how many faces there are.

    points: [5, 2], or None. Raises: UserError naming `where` for an image that cannot be used.
    """
    check_pixels(encoded, where)
    follow = how.exif == "follow" and has_exif(encoded)
    if how.aligner is not None:
        image = decode_any_size(encoded, where, follow)
        try:
            face, faces = how.aligner.face(image, points)
        except ValueError as error:
            raise UserError(f"{where or 'image'}: {error}") from error
        return _jpeg(face, how.quality), False, faces
    cmyk = encoded.startswith(_JPEG) and channels_of(encoded) == 4
    if how.pass_through and not follow and not cmyk and (size := size_of(encoded, where)):
        return encoded, check_size(*size, how.size, where, how.resize), 1
    own = how.size, how.size
    if encoded.startswith(_JPEG) and not (follow or cmyk) and size_of(encoded, where) == own:
        check_jpeg(encoded, where)
        return encoded, False, 1
    image = decode_any_size(encoded, where, follow)
    height, width = image.shape[:2]
    other = check_size(width, height, how.size, where, how.resize)
    if how.pass_through and not follow and not cmyk:
        return encoded, other, 1
    return _jpeg(resized(image, how.size), how.quality), other, 1


def convert_all(
    images: Images,
    how: Conversion,
    skipped: list[tuple[str, str]],
    advance: Advance,
) -> Iterator[Converted]:
    """Each usable image as it is packed; (where, why) of the others joins `skipped`."""
    points = images.points if isinstance(images, Pointed) else None
    done = 0
    for i in range(len(images)):
        try:
            own = None if points is None or np.isnan(points[i]).any() else points[i]
            encoded, other, faces = convert(images.read(i), how, "", own)
        except ValueError as error:
            where = images.where(i)
            why = str(error).removeprefix("image: ").removeprefix(f"{where}: ")
            skipped.append((where, why))
        else:
            yield Converted(i, encoded, other, faces)
        done += 1
        if done == _STEP:
            advance(done)
            done = 0
    advance(done)


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return encoded.tobytes()
