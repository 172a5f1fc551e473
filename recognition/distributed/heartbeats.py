"""Heartbeats of all ranks in the store through which they met, and how old they are.

A heartbeat carries a number, and its reader takes the time at which the number changed by its own
monotonic clock: the clocks of other machines, which may be seconds off, play no part.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistError, Store

from recognition.distributed.rank_status import Place

_KEY = "watchdog/rank-{}"
_STORE_SECONDS = 2  # after which the store counts as gone


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

    def read(self, ranks: Sequence[int] | None = None) -> list[Place]:
        """Where the ranks (None: all) that have sent a heartbeat are; [] if the store is gone.

        The age of a heartbeat counts from the first read() that saw it, so read() more than once.
        """
        places = []
        try:
            for rank in range(self._world) if ranks is None else ranks:
                if self._store.check([_KEY.format(rank)]):
                    said = json.loads(self._store.get(_KEY.format(rank)))
                    number, step, does, still, host = said
                    places.append(Place(rank, step, does, still, self._age(rank, number), host))
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
