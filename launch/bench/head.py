"""What a step of the head costs: time and memory beside the standard form's and the GEMMs' floor.

    python launch/bench/head.py --suite cpu
    python launch/bench/head.py --suite gpu
    python launch/bench/head.py --classes 100000 --batch 256 --sample-rate 0.1 --processes 2
    python launch/bench/head.py --plot OUT.svg      how the time of a step grows with each size

A step is forward, backward and the update of the class rows (SGD with momentum), CosFace, rows of a
batch spread over all processes; it lasts as long as on the slowest of them. The rival is the
standard form of arcface_torch, written plainly in standard_head.py. The floor is the GEMMs that the
arithmetic needs (forward, recompute if any, two gradients) at the shapes of our pieces. All stand
in one process group and take turns; what goes first changes from pair to pair; medians are given.
Ours has the form of recognition/kernels that --kernel names; in the suite for a CPU, that of a run
(auto). --forms adds others to those that take turns.

Peak memory is each one's alone, in processes of its own: from before the head is built to the end
of two steps, less weights and optimiser state, so that what the allocator keeps counts: the
resident set on a CPU, what torch has reserved on a GPU.

--rivals compares, in place of all this, plain softmax with other libraries': see rivals.py.

--alone leaves out rival and floor: is a size within reach, and at what time? --storage auto then
holds the rows on the device if they fit it and on the host if not.

It uses GPUs (nccl) where there are any and the CPU (gloo, one thread a process) elsewhere. One JSON
line a case, on stdout; of a suite the comparison with its targets, last, on stderr.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from data_tools.common.errors import USER_ERRORS, UserError, one_line
from launch.bench import rivals
from launch.bench.hardware import machine, wait_for
from launch.bench.memory import read_peak, reset_peak
from launch.bench.processes import run_on_ranks, slowest
from launch.bench.sides import DTYPES, Case, Floor, OurHead, Rival, Storage, Unavailable, batch_of
from recognition.distributed import collectives
from recognition.run.run_dir import commit

_MEMORY_STEPS = 2
_SHARE = 0.9  # of free memory that a case may take

_RATIOS = ("time / rival", "time / floor", "peak / rival")
_FUSED = ("compiled", "triton")
_FORMS = ("plain", "native", *_FUSED)  # as config.py's head_kernel
_OF_A_CASE = (
    "classes",
    "batch",
    "embedding_size",
    "sample_rate",
    "dtype",
    "stored_mib",
    "update_in_backward",
    "piece",
    "kernel",
    "forms",
    "storage",
    "alone",
    "plot",
    "rivals",
)
SUITES = {
    "cpu": [
        Case(
            classes,
            batch,
            sample_rate,
            targets=targets,
            stored_mib=stored_mib,
            update_in_backward=True,
            kernel="auto",
        )
        for classes, batch, sample_rate, targets in (
            (100_000, 256, 1.0, (0.50, 1.25, 0.35)),
            (500_000, 256, 0.1, (0.26, 1.35, 0.10)),
            (60_000, 512, 0.5, (0.72, 1.25, 0.30)),
        )
        for stored_mib in (0, 64)
    ],
    "gpu": [
        Case(1_000_000, batch, rate, dtype="bf16", targets=(0.30, 1 / 0.6, 0.10), forms=_FUSED)
        for batch in (4096, 1024)
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
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(parser, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = args.processes or (torch.cuda.device_count() if device == "cuda" else 2)
    try:
        if device == "cuda" and world > torch.cuda.device_count():
            raise UserError(f"--processes {world}: there are {torch.cuda.device_count()} GPUs")
        cases = (
            SUITES[args.suite]
            if args.suite
            else [
                Case(
                    args.classes,
                    args.batch,
                    args.sample_rate,
                    args.embedding_size,
                    args.dtype,
                    stored_mib=args.stored_mib,
                    update_in_backward=args.update_in_backward,
                    piece=args.piece,
                    kernel=args.kernel,
                    forms=tuple(args.forms),
                    alone=args.alone,
                    storage=_storage(args, device, world),
                )
            ]
        )
        if args.plot:
            base = Measurement(cases[0], world, args.pairs, args.warmup, device)
            print(json.dumps({"ms": _plot(args.plot, base)}), flush=True)
            return 0
        if args.rivals:
            print(json.dumps(_beside_rivals(cases[0], args.pairs, args.warmup, device)), flush=True)
            return 0
        reports = []
        for case in cases:
            if case.batch % world:
                raise UserError(f"batch {case.batch}: not divisible by {world} processes")
            reports.append(_report(Measurement(case, world, args.pairs, args.warmup, device)))
            print(json.dumps(reports[-1]), flush=True)
        for report in reports if args.suite else []:
            print(_beside_targets(report), file=sys.stderr)
    except USER_ERRORS as error:  # a mistake in what was asked
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
    add("--dtype", choices=DTYPES, default="fp32", help="of the products; default %(default)s")
    add(
        "--stored-mib", type=int, default=64, metavar="N", help="kept for the backward; %(default)s"
    )
    add("--update-in-backward", action="store_true", help="no gradient of the rows exists")
    add("--piece", type=int, metavar="N", help="classes; default: from the cache")
    add(
        "--kernel", choices=["auto", *_FORMS], default="plain", help="our form; default %(default)s"
    )
    add("--forms", nargs="+", choices=_FORMS, default=(), help="others, to be timed beside it")
    add("--storage", choices=["device", "host", "auto"], default="device", help="of the rows")
    add("--alone", action="store_true", help="no rival, no floor")
    add("--plot", metavar="OUT.svg", help="vary each size from this case, and draw our step's time")
    add("--rivals", action="store_true", help="plain softmax beside other libraries', one process")
    add("--processes", type=int, metavar="W", help="default: one a GPU, two on a CPU")
    add("--pairs", type=int, default=7, metavar="N", help="timed; default %(default)s")
    add("--warmup", type=int, default=2, metavar="N", help="pairs before them; %(default)s")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with the usage where an option is out of its range, or not heeded by a suite."""
    if args.suite:
        for name in _OF_A_CASE:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is of one case: leave out --suite")
    if args.plot and not args.plot.endswith((".svg", ".png")):
        parser.error(f"--plot {args.plot}: give a name that ends in .svg or .png")
    least = {
        "classes": 1,
        "batch": 1,
        "embedding_size": 1,
        "stored_mib": 0,
        "piece": 1,
        "processes": 1,
        "pairs": 1,
        "warmup": 0,
    }
    for name, number in least.items():
        given = getattr(args, name)
        if given is not None and given < number:
            parser.error(f"--{name.replace('_', '-')} {given}: at least {number}")
    if args.rivals and (args.processes or 1, args.sample_rate, args.storage) != (1, 1, "device"):
        parser.error("--rivals: one process, all classes (--sample-rate 1), rows on the device")
    if not 0 < args.sample_rate <= 1:
        parser.error(f"--sample-rate {args.sample_rate:g}: a share of the classes, above 0, to 1")


