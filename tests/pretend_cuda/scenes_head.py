"""Steps of a head on the pretend device, and what was seen in them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recognition.head import PartialFC
from recognition.head.chunked_softmax import plain_kernel
from recognition.head.kernels.fused import fused_kernel
from recognition.head.kernels.torch_ops import TorchOperations
from recognition.head.partial_fc import MemoryLimits
from recognition.losses import make_margin
from recognition.optim import RowAdamW, RowSGD
from tests.pretend_cuda import device as cuda
from tests.pretend_cuda.recorder import SYNCHRONISATION, Observation
from tests.recognition.losses.cases import CASES

C, D, B = 203, 32, 12
STEPS = 3  # the first two allocate, and are not looked at


class Way(NamedTuple):
    """How a head is trained, beside its loss."""

    form: str = "plain"  # or "fused"
    storage: str = "device"  # or "host"
    sample_rate: float = 0.3
    optimizer: str = "sgd"  # or "adamw"
    precision: str = "fp32"  # or "bf16", "fp16"
    micro_steps: int = 1
    in_backward: bool = False
    subcenters: int = 1
    threshold: float = 0.0
    labels_on: str = "host"  # or "device"

    def waits_by_design(self) -> bool:
        """Rows of the host's memory are read again when the step before has stored them: all of
        them where they are streamed, and those that a second micro-step asks for. The gradient of
        all rows, where one is kept, lies in pageable memory of the host."""
        return self.storage == "host" and (self.sample_rate == 1.0 or self.micro_steps > 1)

    def is_possible(self) -> bool:
        updates_at_once = self.in_backward and (self.micro_steps > 1 or self.precision == "fp16")
        return not updates_at_once and not (self.form == "fused" and self.subcenters > 1)


def make_head(case: str, way: Way, dtype: torch.dtype, device: torch.device) -> PartialFC:
    name, arguments = CASES[case]
    if way.threshold:
        arguments = arguments | {"interclass_filtering_threshold": way.threshold}
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way.precision)
    kernel = plain_kernel
    if way.form == "fused":
        kernel = functools.partial(fused_kernel, TorchOperations(compiled=False))
    head = PartialFC(
        make_margin(name, arguments), D, C, way.sample_rate, way.subcenters, dist.group.WORLD, 1,
        np.arange(C) % 9 + 1, way.storage,
        MemoryLimits(chunk_size=64, dtype=narrow, kernel=kernel),
    )  # fmt: skip
    return head.to(device, dtype)


def make_optimizer(head: PartialFC, way: Way) -> RowSGD | RowAdamW:
    return RowSGD(head) if way.optimizer == "sgd" else RowAdamW(head)


def batch(seed: int, num: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings [num, D] on the device, labels int64 [num] in the host's memory."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, C, (num,), generator=generator)
    labels[-1] = labels[0]  # a class that has two rows, whose gradients are summed
    return x.to(device).requires_grad_(), labels


def take_steps(
    head: PartialFC, optimizer: RowSGD | RowAdamW, way: Way, steps: int = STEPS
) -> list[Observation]:
    """What was seen in the last step."""
    device, seen = head.device, list[Observation]()
    scale = torch.tensor(1024.0).to(device) if way.precision == "fp16" else None
    for step in range(steps):
        batches = []
        for micro in range(way.micro_steps):
            x, labels = batch(100 * step + micro, B, device, torch.float32)
            batches.append((x, labels.to(device) if way.labels_on == "device" else labels))
        with cuda.RECORDER.watching() as observed:
            if way.in_backward:
                optimizer.begin(0.1)
            for x, labels in batches:
                features = None if head.margin.encoder_momentum is None else x.detach() * 2
                loss = head(x, labels, None, features)
                (loss if scale is None else loss * scale).backward()
            found = None if way.in_backward else torch.zeros((), device=device)
            optimizer.step(0.1, None if way.in_backward else scale, found)
        if step == steps - 1:
            seen += observed
    return seen


def step(case: str, way: Way) -> list[str]:
    """What a step of a head may not do on a GPU and did: wait, mix devices, race, or sum in another
    order each time."""
    head = make_head(case, way, torch.float32, torch.device("cuda", cuda.current_device()))
    seen = take_steps(head, make_optimizer(head, way), way)
    return [str(one) for one in seen if not _is_known(one, way)]


def launches(case: str, way: Way) -> int:
    """Kernels and copies of a step of a head."""
    head = make_head(case, way, torch.float32, torch.device("cuda", cuda.current_device()))
    take_steps(head, make_optimizer(head, way), way)
    return cuda.RECORDER.launched


def _is_known(one: Observation, way: Way) -> bool:
    if not way.waits_by_design() or one.kind != SYNCHRONISATION:
        return False
    known = ["head/async_copy.py"]  # PendingCopy.finish
    if way.sample_rate == 1.0 and not way.in_backward:
        known += ["head/class_rows.py", "head/row_optim.py"]  # the gradient, out and back
    return any(name in one.place for name in known)


def steps(jobs: list[tuple[str, Way]]) -> dict[str, list[str]]:
    """step() of many, by job: those in which something was seen, or which failed."""
    found = {}
    for case, way in jobs:
        try:
            seen = step(case, way)
        except Exception as error:
            seen = [f"{type(error).__name__}: {error}"]
        if seen:
            found[f"{case} {way}"] = sorted(set(seen))
    return found
