"""What the embeddings of a set reveal: invert each, and test the faces as the persons.

    python -m recognition.inversion privacy RUN --out DIR --data SHARDS [--other MODEL]
    python -m recognition.inversion privacy RUN --out DIR --embeddings FILE.npy

The faces in OUT/images look like the people of the embeddings: treat them as personal data, and
remove them when the report is written (--remove-images).
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from data_tools.common.errors import UserError
from data_tools.common.schema import from_flags
from recognition.inversion import measure, privacy, work
from recognition.inversion import plan as plans
from recognition.inversion.measure import InvertedImages
from recognition.inversion.session import invert
from recognition.inversion.settings import Request, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run or checkpoint directory, or a backbone file"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="shards, a .bin, or a folder <identity>/*.jpg"
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE",
        help="an .npy [N, D] or .npz; with --data, the embeddings of its images",
    )
    parser.add_argument(
        "--far", type=float, nargs="+", default=[1e-2, 1e-3], metavar="X", help="(0.01 0.001)"
    )
    parser.add_argument(
        "--remove-images", action="store_true", help="keep only the report at the end"
    )
    plans.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Invert, measure, write report.json; None in other processes than the first."""
    settings = from_flags(Settings, args)
    from_flags(Request, args)  # a wrong value is refused before the network is read
    if wrong := [far for far in args.far if not 0 < far < 1]:
        raise UserError(f"--far {wrong[0]}: between 0 and 1")
    plan = plans.open_set(args, settings, args.data)

    def measured(made: InvertedImages) -> tuple[dict[str, Any], str]:
        report = {
            "kind": "privacy",
            "set": args.data or args.embeddings,
            **privacy.measure(plan, made, args.other, args.far),
            "bn_distance": measure.bn_distances(plan, made),
        }
        if args.fid is not None:
            report["fid"] = measure.fid_of(plan, made, args.fid)
        report["text"] = privacy.sentences(report)
        return report, "\n".join([*report["text"], f"written: {args.out / 'report.json'}"])

    report = invert(plan, args, measured)
    if report is not None and args.remove_images:
        for name in work.DIRECTORIES:
            shutil.rmtree(args.out / name)
    return report
