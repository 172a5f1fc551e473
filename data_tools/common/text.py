"""One opener for every text file that a user gives: lists, landmarks, pairs, indices."""

import json
import os
from collections.abc import Iterator
from typing import Any

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.files import naming

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def refuse_utf16(start: bytes, name: str) -> None:
    """Raises: UserError naming the file that starts with these bytes, if they say UTF-16."""
    if start.startswith(_UTF16):
        raise UserError(f"{name} is UTF-16 text: save it as UTF-8")


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
    refuse_utf16(content, name)
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


def read_json(path: str | os.PathLike[str], remedy: str = "") -> Any:
    """The content of a JSON file.

    remedy: of a file that we wrote ourselves, what to do if it is damaged.

    Raises:
        UserError: not JSON, or nested too deeply; it names the file. As read_text.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "it is empty" if not text.strip() else str(error)
        name = os.fspath(path)
        if remedy:
            raise UserError(f"{name} is damaged: not JSON: {what}; {remedy}") from error
        raise UserError(f"{name}: not JSON: {what}") from error


def numbered_lines(
    path: str | os.PathLike[str], errors: str = "strict"
) -> Iterator[tuple[int, str]]:
    """(number from 1, line without trailing white space) of all lines that are not blank.

    Reads as it goes: a list of 40 million lines never stands in memory.

    errors: "surrogateescape" keeps the bytes of a path that is no UTF-8; os.fsencode() gives them
        back.

    Raises: as read_text.
    """
    with naming(path), open(path, "rb") as file:
        refuse_utf16(file.read(2), os.fspath(path))
    try:
        with naming(path), open(path, encoding="utf-8-sig", errors=errors) as lines:  # any line end
            for number, line in enumerate(lines, 1):
                if line := line.rstrip():
                    yield number, line
    except UnicodeDecodeError:
        read_text(path)  # names the line
        raise
