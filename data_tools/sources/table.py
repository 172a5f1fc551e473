"""A CSV or TSV table of image paths and labels; images are found relative to a root folder.

A first line that names the columns (`image`, `path` or `file_name`, and `label`; others by
--image-column and --label-column) may stand at the top; without it the columns are path and label.
Fields are quoted as in RFC 4180. A path that appears twice, back slashes and hidden files are
treated as in lists (lst.py), and labels are whole numbers as there.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from data_tools.common import content, files, text
from data_tools.common.errors import UserError
from data_tools.sources.labels import Fields, class_number, number
from data_tools.sources.lst import ListSource

SUFFIXES = (".csv", ".tsv")
_IMAGE, _LABEL = ("image", "path", "file_name"), ("label",)
_SHOWN = 80  # characters of a line in a message


def is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


class TableSource(ListSource):
    """See the top of the file. Raises: ValueError naming file and line of the first bad line."""

    kind = "table"

    def __init__(self, path: Path, root: Path | None = None, fields: Fields | None = None) -> None:
        self._fields = fields or Fields()
        super().__init__(path, root)
        columns = f"{self._fields.image}\0{self._fields.label}"
        if columns != "\0":  # other columns of the same file are another listing
            self.sha256 = f"{self.sha256} {columns}"

    def _lines(self) -> Iterator[bytes]:
        place = (0, 1)  # columns of path and label
        for line, row in enumerate(self._rows()):
            if not line:
                named = self._named(row)
                if named is not None:
                    place = named
                    continue
            try:
                if len(row) <= max(place):
                    raise UserError(
                        f"{','.join(row)[:_SHOWN]!r} has {len(row)} fields; expected path,label"
                    )
                name, label = self._image(row[place[0]].strip()), row[place[1]].strip()
                self._labels.append(class_number(label))
                self._unaligned.append(0)
            except ValueError as error:
                hint = "" if line else content.hint(self.path)
                raise UserError(f"{self.path}: line {self._line}: {error}{hint}") from error
            yield self._encoded(name)

    def _rows(self) -> Iterator[list[str]]:
        """The rows that are not blank, read as it goes; `_line` is where the last one ends."""
        with files.naming(self.path), open(self.path, "rb") as file:
            text.refuse_utf16(file.read(2), str(self.path))
        separator = "\t" if self.path.suffix.lower() == ".tsv" else ","
        with (
            files.naming(self.path),
            open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            reader = csv.reader(file, delimiter=separator, strict=True)
            try:
                for row in reader:
                    self._line = reader.line_num
                    if any(field.strip() for field in row):
                        yield row
            except csv.Error as error:
                hint = content.hint(self.path)
                raise UserError(f"{self.path}: line {reader.line_num}: {error}{hint}") from error

    def _named(self, row: list[str]) -> tuple[int, int] | None:
        """The columns of path and label if the first line names them, None if it is a row.

        Raises: UserError: a column that was asked for is not there.
        """
        names = [field.strip() for field in row]
        image, label = (
            next((names.index(name) for name in wanted if name in names), None)
            for wanted in (
                (self._fields.image,) if self._fields.image else _IMAGE,
                (self._fields.label,) if self._fields.label else _LABEL,
            )
        )
        if image is not None and label is not None:
            return image, label
        asked = self._fields.image or self._fields.label
        is_row = len(names) == 2 and number(names[1]) is not None
        if is_row and not asked:
            return None
        if not asked and len(names) == 2 and image is None and label is None:
            return None  # a bad row: the label is refused with its text
        raise UserError(
            f"{self.path}: line {self._line}: the columns are "
            f"{', '.join(names)[:_SHOWN]!r}: name those of the paths and the labels by "
            f"--image-column and --label-column{content.hint(self.path)}"
        )
