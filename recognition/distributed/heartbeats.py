"""Heartbeats of all ranks in the rendezvous store, their ages, and which rank blocks the others.

A heartbeat carries a counter. The reader measures, by its own monotonic clock, how long ago the
counter changed, so the clocks of other machines, which may be seconds off, do not matter.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

from torch.distributed import DistError, Store

_KEY = "watchdog/rank-{}"
_STORE_SECONDS = 2  # time-out after which the store counts as gone
SILENT = 4.0  # seconds without a heartbeat after which a rank counts as silent
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
# What a rank is doing, by the file of its innermost line of ours; the first match counts.
_WAITING = "waits for the other ranks"
_DOES = {
    "data_tools/": "waits for data",
    "recognition/distributed/collectives.py": _WAITING,
    "recognition/distributed/store_exchange.py": _WAITING,
    "recognition/checkpoint/": "saves",
    "eval/": "verifies",
}


class RankStatus(NamedTuple):
    """What a rank is doing, from its last heartbeat."""

    rank: int
    step: int
    does: str
    since: float  # seconds without progress, at the heartbeat
    age: float  # seconds since the heartbeat
    host: str = ""

    def __str__(self) -> str:
        silent = f", silent for {self.age:.0f} s" if self.age > SILENT else ""
        return (
            f"rank {self.rank} on {self.host} {self.does} in step {self.step} "
            f"for {self.since + self.age:.0f} s{silent}"
        )


class Heartbeats:
    """store: a connection that no other thread of this process uses."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._number = 0  # counter of this rank's last heartbeat
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its counter, and when it changed
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))

    def send(self, step: int, does: str, still: float) -> None:
        """Tell the others what this rank does and for how many seconds (`still`). Never fails."""
        self._number += 1
        heartbeat = json.dumps([self._number, step, does, still, socket.gethostname()])
        with contextlib.suppress(RuntimeError):
            self._store.set(_KEY.format(self._rank), heartbeat)

    def read(self, ranks: Sequence[int] | None = None) -> list[RankStatus]:
        """The status of `ranks` (None: all) that have sent a heartbeat; [] if the store is gone.

        A heartbeat's age counts from the first read() that saw it, so call read() repeatedly.
        """
        statuses = []
        try:
            for rank in range(self._world) if ranks is None else ranks:
                if self._store.check([_KEY.format(rank)]):
                    heartbeat = json.loads(self._store.get(_KEY.format(rank)))
                    number, step, does, still, host = heartbeat
                    now = time.monotonic()
                    if self._seen.get(rank, (None,))[0] != number:
                        self._seen[rank] = number, now
                    age = now - self._seen[rank][1]
                    statuses.append(RankStatus(rank, step, does, still, age, host))
        except (RuntimeError, DistError):
            return []
        return statuses


def suspects(statuses: list[RankStatus]) -> tuple[list[RankStatus], list[RankStatus]]:
    """The ranks that block the others, and the others.

    Suspects are the silent ranks; if there are none, those that are a step behind; if there are
    none, those that do anything but wait for other ranks.
    """
    for blocks in (
        lambda status: status.age > SILENT,
        lambda status: status.step < max(p.step for p in statuses),
        lambda status: _WAITING not in status.does and "averages" not in status.does,
    ):
        first = [status for status in statuses if blocks(status)]
        if first:
            return first, [status for status in statuses if status not in first]
    return [], statuses


def describe_frame(frame: FrameType | None) -> str:
    """What a thread does, in words: file, line, function and text of its innermost line of ours."""
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "is outside of the run"
    path = frame.f_code.co_filename.removeprefix(_ROOT)
    does = next((words for start, words in _DOES.items() if path.startswith(start)), "computes")
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    if text.endswith(".backward()"):
        does = "computes or averages gradients"
    return f"{does} ({path}:{frame.f_lineno}, {frame.f_code.co_name}: {text})"


def _is_ours(path: str) -> bool:
    return path.startswith(_ROOT) and "site-packages" not in path
