"""Faces of the classes of a trained head, or of embeddings, by gradients and BatchNorm statistics.

    python -m recognition.inversion RUN --out DIR                    256 classes drawn by the seed
    python -m recognition.inversion RUN --out DIR --ids 0-63
    python -m recognition.inversion RUN --out DIR --embeddings FILE.npy
    torchrun --nproc-per-node 8 -m recognition.inversion RUN --out DIR --count 5000

Several processes share the batches. The same line again goes on where a killed run was. Defaults
are those of the ArcFace paper, which took a GPU; on a CPU: --steps 200 --batch-size 32.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from data_tools.common.errors import UserError
from data_tools.common.schema import from_flags
from recognition.inversion import plan as plans
from recognition.inversion.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run or checkpoint directory, or a backbone file (open set)"
    )
    parser.add_argument(
        "--embeddings", metavar="FILE",
        help="open set: an .npy [N, D], or an .npz with embeddings and maybe labels",
    )  # fmt: skip
    parser.add_argument(
        "--images", metavar="PATH",
        help="open set: the embeddings of these images; shards, a .bin or a folder. With "
        "--embeddings the images that they are of",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="PATH",
        help="closed set: the data that the run was trained on, to measure with; default: where "
        "its config says",
    )  # fmt: skip
    parser.add_argument("--head", type=int, default=0, metavar="K", help="of several heads (0)")
    plans.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Make the images, measure them, write report.json; None in other processes than the first."""
    from recognition.distributed import runtime
    from recognition.inversion import measure, pictures, work

    settings, every = from_flags(Settings, args), plans.every_of(args)
    if args.embeddings is not None or args.images is not None:
        if args.data is not None:
            raise UserError("--data goes with classes; real images of embeddings: --images")
        plan = plans.open_set(args, settings, args.images)
    else:
        plan = plans.closed_set(args, settings)
    work.check_settings(args.out, plan.facts)
    plans.check_networks(args)
    with runtime.start(plans.TIMEOUT) as here:
        make(plan, args, here, every)
        if here.rank != 0:
            return None
        report = {
            "kind": plan.facts["kind"],
            "network": plan.facts["network"],
            "settings": plan.facts["settings"],
            "prior": prior_told(plan),
            "loss": work.terms_of(args.out, len(plan.batches)),
            **measure.measure(plan, args.out, args.other, args.fid),
        }
        pixels = np.stack([pictures.read(p) for p in measure.made_of(plan, args.out).paths[:64]])
        pictures.write(args.out / "grid.png", pictures.grid(pixels))
        report |= plan.faces.facts() if plan.faces is not None else {}
        work.write_json(args.out / "report.json", report)
        print("\n".join(measure.sentences(report)))
        print(f"{len(plan.ids)} faces in {args.out}, report.json and grid.png beside them")
        return {"path": str(args.out), **report}


def make(plan: plans.Plan, args: argparse.Namespace, here: Any, every: Any) -> None:
    """The images of a plan, by all processes."""
    from recognition.inversion import work

    if here.rank == 0:
        if told := prior_told(plan):
            print(f"note: {told}", file=sys.stderr)
        if here.world > len(plan.batches):
            print(
                f"note: {len(plan.batches)} batches for {here.world} processes: a smaller "
                "--batch-size or more identities would keep all of them busy",
                file=sys.stderr,
            )
    with work.directory(args.out, plan.facts, here):
        work.synthesise(
            plan.embedder.module, plan.identity(here), plan.batches, plan.names, plan.settings,
            args.out, here, every,
        )  # fmt: skip


def prior_told(plan: plans.Plan) -> str | None:
    """Where the prior is off, why; None where it is on."""
    from recognition.inversion.prior import BnPrior

    prior = BnPrior(plan.embedder.module, last=plan.settings.bn_last)
    prior.remove()
    if not prior.layers:
        return (
            "this network has no BatchNorm over images: the prior is off, nothing but smoothness "
            "and length keeps the images near to faces"
        )
    return "bn_weight is 0: the prior is off" if plan.settings.bn_weight == 0 else None
