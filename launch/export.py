"""`python launch/export.py RUN OUT.onnx`: a trained network as a checked ONNX file."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_tools import shards
from data_tools.common import cli, files
from data_tools.common.errors import UserError
from data_tools.images.decode import decode
from data_tools.images.template import TEMPLATE
from data_tools.verification_bin import PairSet, load_bin
from eval.embedders.embed_onnx import OnnxEmbedder
from eval.protocols import drop, session, thresholds_command
from eval.report import results
from recognition.checkpoint import find, load_backbone, read_manifest
from recognition.export.parity import LIMITS, ExportError, ParityLimits
from recognition.export.quantise import NUM_CALIBRATION, PRECISIONS
from recognition.export.to_onnx import GraphOptions, Images, export_onnx
from recognition.weights.networks import TorchEmbedder

NUM_EXAMPLES = 32
MOST_PAIRS = 1000
_RECIPE = (
    "margin",
    "margin_args",
    "sample_rate",
    "num_subcenters",
    "optimizer",
    "lr",
    "schedule",
    "num_epochs",
    "max_steps",
    "init_from",
    "seed",
)

DESCRIPTION = """\
Write the network of a run as an ONNX file: input `input` float32 [batch, 3, 112, 112], RGB,
(pixel - 127.5) / 127.5, output `embedding` float32 [batch, D], not normalised, any batch. The file
takes its name only after ONNX Runtime has agreed with torch on batches of 1, 2, 7 and 32 images of
the run's data set (seeded noise where that set is not on this machine), and after the pairs of a
verification set have shown how much accuracy and TAR are lost; beyond the precision's limit nothing
is left and the exit code is 1. The measurements are in OUT.export.json, beside the file, and in
its metadata, together with how to feed it and, where `python -m eval thresholds` has chosen them,
the scores from which to accept."""


@cli.on_one_line(ExportError)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the checked file is in place, 1 otherwise."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "run", metavar="RUN", help="run directory (newest checkpoint) or checkpoint"
    )
    parser.add_argument("out", metavar="OUT.onnx", type=Path, help="file to write")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="fp16 keeps nodes with large values in fp32; int8 has its ranges from "
        f"{NUM_CALIBRATION} images of the data set (default: fp32)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="shards to check and calibrate on (default: the run's)"
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE.bin",
        type=Path,
        help="verification set (default: the run's first val_target, else any .bin of its data)",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="the faces of both are aligned at another size than 112 x 112: resize them",
    )
    parser.add_argument(
        "--max-pairs",
        type=int,
        default=MOST_PAIRS,
        metavar="N",
        help=f"spread over the set (default: {MOST_PAIRS}; 0: do not verify)",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="of accuracy and of TAR that may be lost, in hundredths (default: "
        + ", ".join(f"{p} {x.accuracy_drop:g} and {x.tar_drop:g}" for p, x in LIMITS.items())
        + ")",
    )
    baked = parser.add_argument_group("what the graph does beside the network")
    baked.add_argument(
        "--normalise",
        action="store_true",
        help="take pixels 0..255; two nodes are named so that InsightFace's client sees it",
    )
    baked.add_argument("--flip-sum", action="store_true", help="e(image) + e(mirror image)")
    baked.add_argument("--l2", action="store_true", help="embeddings of length 1")
    parser.add_argument(
        "--data-licence",
        metavar="TEXT",
        default="not stated",
        help="of the training images, for the metadata: a model may not be free where they are not",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    args = parser.parse_args(argv)
    with Console(stderr=True).status(f"exporting {args.run}") as status:
        report = export_run(args, status.update)
    print(summary(report))
    if args.json:
        print(json.dumps(report))
    return 0


def summary(report: dict[str, Any]) -> str:
    cosine = report["cosine"]
    lines = [
        f"{report['path']}: {report['precision']}, {report['bytes'] / 2**20:.1f} MiB, opset "
        f"{report['opset']}",
        f"  cosine with torch on {report['checked_on']}: least {cosine['min']:.6f}, 1 % below "
        f"{cosine['p1']:.6f}, median {cosine['median']:.6f}",
    ]
    lost = report.get("verification")
    if lost is None:
        lines.append("  no verification set: what is lost in accuracy was not measured")
    else:
        lines.append(
            f"  {lost['pairs']} of the {lost['of_pairs']} pairs of {lost['set']}, "
            f"{lost['embedding']} (`eval lfw` takes all pairs and, without --no-flip, "
            f"{results.FLIP_SUM}): accuracy "
            f"{100 * lost['torch']['accuracy']:.2f} -> {100 * lost['file']['accuracy']:.2f} %, "
            + (
                "too few pairs for TAR"
                if lost["far"] >= 1
                else f"TAR at FAR {lost['far']:g} {100 * lost['torch']['tar']:.2f} -> "
                f"{100 * lost['file']['tar']:.2f} %"
            )
        )
    return "\n".join(lines)


def export_run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Export as the arguments say; the report of export_onnx, also written to OUT.export.json."""
    check(args)
    found = find(args.run)
    module, config = load_backbone(found)
    rec = args.data or (config["rec"] if isinstance(config["rec"], str) else config["rec"][0])
    resize = args.resize or bool(config.get("resize"))
    if not files.is_dir(rec):
        relative = "" if Path(rec).is_absolute() else f" below {Path.cwd()}"
        print(
            f"warning: the run's data, {rec}, are not here{relative}: no image and no pair of them "
            "is compared. Name their directory by --data DIR",
            file=sys.stderr,
        )
    calibration = None
    if args.precision == "int8":
        calibration = images_of(rec, NUM_CALIBRATION, 0.0, resize)
        if calibration is None:
            raise UserError(f"int8 sets its ranges on images, and {rec} is not here: --data DIR")
    graph_options = GraphOptions(args.normalise, args.flip_sum, args.l2)
    limits = LIMITS[args.precision]
    whole = pairs_of(args, config, rec)

    def verify(path: Path) -> dict[str, Any]:
        assert whole is not None
        pairs = drop.thinned(whole, args.max_pairs)
        lost = accuracy_lost(pairs, module, path, graph_options, limits, args.max_drop, say, resize)
        return lost | {
            "of_pairs": len(whole.issame),
            "embedding": results.FLIP_SUM if graph_options.flip_sum else results.ALONE,
        }

    metadata = {
        "network": config["network"],
        "margin": config["margin"],
        "recipe": json.dumps({key: config[key] for key in _RECIPE if key in config}),
        "commit": config["commit"] or "unknown",  # trained outside a git checkout
        "alignment": ";".join(f"{x:.4f},{y:.4f}" for x, y in TEMPLATE),  # five points, x,y
        **_data(config, args.data_licence),
        **_weights(str(found), Path(args.run), graph_options),
    }
    report = export_onnx(
        module,
        args.out,
        metadata=metadata,
        example_images=images_of(rec, NUM_EXAMPLES, 0.5, resize),
        precision=args.precision,
        graph_options=graph_options,
        calibration_images=calibration,
        verify=None if whole is None else verify,
    )
    files.write_text(args.out.with_suffix(".export.json"), json.dumps(report, indent=1) + "\n")
    return report


