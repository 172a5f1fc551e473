"""What a bigger teacher gives a small student: the same student with and without it.

    python launch/bench/distill.py SHARDS OUT [--seeds 2] [--teacher r18] [--student mbf]

SHARDS is a packed set with heldout.bin in it (the demo's: `demo/shards`). A teacher of another
kind and many times the size is trained first, then for each seed the student twice on the
same images in the same order, batch and number of steps: by the margin loss alone, and beside it
by the teacher's embeddings. A run in OUT that is complete is not trained again. Prints a row for
each, and one JSON line last. The default teacher takes some eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from data_tools.common.errors import one_line
from launch.bench.demo_run import train
from recognition.backbones import BACKBONES

_BATCH = 64  # images a step, of teacher and student


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="packed set with heldout.bin")
    parser.add_argument("out", type=Path, help="directory for the runs")
    parser.add_argument("--seeds", type=int, default=2, help="students of each kind (2)")
    parser.add_argument("--teacher", choices=BACKBONES, default="r18", help="its network (r18)")
    parser.add_argument("--student", choices=BACKBONES, default="mbf_tiny", help="(the demo's)")
    parser.add_argument("--teacher-steps", type=int, default=160, help="of its training (160)")
    parser.add_argument("--steps", type=int, default=80, help="of each student's (80)")
    parser.add_argument("--weight", type=float, default=30.0, help="of the teacher's lesson (30)")
    args = parser.parse_args()
    try:
        report = compare(
            args.shards, args.out, args.seeds, args.teacher, args.teacher_steps, args.steps,
            args.weight, args.student,
        )  # fmt: skip
    except RuntimeError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def compare(
    shards: Path, out: Path, seeds: int, network: str = "r18", teacher_steps: int = 160,
    steps: int = 80, weight: float = 30.0, student: str = "mbf_tiny",
) -> dict[str, Any]:  # fmt: skip
    """Ten-fold accuracies on held-out people: of the teacher, and for each seed of the students.

    Raises:
        RuntimeError: a run failed.
    """
    every = [
        f"global_batch_size={_BATCH}",
        "precision=bf16",
    ]  # r18 in fp32 takes three times as long
    _, accuracy, _ = train(
        shards, out / "teacher",
        [f"network={network}", *every, f"max_steps={teacher_steps}", "seed=0"],
    )  # fmt: skip
    print("| | parameters | accuracy % |\n|---|---|---|")
    print(f"| teacher {network} | {parameters(network)} | {100 * accuracy:.2f} |", flush=True)
    rows: list[dict[str, float]] = []
    for seed in range(1, seeds + 1):
        same = [f"network={student}", *every, f"max_steps={steps}", f"seed={seed}"]
        lesson = [f"teacher={(out / 'teacher').resolve()}", f"teacher_weight={weight}"]
        row = {}
        for name, more in (("alone", []), ("taught", lesson)):
            _, row[name], deviation = train(shards, out / f"{name}_{seed}", same + more)
            print(f"| {student} {name}, seed {seed} | {parameters(student)} | "
                  f"{100 * row[name]:.2f} +- {100 * deviation:.2f} |", flush=True)  # fmt: skip
        rows.append(row)
    return {"teacher": accuracy, "students": rows, "steps": steps, "weight": weight}


def parameters(network: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in BACKBONES[network]().parameters())


if __name__ == "__main__":
    sys.exit(main())
