"""Lists of your own: text tables of images, subjects, templates and pairs.

The first line may name the columns; without it they are taken in the order of `names`. Fields are
separated by commas, tabs or spaces, whichever the first line has.

Letters: N images, T templates.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines
from data_tools.images.landmarks import five_points, points_of, read_landmarks
from eval.embedders.images import Files

FACES = ("image", "subject", "template", "media", "score")
LANDMARKS = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4", "x5", "y5")


class Table(NamedTuple):
    path: Path
    lines: list[int]  # of each row, 1-based
    columns: dict[str, list[str]]

    def where(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"


class FaceTable(NamedTuple):
    """Images with their templates; template ids are numbers 0 .. T - 1 in order of appearance."""

    images: Files
    template: NDArray[np.int64]  # [N]
    media: NDArray[np.int64]  # [N] numbers of media, one for each image where none are given
    score: NDArray[np.float64] | None  # [N]
    names: list[str]  # [T] of templates
    subjects: list[str]  # [T]; empty where the table has no subjects


def read(path: str | Path, names: Sequence[str], needed: Sequence[str]) -> Table:
    """A table whose columns are among `names`, with those in `needed`.

    Raises:
        ValueError: an unknown or absent column, or a row of another width, with its line number.
        OSError: the file cannot be read.
    """
    path = Path(path)
    header: list[str] | None = None
    columns: dict[str, list[str]] = {}
    lines: list[int] = []
    for number, fields in _rows(path):
        if header is None:
            known = {field.lower() for field in fields} & {*names}
            if known:
                header = [field.lower() for field in fields]
                unknown = [x for x in header if x not in names]
                if unknown or len(set(header)) < len(header):
                    raise UserError(
                        f"{path}:{number}: columns {header}; known are "
                        f"{', '.join(names)}, each once"
                    )
            else:
                header = list(names[: len(fields)])
            absent = [name for name in needed if name not in header]
            if absent:
                raise UserError(
                    f"{path}:{number}: no column {', '.join(absent)}; there are {', '.join(header)}"
                )
            columns = {name: [] for name in header}
            if known:
                continue
        if len(fields) != len(header):
            raise UserError(
                f"{path}:{number}: {len(fields)} fields where the first line has {len(header)}"
            )
        lines.append(number)
        for name, field in zip(header, fields, strict=True):
            columns[name].append(field)
    if not lines:
        raise UserError(f"{path}: no rows in it")
    return Table(path, lines, columns)


def read_faces(
    path: str | Path,
    root: str | Path | None,
    landmarks: str | Path | None = None,
    needed: Sequence[str] = ("image", "subject"),
    resize: bool = False,
) -> FaceTable:
    """The faces of a table of image, subject, template, media, score and x1 .. y5.

    Paths are below `root`, by default the table's own directory. Without `template` each image is
    a template of its own. Landmarks stand in the table or in a file or directory of their own.

    Raises:
        ValueError: as `read`; a template of two subjects, a score that is not a number, an image
            without landmarks where others have some.
        FileNotFoundError: an image is absent; the message counts them.
    """
    table = read(path, (*FACES, *LANDMARKS), needed)
    columns = table.columns
    paths = columns["image"]
    base = Path(root) if root is not None else Path(path).parent
    absent = [row for row, name in enumerate(paths) if not files.is_file(base / name)]
    if absent:
        raise FileNotFoundError(
            f"{table.where(absent[0])}: no image {base / paths[absent[0]]}"
            + (f", and {len(absent) - 1} more of {len(paths)} absent" if len(absent) > 1 else "")
        )
    template, names = _numbered(columns.get("template", [str(i) for i in range(len(paths))]))
    media = _numbered(columns.get("media") or [str(i) for i in range(len(paths))])[0]
    subjects = _subjects(table, template, names) if "subject" in columns else []
    score = _score(table) if "score" in columns else None
    images = Files(Path(path).stem, base, paths, _points(table, landmarks), resize)
    return FaceTable(images, template, media, score, names, subjects)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    delimiter = None
    for number, line in numbered_lines(path):
        if line.startswith("#"):
            continue
        if delimiter is None:
            delimiter = next((x for x in ",\t" if x in line), " ")
        if delimiter == " ":
            yield number, line.split()
            continue
        try:
            fields = next(csv.reader([line], delimiter=delimiter))
        except csv.Error as error:
            raise UserError(f"{path}:{number}: not a line of a table: {error}") from error
        yield number, [field.strip() for field in fields]


def _numbered(texts: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(text, len(numbers)) for text in texts]
    return np.array(found, dtype=np.int64), list(numbers)


def _subjects(table: Table, template: NDArray, names: list[str]) -> list[str]:
    subjects: list[str | None] = [None] * len(names)
    for row, (number, subject) in enumerate(zip(template, table.columns["subject"], strict=True)):
        if subjects[number] not in (None, subject):
            raise UserError(
                f"{table.where(row)}: template {names[number]} is of subject "
                f"{subjects[number]} and of {subject}"
            )
        subjects[number] = subject
    return [str(subject) for subject in subjects]


def _score(table: Table) -> NDArray[np.float64]:
    values = np.empty(len(table.lines))
    for row, text in enumerate(table.columns["score"]):
        try:
            values[row] = float(text)
        except ValueError:
            values[row] = np.nan
        if not np.isfinite(values[row]):
            raise UserError(f"{table.where(row)}: score {text!r} is not a number")
    return values


def _points(table: Table, landmarks: str | Path | None) -> NDArray[np.float32] | None:
    columns = table.columns
    inside = [name for name in LANDMARKS if name in columns]
    if inside and len(inside) < len(LANDMARKS):
        raise UserError(f"{table.path}: landmarks need all of {', '.join(LANDMARKS)}")
    if inside:
        rows = zip(*(columns[name] for name in LANDMARKS), strict=True)
        return np.stack([five_points(x, table.where(row)) for row, x in enumerate(rows)])
    if landmarks is None:
        return None
    return points_of(read_landmarks(landmarks), columns["image"])
