"""What a checkpoint costs the training, and how fast it is written beside `dd` on the same disk.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 launch/bench/checkpoint.py DIR [--gib 2]

The state is a head of class rows with their momentum, so many GiB over all processes. Each round
saves it with the training waiting, saves it beside the training, and lets `dd conv=fsync` write as
many bytes; between the saves the processes compute (a matrix product), steps that are timed too.
Prints one JSON line of medians: seconds that the training waits for either save, what the steps
lose while the files are written, seconds of the whole save, bytes per second of both and of dd.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time

import torch

from data_tools.common import files
from recognition import checkpoint
from recognition.backbones import BACKBONES
from recognition.distributed import collectives, runtime
from recognition.head import PartialFC
from recognition.losses import make_margin
from recognition.optim import RowSGD

_SIZE = 512  # of an embedding
_STEP = 1024  # side of the matrix product that stands for a step


def make_parts(gib: float, group: torch.distributed.ProcessGroup) -> checkpoint.Parts:
    torch.manual_seed(0)
    backbone = BACKBONES["mbf_tiny"](embedding_size=_SIZE)
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    classes = int(gib * 2**30 / (2 * 4 * _SIZE))  # a row and its momentum
    head = PartialFC(make_margin("cosface"), _SIZE, classes, 0.1, group=group)
    return checkpoint.Parts(backbone, optimizer, [checkpoint.HeadParts(head, RowSGD(head))])


def step(a: torch.Tensor) -> float:
    started = time.perf_counter()
    a @ a
    return time.perf_counter() - started


def dd(path: str, size: int) -> float:
    """Seconds for a file of zeros of so many bytes, through to the disk."""
    blocks = max(size >> 24, 1)
    started = time.perf_counter()
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={blocks}", "conv=fsync"],
        check=True,
        capture_output=True,
    )
    seconds = time.perf_counter() - started
    os.unlink(path)
    return seconds * size / (blocks << 24)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="on the disk to measure; what is written is removed")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the state (default 2)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with runtime.start() as here:
        result = measure(args.directory, args.gib, args.rounds, here)
        if here.rank == 0:
            print(json.dumps(result))


def measure(directory: str, gib: float, rounds: int, here: runtime.Runtime) -> dict:
    run_dir = os.path.join(directory, "bench-checkpoint")
    parts = make_parts(gib, here.group)
    a = torch.rand(_STEP, _STEP)
    keep = checkpoint.Keep(2 * rounds + 2)  # to remove the former one is not timed, nor dd's
    waiting = checkpoint.Saver(run_dir, here.group, keep, background=False)
    beside = checkpoint.Saver(run_dir, here.group, keep, background=True)
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    try:
        for round_ in range(rounds + 1):  # the first warms up: the copy's memory is new
            calm = [step(a) for _ in range(20)]
            started = time.perf_counter()
            path = waiting.save_now(parts, {"step": 2 * round_})
            whole = time.perf_counter() - started
            size = sum(e["bytes"] for e in checkpoint.read_manifest(path)["files"].values())

            started = time.perf_counter()
            beside.save(parts, {"step": 2 * round_ + 1})
            stall = time.perf_counter() - started
            done = os.path.join(os.path.dirname(path), f"step-{2 * round_ + 1}")
            busy = []
            while not files.is_dir(done):
                busy.append(step(a))
            background = time.perf_counter() - started
            if failure := beside.finish():
                raise OSError(failure)
            collectives.gather_objects(None, here.group)
            if round_ == 0:
                continue
            if here.rank == 0:
                note("dd", dd(os.path.join(directory, "bench-dd"), size))
            collectives.gather_objects(None, here.group)
            note("synchronous", whole)
            note("stall", stall)
            note("background", background)
            note("slower_step", statistics.mean(busy) / statistics.mean(calm))
            note("lost", stall + sum(busy) - len(busy) * statistics.mean(calm))
    finally:
        if here.rank == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
    if here.rank != 0:
        return {}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "stall_of_synchronous": ("stall", "synchronous"),
        "lost_of_synchronous": ("lost", "synchronous"),
        "dd_of_synchronous": ("dd", "synchronous"),
        "dd_of_background": ("dd", "background"),
    }
    return {
        "bytes": size,
        "processes": here.world,
        "rounds": rounds,
        "seconds": {name: round(value, 3) for name, value in median.items() if "step" not in name},
        "megabytes_per_second": {
            name: round(size / median[name] / 1e6) for name in ("synchronous", "background", "dd")
        },
        "step_while_writing": round(median["slower_step"], 3),
        "ratios": {
            name: round(
                statistics.median(a / b for a, b in zip(seconds[x], seconds[y], strict=True)), 3
            )
            for name, (x, y) in ratios.items()
        },
    }


if __name__ == "__main__":
    main()
