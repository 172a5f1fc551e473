"""TinyFace: faces of some 20 pixels, searched among 153 428 distractors; rank 1, 5 and 20.

DIR holds Testing_Set with gallery_match_img_ID_pairs.mat, probe_img_ID_pairs.mat and the folders
Probe, Gallery_Match, Gallery_Distractor. The faces are not aligned: --aligned names a directory of
the same three folders whose images are (AdaFace gives its own on request)."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.images.image_file import is_image_name
from eval import identification, templates
from eval.embedders.images import Files
from eval.protocols import identify_command, session

FOLDERS = ("Gallery_Match", "Gallery_Distractor", "Probe")
RANKS = (1, 5, 20)
OFFICIAL = {"Gallery_Match": 4443, "Gallery_Distractor": 153_428, "Probe": 3728}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m eval tinyface runs/a tinyface --aligned tinyface_aligned"
    session.add_arguments(parser)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument(
        "--aligned",
        metavar="DIR",
        type=Path,
        help="directory of aligned faces; default: the folders of Testing_Set",
    )
    parser.add_argument(
        "--no-distractors",
        dest="distractors",
        action="store_false",
        help="leave the distractors out of the gallery, unlike the official protocol",
    )


def run(args: argparse.Namespace) -> dict | None:
    """Search all probes; print and return the ranks.

    Raises:
        UserError, OSError: a file is missing or malformed.
    """
    protocol = _testing_set(args.directory)
    root = args.aligned or protocol
    gallery = read_ids(protocol / "gallery_match_img_ID_pairs.mat", "gallery")
    probes = read_ids(protocol / "probe_img_ID_pairs.mat", "probe")
    distractors = _listed(root / "Gallery_Distractor") if args.distractors else []
    names = {"Gallery_Match": gallery[0], "Gallery_Distractor": distractors, "Probe": probes[0]}
    paths = [os.path.join(folder, name) for folder in FOLDERS for name in names[folder]]
    absent = [path for path in paths if not files.is_file(root / path)]
    if absent:
        raise FileNotFoundError(
            f"{root}: {len(absent)} of {len(paths)} images are absent, the first {absent[0]}"
        )
    work = session.Session(args)
    counts = {folder: len(names[folder]) for folder in FOLDERS}
    if counts != OFFICIAL:
        work.warn(
            f"TinyFace has {OFFICIAL}; this copy has {counts}: its numbers are not "
            "comparable with published ones"
        )
    images = Files("TinyFace", root, paths, resize=args.resize)
    features = work.features(images)
    if features is None:
        return None
    unit = templates.normalised(features.matrix())
    # A distractor is nobody's mate: a subject of its own below every id.
    lowest = int(min(gallery[1].min(), probes[1].min()))
    strangers = lowest - 1 - np.arange(len(distractors))
    subjects = np.concatenate([gallery[1], strangers])
    found = identification.search(unit[: len(subjects)], subjects, unit[len(subjects) :], probes[1])
    contract = work.contract(images, score="cosine", rank=identify_command.RANK)
    result = identify_command.make_result(
        "tinyface", "TinyFace", work, contract, {"gallery": found}, RANKS, ()
    )
    work.save(result)
    identify_command.show(work, [result])
    return work.output({"sets": {"TinyFace": result.metrics}})


def read_ids(path: Path, kind: str) -> tuple[list[str], NDArray[np.int64]]:
    """(image names, subject ids) of a .mat with `<kind>_set` and `<kind>_ids`.

    Raises:
        FileNotFoundError, ValueError: absent, no MATLAB file of that form, or uneven.
    """
    from scipy.io import loadmat  # no pickle: numbers, text, cells and structures

    if not files.is_file(path):
        raise FileNotFoundError(
            f"{path}: not there; TinyFace comes with it, from qmul-tinyface.github.io"
        )
    try:
        content = loadmat(str(path))
        names = [_text(cell) for cell in content[f"{kind}_set"].ravel()]
        ids = content[f"{kind}_ids"].ravel().astype(np.int64)
    except Exception as error:  # damaged bytes can fail anywhere in SciPy's reader
        raise UserError(f"{path}: not TinyFace's list of {kind} images: {error!r}") from error
    if len(names) != len(ids) or not names:
        raise UserError(f"{path}: {len(names)} names for {len(ids)} ids")
    return names, ids


def _text(cell: Any) -> str:
    while isinstance(cell, np.ndarray):
        cell = cell.ravel()[0]
    return str(cell)


def _testing_set(directory: Path) -> Path:
    for candidate in (directory / "Testing_Set", directory / "tinyface" / "Testing_Set", directory):
        if files.is_file(candidate / "probe_img_ID_pairs.mat"):
            return candidate
    raise FileNotFoundError(
        f"{directory}: no Testing_Set/probe_img_ID_pairs.mat in it; get TinyFace from "
        "qmul-tinyface.github.io"
    )


def _listed(folder: Path) -> list[str]:
    if not files.is_dir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; --no-distractors searches without it")
    return sorted(
        os.path.relpath(path, folder) for path in files.below(folder) if is_image_name(path.name)
    )
