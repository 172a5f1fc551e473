"""Labelled tars of WebDataset as a source, read in place.

A sample is a run of members whose names are equal up to the first dot of the base name: `0001.jpg`
and `0001.cls`. The label is the number in `.cls`, or that of the key `label` in `.json`; another
member or key is named by --label-column, and the image of several by --image-column (`face.jpg`).
A sample without an image is counted and left out; one without a label is skipped and listed. A
directory of such tars is one source. Order: classes by their numbers, images as they stand.
"""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.images.image_file import SUFFIXES, is_hidden
from data_tools.images.image_table import Names, repeated
from data_tools.sources.archives import TAR, ArchiveImages, Entry, tar_entries
from data_tools.sources.labels import Fields, Listing, by_class, class_number, numbered

_LOOKED_AT = 64  # members that tell whether a tar is of labelled samples
_LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json
_CLS, _JSON = "cls", "json"
_COLUMNS = {"archive": "H", "at": "q", "size": "q"}


def is_labelled(path: Path, fields: Fields) -> bool:
    """Whether a tar is of samples with a label. Raises: UserError: it is no whole tar."""
    with open(path, "rb") as file:
        for number, sample in enumerate(_samples(path)):
            if _images_of(sample, fields) and _label_of(file.fileno(), sample, fields) is not None:
                return True
            if number >= _LOOKED_AT:
                break
    return False


class WebDatasetSource(Listing, ArchiveImages):
    """See the top of the file. Raises: UserError for a damaged tar, a bad label, or no image."""

    kind = "webdataset"

    def __init__(self, path: Path, tars: list[Path], fields: Fields) -> None:
        Listing.__init__(self, path)
        self._fields = fields
        self._digest = hashlib.sha256(f"{fields.image}\0{fields.label}\n".encode())
        self._found = {key: array(kind) for key, kind in _COLUMNS.items()}
        self._numbers = array("q")
        self._others: Counter[str] = Counter()  # members without a use, by ending
        ArchiveImages.__init__(self, tars, Names.of(self._list(tars)), {})
        self.left_out = dict(self._others)
        self.ignored += self._others.total()
        columns: dict[str, np.ndarray] = {
            key: np.frombuffer(column, column.typecode) for key, column in self._found.items()
        }
        columns["packed"] = columns["size"]
        columns["method"] = np.full(len(self), TAR, np.uint16)
        columns["crc"] = np.zeros(len(self), np.uint8)
        labels = np.frombuffer(self._numbers, np.int64)
        self.sha256 = self._digest.hexdigest()
        del self._found, self._numbers, self._digest, self._others
        self._columns = columns
        again = [
            i for i, j in repeated(self.names) if columns["archive"][i] == columns["archive"][j]
        ]
        self.skipped += [(self.where(i), "appears twice: the last one counts") for i in again]
        keep = np.setdiff1d(np.arange(len(self)), again)
        if not len(keep):
            raise UserError(
                f"{path}: no sample with an image and a label; {len(self.skipped)} were skipped"
            )
        order = by_class(labels[keep])
        if order is not None or again:
            keep = keep if order is None else keep[order]
            kept = self.select(keep)
            self.names, self._columns, labels = kept.names, kept._columns, labels[keep]
        values, self.labels = numbered(labels)
        self.identities = [str(value) for value in values.tolist()]

    def _list(self, tars: list[Path]) -> Iterator[bytes]:
        """The name of each image, its columns and label joined to the others on the way."""
        for number, path in enumerate(tars):
            self._digest.update(os.fsencode(path.name) + b"\n")
            with open(path, "rb") as file:
                for sample in _samples(path):
                    image = self._chosen(path, sample)
                    if image is None:
                        continue
                    where = f"{path.name}: {os.fsdecode(image.name)}"
                    if image.fault:
                        self.skipped.append((where, image.fault))
                        continue
                    label = _label_of(file.fileno(), sample, self._fields)
                    if label is None:
                        self.skipped.append((where, self._missing()))
                        continue
                    try:
                        value = class_number(label)
                    except UserError as error:
                        raise UserError(
                            f"{path}: the label of {os.fsdecode(image.name)}: {error}"
                        ) from error
                    self._digest.update(image.name + b"\0" + image.stamp + b" %d\n" % value)
                    row = (number, image.at, image.size)
                    for column, entry in zip(self._found.values(), row, strict=True):
                        column.append(entry)
                    self._numbers.append(value)
                    yield image.name

    def _chosen(self, path: Path, sample: dict[str, Entry]) -> Entry | None:
        """The image of a sample; its other members are counted.

        Raises: UserError: it has several, and nothing says which.
        """
        images = _images_of(sample, self._fields)
        if len(images) > 1:
            raise UserError(
                f"{path}: the sample of {os.fsdecode(images[0].name)} has {len(images)} images: "
                f"name the ending of one by --image-column (such as {_ending(images[0].name)})"
            )
        for ending in sample.keys() - {_CLS, _JSON}:
            if not images or sample[ending] is not images[0]:
                self._others[f".{ending}"] += 1
        return images[0] if images else None

    def _missing(self) -> str:
        if self._fields.label:
            return f"no label {self._fields.label} in its sample"
        return "no label: neither a .cls nor a .json with the key label is in its sample"


def _ending(name: bytes) -> str:
    return os.fsdecode(name.rpartition(b"/")[2].partition(b".")[2])


def _samples(path: Path) -> Iterator[dict[str, Entry]]:
    """The samples of a tar: their members by ending in lower case. Hidden files are left out."""
    sample: dict[str, Entry] = {}
    key = None
    for entry in tar_entries(path):
        folder, slash, base = entry.name.rpartition(b"/")
        stem, _, ending = os.fsdecode(base).partition(".")
        if is_hidden(os.fsdecode(base)) or entry.name.startswith(b"__MACOSX/"):
            continue
        ending = ending.lower()
        own = folder + slash + os.fsencode(stem)
        if key is not None and (own != key or ending in sample):
            yield sample
            sample = {}
        key = own
        sample[ending] = entry
    if sample:
        yield sample


def _images_of(sample: dict[str, Entry], fields: Fields) -> list[Entry]:
    if fields.image:
        wanted = fields.image.lower().removeprefix(".")
        return [sample[wanted]] if wanted in sample else []
    return [entry for ending, entry in sample.items() if f".{ending}".endswith(SUFFIXES)]


def _label_of(descriptor: int, sample: dict[str, Entry], fields: Fields) -> Any:
    """The label as the sample states it, None if it states none."""
    member = sample.get(fields.label or _CLS)
    if member is not None and (fields.label or _CLS) != _JSON:
        return _content(descriptor, member).decode("utf-8", "replace").strip()
    member = sample.get(_JSON)
    if member is None:
        return None
    try:
        values = json.loads(_content(descriptor, member))
    except (ValueError, RecursionError):
        return None
    return values.get(fields.label or "label") if isinstance(values, dict) else None


def _content(descriptor: int, entry: Entry) -> bytes:
    with files.naming(os.fsdecode(entry.name)):
        return os.pread(descriptor, min(entry.size, _LONGEST_LABEL), entry.at)
