"""An LMDB database of images as a source, read in place.

| values | labels |
|---|---|
| encoded images | a list `key<TAB>label`, given or beside the database; else the keys' folders |
| msgpack of [image, label] or [image, ..., label], as Vec2Face publishes HSFace | the values' own |
| a pickle of (image, label), which is read without being executed | the values' own |

The list lies beside NAME.lmdb as NAME.tsv or NAME.txt, in a directory as labels.tsv or labels.txt.
Keys `identity/name` are folders and files: parents that all share are left out, as in archives.
Keys that start with __ are notes of the writer. Order: classes in order, images by their keys, as
numbers where all keys are. 10^7 entries take some 100 bytes each, no object.
"""

import hashlib
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools import unpickle
from data_tools.common import files, text
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.images.image_file import HEAD, kind_of
from data_tools.images.image_table import Names, number_by_name, repeated
from data_tools.sources.archives import MAX_IMAGE, stripped
from data_tools.sources.labels import Listing, by_class, class_number, numbered
from data_tools.sources.lmdb_file import HEADER, Database, Value, read_value
from data_tools.sources.msgpack import labelled_image

_LISTS = (".tsv", ".txt")
_NOTE = b"__"  # keys of a writer's own notes: __len__, __keys__, __classnum__
_LOOKED_AT = 16  # values that tell of what kind they are
_LONGEST = 18  # digits of a key that is sorted as a number
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


class DatabaseImages:
    """Images by their place in the file of a database."""

    def __init__(
        self,
        file: Path,
        page_size: int,
        pickled: bool,
        names: Names,
        at: np.ndarray,
        sizes: np.ndarray,
    ) -> None:
        self._file, self._page_size, self._pickled = file, page_size, pickled
        self.names = names
        self._at, self._sizes = at, sizes  # int64 [n]; int32 [n]
        self._descriptor: int | None = None  # of this process

    def __getstate__(self) -> tuple:
        return self._file, self._page_size, self._pickled, self.names, self._at, self._sizes

    def __setstate__(self, state: tuple) -> None:
        DatabaseImages.__init__(self, *state)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> bytes:
        return self.names[i]

    def where(self, i: int) -> str:
        return f"{self._file.name}: {os.fsdecode(self.names[i])}"

    def read(self, i: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self._file, os.O_RDONLY)
        try:
            with files.naming(self._file):
                data = read_value(
                    self._descriptor, int(self._at[i]), int(self._sizes[i]), self._page_size
                )
        except ValueError as error:
            raise UserError(f"{self.where(i)}: {error}") from error
        return _unpickled(data, self.where(i))[0] if self._pickled else data

    def select(self, indices: np.ndarray) -> "DatabaseImages":
        return DatabaseImages(
            self._file,
            self._page_size,
            self._pickled,
            self.names.select(indices),
            self._at[indices],
            self._sizes[indices],
        )


