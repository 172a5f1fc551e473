"""Is the head on a GPU right? The CPU's numbers in fp64, and no wait for the GPU within a step.

    python -m launch.bench.gpu.device_check

Prints one JSON line a loss: the largest deviation of the loss and of both gradients from the
CPU's, and what synchronised the host in a step, if anything did. Exit code 1 if a deviation exceeds
rounding or a step synchronised. tests/recognition/head/test_gpu.py checks more and wants pytest.
Without a GPU it compares the CPU with itself, so that no line of it is misspelt.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.common.errors import one_line
from launch.bench.losses import Loss, losses
from recognition.distributed import runtime
from recognition.head import PartialFC
from recognition.losses import make_margin
from recognition.optim import RowSGD

_CLASSES, _SIZE, _ROWS = 1003, 64, 96
_RATES = (1.0, 0.3)
_MOST = 1e-9  # of the deviation in fp64, relative to the tensor's largest number


def main() -> int:
    failed = []
    with runtime.start() as here:
        for name, loss in losses().items():
            found = _checked(loss, here.device)
            print(json.dumps({"loss": name, **found}), flush=True)
            if found["deviation"] > _MOST or found["synchronised"]:
                failed.append(name)
    if failed:
        print(f"wrong, or waiting for the GPU: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _checked(loss: Loss, device: torch.device) -> dict[str, Any]:
    deviation, synchronised = 0.0, []
    for rate in _RATES:
        truth, _ = _numbers(loss, rate, torch.device("cpu"))
        found, cause = _numbers(loss, rate, device)
        synchronised += [] if cause is None else [f"sample_rate {rate:g}: {cause}"]
        for exact, ours in zip(truth, found, strict=True):
            apart = (ours.cpu() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
            deviation = max(deviation, apart.item())
    return {"deviation": deviation, "synchronised": synchronised, "device": device.type}


def _numbers(loss: Loss, rate: float, device: torch.device) -> tuple[list[Tensor], str | None]:
    """The loss and both gradients of a step; what synchronised the host in the step after it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_ROWS, _SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(_CLASSES, (_ROWS,), generator=generator)
    head = PartialFC(
        make_margin(loss.margin, loss.arguments),
        _SIZE,
        _CLASSES,
        rate,
        seed=1,
        class_counts=np.arange(_CLASSES) % 9 + 1,
    ).to(device, torch.float64)
    rows = RowSGD(head)
    local_x = x.to(device).requires_grad_()
    value = head(local_x, labels)
    value.backward()
    assert local_x.grad is not None
    numbers = [value.detach(), local_x.grad.clone(), head.sampled_grad.clone()]
    rows.step(0.1)
    if device.type != "cuda":
        return numbers, None
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(local_x, labels).backward()
        rows.step(0.1)
    except RuntimeError as error:
        return numbers, one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return numbers, None


if __name__ == "__main__":
    sys.exit(main())
