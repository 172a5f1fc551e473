"""Heartbeats of all ranks in the store through which they met, and how old they are.

A heartbeat carries a number, and its reader takes the time at which the number changed by its own
monotonic clock: the clocks of other machines, which may be seconds off, play no part.
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
_STORE_SECONDS = 2  # after which the store counts as gone
SILENT = 4.0  # seconds without a word, after which a rank is not heard of any more
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
# What a line of ours is about, by its file; the first that fits.
_DOES = {
    "data_tools/": "waits for data",
    "recognition/distributed/collectives.py": "waits for the other ranks",
    "recognition/checkpoint/": "saves",
    "eval/": "verifies",
}


class RankStatus(NamedTuple):
    """Where a rank is, as it told the others."""

    rank: int
    step: int
    does: str
    since: float  # seconds in this step
    age: float  # seconds since it told so
    host: str = ""

    def __str__(self) -> str:
        silent = f", not heard of for {self.age:.0f} s" if self.age > SILENT else ""
        return (
            f"rank {self.rank} on {self.host} {self.does} in step {self.step} "
            f"for {self.since + self.age:.0f} s{silent}"
        )


class Heartbeats:
    """store: one that no other thread of this process uses."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._number = 0  # of this rank's last heartbeat
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: number, and since when it is that
        store.set_timeout(timedelta(seconds=_STORE_SECONDS))

    def send(self, step: int, does: str, still: float) -> None:
        """Tell the others what this rank does, for `still` seconds by now. Never fails."""
        self._number += 1
        said = json.dumps([self._number, step, does, still, socket.gethostname()])
        with contextlib.suppress(RuntimeError):
            self._store.set(_KEY.format(self._rank), said)

    def read(self, ranks: Sequence[int] | None = None) -> list[RankStatus]:
        """Where the ranks (None: all) that have sent a heartbeat are; [] if the store is gone.

        The age of a heartbeat counts from the first read() that saw it, so read() more than once.
        """
        places = []
        try:
            for rank in range(self._world) if ranks is None else ranks:
                if self._store.check([_KEY.format(rank)]):
                    said = json.loads(self._store.get(_KEY.format(rank)))
                    number, step, does, still, host = said
                    places.append(
                        RankStatus(rank, step, does, still, self._age(rank, number), host)
                    )
        except (RuntimeError, DistError):
            return []
        return places

    def _age(self, rank: int, number: int) -> float:
        now = time.monotonic()
        before, since = self._seen.get(rank, (None, now))
        if number != before:
            since = now
        self._seen[rank] = number, since
        return now - since


def suspects(places: list[RankStatus]) -> tuple[list[RankStatus], list[RankStatus]]:
    """Those that hold up the others, and the others: who is not heard of, then who is behind, then
    who does something else than wait for other ranks."""
    waiting = _DOES["recognition/distributed/collectives.py"]
    for holds_up in (
        lambda place: place.age > SILENT,
        lambda place: place.step < max(p.step for p in places),
        lambda place: waiting not in place.does and "averages" not in place.does,
    ):
        first = [place for place in places if holds_up(place)]
        if first:
            return first, [place for place in places if place not in first]
    return [], places


def describe_frame(frame: FrameType | None) -> str:
    """In words, by the innermost line of ours: file, line, function and text."""
    while frame is not None and not _ours(frame):
        frame = frame.f_back
    if frame is None:
        return "is outside of the run"
    path = frame.f_code.co_filename.removeprefix(_ROOT)
    does = next((words for start, words in _DOES.items() if path.startswith(start)), "computes")
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    if text.endswith(".backward()"):
        does = "computes or averages gradients"
    return f"{does} ({path}:{frame.f_lineno}, {frame.f_code.co_name}: {text})"


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_ROOT) and "site-packages" not in (
        frame.f_code.co_filename
    )
