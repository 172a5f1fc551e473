"""zip and tar archives as sources, read in place: nothing is unpacked.

The identity of an image is the folder that holds it: its path in the archive, less the folders that
all images share. An image in a folder that also holds folders of images is in no identity that we
could be sure of: skipped and listed. A directory of archives (WebFace42M's ten zips) is one source;
the same folder in two of them is one identity. If a file appears twice, the last counts, as when
unpacking. Order: identities by their names, images as they stand.
"""

import functools
import hashlib
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.common import content, files
from data_tools.common.errors import UserError
from data_tools.images.image_file import HEAD, Chooser
from data_tools.images.image_table import Names, back_slashes, number_by_name, repeated
from data_tools.sources import zip_index
from data_tools.sources.labels import Listing

ARCHIVES = (".zip", ".tar")
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
TAR = 0xFFFF  # in the column of methods
MAX_IMAGE = 1 << 28  # bytes: what claims more is damage, or meant to fill the memory


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES) and files.is_file(path)


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(".tar")


def refuse_packed(path: Path) -> None:
    """Raises: ValueError for an archive in which no file can be found without unpacking all."""
    if path.name.lower().endswith(_PACKED_TARS) and files.is_file(path):
        raise UserError(
            f"{path}: a compressed archive cannot be read in place; unpack it once, for example to "
            f"a plain tar: gunzip, bunzip2 or unxz"
        )


class Entry(NamedTuple):
    """A file: its name, columns of where it is, and what tells its content apart."""

    name: bytes
    at: int
    packed: int
    size: int
    method: int
    crc: int
    fault: str | None
    stamp: bytes
    slashes: bool = False  # it was written with back slashes


class ArchiveImages:
    """Images by archive and place."""

    def __init__(self, paths: list[Path], names: Names, columns: dict[str, np.ndarray]) -> None:
        self._paths = paths
        self.names = names
        self._columns = columns  # each [n]
        self._open: dict[int, int] = {}  # archive -> descriptor, of this process

    def __getstate__(self) -> tuple:
        return self._paths, self.names, self._columns

    def __setstate__(self, state: tuple) -> None:
        self._paths, self.names, self._columns = state
        self._open = {}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> bytes:
        return self.names[i]

    def where(self, i: int) -> str:
        return f"{self._paths[self._columns['archive'][i]].name}: {os.fsdecode(self.names[i])}"

    def read(self, i: int) -> bytes:
        at, packed, size, method, crc, archive = (
            int(self._columns[key][i])
            for key in ("at", "packed", "size", "method", "crc", "archive")
        )
        if archive not in self._open:
            self._open[archive] = os.open(self._paths[archive], os.O_RDONLY)
            files.make_room(self._open[archive])
        descriptor = self._open[archive]
        if size > MAX_IMAGE or packed > MAX_IMAGE:
            raise UserError(f"{self.where(i)}: {size} bytes cannot be an image of a face")
        if method == TAR:
            data = os.pread(descriptor, size, at)
            if len(data) != size:
                raise UserError(f"{self.where(i)}: the archive ends within it: cut short")
            return data
        try:
            return zip_index.read_member(descriptor, at, packed, size, method, crc)
        except ValueError as error:
            raise UserError(f"{self.where(i)}: {error}") from error

    def select(self, indices: np.ndarray) -> "ArchiveImages":
        columns = {key: column[indices] for key, column in self._columns.items()}
        return ArchiveImages(self._paths, self.names.select(indices), columns)


