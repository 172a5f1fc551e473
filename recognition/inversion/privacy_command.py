"""What the embeddings of a set give away: each is inverted, and the faces tried as the persons.

    python -m recognition.inversion privacy RUN --out DIR --data SHARDS [--other MODEL]
    python -m recognition.inversion privacy RUN --out DIR --embeddings FILE.npy

The faces in OUT/images look like the people whose embeddings they are of: treat them as personal
data, and remove them when the report is there (--remove-images).
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from data_tools.common.errors import UserError
from data_tools.common.schema import from_flags
from recognition.inversion import plan as plans
from recognition.inversion.settings import Settings
from recognition.inversion.synthesise_command import make, prior_told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run or checkpoint directory, or a backbone file"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="shards, a .bin, or a folder <identity>/*.jpg"
    )
    parser.add_argument(
        "--embeddings", metavar="FILE",
        help="an .npy [N, D] or .npz, of the images of --data where both are given",
    )  # fmt: skip
    parser.add_argument(
        "--far", type=float, nargs="+", default=[1e-2, 1e-3], metavar="X", help="(0.01 0.001)"
    )
    parser.add_argument(
        "--remove-images", action="store_true", help="keep the report alone when all is measured"
    )
    plans.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Invert, measure, write report.json; None in other processes than the first."""
    from recognition.distributed import runtime
    from recognition.inversion import measure, privacy, work

    settings, every = from_flags(Settings, args), plans.every_of(args)
    if wrong := [far for far in args.far if not 0 < far < 1]:
        raise UserError(f"--far {wrong[0]}: between 0 and 1")
    plan = plans.open_set(args, settings, args.data)
    work.check_settings(args.out, plan.facts)
    plans.check_networks(args)
    with runtime.start(plans.TIMEOUT) as here:
        make(plan, args, here, every)
        if here.rank != 0:
            return None
        report = {
            "kind": "privacy",
            "set": args.data or args.embeddings,
            "network": plan.facts["network"],
            "settings": plan.facts["settings"],
            "prior": prior_told(plan),
            "loss": work.terms_of(args.out, len(plan.batches)),
            **privacy.measure(plan, args.out, args.other, args.far),
            "bn_distance": measure.bn_distances(plan, measure.made_of(plan, args.out)),
        }
        if args.fid is not None:
            report["fid"] = measure.fid_of(plan, measure.made_of(plan, args.out), args.fid)
        report["text"] = privacy.sentences(report)
        report |= plan.faces.facts() if plan.faces is not None else {}
        work.write_json(args.out / "report.json", report)
        if args.remove_images:
            for name in ("images", "progress", "state"):
                shutil.rmtree(args.out / name)
        print("\n".join(report["text"]))
        print(f"written: {args.out / 'report.json'}")
        return {"path": str(args.out), **report}
