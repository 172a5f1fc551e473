"""Faces of the classes of a trained head, or of embeddings, by gradients and BatchNorm statistics.

    python -m recognition.inversion RUN --out DIR                    256 classes drawn by the seed
    python -m recognition.inversion RUN --out DIR --ids 0-63
    python -m recognition.inversion RUN --out DIR --embeddings FILE.npy
    torchrun --nproc-per-node 8 -m recognition.inversion RUN --out DIR --count 5000

Several processes share the batches. The same command resumes a run that was killed. The defaults
are the ArcFace paper's, for a GPU; on a CPU: --steps 200 --batch-size 32.
"""

from __future__ import annotations

import argparse
from typing import Any

from data_tools.common.errors import UserError
from data_tools.common.schema import from_flags
from recognition.inversion import pictures
from recognition.inversion import plan as plans
from recognition.inversion.measure import InvertedImages, measure, sentences
from recognition.inversion.session import invert
from recognition.inversion.settings import Request, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run or checkpoint directory, or a backbone file (open set)"
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE",
        help="open set: an .npy [N, D], or an .npz with embeddings and maybe labels",
    )
    parser.add_argument(
        "--images",
        metavar="PATH",
        help="open set: the embeddings of these images; shards, a .bin or a folder. With "
        "--embeddings, the images that these belong to",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="closed set: the data that the run was trained on, to measure with; default: the path "
        "in its config",
    )
    parser.add_argument(
        "--head", type=int, default=0, metavar="K", help="which of several heads (0)"
    )
    plans.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Make the images, measure them, write report.json; None in other processes than the first."""
    settings = from_flags(Settings, args)
    from_flags(Request, args)  # a wrong value is refused before the network is read
    if args.embeddings is not None or args.images is not None:
        if args.data is not None:
            raise UserError("--data goes with classes; real images of embeddings: --images")
        plan = plans.open_set(args, settings, args.images)
    else:
        plan = plans.closed_set(args, settings)

    def measured(made: InvertedImages) -> tuple[dict[str, Any], str]:
        report = measure(plan, made, args.other, args.fid)
        pictures.write(args.out / "grid.png", pictures.grid(made.pixels(made.paths[:64])))
        files_line = f"{len(plan.ids)} faces in {args.out}, report.json and grid.png beside them"
        return {"kind": plan.facts["kind"], **report}, "\n".join([*sentences(report), files_line])

    return invert(plan, args, measured)
