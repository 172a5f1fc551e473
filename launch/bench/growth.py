"""How the time of a head step grows with classes, batch, sample rate and processes: a picture.

    python launch/bench/growth.py docs/growth.svg
    python launch/bench/growth.py OUT.png --embedding-size 512 --largest 400000

A step is launch/bench/head.py's (CosFace, SGD, fp32, updated in the backward); each point is the
median of --steps on the slowest of the processes. One thing changes in each panel; the others stand
at C 100 000, B 256, r 1, two processes. One JSON line with all points comes last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time

import matplotlib
import torch

from launch.bench.hardware import machine
from launch.bench.processes import slowest, together
from launch.bench.sides import Case, Ours, batch_of
from recognition.distributed import collectives
from recognition.run.run_dir import commit

_FIRST, _CLASSES, _BATCH, _WORLD = 25_000, 100_000, 256, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("picture", help="file to write, .svg or .png")
    add("--embedding-size", type=int, default=128, metavar="D", help="default %(default)s")
    add("--largest", type=int, default=1_600_000, metavar="C", help="default %(default)s")
    add("--steps", type=int, default=5, metavar="N", help="timed, after two; default %(default)s")
    args = parser.parse_args(arguments)
    for name, least in (("embedding_size", 1), ("steps", 1), ("largest", _FIRST)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = Case(
        min(_CLASSES, args.largest), _BATCH, 1.0, args.embedding_size, stored_mib=16,
        update_in_backward=True, kernel="auto",
    )  # fmt: skip
    counts: list[int] = []
    while (count := _FIRST << len(counts)) <= args.largest:
        counts.append(count)
    worlds = range(1, max(_WORLD, torch.cuda.device_count()) + 1)
    panels: dict[str, dict[float, tuple[Case, int]]] = {
        "classes, r 1": {c: (base._replace(classes=c), _WORLD) for c in counts},
        "classes, r 0.1": {c: (base._replace(classes=c, sample_rate=0.1), _WORLD) for c in counts},
        "batch": {b: (base._replace(batch=b), _WORLD) for b in (64, 128, 256, 512, 1024)},
        "sample rate": {
            r: (base._replace(sample_rate=r), _WORLD) for r in (0.05, 0.1, 0.2, 0.5, 1.0)
        },
        "processes": {w: (base, w) for w in worlds},
    }
    points: dict[str, dict[float, float]] = {name: {} for name in panels}
    for world in worlds:  # the cases of a world in one group of processes
        own = [
            (name, value, case)
            for name, cases in panels.items()
            for value, (case, size) in cases.items()
            if size == world
        ]
        told = [(f"{name} {value:g}", case) for name, value, case in own]
        times = together(world, device, _seconds, told, world, args.steps)
        for (name, value, _), seconds in zip(own, times, strict=True):
            points[name][value] = round(1e3 * seconds, 3)
    points = {name: dict(sorted(found.items())) for name, found in points.items()}
    _draw(points, args)
    print(
        json.dumps(
            {
                "ms": points, "D": args.embedding_size, "steps": args.steps, "commit": commit(),
                "machine": machine(torch.device(device)), "torch": torch.__version__,
            }
        )
    )  # fmt: skip
    return 0


def _seconds(
    rank: int, device: torch.device, told: list[tuple[str, Case]], world: int, steps: int
) -> list[float]:
    """Median seconds of a step of each case on the slowest rank."""
    found = []
    for name, case in told:
        found.append(_seconds_of(rank, device, case, world, steps))
        gc.collect()  # the head before the next one
        if rank == 0:
            print(f"W {world}, {name}: {1e3 * found[-1]:.1f} ms", file=sys.stderr, flush=True)
    return found


def _seconds_of(rank: int, device: torch.device, case: Case, world: int, steps: int) -> float:
    group = collectives.world_group()
    ours = Ours(case, device)
    x, labels = batch_of(case, rank, world, device)
    times = []
    for _ in range(2 + steps):
        x.grad = None
        slowest(0.0, group)
        began = time.perf_counter()
        ours.step(x, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(slowest(time.perf_counter() - began, group))
    return statistics.median(times[2:])


def _draw(points: dict[str, dict[float, float]], args: argparse.Namespace) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained", sharey=True)
    panels: list[tuple[str, list[str]]] = [
        ("classes", ["classes, r 1", "classes, r 0.1"]), ("batch", ["batch"]),
        ("sample rate", ["sample rate"]), ("processes", ["processes"]),
    ]  # fmt: skip
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(*zip(*points[name].items(), strict=True), "o-", ms=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3, which="both")
        if len(names) > 1:
            axis.legend(fontsize=7)
    axes[0].set_ylabel(f"ms a step, D {args.embedding_size}")
    figure.savefig(args.picture, metadata={"Date": None} if args.picture.endswith("svg") else None)


if __name__ == "__main__":
    sys.exit(main())
