"""`python launch/export.py RUN OUT.onnx`: a trained network as a checked ONNX file."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_tools import commands, shards
from data_tools.decode import decode
from eval import session, thresholds_command
from eval.align import TEMPLATE
from recognition.checkpoint import load_backbone, newest, read_manifest
from recognition.export import ExportError, Images, export_onnx

NUM_EXAMPLES = 7

DESCRIPTION = """\
Write the network of a run as an ONNX file: input `input` float32 [batch, 3, 112, 112], RGB,
(pixel - 127.5) / 127.5, output `embedding` float32 [batch, D], not normalised. The file takes its
name only after ONNX Runtime has agreed with torch on batches of 1, 2 and 7 images of the run's
data set (seeded noise where that set is not on this machine); otherwise nothing is left and the
exit code is 1. Its metadata say how to feed it, and from which scores to accept, where
`python -m eval thresholds` has chosen that."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the checked file is in place, 1 otherwise."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "run", metavar="RUN", help="run directory (newest checkpoint) or checkpoint"
    )
    parser.add_argument("out", metavar="OUT.onnx", type=Path, help="file to write")
    parser.add_argument("--precision", choices=["fp32"], default="fp32", help="default: fp32")
    parser.add_argument("--json", action="store_true", help="print one JSON line last")
    args = parser.parse_args(argv)
    try:
        with Console(stderr=True).status(f"exporting {args.run}"):
            report = export_run(args.run, args.out)
    except (ExportError, *commands.USER_ERRORS) as error:
        print(f"error: {commands.one_line(error)}", file=sys.stderr)
        return 1
    print(
        f"{report['path']}: {report['bytes'] / 2**20:.1f} MiB, opset {report['opset']}, largest "
        f"difference from torch {report['max_abs_error']:.1e} (checked on {report['checked_on']})"
    )
    if args.json:
        print(json.dumps(report))
    return 0


def export_run(run: str, out: Path) -> dict[str, Any]:
    """Export the network of `run` to `out`; the report of export_onnx."""
    found = run if (Path(run) / "manifest.json").is_file() else newest(run)
    module, config = load_backbone(found or run)
    metadata = {
        "network": config["network"],
        "margin": config["margin"],
        "commit": config["commit"] or "unknown",  # trained outside a git checkout
        "alignment": ";".join(f"{x:.4f},{y:.4f}" for x, y in TEMPLATE),  # five points, x,y
        **_weights(str(found), Path(run)),
    }
    return export_onnx(module, out, metadata=metadata, example_images=images_of(config["rec"]))


def _weights(checkpoint: str, run: Path) -> dict[str, str]:
    """Which weights these are, and the operating points that were chosen for them."""
    sha256 = read_manifest(checkpoint)["files"]["model.safetensors"]["sha256"]
    chosen = thresholds_command.of_run(session.run_dir(run) or run)
    if chosen is not None and chosen["weights_sha256"] != sha256:
        print(
            f"warning: {thresholds_command.FILE} is of other weights and left out: evaluate these, "
            "then run `python -m eval thresholds` again",
            file=sys.stderr,
        )
        chosen = None
    entries = {} if chosen is None else {"thresholds": json.dumps(chosen)}
    return {"weights_sha256": sha256, **entries}


def images_of(rec: str | list[str]) -> Images | None:
    """[7, 112, 112, 3] RGB, spread over the (first) data set at `rec`; None where there is none."""
    rec = rec if isinstance(rec, str) else rec[0]
    if not Path(rec).is_dir():
        return None
    data = shards.open(rec)
    chosen = np.linspace(0, len(data) - 1, NUM_EXAMPLES).astype(int)
    return np.stack([decode(data[i][1], where=f"image {i} of {rec}") for i in chosen])


if __name__ == "__main__":
    sys.exit(main())
