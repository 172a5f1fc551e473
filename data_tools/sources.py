"""What can be packed: a folder of identities, an InsightFace directory, or shards that exist.

A folder of identities is `SOURCE/<identity>/<image>`, one level deep. Its rules:

- identities and images count in lexicographic order of their names;
- images are files named .jpg .jpeg .png .bmp .webp, in any case; links to files and folders are
  followed; other files, and all that is hidden (.name), are counted and left out;
- an image beside the identity folders, or a folder inside one, has no identity that we could be
  sure of: it is listed as skipped, never guessed.
"""

import hashlib
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools import shards
from data_tools.decode import IMAGE_SUFFIXES, to_jpeg
from data_tools.parallel import Advance
from data_tools.recordio import RecordFile, unpack_record

_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)


class Images(Protocol):
    """n encoded images; travels to other processes by pickle."""

    def __len__(self) -> int: ...
    def where(self, i: int) -> str: ...
    def select(self, indices: np.ndarray) -> "Images": ...
    def read(self, i: int) -> bytes:
        """The encoded bytes. Raises: ValueError if this image is at fault, OSError if a disk is."""


class Source(Images, Protocol):
    """N images of known identities."""

    kind: str  # "folder" | "insightface-A" | "insightface-plain" | "arcline-shards"
    path: Path
    identities: list[str]  # names, in the order of their numbers
    labels: np.ndarray  # int64 [N] number of the identity of each image
    skipped: list[tuple[str, str]]  # (where, why) of what has no identity
    ignored: int  # files that are no images
    sha256: str  # of the listing: names, sizes and times of change
    bins: list[Path]  # verification sets that lie beside the images


def open_source(path: str | Path) -> Source:
    """The source at `path`, told by what it holds.

    Raises: FileNotFoundError if there is no such directory; ValueError if it holds nothing to pack.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if (path / shards.INDEX).is_file() or any(path.glob("*.rec")):
        return RecordSource(path)
    return FolderSource(path)


class Jpeg(NamedTuple):
    """Image i of a source as a JPEG of the size asked for."""

    i: int
    encoded: bytes
    resized: bool


def read_jpegs(
    images: Images, size: int, quality: int, skipped: list[tuple[str, str]], advance: Advance
) -> Iterator[Jpeg]:
    """Each readable image as a size x size JPEG; (where, why) of the others joins `skipped`."""
    for i in range(len(images)):
        where = images.where(i)
        try:
            jpeg, resized = to_jpeg(images.read(i), size, quality, where)
        except ValueError as error:
            skipped.append((where, str(error).removeprefix(f"{where}: ")))
        else:
            yield Jpeg(i, jpeg, resized)
        advance(1)


class Paths:
    """Images by path. Their names are one block of bytes: 42 million cost about 1 GB, not 5."""

    def __init__(self, root: Path, names: Iterable[bytes]) -> None:
        self.root = root
        lengths = array("i")
        blob = bytearray()
        for name in names:  # relative to root
            blob += name
            lengths.append(len(name))
        self._blob = bytes(blob)
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> bytes:
        return self._blob[self._ends[i - 1] if i else 0 : self._ends[i]]

    def where(self, i: int) -> str:
        return os.fsdecode(self.name(i))

    def read(self, i: int) -> bytes:
        path = os.path.join(os.fsencode(self.root), self.name(i))
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{self.where(i)}: not a regular file")
            with open(path, "rb") as file:
                return file.read()
        except _UNREADABLE as error:
            raise ValueError(f"{self.where(i)}: {error.strerror}") from error
        except OSError as error:  # a disk at fault, not the image: nobody should train without it
            raise OSError(error.errno, error.strerror, path) from error

    def select(self, indices: np.ndarray) -> "Paths":
        return Paths(self.root, (self.name(int(i)) for i in indices))


class FolderSource(Paths):
    """A folder of identities; see the top of the file for its rules."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identities: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.bins: list[Path] = []
        self._digest = hashlib.sha256()
        self._counts: list[int] = []  # images of each identity
        super().__init__(path, self._names())
        if not len(self):
            raise ValueError(
                f"{path}: no images: expected {path}/<identity>/<image>.jpg; found "
                f"{len(self.identities)} folders, {len(self.skipped)} misplaced images or folders"
            )
        self.labels = np.repeat(np.arange(len(self.identities)), self._counts)
        self.sha256 = self._digest.hexdigest()

    def _names(self) -> Iterator[bytes]:
        for entry in _sorted_entries(self.path):
            if entry.name.startswith("."):
                self.ignored += 1
            elif entry.is_dir():
                found = self._images_of(entry)
                self.identities.append(entry.name)
                self._counts.append(len(found))
                yield from found
            elif is_image(entry.name):
                self.skipped.append((entry.name, "lies outside any identity folder"))
            else:
                self.ignored += 1

    def _images_of(self, identity: os.DirEntry) -> list[bytes]:
        if "\n" in identity.name or "\r" in identity.name:
            raise ValueError(f"{identity.path!r}: a line break in the name of an identity")
        found = []
        for entry in _sorted_entries(identity.path):
            name = f"{identity.name}/{entry.name}"
            if entry.name.startswith("."):
                self.ignored += 1
            elif entry.is_dir():
                self.skipped.append((name, "a folder inside an identity folder"))
            elif is_image(entry.name):
                found.append(os.fsencode(name))
                self._digest.update(found[-1] + b"\0" + _stamp(entry) + b"\n")
            else:
                self.ignored += 1
        return found


class Records:
    """Images by record: the file and the byte where each starts."""

    def __init__(self, files: list[RecordFile], file_of: np.ndarray, offsets: np.ndarray) -> None:
        self._files = files
        self._file_of = file_of  # [n] position in files
        self._offsets = offsets  # int64 [n]

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, i: int) -> str:
        return self._files[self._file_of[i]].where(int(self._offsets[i]))

    def read(self, i: int) -> bytes:
        record, _ = self._files[self._file_of[i]].read(int(self._offsets[i]))
        return unpack_record(record, self.where(i))[1]

    def select(self, indices: np.ndarray) -> "Records":
        return Records(self._files, self._file_of[indices], self._offsets[indices])


class RecordSource(Records):
    """An InsightFace directory, or shards that exist; its identities may be without images."""

    def __init__(self, path: Path) -> None:
        data = shards.open(path)
        counts = np.diff(data.starts)
        super().__init__(data.files, np.repeat(np.arange(len(counts)), counts), data.offsets)
        self.path = path
        self.kind: str = data.index["format"]
        self.labels = data.labels
        self.identities = data.identities
        self.skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.bins = data.bin_paths()
        digest = hashlib.sha256()
        for entry in _sorted_entries(path):
            if entry.is_file():
                digest.update(os.fsencode(entry.name) + b"\0" + _stamp(entry) + b"\n")
        self.sha256 = digest.hexdigest()


def _sorted_entries(path: Any) -> list[os.DirEntry]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones do not."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _stamp(entry: os.DirEntry) -> bytes:
    """Size and time of change: what tells without reading it that a file is no longer the same."""
    try:
        found = entry.stat()
    except FileNotFoundError:  # a broken link
        return b"-"
    return b"%d %d" % (found.st_size, found.st_mtime_ns)
