"""Pairs of faces in the official formats of the LFW family, and as plain lists.

| set | list | a line |
|---|---|---|
| LFW, RFW | pairs.txt | `name n1 n2` (same) or `name1 n1 name2 n2` (different) |
| CALFW, CPLFW | pairs_CALFW.txt | two lines a pair, `image number`; 0 means different |
| CFP | folder Protocol/Split/FP or FF | 01 .. 10 of same.txt, diff.txt: `i,j` of Pair_list_* |
| AgeDB-30 | a .mat with `splits` | MATLAB's |
| others | any text | `image1 image2 label`, label 1 or 0 |

Letters: P pairs, N images.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.files import is_file
from data_tools.common.text import numbered_lines
from data_tools.images import landmarks as points
from data_tools.images.image_file import SUFFIXES, is_image_name
from data_tools.images.image_table import back_slashes
from data_tools.verification_bin import load_bin
from eval.embedders.images import Encoded, Files, ImageSet


class ListedPairs(NamedTuple):
    name: str
    images: ImageSet  # each image once
    first: NDArray[np.int64]  # [P] numbers of images
    second: NDArray[np.int64]
    issame: NDArray[np.bool_]  # [P]
    missing: tuple[str, ...] = ()  # pairs left out because an image is absent, one text each
    notes: tuple[str, ...] = ()  # how the list was read where it could be meant otherwise


class Listed(NamedTuple):
    where: str  # file and line, for messages
    first: str  # path below the image directory; without a suffix where the list has none
    second: str
    same: bool


def open_set(given: str, resize: bool = False) -> ListedPairs:
    """A SET of the command line: X.bin, or LIST:IMAGE_DIR or LIST:IMAGE_DIR:LANDMARKS.

    Raises:
        ValueError: a list that cannot be read as one, or without one whole pair.
        OSError: a file is missing; the message says where to get the official one.
    """
    parts = given.split(":")
    if len(parts) == 1:
        encoded = load_bin(given)
        pair = np.arange(len(encoded.issame))
        images = Encoded(encoded.name, encoded.encoded, resize)
        return ListedPairs(encoded.name, images, 2 * pair, 2 * pair + 1, encoded.issame)
    if len(parts) > 3 or not all(parts):
        raise UserError(f"{given}: a set is X.bin, LIST:IMAGE_DIR or LIST:IMAGE_DIR:LANDMARKS")
    return load_list(parts[0], parts[1], parts[2] if len(parts) == 3 else None, resize)


def load_list(
    list_path: str | Path,
    image_dir: str | Path,
    landmarks: str | Path | None = None,
    resize: bool = False,
) -> ListedPairs:
    """The pairs of a list whose images lie below `image_dir`, aligned if landmarks are given.

    Pairs keep their order, hence the list's ten folds stay its folds. A list without folds, all
    same pairs first (LFW's view 1, CALFW, CPLFW), is dealt out evenly: else a fold would hold one
    kind only. A pair with an absent image is left out and named in `missing`.

    Raises:
        ValueError: a line of another form, a count that differs from the first line, an image
            without landmarks where some are given, or not one pair with both images.
        OSError: the list cannot be read.
    """
    path = Path(list_path)
    if not files.exists(path):
        raise FileNotFoundError(f"{path}: no such list of pairs; {_source(path.name)}")
    if not files.is_dir(image_dir):
        raise FileNotFoundError(f"{image_dir}: no such directory of images (of {path})")
    name, listed, notes = read_list(path)
    found = {text: _find(Path(image_dir), text) for text in _texts(listed)}
    missing, kept = [], []
    for pair in listed:
        absent = [text for text in (pair.first, pair.second) if found[text] is None]
        if absent:
            names = " and ".join(Path(text).name for text in dict.fromkeys(absent))
            missing.append(f"{pair.where}: no image {names}")
        else:
            kept.append(pair)
    if not kept:
        raise UserError(
            f"{image_dir}: none of the {len(listed)} pairs of {path} has both images; expected "
            f"e.g. {Path(image_dir) / _suffixed(listed[0].first)}"
        )
    issame = np.array([pair.same for pair in kept])
    if np.count_nonzero(np.diff([pair.same for pair in listed])) <= 1:
        kept = [kept[i] for i in evenly(issame)]
        issame = np.array([pair.same for pair in kept])
    numbers = {text: number for number, text in enumerate(_texts(kept))}
    paths = [str(found[text]) for text in numbers]
    images = Files(name, image_dir, paths, points_of(paths, landmarks), resize)
    first = np.array([numbers[pair.first] for pair in kept])
    second = np.array([numbers[pair.second] for pair in kept])
    return ListedPairs(name, images, first, second, issame, tuple(missing), notes)


def read_list(path: Path) -> tuple[str, list[Listed], tuple[str, ...]]:
    """(name of the set, its pairs, notes on how it was read) of a list in any of the formats."""
    if files.is_dir(path):
        return f"cfp_{path.name.lower()}", list(_cfp(path)), ()
    if path.suffix == ".mat":
        return path.stem, list(_agedb(path)), ()
    slashes = sum("\\" in line for _, line in numbered_lines(path))
    notes = (back_slashes(slashes, path, "lines"),) if slashes else ()
    return path.stem, _text(path), notes


def evenly(issame: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order of the pairs [P] in which every stretch holds its share of both kinds.

    Of 3000 same and 3000 different pairs each tenth holds 300 and 300, in their order.
    """
    place = np.empty(len(issame))
    for kind in (True, False):
        of_kind = np.flatnonzero(issame == kind)
        place[of_kind] = (np.arange(len(of_kind)) + 0.5) / len(of_kind)
    return np.argsort(place, kind="stable")


def _text(path: Path) -> list[Listed]:
    lines = [(i, _fields(line)) for i, line in numbered_lines(path)]
    announced = None
    if lines and len(lines[0][1]) <= 2 and all(field.isdecimal() for field in lines[0][1]):
        # `folds n` of LFW's view 2 or `n` of view 1: n pairs of each kind in each fold.
        announced = 2 * math.prod(int(field) for field in lines.pop(0)[1])
    if lines and len(lines[0][1]) == 2:
        return list(_calfw(path, lines))
    pairs = [_line(f"{path}:{i}", fields) for i, fields in lines]
    if announced is not None and len(pairs) != announced:
        raise UserError(f"{path}: {len(pairs)} pairs where its first line announces {announced}")
    if not pairs:
        raise UserError(f"{path}: no pairs in it")
    return pairs


def _fields(line: str) -> list[str]:
    """The fields of a line, separated by tabs or by blanks; back slashes are read as slashes."""
    line = line.replace("\\", "/")
    blanks = line.split()
    numbers = blanks[1:] if len(blanks) == 3 else blanks[1::2]
    if "\t" not in line or (len(blanks) in (3, 4) and all(x.isdecimal() for x in numbers)):
        return blanks
    return [field.strip() for field in line.split("\t")]


def _line(where: str, fields: list[str]) -> Listed:
    match fields:
        case [name, n1, n2] if n1.isdecimal() and n2.isdecimal():
            return Listed(where, _lfw(name, n1), _lfw(name, n2), True)
        case [name1, n1, name2, n2] if n1.isdecimal() and n2.isdecimal():
            return Listed(where, _lfw(name1, n1), _lfw(name2, n2), name1 == name2)
        case [first, second, label] if label in ("0", "1", "-1"):
            return Listed(where, first, second, label == "1")
    raise UserError(
        f"{where}: {' '.join(fields)[:200]!r} is neither 'name n1 n2' nor 'name1 n1 name2 n2' nor "
        "'image1 image2 label'"
    )


def _lfw(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _calfw(path: Path, lines: list[tuple[int, list[str]]]) -> Iterable[Listed]:
    if len(lines) % 2:
        raise UserError(f"{path}: {len(lines)} lines; each pair has two")
    for (i, one), (j, other) in zip(lines[::2], lines[1::2], strict=True):
        for number, fields in ((i, one), (j, other)):
            if len(fields) != 2 or not fields[1].isdecimal():
                raise UserError(
                    f"{path}:{number}: {' '.join(fields)[:200]!r} is not 'image number'"
                )
        if (one[1] == "0") != (other[1] == "0"):
            raise UserError(f"{path}:{j}: the pair of lines {i} and {j} is both same and not")
        yield Listed(f"{path}:{i}", one[0], other[0], one[1] != "0")


def _cfp(split: Path) -> Iterable[Listed]:
    """CFP's Protocol/Split/FP or FF: frontal to profile, frontal to frontal."""
    protocol = split.parents[1]
    kinds = {"FP": ("F", "P"), "FF": ("F", "F")}.get(split.name.upper())
    if kinds is None:
        raise UserError(f"{split}: of CFP's Protocol/Split, name the folder FP or FF")
    tables = [_cfp_images(protocol / f"Pair_list_{kind}.txt") for kind in kinds]
    folds = sorted(x for x in split.iterdir() if files.is_dir(x))
    if not folds:
        raise FileNotFoundError(f"{split}: no folders 01 .. 10 in it; {_source('cfp')}")
    for fold in folds:
        for name, same in (("same.txt", True), ("diff.txt", False)):
            for i, line in numbered_lines(fold / name):
                numbers = line.split(",")
                if len(numbers) != 2 or not all(
                    x.strip() in table for x, table in zip(numbers, tables, strict=True)
                ):
                    raise UserError(
                        f"{fold / name}:{i}: {line[:200]!r} is not 'i,j' of numbers "
                        f"in {protocol}/Pair_list_*.txt"
                    )
                one, other = (t[x.strip()] for x, t in zip(numbers, tables, strict=True))
                yield Listed(f"{fold / name}:{i}", one, other, same)


def _cfp_images(path: Path) -> dict[str, str]:
    if not files.is_file(path):
        raise FileNotFoundError(f"{path}: not there; {_source('cfp')}")
    table = {}
    for i, line in numbered_lines(path):
        fields = line.replace("\\", "/").split()
        if len(fields) != 2:
            raise UserError(f"{path}:{i}: {line[:200]!r} is not 'number path'")
        # ../Data/Images/001/frontal/01.jpg -> 001/frontal/01.jpg
        table[fields[0]] = fields[1].rpartition("Images/")[2]
    return table


def _agedb(path: Path) -> Iterable[Listed]:
    """AgeDB-30's own .mat: `splits` of ten folds, each of pairs of names and labels 1 or -1."""
    from scipy.io import loadmat  # no pickle: numbers, text, cells and structures

    try:
        splits = loadmat(str(path))["splits"].ravel()
        for fold, split in enumerate(splits, 1):
            pairs, labels = list(_innermost(split))[:2]
            firsts, seconds = pairs[0], pairs[1]
            for k, label in enumerate(np.asarray(labels).ravel()):
                one, other = (_string(side[k]) for side in (firsts, seconds))
                yield Listed(f"{path}: fold {fold} pair {k + 1}", one, other, int(label) == 1)
    except Exception as error:  # damaged bytes can fail anywhere in SciPy's reader
        raise UserError(f"{path}: not a pair file of AgeDB-30: {error!r}") from error


def _innermost(cell: Any) -> Any:
    """The structure (pairs, labels) inside MATLAB's wrappings of one element."""
    while isinstance(cell, np.ndarray) and cell.size == 1:
        cell = cell.item() if cell.dtype.names is None else cell.ravel()[0]
    return cell


def _string(cell: Any) -> str:
    while isinstance(cell, np.ndarray | np.void | tuple):
        cell = cell[0] if isinstance(cell, np.void | tuple) else cell.ravel()[0]
    return str(cell)


def _texts(pairs: Iterable[Listed]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))


def _find(image_dir: Path, text: str) -> str | None:
    """The file of an image below `image_dir`, None if it is not there."""
    names = [text] if is_image_name(Path(text).name) else []
    names += [text + suffix for suffix in SUFFIXES]
    return next((name for name in names if is_file(image_dir / name)), None)


def _suffixed(text: str) -> str:
    return text if is_image_name(Path(text).name) else text + SUFFIXES[0]


def points_of(paths: list[str], landmarks: str | Path | None) -> NDArray[np.float32] | None:
    """[N, 5, 2] of all images, None without landmarks. Raises: ValueError where one has none."""
    if landmarks is None:
        return None
    return points.points_of(points.read_landmarks(landmarks), paths)


def _source(name: str) -> str:
    text = name.lower()
    for key, where in {
        "calfw": "CALFW: pairs_CALFW.txt comes with the images from whdeng.cn/CALFW",
        "cplfw": "CPLFW: pairs_CPLFW.txt comes with the images from whdeng.cn/CPLFW",
        "cfp": "CFP: the folder Protocol comes with the images from cfpw.io",
        "agedb": "AgeDB: the list comes with the images, on request, from ibug.doc.ic.ac.uk",
    }.items():
        if key in text:
            return where
    return "LFW's is http://vis-www.cs.umass.edu/lfw/pairs.txt"
