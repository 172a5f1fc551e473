"""How fast a run goes, and the record and line that say so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from data_tools.load.loader import BatchSource
from recognition.distributed.step_timer import Phases


class Stopwatch:
    """Steps, seconds and seconds of waiting for data since the last reading, pauses left out."""

    def __init__(self, source: BatchSource, step: int, phases: Phases) -> None:
        self._source, self._phases = source, phases
        phases.read()
        self._last = (step, time.perf_counter(), source.wait_seconds)

    def read(self, step: int) -> tuple[int, float, float]:
        now = (step, time.perf_counter(), self._source.wait_seconds)
        before, self._last = self._last, now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._phases.pause():
            yield
        step, then, waited = self._last
        self._last = (step, then + time.perf_counter() - began, waited)


def speed(reading: tuple[int, float, float], global_batch: int) -> dict[str, float]:
    """images/s over all processes, and the share of the time spent waiting for data."""
    steps, seconds, waited = reading
    seconds = max(seconds, 1e-9)
    return {"images_per_second": steps * global_batch / seconds, "data_wait": waited / seconds}


def where_time_went(phases: Phases, steps: int) -> dict[str, float]:
    """Seconds a step of each phase since the last reading, on this rank."""
    return {name: seconds / max(steps, 1) for name, seconds in phases.read().items()}


def line(record: dict[str, Any], total_steps: int, global_batch: int) -> str:
    """One readable line of a step's record."""
    spent = record["seconds"]
    whole = max(sum(spent.values()), 1e-9)
    shares = " ".join(f"{name} {100 * part / whole:.0f} %" for name, part in spent.items())
    left = int((total_steps - record["step"]) * global_batch / record["images_per_second"])
    return (
        f"step {record['step']}/{total_steps}  epoch {record['epoch']:.2f}  "
        f"loss {record['loss']:.4f}  lr {record['lr']:.5f}  "
        f"{record['images_per_second']:.0f} images/s  {shares}  "
        f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )
