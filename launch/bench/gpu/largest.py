"""How many classes fit one GPU: predicted by the planner, then found.

    python -m launch.bench.gpu.largest [--batch 1024] [--sample-rate 0.1] [--embedding-size 512]

The prediction is the largest head whose bytes (launch.planner.predict.head_bytes) the device has
free. Heads of some shares of it are then built and stepped twice, each in a fresh process, the
largest first, until one fits. One JSON line a try, and the summary last. On a CPU --memory-mib
stands for the device's memory, and a head fits if the process has taken no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from data_tools.common import cli
from data_tools.common.errors import UserError
from launch.bench.hardware import wait_for
from launch.bench.memory import read_peak, reset_peak
from launch.bench.processes import run_on_ranks
from launch.bench.sides import DTYPES, Case, OurHead, batch_of
from launch.planner.predict import head_bytes
from recognition import config

_SHARES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.6)  # of the prediction
_STEPS = 2


@cli.on_one_line()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=1024, metavar="B", help="default %(default)s")
    add("--embedding-size", type=int, default=512, metavar="D", help="default %(default)s")
    add("--sample-rate", type=float, default=0.1, metavar="R", help="default %(default)s")
    add("--dtype", choices=DTYPES, default="bf16", help="of the products; default %(default)s")
    add("--memory-mib", type=int, default=256, help="on a CPU; default %(default)s")
    args = parser.parse_args()
    case = Case(1, args.batch, args.sample_rate, args.embedding_size, args.dtype, alone=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else args.memory_mib << 20
    print(json.dumps(_search(case, device, free)))
    return 0


def _search(case: Case, device: str, free: int) -> dict[str, Any]:
    predicted = _predicted(case, device, free)
    for share in _SHARES:
        tried = case._replace(classes=int(share * predicted))
        found = run_on_ranks(1, device, _try, tried, free)
        print(json.dumps({"classes": tried.classes, "share": share, **found}), flush=True)
        if found["fits"]:
            return {
                "predicted": predicted,
                "found": tried.classes,
                "free_bytes": free,
                "ms": found["ms"],
            }
    raise UserError(f"no head of {_SHARES[-1]:g} or more of {predicted} classes fits {free} bytes")


def _predicted(case: Case, device: str, free: int) -> int:
    """By bisection: the planner's bytes grow with the classes."""
    cfg = config.make(
        {
            "rec": "-",
            "sample_rate": case.sample_rate,
            "embedding_size": case.embedding_size,
            "head_stored_mib": case.stored_mib,
        }
    )

    def fits(classes: int) -> bool:
        sizes = head_bytes(cfg, classes, 1, case.batch, is_cuda=device == "cuda")
        return sum(sizes.values()) <= free

    low, high = 1, 1 << 32
    if not fits(low):
        raise UserError(f"{free} bytes hold no head of batch {case.batch}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _try(rank: int, device: torch.device, case: Case, free: int) -> dict[str, Any]:
    """Whether the head fits, and milliseconds of its last step."""
    x, labels = batch_of(case, rank, 1, device)
    before = reset_peak(device)
    try:
        ours = OurHead(case, device)
        for _ in range(_STEPS):
            x.grad, began = None, time.perf_counter()
            ours.step(x, labels)
            wait_for(device)
    except torch.cuda.OutOfMemoryError:
        return {"fits": False, "peak_bytes": None, "ms": None}
    peak = read_peak(device) - before
    return {
        "fits": device.type == "cuda" or peak <= free,
        "peak_bytes": peak,
        "ms": round(1e3 * (time.perf_counter() - began), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
