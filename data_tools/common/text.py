"""One opener for every text file that a user gives: lists, landmarks, pairs, indices."""

import os

from data_tools.common import files
from data_tools.common.errors import UserError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, with "\\n" line ends; a UTF-8 byte order mark is left out.

    CRLF and lone CR end a line too.

    Raises:
        UserError: UTF-16, or no UTF-8; it names the file, the line and the way on.
        OSError: it cannot be read.
    """
    return decode(files.read_bytes(path), os.fspath(path))


def decode(content: bytes, name: str) -> str:
    """As read_text, of bytes that come from `name`."""
    if content.startswith(_UTF16):
        raise UserError(f"{name} is UTF-16 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text; "
            "save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file without trailing white space; blank lines at its end are left out.

    Line i of the file is item i - 1. Raises: as read_text.
    """
    lines = [line.rstrip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
