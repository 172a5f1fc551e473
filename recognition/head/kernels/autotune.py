"""Which form of the reduction a head takes: by name, or the quickest of a few measured steps.

Letters: W ranks, B rows of the global batch, S sampled classes of this rank, D embedding.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from recognition.config import Config
from recognition.distributed import collectives
from recognition.head import PartialFC
from recognition.head.chunked_softmax import Formula, Kernel, plain_kernel
from recognition.head.chunks import Chunks, Targets
from recognition.head.class_rows import ClassRows, Pool, unit
from recognition.head.device_storage import DeviceStorage
from recognition.head.kernels.cpu_library import CpuLibrary, NotBuilt
from recognition.head.kernels.fused import fused_kernel, why_unsupported
from recognition.head.kernels.native import native_kernel
from recognition.head.kernels.torch_ops import compiled_operations
from recognition.losses.margin import Rows

_WARMUP, _STEPS = 2, 5
_MOST_CLASSES = 1 << 17  # of a trial
_LEAST_CAPABILITY = (8, 0)
_WORTH_BUILDING = 4096  # sampled classes of a rank: of fewer, a step is a few ms in any form


class KernelChoice(NamedTuple):
    form: str  # "plain", "native", "compiled" or "triton-<rows>x<classes>"
    message: str  # one line for the log; "" if there is nothing to log


def choose(wanted: str, head: PartialFC, num_rows: int, known: str = "") -> KernelChoice:
    """Give the head its form, the same on all ranks; all of them call it. One gather of what each
    rank can do, and one all-reduce of [forms] numbers where something is to be tried.

    wanted: "auto": on a GPU the quickest of all by measurement, on a CPU "native" where there are
    many classes; or "plain", "native", "compiled" or "triton". num_rows: B. known: the form that
    the run had before, if it goes on. What cannot be done falls back to "plain", and `message` says
    why.
    """
    if wanted == "plain" or (wanted == "auto" and known == "plain"):
        return KernelChoice("plain", "")
    if wanted == "native" or (wanted == "auto" and head.device.type == "cpu"):
        return _native(wanted, head, known)
    forms, reason = _agreed_forms(wanted, head)
    if not forms:
        return KernelChoice("plain", f"head_kernel={wanted}: the plain form is taken, {reason}")
    if known in forms:
        forms = [known]
    elif wanted == "auto":
        forms = ["plain", *forms]
    tried = [_seconds(head, form, num_rows) for form in forms]
    seconds = torch.tensor([spent for spent, _ in tried], dtype=torch.float64)
    seconds = collectives.largest_over_ranks(seconds, head.group)
    taken = forms[int(seconds.argmin())] if seconds.isfinite().any() else "plain"
    head.limits = replace(head.limits, kernel=make(taken))
    figures = ", ".join(
        f"{form} {1e3 * spent:.2f} ms" if math.isfinite(spent) else f"{form} failed ({why})"
        for form, spent, (_, why) in zip(forms, seconds.tolist(), tried, strict=True)
    )
    return KernelChoice(taken, f"head_kernel={wanted}: {taken} is taken; of a step: {figures}")


def _agreed_forms(wanted: str, head: PartialFC) -> tuple[list[str], str]:
    """The fused forms that every rank can try, the same list on all; why there is none.

    Machines may differ (one without Triton, an older GPU), and the trial ends in an all-reduce of
    one number a form. One gather.
    """
    everywhere = collectives.gather_objects(_own_forms(wanted, head), head.group)
    forms = [form for form in everywhere[0][0] if all(form in there for there, _ in everywhere)]
    for rank, (there, reason) in enumerate(everywhere):
        if not there:
            return [], reason if rank == head.group.rank() else f"{reason} (rank {rank})"
    return forms, "" if forms else "no form is there on every rank"


def _own_forms(wanted: str, head: PartialFC) -> tuple[list[str], str]:
    """The fused forms that this rank can try; why there is none."""
    reason = unsupported(head)
    if reason is not None:
        return [], reason
    forms: list[str] = []
    without_triton = no_triton(head)
    if wanted != "compiled" and without_triton is None:
        forms += triton_forms(head)
    if wanted in ("auto", "compiled"):
        forms.append("compiled")
    return forms, "" if forms else str(without_triton)


def _native(wanted: str, head: PartialFC, known: str) -> KernelChoice:
    num_sampled = head.num_classes * head.sample_rate / head.group.size()
    if wanted == "auto" and known != "native" and num_sampled < _WORTH_BUILDING:
        return KernelChoice("plain", "")
    library, reason = None, "it is for CPUs"
    if head.device.type == "cpu":
        try:
            library, reason = CpuLibrary(head.storage.like.dtype), "another rank cannot build it"
        except NotBuilt as error:
            reason = str(error)
    failed = torch.tensor([float(library is None)], dtype=torch.float64)
    failed = collectives.largest_over_ranks(failed, head.group)  # which all ranks call
    if library is None or failed.item():
        return KernelChoice("plain", f"head_kernel={wanted}: the plain form is taken, {reason}")
    kernel = functools.partial(native_kernel, library)
    head.limits = replace(head.limits, kernel=kernel, cpu_library=library)
    return KernelChoice(
        "native", f"head_kernel={wanted}: native is taken, compiled for this processor"
    )


def choose_all(
    cfg: Config, heads: Sequence[PartialFC], world: int, known: Sequence[str] | None
) -> list[KernelChoice]:
    """choose() for each head of a run; known: the forms that it had before."""
    num_rows = max(cfg.global_batch(world) // (cfg.accumulation * len(heads)), 1)
    if known is None or len(known) != len(heads):
        known = [""] * len(heads)
    return [
        choose(cfg.head_kernel, head, num_rows, form)
        for head, form in zip(heads, known, strict=True)
    ]


def make(form: str) -> Kernel:
    """What Limits.kernel is to be for a form of this name."""
    if form == "plain":
        return plain_kernel
    if form == "compiled":
        return functools.partial(fused_kernel, compiled_operations())
    from recognition.head.kernels import triton_ops  # Triton may be missing elsewhere

    blocks = {f"triton-{blocks}": blocks for blocks in triton_ops.BLOCKS}
    return functools.partial(fused_kernel, triton_ops.TritonOperations(blocks[form]))


def triton_forms(head: PartialFC) -> list[str]:
    """The forms that are worth a trial; in the interpreter, the first."""
    from recognition.head.kernels import triton_ops

    if triton_ops.INTERPRETED:
        return [f"triton-{triton_ops.BLOCKS[0]}"]
    return [f"triton-{blocks}" for blocks in triton_ops.blocks_for(_dtype(head))]


def unsupported(head: PartialFC) -> str | None:
    """Why no fused form computes this head; None: they can."""
    if head.num_subcenters > 1:
        return "a class has several centres"
    reason = why_unsupported(head.margin)
    return None if reason is None else f"{type(head.margin).__name__} is not for it: {reason}"


def no_triton(head: PartialFC) -> str | None:
    """Why there is no Triton for this head; None: there is."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from recognition.head.kernels import triton_ops

    device, dtype = head.device, _dtype(head)
    if head.embedding_size > triton_ops.MOST_EMBEDDING_SIZE:
        return f"embeddings are longer than {triton_ops.MOST_EMBEDDING_SIZE}"
    if triton_ops.INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton is for GPUs, and the class rows are on the {device.type}"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if dtype in triton_ops.DTYPES else f"{dtype} has no Triton form"


