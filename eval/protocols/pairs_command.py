"""Verify a list of pairs of your own: two images a pair, or two templates of many images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from eval import roc, templates
from eval.protocols import lfw_command, pair_lists, session, text_tables
from eval.report import results
from eval.report.results import Result

PAIRS = ("first", "second", "same")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "PAIRS is a text table with the columns first, second, same (1 or 0), named in its first\n"
        "line or in that order: paths of images below --images, or, with --templates, names of\n"
        "templates. TEMPLATES has the columns image, template and, where there are any, media,\n"
        "score (a weight, such as the detector's) and x1 y1 .. x5 y5: media are averaged, then\n"
        "summed, as in IJB.\n\n"
        "example: python -m eval pairs model.onnx pairs.csv --images faces\n"
        "YTF: a template a video, a row a frame, all of one media number."
    )
    session.add_arguments(parser)
    parser.add_argument("pairs", metavar="PAIRS", type=Path)
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="default: the directory of the table"
    )
    parser.add_argument("--templates", metavar="TEMPLATES", type=Path)
    add_image_arguments(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for aligning and pooling the images of a table."""
    parser.add_argument(
        "--landmarks",
        metavar="FILE|DIR",
        type=Path,
        help="align the images by these, as in `eval lfw`; default: they are aligned, 112 x 112",
    )
    parser.add_argument(
        "--no-norm",
        dest="norm",
        action="store_false",
        help="L2-normalise each image's embedding before pooling; default: its norm weights it",
    )


def run(args: argparse.Namespace) -> dict | None:
    """Rates of the pairs; with ten and more pairs of images also the ten-fold accuracy.

    Raises:
        UserError, OSError: a table, an image or the model cannot be read.
    """
    table = text_tables.read(args.pairs, PAIRS, PAIRS)
    for row, label in enumerate(table.columns["same"]):
        if label not in ("0", "1"):
            raise UserError(f"{table.where(row)}: same is {label!r}, neither 0 nor 1")
    issame = np.array(table.columns["same"]) == "1"
    if issame.all() or not issame.any():
        raise UserError(
            f"{args.pairs} holds only same or only different pairs: verification needs both"
        )
    if args.templates is not None:
        return _of_templates(args, table, issame)
    if len(issame) < 10:
        raise UserError(f"{args.pairs}: {len(issame)} pairs; at least 10 are needed")
    from eval.protocols import score_pairs

    pairs = _of_images(args, table, issame)
    work = session.Session(args)
    features = work.features(pairs.images)
    if features is None:
        return None
    result = score_pairs.verify(work, pairs, features, "pairs")
    work.save(result)
    return lfw_command.finish(work, [result], None)


def _of_images(
    args: argparse.Namespace, table: text_tables.Table, issame: NDArray[np.bool_]
) -> pair_lists.ListedPairs:
    from eval.embedders.images import Files

    base = args.images or args.pairs.parent
    numbers: dict[str, int] = {}
    first, second = (
        np.array([numbers.setdefault(text, len(numbers)) for text in table.columns[side]])
        for side in ("first", "second")
    )
    absent = [text for text in numbers if not files.is_file(base / text)]
    if absent:
        row = next(
            i
            for i in range(len(issame))
            if absent[0] in (table.columns["first"][i], table.columns["second"][i])
        )
        raise FileNotFoundError(
            f"{table.where(row)}: no image {base / absent[0]}; "
            f"{len(absent)} of {len(numbers)} are absent"
        )
    paths = list(numbers)
    points = pair_lists.points_of(paths, args.landmarks)
    images = Files(args.pairs.stem, base, paths, points, args.resize)
    return pair_lists.ListedPairs(args.pairs.stem, images, first, second, issame)


