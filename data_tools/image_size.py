"""The size that an image file states in its header, read without decoding a pixel."""

import struct

_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags
_TIFF_TYPES = {3: "H", 4: "I"}


def stated_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG, PNG, BMP, WebP, TIFF or PNM; None where none is stated.

    It judges nothing: of a damaged file the size may be missing or wrong.
    """
    try:
        return _size(encoded)
    except (struct.error, IndexError, ValueError):  # it ends within its header, or lies
        return None


def _size(encoded: bytes) -> tuple[int, int] | None:
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg(encoded)
    if encoded.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", encoded, 16)
        return width, height
    if encoded.startswith(b"BM"):
        if struct.unpack_from("<I", encoded, 14)[0] == 12:  # the header of OS/2
            width, height = struct.unpack_from("<HH", encoded, 18)
        else:
            width, height = struct.unpack_from("<ii", encoded, 18)
        return abs(width), abs(height)  # a negative height: rows from the top
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return _webp(encoded)
    if encoded.startswith((b"II*\0", b"MM\0*")):
        return _tiff(encoded)
    if encoded[:1] == b"P" and encoded[1:2].isdigit():
        lines = [line.split(b"#")[0] for line in encoded[:4096].splitlines()]
        _, width, height = b" ".join(lines).split()[:3]
        return int(width), int(height)
    return None


def _jpeg(encoded: bytes) -> tuple[int, int] | None:
    at = 2
    while encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", encoded, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", encoded, at + 2)[0]
    return None


def _webp(encoded: bytes) -> tuple[int, int] | None:
    kind = encoded[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", encoded, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", encoded, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width, height = (int.from_bytes(encoded[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    return None


def _tiff(encoded: bytes) -> tuple[int, int] | None:
    order = "<" if encoded.startswith(b"II") else ">"
    at = struct.unpack_from(order + "I", encoded, 4)[0]
    found = {}
    for n in range(struct.unpack_from(order + "H", encoded, at)[0]):
        entry = at + 2 + 12 * n
        tag, kind = struct.unpack_from(order + "HH", encoded, entry)
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT) and kind in _TIFF_TYPES:
            found[tag] = struct.unpack_from(order + _TIFF_TYPES[kind], encoded, entry + 8)[0]
    if len(found) < 2:
        return None
    return found[_TIFF_WIDTH], found[_TIFF_HEIGHT]
