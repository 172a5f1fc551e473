"""Encoded image -> RGB pixels, as MXNet decodes them but for EXIF, which is not followed."""

import cv2
import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA
_SCAN = bytes((0xFF, _SOS))
_KINDS = (_SOI, b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
# IGNORE_ORIENTATION: faces were aligned as pixels, and a tag that survived that would turn them
# away again. MXNet 1.9.1 follows it in `mx.image.imdecode` and ImageRecordIter, not in unpack_img.
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode(encoded: bytes, size: int = 112, where: str = "") -> np.ndarray:
    """RGB pixels, uint8 [size, size, 3].

    Grey becomes three equal channels, transparency is dropped, a square image of another size is
    resized (bicubic).
    Raises: ValueError naming `where` for an empty, truncated or unreadable image, or one that is
    not square: faces are aligned before they come here; stretching or cropping would misalign them.
    """
    return _resized(decode_any_size(encoded, where), size, where)


def decode_any_size(encoded: bytes, where: str = "") -> np.ndarray:
    """RGB pixels at the image's own size, uint8 [h, w, 3]. Raises: ValueError naming `where`."""
    if what := fault(encoded):
        raise ValueError(f"{where or 'image'}: {what}")
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _FLAGS)
    except cv2.error as error:
        raise ValueError(f"{where or 'image'}: {error.err or error}") from error
    if image is None:
        raise ValueError(f"{where or 'image'}: the pixels cannot be decoded: cut off or damaged")
    return image


def to_jpeg(encoded: bytes, size: int, quality: int, where: str = "") -> tuple[bytes, bool]:
    """The same bytes if they are a readable size x size JPEG, else that image as one; if resized.

    Raises: ValueError as `decode` does.
    """
    image = decode_any_size(encoded, where)
    if encoded.startswith(_SOI) and image.shape[:2] == (size, size):
        return encoded, False
    resized = image.shape[:2] != (size, size)
    image = _resized(image, size, where)
    _, jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return jpeg.tobytes(), resized


def _resized(image: np.ndarray, size: int, where: str) -> np.ndarray:
    height, width = image.shape[:2]
    if height != width:
        raise ValueError(
            f"{where or 'image'}: {width}x{height} pixels is not square; align the faces to "
            f"{size}x{size} first"
        )
    if height == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


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
    if encoded.startswith(_SOI) and encoded.rfind(_EOI, _scan(encoded)) < 0:
        return f"truncated: {len(encoded)} bytes and no end of the image"
    return None


def _scan(jpeg: bytes) -> int:
    """Offset of the first scan (SOS) of a JPEG; its length if the segments break off before."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == _SOS:
            return at
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return len(jpeg)
