"""An InsightFace data set directory, read in place: `train.rec`, `train.idx`, `property`.

Layout A (the classic one: MS1MV2, Glint360K) has a header record with key 0 and, after the images,
a record per identity; both have no pixels. The plain layouts (im2rec, shuffle_rec, SeqRecBuilder)
hold images only. Ranges in the header and the identity records are float32, exact to 2^24 only:
labels are therefore always taken from the images themselves. These too are float32: a label of 2^24
or more may be that of a neighbour, and is refused.

Without a .idx the keys are lost, but not the order: InsightFace's tools write the images, then the
header and the identities (face2rec2) or the identities and the header (RecBuilder).
"""

import bisect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.common import content, files
from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines
from data_tools.recordio import Header, IndexedReader, RecordFile, unpack_record

_PROPERTY = re.compile(r" *([0-9]{1,18}) *, *([0-9]{1,18}) *, *([0-9]{1,18}) *(?:,.*)?")
MAX_CLASSES = 2**24  # float32 has every integer below; 2^24 itself may stand for 2^24 + 1


class ImageRecords(NamedTuple):
    """The image records of a directory, n of them, in file order."""

    file: RecordFile
    idx_path: Path | None
    keys: np.ndarray  # int64 [n]
    offsets: np.ndarray  # int64 [n]
    layout: str  # "A" | "plain"
    num_identity_records: int  # 0 in the plain layouts
    property: tuple[int, int, int] | None  # classes, height, width
    unlisted: int  # records that the .idx does not list
    damaged: list[int]  # offsets of records that cannot be read, left out


def check_directory(path: Path) -> None:
    """Raises: FileNotFoundError if there is nothing; UserError for a file, which is no data set."""
    if not files.exists(path):
        raise FileNotFoundError(f"{path}: no such directory")
    if not files.is_dir(path):
        raise UserError(
            f"{path} is a file, not a data set: name the directory of the shards, or a .rec"
            f"{content.hint(path)}"
        )


def find_rec(directory: Path) -> Path | None:
    """`train.rec`, or the only .rec of the directory; None if there is none, or a choice."""
    found = files.ending(directory, ".rec")
    train = directory / "train.rec"
    return train if train in found else found[0] if len(found) == 1 else None


def open_directory(
    directory: Path, rec_path: Path, walk: bool = False, tolerant: bool = False
) -> ImageRecords:
    """The images of an InsightFace directory; without a .idx the .rec is walked.

    walk: as if there were no .idx. tolerant: leave out records that cannot be read, and list them.

    Raises: ValueError naming the file for a damaged .rec, .idx or `property`, or no image at all.
    """
    idx_path = rec_path.with_suffix(".idx")
    damaged: list[int] = []
    listed = not walk and files.exists(idx_path)
    reader = IndexedReader(idx_path if listed else None, rec_path, damaged if tolerant else None)
    keys, offsets = reader.keys, reader.offsets
    first_identity = _first_identity(reader)
    if first_identity is None and reader.idx_path is None and (images := _walked_images(reader)):
        first_identity = images + 1
        keys = keys + 1  # as the images' own were
    if first_identity is not None:
        image = (keys > 0) & (keys < first_identity)
        keys, offsets = keys[image], offsets[image]
    if tolerant and listed:
        readable = reader.file.ends(offsets) >= 0
        damaged += offsets[~readable].tolist()
        keys, offsets = keys[readable], offsets[readable]
    if len(keys) == 0:
        hint = content.hint(rec_path, "a RecordIO file")
        raise UserError(f"{rec_path}: no image record among its {len(reader)} records{hint}")
    return ImageRecords(
        reader.file,
        reader.idx_path,
        keys,
        offsets,
        "plain" if first_identity is None else "A",
        0 if first_identity is None else len(reader) - 1 - len(keys),
        read_property(directory / "property"),
        reader.file.unlisted(reader.offsets) if listed else 0,
        damaged,
    )


