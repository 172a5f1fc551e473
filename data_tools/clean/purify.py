"""`purify`: sub-center ArcFace's automatic dropping of wrong images (ECCV 2020; TPAMI 2022, 4.1).

From a run trained with num_subcenters=K on this set. Every image votes for the nearest of its
class's K centres; the one with most votes (the lowest of equals) is dominant; an image stays if its
cosine to the dominant centre is above cos(--threshold), 75 degrees by default. Identities for
which no image stays vanish, the others are numbered densely. Nothing is applied: the decision is a
relabel index; `relabel` puts it in force. Then train again from scratch with num_subcenters=1.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools import relabel, shards
from data_tools.clean.contact_sheet import face, write_sheet
from data_tools.clean.features import FeatureStore
from data_tools.common import cli
from data_tools.common.errors import UserError
from data_tools.common.messages import count
from data_tools.common.networks import Centres, networks
from data_tools.common.parallel import Advance, Tasks, run_tasks
from data_tools.decisions import before_cleaning, write_decision

_CLASSES = 8192  # classes whose centres are in memory at a time
_SHOWN = 100  # faces on the sheet


def dominant_cosines(
    x: np.ndarray,  # float32 [n, D] normalised
    labels: np.ndarray,  # int64 [n] in [0, c)
    centres: np.ndarray,  # float32 [c, K, D] normalised
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each image to its class's dominant centre [n], and the votes int64 [c, K]."""
    cos = np.empty((len(x), centres.shape[1]), np.float32)
    for k in range(centres.shape[1]):
        cos[:, k] = np.einsum("nd,nd->n", x, centres[labels, k])
    votes = np.zeros(centres.shape[:2], np.int64)
    np.add.at(votes, (labels, cos.argmax(1)), 1)
    return cos[np.arange(len(x)), votes.argmax(1)[labels]], votes


class _Range(NamedTuple):
    """The images of some neighbouring classes, for a process of its own."""

    features: FeatureStore
    centres: Centres
    classes: tuple[int, int]
    images: np.ndarray  # int64 [n] in the set without any cleaning
    labels: np.ndarray  # int64 [n] less the first class


def cosines(
    data: shards.Shards, features: FeatureStore, centres: Centres, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image the cosine to the dominant centre [M]; images that voted for it [C]."""
    order, ends = data.by_class()
    numbers = before_cleaning(data)
    ranges = list(_ranges(data.num_classes))
    tasks = Tasks(
        len(ranges),
        (
            _Range(features, centres, (start, stop), numbers[mine], data.labels[mine] - start)
            for start, stop in ranges
            for mine in [order[ends[start] : ends[stop]]]
        ),
    )
    found = run_tasks(_of_range, tasks, workers, len(data), "angles")
    result = np.empty(len(data), np.float32)
    result[order] = np.concatenate([cos for cos, _ in found])
    return result, np.concatenate([votes for _, votes in found])


def _of_range(task: _Range, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
    x = task.features.unit(task.images)
    cos, votes = dominant_cosines(x, task.labels, task.centres.rows(*task.classes))
    advance(len(x))
    return cos, votes.max(1)


def _ranges(num_classes: int) -> Iterator[tuple[int, int]]:
    return ((s, min(s + _CLASSES, num_classes)) for s in range(0, num_classes, _CLASSES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="the data set that the run was trained on")
    parser.add_argument("run", type=Path, help="a run trained with num_subcenters=3, or checkpoint")
    parser.add_argument("features", type=Path, help="what `embed PATH RUN FEATURES` made")
    parser.add_argument("out", type=Path, help="relabel index to write")
    parser.add_argument(
        "--threshold", type=float, default=75.0, help="degrees (default %(default)s)"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="angles.png and dropped.png")
    parser.add_argument(
        "--head",
        type=int,
        default=0,
        metavar="K",
        help="which head of a run with rec_heads (default %(default)s)",
    )
    cli.add_workers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not 0 < args.threshold < 180:
        raise UserError(f"--threshold {args.threshold}: degrees between 0 and 180")
    data = shards.open(args.path)
    features = FeatureStore(args.features, data.fingerprint)
    centres: Centres = networks().Centres(args.run, args.head)
    if centres.num_classes != data.num_classes or centres.size != features.size:
        raise UserError(
            f"{centres.path} has {centres.num_classes} classes of size {centres.size}, {args.path} "
            f"has {data.num_classes} and {args.features} size {features.size}: "
            f"they do not belong together"
        )
    cos, dominant = cosines(data, features, centres, args.workers)
    keep = cos > np.float32(np.cos(np.radians(args.threshold)))
    if not keep.any():
        raise UserError(f"no image is within {args.threshold} degrees: is the run trained?")
    new = np.where(keep, data.labels, relabel.DROP)
    write_decision(args.out, data, new)
    left = len(np.unique(new[keep]))
    dropped = int((~keep).sum())
    angles = np.degrees(np.arccos(np.clip(cos, -1, 1)))
    histogram = np.histogram(angles, bins=np.arange(0, 181, 5))[0].tolist()
    if args.report:
        _report(args.report, data, angles, keep, args.threshold)
    print(
        f"{args.out}: {dropped} of {count(len(data), 'image')} to drop "
        f"({100 * dropped / len(data):.2f} %), {data.num_classes - left} of {data.num_classes} "
        f"classes with them; `python -m data_tools relabel {args.path} {args.out}` applies it"
    )
    return {
        "relabel": str(args.out),
        "checkpoint": str(centres.path),
        "images": len(data),
        "dropped": dropped,
        "classes": data.num_classes,
        "classes_left": left,
        "num_subcenters": centres.num_subcenters,
        "threshold_degrees": args.threshold,
        "voted_for_dominant": int(dominant.sum()),
        "angle_histogram_5_degrees": histogram,
    }


def _report(
    out: Path, data: shards.Shards, angles: np.ndarray, keep: np.ndarray, threshold: float
) -> None:
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.hist(angles, bins=np.arange(0, 181, 2).tolist())
    axes.axvline(threshold, color="black")
    axes.set(xlabel="angle to the dominant centre (degrees)", ylabel="images")
    figure.savefig(out / "angles.png")
    dropped = np.flatnonzero(~keep)
    shown = dropped[np.linspace(0, len(dropped) - 1, min(_SHOWN, len(dropped))).astype(int)]
    if len(shown):
        titles = [f"{data.labels[i]} {angles[i]:.0f}deg" for i in shown]
        write_sheet(out / "dropped.png", [face(data, i) for i in shown], titles)
