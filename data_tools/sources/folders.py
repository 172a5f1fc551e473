"""Images in files: a folder of identities, and the reading of any image by its path.

A folder of identities is `SOURCE/<identity>/<image>`, one level deep. Its rules:

- identities and images count in lexicographic order of their names;
- images are files named .jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .ppm .pgm, in any case,
  and files without an ending whose first bytes are an image's; links to files and folders are
  followed; other files are counted by their endings and left out, as all that is hidden (.name);
- an image beside the identity folders, or a folder inside one, has no identity that we could be
  sure of: it is listed as skipped, never guessed. With `nested` a folder inside one is searched as
  well: every folder that holds images is an identity, named by its path. With `level` N the first N
  folders of an image's path are its identity, and the folders below belong to it: CFP's frontal/
  and profile/ of each person at level 1.
"""

import collections
import hashlib
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common.errors import UserError
from data_tools.images.image_file import HEAD, Chooser, is_hidden
from data_tools.images.image_table import Names
from data_tools.sources.labels import Listing

_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Paths:
    """Images by path, relative to a root."""

    def __init__(self, root: Path, names: Names) -> None:
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> bytes:
        return self.names[i]

    def where(self, i: int) -> str:
        return os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        path = os.path.join(os.fsencode(self.root), self.names[i])
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"{self.where(i)}: not a regular file")
            with open(path, "rb") as file:
                return file.read()
        except _UNREADABLE as error:
            raise UserError(f"{self.where(i)}: {error.strerror}") from error
        except OSError as error:  # a disk at fault, not the image: nobody should train without it
            raise OSError(error.errno, error.strerror, path) from error

    def select(self, indices: np.ndarray) -> "Paths":
        return Paths(self.root, self.names.select(indices))


class FolderSource(Listing, Paths):
    """A folder of identities; see the top of the file for its rules."""

    kind = "folder"

    def __init__(self, path: Path, nested: bool = False, level: int = 0) -> None:
        Listing.__init__(self, path)
        self.identities = []
        self._nested = nested
        self._chooser = Chooser()
        self._level = level
        self._digest = hashlib.sha256(b"level %d\n" % level if level else b"")
        self._counts = array("q")  # images of each identity
        Paths.__init__(self, path, Names.of(self._identities(path, "")))
        self.ignored, self.left_out = self._chooser.ignored, dict(self._chooser.left_out)
        if not len(self):
            raise UserError(
                f"{path}: no images: expected {path}/<identity>/<image>.jpg; found "
                f"{len(self.identities)} folders, {len(self.skipped)} misplaced images or folders"
                + (
                    ""
                    if nested or level
                    else "; --nested looks into folders of folders, --identity-level N says at "
                    "which depth the folders of people are"
                )
            )
        self.labels = np.repeat(np.arange(len(self.identities)), self._counts)
        self.sha256 = self._digest.hexdigest()

    def _identities(self, path: Any, above: str) -> Iterator[bytes]:
        """The images of the folders in `path`, `above` their names: '' or 'parent/'."""
        for entry in _sorted_entries(path):
            name = above + entry.name
            if not is_hidden(entry.name) and entry.is_dir():
                yield from self._images_of(entry, name)
            elif self._takes(entry):
                self.skipped.append(
                    (name, _BESIDE if above else "lies outside any identity folder")
                )

    def _images_of(self, identity: os.DirEntry, path: str) -> Iterator[bytes]:
        if "\n" in identity.name or "\r" in identity.name:
            raise UserError(f"{identity.path!r}: a line break in the name of an identity")
        entries = _sorted_entries(identity.path)
        folders = [e for e in entries if not is_hidden(e.name) and e.is_dir()]
        above_level = path.count("/") + 1 < self._level
        if (self._nested and folders) or above_level:
            yield from self._identities(identity.path, path + "/")
            return
        self.identities.append(path)
        self._counts.append(0)
        yield from self._of_one(entries, path)

    def _of_one(self, entries: list[os.DirEntry], path: str) -> Iterator[bytes]:
        """The images of one identity in the folder `path`; with a level, those below it as well."""
        for entry in entries:
            name = f"{path}/{entry.name}"
            if not is_hidden(entry.name) and entry.is_dir():
                if self._level:
                    yield from self._of_one(_sorted_entries(entry.path), name)
                else:
                    self.skipped.append((name, "a folder inside an identity folder"))
            elif self._takes(entry):
                encoded = os.fsencode(name)
                self._counts[-1] += 1
                self._digest.update(encoded + b"\0" + stamp(entry) + b"\n")
                yield encoded

    def _takes(self, entry: os.DirEntry) -> bool:
        return self._chooser.takes(entry.name, lambda: _head(entry.path))


def same_person_text(identities: list[str]) -> str | None:
    """A warning if folders side by side look like one person's, such as 001/frontal, 001/profile.

    They do where the same few names stand below most folders; names of people differ from folder
    to folder.
    """
    below: dict[str, set[str]] = {}
    for name in identities:
        parent, slash, last = name.rpartition("/")
        if slash:
            below.setdefault(parent, set()).add(last)
    shared = collections.Counter(last for names in below.values() for last in names)
    common = {last for last, times in shared.items() if times >= max(2, len(below) / 2)}
    if not below or len(common) < 2:
        return None
    parents = [parent for parent, names in below.items() if len(names & common) > 1]
    if not parents:
        return None
    parent = parents[0]
    first, second, *_ = sorted(below[parent] & common)
    return (
        f"{parent}/{first} and {parent}/{second} look like folders of one person, as "
        f"{len(below)} folders have such names; each is packed as a person of its own: "
        f"--identity-level {parent.count('/') + 1} makes {len(below)} people of the "
        f"{len(identities)}"
    )


_BESIDE = "lies beside identity folders"


def _sorted_entries(path: Any) -> list[os.DirEntry]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except _UNREADABLE:  # a broken link, no permission
        return b""


def stamp(entry: os.DirEntry) -> bytes:
    """Size and time of change: what tells without reading it that a file is no longer the same."""
    try:
        found = entry.stat()
    except FileNotFoundError:  # a broken link
        return b"-"
    return b"%d %d" % (found.st_size, found.st_mtime_ns)
