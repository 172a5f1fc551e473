"""Where the time of the steps goes: data, backbone, head, optimiser, communication, and the rest.

One clock is handed from phase to phase, so the parts add up to the whole. On a GPU events on its
stream mark the changes: the parts are then of the GPU's time, data is how long it stood idle for a
batch, and nothing waits for it.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

import torch

# communication: collectives and what the backbone's gradients, which travel during its backward,
# take longer than it; on each the wait for the slowest rank. other: between the steps.
NAMES = ("data", "backbone", "head", "optimizer", "communication", "other")
_PAUSE = "pause"  # verification and checkpoints, which are no step's

_running: list[Phases] = []


class Phases:
    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._name = "other"  # of the phase that runs
        self._marks: collections.deque[tuple[str, torch.cuda.Event]] = collections.deque()
        self._seconds = dict.fromkeys((*NAMES, _PAUSE), 0.0)
        self._began = 0.0
        self._mark(self._name)

    def enter(self, name: str) -> None:
        """What follows is of this phase."""
        self._mark(name)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What is inside is of this phase, what follows of the one before it."""
        before = self._name
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """What is inside is not counted."""
        return self.during(_PAUSE)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Collectives count as communication of these phases."""
        _running.append(self)
        try:
            yield
        finally:
            _running.remove(self)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; on a GPU, of what it has done by now."""
        self._mark(self._name)
        seconds = {name: self._seconds[name] for name in NAMES}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return seconds

    def _mark(self, name: str) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
            self._fold()
        else:
            now = time.perf_counter()
            self._seconds[self._name] += now - self._began if self._began else 0.0
            self._began = now
        self._name = name

    def _fold(self) -> None:
        """Add up what lies between events that have happened; asking does not wait."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            name, began = self._marks.popleft()
            self._seconds[name] += began.elapsed_time(self._marks[0][1]) / 1e3


def communication() -> contextlib.AbstractContextManager[None]:
    """What is inside is a collective, for the phases that run."""
    return _running[-1].during("communication") if _running else contextlib.nullcontext()
