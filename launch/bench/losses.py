"""What each margin loss costs: the time of a step of its head over that of CosFace's.

    torchrun --nproc-per-node 2 launch/bench/losses.py
    torchrun --nproc-per-node 2 launch/bench/losses.py --losses arcface,interface --check

A head of each loss is timed beside one of CosFace: same classes, same embeddings, half of them near
their class and half anywhere, so that some rows have hard negatives and some have none. A step is
forward, backward and the update of the class rows, and lasts as long as on the slowest rank. The
two take turns, and in every other pair the loss goes first; the ratio is taken pair by pair, so
that other work on the machine meets both, and its median is compared with the loss's limit.
softmax, which is CosFace without its margin, shows how far the machine itself strays from 1.

It uses GPUs (nccl) where there are any and the CPU (gloo) elsewhere, with the threads that
OMP_NUM_THREADS says: torchrun makes that one a process. One JSON line comes last, on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.common.errors import USER_ERRORS, UserError, UserKeyError, one_line
from data_tools.common.schema import nearest
from launch.bench.hardware import machine, wait_for
from launch.bench.processes import slowest
from recognition.distributed import collectives, runtime
from recognition.head import PartialFC
from recognition.head.class_rows import unit
from recognition.losses import MARGINS, make_margin
from recognition.optim import RowSGD
from recognition.run.run_dir import commit

_SEED = 1
_LR = 0.01
_NORM = 20.0  # of an embedding, about what a trained network gives
_BASELINE = "cosface"

# A head step over CosFace's, at most. A loss that moves the target's logit alone has the first.
_LIMIT_OF_TARGET = 1.1
_LIMITS: Mapping[str, float | None] = {
    "curricularface": 1.5,
    "mvsoftmax": 1.5,
    "adacos": 1.6,
    "interface": 2.2,  # variant dd, its default
    "circle": None,
    "spherefacer-v2": None,
    "uniface": None,
    "sphereface2": None,
}
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "spherefacer-v2": ("spherefacer", {"version": "v2"}),
}
# The dtype of the embeddings and of the class rows; autocast hands the head's fp32 rows narrow x.
_DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
}


class Loss(NamedTuple):
    margin: str
    arguments: Mapping[str, Any]
    limit: float | None  # None: none is promised


def losses() -> dict[str, Loss]:
    """Every loss that can be measured, by name: the margins, and variants of other cost."""
    plain: Mapping[str, tuple[str, Mapping[str, Any]]] = {name: (name, {}) for name in MARGINS}
    settings = {**plain, **_VARIANTS}
    return {
        name: Loss(margin, arguments, _LIMITS.get(name, _LIMIT_OF_TARGET))
        for name, (margin, arguments) in settings.items()
    }


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        names = _chosen(args.losses)
        with runtime.start() as here:
            if args.batch % here.world:
                raise UserError(f"--batch {args.batch}: not divisible by {here.world} processes")
            report = _report(names, args, here)
    except USER_ERRORS as error:  # a mistake in what was asked
        rank = os.environ.get("RANK", "0")
        print(f"error (rank {rank}): {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    if here.rank:
        return 0  # rank 0 answers for all: torchrun ends it when another fails
    print(json.dumps(report), flush=True)
    broken = {name: one for name, one in report["losses"].items() if one["holds"] is False}
    for name, one in broken.items():
        _say(here, f"broken: {name} takes {one['median_ratio']:.2f}, at most {one['limit']:g}")
    for name in report["left_out"]:
        _say(here, f"left out: {name}, --seconds {args.seconds:g} were over")
    return int(args.check and bool(broken or report["left_out"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--losses", metavar="A,B", help="which, default: all but the baseline")
    add("--classes", type=_positive, default=100_000, metavar="C", help="default %(default)s")
    add("--batch", type=_positive, default=256, metavar="B", help="of all ranks; %(default)s")
    add("--embedding-size", type=_positive, default=512, metavar="D", help="default %(default)s")
    add("--sample-rate", type=float, default=1.0, metavar="R", help="default %(default)s")
    add("--pairs", type=_positive, default=7, metavar="N", help="timed, a loss; %(default)s")
    add("--warmup", type=_whole, default=2, metavar="N", help="pairs before them; %(default)s")
    add("--dtype", choices=_DTYPES, default="fp32", help="bf16, fp16: of the embeddings alone")
    add("--seconds", type=float, metavar="LIMIT", help="begin no further loss after so long")
    add("--check", action="store_true", help="exit code 1 if a limit is broken or a loss left out")
    limits = ", ".join(f"{name} {_limit(loss.limit)}" for name, loss in losses().items())
    parser.epilog = f"losses and their limits, which are of 2 processes and the defaults: {limits}"
    return parser


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _chosen(typed: str | None) -> list[str]:
    """Raises:
    KeyError: no such loss; with the nearest.
    """
    known = losses()
    if typed is None:
        return [name for name in known if name != _BASELINE]
    names = list(dict.fromkeys(typed.split(",")))
    for name in names:
        if name not in known:
            raise UserKeyError(f"--losses {name!r}: {nearest(name, known, 'one of')}")
    return names


def _report(names: list[str], args: argparse.Namespace, here: runtime.Runtime) -> dict[str, Any]:
    began = time.perf_counter()
    baseline = _Step(losses()[_BASELINE], args, here)
    x, labels = _batch(baseline.head, args, here)
    found: dict[str, Any] = {}
    for name in names:
        if (
            args.seconds is not None
            and slowest(time.perf_counter() - began, here.group) > args.seconds
        ):
            break
        loss = losses()[name]
        found[name] = _compared(baseline, _Step(loss, args, here), loss.limit, x, labels, args)
        _say(here, f"{name:16} " + _line(found[name]))
    return {
        "machine": machine(here.device),
        "torch": torch.__version__,
        "commit": commit(),
        "W": here.world,
        "threads": torch.get_num_threads(),
        "B": args.batch,
        "C": args.classes,
        "D": args.embedding_size,
        "r": args.sample_rate,
        "dtype": args.dtype,
        "pairs": args.pairs,
        "losses": found,
        "left_out": [name for name in names if name not in found],
    }


class _Step:
    """A head of a loss with its row optimiser: one call is one step."""

    def __init__(self, loss: Loss, args: argparse.Namespace, here: runtime.Runtime) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        counts = torch.randint(1, 100, (args.classes,), generator=generator).numpy()
        _, dtype = _DTYPES[args.dtype]
        self.here = here
        self.head = PartialFC(
            make_margin(loss.margin, loss.arguments),
            args.embedding_size,
            args.classes,
            args.sample_rate,
            group=here.group,
            seed=_SEED,
            class_counts=counts,
        ).to(here.device, dtype)
        self.optimizer = RowSGD(self.head)

    def __call__(self, x: Tensor, labels: Tensor) -> None:
        x.grad = None
        self.head(x, labels).backward()
        self.optimizer.step(_LR)

    def milliseconds(self, x: Tensor, labels: Tensor) -> float:
        """Of one step on the slowest rank, all beginning together."""
        slowest(0.0, self.here.group)
        began = time.perf_counter()
        self(x, labels)
        wait_for(self.here.device)
        return 1e3 * slowest(time.perf_counter() - began, self.here.group)


def _compared(
    baseline: _Step,
    step: _Step,
    limit: float | None,
    x: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
) -> dict[str, Any]:
    own_ms: list[float] = []
    base_ms: list[float] = []
    for i in range(args.warmup + args.pairs):
        turns = [(baseline, base_ms), (step, own_ms)]
        for one, times in reversed(turns) if i % 2 else turns:
            times.append(one.milliseconds(x, labels))
    own_ms, base_ms = own_ms[args.warmup :], base_ms[args.warmup :]
    ratios = [own / base for own, base in zip(own_ms, base_ms, strict=True)]
    median = statistics.median(ratios)
    return {
        "median_ratio": round(median, 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "limit": limit,
        "holds": None if limit is None else median <= limit,
        "ms": round(statistics.median(own_ms), 2),
        "cosface_ms": round(statistics.median(base_ms), 2),
    }


def _batch(
    head: PartialFC, args: argparse.Namespace, here: runtime.Runtime
) -> tuple[Tensor, Tensor]:
    """Embeddings [b, D] and host labels int64 [b] of this rank: every other row has a cosine of
    0.2 to 0.8 to its class, the rest any direction."""
    num_rows, size = args.batch, args.embedding_size
    generator = torch.Generator().manual_seed(_SEED)
    labels = torch.randint(args.classes, (num_rows,), generator=generator)
    start, stop = head.shard
    held = (labels >= start) & (labels < stop)
    centres = torch.zeros(num_rows, size)  # each rank knows those of its shard
    own = head.weight.detach()[(labels[held] - start).to(here.device)]
    centres[held] = unit(own.cpu().float())[0]
    centres = collectives.sum_over_ranks(centres, here.group)
    noise, _ = unit(torch.randn(num_rows, size, generator=generator))
    cos = 0.2 + 0.6 * torch.rand(num_rows, 1, generator=generator)
    near = cos * centres + (1 - cos.square()).sqrt() * noise
    x = torch.where(torch.arange(num_rows)[:, None] % 2 == 0, near, noise)
    x = x * _NORM * (0.75 + 0.5 * torch.rand(num_rows, 1, generator=generator))
    dtype, _ = _DTYPES[args.dtype]
    local = num_rows // here.world
    mine = slice(here.rank * local, (here.rank + 1) * local)
    return x[mine].to(here.device, dtype).requires_grad_(), labels[mine]


def _line(found: Mapping[str, Any]) -> str:
    verdict = {None: "", True: ", holds", False: ", BROKEN"}[found["holds"]]
    return (
        f"{found['median_ratio']:.3f} ({found['min']:.3f} to {found['max']:.3f}) "
        f"limit {_limit(found['limit'])}{verdict}; "
        f"{found['ms']:.0f} ms, cosface {found['cosface_ms']:.0f} ms"
    )


def _limit(limit: float | None) -> str:
    return "none" if limit is None else f"{limit:g}"


def _say(here: runtime.Runtime, text: str) -> None:
    if here.rank == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
