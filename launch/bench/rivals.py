"""The head beside other libraries' fused linear cross entropy: `launch/bench/head.py --rivals`.

Each computes what all of them can: plain softmax over all classes (no margin, no sampling, one
process), forward and backward, without the update of the rows. The others get unit rows with the
scale folded into the embeddings, in the format of the products: they pay for no normalisation and
know no fp32 rows, so theirs is the easier task. Ours normalises both, and its gradients are those
of the fp32 rows. `eager` is torch's own linear and cross_entropy, the standard form.

The error is that of the loss and of both gradients (Frobenius norm, relative) against fp64 of the
same formula on the same numbers, at most _ERROR_CLASSES classes and _ERROR_ROWS rows.

Letters: B rows, C classes, D embedding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data_tools.common.errors import one_line
from launch.bench.hardware import wait_for
from launch.bench.memory import read_peak, reset_peak
from launch.bench.sides import DTYPES, SEED, Case, Floor, OurHead, batch_of
from recognition.head.class_rows import unit

_SCALE = 64.0
_ERROR_CLASSES, _ERROR_ROWS = 20_000, 256
_MEMORY_STEPS = 2

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [B, D], weight [C, D], labels [B]) -> []


def _eager() -> Loss:
    return lambda x, weight, labels: F.cross_entropy(F.linear(x, weight).float(), labels)


def _torch() -> Loss:
    operation = getattr(F, "linear_cross_entropy", None)
    if operation is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy: 2.13 has")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    chunked = {} if options is None else {"options": options()}
    return lambda x, weight, labels: operation(x, weight, labels, **chunked)


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


# By the name of what has to be installed.
RIVALS: dict[str, Callable[[], Loss]] = {
    "eager": _eager,
    "torch": _torch,
    "liger-kernel": _liger,
    "quack-kernels": _quack,
    "cut-cross-entropy": _cut,
}


OF_TORCH = ("eager", "torch")


class Softmax:
    """A rival: forward and backward over a weight of its own."""

    def __init__(self, name: str, case: Case, device: torch.device) -> None:
        self.loss = RIVALS[name]()
        dtype = DTYPES[case.dtype] or torch.float32
        rows = torch.empty(case.classes, case.embedding_size, device=device)
        generator = torch.Generator(device).manual_seed(SEED)
        self.weight, _ = unit(rows.normal_(generator=generator))
        self.weight = self.weight.to(dtype).requires_grad_()

    def step(self, x: Tensor, labels: Tensor) -> None:
        self.weight.grad = None
        self.loss(x, self.weight, labels).backward()

    def operands(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and labels as step() takes them."""
        scaled = _SCALE * unit(x.detach().float())[0]
        return scaled.to(self.weight.dtype).requires_grad_(), labels.to(x.device)

    def held(self) -> list[Tensor]:
        return [self.weight.detach()]

    def error(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        self.weight.grad = None
        loss = self.loss(x, self.weight, labels)
        loss.backward()
        return _errors(
            (loss, x.grad, self.weight.grad),
            _truth(x, self.weight, labels, lambda x, weight: x @ weight.T),
        )


class OurHeadAlone(OurHead):
    """Ours without the update of the rows."""

    def step(self, x: Tensor, labels: Tensor) -> None:
        self.head(x, labels).backward()
        self.head.end_step()

    def operands(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x.grad = None
        return x, labels

    def held(self) -> list[Tensor]:
        return [self.head.weight.detach()]

    def error(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        loss = self.head(x, labels)
        loss.backward()
        found = loss, x.grad, self.head.sampled_grad
        self.head.end_step()

        def logits(x: Tensor, weight: Tensor) -> Tensor:
            return _SCALE * F.normalize(x) @ F.normalize(weight).T

        return _errors(found, _truth(x, self.head.weight, labels.to(x.device), logits))


Gradients = Sequence[Tensor | None]  # the loss [], with respect to x [B, D] and to the rows [C, D]


def _truth(
    x: Tensor, weight: Tensor, labels: Tensor, logits: Callable[[Tensor, Tensor], Tensor]
) -> Gradients:
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    loss = F.cross_entropy(logits(x, weight), labels)
    loss.backward()
    return loss, x.grad, weight.grad


def _errors(found: Gradients, truth: Gradients) -> dict[str, float]:
    errors = {}
    for name, ours, exact in zip(("loss", "grad_x", "grad_weight"), found, truth, strict=True):
        assert ours is not None and exact is not None
        deviation = (ours.detach().double() - exact.detach()).norm() / exact.detach().norm()
        errors[name] = float(f"{deviation.item():.3g}")
    return errors


class Workload(NamedTuple):
    """What the measuring process is told: picklable."""

    case: Case
    pairs: int
    warmup: int
    names: tuple[str, ...]  # of RIVALS


def _side(name: str, case: Case, device: torch.device) -> Softmax | OurHeadAlone:
    if name in RIVALS:
        return Softmax(name, case, device)
    return OurHeadAlone(case, device, None if name == "ours" else name)


def compare(rank: int, device: torch.device, workload: Workload) -> dict[str, Any]:
    """Of all that run here: milliseconds of a step, bytes beyond the weight, errors; of the others
    why they do not."""
    case = workload.case
    x, labels = batch_of(case, rank, 1, device)
    small = case._replace(
        classes=min(case.classes, _ERROR_CLASSES), batch=min(case.batch, _ERROR_ROWS)
    )
    peaks: dict[str, int] = {}
    errors: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in ["ours", *case.forms, *workload.names]:
        try:
            side = _side(name, small, device)
            errors[name] = side.error(*side.operands(*batch_of(small, rank, 1, device)))
            peaks[name] = _peak(name, case, device, x, labels)
        except Exception as error:  # of an import, a compiler, a driver or memory: a rival less
            errors.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {one_line(error)}"
    sides = {name: _side(name, case, device) for name in peaks}
    ours = sides.get("ours")
    floor = Floor(ours, case, device) if isinstance(ours, OurHead) else None
    return {
        "ms": _times(sides, floor, workload, x, labels),
        "products": floor.num_products if floor else None,
        "peak_bytes": peaks,
        "error": errors,
        "left_out": left_out,
        "taken": {name: side.form for name, side in sides.items() if isinstance(side, OurHead)},
    }


def _peak(name: str, case: Case, device: torch.device, x: Tensor, labels: Tensor) -> int:
    """Bytes beyond the weight at the worst of building and two steps."""
    before = reset_peak(device)
    side = _side(name, case, device)
    for _ in range(_MEMORY_STEPS):
        side.step(*side.operands(x, labels))
    held = sum(tensor.numel() * tensor.element_size() for tensor in side.held())
    return read_peak(device) - before - held


def _times(
    sides: dict[str, Softmax | OurHeadAlone],
    floor: Floor | None,
    workload: Workload,
    x: Tensor,
    labels: Tensor,
) -> dict[str, float]:
    """Median milliseconds; all take turns, and what goes first changes."""
    timed = {**sides, **({"floor": floor} if floor else {})}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(workload.warmup + workload.pairs):
        for name in reversed(timed) if i % 2 else timed:
            one = timed[name]
            operands = (x, labels) if isinstance(one, Floor) else one.operands(x, labels)
            began = _now(x.device)
            one.step(*operands)
            if i >= workload.warmup:
                seconds[name].append(_now(x.device) - began)
    return {name: round(1e3 * statistics.median(each), 3) for name, each in seconds.items()}


def _now(device: torch.device) -> float:
    wait_for(device)
    return time.perf_counter()