def _dtype(head: PartialFC) -> torch.dtype:
    return head.limits.dtype or head.storage.like.dtype


@torch.no_grad()  # as a step computes: with gradients on, compiled forms would compile twice
def _seconds(head: PartialFC, form: str, num_rows: int) -> tuple[float, str]:
    """Median of a step on this rank; infinite, and why, if the form fails."""
    device = head.device
    try:
        step = _trial(head, make(form), num_rows)
        spent = []
        for i in range(_WARMUP + _STEPS):
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= _WARMUP:
                spent.append(time.perf_counter() - began)
        return statistics.median(spent), ""
    except Exception as error:  # of a compiler, a driver, or of memory: another form may do
        return math.inf, f"{type(error).__name__}: {error}".splitlines()[0]


@torch.no_grad()
def _trial(head: PartialFC, kernel: Kernel, num_rows: int) -> Callable:
    """Forward and backward of the reduction over as many classes as a step has of this rank's, or
    fewer, of centres drawn for it: without a collective and without a trace in the head."""
    device, dtype = head.device, head.storage.like.dtype
    start, stop = head.shard
    num = min(max(round((stop - start) * head.sample_rate), 1), _MOST_CLASSES)
    generator = torch.Generator().manual_seed(head.seed)
    centre = torch.randn(head.embedding_size, generator=generator).to(device, dtype)
    weight = torch.linspace(-1, 1, num, dtype=dtype, device=device)[:, None] + centre
    rows_of = DeviceStorage(nn.Parameter(weight), 1)
    place = torch.arange(num, device=device)
    index = place if head.sample_rate < 1 else None
    num_own = min(max(num_rows // head.group.size(), 1), num)
    own = place[:num_own]
    targets = Targets(own, own, own, own.tolist())
    x, _ = unit(torch.randn(num_rows, head.embedding_size, generator=generator).to(device, dtype))
    push = torch.full((num_rows,), 1 / num_rows, dtype=dtype, device=device)
    batch = Rows(push, push, torch.zeros_like(push, dtype=torch.int64), push[:, None])
    pool = Pool()

    def step() -> None:
        rows = ClassRows(rows_of, index, None, pool)
        chunks = Chunks(
            rows,
            targets,
            num_rows,
            head.chunk_size(num_rows),
            head.limits.stored_on(device.type == "cuda"),
            pool,
            head.limits.dtype,
        )
        cosines = chunks.target_cosines(x)
        reducer = kernel(chunks, Formula(head.margin.frozen(), batch))
        reducer.reduce(x)
        reducer.gradients(x, cosines, -push[own], push, [])
        rows.recycle()

    return step
