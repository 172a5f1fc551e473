"""Every loss on the same small set, network, steps and seed: does it train, and how far?

    python launch/bench/train_losses.py SHARDS OUT [--runs arcface,adaface] [--steps 150]

SHARDS is a packed set with heldout.bin in it (`python -m data_tools pack DIR SHARDS --hold-out N
--pairs P`). Each run is launch/configs/demo.py with the overrides below, on two processes; a run
that is complete is not trained again. Prints a row for each, and one JSON line last. Scales and
margins are mild, for some hundred classes and minutes: the figures compare nothing that is
published, they tell a loss that learns from one that does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data_tools.common.errors import one_line
from launch.bench import demo_run

_S, _M = "margin_args.scale=32", "margin_args.margin=0.2"

# run: overrides of launch/configs/demo.py
RUNS: dict[str, list[str]] = {
    "softmax": ["margin=softmax", _S],
    "cosface": ["margin=cosface", _S, _M],
    "cosface, a third sampled": ["margin=cosface", _S, _M, "sample_rate=0.3"],
    "cosface, filter 0.4": ["margin=cosface", _S, _M, "interclass_filtering_threshold=0.4"],
    "arcface": ["margin=arcface", _S, _M],
    "arcface, straight through": [
        "margin=arcface", _S, _M, "margin_args.gradient=straight_through",
    ],
    "arcface, 3 sub-centres": ["margin=arcface", _S, _M, "num_subcenters=3"],
    "combined": ["margin=combined", _S, "margin_args.m2=0.1", "margin_args.m3=0.1"],
    "sphereface": ["margin=sphereface", _S, "margin_args.m1=1.15"],
    "sphereface, piecewise": ["margin=sphereface", _S, "margin_args.form=piecewise"],
    "spherefacer v1": ["margin=spherefacer", _S],
    "spherefacer v2": ["margin=spherefacer", _S, "margin_args.version=v2"],
    "adaface": ["margin=adaface", _S, _M],
    "magface": ["margin=magface", _S, "margin_args.l_m=0.15", "margin_args.u_m=0.3"],
    "elasticface arc": ["margin=elasticface", _S, _M, "margin_args.std=0.03"],
    "elasticface cos+": [
        "margin=elasticface", _S, _M, "margin_args.std=0.02", "margin_args.kind=cos",
        "margin_args.plus=true",
    ],
    "adacos": ["margin=adacos"],
    "kappaface": ["margin=kappaface", _S, "margin_args.margin=0.35"],
    "kappaface, momentum encoder": [
        "margin=kappaface", _S, "margin_args.margin=0.35", "margin_args.features=momentum",
    ],
    "jamsface": [
        "margin=jamsface", _S, "margin_args.angular_init=0.1", "margin_args.cosine_init=0.1",
    ],
    "jamsface, batch": [
        "margin=jamsface", _S, "margin_args.angular_init=0.1", "margin_args.cosine_init=0.1",
        "margin_args.scope=batch",
    ],
    "adam": ["margin=adam"],
    "dynamicarcface": ["margin=dynamicarcface", _S, "margin_args.high=0.3"],
    "interface dd": ["margin=interface", _S, _M],
    "interface dc": ["margin=interface", _S, _M, "margin_args.variant=dc"],
    "interface cc": ["margin=interface", _S, _M, "margin_args.variant=cc"],
    "curricularface": ["margin=curricularface", _S, _M],
    "mvsoftmax arc": ["margin=mvsoftmax", _M],
    "mvsoftmax am": ["margin=mvsoftmax", _M, "margin_args.kind=am"],
    "circle": ["margin=circle", "margin_args.gamma=64"],
    "uniface": ["margin=uniface", _S, _M],
    "sphereface2": ["margin=sphereface2", _M],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="packed set with heldout.bin")
    parser.add_argument("out", type=Path, help="directory for the runs")
    parser.add_argument("--runs", help=f"some of: {'; '.join(RUNS)} (separated by ;)")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps (150)")
    parser.add_argument("--processes", type=int, default=2, help="of each run (2)")
    args = parser.parse_args()
    names = [name.strip() for name in args.runs.split(";")] if args.runs else list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"no run {unknown[0]!r}; there are: {'; '.join(RUNS)}")
    results = {}
    for name in names:
        try:
            results[name] = train(args.shards, args.out, name, args.steps, args.processes)
        except RuntimeError as error:
            print(f"error: {name}: {one_line(error)}", file=sys.stderr)
            return 1
        before, after, deviation = (100 * part for part in results[name])
        print(f"| {name} | {before:.2f} | {after:.2f} +- {deviation:.2f} |", flush=True)
    print(json.dumps({"steps": args.steps, "data": str(args.shards), "accuracy": results}))
    return 0


def train(
    shards: Path, out: Path, name: str, steps: int, processes: int = 2
) -> tuple[float, float, float]:
    """What demo_run.train gives of the run `name`."""
    run = out / "".join(c if c.isalnum() else "_" for c in name)
    return demo_run.train(shards, run, [f"max_steps={steps}", *RUNS[name]], processes)


if __name__ == "__main__":
    sys.exit(main())