def _of_templates(
    args: argparse.Namespace, table: text_tables.Table, issame: NDArray[np.bool_]
) -> dict | None:
    faces = text_tables.read_faces(
        args.templates, args.images, args.landmarks, ("image", "template"), args.resize
    )
    numbers = {name: number for number, name in enumerate(faces.names)}
    from eval.protocols import score_pairs

    sides = []
    for side in ("first", "second"):
        for row, name in enumerate(table.columns[side]):
            if name not in numbers:
                raise UserError(f"{table.where(row)}: no template {name!r} in {args.templates}")
        sides.append(np.array([numbers[name] for name in table.columns[side]]))
    work = session.Session(args)
    used = detector(work, [faces])
    features = work.features(faces.images)
    if features is None:
        return None
    pooled = pool(features.matrix(), faces, args.norm)
    unit = templates.normalised(pooled)
    score_pairs.warn_of_itself(work, args.pairs.stem, int((sides[0] == sides[1]).sum()), "template")
    scores = templates.pair_scores(unit, sides[0], sides[1])
    points = roc.curve(scores, issame)
    quality = np.linalg.norm(pooled, axis=1)[np.stack(sides)].min(axis=0)
    metrics = {
        "pairs": len(issame),
        "templates": len(unit),
        "images": len(faces.images),
        **results.pair_metrics(points),
    }
    if features.flip and not work.adds_mirror():
        alone = templates.normalised(pool(features.alone().matrix(), faces, args.norm))
        alone_scores = templates.pair_scores(alone, sides[0], sides[1])
        metrics["alone"] = results.alone_metrics(roc.curve(alone_scores, issame))
    contract = work.contract(faces.images, **pooling(args.norm, used))
    arrays = results.pair_arrays(points, scores, issame, quality)
    result = results.make(
        "templates", args.pairs.stem, work.embedder.facts, contract, metrics, arrays
    )
    work.save(result)
    show(work, [result])
    return work.output({"sets": {result.name: metrics}})


def pool(matrix: np.ndarray, faces: text_tables.FaceTable, keep_norm: bool) -> np.ndarray:
    """[T, D] templates, not normalised."""
    x = matrix if keep_norm else templates.normalised(matrix)
    return templates.pool(x, faces.template, faces.media, _weights(faces)[0])[1]


def _weights(faces: text_tables.FaceTable) -> tuple[np.ndarray | None, int]:
    """The weight of each image, None where there are no scores; how many are 0."""
    if faces.score is None:
        return None, 0
    return templates.detector_weights(faces.score, faces.template, faces.names.__getitem__)


def detector(work: session.Session, tables: Sequence[text_tables.FaceTable]) -> str:
    """How the scores of these tables are used, for the contract; before the work.

    Raises:
        ValueError: a template without a score above 0.
    """
    zero = {faces.images.name: _weights(faces)[1] for faces in tables if faces.score is not None}
    if not zero:
        return "D0: not used"
    way_on = "leave the column out"
    rules = [detector_rule(work, name, number, way_on) for name, number in zero.items()]
    return "D1: " + next((rule for rule in rules if "images" in rule), rules[0])


def detector_rule(work: session.Session, name: str, zero: int, way_on: str) -> str:
    """The rule for the contract; says how many images it leaves out."""
    if not zero:
        return "its score is a weight"
    work.warn(
        f"{name}: {count(zero, 'image')} with a detector score of 0 or less: the weight is 0, "
        f"which leaves them out of their templates ({way_on} to count all alike)"
    )
    return f"its score is a weight, 0 for the {zero} images whose score is 0 or less"


def pooling(keep_norm: bool, detector: str) -> dict[str, object]:
    return {
        "norm": "N1: kept, a weight" if keep_norm else "N0: each image L2-normalised",
        "detector": detector,
        "template": "sum over media of the mean over a medium's images, then L2-normalised",
        "score": "dot product of templates, float64",
        "far_rules": results.RULES,
    }


def show(work: session.Session, found: list[Result]) -> None:
    from eval.report import tables

    for result in found:
        work.console.print(tables.as_rich(*tables.far_table(result)))
