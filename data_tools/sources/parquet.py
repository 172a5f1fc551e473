"""Parquet files of images and labels, as Hugging Face publishes data sets.

SOURCE is a .parquet, or a directory of them (itself or its data/), such as a snapshot of a data set
repository. The image column holds encoded bytes or {bytes, path}, the label column whole numbers;
others than `image` and `label` are named by --image-column and --label-column. The names of the
classes come from the features that `datasets` writes into each file, or from the README.md. Of
several splits (train-*, test-*) the one named train is read.

An image lies in a row group that has to be decoded as a whole, and pack visits images at random:
it therefore copies those that it needs into one file first (`stage`), beside the shards.
pyarrow reads the files: pip install 'arcline[formats]'.
"""

import contextlib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.common import content, extras, files
from data_tools.common.errors import UserError
from data_tools.sources.features import class_names
from data_tools.sources.labels import Fields, Listing, by_class, class_number, numbered

SUFFIX = ".parquet"
_SPLIT = re.compile(r"^([A-Za-z]\w*?)(?:-\d+-of-\d+.*)?\.parquet$")
_BATCH = 256  # rows decoded at a time
_UNREADABLE = -1  # in the column of sizes: the row's bytes cannot be had
_STAGED, _PLACES = "images", "places.npz"


def parquet_files(path: Path) -> list[Path]:
    """The parquet files at `path`, itself or those of a directory; [] if it is no such set."""
    if path.suffix.lower() == SUFFIX and files.is_file(path):
        return [path]
    if not files.is_dir(path):
        return []
    return files.ending(path, SUFFIX) or files.ending(path / "data", SUFFIX)


def refuse_arrow(path: Path) -> None:
    """Raises: UserError: `path` is what save_to_disk of `datasets` writes."""
    if files.is_dir(path) and files.exists(path / "state.json") and files.ending(path, ".arrow"):
        raise UserError(
            f"{path}: Arrow files of `datasets`, made by save_to_disk: write parquet "
            f"(load_from_disk({str(path)!r}).to_parquet('OUT.parquet')) and pack that"
        )


