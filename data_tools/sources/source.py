"""What can be packed, and several of them as one.

| source | recognised by | module |
|---|---|---|
| a folder of identities | a directory | folders.py |
| zip and tar archives, alone or a directory of them | .zip, .tar | archives.py |
| a list of images | .lst | lst.py |
| a table of paths and labels | .csv, .tsv | table.py |
| labelled tars of WebDataset | a .cls or .json beside each image | webdataset.py |
| an LMDB database | its first bytes | lmdb_source.py |
| a data set of Hugging Face | .parquet | parquet.py |
| an InsightFace directory or a .rec, with or without .idx | .rec | insightface.py |
| shards packed before, cleaned or not | index.json | shards.py |
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_tools import shards
from data_tools.common import content, files
from data_tools.common.errors import UserError
from data_tools.recordio import RecordFile
from data_tools.sources.archives import ArchiveSource, is_archive, is_tar, refuse_packed
from data_tools.sources.folders import FolderSource, stamp
from data_tools.sources.labels import Fields
from data_tools.sources.lmdb_file import database_file
from data_tools.sources.lmdb_source import DatabaseSource
from data_tools.sources.lst import ListSource
from data_tools.sources.parquet import ParquetImages, ParquetSource, parquet_files, refuse_arrow
from data_tools.sources.table import TableSource, is_table
from data_tools.sources.webdataset import WebDatasetSource, is_labelled

Join = Literal["offset", "name"]


class Images(Protocol):
    """n encoded images; travels to other processes by pickle."""

    def __len__(self) -> int: ...
    def name(self, i: int) -> bytes: ...
    def where(self, i: int) -> str: ...
    def select(self, indices: np.ndarray) -> "Images": ...
    def read(self, i: int) -> bytes:
        """The encoded bytes. Raises: ValueError if this image is at fault, OSError if a disk is."""


class Source(Images, Protocol):
    """N images of known identities."""

    kind: str  # "folder" | "archives" | "lst" | "joined" | the format of records
    path: Path
    identities: list[str]  # names, in the order of their numbers
    labels: np.ndarray  # int64 [N] number of the identity of each image
    skipped: list[tuple[str, str]]  # (where, why) of what has no identity
    ignored: int  # files that are no images, hidden ones among them
    left_out: dict[str, int]  # files left out because of their extension: count per extension
    notes: list[str]  # messages for the user about input that was reinterpreted
    sha256: str  # of the listing: names, sizes and times of change
    bins: list[Path]  # verification sets that lie beside the images


def open_source(
    path: str | Path,
    nested: bool = False,
    root: Path | None = None,
    relabel: Path | None = None,
    level: int = 0,
    walk: bool = False,
    fields: Fields | None = None,
    labels: Path | None = None,
) -> Source:
    """The source at `path`, recognised by its content.

    nested: in folders, look for identities at any depth. level: in folders, the first `level` parts
    of an image's path name its identity. root: where the paths of a .lst start
    (default: the folder of the .lst). relabel: an index of cleaning to follow, of records only.
    walk: read an InsightFace .rec without its .idx. fields: the columns of tables and samples.
    labels: the list key<TAB>label of an LMDB database.

    Raises: FileNotFoundError if there is nothing; ValueError if it holds nothing to pack.
    """
    path = Path(path)
    refuse_packed(path)
    archives = [path] if is_archive(path) else []
    if files.is_dir(path) and not files.is_file(path / shards.INDEX):
        archives = sorted(entry for entry in path.iterdir() if is_archive(entry))
    records = path.suffix == ".rec" or (
        files.is_dir(path) and (files.is_file(path / shards.INDEX) or files.ending(path, ".rec"))
    )
    if relabel is not None and not records:
        raise UserError(
            f"--relabel {relabel}: {path} is not a data set of records, which an index is made for"
        )
    if not files.exists(path):
        raise FileNotFoundError(f"{path}: no such directory or file")
    if level and (records or archives or not files.is_dir(path)):
        raise UserError(f"--identity-level {level}: {path} is not a folder of folders")
    database = None if records or archives else database_file(path)
    if labels is not None and database is None:
        raise UserError(f"--labels {labels}: {path} is not an LMDB database, which they are for")
    if records:
        return RecordSource(path, relabel, walk)
    if database is not None:
        return DatabaseSource(path, database, labels)
    if tables := [] if archives else parquet_files(path):
        return ParquetSource(path, tables, fields or Fields())
    refuse_arrow(path)
    if archives:
        return _open_archives(path, archives, fields or Fields())
    if path.suffix == ".lst":
        return ListSource(path, root)
    if is_table(path):
        return TableSource(path, root, fields)
    if files.is_dir(path):
        return FolderSource(path, nested, level)
    raise UserError(
        f"{path}: neither a directory nor a .rec, .lst, .csv, .parquet, .zip, .tar or "
        f"LMDB database{content.hint(path)}"
    )


def _open_archives(path: Path, archives: list[Path], fields: Fields) -> Source:
    """Archives of identity folders, or tars of labelled samples.

    Raises: UserError: they are of both kinds.
    """
    labelled = [is_tar(archive) and is_labelled(archive, fields) for archive in archives]
    if all(labelled):
        return WebDatasetSource(path, archives, fields)
    if any(labelled):
        one, other = archives[labelled.index(True)], archives[labelled.index(False)]
        raise UserError(
            f"{path}: {one.name} holds labelled samples, {other.name} does not: pack them "
            f"separately"
        )
    return ArchiveSource(path, archives)


class Records:
    """Images by record: the file and the byte where each starts."""

    def __init__(self, files: list[RecordFile], file_of: np.ndarray, offsets: np.ndarray) -> None:
        self._files = files
        self._file_of = file_of  # [n] position in files
        self._offsets = offsets  # int64 [n]

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, i: int) -> bytes:
        return os.fsencode(self.where(i))

    def where(self, i: int) -> str:
        return self._files[self._file_of[i]].where(int(self._offsets[i]))

    def read(self, i: int) -> bytes:
        return self._files[self._file_of[i]].read_image(int(self._offsets[i]))[1]

    def select(self, indices: np.ndarray) -> "Records":
        return Records(self._files, self._file_of[indices], self._offsets[indices])


class RecordSource(Records):
    """Records of InsightFace, or shards that exist; its identities may be without images."""

    def __init__(self, path: Path, relabel: Path | None = None, walk: bool = False) -> None:
        data = shards.open(path, relabel, walk, tolerant=True)
        counts = np.diff(data.starts)
        file_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        super().__init__(data.files, file_of, data.offsets)
        self.path = path
        self.kind: str = data.index["format"]
        self.labels = data.labels
        self.identities = data.identities
        self.skipped = [(where, "the record cannot be read") for where in data.damaged]
        self.ignored = 0
        self.left_out: dict[str, int] = {}
        self.notes = [note] if (note := data.unlisted_note()) else []
        self.bins = data.bin_paths()
        digest = hashlib.sha256()
        with os.scandir(data.path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_file():
                    digest.update(os.fsencode(entry.name) + b"\0" + stamp(entry) + b"\n")
        if relabel is not None:
            digest.update(files.read_bytes(relabel))
        self.sha256 = digest.hexdigest()


class Joined:
    """Images of several sources as one sequence."""

    def __init__(self, parts: list[Images], part_of: np.ndarray, index: np.ndarray) -> None:
        self._parts = parts
        self._part_of = part_of  # [n] position in parts
        self._index = index  # int64 [n] position in that part

    def __len__(self) -> int:
        return len(self._index)

    def name(self, i: int) -> bytes:
        return self._parts[self._part_of[i]].name(int(self._index[i]))

    def where(self, i: int) -> str:
        return self._parts[self._part_of[i]].where(int(self._index[i]))

    def read(self, i: int) -> bytes:
        return self._parts[self._part_of[i]].read(int(self._index[i]))

    def stage(self, directory: Path, indices: np.ndarray) -> None:
        """As ParquetImages.stage, of those parts that have to."""
        for p, part in enumerate(self._parts):
            if isinstance(part, ParquetImages | Joined):
                mine = indices[self._part_of[indices] == p]
                directory.mkdir(exist_ok=True)
                part.stage(directory / str(p), self._index[mine])

    def select(self, indices: np.ndarray) -> "Joined":
        part_of, old = self._part_of[indices], self._index[indices]
        index = np.empty(len(indices), np.int64)
        parts = []
        for p, part in enumerate(self._parts):
            mine = np.flatnonzero(part_of == p)
            parts.append(part.select(old[mine]))
            index[mine] = np.arange(len(mine))
        return Joined(parts, part_of, index)


class JoinedSource(Joined):
    """Several sources as one set.

    join="offset": no person of one is in another; labels are offset, and the names get the name of
    the source before them. join="name": the same name is the same person (as of the ten .rec files
    of one im2rec run); identities count in order of first appearance.

    Raises: ValueError if two sources have the same name under "offset".
    """

    kind = "joined"

    def __init__(self, sources: list[Source], join: Join = "offset") -> None:
        sizes = [len(source) for source in sources]
        super().__init__(
            list(sources),
            np.repeat(np.arange(len(sources), dtype=np.int16), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
        )
        self.path = sources[0].path.parent
        self.skipped = [fault for source in sources for fault in source.skipped]
        self.ignored = sum(source.ignored for source in sources)
        self.left_out = dict(sum((Counter(source.left_out) for source in sources), Counter()))
        self.notes = [note for source in sources for note in source.notes]
        self.bins = _distinct_bins(sources)
        digest = hashlib.sha256(join.encode())
        number_of: dict[str, int] = {}
        labels = []
        stems = [source.path.name for source in sources]
        if join == "offset" and len(set(stems)) < len(stems):
            raise UserError(
                f"two of the sources {', '.join(stems)} have the same name, so their identity "
                f"names would clash: rename one, or give --join name if one name means one person"
            )
        for source, stem in zip(sources, stems, strict=True):
            digest.update(source.sha256.encode())
            names = source.identities
            if join == "offset":
                names = [f"{stem}/{name}" for name in names]
            numbers = [number_of.setdefault(name, len(number_of)) for name in names]
            labels.append(np.array(numbers, np.int64)[source.labels])
        self.identities = list(number_of)
        self.labels = np.concatenate(labels)
        self.sha256 = digest.hexdigest()


def _distinct_bins(sources: list[Source]) -> list[Path]:
    """The verification sets of all; of one name and content, once."""
    found: dict[str, Path] = {}
    for path in (path for source in sources for path in source.bins):
        other = found.setdefault(path.name, path)
        if other != path and files.read_bytes(other) != files.read_bytes(path):
            raise UserError(
                f"{other} and {path} differ, but a set can hold one file of a name: move one away"
            )
    return list(found.values())
