"""The one judge of image files: is it one, of which kind and size, and is it whole?

It reads headers and lengths and decodes no pixels. Bytes after the end of an image are no fault:
cameras and web servers append them, and every decoder stops before them.

| kind | whole means |
|---|---|
| JPEG | an end marker after the first scan |
| PNG | a chain of chunks that reaches IEND |
| BMP, PPM | as many bytes as the header's size needs |
| WebP | as many bytes as RIFF states |
| TIFF | its strips or tiles lie within the file |
"""

import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from data_tools.common import content

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
HEAD = 64  # bytes that tell the kind
SYNTHETIC = "synthetic.json"  # what `synthesize` notes beside its pictures

_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", 0xDA
_SCAN = bytes((0xFF, _SOS))
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers of a JPEG: its size and channels
_PNG = b"\x89PNG\r\n\x1a\n"
_PNM = re.compile(rb"P([1-6])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)\s")
_MAXIMUM = re.compile(rb"(?:\s*|#[^\n]*\n)*(\d+)\s")
_ENDING = re.compile(r"\.[A-Za-z0-9]{1,8}$")
_BMP_HEADERS = [struct.pack("<I", size) for size in (12, 16, 40, 52, 56, 64, 108, 124)]
_TIFF = (b"II*\0", b"MM\0*")
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # bytes of a TIFF field's types
_TIFF_TAGS = (256, 257, 273, 279, 324, 325)  # width, height; places and lengths of strips, tiles


class ImageFile(NamedTuple):
    """What the bytes of a file say."""

    kind: str | None  # "jpeg", "png", "bmp", "webp", "tiff" or "ppm"; None: no image
    size: tuple[int, int] | None  # width and height; None where the header does not give it
    fault: str | None  # what is wrong with it; None: whole, as far as it shows without decoding


def is_hidden(name: str) -> bool:
    """Whether a file of this base name is hidden: .DS_Store, ._0001.jpg of macOS."""
    return name.startswith(".")


def ending(name: str) -> str:
    """The ending of a file's name in lower case, such as ".jpg"; "" without one."""
    found = _ENDING.search(name)
    return found[0].lower() if found else ""


def is_image_name(name: str) -> bool:
    """Whether the ending of a base name says that it is an image; hidden files are none."""
    return not is_hidden(name) and name.lower().endswith(SUFFIXES)


class Chooser:
    """Tells the images among files, and counts the others, except those that we wrote there."""

    def __init__(self) -> None:
        self.hidden = 0
        self.left_out: Counter[str] = Counter()  # by ending; "none" without one

    @property
    def ignored(self) -> int:
        return self.hidden + self.left_out.total()

    def takes(self, name: str, head: Callable[[], bytes]) -> bool:
        """Whether the file of this base name is an image: by its ending, or by its first bytes
        (of `head`, which is called only then) where it has none."""
        if name == SYNTHETIC:
            return False
        if is_hidden(name):
            self.hidden += 1
            return False
        if is_image_name(name) or (not ending(name) and kind_of(head())):
            return True
        self.left_out[ending(name) or "none"] += 1
        return False


def kind_of(encoded: bytes) -> str | None:
    """The kind of the image that starts with these bytes (HEAD of them do), None for no image."""
    if encoded.startswith(_SOI):
        return "jpeg"
    if encoded.startswith(_PNG):
        return "png"
    if encoded.startswith(b"RIFF"):
        return "webp" if encoded[8:12] == b"WEBP" else None
    if encoded.startswith(_TIFF):
        return "tiff"
    if encoded.startswith(b"BM") and encoded[14:18] in _BMP_HEADERS:
        return "bmp"
    return "ppm" if _PNM.match(encoded) else None


def judge(encoded: bytes) -> ImageFile:
    """Kind, size and fault of an encoded image."""
    kind = kind_of(encoded)
    if kind is None:
        return ImageFile(None, None, _no_image(encoded))
    try:
        size, fault = _READERS[kind](encoded)
    except (struct.error, IndexError):
        size, fault = None, "its header ends early"
    if fault is None and size is not None and min(size) < 1:
        fault = f"its header states {size[0]}x{size[1]} pixels"
    if fault is not None:
        fault = f"truncated: {len(encoded)} bytes and {fault}"
    return ImageFile(kind, size, fault)


def fault(encoded: bytes) -> str | None:
    """As judge(encoded).fault; of nearly all JPEGs without walking through their segments."""
    # An end marker before the scan is that of an EXIF thumbnail; within the scan 0xFF is escaped.
    # What ends in a thumbnail a decoder refuses.
    if encoded.startswith(_SOI) and encoded.endswith(_EOI) and _SCAN in encoded:
        return None
    return judge(encoded).fault


def channels_of(jpeg: bytes) -> int:
    """Of a JPEG: 1 grey, 3 colour, 4 CMYK or YCCK; 0 if it does not say."""
    frame = _frame(jpeg)
    return frame[2] if frame else 0


def has_exif(encoded: bytes) -> bool:
    """Whether the image may state an orientation."""
    return b"Exif\0\0" in encoded[: 1 << 16] or b"eXIf" in encoded or b"EXIF" in encoded[: 1 << 16]


def is_plain(encoded: bytes) -> bool:
    """Whether all decoders agree on its pixels: a grey or YCbCr JPEG, or a PNG of 8-bit RGB or
    grey without transparency."""
    if encoded.startswith(_SOI):
        return channels_of(encoded) == 1 or (channels_of(encoded) == 3 and not _is_rgb(encoded))
    return (
        encoded.startswith(_PNG)
        and encoded[24:26] in (b"\x08\x00", b"\x08\x02")
        and (b"tRNS" not in encoded)
    )


