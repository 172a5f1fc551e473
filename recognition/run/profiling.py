"""A trace of a few steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WAIT, _WARMUP, _ACTIVE = 3, 1, 3  # steps of this process: left out, not kept, kept


@contextlib.contextmanager
def traced(
    wanted: bool, output: str, rank: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """What is to be called after each step. The steps after the first few are written to
    <output>/trace-<rank>.json, with what the CPU and the GPU did in each; `say` is told where, or
    that the run ended before."""
    if not wanted:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = os.path.join(output, f"trace-{rank}.json")
    written = False

    def write(trace: profile) -> None:
        nonlocal written
        last = min(trace.step_num, first + _ACTIVE - 1)
        if last < first:  # the run ended when the tracing began
            return
        trace.export_chrome_trace(path)
        written = True
        say(f"profile: steps {first} to {last} of this start are in {path}, for ui.perfetto.dev "
            "or chrome://tracing")  # fmt: skip

    first = _WAIT + _WARMUP + 1
    with profile(
        activities=activities,
        schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
        on_trace_ready=write,
    ) as trace:
        yield trace.step
    if not written:
        say(f"warning: profile=true wrote no trace: a start of {first} steps or more does")
