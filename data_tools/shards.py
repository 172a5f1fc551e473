"""A data set: a directory of `.rec` / `.idx` shards described by `index.json`.

    train-00000-of-00008.rec .idx   images in shuffled order; keys 0 .. n-1 in each shard
    index.json                      counts, classes, image size, sha256 of files, source, options
    labels.npy    int64 [N]         the class of each image, exact where the record's float32 is not
    offsets.npy   int64 [N]         where each record starts in its shard: opening parses no text
    identities.txt                  line c is the name of class c
    <name>.bin                      verification pairs
    relabel.txt                     what cleaning decided, if anything (relabel.py)

`open` reads InsightFace directories (`train.rec`, `train.idx`, `property`) in the same way. With a
relabel index the images it drops are not there, and the classes are those it leaves.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools import insightface
from data_tools import relabel as relabelling
from data_tools.common import arrays, files
from data_tools.common.errors import UserError
from data_tools.common.text import read_json
from data_tools.recordio import Header, RecordFile

FORMAT = "arcline-shards"
VERSION = 1
INDEX = "index.json"


class ClassCounts(NamedTuple):
    """What a user should know about a set before training on it."""

    images: int
    classes: int
    empty: int  # classes without an image
    single: int  # classes of one image
    unlisted: int  # records of an InsightFace .rec that its .idx does not list


class Shards:
    """A sequence of N images as (class, encoded bytes).

    The shards are mapped: reads are safe in threads and over fork, and it is pickled by its path.
    """

    def __init__(
        self,
        path: Path,
        index: dict[str, Any],
        record_files: list[RecordFile],
        offsets: np.ndarray,  # int64 [N] byte of each record in its file
        labels: np.ndarray | None,  # int64 [N]; None: only the records have them
        cleaned: "Cleaned | None" = None,
    ) -> None:
        self.path = path
        self._opened = path if index["format"] == FORMAT else record_files[0].path
        self.index = index
        self.files = record_files
        self.offsets = offsets
        # Shard s holds the images starts[s] .. starts[s + 1] - 1.
        self.starts = [0, *itertools.accumulate(shard["images"] for shard in index["shards"])]
        self.num_images: int = index["images"]
        self.num_classes: int = index["classes"]
        size = index["image_size"]
        self.image_size: tuple[int, int] | None = (size[0], size[1]) if size else None  # (h, w)
        self._labels = labels
        self.cleaned = cleaned
        self.ways = (False, False)  # walk and tolerant, as of open()
        self.unlisted = 0  # records of an InsightFace .rec that its .idx does not list
        self.damaged: list[str] = []  # places of records that cannot be read and are left out

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (self._opened, self.cleaned.place if self.cleaned else None, *self.ways)

    def __len__(self) -> int:
        return self.num_images

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of every image, int64 [N]; of an InsightFace directory: from its headers."""
        if self._labels is not None:
            return self._labels
        return insightface.class_labels(self.files[0], self.offsets, self.num_classes)

    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The images ordered by class [N]; those of class c are order[ends[c] : ends[c + 1]]."""
        order = np.argsort(self.labels, kind="stable")
        return order, np.searchsorted(self.labels[order], np.arange(self.num_classes + 1))

    def class_counts(self) -> ClassCounts:
        """How many classes have no image and how many have one; reads labels only."""
        sizes = np.bincount(self.labels, minlength=self.num_classes)
        return ClassCounts(
            self.num_images,
            self.num_classes,
            int((sizes == 0).sum()),
            int((sizes == 1).sum()),
            self.unlisted,
        )

    def unlisted_note(self) -> str:
        """A note on the records that the .idx does not list; "" if it lists all."""
        if not self.unlisted:
            return ""
        idx = self.files[0].path.with_suffix(".idx")
        return (
            f"{idx} does not list {self.unlisted} of the records, which are left out: --walk "
            f"reads the .rec without its .idx, and so does training if you move the .idx away"
        )

    @functools.cached_property
    def identities(self) -> list[str]:
        """The name of every class; in an InsightFace directory its number."""
        if "identities" not in self.index:
            names = [str(c) for c in range(self.num_classes)] if not self.cleaned else []
        else:
            text = files.read_bytes(self.path / self.index["identities"]["file"])
            names = [os.fsdecode(line) for line in text.split(b"\n")[:-1]]
        if self.cleaned is None:
            return names
        # A class of a number that the set does not have was split off by cleaning.
        return [names[c] if c < len(names) else str(c) for c in self.cleaned.classes.tolist()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that tell data sets apart; cleaning leaves them as they are."""
        return self.sha256[:12]

    @functools.cached_property
    def sha256(self) -> str:
        """Of what is trained on: see content_sha256(); of a set that an older version packed, of
        its index.json; of InsightFace's, of labels and offsets."""
        if self.index["format"] == FORMAT and "content" in self.index:
            return str(self.index["content"])
        if self.index["format"] == FORMAT:
            content = files.read_bytes(self.path / INDEX)
        else:
            uncleaned = self if self.cleaned is None else open(self._opened, NO_RELABEL, *self.ways)
            content = uncleaned.labels.tobytes() + uncleaned.offsets.tobytes()
        return hashlib.sha256(content).hexdigest()

    def _position(self, i: int) -> int:
        """i, counted from the start. Raises: IndexError."""
        if not -self.num_images <= i < self.num_images:
            raise IndexError(f"{self.path}: image {i} of {self.num_images}")
        return int(i) + self.num_images if i < 0 else int(i)

    def locate(self, i: int) -> tuple[int, int]:
        """Shard number and byte offset of image i. Raises: IndexError."""
        i = self._position(i)
        return bisect.bisect_right(self.starts, i) - 1, int(self.offsets[i])

    def where(self, i: int) -> str:
        """File and byte of image i, for messages."""
        shard, offset = self.locate(i)
        return self.files[shard].where(offset)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        shard, offset = self.locate(i)
        file = self.files[shard]
        header, encoded = file.read_image(offset)
        if self._labels is None:
            return insightface.class_label(header, self.num_classes, file.where(offset)), encoded
        image = self._position(i)
        label = int(self._labels[image])
        if self.cleaned is None:
            key, stated = image - self.starts[shard], label
        else:
            key, stated = int(self.cleaned.keys[image]), int(self.cleaned.record_labels[image])
        if self.index["format"] != FORMAT:
            return label, encoded
        if fault := record_fault(header, key, stated):
            raise UserError(
                f"{file.where(offset)}: image {image}: {fault}; labels.npy, offsets.npy or the "
                f".rec is not what was packed: run `python -m data_tools verify {self.path}`"
            )
        return label, encoded

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return (self[i] for i in range(self.num_images))

    def bin_path(self, name: str) -> Path:
        """The verification set `<name>.bin`. Raises: FileNotFoundError listing those there are."""
        path = self.path / f"{name.removesuffix('.bin')}.bin"
        if not files.is_file(path):
            there = ", ".join(bin.stem for bin in self.bin_paths()) or "none"
            raise FileNotFoundError(f"{path}: no such verification set; there are: {there}")
        return path

    def bin_paths(self) -> list[Path]:
        return files.ending(self.path, ".bin")