def _no_image(encoded: bytes) -> str:
    if not encoded:
        return "no image: zero bytes"
    what = content.described(encoded)
    return "not a JPEG, PNG, BMP, WebP, TIFF or PPM image: " + (
        f"it is {what}" if what else f"it starts with {encoded[:8]!r}"
    )


_Found = tuple[tuple[int, int] | None, str | None]  # size and fault


def _jpeg(encoded: bytes) -> _Found:
    frame = _frame(encoded)
    # OpenCV refuses a JPEG that is cut off, but paints over one whose end is zeros or rubbish.
    if encoded.rfind(_EOI, _segment(encoded, {_SOS})) < 0:
        return frame and frame[:2], "no end of the image"
    return (frame[:2], None) if frame else (None, "no frame, the header that states its size")


def _png(encoded: bytes) -> _Found:
    if encoded[12:16] != b"IHDR" or len(encoded) < 24:
        return None, "no IHDR, the header that states its size"
    size = struct.unpack_from(">2I", encoded, 16)
    at = len(_PNG)
    while encoded[at + 4 : at + 8] != b"IEND":
        if at + 12 > len(encoded):
            return size, "no IEND, the end of a PNG"
        at += 12 + struct.unpack_from(">I", encoded, at)[0]
    return size, None if at + 12 <= len(encoded) else "no IEND, the end of a PNG"


def _bmp(encoded: bytes) -> _Found:
    offset, header = struct.unpack_from("<2I", encoded, 10)
    if header in (12, 16):
        form = "<4H" if header == 12 else "<2I2H"
        width, height, _, bits = struct.unpack_from(form, encoded, 18)
        packed = 0
    else:
        width, height, _, bits, packed = struct.unpack_from("<2i2HI", encoded, 18)
    height = abs(height)
    needed = offset + (width * bits + 31) // 32 * 4 * height
    if packed in (0, 3) and needed > len(encoded):  # not run lengths
        return (width, height), f"{width}x{height} pixels need {needed}"
    return (width, height), None


def _webp(encoded: bytes) -> _Found:
    (stated,) = struct.unpack_from("<I", encoded, 4)
    chunk = encoded[12:16]
    size = None
    if chunk == b"VP8 " and encoded[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<2H", encoded, 26)
        size = width & 0x3FFF, height & 0x3FFF
    elif chunk == b"VP8L" and encoded[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", encoded, 21)
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8X":
        size = (
            int.from_bytes(encoded[24:27], "little") + 1,
            int.from_bytes(encoded[27:30], "little") + 1,
        )
    # The last byte may be padding that a writer has left out.
    if stated + 8 > len(encoded) + 1:
        return size, f"{stated + 8} stated"
    return size, None


def _tiff(encoded: bytes) -> _Found:
    order = "<" if encoded.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", encoded, 4)
    (entries,) = struct.unpack_from(order + "H", encoded, at)
    fields: dict[int, list[int]] = {}
    last = 0  # byte where what the header points to ends
    for number in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "2H2I", encoded, at + 2 + 12 * number)
        size = _TIFF_SIZES[kind] if kind < len(_TIFF_SIZES) else 0
        place = value if size * count > 4 else at + 10 + 12 * number
        last = max(last, place + size * count)
        if tag in _TIFF_TAGS and kind in (3, 4):
            letter = "H" if kind == 3 else "I"
            fields[tag] = list(struct.unpack_from(f"{order}{count}{letter}", encoded, place))
    shown = (fields[256][0], fields[257][0]) if {256, 257} <= fields.keys() else None
    starts = fields.get(273) or fields.get(324) or []
    lengths = fields.get(279) or fields.get(325) or []
    ends = [start + length for start, length in zip(starts, lengths, strict=False)]
    if max([last, *ends]) > len(encoded):
        return shown, f"its pixels and fields go on to byte {max([last, *ends])}"
    return shown, None if shown else "no size in its header"


def _ppm(encoded: bytes) -> _Found:
    found = _PNM.match(encoded)
    assert found is not None  # as kind_of() has found
    form, width, height = (int(number) for number in found.groups())
    if form == 4:
        needed = found.end() + (width + 7) // 8 * height
    elif form in (5, 6):
        maximum = _MAXIMUM.match(encoded, found.end() - 1)
        if maximum is None:
            return (width, height), "no highest value in its header"
        each = (3 if form == 6 else 1) * (2 if int(maximum[1]) > 255 else 1)
        needed = maximum.end() + width * height * each
    else:
        needed = 0  # numbers as text
    return (width, height), f"{needed} needed" if needed > len(encoded) else None


_READERS = {"jpeg": _jpeg, "png": _png, "bmp": _bmp, "webp": _webp, "tiff": _tiff, "ppm": _ppm}


def _frame(jpeg: bytes) -> tuple[int, int, int] | None:
    """Width, height and channels of a JPEG's first frame."""
    at = _segment(jpeg, _FRAMES)
    if at + 10 > len(jpeg):
        return None
    height, width = int.from_bytes(jpeg[at + 5 : at + 7]), int.from_bytes(jpeg[at + 7 : at + 9])
    return width, height, jpeg[at + 9]


def _is_rgb(jpeg: bytes) -> bool:
    """Whether the three channels of a JPEG are RGB themselves, as Adobe's marker can say."""
    at = _segment(jpeg, {0xEE})
    return jpeg[at + 4 : at + 9] == b"Adobe" and jpeg[at + 15 : at + 16] == b"\0"


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
