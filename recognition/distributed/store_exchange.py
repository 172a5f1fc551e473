"""Values that ranks exchange through the rendezvous store instead of a collective.

Here the ranks may arrive minutes apart, as for an action that waits for a disk that is slow on one
of them. A collective would fail after the group's time-out; this waits LONG_OPERATION_FACTOR times
as long.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_tools.common.errors import UserError
from recognition.distributed.collectives import LostContact, naming_loss

LONG_OPERATION_FACTOR = 10
_POLL_SECONDS = (0.01, 0.2)  # between two polls of the store: first and longest


def gather_through_store(
    action: Callable[[], Any], group: ProcessGroup, least_seconds: float = 0.0
) -> list:
    """Every rank's result of `action`, in rank order. It travels as JSON: tuples become lists.

    least_seconds: how long to wait at least, however short the time-out is.

    Raises:
        LostContact: the action failed on another rank, which has left; or the store is gone; or a
            rank did not arrive in time.
    """
    if group.size() == 1:
        return [action()]
    with naming_loss(group):
        exchange = _Exchange(group, least_seconds)
    try:
        value = action()
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the error of the action matters more
            exchange.put(None, f"{type(error).__name__}: {error}")
        raise
    with naming_loss(group):
        exchange.put(value)
        return exchange.collect()


def run_on_all_ranks(
    group: ProcessGroup, what: str, action: Callable[[], Any], least_seconds: float = 0.0
) -> list:
    """Run `action` on all ranks; every rank's result, as gather_through_store() returns it.

    Raises:
        OSError: on all ranks, if the action raised one on any; the message names the ranks.
    """

    def attempt() -> tuple[Any, str | None]:
        try:
            return action(), None
        except OSError as error:
            return None, f"rank {group.rank()}: {error}"

    outcomes = gather_through_store(attempt, group, least_seconds)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise OSError(f"cannot {what}: " + "; ".join(failures))
    return [result for result, _ in outcomes]


def check_same(group: ProcessGroup, **facts: Any) -> None:
    """Refuse to run if the ranks would use different data or different steps.

    Raises:
        ValueError: on all ranks; it names the first fact that differs.
    """
    everywhere = gather_through_store(lambda: facts, group)
    for name in facts:
        values = [there[name] for there in everywhere]
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise UserError(
                f"the ranks do not see the same: {name} is {values[0]} on rank 0 and "
                f"{values[other]} on rank {other}. rec and output must be alike on every machine"
            )


class _Exchange:
    """One exchange. No collective is in flight meanwhile."""

    _numbers: ClassVar[dict[str, int]] = {}  # exchanges so far, by group

    def __init__(self, group: ProcessGroup, least_seconds: float) -> None:
        self._group, name = group, group.group_name
        self._number = self._numbers.get(name, 0)
        self._numbers[name] = self._number + 1
        # A separate connection: a poll must not queue behind a request of the library.
        self._store = dist.distributed_c10d._get_process_group_store(group).clone()  # type: ignore[attr-defined]
        backend = group._get_backend(torch.device("cpu"))
        timeout: timedelta = backend.options._timeout  # type: ignore[attr-defined]
        self._seconds = max(LONG_OPERATION_FACTOR * timeout.total_seconds(), least_seconds)

    def put(self, value: object, failure: str | None = None) -> None:
        """Publish this rank's value, or why this rank has left the group."""
        self._store.set(self._key(self._number, self._group.rank()), json.dumps([value, failure]))

    def collect(self) -> list:
        """The values of all ranks, in rank order."""
        values = []
        for rank in range(self._group.size()):
            value, failure = json.loads(self._wait_for(rank))
            if failure is not None:
                raise LostContact(f"rank {rank} has failed: {failure}")
            values.append(value)
        if self._number > 0:  # all ranks are here, so all have read the previous exchange
            self._store.delete_key(self._key(self._number - 1, self._group.rank()))
        return values

    def _wait_for(self, rank: int) -> bytes:
        deadline, (pause, longest) = time.monotonic() + self._seconds, _POLL_SECONDS
        key = self._key(self._number, rank)
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise LostContact(f"rank {rank} did not arrive within {self._seconds:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return self._store.get(key)

    def _key(self, number: int, rank: int) -> str:
        return f"exchange-{number}/{rank}"
