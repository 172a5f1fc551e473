"""IJB-B and IJB-C from their official directory: faces, templates, pairs, galleries and probes.

    DIR/IJBC/loose_crop/NAME.jpg
    DIR/IJBC/meta/ijbc_face_tid_mid.txt            NAME template media
                  ijbc_name_5pts_score.txt         NAME x1 y1 .. x5 y5 score, the same rows
                  ijbc_template_pair_label.txt     template template 0|1
                  ijbc_1N_gallery_G1.csv, _G2.csv, ijbc_1N_probe_mixed.csv   template,subject,..

and IJBB with ijbb_ and the galleries S1, S2. DIR may also be the folder IJBC itself.

Letters: N faces, T templates, P pairs.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines, refuse_utf16
from data_tools.images.landmarks import five_points
from eval import templates
from eval.embedders.images import Files

GALLERIES = {"IJBB": ("S1", "S2"), "IJBC": ("G1", "G2")}
OFFICIAL = {  # faces, templates, pairs
    "IJBB": (227_630, 12_115, 8_010_270),
    "IJBC": (469_375, 23_124, 15_658_489),
}
_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
_CHUNK = 64 << 20  # bytes of the list of pairs read at once


class TemplateFaces(NamedTuple):
    images: Files  # [N] with landmarks
    template: NDArray[np.int64]  # [N]
    media: NDArray[np.int64]  # [N]
    score: NDArray[np.float64]  # [N] of the detector


class TemplatePairs(NamedTuple):
    first: NDArray[np.int32]  # [P] template ids
    second: NDArray[np.int32]
    issame: NDArray[np.bool_]


class Subjects(NamedTuple):
    template: NDArray[np.int64]  # each once, ascending
    subject: NDArray[np.int64]  # of its first row


class Benchmark(NamedTuple):
    name: str  # IJBB or IJBC
    directory: Path

    def meta(self, suffix: str) -> Path:
        return self.directory / "meta" / f"{self.name.lower()}_{suffix}"


def open_benchmark(directory: str | Path, name: str) -> Benchmark:
    """The benchmark in a directory.

    Raises:
        FileNotFoundError: no such folders; the message says what belongs where.
    """
    directory = Path(directory)
    for candidate in (directory / name, directory):
        if files.is_dir(candidate / "meta"):
            return Benchmark(name, candidate)
    raise FileNotFoundError(
        f"{directory}: no folder {name}/meta in it. Request {name} from NIST "
        f"(nist.gov/programs-projects/face-challenges); put its faces into {directory / name}/"
        "loose_crop and the lists of the InsightFace package into "
        f"{directory / name}/meta"
    )


def read_faces(benchmark: Benchmark) -> TemplateFaces:
    """The faces, in the order of the lists.

    Raises:
        FileNotFoundError: a list or an image is absent.
        ValueError: a line of another form, or lists that do not agree, by line number.
    """
    of_faces, of_points = benchmark.meta("face_tid_mid.txt"), benchmark.meta("name_5pts_score.txt")
    names: list[str] = []
    template: list[int] = []
    media: list[int] = []
    for number, fields in _lines(of_faces):
        try:
            name, tid, mid = fields
            template.append(int(tid))
            media.append(int(mid))
        except ValueError as error:
            raise UserError(
                f"{of_faces}:{number}: {' '.join(fields)[:200]!r} is not 'name template media'"
            ) from error
        names.append(name)
    points = np.empty((len(names), 5, 2), dtype=np.float32)
    score = np.empty(len(names))
    row = 0
    for number, fields in _lines(of_points):
        where = f"{of_points}:{number}"
        if row == len(names):
            raise UserError(f"{where}: a row more than the {len(names)} of {of_faces}")
        if fields[0] != names[row]:
            raise UserError(
                f"{where}: {fields[0]} where {of_faces} has {names[row]}; the two "
                "lists must have the same rows"
            )
        points[row] = five_points(fields[1:-1], where)
        score[row] = five_score(fields[-1], where)
        row += 1
    if row < len(names):
        raise UserError(f"{of_points}: {row} rows for the {len(names)} of {of_faces}")
    root = benchmark.directory / "loose_crop"
    images = Files(benchmark.name, root, names, points)
    absent = [name for name in names if not files.is_file(root / name)]
    if absent:
        raise FileNotFoundError(
            f"{root}: {len(absent)} of {len(names)} faces are absent, the first {absent[0]}"
        )
    return TemplateFaces(images, np.array(template), np.array(media), score)


def five_score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise UserError(f"{where}: the detector score {text!r} is not a number")
    return value


def read_pairs(benchmark: Benchmark, known: NDArray[np.int64]) -> TemplatePairs:
    """The listed pairs of templates; `known`: the template ids of the faces.

    Raises:
        FileNotFoundError, ValueError: the list is absent, or a line names no known template or has
            another form; the message has its number.
    """
    path = benchmark.meta("template_pair_label.txt")
    parts = []
    lines = 0
    for text in _chunks(path):
        count = text.count(b"\n") + (not text.endswith(b"\n"))
        values = _integers(text, count)
        if values is None:
            raise UserError(_wrong_pair(path, text, lines))
        bad = ~np.isin(values[:, :2], known).all(axis=1) | (values[:, 2] < 0) | (values[:, 2] > 1)
        if bad.any():
            raise UserError(_wrong_pair(path, text, lines, int(np.flatnonzero(bad)[0])))
        parts.append(values.astype(np.int32))
        lines += count
    if not parts:
        raise UserError(f"{path}: no pairs in it")
    whole = np.concatenate(parts)
    issame = whole[:, 2] == 1
    if issame.all() or not issame.any():
        raise UserError(f"{path} holds only same or only different pairs: verification needs both")
    return TemplatePairs(whole[:, 0].copy(), whole[:, 1].copy(), issame)


def read_subjects(path: Path, known: NDArray[np.int64]) -> Subjects:
    """Templates and subjects of a gallery or of the probes; the first row of a template counts.

    Raises:
        FileNotFoundError, ValueError: as `read_pairs`.
    """
    template: list[int] = []
    subject: list[int] = []
    for number, line in numbered_lines(_open(path)):
        if number == 1:
            continue  # the header
        fields = line.split(",")
        try:
            template.append(int(fields[0]))
            subject.append(int(fields[1]))
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}:{number}: {line[:200]!r} is not 'template,subject,..'"
            ) from error
        if not _in(template[-1], known):
            raise UserError(f"{path}:{number}: template {template[-1]} has no face in the lists")
    if not template:
        raise UserError(f"{path}: no templates in it")
    ids, first = np.unique(template, return_index=True)
    return Subjects(ids, np.array(subject)[first])


def image_features(matrix: NDArray, keep_norm: bool) -> NDArray:
    """[N, D]: N1, the embeddings as they are, or N0, each L2-normalised; before the detector."""
    if keep_norm:
        return matrix
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)


def pool(
    matrix: NDArray, faces: TemplateFaces, keep_norm: bool, use_detector: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(template ids [T] ascending, templates [T, D], not normalised).

    Raises:
        ValueError: a template without a detector score above 0.
    """
    weights = templates.detector_weights(faces.score, faces.template)[0] if use_detector else None
    return templates.pool(image_features(matrix, keep_norm), faces.template, faces.media, weights)


