"""IJB-S: surveillance videos searched among single images, bookings or other surveillance.

DIR holds the official csv files (cs6_metadata.csv, cs6_*_probe.csv, galleries/cs6_*_g1.csv and
_g2.csv). --faces holds what was cropped and aligned from the videos, PERSON/videos_VIDEO_FRAME.jpg,
and from the stills, PERSON/img_NUMBER.jpg, as AdaFace's evaluation lays them out. A template is the
sum of the raw embeddings of its faces; one without a face is a zero, and is counted."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.text import numbered_lines
from data_tools.images.image_file import is_image_name
from eval import identification, templates
from eval.embedders.images import Files
from eval.protocols import identify_command, session
from eval.report.results import Result

PROTOCOLS = {  # name: (gallery csv, probe csv)
    "single": ("surveillance_to_single", "surveillance_to_single-booking"),
    "booking": ("surveillance_to_booking", "surveillance_to_single-booking"),
    "surveillance": ("surveillance_to_surveillance", "surveillance_to_surveillance"),
}
FPIRS = (0.01, 0.1)


class Template(NamedTuple):
    subject: str
    files: tuple[str, ...]  # videos/5004.mp4, img/101146.jpg


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m eval ijbs runs/a IJB-S/protocols --faces IJB-S/aligned"
    session.add_arguments(parser)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--faces", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--protocol",
        nargs="+",
        choices=list(PROTOCOLS),
        default=list(PROTOCOLS),
        help="search surveillance probes in these galleries; default: all three",
    )


def run(args: argparse.Namespace) -> dict | None:
    """Search the probes of each protocol in both of its galleries.

    Raises:
        UserError, OSError: a list is missing or malformed, or none of its faces exists.
    """
    lists = {name: read_protocol(args.directory, name) for name in args.protocol}
    wanted = {
        (t.subject, file)
        for sides in lists.values()
        for side in sides.values()
        for t in side
        for file in t.files
    }
    paths, owner = _faces(args.faces, wanted)
    work = session.Session(args)
    images = Files("IJB-S", args.faces, paths, resize=args.resize)
    features = work.features(images)
    if features is None:
        return None
    number = {key: i for i, key in enumerate(dict.fromkeys(owner))}
    rows = np.array([number[key] for key in owner])
    _, sums = templates.pool(features.matrix(), rows, np.arange(len(rows)))
    contract = work.contract(
        images,
        template="sum of the raw embeddings of its faces, then L2-normalised; a zero without any",
        score="dot product, float64",
        tpir=identify_command.TPIR,
        rank="share of mated probes whose subject comes up within K templates of both galleries",
    )
    found = []
    for name, sides in lists.items():
        found.append(_search(work, name, sides, sums, number, contract))
        work.save(found[-1])
    identify_command.show(work, found)
    return work.output({"sets": {result.name: result.metrics for result in found}})


def read_protocol(directory: Path, name: str) -> dict[str, list[Template]]:
    """{"probes": .., "g1": .., "g2": ..} of a protocol.

    Raises:
        FileNotFoundError, ValueError: a list is absent, or a line of another form, by its number.
    """
    gallery, probe = PROTOCOLS[name]
    by_video: dict[str, list[str]] = {}
    for where, fields in _rows(directory / "cs6_metadata.csv", 2):
        del where
        subjects = by_video.setdefault(fields[1], [])
        if fields[0] not in subjects:
            subjects.append(fields[0])
    probes = []
    for where, fields in _rows(directory / f"cs6_{probe}_probe.csv", 1):
        if fields[0] not in by_video:
            raise UserError(f"{where}: {fields[0]} is not in cs6_metadata.csv")
        probes += [Template(subject, (fields[0],)) for subject in by_video[fields[0]]]
    sides = {"probes": probes}
    for key in ("g1", "g2"):
        rows = [
            (fields[1], fields[2])
            for _, fields in _rows(directory / "galleries" / f"cs6_{gallery}_{key}.csv", 3)
        ]
        if name == "booking":  # all images of a subject are one template
            grouped: dict[str, list[str]] = {}
            for subject, file in rows:
                grouped.setdefault(subject, []).append(file)
            sides[key] = [Template(subject, tuple(files)) for subject, files in grouped.items()]
        else:
            sides[key] = [Template(subject, (file,)) for subject, file in dict.fromkeys(rows)]
    return sides


def _search(
    work: session.Session,
    name: str,
    sides: dict[str, list[Template]],
    sums: NDArray,
    number: dict[tuple[str, str], int],
    contract: dict[str, object],
) -> Result:
    vectors, empty = {}, {}
    for key, side in sides.items():
        x = np.zeros((len(side), sums.shape[1]))
        for row, template in enumerate(side):
            for file in template.files:
                if (template.subject, file) in number:
                    x[row] += sums[number[template.subject, file]]
        vectors[key] = templates.normalised(x)
        empty[key] = int((~x.any(axis=1)).sum())
    subjects = {key: [t.subject for t in side] for key, side in sides.items()}
    probes = vectors["probes"], subjects["probes"]
    searches = {
        key: identification.search(vectors[key], subjects[key], *probes) for key in ("g1", "g2")
    }
    joined = identification.search(
        np.concatenate([vectors["g1"], vectors["g2"]]), subjects["g1"] + subjects["g2"], *probes
    )
    result = identify_command.make_result(
        "ijb-s", f"surveillance to {name}", work, contract, searches, fpirs=FPIRS
    )
    closed = identification.summarise(joined, identification.RANKS, ())
    result.metrics["all"] |= {key: closed[key] for key in closed if key.startswith("rank")}
    result.metrics["empty_templates"] = empty
    result.arrays["cmc"] = identification.cmc([joined])
    if any(empty.values()):
        work.warn(f"surveillance to {name}: some templates have no face: {empty}")
    return result


def _rows(path: Path, width: int) -> Iterator[tuple[str, list[str]]]:
    if not files.is_file(path):
        raise FileNotFoundError(
            f"{path} is missing; request IJB-S and its protocol from NIST (Kalka et al., BTAS 2018)"
        )
    for number, line in numbered_lines(path):
        if number == 1:
            continue  # the header
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < width or not all(fields[:width]):
            raise UserError(f"{path}:{number}: {line[:200]!r} has fewer than {width} fields")
        yield f"{path}:{number}", fields


def _faces(root: Path, wanted: set[tuple[str, str]]) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths below root, (subject, file of the protocol) of each) of all faces that are wanted."""
    if not files.is_dir(root):
        raise FileNotFoundError(f"{root}: the directory of aligned faces is missing")
    stems = {
        (subject, os.path.splitext(file)[0].replace("/", "_")): (subject, file)
        for subject, file in wanted
    }
    paths, owner = [], []
    for person in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        for name in filter(is_image_name, sorted(os.listdir(root / person))):
            stem = os.path.splitext(name)[0]
            if stem.startswith("videos"):
                stem = stem.rpartition("_")[0]  # without the frame
            if (person, stem) in stems:
                paths.append(f"{person}/{name}")
                owner.append(stems[person, stem])
    if not paths:
        raise FileNotFoundError(
            f"{root} contains no face of the protocol; expected for example "
            "1/videos_5004_21750.jpg and 1/img_101146.jpg"
        )
    return paths, owner
