"""A trace of a few steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WAIT, _WARMUP, _ACTIVE = 3, 1, 3  # steps of this process: left out, not kept, kept


@contextlib.contextmanager
def traced(wanted: bool, output: str, rank: int) -> Iterator[Callable[[], None]]:
    """What is to be called after each step. The steps after the first few are written to
    <output>/trace-<rank>.json, with what the CPU and the GPU did in each."""
    if not wanted:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = os.path.join(output, f"trace-{rank}.json")
    with profile(
        activities=activities,
        schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(path),
    ) as trace:
        yield trace.step
