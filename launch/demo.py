"""The whole pipeline in one command: faces, shards, training, ONNX, evaluation, report.

    python -m launch.demo --out demo                  on generated faces
    python -m launch.demo --out demo --data DIR       on DIR/<identity>/*.jpg

It runs the very commands that it prints; each can be typed alone. What is there already is reused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data_tools.common import cli, files, text
from data_tools.common.errors import UserError
from data_tools.images.image_file import is_image_name
from data_tools.pack.pairs import PAIRS_STEP

_ROOT = Path(__file__).resolve().parents[1]
_IDENTITIES, _IMAGES = 1000, 20  # generated
_HELD_OUT = 0.2  # share of the identities kept for verification
_FEWEST_HELD_OUT = 3  # identities
_PAIRS = 2000  # of held-out people, half of them same; fewer where they have fewer


@cli.on_one_line()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory for everything")
    parser.add_argument("--data", type=Path, help="your faces, DIR/<identity>/*.jpg")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimiser steps, default: the recipe's"
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="the faces of --data are aligned at another size than 112 x 112: resize them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line, last")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: must be 1 or more")
    out, began = args.out.resolve(), time.time()
    try:
        _run_all(out, args.data, args.steps, args.resize)
        before, after = _accuracies(out / "run" / "metrics.jsonl")
    except subprocess.CalledProcessError as error:
        print(
            f"\nerror: this command failed ({error.returncode}):\n  {_shown(error.cmd)}",
            file=sys.stderr,
        )
        return 1
    print(
        f"\nDone in {time.time() - began:.0f} s.\n"
        f"  verification of people never seen in training: {100 * before:.2f} % before training, "
        f"{100 * after:.2f} % after\n"
        f"  run directory  {out / 'run'}\n"
        f"  ONNX file      {out / 'run' / 'model.onnx'}\n"
        f"  report         {out / 'run' / 'report.html'}"
    )
    if args.json:
        done = {
            "run": str(out / "run"),
            "onnx": str(out / "run" / "model.onnx"),
            "report": str(out / "run" / "report.html"),
            "accuracy_before": before,
            "accuracy_after": after,
        }
        print(json.dumps(done))
    return 0


def _run_all(out: Path, data: Path | None, steps: int | None, resize: bool) -> None:
    python = [sys.executable, "-m"]
    faces, shards, run = out / "faces", out / "shards", out / "run"
    if data is None:
        _step(
            "draw faces",
            [
                *python,
                "data_tools",
                "synthesize",
                str(faces),
                "--identities",
                str(_IDENTITIES),
                "--images",
                str(_IMAGES),
                "--seed",
                "1",
            ],
        )
    else:
        faces = data.resolve()
        if not files.is_dir(faces):
            raise NotADirectoryError(f"{data}: expected a directory of identities, each of images")
    _step(
        "pack them into shards, some people held out",
        [
            *python,
            "data_tools",
            "pack",
            str(faces),
            str(shards),
            "--shards",
            "4",
            "--hold-out",
            str(_num_held_out(faces)),
            "--pairs",
            str(_PAIRS),
            *(["--resize"] if resize else []),
        ],
    )
    processes = torch.cuda.device_count() or 2
    _step(
        f"train on {processes} processes",
        [
            *python,
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            str(_ROOT / "launch" / "train.py"),
            str(_ROOT / "launch" / "configs" / "demo.py"),
            f"rec={shards}",
            "val_targets=heldout",
            f"output={run}",
            *([] if steps is None else [f"max_steps={steps}"]),
        ],
    )
    _step(
        "export to ONNX",
        [sys.executable, str(_ROOT / "launch" / "export.py"), str(run), str(run / "model.onnx")],
    )
    _step(
        "evaluate the ONNX file and report",
        [
            *python,
            "eval",
            "lfw",
            str(run / "model.onnx"),
            str(shards / "heldout.bin"),
            "--report",
            str(run / "report.html"),
        ],
    )


def _num_held_out(faces: Path) -> int:
    """How many identities to keep for verification: a share, and enough for some pairs.

    Which ones is drawn by pack. So many are taken that the pairs of one person that n of them have,
    the mean less two standard deviations, are enough; but two identities are left to train on.
    """
    folders = [entry.path for entry in os.scandir(faces) if entry.is_dir()]
    sizes = np.array([sum(map(is_image_name, os.listdir(path))) for path in folders])
    sizes = sizes[sizes > 0]
    same = sizes * (sizes - 1) / 2  # pairs of each person
    most = len(sizes) - 2
    if most < 2:
        raise UserError(
            f"{faces}: {len(sizes)} folders with images; at least 4 people are needed, two to "
            "train on and two to verify on"
        )
    n = np.arange(min(max(round(_HELD_OUT * len(sizes)), _FEWEST_HELD_OUT), most), most + 1)
    spread = same.std() * np.sqrt(n * (1 - n / len(sizes)))
    enough = n[n * same.mean() - 2 * spread >= PAIRS_STEP / 2]
    return int(enough[0] if len(enough) else most)


def _step(title: str, command: list[str]) -> None:
    print(f"\n=== {title}\n    {_shown(command)}", flush=True)
    # One thread a process: two processes of many threads each would fight over the cores.
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def _shown(command: list[str]) -> str:
    """As it can be typed here."""
    python = os.path.relpath(sys.executable)
    typed = python if not python.startswith(os.pardir) else sys.executable
    return shlex.join(typed if part == sys.executable else part for part in command)


def _accuracies(metrics: Path) -> tuple[float, float]:
    """Mean accuracy on the held-out people at the first and the last verification."""
    records = [json.loads(line) for line in text.read_text(metrics).splitlines()]
    scores = [r["verification"]["heldout"]["accuracy_mean"] for r in records if "verification" in r]
    return scores[0], scores[-1]


if __name__ == "__main__":
    sys.exit(main())