def record_fault(header: Header, key: int, label: int) -> str | None:
    """What in a packed record contradicts the columns; None if its class and key are right."""
    if header.flag or (header.label != label and header.label != np.float32(label)):
        return f"the record's label is {header.label}, but labels.npy says {label}"
    if header.id != key:
        return f"the record's id is {header.id}, not its key {key}"
    return None


def check_labels(data: Any) -> None:
    """Raises: UserError for a label of Shards or a Union that no class has."""
    wrong = np.flatnonzero((data.labels < 0) | (data.labels >= data.num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{data.path}: the label {data.labels[first]} of image {first} is outside [0, "
            f"{data.num_classes}) ({len(wrong)} such images): correct num_classes or pack again"
        )


class Cleaned(NamedTuple):
    """What is left of a set under a relabel index: M images, C classes."""

    place: Path  # of the index
    images: np.ndarray  # int64 [M] number of each image before
    classes: np.ndarray  # int64 [C] number of each class before
    keys: np.ndarray  # int64 [M] key of each image in its shard
    record_labels: np.ndarray  # int64 [M] the label in its record


NO_RELABEL = Path(os.devnull)  # as `relabel`: the set as it was before any cleaning


def open(
    path: str | Path, relabel: Path | None = None, walk: bool = False, tolerant: bool = False
) -> Shards:
    """The data set in a directory: shards with their index.json, or InsightFace's (or a .rec).

    relabel: the index to follow; default: relabel.txt beside the shards, if there is one.
    walk: read the records of an InsightFace .rec without its .idx. tolerant: leave out those of its
        records that cannot be read; `damaged` names them.

    Raises: FileNotFoundError if there is neither; ValueError naming the file that is damaged,
    missing or disagrees with index.json.
    """
    path = Path(path)
    data = _open(path, walk, tolerant)
    place = data.path / relabelling.NAME if relabel is None else relabel
    if place == NO_RELABEL or (relabel is None and not files.is_file(place)):
        return data
    return _cleaned(data, place)


def _open(path: Path, walk: bool, tolerant: bool) -> Shards:
    if path.suffix == ".rec" and files.is_file(path):
        return _open_insightface(path.parent, path, walk, tolerant)
    insightface.check_directory(path)
    if files.is_file(path / INDEX):
        return _open_packed(path)
    rec = insightface.find_rec(path)
    if rec is None and (several := [file.name for file in files.ending(path, ".rec")]):
        raise FileNotFoundError(
            f"{path}: {len(several)} .rec files, none of them train.rec: name those you want "
            f"({path / several[0]} ...); `pack --join name` joins the parts of one run to one set"
        )
    if rec is None:
        raise FileNotFoundError(
            f"{path}: no data set: neither {INDEX} nor train.rec; if it is a folder of identities, "
            f"make one with `python -m data_tools pack {path} OUT`"
        )
    return _open_insightface(path, rec, walk, tolerant)


def _cleaned(data: Shards, place: Path) -> Shards:
    relabel = relabelling.read(place)
    relabelling.check(relabel, place, data.fingerprint, data.num_images, data.num_classes)
    kept, labels, classes = relabelling.dense(relabelling.apply(relabel, data.labels))
    shard_of = np.searchsorted(data.starts, kept, side="right") - 1
    counts = np.bincount(shard_of, minlength=len(data.files)).tolist()
    index = {
        **data.index,
        "images": len(kept),
        "classes": len(classes),
        "shards": [
            {**shard, "images": n} for shard, n in zip(data.index["shards"], counts, strict=True)
        ],
    }
    keys = kept - np.array(data.starts)[shard_of]
    cleaned = Cleaned(place, kept, classes, keys, data.labels[kept])
    left = Shards(data.path, index, data.files, data.offsets[kept], labels, cleaned)
    left.ways, left.unlisted, left.damaged = data.ways, data.unlisted, data.damaged
    return left


def content_sha256(index: dict[str, Any]) -> str:
    """The SHA-256 of the images, labels and offsets that an index.json lists.

    It does not depend on the source, its path and the names of the people, so the same images
    packed from a folder, a database or a table are the same set.
    """
    shards = [[shard["images"], shard["sha256"]["rec"]] for shard in index["shards"]]
    columns = [index[key]["sha256"] for key in ("labels", "offsets")]
    content = [index["images"], index["classes"], index["image_size"], shards, columns]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_index(path: Path) -> dict[str, Any]:
    """The checked index.json of a directory. Raises: ValueError naming the file and the fault."""
    place = path / INDEX
    index = read_json(place)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{place}: not the index of a data set: its format is not {FORMAT!r}")
    if index.get("version") != VERSION:
        raise UserError(
            f"{place}: format version {index.get('version')}; this program reads version {VERSION}"
        )
    try:
        shards = [(shard["name"], shard["images"], shard["bytes"]) for shard in index["shards"]]
        known = all(isinstance(index[key], int) and index[key] > 0 for key in ("images", "classes"))
        known &= all(isinstance(n, int) and isinstance(b, int) for _, n, b in shards)
        known &= all(len(Path(name).parts) == 1 for name, _, _ in shards)
        known &= sum(n for _, n, _ in shards) == index["images"]
        known &= index["image_size"] is None or len(index["image_size"]) == 2
        known &= all(len(Path(index[k]["file"]).parts) == 1 for k in ("labels", "offsets"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{place}: {error} is missing or has the wrong type") from error
    if not known:
        raise UserError(f"{place}: its counts or names contradict each other; pack again")
    return index


def _open_packed(path: Path) -> Shards:
    index = read_index(path)
    record_files = []
    for shard in index["shards"]:
        rec = path / f"{shard['name']}.rec"
        if not files.is_file(rec):
            raise FileNotFoundError(f"{rec}: missing, though {INDEX} lists it")
        record_files.append(RecordFile(rec))
        if record_files[-1].size != shard["bytes"]:
            raise UserError(
                f"{rec}: {record_files[-1].size} bytes, but {INDEX} says {shard['bytes']}: the "
                f"copy is incomplete, or the file was changed"
            )
    offsets, labels = (
        load_column(path / index[column]["file"], index["images"])
        for column in ("offsets", "labels")
    )
    return Shards(path, index, record_files, offsets, labels)


def load_column(path: Path, count: int) -> np.ndarray:
    """A mapped int64 [count] of a .npy file."""
    column = arrays.load_npy(path, mmap=True)
    if column.dtype != np.int64 or column.shape != (count,):
        raise UserError(
            f"{path}: {column.dtype} {list(column.shape)}, but {INDEX} needs int64 [{count}]"
        )
    return column.view(np.ndarray)


def _open_insightface(path: Path, rec: Path, walk: bool, tolerant: bool) -> Shards:
    records = insightface.open_directory(path, rec, walk, tolerant)
    if records.property:
        classes, size = records.property[0], list(records.property[1:])
    else:
        labels = insightface.class_labels(records.file, records.offsets)
        classes, size = int(labels.max()) + 1, None
    index = {
        "format": f"insightface-{records.layout}",
        "images": len(records.offsets),
        "classes": classes,
        "image_size": size,
        "shards": [{"name": rec.stem, "images": len(records.offsets), "bytes": records.file.size}],
    }
    data = Shards(path, index, [records.file], records.offsets, None)
    data.ways = walk, tolerant
    data.unlisted = records.unlisted
    data.damaged = [records.file.where(offset) for offset in records.damaged]
    return data
