"""Where the time of a step goes: data, backbone, head, optimiser, communication and the rest.

Exactly one phase runs at any time, so the phases add up to the whole. On a GPU, events on the
stream mark the changes of phase and nothing waits for them: the phases divide the GPU's time, and
"data" is how long the GPU was idle for lack of a batch.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator

import torch

# communication: collectives, and the part of the gradient all-reduce that outlasts the backbone's
# backward; both include the wait for the slowest rank. other: between the steps.
NAMES = ("data", "backbone", "head", "optimizer", "communication", "other")
_PAUSE = "pause"  # verification and checkpoints, which belong to no step

_running: list[Phases] = []


class Phases:
    """Seconds spent in each phase."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._name = "other"  # the phase that is running
        self._marks: collections.deque[tuple[str, torch.cuda.Event]] = collections.deque()
        self._seconds = dict.fromkeys((*NAMES, _PAUSE), 0.0)
        self._began = 0.0
        self.enter(self._name)

    def enter(self, name: str) -> None:
        """Begin the phase `name`, which lasts until the next call."""
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

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count the body as the phase `name`, then return to the phase before it."""
        before = self._name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Do not count the body."""
        return self.during(_PAUSE)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the body runs, collectives count as communication of this object."""
        _running.append(self)
        try:
            yield
        finally:
            _running.remove(self)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading; on a GPU, of its finished work."""
        self.enter(self._name)
        seconds = {name: self._seconds[name] for name in NAMES}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return seconds

    def _fold(self) -> None:
        """Add up the time between completed events, without waiting for any."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            name, began = self._marks.popleft()
            self._seconds[name] += began.elapsed_time(self._marks[0][1]) / 1e3


def communication() -> contextlib.AbstractContextManager[None]:
    """Count the body as communication, if a Phases object is running()."""
    return _running[-1].during("communication") if _running else contextlib.nullcontext()
