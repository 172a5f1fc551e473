"""How fast each precision of an exported network runs against torch eager, and what it loses.

    python launch/bench/onnx_speed.py RUN [--data SHARDS]          a trained network: also what it
    loses
    python launch/bench/onnx_speed.py --network r50 --data SHARDS  speed alone, weights at random

What is lost on the .bin of the data, a thousand pairs, tells losses of a point. For a tenth of one,
--people DIR (several times for several draws) takes all pairs of the aligned faces in
DIR/<identity>/, which training has not seen:

    python -m data_tools synthesize people-1 --identities 150 --images 12 --seed 101

On the CPU, all cores (OMP_NUM_THREADS limits them). The contenders take turns in every repetition,
so that a busy machine slows all alike; medians. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from data_tools import verification_bin
from data_tools.common import cli, files
from data_tools.images.decode import decode
from eval.embedders.embed_onnx import OnnxEmbedder
from eval.protocols import drop
from launch.export import MOST_PAIRS, NUM_EXAMPLES, images_of
from recognition.backbones import BACKBONES
from recognition.checkpoint import load_backbone
from recognition.export.parity import ParityLimits
from recognition.export.quantise import NUM_CALIBRATION, PRECISIONS
from recognition.export.to_onnx import GraphOptions, export_onnx, prepared
from recognition.weights.networks import TorchEmbedder

_BATCHES = (1, 32)
_PAUSE = 0.05  # seconds, until the threads of the one before have stopped spinning
_FARS = (1e-2, 1e-3, 1e-4)
_NO_LIMIT = ParityLimits(2.0, -1.0, -1.0, 100.0, 100.0)  # what is measured here is not refused


@cli.on_one_line()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run directory or checkpoint")
    parser.add_argument("--network", choices=BACKBONES, help="instead of a run: at random")
    parser.add_argument("--data", help="shards (default: the run's)")
    parser.add_argument(
        "--people",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="faces whose pairs show what is lost",
    )
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="of each (9)")
    args = parser.parse_args()
    if (args.run is None) == (args.network is None):
        parser.error("one of RUN and --network")
    report = measure(args.run, args.network, args.data, args.repeat, args.people)
    print("| | MiB | accuracy % | TAR % | ms, batch 1 | images/s, batch 32 | x torch, 1 | 32 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in report["rows"].items():
        lost = [f"{100 * row[k]:.2f}" if k in row else "-" for k in ("accuracy", "tar")]
        print(
            f"| {name} | {row['bytes'] / 2**20:.1f} | {lost[0]} | {lost[1]} | "
            f"{1e3 * row['seconds'][1]:.2f} | {32 / row['seconds'][32]:.0f} | "
            f"{row['speedup'][1]:.2f} | {row['speedup'][32]:.2f} |"
        )
    if args.people:
        print(
            f"\nTAR points lost over all pairs of {len(args.people)} draws of people, +- deviation"
        )
        print(f"| | {' | '.join(f'FAR {far:g}' for far in _FARS)} |\n|---|{'---|' * len(_FARS)}")
        for name in PRECISIONS:
            drops = np.array([found["tar_drop"] for found in report["rows"][name]["people"]])
            cells = [
                f"{m:.2f} +- {d:.2f}" for m, d in zip(drops.mean(0), drops.std(0), strict=True)
            ]
            print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps(report))
    return 0


def measure(
    run: str | None, network: str | None, data: str | None, repeat: int, people: Sequence[Path] = ()
) -> dict[str, Any]:
    if run is not None:
        module, config = load_backbone(run)
        rec = data or (config["rec"] if isinstance(config["rec"], str) else config["rec"][0])
    else:
        assert network is not None
        torch.manual_seed(0)
        module, config, rec = BACKBONES[network]().eval(), {"network": network}, data or ""
    images = images_of(rec, NUM_CALIBRATION, 0.0)
    examples = images_of(rec, NUM_EXAMPLES, 0.5)
    if images is None or examples is None:
        raise FileNotFoundError(f"no data set at {rec!r}: --data SHARDS")
    if run is None:
        _settle(module, prepared(images[:32], GraphOptions()))
    pairs = next(iter(files.ending(rec, ".bin")), None)
    rows: dict[str, Any] = {"torch": {"bytes": sum(p.numel() * 4 for p in module.parameters())}}
    with tempfile.TemporaryDirectory() as directory:
        contenders: dict[str, Callable[[np.ndarray], Any]] = {"torch": _eager(module)}
        for precision in PRECISIONS:
            path = Path(directory) / f"{precision}.onnx"
            report = export_onnx(
                module,
                path,
                metadata={},
                precision=precision,
                example_images=examples,
                calibration_images=images,
                limits=_NO_LIMIT,
            )
            rows[precision] = {"bytes": report["bytes"], "cosine": report["cosine"]}
            if run is not None and pairs is not None:
                found = drop.compare(
                    TorchEmbedder(module, {"path": str(path)}, ""),
                    OnnxEmbedder(path),
                    drop.thinned(verification_bin.load_bin(pairs), MOST_PAIRS),
                )
                rows["torch"] |= found["torch"] | {"far": found["far"]}
                rows[precision] |= found["file"] | {"tar_drop": found["tar_drop"]}
            rows[precision]["people"] = [
                drop.of_people(
                    TorchEmbedder(module, {"path": str(path)}, ""),
                    OnnxEmbedder(path),
                    *_faces(folder),
                    _FARS,
                )
                for folder in people
            ]
            contenders[precision] = _session(path)
        for name, seconds in _in_turn(
            contenders, prepared(examples, GraphOptions()), repeat
        ).items():
            rows[name]["seconds"] = seconds
    for row in rows.values():
        row["speedup"] = {n: rows["torch"]["seconds"][n] / row["seconds"][n] for n in _BATCHES}
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        vnni = "avx512_vnni" in (text := file.read()) or "avx_vnni" in text
    return {
        "network": config["network"],
        "threads": torch.get_num_threads(),
        "vnni": vnni,
        "onnxruntime": onnxruntime.__version__,
        "rows": rows,
        "int8_over_fp32": {
            n: rows["fp32"]["seconds"][n] / rows["int8"]["seconds"][n] for n in _BATCHES
        },
    }


def _faces(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 112, 112, 3], whom each shows [n]) of directory/<identity>/*."""
    paths = sorted(path for path in directory.glob("*/*") if files.is_file(path))
    if not paths:
        raise FileNotFoundError(f"no faces at {directory}/<identity>/")
    names = [path.parent.name for path in paths]
    images = np.stack([decode(files.read_bytes(path), where=str(path)) for path in paths])
    return images, np.unique(names, return_inverse=True)[1]


def _settle(module: nn.Module, x: np.ndarray) -> None:
    """BatchNorm statistics of real images, as after training: without them values explode."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        module(torch.from_numpy(x))
    module.eval()


def _eager(module: nn.Module) -> Callable[[np.ndarray], Any]:
    def run(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(x))

    return run


def _session(path: Path) -> Callable[[np.ndarray], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"input": x})


def _in_turn(
    contenders: dict[str, Callable[[np.ndarray], Any]], images: np.ndarray, repeat: int
) -> dict[str, dict[int, float]]:
    """{name: {batch: median seconds}}."""
    seconds: dict[str, dict[int, float]] = {name: {} for name in contenders}
    for size in _BATCHES:
        batch = np.ascontiguousarray(images[np.arange(size) % len(images)])
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for repetition in range(repeat + 1):
            for name, run in contenders.items():
                time.sleep(_PAUSE)
                began = time.perf_counter()
                run(batch)
                if repetition:  # the first warms up
                    taken[name].append(time.perf_counter() - began)
        for name, times in taken.items():
            seconds[name][size] = statistics.median(times)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