class DatabaseSource(Listing, DatabaseImages):
    """See the top of the file. Raises: UserError: damaged, no labels, or nothing to pack."""

    kind = "lmdb"

    def __init__(self, path: Path, file: Path, labels: Path | None = None) -> None:
        Listing.__init__(self, path)
        self._digest = hashlib.sha256()
        found = os.stat(file)
        self._digest.update(b"%d %d\n" % (found.st_size, found.st_mtime_ns))
        self._places, self._lengths, self._own = array("q"), array("i"), array("q")
        with Database(file) as database:
            self._read = _reader(database)
            names = Names.of(self._entries(database))
            page_size = database.page_size
            self.skipped += database.lost
            if missing := self._missing(database):
                self.notes.append(missing)
        self.sha256 = self._digest.hexdigest()
        DatabaseImages.__init__(
            self,
            file,
            page_size,
            self._read is _from_pickle,
            names,
            np.frombuffer(self._places, np.int64),
            np.frombuffer(self._lengths, np.int32),
        )
        own = np.frombuffer(self._own, np.int64)
        plain = self._read is _from_image
        del self._places, self._lengths, self._own, self._digest
        if not len(self):
            raise UserError(f"{path}: no image in it{_first(self.skipped)}")
        labels = labels or (_list_beside(path, file) if plain else None)
        if labels is not None:
            own = self._listed(labels)
            self.sha256 += f" {files.sha256(labels)}"
        keep, self.labels = self._by_key() if plain and labels is None else self._by_number(own)
        if keep is not None:
            kept = self.select(keep)
            self.names, self._at, self._sizes = kept.names, kept._at, kept._sizes

    def __getstate__(self) -> tuple:
        return DatabaseImages.__getstate__(self)

    def _entries(self, database: Database) -> Any:
        """The key of each image, its place and label joined to the columns on the way."""
        for value in database.values():
            if value.key.startswith(_NOTE):
                continue
            try:
                place, size, label = self._read(database, value)
            except UserError as error:
                where = f"{database.path.name}: {os.fsdecode(value.key)}"
                self.skipped.append((where, str(error).removeprefix(f"{where}: ")))
                continue
            try:
                own = -1 if label is None else class_number(label)
            except UserError as error:
                key = os.fsdecode(value.key)
                raise UserError(f"{database.path}: the label of {key}: {error}") from error
            self._digest.update(b"%d %d %d\n" % (value.at, value.size, own))
            self._places.append(place)
            self._lengths.append(size)
            self._own.append(own)
            yield value.key

    def _missing(self, database: Database) -> str:
        """What to say of entries that damaged pages held."""
        if not database.lost:
            return ""
        return (
            f"{database.path}: {count(len(database.lost), 'page')} of it cannot be read, and the "
            f"entries in them are lost; the database states {database.entries}"
        )

    def _listed(self, path: Path) -> np.ndarray:
        """The label of each image by a list, int64 [N], -1 where it has none."""
        listed = array("q")

        def keys() -> Any:
            for line, row in text.numbered_lines(path, errors="surrogateescape"):
                key, tab, label = row.rpartition("\t")
                try:
                    if not tab:
                        raise UserError(f"{row[:80]!r} is not key<TAB>label")
                    listed.append(class_number(label.strip()))
                except UserError as error:
                    raise UserError(f"{path}: line {line}: {error}") from error
                yield os.fsencode(key)

        names = Names.of(keys())
        values = np.frombuffer(listed, np.int64)
        again = {j: i for i, j in repeated(names)}
        for j, i in again.items():
            what = (
                f" with label {values[j]} instead of {values[i]}" if values[i] != values[j] else ""
            )
            self.skipped.append(
                (f"{path.name}: {os.fsdecode(names[j])}", f"listed again{what}: the first counts")
            )
        first = np.setdiff1d(np.arange(len(names)), list(again))
        hashes = names.hashes()[first]
        order = np.argsort(hashes)
        hashes, values = hashes[order], values[first][order]
        mine = self.names.hashes()
        at = np.minimum(np.searchsorted(hashes, mine), max(len(hashes) - 1, 0))
        labels = np.full(len(self), -1, np.int64)
        if len(hashes):
            there = hashes[at] == mine
            labels[there] = values[at[there]]
        if (labels < 0).all():
            raise UserError(
                f"{path}: lists none of the keys of {self.path}, whose first is "
                f"{os.fsdecode(self.names[0])!r}"
            )
        absent = len(hashes) - int((labels >= 0).sum())
        if absent > 0:
            self.notes.append(f"{path}: {count(absent, 'key')} of it are not in the database")
        for i in np.flatnonzero(labels < 0).tolist():
            self.skipped.append((self.where(i), f"no label in {path.name}"))
        return labels

    def _by_number(self, labels: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Which images are kept, in which order; their classes, [n]."""
        order = self._in_order_of_keys()
        keep: np.ndarray | None = np.arange(len(labels)) if order is None else order
        if keep is not None and (labels < 0).any():
            keep = keep[labels[keep] >= 0]
        elif order is None and by_class(labels) is None:
            keep = None
        values, classes = numbered(labels if keep is None else labels[keep])
        self.identities = [str(value) for value in values.tolist()]
        if keep is not None and (grouped := by_class(classes)) is not None:
            keep, classes = keep[grouped], classes[grouped]
        return keep, classes

    def _by_key(self) -> tuple[np.ndarray | None, np.ndarray]:
        """As _by_number, of keys `identity/name`."""
        folders: dict[bytes, int] = {}
        labels = np.empty(len(self), np.int64)
        for i, name in enumerate(self.names):
            folder, slash, _base = name.rpartition(b"/")
            if not slash:
                raise UserError(
                    f"{self.path}: the key {os.fsdecode(name)!r} names no identity, as "
                    f"identity/name would: give --labels FILE with lines key<TAB>label"
                )
            if b"\n" in name or b"\r" in name:
                raise UserError(f"{self.path}: a line break in the key {name!r}")
            labels[i] = folders.setdefault(folder, len(folders))
        names, labels = number_by_name(list(folders), labels)
        self.identities = [os.fsdecode(name) for name in stripped(names)]
        order = by_class(labels)
        return order, labels if order is None else labels[order]

    def _in_order_of_keys(self) -> np.ndarray | None:
        """The order of the keys as numbers, None if they are none or in order."""
        if not all(name.isdigit() and len(name) <= _LONGEST for name in self.names):
            return None
        keys = np.fromiter((int(name) for name in self.names), np.int64, len(self))
        return by_class(keys)


def _list_beside(path: Path, file: Path) -> Path | None:
    stem = path / "labels" if path != file else path.with_suffix("")
    places = [stem.with_name(stem.name + suffix) for suffix in _LISTS]
    return next((place for place in places if files.is_file(place)), None)


_Reader = Callable[[Database, Value], tuple[int, int, Any]]  # to place, size and label


def _reader(database: Database) -> _Reader:
    """How the values are read, as the first ones say.

    Raises: UserError: they are of no kind that is known.
    """
    seen = b""
    values = (value for value in database.values() if not value.key.startswith(_NOTE))
    reader: _Reader | None = None
    for number, value in enumerate(values):
        head = os.pread(database.descriptor, min(value.size, HEAD), value.at)
        seen = seen or head
        if kind_of(head):
            reader = _from_image
        elif head.startswith(_PICKLES):
            reader = _from_pickle
        elif labelled_image(head) is not None:
            reader = _from_msgpack
        if reader is not None or number >= _LOOKED_AT:
            break
    database.rewind()
    if reader is None and seen:
        raise UserError(
            f"{database.path}: its values are neither images, nor msgpack or pickles of (image, "
            f"label): the first starts with {seen[:8]!r}"
        )
    return reader or _from_image


def _from_image(database: Database, value: Value) -> tuple[int, int, Any]:
    _check_size(value)
    return value.at, value.size, None


def _from_msgpack(database: Database, value: Value) -> tuple[int, int, Any]:
    if value.at % database.page_size == HEADER:
        read_value(database.descriptor, value.at, 0, database.page_size)

    def read(at: int, size: int) -> bytes:
        return os.pread(database.descriptor, min(size, max(value.size - at, 0)), value.at + at)

    found = labelled_image(read(0, HEAD), read)
    if found is None:
        raise UserError("not msgpack of (image, label): damaged, or cut short")
    at, size, label = found
    if at + size > value.size or size > MAX_IMAGE:
        raise UserError(f"an image of {size} bytes does not fit its value of {value.size}")
    return value.at + at, size, label


def _from_pickle(database: Database, value: Value) -> tuple[int, int, Any]:
    _check_size(value)
    data = read_value(database.descriptor, value.at, value.size, database.page_size)
    where = f"{database.path.name}: {os.fsdecode(value.key)}"
    return value.at, value.size, _unpickled(data, where)[1]


def _check_size(value: Value) -> None:
    if value.size > MAX_IMAGE:
        raise UserError(f"{value.size} bytes cannot be an image of a face")


def _unpickled(data: bytes, where: str) -> tuple[bytes, Any]:
    """Image and label of a pickled pair. Raises: UserError: it holds something else."""
    pair = unpickle.loads(data, where)
    if not isinstance(pair, tuple | list) or len(pair) < 2 or not isinstance(pair[0], bytes):
        raise UserError(f"{where}: the pickle is not of (image, label)")
    return pair[0], pair[-1]


def _first(skipped: list[tuple[str, str]]) -> str:
    return "".join(f"; {where}: {why}" for where, why in skipped[:1])
