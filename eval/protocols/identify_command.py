"""Identify probes in one or several galleries of your own: ranks, and TPIR at a given FPIR."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.common.errors import UserError
from data_tools.common.messages import count
from eval import identification, templates
from eval.protocols import pairs_command, session, text_tables
from eval.report import results
from eval.report.results import Result

TPIR = (
    "threshold: element max(int(M x) - 1, 0) of the M non-mated probes' highest scores, descending;"
    " TPIR: share of mated probes whose own score is above it and above every other subject's, both"
    " strictly"
)
RANK = "share of mated probes whose subject comes up within K gallery templates; ties by order"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The tables have the columns image, subject and optionally template, media, score and\n"
        "x1 y1 .. x5 y5, named in the first line or in that order. Without a template column each\n"
        "image is its own template. A probe whose subject is in no gallery is a stranger, and\n"
        "strangers set the threshold for an FPIR. Galleries are searched separately; their\n"
        "results are averaged.\n\n"
        "example: python -m eval identify runs/a --gallery known.csv --probes seen.csv\n"
        "MegaFace: the probe's mates and the distractors (a subject each) are the gallery."
    )
    session.add_arguments(parser)
    parser.add_argument("--gallery", metavar="TABLE", nargs="+", type=Path, required=True)
    parser.add_argument("--probes", metavar="TABLE", type=Path, required=True)
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="default: the directory of each table"
    )
    pairs_command.add_image_arguments(parser)


def run(args: argparse.Namespace) -> dict | None:
    """Search every gallery; print and return ranks and TPIR.

    Raises:
        UserError, OSError: a table, an image or the model cannot be read.
    """
    tables = [
        text_tables.read_faces(x, args.images, args.landmarks, resize=args.resize)
        for x in (*args.gallery, args.probes)
    ]
    names = [path.stem for path in args.gallery]
    if len(set(names)) < len(names):
        raise UserError(f"two galleries have the same name, in {', '.join(names)}; rename a file")
    work = session.Session(args)
    used = pairs_command.detector(work, tables)
    features = [work.features(faces.images) for faces in tables]
    pooled = []
    for one, faces in zip(features, tables, strict=True):
        if one is not None:
            pooled.append(templates.normalised(pairs_command.pool(one.matrix(), faces, args.norm)))
    if not work.is_first:
        return None
    _warn_of_shared(work, tables[:-1], tables[-1])
    probes = pooled[-1], tables[-1].subjects
    searches = {
        name: identification.search(unit, faces.subjects, *probes)
        for name, unit, faces in zip(names, pooled[:-1], tables[:-1], strict=True)
    }
    contract = work.contract(tables[-1].images, **pairs_command.pooling(args.norm, used))
    result = make_result(
        "identify", args.probes.stem, work, contract | {"tpir": TPIR, "rank": RANK}, searches
    )
    work.save(result)
    show(work, [result])
    return work.output({"sets": {result.name: result.metrics}})


def _warn_of_shared(
    work: session.Session, galleries: list[text_tables.FaceTable], probes: text_tables.FaceTable
) -> None:
    """Says how many probes are images of a gallery: they find themselves with any network."""
    wanted = _paths(probes)
    for gallery in galleries:
        if shared := len(wanted & _paths(gallery)):
            work.warn(
                f"{gallery.images.name}: {count(shared, 'image')} of the probes "
                f"{'is' if shared == 1 else 'are'} in this gallery too, where any network finds "
                f"{'it' if shared == 1 else 'them'}: leave such probes out"
            )


def _paths(faces: text_tables.FaceTable) -> set[str]:
    return {os.path.realpath(os.path.join(faces.images.root, x)) for x in faces.images.paths}


def make_result(
    protocol: str,
    name: str,
    work: session.Session,
    contract: dict[str, object],
    searches: dict[str, identification.Search],
    ranks: tuple[int, ...] = identification.RANKS,
    fpirs: tuple[float, ...] = identification.FPIRS,
) -> Result:
    """The result of one set of probes: of each gallery, and of all where there are several."""
    each = {x: identification.summarise(found, ranks, fpirs) for x, found in searches.items()}
    metrics: dict[str, object] = {"galleries": plain(each)}
    found = list(searches.values())
    metrics["all"] = plain(identification.mean_of(found, ranks, fpirs))
    mated = [x.mated_score[x.mated] for x in found]
    strangers = [x.other_score[~x.mated] for x in found]
    low = min(float(x.min()) for x in (*mated, *strangers) if len(x))
    edges = np.linspace(low, max(1.0, low + 1e-6), results.BINS + 1)
    arrays = {
        "cmc": identification.cmc(found),
        "edges": edges,
        "same": np.histogram(np.concatenate(mated), edges)[0],
        "different": np.histogram(np.concatenate(strangers), edges)[0],
    }
    if all(len(x) for x in strangers):
        arrays["fpir"], arrays["tpir"] = _open_set_curve(found)
    return results.make(protocol, name, work.embedder.facts, contract, metrics, arrays)


def _open_set_curve(
    searches: list[identification.Search], points: int = 200
) -> tuple[NDArray, NDArray]:
    """(FPIR, mean TPIR over the galleries) for the report's curve."""
    finest = 1 / min(int((~found.mated).sum()) for found in searches)
    fpir = np.geomspace(min(finest, 0.5), 1, points)
    tpir = np.zeros(points)
    for found in searches:
        by_x = identification.summarise(found, (), tuple(fpir.tolist()))["tpir_at_fpir"]
        tpir += np.array([by_x[x] for x in fpir.tolist()]) / len(searches)
    return fpir, tpir


def plain(value: Any) -> Any:
    """The value with every dict key as text, as JSON requires."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else f"{key:g}": plain(x) for key, x in value.items()}
    return value


def show(work: session.Session, found: list[Result]) -> None:
    from eval.report import tables

    for result in found:
        work.console.print(tables.as_rich(*tables.search_table(result)))
