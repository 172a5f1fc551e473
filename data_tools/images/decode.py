"""Encoded image -> RGB pixels, as MXNet decodes them but for EXIF, which is not followed.

The one rule on the size of an image that has no landmarks is check_size(): a face must be aligned
before a network sees it, and an image of another size than the network's is most often a photograph
that nobody has aligned; its score would be low without a word. So every door (pack, training,
verification, evaluation, export, inversion) refuses it, unless the user says that the faces are
aligned at another size.
"""

import cv2
import numpy as np

from data_tools.common.errors import UserError
from data_tools.images.image_file import fault, judge

MAX_PIXELS = 128_000_000  # 384 MB as RGB, in every worker: beyond any camera for faces
# IGNORE_ORIENTATION: faces were aligned as pixels, and a tag that survived that would turn them
# away again. MXNet 1.9.1 follows it in `mx.image.imdecode` and ImageRecordIter, not in unpack_img.
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode(encoded: bytes, size: int = 112, where: str = "", resize: bool = False) -> np.ndarray:
    """RGB pixels, uint8 [size, size, 3].

    Grey becomes three equal channels, transparency is dropped. resize: as of check_size(), bicubic.

    Raises: ValueError naming `where` for an empty, truncated or unreadable image, or one of another
    size: faces are aligned before they come here.
    """
    image = decode_any_size(encoded, where)
    height, width = image.shape[:2]
    return resized(image, size) if check_size(width, height, size, where, resize) else image


def decode_any_size(encoded: bytes, where: str = "", follow_exif: bool = False) -> np.ndarray:
    """RGB pixels at the image's own size, uint8 [h, w, 3]. Raises: ValueError naming `where`."""
    return _decode(encoded, cv2.IMREAD_COLOR_RGB if follow_exif else _FLAGS, where)


def _decode(encoded: bytes, flags: int, where: str) -> np.ndarray:
    if what := fault(encoded):
        raise UserError(f"{where or 'image'}: {what}")
    check_pixels(encoded, where)
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise UserError(f"{where or 'image'}: {error.err or error}") from error
    if image is None:
        raise UserError(f"{where or 'image'}: the pixels cannot be decoded: cut off or damaged")
    return image


def check_pixels(encoded: bytes, where: str = "") -> None:
    """Raises: UserError naming `where` for an image that states more than MAX_PIXELS."""
    size = judge(encoded).size
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"{where or 'image'}: {size[0]}x{size[1]} pixels are more than the {MAX_PIXELS:,} that "
            f"are decoded: scale it down first"
        )


def check_jpeg(encoded: bytes, where: str = "") -> None:
    """Reads all of a JPEG's entropy-coded data, which is where damage shows, but makes an eighth of
    its pixels: half the time of decoding it.

    Raises: ValueError naming `where` exactly when decode_any_size() would.
    """
    _decode(encoded, cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION, where)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square image at another size, bicubic."""
    if image.shape[0] == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def size_of(encoded: bytes, where: str = "") -> tuple[int, int] | None:
    """Width and height as the header states them; None if it does not: the image must be decoded.

    Raises: ValueError naming `where` for what is cut short or no image.
    """
    found = judge(encoded)
    if found.fault:
        raise UserError(f"{where or 'image'}: {found.fault}")
    return found.size


def pixels_of(encoded: bytes, where: str = "") -> tuple[int, int]:
    """Width and height of any image, decoded only if its header does not state them.

    Raises: UserError naming `where` for what is cut short or no image.
    """
    found = size_of(encoded, where)
    if found is None:
        height, width = decode_any_size(encoded, where).shape[:2]
        return width, height
    return found


def check_size(width: int, height: int, size: int, where: str = "", resize: bool = False) -> bool:
    """Whether an image of width x height pixels has to be resized to size x size.

    resize: the faces are aligned at another size, so a square image may be resized.

    Raises:
        UserError: the image is neither of that size nor allowed to be resized; it names `where`,
            the size and the ways on.
    """
    if (width, height) == (size, size):
        return False
    if resize and width == height:
        return True
    found = f"{where or 'image'}: {width}x{height} pixels, not {size}x{size}"
    if resize:
        raise UserError(
            f"{found}: it is not square, so resizing would distort the face. Align it by its "
            "landmarks or by a detector (pack --align)"
        )
    raise UserError(
        f"{found}: faces must be aligned to that size. Give their landmarks or a detector (pack "
        "--align); if they are aligned at another size, allow resizing: --resize, in a recipe "
        "resize=true"
    )


def is_size_fault(message: str) -> bool:
    """Whether a message is one of check_size()."""
    return " pixels, not " in message