def _storage(args: argparse.Namespace, device: str, world: int) -> Storage:
    """Where the rows, their momentum and the gradient of a sample are to be held.

    Raises:
        ValueError: there is no place for them.
    """
    if args.storage != "auto":
        return args.storage
    rows = args.classes * args.embedding_size * 4 / world
    needed = rows * (2 + 2 * args.sample_rate)  # weight, momentum; a sample's gradient and update
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else host
    if needed < _SHARE * free:
        return "device"
    if 2 * rows * world < _SHARE * host:
        return "host"
    raise UserError(
        f"{args.classes} classes need {needed / 2**30:.0f} GiB on a device that has "
        f"{free / 2**30:.0f} free, or {2 * rows * world / 2**30:.0f} GiB on a host that has "
        f"{host / 2**30:.0f}"
    )


# --- What is measured -----------------------------------------------------------------------------


def _beside_targets(report: dict[str, Any]) -> str:
    case, ratios = report["case"], report["median_ratio"]
    said = [
        f"{name} {ratios[name]:.2f} "
        f"(at most {report['targets'][name]:.2f}: {'met' if met else 'NOT met'})"
        for name, met in report["met"].items()
    ]
    shape = f"C {case['C']}, B {case['B']}, r {case['r']}, {report['products']} GEMMs"
    return f"{shape}:  {';  '.join(said)}"


@functools.cache
def _peak_of_rival(plain: Measurement) -> int:
    return run_on_ranks(plain.world, plain.device, _peaks, plain, ["rival"])["rival"]


def _times(workload: Measurement) -> dict[str, Any]:
    """What _time gives on the first of fresh processes.

    Raises: UserError: the form of --kernel is not available here.
    """
    times = run_on_ranks(workload.world, workload.device, _time, workload)
    if "unavailable" in times:
        raise UserError(f"--kernel {workload.case.kernel}: {times['unavailable']}")
    return times