class ParquetImages:
    """Images by file and row; staged ones by their place in one file."""

    def __init__(
        self,
        paths: list[Path],
        column: str,
        file_of: np.ndarray,
        rows: np.ndarray,
        staged: Path | None = None,
        at: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self._paths, self._column = paths, column
        self._file_of, self._rows = file_of, rows  # uint16, int32 [n]
        self._staged, self._at, self._sizes = staged, at, sizes  # int64 [n]
        self._group: tuple[tuple[int, int], list[Any]] = ((-1, -1), [])  # read last

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> bytes:
        return os.fsencode(self.where(i))

    def where(self, i: int) -> str:
        return f"{self._paths[self._file_of[i]].name}: row {self._rows[i]}"

    def read(self, i: int) -> bytes:
        if self._staged is None or self._at is None or self._sizes is None:
            return self._unstaged(i)
        size = int(self._sizes[i])
        if size < 0:
            return self._unstaged(i)  # says what is wrong with it
        with files.naming(self._staged), open(self._staged, "rb") as file:
            return os.pread(file.fileno(), size, int(self._at[i]))

    def _unstaged(self, i: int) -> bytes:
        """The image, by decoding the row group that holds it."""
        number, row = int(self._file_of[i]), int(self._rows[i])
        file = _open(self._paths[number])
        group, start, _ = next(place for place in _row_groups(file) if row < place[1] + place[2])
        if self._group[0] != (number, group):
            with _naming_damage(self.where(i)), files.naming(self._paths[number]):
                table = file.read_row_group(group, columns=[self._column])
            self._group = (number, group), table.column(0)
        try:
            return _encoded(self._group[1][row - start].as_py())
        except UserError as error:
            raise UserError(f"{self.where(i)}: {error}") from error

    def select(self, indices: np.ndarray) -> "ParquetImages":
        at, sizes = self._at, self._sizes
        return ParquetImages(
            self._paths,
            self._column,
            self._file_of[indices],
            self._rows[indices],
            self._staged,
            None if at is None else at[indices],
            None if sizes is None else sizes[indices],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": ((-1, -1), [])}

    def stage(self, directory: Path, indices: np.ndarray) -> None:
        """Copy these images into a file in `directory`, from which they are read from now on.

        Every row group is decoded once. What an interrupted pack has staged is used again.
        """
        directory.mkdir(exist_ok=True)
        wanted = np.zeros(len(self), bool)
        wanted[indices] = True
        digest = hashlib.sha256(np.packbits(wanted).tobytes()).hexdigest()
        blob, places = directory / _STAGED, directory / _PLACES
        at, sizes = np.zeros(len(self), np.int64), np.full(len(self), _UNREADABLE, np.int64)
        if files.exists(places):
            with np.load(io.BytesIO(files.read_bytes(places)), allow_pickle=False) as found:
                if str(found["of"]) == digest and found["end"] == os.stat(blob).st_size:
                    self._staged, self._at, self._sizes = blob, found["at"], found["sizes"]
                    return
        end = 0
        with files.naming(blob), open(blob, "wb") as out:
            for i, encoded in self._in_file_order(wanted):
                out.write(encoded)
                at[i], sizes[i] = end, len(encoded)
                end += len(encoded)
            out.flush()
            os.fsync(out.fileno())
        saved = io.BytesIO()
        np.savez(saved, at=at, sizes=sizes, of=np.array(digest), end=np.array(end))
        files.write_bytes(places, saved.getvalue())
        self._staged, self._at, self._sizes = blob, at, sizes

    def _in_file_order(self, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """(i, image) of the wanted images that can be read."""
        for number, path in enumerate(self._paths):
            mine = np.flatnonzero(wanted & (self._file_of == number))
            if not len(mine):
                continue
            file = _open(path)
            index = np.full(file.metadata.num_rows, -1, np.int64)  # row -> i
            index[self._rows[mine]] = mine
            for group, start, rows in _row_groups(file):
                if (index[start : start + rows] >= 0).any():
                    yield from self._of_group(file, group, index[start : start + rows])

    def _of_group(self, file: Any, group: int, index: np.ndarray) -> Iterator[tuple[int, bytes]]:
        from pyarrow.lib import ArrowException

        row = 0
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[self._column]):
                for k in np.flatnonzero(index[row : row + len(batch)] >= 0).tolist():
                    try:
                        yield int(index[row + k]), _encoded(batch.column(0)[k].as_py())
                    except UserError:
                        continue  # read() names it
                row += len(batch)
        except OSError as error:
            if error.errno:
                raise
        except ArrowException:
            return  # damaged: read() names the rows


class ParquetSource(Listing, ParquetImages):
    """See the top of the file. Raises: UserError: damaged, no such columns, or a bad label."""

    kind = "parquet"

    def __init__(self, path: Path, paths: list[Path], fields: Fields) -> None:
        Listing.__init__(self, path)
        paths = self._of_one_split(paths)
        image, label = fields.image or "image", fields.label or "label"
        self._digest = hashlib.sha256(f"{image}\0{label}\n".encode())
        names: list[str] | None = None
        labels, counts = [], []
        for place in paths:
            file = _open(place)
            _check_columns(place, file.schema_arrow, image, label)
            names = names or class_names(file.schema_arrow, label, path)
            found = os.stat(place)
            stamp = f"{place.name}\0{found.st_size} {found.st_mtime_ns}\n"
            self._digest.update(stamp.encode("utf-8", "surrogateescape"))
            labels.append(_labels(place, file, label))
            counts.append(len(labels[-1]))
        numbers = np.concatenate(labels)
        if not len(numbers):
            raise UserError(f"{path}: no image in it")
        rows = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        file_of = np.repeat(np.arange(len(paths), dtype=np.uint16), counts)
        order = by_class(numbers)
        if order is not None:
            numbers, rows, file_of = numbers[order], rows[order], file_of[order]
        ParquetImages.__init__(self, paths, image, file_of, rows)
        values, self.labels = numbered(numbers)
        if names is not None and int(values[-1]) >= len(names):
            raise UserError(
                f"{path}: the label {int(values[-1])}, but its features name {len(names)} classes"
            )
        self.identities = [names[v] if names else str(v) for v in values.tolist()]
        if names and len(set(self.identities)) < len(self.identities):
            (name, _), *_ = Counter(self.identities).most_common(1)
            raise UserError(f"{path}: its features name two classes {name!r}")
        self.sha256 = self._digest.hexdigest()
        del self._digest

    def _of_one_split(self, paths: list[Path]) -> list[Path]:
        """The files of the split train if there are others as well, which are noted."""
        splits = [found[1] if (found := _SPLIT.match(path.name)) else "" for path in paths]
        if "train" not in splits or len(set(splits)) == 1:
            return paths
        kept = [path for path, split in zip(paths, splits, strict=True) if split == "train"]
        others = sorted(set(splits) - {"train"})
        self.notes.append(
            f"{self.path}: the split train is packed; the files of {', '.join(others)} are left "
            f"out: name them to pack them"
        )
        self.left_out = {SUFFIX: len(paths) - len(kept)}
        self.ignored = len(paths) - len(kept)
        return kept


def _open(path: Path) -> Any:
    """The ParquetFile. Raises: UserError: it is none, or pyarrow is not installed."""
    with extras.needed("pyarrow", "formats", "a parquet file"):
        from pyarrow import parquet
    with _naming_damage(f"{path}: not a whole parquet file", path):
        return parquet.ParquetFile(path, buffer_size=1 << 20)


def _row_groups(file: Any) -> Iterator[tuple[int, int, int]]:
    """Number, first row and rows of each row group."""
    start = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        yield group, start, rows
        start += rows


@contextlib.contextmanager
def _naming_damage(what: str, hinted: Path | None = None) -> Iterator[None]:
    """The body reads a parquet file. Raises: OSError: a disk is at fault; UserError: the file is,
    `what`; of the file `hinted` it is said what it may be instead."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        hint = content.hint(hinted) if hinted else ""
        raise UserError(f"{what}: {_fault(error)}{hint}") from error


def _check_columns(path: Path, schema: Any, image: str, label: str) -> None:
    from pyarrow import types

    for name, flag in ((image, "--image-column"), (label, "--label-column")):
        if name not in schema.names:
            raise UserError(
                f"{path}: no column {name!r}; its columns are {', '.join(schema.names)}: name one "
                f"by {flag}"
            )
    kind = schema.field(image).type
    inner = (
        kind.field("bytes").type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        else kind
    )
    if not (types.is_binary(inner) or types.is_large_binary(inner)):
        raise UserError(
            f"{path}: the column {image!r} is of type {kind}; expected encoded bytes or "
            f"{{bytes, path}}"
        )
    if not types.is_integer(schema.field(label).type):
        raise UserError(
            f"{path}: the column {label!r} is of type {schema.field(label).type}; labels are whole "
            f"numbers from 0 below 2^31: name another column by --label-column, or number the "
            f"people (ds.class_encode_column({label!r}))"
        )


def _labels(path: Path, file: Any, column: str) -> np.ndarray:
    """int64 [rows]. Raises: UserError: naming the first row that has none, or a bad one."""
    found = []
    with _naming_damage(f"{path}: its labels cannot be read"):
        for group in range(file.num_row_groups):
            found.append(file.read_row_group(group, columns=[column]).column(0))
    labels = []
    start = 0
    for part in found:
        if part.null_count:
            row = start + int(np.argmax(part.is_null().to_numpy()))
            raise UserError(f"{path}: row {row}: the label is missing")
        values = part.to_numpy()
        bad = np.flatnonzero((values < 0) | (values >= 2**31))
        if len(bad):
            try:
                class_number(int(values[bad[0]]))
            except UserError as error:
                raise UserError(f"{path}: row {start + int(bad[0])}: {error}") from error
        labels.append(values.astype(np.int64))
        start += len(values)
    return np.concatenate(labels) if labels else np.empty(0, np.int64)


def _encoded(value: Any) -> bytes:
    """The bytes of a cell. Raises: UserError: it has none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        path = value.get("path") if isinstance(value, dict) else None
        what = f", only the path {path!r}" if path else ""
        raise UserError(f"no image bytes in this row{what}")
    return bytes(data)


def _fault(error: Exception) -> str:
    return "damaged: " + " ".join(str(error).split())[:160]