def check(args: argparse.Namespace) -> None:
    """Raises: ValueError for what cannot be asked, OSError for an output that cannot be."""
    if args.out.suffix != ".onnx":
        raise UserError(f"{args.out}: name the output *.onnx, by which readers know it")
    if not files.is_dir(args.out.parent):
        raise OSError(f"cannot write {args.out}: {args.out.parent} is not a directory")
    if args.data and not files.is_dir(args.data):
        raise FileNotFoundError(f"--data {args.data}: no such directory")
    if args.max_pairs < 0:
        raise UserError(f"--max-pairs {args.max_pairs}: 0 (do not verify) or more")
    if args.max_drop is not None and not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop {args.max_drop}: points, from 0 to 100")


def accuracy_lost(
    pairs: PairSet,
    module: Any,
    path: Path,
    graph_options: GraphOptions,
    limits: ParityLimits,
    max_drop: float | None,
    say: Callable[[str], None],
    resize: bool = False,
) -> dict[str, Any]:
    """eval.protocols.drop.compare of the network and its file. Raises: ExportError beyond the
    limits."""
    if pairs.issame.all() or not pairs.issame.any():
        raise UserError(
            f"{pairs.name}: its {len(pairs.issame)} pairs are all of one kind, which shows no "
            "loss: give --pairs with pairs of one person and of two, or --max-pairs 0"
        )
    network = TorchEmbedder(module, {"path": str(path)}, "")

    def torch_embeddings(images: np.ndarray) -> np.ndarray:
        embeddings = network(images)
        if graph_options.flip_sum:
            embeddings = embeddings + network(np.ascontiguousarray(images[:, :, ::-1]))
        return embeddings

    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        say(f"verifying on {pairs.name}: {done} of {len(pairs.encoded)} images")

    lost = drop.compare(
        torch_embeddings, OnnxEmbedder(path), pairs, progress=progress, resize=resize
    )
    for name, most in (("accuracy", limits.accuracy_drop), ("tar", limits.tar_drop)):
        allowed = most if max_drop is None else max_drop
        # A set of few pairs moves by steps: one pair of a kind is not a loss that can be told.
        step = 100 / min(pairs.issame.sum(), (~pairs.issame).sum())
        if not lost[f"{name}_drop"] <= max(allowed, step) + 1e-9:  # NaN too
            raise ExportError(
                f"{lost[f'{name}_drop']:.2f} points of {name} are lost on {lost['pairs']} pairs "
                f"of {lost['set']}, allowed are {max(allowed, step):.2f} (--max-drop)"
            )
    return lost