def _plot(path: str, base: Measurement) -> dict[str, dict[float, float]]:
    """Milliseconds of our step where one size changes and the others are those of `base`, drawn."""
    case = base.case._replace(alone=True)

    def cases(**changes: Any) -> Measurement:
        return base._replace(case=case._replace(**changes))

    classes = [max(1, int(case.classes * 2.0**power)) for power in range(-2, 5)]
    batches = [
        base.world * max(1, int(case.batch * 2.0**power) // base.world) for power in range(-2, 3)
    ]
    lines: dict[str, dict[float, Measurement]] = {
        "classes": {c: cases(classes=c) for c in classes},
        "classes, r 0.1": {c: cases(classes=c, sample_rate=0.1) for c in classes},
        "batch": {b: cases(batch=b) for b in batches},
        "sample rate": {r: cases(sample_rate=r) for r in (0.05, 0.1, 0.2, 0.5, 1.0)},
        "processes": {
            w: cases()._replace(world=w) for w in range(1, base.world + 1) if case.batch % w == 0
        },
    }
    ms: dict[str, dict[float, float]] = {name: {} for name in lines}
    for name, measurements in lines.items():
        for size, workload in measurements.items():
            ms[name][size] = round(1e3 * statistics.median(_times(workload)["seconds"]["ours"]), 3)
            print(f"{name} {size:g}: {ms[name][size]:.1f} ms", file=sys.stderr, flush=True)
    import matplotlib  # needed for the picture alone

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained", sharey=True)
    for name, points in ms.items():
        label = name.partition(",")[0]
        axis = axes[["classes", "batch", "sample rate", "processes"].index(label)]
        axis.plot(*zip(*points.items(), strict=True), "o-", ms=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    axes[0].set_ylabel(f"ms a step, D {case.embedding_size}")
    figure.savefig(path, metadata={"Date": None} if path.endswith("svg") else None)
    return ms


def _report(workload: Measurement) -> dict[str, Any]:
    case = workload.case
    times = _times(workload)
    seconds: dict[str, list[float]] = times["seconds"]
    timed = [name for name in seconds if name != "floor"]
    if case.alone:  # a large one is not built twice
        peaks = {"ours": times["peak"]}
    elif workload.device == "cuda":
        peaks = run_on_ranks(workload.world, workload.device, _peaks, workload, timed)
    else:  # a resident set keeps what an earlier side left
        peaks = {}
        for name in timed:
            if name == "rival":  # which knows nothing of budgets and forms
                peaks["rival"] = _peak_of_rival(
                    workload._replace(case=case._replace(stored_mib=0, forms=()))
                )
            else:
                peaks |= run_on_ranks(workload.world, workload.device, _peaks, workload, [name])
    report: dict[str, Any] = {
        "case": _described(case, workload.world),
        "median_ratio": _ratios("ours", seconds, peaks),
        "ms": {name: round(1e3 * statistics.median(every), 1) for name, every in seconds.items()},
        "peak_bytes": peaks,
        **{key: times[key] for key in ("piece", "products", "threads", "taken", "left_out")},
        "storage": case.storage,
        **_origin(workload.pairs, workload.device),
    }
    report["forms"] = {
        name: _ratios(name, seconds, peaks) for name in case.forms if name in seconds
    }
    if case.targets is not None:
        report["targets"] = dict(zip(_RATIOS, case.targets, strict=True))
        for found, met in [
            (report["median_ratio"], report.setdefault("met", {})),
            *((found, found.setdefault("met", {})) for found in report["forms"].values()),
        ]:
            met |= {
                name: found[name] <= limit
                for name, limit in report["targets"].items()
                if name in found
            }
    return report


def _described(case: Case, world: int) -> dict[str, Any]:
    return {
        "W": world,
        "B": case.batch,
        "C": case.classes,
        "D": case.embedding_size,
        "r": case.sample_rate,
        "dtype": case.dtype,
        "stored_mib": case.stored_mib,
        "update_in_backward": case.update_in_backward,
        "kernel": case.kernel,
    }


def _origin(pairs: int, device: str) -> dict[str, Any]:
    """Of how many pairs of steps, of which code, and where."""
    return {
        "pairs": pairs,
        "commit": commit(),
        "machine": machine(torch.device(device)),
        "torch": torch.__version__,
    }


def _beside_rivals(case: Case, pairs: int, warmup: int, device: str) -> dict[str, Any]:
    workload = rivals.Workload(case._replace(margin="softmax"), pairs, warmup, tuple(rivals.RIVALS))
    try:
        found = run_on_ranks(1, device, rivals.compare, workload)
    except OSError as error:  # a library's kernel may end the whole process, or spoil its GPU
        found = run_on_ranks(1, device, rivals.compare, workload._replace(names=rivals.OF_TORCH))
        others = set(rivals.RIVALS) - set(rivals.OF_TORCH)
        found["left_out"] |= dict.fromkeys(others, f"one of these ended all: {one_line(error)}")
    return {"case": _described(case, 1), **found, **_origin(pairs, device)}


def _ratios(side: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, float]:
    """Medians over the pairs, against what has been measured."""
    found = {
        f"time / {other}": statistics.median(
            a / b for a, b in zip(seconds[side], seconds[other], strict=True)
        )
        for other in ("rival", "floor", "ours")
        if other in seconds and other != side
    }
    if "rival" in peaks:
        found["peak / rival"] = peaks[side] / peaks["rival"]
    return {name: round(ratio, 4) for name, ratio in found.items()}


def _time(rank: int, device: torch.device, workload: Measurement) -> dict[str, Any]:
    """Seconds of every step of each side on the slowest rank."""
    case, group = workload.case, collectives.world_group()
    x, labels = batch_of(case, rank, workload.world, device)
    before = reset_peak(device)
    sides: dict[str, OurHead | Rival | Floor] = {}
    left_out: dict[str, str] = {}

    def add(name: str, make: Callable[[], OurHead | Rival | Floor]) -> None:
        """The side after a first step, or why it is not there; on one rank where it is memory."""
        try:
            side = make()
            side.step(x, labels)
            sides[name] = side
        except Unavailable as error:
            left_out[name] = str(error)
        except torch.cuda.OutOfMemoryError as error:
            if workload.world > 1:  # the others wait for this one
                raise
            left_out[name] = one_line(error)

    try:
        ours = OurHead(case, device)
    except Unavailable as error:  # on every rank
        return {"unavailable": str(error)}
    ours.step(x, labels)
    sides["ours"] = ours
    for form in case.forms:
        add(form, lambda form=form: OurHead(case, device, form))  # type: ignore[misc]
    if not case.alone:
        add("rival", lambda: Rival(case, device))
    floor = Floor(ours, case, device)
    if not case.alone:
        sides["floor"] = floor
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(workload.warmup + workload.pairs):
        for name in reversed(sides) if i % 2 else sides:
            x.grad = None
            slowest(0.0, group)
            began = time.perf_counter()
            sides[name].step(x, labels)
            wait_for(device)
            spent = slowest(time.perf_counter() - began, group)
            if i >= workload.warmup:
                times[name].append(spent)
    return {
        "peak": _beyond(before, ours, device),
        "seconds": times,
        "piece": floor.size,
        "products": floor.num_products,
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        "taken": {name: side.form for name, side in sides.items() if isinstance(side, OurHead)},
    }


def _peaks(
    rank: int, device: torch.device, workload: Measurement, names: Sequence[str]
) -> dict[str, int]:
    return {name: _peak(rank, device, workload, name) for name in names}


def _peak(rank: int, device: torch.device, workload: Measurement, side: str) -> int:
    """Bytes beyond weights and state at the worst of building and two steps, on the worst rank."""
    x, labels = batch_of(workload.case, rank, workload.world, device)
    before = reset_peak(device)
    one: OurHead | Rival
    if side == "rival":
        one = Rival(workload.case, device)
    else:
        one = OurHead(workload.case, device, None if side == "ours" else side)
        for tensor in one.held()[1:]:
            tensor.zero_()  # pages of zeros count only once they are written
    for _ in range(_MEMORY_STEPS):
        x.grad = None
        one.step(x, labels)
    return _beyond(before, one, device)


def _beyond(before: int, side: OurHead | Rival, device: torch.device) -> int:
    """Bytes at the worst since `before`, less weights and state, on the worst rank."""
    held = sum(t.numel() * t.element_size() for t in side.held() if t.device == device)
    return int(slowest(read_peak(device) - before - held, collectives.world_group()))


if __name__ == "__main__":
    sys.exit(main())
