"""What a step of the head costs: time and memory beside the standard form's and the GEMMs' floor.

    python launch/bench/head.py --suite cpu
    python launch/bench/head.py --suite gpu
    python launch/bench/head.py --classes 100000 --batch 256 --sample-rate 0.1 --processes 2

A step is forward, backward and the update of the class rows (SGD with momentum), CosFace, rows of a
batch spread over all processes; it lasts as long as on the slowest of them. The rival is
tests/recognition/rival.py: arcface_torch's form, written plainly. The floor is the GEMMs that the
arithmetic needs (forward, recompute if any, two gradients) at the shapes of our pieces. All stand
in one process group and take turns; what goes first changes from pair to pair; medians are given.

Peak memory is each one's alone, in processes of its own: from before the head is built to the end
of two steps, less weights and optimiser state, so that what the allocator keeps counts: the
resident set on a CPU, what torch has reserved on a GPU.

It uses GPUs (nccl) where there are any and the CPU (gloo, one thread a process) elsewhere. One JSON
line a case, on stdout; of a suite the comparison with its targets, last, on stderr.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.commands import one_line
from launch.bench.machine import machine
from launch.bench.processes import slowest, together
from recognition import collectives
from recognition.head import Limits, PartialFC
from recognition.losses import MARGINS
from recognition.optim import RowSGD
from recognition.run_dir import commit

_RIVAL = Path(__file__).resolve().parents[2] / "tests" / "recognition" / "rival.py"
_SEED, _LR, _NORM = 1, 0.01, 20.0  # norm of an embedding, about what a trained network gives
_MEMORY_STEPS = 2

# dtype of the embeddings and of the products; the class rows are fp32 in all.
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Case(NamedTuple):
    classes: int  # C
    batch: int  # B, of all processes
    sample_rate: float = 1.0
    embedding_size: int = 512
    dtype: str = "fp32"
    # At most, of time / rival, time / floor, peak / rival; None: none is promised.
    targets: tuple[float, float, float] | None = None
    stored_mib: int = 64  # what the forward may keep for the backward
    update_in_backward: bool = False
    piece: int | None = None  # classes; None: from the cache


SUITES = {
    "cpu": [
        Case(*sizes, targets=targets, stored_mib=stored_mib, update_in_backward=True)
        for *sizes, targets in (
            (100_000, 256, 1.0, (0.50, 1.25, 0.35)),
            (500_000, 256, 0.1, (0.26, 1.35, 0.10)),
            (60_000, 512, 0.5, (0.72, 1.25, 0.30)),
        )
        for stored_mib in (0, 64)
    ],
    "gpu": [
        Case(1_000_000, batch, rate, dtype="bf16", targets=(0.30, 1 / 0.6, 0.10))
        for batch in (1024, 4096)
        for rate in (1.0, 0.1)
    ],
}


class Measurement(NamedTuple):
    """What the processes are told: picklable."""

    case: Case
    world: int
    pairs: int
    warmup: int
    device: str


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = args.processes or (torch.cuda.device_count() if device == "cuda" else 2)
    try:
        if device == "cuda" and world > torch.cuda.device_count():
            raise ValueError(f"--processes {world}: there are {torch.cuda.device_count()} GPUs")
        cases = SUITES[args.suite] if args.suite else [
            Case(
                args.classes, args.batch, args.sample_rate, args.embedding_size, args.dtype,
                stored_mib=args.stored_mib, update_in_backward=args.update_in_backward,
                piece=args.piece,
            )
        ]  # fmt: skip
        reports = []
        for case in cases:
            if case.batch % world:
                raise ValueError(f"batch {case.batch}: not divisible by {world} processes")
            reports.append(_report(Measurement(case, world, args.pairs, args.warmup, device)))
            print(json.dumps(reports[-1]), flush=True)
        for report in reports if args.suite else []:
            print(_beside_targets(report), file=sys.stderr)
    except (ValueError, OSError) as error:  # a mistake in what was asked
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, help="the cases that targets are set for; else one case:")
    add("--classes", type=int, default=100_000, metavar="C", help="default %(default)s")
    add("--batch", type=int, default=256, metavar="B", help="of all processes; %(default)s")
    add("--embedding-size", type=int, default=512, metavar="D", help="default %(default)s")
    add("--sample-rate", type=float, default=1.0, metavar="R", help="default %(default)s")
    add("--dtype", choices=_DTYPES, default="fp32", help="of the products; default %(default)s")
    add(
        "--stored-mib", type=int, default=64, metavar="N", help="kept for the backward; %(default)s"
    )
    add("--update-in-backward", action="store_true", help="no gradient of the rows exists")
    add("--piece", type=int, metavar="N", help="classes; default: from the cache")
    add("--processes", type=int, metavar="W", help="default: one a GPU, two on a CPU")
    add("--pairs", type=int, default=7, metavar="N", help="timed; default %(default)s")
    add("--warmup", type=int, default=2, metavar="N", help="pairs before them; %(default)s")
    return parser


# --- The two sides --------------------------------------------------------------------------------


class Ours:
    def __init__(self, case: Case, device: torch.device) -> None:
        self.head = PartialFC(
            MARGINS["cosface"](), case.embedding_size, case.classes, case.sample_rate, seed=_SEED,
            limits=Limits(case.stored_mib << 20, case.piece, _DTYPES[case.dtype]),
        ).to(device)  # fmt: skip
        self.optimizer = RowSGD(self.head)
        self.in_backward = case.update_in_backward

    def step(self, x: Tensor, labels: Tensor) -> None:
        if self.in_backward:
            self.optimizer.begin(_LR)
        self.head(x, labels).backward()
        self.optimizer.step(_LR)

    def held(self) -> list[Tensor]:  # weights and state
        return [self.head.weight.detach(), *self.optimizer.state.values()]


class Rival:
    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(_SEED)
        head = _rival().DenseHead(
            case.embedding_size, case.classes, case.sample_rate, dtype=_DTYPES[case.dtype]
        )
        self.head = head.to(device)
        self.optimizer = torch.optim.SGD(head.parameters(), _LR, momentum=0.9, weight_decay=5e-4)

    def step(self, x: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        self.head(x, labels.to(x.device, copy=True)).backward()
        self.optimizer.step()

    def held(self) -> list[Tensor]:
        momentum = self.optimizer.state[self.head.weight]["momentum_buffer"]
        return [self.head.weight.detach(), momentum]


@functools.cache
def _rival() -> ModuleType:
    if not _RIVAL.exists():
        raise FileNotFoundError(f"{_RIVAL}: the rival stands in the tests of the repository")
    spec = importlib.util.spec_from_file_location("rival", _RIVAL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Floor:
    """The GEMMs of a step of ours, at the shapes of its pieces, over a weight of its size."""

    def __init__(self, ours: Ours, case: Case, device: torch.device) -> None:
        dtype = _DTYPES[case.dtype] or torch.float32
        self.size = ours.head.piece_size(case.batch)
        self.num = round(len(ours.head.weight) * case.sample_rate)
        columns = self.num * case.batch * 4
        kept = min((case.stored_mib << 20) // max(columns, 1), 1)
        self.num_products = 4 - kept
        self.weight = torch.randn(self.num, case.embedding_size, dtype=dtype, device=device)
        self.x = torch.randn(case.batch, case.embedding_size, dtype=dtype, device=device)
        self.z = torch.rand(case.batch, self.size, dtype=dtype, device=device)
        self.grad = torch.empty(self.size, case.embedding_size, dtype=dtype, device=device)
        self.grad_x = torch.zeros_like(self.x)

    def step(self, x: Tensor, labels: Tensor) -> None:
        for _ in range(self.num_products - 2):
            for start in range(0, self.num, self.size):
                rows = self.weight[start : start + self.size]
                torch.mm(self.x, rows.T, out=self.z[:, : len(rows)])
        for start in range(0, self.num, self.size):
            rows = self.weight[start : start + self.size]
            grad_z = self.z[:, : len(rows)]
            self.grad_x.addmm_(grad_z, rows, beta=0)
            torch.mm(grad_z.T, self.x, out=self.grad[: len(rows)])


def batch_of(case: Case, rank: int, world: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [b, D] and host labels int64 [b] of this rank."""
    generator = torch.Generator().manual_seed(_SEED)
    labels = torch.randint(case.classes, (case.batch,), generator=generator)
    x = torch.randn(case.batch, case.embedding_size, generator=generator)
    x = x * _NORM / case.embedding_size**0.5
    mine = slice(rank * case.batch // world, (rank + 1) * case.batch // world)
    dtype = _DTYPES[case.dtype] or torch.float32
    return x[mine].to(device, dtype).requires_grad_(), labels[mine]


# --- What is measured -----------------------------------------------------------------------------


def _beside_targets(report: dict[str, Any]) -> str:
    case, ratios = report["case"], report["median_ratio"]
    said = [
        f"{name} {ratios[name]:.2f} (at most {limit:.2f}: {'met' if met else 'NOT met'})"
        for (name, limit), met in zip(
            report["targets"].items(), report["met"].values(), strict=True
        )
    ]
    shape = f"C {case['C']}, B {case['B']}, r {case['r']}, {report['products']} GEMMs"
    return f"{shape}:  {';  '.join(said)}"


@functools.cache
def _peak_of_rival(plain: Measurement) -> int:
    return together(plain.world, plain.device, _peak, plain, "rival")


def _report(told: Measurement) -> dict[str, Any]:
    case = told.case
    times = together(told.world, told.device, _time, told)
    peaks = {
        "ours": together(told.world, told.device, _peak, told, "ours"),
        "rival": _peak_of_rival(told._replace(case=case._replace(stored_mib=0))),  # keeps none
    }
    ratios = {
        "time / rival": statistics.median(
            a / b for a, b in zip(times["ours"], times["rival"], strict=True)
        ),
        "time / floor": statistics.median(
            a / b for a, b in zip(times["ours"], times["floor"], strict=True)
        ),
        "peak / rival": peaks["ours"] / peaks["rival"],
    }
    report = {
        "case": {
            "W": told.world, "B": case.batch, "C": case.classes, "D": case.embedding_size,
            "r": case.sample_rate, "dtype": case.dtype, "stored_mib": case.stored_mib,
            "update_in_backward": case.update_in_backward,
        },
        "median_ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "ms": {name: round(1e3 * statistics.median(every), 1) for name, every in times.items()
               if name in ("ours", "rival", "floor")},
        "peak_bytes": peaks,
        "piece": times["piece"],
        "products": times["products"],
        "pairs": told.pairs,
        "commit": commit(),
        "machine": machine(torch.device(told.device)),
        "torch": torch.__version__,
        "threads": times["threads"],
    }  # fmt: skip
    if case.targets is not None:
        report["targets"] = dict(zip(ratios, case.targets, strict=True))
        report["met"] = {name: ratios[name] <= limit for name, limit in report["targets"].items()}
    return report