def pairs_of(args: argparse.Namespace, config: dict[str, Any], rec: str) -> PairSet | None:
    """The verification set of the arguments, the run's, or one of its data; None without any."""
    if args.max_pairs == 0:
        return None
    path = args.pairs
    if path is None:
        asked = [
            Path(rec) / f"{name.removesuffix('.bin')}.bin" for name in config.get("val_targets", [])
        ]
        there = files.ending(rec, ".bin")
        path = next((path for path in [*asked, *there] if files.is_file(path)), None)
    return None if path is None else load_bin(path)


def _data(config: dict[str, Any], licence: str) -> dict[str, str]:
    """What the network was trained on, as the run noted it: the directory may hold another set now.

    Runs of earlier versions noted no hash; then none is given.
    """
    trained = config["rec"] if isinstance(config["rec"], list) else [config["rec"]]
    noted = config.get("data_sha256") or []
    facts = {
        "training_data": ", ".join(Path(name).name for name in trained),
        "training_data_licence": licence,
    }
    if "labels_crc32" in config:
        facts["training_labels_crc32"] = str(config["labels_crc32"])
    if noted:
        facts["training_data_sha256"] = ", ".join(f"{one['sha256']} ({one['of']})" for one in noted)
    if noted and all(one["of"] == "index.json" for one in noted):
        facts["training_index_sha256"] = ", ".join(one["sha256"] for one in noted)
    return facts


def _weights(checkpoint: str, run: Path, graph_options: GraphOptions) -> dict[str, str]:
    """Which weights these are, and the operating points of what the file gives.

    Those of other weights, or of e(image) + e(mirror image) where the file gives e(image), would
    accept other shares of pairs than they say: they are left out with a word.
    """
    sha256 = read_manifest(checkpoint)["files"]["model.safetensors"]["sha256"]
    chosen = thresholds_command.of_run(session.run_dir(run) or run)
    if chosen is not None and chosen["weights_sha256"] != sha256:
        print(
            f"warning: {thresholds_command.FILE} is of other weights and left out: evaluate these, "
            "then run `python -m eval thresholds` again",
            file=sys.stderr,
        )
        chosen = None
    gives = results.FLIP_SUM if graph_options.flip_sum else results.ALONE
    if chosen is not None and chosen["contract"].get("flip") != gives:
        print(
            f"warning: {thresholds_command.FILE} is of {chosen['contract'].get('flip')}, the file "
            f"gives {gives}: the thresholds are left out; choose them by `python -m eval "
            f"thresholds {shlex.quote(str(run))}{' --flip-sum' if graph_options.flip_sum else ''}`",
            file=sys.stderr,
        )
        chosen = None
    entries = {} if chosen is None else {"thresholds": json.dumps(chosen)}
    return {"weights_sha256": sha256, **entries}


def images_of(rec: str, count: int, shift: float, resize: bool = False) -> Images | None:
    """[count, 112, 112, 3] RGB, spread over the data set at `rec`; None where there is none.

    shift: in steps of the spread, so that two draws share no image where there are enough.
    """
    if not files.is_dir(Path(rec)):
        return None
    data = shards.open(rec)
    places = (np.arange(count) + shift) * len(data) / (count + shift)
    chosen = np.unique(places.astype(int))
    return np.stack(
        [decode(data[int(i)][1], where=f"image {i} of {rec}", resize=resize) for i in chosen]
    )


if __name__ == "__main__":
    sys.exit(main())