def read_property(path: Path) -> tuple[int, int, int] | None:
    """Classes, height, width of a `property` file, None where there is none.

    Raises: ValueError naming the file if they are no such numbers, or not 1 .. 2^24 classes.
    """
    if not files.exists(path):
        return None
    line = next((line.strip() for _, line in numbered_lines(path, errors="replace")), "")
    stated = _PROPERTY.fullmatch(line)
    if stated is None:
        raise UserError(f"{path}: {line[:60]!r} is not num_classes,height,width")
    classes, height, width = map(int, stated.groups())
    if not 1 <= classes <= MAX_CLASSES:
        raise UserError(
            f"{path}: {classes} classes; their number must be 1 .. {MAX_CLASSES}: the labels of "
            f"these records are float32, which cannot tell more classes apart"
        )
    return classes, height, width


def class_label(header: Header, num_classes: int | None, where: str) -> int:
    """The class of an image: the scalar label, or the first of [class, aligned].

    Raises: ValueError naming `where` if it is not an integer of [0, num_classes), or not exact.
    """
    label = np.ravel(header.label)[:1].astype(np.float32)
    return int(_checked(label, num_classes, lambda _: where)[0])


def class_labels(
    file: RecordFile, offsets: np.ndarray, num_classes: int | None = None
) -> np.ndarray:
    """The class of every image record at `offsets`, int64 [n]; reads headers only.

    Raises: ValueError naming file and byte of the first label outside [0, num_classes), or not
    exact.
    """
    _, labels = file.first_labels(offsets)
    return _checked(labels, num_classes, lambda i: file.where(int(offsets[i])))


def _checked(
    labels: np.ndarray, num_classes: int | None, where: Callable[[int], str]
) -> np.ndarray:
    """The labels float32 [n] as int64 [n]. Raises: UserError naming the place of a wrong one."""
    limit = MAX_CLASSES if num_classes is None else num_classes
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~((labels >= 0) & (labels < limit) & (labels == np.floor(labels))))
    if len(wrong):
        others = f" ({len(wrong)} such records)" if len(labels) > 1 else ""
        fault = _label_fault(labels[wrong[0]], num_classes)
        raise UserError(f"{where(int(wrong[0]))}: {fault}{others}")
    return labels.astype(np.int64)


def _label_fault(label: np.float32, num_classes: int | None) -> str:
    if num_classes is None and MAX_CLASSES <= label < 2**31:
        return (
            f"the label {label:.0f} is 2^24 or more, where a float32 no longer tells a class from "
            f"its neighbour: pack the images from their source instead"
        )
    limit = (
        "" if num_classes is None else f" below the {num_classes} classes that `property` states"
    )
    return f"the label {label} is not a class number from 0{limit}"


def _first_identity(reader: IndexedReader) -> int | None:
    """The key of the first identity record if there is a header (layout A), else None.

    A header has flag 2, no pixels, and a first label that is a key. InsightFace's rule, flag > 0
    alone, would take the first image of a set with two labels per image for one.
    """
    if 0 not in reader or not _no_pixels(reader, 0):
        return None
    stated = float(np.ravel(reader[0][0].label)[0])
    if not 0 < stated < 2.0**62 or int(stated) not in reader:
        return None
    # float32 rounds keys above 2^24 to a neighbour: look for the boundary itself around it.
    slack = int(np.spacing(np.float32(stated))) // 2
    around = range(int(stated) - slack, int(stated) + slack + 1)
    return next((key for key in around if key in reader and _no_pixels(reader, key)), None)


def _walked_images(reader: IndexedReader) -> int:
    """The number of images of a layout A file without .idx; 0 if it is another layout.

    The images come first, with keys from 1; the records without pixels follow. The header is the
    first or the last of these: [key of the first of the others, key after the last], in float32.
    """
    last = len(reader) - 1
    if last < 1 or not _no_pixels(reader, last):
        return 0
    images = bisect.bisect_left(range(last), True, key=lambda i: _no_pixels(reader, i))
    for header in (images, last):
        start, stop = np.ravel(reader[header][0].label).astype(np.float64)
        slack = 2 * float(np.spacing(np.float32(abs(stop))))
        counts_them = abs(stop - start - (last - images)) < max(1.0, slack)
        if counts_them and start > images - slack:
            return images
    return 0


def _no_pixels(reader: IndexedReader, key: int) -> bool:
    record = reader.raw(key)
    if len(record) < 24:
        return False  # the reader of the images will name it
    header, image = unpack_record(record, f"{reader.file.path}, key {key}")
    return header.flag == 2 and len(image) == 0