def _time(rank: int, device: torch.device, told: Measurement) -> dict[str, Any]:
    """Seconds of every step of each side on the slowest rank."""
    case, group = told.case, collectives.world_group()
    ours = Ours(case, device)
    sides = {"ours": ours, "rival": Rival(case, device), "floor": Floor(ours, case, device)}
    x, labels = batch_of(case, rank, told.world, device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(told.warmup + told.pairs):
        for name in reversed(sides) if i % 2 else sides:
            x.grad = None
            slowest(0.0, group)
            began = time.perf_counter()
            sides[name].step(x, labels)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent = slowest(time.perf_counter() - began, group)
            if i >= told.warmup:
                times[name].append(spent)
    floor = sides["floor"]
    assert isinstance(floor, Floor)
    more = {"piece": floor.size, "products": floor.num_products}
    return times | more | {"threads": torch.get_num_threads()}


def _peak(rank: int, device: torch.device, told: Measurement, side: str) -> int:
    """Bytes beyond weights and state at the worst of building and two steps, on the worst rank."""
    x, labels = batch_of(told.case, rank, told.world, device)
    gc.collect()
    before = _reset_peak(device)
    one = {"ours": Ours, "rival": Rival}[side](told.case, device)
    if isinstance(one, Ours):
        for tensor in one.held()[1:]:
            tensor.zero_()  # pages of zeros count only once they are written
    for _ in range(_MEMORY_STEPS):
        x.grad = None
        one.step(x, labels)
    held = sum(tensor.numel() * tensor.element_size() for tensor in one.held())
    return int(slowest(_read_peak(device) - before - held, collectives.world_group()))


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark begins anew
    return _status("VmRSS")


def _read_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
