"""RFW: the accuracy of four groups of people, and their error rates at one shared threshold.

DIR holds test/data/GROUP/PERSON/*.jpg and test/txts/GROUP/GROUP_pairs.txt and GROUP_lmk.txt. The
images are aligned by the listed points; with --aligned DIR, images that are aligned already are
taken from DIR/GROUP/PERSON."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.common import files
from data_tools.common.errors import UserError
from eval import roc, verification
from eval.protocols import pair_lists, session
from eval.protocols.score_pairs import ACCURACY
from eval.report import results

GROUPS = ("African", "Asian", "Caucasian", "Indian")
SHARED = (
    "FMR and FNMR: shares of different pairs accepted and of same pairs rejected at one threshold "
    "for all groups, the lowest at which the different pairs of all groups together have an FMR of "
    "at most the target; accept where the cosine is at least the threshold"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m eval rfw runs/a RFW --fmr 1e-3"
    session.add_arguments(parser)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--aligned", metavar="DIR", type=Path)
    parser.add_argument("--fmr", type=float, default=1e-3, metavar="X", help="default %(default)s")


def run(args: argparse.Namespace) -> dict | None:
    """Verify the four groups; print and return the fairness report.

    Raises:
        UserError, OSError: a list, an image or the model cannot be read.
    """
    if not 0 < args.fmr < 1:
        raise UserError(f"--fmr {args.fmr:g}: it must be between 0 and 1")
    sets = {group: _read(args, group) for group in GROUPS}
    work = session.Session(args)
    for pairs in sets.values():
        for note in pairs.notes:
            work.warn(note)
    features = {group: work.features(pairs.images) for group, pairs in sets.items()}
    if not work.is_first:
        return None
    distance, missing = {}, 0
    for group, pairs in sets.items():
        found = features[group]
        assert found is not None
        distance[group] = verification.pair_distances(
            found.matrix(np.float64), pairs.first, pairs.second
        )
        missing += len(pairs.missing)
        if pairs.missing:
            work.warn(
                f"{group}: {len(pairs.missing)} pairs left out, an image is absent; the "
                f"first: {pairs.missing[0]}"
            )
    result = _fairness(work, sets, distance, args.fmr)
    result.metrics["missing"] = missing
    work.save(result)
    from eval.report import tables

    work.console.print(tables.as_rich(*tables.fairness_table(result)))
    return work.output({"sets": {"RFW": result.metrics}})


def _read(args: argparse.Namespace, group: str) -> pair_lists.ListedPairs:
    lists = args.directory / "test" / "txts" / group
    images = (args.aligned or args.directory / "test" / "data") / group
    landmarks = None if args.aligned else lists / f"{group}_lmk.txt"
    for path in (lists / f"{group}_pairs.txt", landmarks):
        if path is not None and not files.is_file(path):
            raise FileNotFoundError(f"{path} is missing; request RFW from whdeng.cn/RFW")
    pairs = pair_lists.load_list(lists / f"{group}_pairs.txt", images, landmarks, args.resize)
    if pairs.issame.all() or not pairs.issame.any():
        raise UserError(f"{lists} holds only same or only different pairs: verification needs both")
    return pairs._replace(name=group)


def _fairness(
    work: session.Session,
    sets: dict[str, pair_lists.ListedPairs],
    distance: dict[str, NDArray],
    target: float,
) -> results.Result:
    cosine = {group: 1 - d / 2 for group, d in distance.items()}
    together = np.concatenate(list(cosine.values()))
    issame = np.concatenate([pairs.issame for pairs in sets.values()])
    points = roc.curve(together, issame)
    tar, far, threshold = (float(x[0]) for x in roc.points_on(points, [target]))
    if not np.isfinite(threshold):
        raise UserError(
            f"no threshold has an FMR of {target:g} or less: the highest score is a "
            "different pair's; take a larger --fmr"
        )
    groups, arrays = {}, results.pair_arrays(points, together, issame)
    for group, pairs in sets.items():
        accepted = cosine[group] >= threshold
        facts = verification.evaluate_distances(distance[group], pairs.issame)
        groups[group] = {
            "pairs": len(accepted),
            **{key: facts[key] for key in ("accuracy_mean", "accuracy_std", "auc", "eer")},
            "fmr": float(np.mean(accepted[~pairs.issame])),
            "fnmr": float(np.mean(~accepted[pairs.issame])),
        }
        own = results.thinned(roc.curve(cosine[group], pairs.issame))
        arrays |= {f"far {group}": own[0], f"tar {group}": own[1]}
    accuracy = np.array([part["accuracy_mean"] for part in groups.values()])
    metrics = {
        "groups": groups,
        "pairs": len(together),
        "fmr_target": target,
        "threshold": threshold,
        "fmr": far,
        "fnmr": 1 - tar,
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_spread": float(accuracy.std()),  # between groups, ddof 0
        "skewed_error_ratio": _ratio(1 - accuracy),  # the largest over the smallest
        "fmr_ratio": _ratio([part["fmr"] for part in groups.values()]),
        "fnmr_ratio": _ratio([part["fnmr"] for part in groups.values()]),
    }
    contract = work.contract(
        next(iter(sets.values())).images,
        score="cosine of the L2-normalised embeddings",
        accuracy=ACCURACY,
        fairness=SHARED,
    )
    return results.make("rfw", "RFW", work.embedder.facts, contract, metrics, arrays)


def _ratio(values: Iterable[float]) -> float | None:
    """Largest over smallest; None where the smallest is zero."""
    ordered = sorted(values)
    low, high = float(ordered[0]), float(ordered[-1])
    return high / low if low > 0 else None