class ArchiveSource(Listing, ArchiveImages):
    """See the top of the file. Raises: ValueError for a damaged archive, or none with images."""

    kind = "archives"

    def __init__(self, path: Path, archives: list[Path]) -> None:
        Listing.__init__(self, path)
        self._chooser = Chooser()
        self._slashes = 0  # names with back slashes
        self._digest = hashlib.sha256()
        self._numbers: dict[bytes, int] = {}  # folder -> number, in order of appearance
        self._found = {key: array(kind) for key, kind in _COLUMNS.items()}
        ArchiveImages.__init__(self, archives, Names.of(self._list(archives)), {})
        self.ignored, self.left_out = self._chooser.ignored, dict(self._chooser.left_out)
        if self._slashes:
            self.notes.append(back_slashes(self._slashes, path))
        self._columns = {
            key: np.frombuffer(column, column.typecode) for key, column in self._found.items()
        }
        labels = self._columns.pop("folder")
        folders, self.labels = number_by_name(list(self._numbers), labels)
        del self._found, self._numbers
        self.sha256 = self._digest.hexdigest()
        self._drop(self._faults(folders))
        if not len(self):
            raise UserError(
                f"{path}: no image lies in an identity folder, and none has a .cls or .json with a "
                f"label beside it; {len(self.skipped)} were skipped"
            )
        used, self.labels = np.unique(self.labels, return_inverse=True)
        self.identities = [os.fsdecode(name) for name in stripped([folders[k] for k in used])]

    def _list(self, archives: list[Path]) -> Iterator[bytes]:
        """The name of each image, its columns joined to `_found` on the way."""
        for number, path in enumerate(archives):
            self._digest.update(os.fsencode(path.name) + b"\n")
            for entry in tar_entries(path) if is_tar(path) else _zip(path):
                folder, _, base = entry.name.rpartition(b"/")
                if entry.name.startswith((b"__MACOSX/", b".")) or b"/." in entry.name:
                    self._chooser.hidden += 1
                    continue
                head = functools.partial(_head, path, entry)
                if not self._chooser.takes(os.fsdecode(base), head):
                    continue
                self._slashes += entry.slashes
                where = f"{path.name}: {os.fsdecode(entry.name)}"
                if entry.fault or not folder:
                    self.skipped.append((where, entry.fault or "lies outside any identity folder"))
                    continue
                if b"\n" in entry.name or b"\r" in entry.name:
                    raise UserError(f"{path}: a line break in the name {entry.name!r}")
                self._digest.update(entry.name + b"\0" + entry.stamp + b"\n")
                values = (
                    number,
                    entry.at,
                    entry.packed,
                    entry.size,
                    entry.method,
                    entry.crc,
                    self._numbers.setdefault(folder, len(self._numbers)),
                )
                for column, value in zip(self._found.values(), values, strict=True):
                    column.append(value)
                yield entry.name

    def _faults(self, folders: list[bytes]) -> dict[int, str]:
        """What is wrong with the place of an image, by its number."""
        faults = {i: "appears twice: the last one counts" for i, _ in repeated(self.names)}
        holders = {parent for name in folders for parent in _parents(name)}
        mixed = [k for k, name in enumerate(folders) if name in holders]
        for i in np.flatnonzero(np.isin(self.labels, mixed)).tolist():
            faults[i] = "lies beside identity folders"
        return faults

    def _drop(self, faults: dict[int, str]) -> None:
        if not faults:
            return
        self.skipped += [(self.where(i), why) for i, why in sorted(faults.items())]
        keep = np.setdiff1d(np.arange(len(self)), list(faults))
        kept = self.select(keep)
        self.names, self._columns, self.labels = kept.names, kept._columns, self.labels[keep]


_COLUMNS = {
    "archive": "H",
    "at": "q",
    "packed": "q",
    "size": "q",
    "method": "H",
    "crc": "I",
    "folder": "i",
}


def _parents(name: bytes) -> Iterator[bytes]:
    parts = name.split(b"/")
    return (b"/".join(parts[:n]) for n in range(1, len(parts)))


def stripped(folders: list[bytes]) -> list[bytes]:
    """The folders less the parents that they all share."""
    above = [name.split(b"/")[:-1] for name in folders]
    shared = os.path.commonprefix(above) if above else []
    return [b"/".join(name.split(b"/")[len(shared) :]) for name in folders]


def _zip(path: Path) -> Iterator[Entry]:
    for found in zip_index.members(path):
        fault = "encrypted" if found.encrypted else None
        # A zip's names have slashes; some programs of Windows write their own instead.
        name = found.name.replace(b"\\", b"/").removeprefix(b"./")
        if name.endswith(b"/"):
            continue
        yield Entry(
            name,
            found.header,
            found.packed,
            found.size,
            found.method,
            found.crc,
            fault,
            b"%d %d" % (found.size, found.crc),
            b"\\" in found.name,
        )


def _head(path: Path, entry: Entry) -> bytes:
    with open(path, "rb") as file:
        if entry.method == TAR:
            return os.pread(file.fileno(), min(HEAD, entry.size), entry.at)
        return zip_index.read_head(file.fileno(), entry.at, entry.packed, entry.method, HEAD)


def tar_entries(path: Path) -> Iterator[Entry]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (found := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
                if found.isdir():
                    continue
                name = os.fsencode(found.name.removeprefix("./"))
                fault = None if found.isreg() and not found.sparse else "not a regular file"
                yield Entry(
                    name,
                    found.offset_data,
                    found.size,
                    found.size,
                    TAR,
                    0,
                    fault,
                    b"%d %d" % (found.size, int(found.mtime)),
                )
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        hint = content.hint(path, "a tar archive")
        raise UserError(f"{path}: not a whole tar archive: {error}{hint}") from error


def _check_end(path: Path, offset: int) -> None:
    """Raises: ValueError if the listing ended at `offset` without an end mark, a block of zeros."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        what = "damaged" if block else "cut short"
        raise UserError(f"{path}: the archive is {what} at byte {offset}: no file and no end mark")
