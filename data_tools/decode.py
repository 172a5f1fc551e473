"""Encoded image -> RGB pixels, as MXNet decodes them but for EXIF, which is not followed."""

import cv2
import numpy as np

from data_tools.common.errors import UserError
from data_tools.image_size import stated_size

MAX_PIXELS = 128_000_000  # 384 MB as RGB, in every worker: beyond any camera for faces
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones do not."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA
_SCAN = bytes((0xFF, _SOS))
_KINDS = (_SOI, b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
# IGNORE_ORIENTATION: faces were aligned as pixels, and a tag that survived that would turn them
# away again. MXNet 1.9.1 follows it in `mx.image.imdecode` and ImageRecordIter, not in unpack_img.
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers of a JPEG: its size and channels


def decode(encoded: bytes, size: int = 112, where: str = "") -> np.ndarray:
    """RGB pixels, uint8 [size, size, 3].

    Grey becomes three equal channels, transparency is dropped, a square image of another size is
    resized (bicubic).
    Raises: ValueError naming `where` for an empty, truncated or unreadable image, or one that is
    not square: faces are aligned before they come here; stretching or cropping would misalign them.
    """
    image = decode_any_size(encoded, where)
    height, width = image.shape[:2]
    if height != width:
        raise UserError(
            f"{where or 'image'}: {width}x{height} pixels is not square; align the faces to "
            f"{size}x{size} first"
        )
    return resized(image, size)


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
    size = stated_size(encoded)
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
    """Width and height as a JPEG or PNG states them; None for other kinds, which must be decoded.

    Raises: ValueError naming `where` for what is cut short or no image.
    """
    if what := fault(encoded):
        raise UserError(f"{where or 'image'}: {what}")
    if encoded.startswith(_SOI):
        frame = _frame(encoded)
        if frame is None:
            raise UserError(f"{where or 'image'}: a JPEG without a frame")
        return frame[:2]
    if encoded.startswith(_KINDS[1]):
        if encoded[12:16] != b"IHDR" or len(encoded) < 24 or b"IEND" not in encoded[-12:]:
            raise UserError(f"{where or 'image'}: a PNG that is cut short or damaged")
        return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    return None


def channels_of(jpeg: bytes) -> int:
    """Of a JPEG: 1 grey, 3 colour, 4 CMYK or YCCK; 0 if it does not say."""
    frame = _frame(jpeg)
    return frame[2] if frame else 0


def has_exif(encoded: bytes) -> bool:
    """Whether the image may state an orientation."""
    return b"Exif\0\0" in encoded[: 1 << 16] or b"eXIf" in encoded or b"EXIF" in encoded[: 1 << 16]


def _frame(jpeg: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels of a JPEG's first frame."""
    at = _segment(jpeg, _FRAMES)
    if at + 10 > len(jpeg):
        return None
    height, width = int.from_bytes(jpeg[at + 5 : at + 7]), int.from_bytes(jpeg[at + 7 : at + 9])
    return width, height, jpeg[at + 9]


def fault(encoded: bytes) -> str | None:
    """What is wrong with the file, if it shows without decoding."""
    if not encoded:
        return "no image: zero bytes"
    if not encoded.startswith(_KINDS):
        return f"not a JPEG, PNG, BMP or WebP image: it starts with {encoded[:8]!r}"
    # OpenCV refuses a JPEG that is cut off, but paints over one whose end is zeros or rubbish. An
    # end marker before the scan is that of an EXIF thumbnail; within the scan 0xFF is escaped.
    if encoded.endswith(_EOI) and _SCAN in encoded:
        return None  # nearly all, without the walk; what ends in a thumbnail OpenCV will refuse
    if encoded.startswith(_SOI) and encoded.rfind(_EOI, _segment(encoded, {_SOS})) < 0:
        return f"truncated: {len(encoded)} bytes and no end of the image"
    return None


def _segment(jpeg: bytes, markers: set[int]) -> int:
    """Offset of the first segment of such a kind; the length of the JPEG if it has none."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker in markers:
            return at
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return len(jpeg)