def rows_of(ids: NDArray, known: NDArray[np.int64]) -> NDArray[np.int32]:
    """The places of template ids among the known, ascending ones."""
    return np.searchsorted(known, ids).astype(np.int32)


def _in(value: int, known: NDArray) -> bool:
    place = int(np.searchsorted(known, value))
    return place < len(known) and known[place] == value


def _open(path: Path) -> Path:
    if not files.is_file(path):
        raise FileNotFoundError(
            f"{path}: not there; it belongs to the protocol lists (meta) of the IJB package that "
            "InsightFace's recognition/_evaluation_/ijb names, the images to NIST's"
        )
    return path


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in numbered_lines(_open(path)):
        yield number, line.split()


def _chunks(path: Path) -> Iterator[bytes]:
    """Whole lines, some _CHUNK bytes of them at a time."""
    with open(_open(path), "rb") as file:
        start = file.read(len(_MARK))
        refuse_utf16(start, str(path))
        if start != _MARK:
            file.seek(0)
        while block := file.read(_CHUNK):
            yield block + file.readline()


def _integers(text: bytes, count: int) -> NDArray[np.int64] | None:
    """[count, 3], or None where the text is something else than three integers a line."""
    if text.translate(None, b"0123456789 \t\r\n"):
        return None
    values = np.fromstring(text.decode("ascii"), dtype=np.int64, sep=" ")
    if len(values) != 3 * count:
        return None
    if count > 1:  # three numbers on every line, not only on average
        raw = np.frombuffer(text, dtype=np.uint8)
        digit = (raw >= ord("0")) & (raw <= ord("9"))
        begins = digit & ~np.concatenate(([False], digit[:-1]))
        ends = np.flatnonzero(raw == ord("\n"))
        starts = np.searchsorted(np.flatnonzero(begins), ends)
        if (np.diff(starts, prepend=0) != 3).any():
            return None
    return values.reshape(-1, 3)


def _wrong_pair(path: Path, text: bytes, before: int, row: int | None = None) -> str:
    for number, line in enumerate(io.BytesIO(text)):
        fields = line.split()
        if row is None:
            wrong = len(fields) != 3 or not all(field.isdigit() for field in fields)
            reason = "is not 'template template label'"
        else:
            wrong = number == row
            reason = "names a template without a face, or a label other than 0 and 1"
        if wrong:
            shown = line.decode(errors="replace").strip()[:200]
            return f"{path}:{before + number + 1}: {shown!r} {reason}"
    return f"{path}: not lines of 'template template label'"
