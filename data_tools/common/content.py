"""Recognise a file by its first bytes, for messages: files often have a wrong name."""

import os
import zipfile
from pathlib import Path

_AGAIN = "an error or login page was saved in its place: download the file again"
_KINDS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    ),
    (b"\x1f\x8b", "compressed by gzip: unpack it with gunzip"),
    (b"BZh", "compressed by bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "compressed by xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"%PDF", "a PDF document"),
    (b"GIF8", "a GIF image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x0a\x23\xd7\xce", "a RecordIO file (.rec)"),
    (b"\x12\x01\0\0\0\0\0\0", "an MXNet parameter file (.params)"),
    (b"\x7fELF", "a program"),
)
_IMAGES = ((b"\xff\xd8\xff", "a JPEG image"), (b"\x89PNG\r\n", "a PNG image"))
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_HEAD = 1024  # bytes looked at
_READABLE = {"a zip archive": ".zip", "a tar archive": ".tar"}  # archives that pack reads


def described(head: bytes) -> str | None:
    """What a file is that starts with these bytes, with the remedy; None if that is unknown."""
    for magic, what in (*_KINDS, *_IMAGES):
        if head.startswith(magic):
            return what
    if head.startswith(b"PK\3\4"):
        if b"/data.pkl" in head[:_HEAD]:
            return "a file of torch.save or TorchScript (.pt)"
        return "a zip archive: unpack it"
    text = head[:_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"an HTML page; {_AGAIN}"
    if text.startswith(b"<?xml") or (text.startswith(b"<") and b">" in text):
        return f"an XML text; {_AGAIN}"
    if text.startswith((b'{"error', b'{"message', b'{ "error', b'{"detail')):
        return f"a server's error message; {_AGAIN}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file"
    if len(head) > 2 and head[0] == 8 and 3 <= head[1] <= 20 and head[2:3] in (b"\x12", b":"):
        return "an ONNX model (.onnx)"
    if head.startswith(_PICKLES):
        return "a pickle (a .bin of pairs, or weights of an old torch.save)"
    if head and not head.strip(b"\0"):
        return "nothing but zeros: an incomplete download or copy; fetch the file again"
    return None


def of_file(path: str | os.PathLike[str]) -> str | None:
    """As described(), of the file at `path`; a TorchScript archive is told from torch.save's.

    Raises: OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file"
    if head.startswith(b"PK\3\4") and (names := _zipped(Path(path))):
        if any(name.endswith("/constants.pkl") for name in names):
            return (
                "a TorchScript archive, a program and not weights: save the network's state_dict() "
                "from the code that made it"
            )
        if any(name.endswith("data.pkl") for name in names):
            return "a file of torch.save (.pt)"
        if all(name.endswith(".npy") for name in names):
            return "a NumPy archive (.npz)"
    return described(head)


def hint(path: str | os.PathLike[str], expected: str = "") -> str:
    """What to join to a message: `; it is ...`, or nothing where that is unknown or what was
    expected.

    Raises: OSError: as of_file().
    """
    what = of_file(path)
    if not what or (expected and expected in what):
        return ""
    for kind, ending in _READABLE.items():
        if expected in _READABLE and what.startswith(kind):  # as it is, under its own name
            what = f"{kind}: give it the ending {ending}"
    return f"; it is {what}"


def _zipped(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return []
