"""The table of contents of a zip archive as a stream, and one file of it at a time.

`zipfile` holds an object of some 600 bytes for every file: 42 million of them would be 25 GB. This
reads the same central directory (APPNOTE.TXT 4.3 to 4.5, Zip64 included) entry by entry.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.common import content
from data_tools.common.errors import UserError

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the Zip64 field"
_ENCRYPTED = 1
_BLOCK = 4096  # bytes that hold the packed head of a file


class Member(NamedTuple):
    name: bytes
    header: int  # byte of its local header
    packed: int  # bytes in the archive
    size: int  # bytes unpacked
    method: int
    crc: int
    encrypted: bool


def members(path: Path) -> Iterator[Member]:
    """Every file of the archive, folders left out, in the order of its directory.

    Raises: ValueError naming the archive if it is cut short, damaged, or one part of several.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise UserError(f"{path}: not a zip archive: empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield from _members(data, size)
            except (struct.error, _Damaged) as error:
                hint = content.hint(path, "a zip archive")
                raise UserError(f"{path}: not a whole zip archive: {error}{hint}") from error


class _Damaged(Exception):
    pass


def _members(data: mmap.mmap, size: int) -> Iterator[Member]:
    at, count, shift = _directory(data, size)
    for number in range(count):
        (
            magic,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            unpacked,
            name_len,
            extra_len,
            comment_len,
            _,
            _,
            _,
            header,
        ) = _CENTRAL.unpack_from(data, at)
        if magic != b"PK\1\2":
            raise _Damaged(f"entry {number} of {count} is not where its directory says, byte {at}")
        start = at + _CENTRAL.size
        name = data[start : start + name_len]
        if _FULL32 in (packed, unpacked, header):
            extra = data[start + name_len : start + name_len + extra_len]
            unpacked, packed, header = _wide(extra, unpacked, packed, header)
        at = start + name_len + extra_len + comment_len
        if not name.endswith(b"/"):
            yield Member(
                name, header + shift, packed, unpacked, method, crc, bool(flags & _ENCRYPTED)
            )


def _directory(data: mmap.mmap, size: int) -> tuple[int, int, int]:
    """Byte of the first entry, number of entries, and what must be added to their offsets."""
    end = data.rfind(b"PK\5\6", max(0, size - _END.size - _LONGEST_COMMENT))
    if end < 0:
        raise _Damaged("its end record is missing: cut short, or no zip")
    _, disk, _, _, count, length, offset, _ = _END.unpack_from(data, end)
    stop = end
    if _FULL16 in (disk, count) or _FULL32 in (length, offset):
        magic, _, end64, _ = _LOCATOR.unpack_from(data, max(0, end - _LOCATOR.size))
        if magic == b"PK\6\7":
            stop = end - _LOCATOR.size - _END64.size
            if data[stop : stop + 4] != b"PK\6\6":
                stop = end64
            magic, _, _, _, disk, _, _, count, length, offset = _END64.unpack_from(data, stop)
            if magic != b"PK\6\6":
                raise _Damaged("its Zip64 end record is missing")
    if disk:
        raise _Damaged("it is one part of several: join them first (zip -s 0 IN.zip --out ONE.zip)")
    shift = stop - length - offset  # what stands before the archive, as in a self-extracting one
    if shift < 0 or offset + shift < 0:
        raise _Damaged(f"its directory of {length} bytes at {offset} does not fit the file")
    return offset + shift, count, shift


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those that are 2^32 - 1 taken from the Zip64 field, in its order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            words = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                return [words.pop(0) if value == _FULL32 else value for value in values]
            except IndexError:
                break
        at += 4 + length
    raise _Damaged("a Zip64 field is missing")


def _data_start(descriptor: int, header: int) -> int | None:
    """The byte where the data of a file starts, None where no local header is."""
    local = os.pread(descriptor, _LOCAL.size, header)
    if len(local) < _LOCAL.size or not local.startswith(b"PK\3\4"):
        return None
    name_len, extra_len = _LOCAL.unpack(local)[-2:]
    return int(header + _LOCAL.size + name_len + extra_len)


def read_head(descriptor: int, header: int, packed: int, method: int, size: int) -> bytes:
    """The first `size` bytes of a file, b"" where they cannot be read."""
    start = _data_start(descriptor, header)
    if start is None:
        return b""
    data = os.pread(descriptor, min(packed, _BLOCK), start)
    if method == DEFLATED:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except zlib.error:
            return b""
    return data[:size] if method == STORED else b""


def read_member(
    descriptor: int, header: int, packed: int, size: int, method: int, crc: int
) -> bytes:
    """The unpacked file. Raises: ValueError if it is damaged or packed in another way."""
    start = _data_start(descriptor, header)
    if start is None:
        raise UserError(f"no file starts at byte {header} of the archive: it is damaged")
    data = os.pread(descriptor, packed, start)
    if len(data) != packed:
        raise UserError("the archive ends within it: cut short")
    if method == DEFLATED:
        try:
            # One byte more than stated: a bomb stops there and fails below.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise UserError(f"damaged in the archive: {error}") from error
    elif method != STORED:
        raise UserError(f"packed by method {method}; only stored and deflated files are read")
    if len(data) != size or zlib.crc32(data) != crc:
        raise UserError("damaged in the archive: its length or CRC-32 is not the one stated")
    return data
