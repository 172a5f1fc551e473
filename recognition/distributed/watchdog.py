"""A thread beside the training loop that reports which rank blocks the others, and where.

Every second each rank sends a heartbeat through the rendezvous store: its step, its line of code,
and for how long it has been there. A rank that has not moved for half of the time-out writes the
stacks of its threads and reports what all ranks are doing; at the time-out it ends its process. A
rank that fails first writes the cause to the store, so that the others, which only lose contact,
can name it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType

import torch
from torch.distributed import DistError, Store

from recognition.distributed.collectives import LostContact
from recognition.distributed.heartbeats import SILENT, Heartbeats, describe_frame, suspects
from recognition.distributed.preemption import Stopped
from recognition.distributed.store_exchange import LONG_OPERATION_FACTOR

_EVERY = 1.0  # seconds between two heartbeats
_CAUSE_SECONDS = SILENT + _EVERY  # how long a rank that lost contact waits for the cause
_STOP_SECONDS = 10.0  # how long the loop may stand still after a signal
_JOIN_SECONDS = 5.0  # longer than the store's own time-out
# The files in which a failed gradient all-reduce of DistributedDataParallel surfaces.
_OF_DDP = (torch.autograd.graph.__file__, torch.nn.parallel.distributed.__file__)


class Watchdog:
    """Use it as a context manager around the loop, and call beat() whenever the loop moves.

    store: shared by the ranks; the loop must not use this connection. timeout_seconds: how long a
    rank may stand still. directory: where stacks-rank-<r>.txt is written.
    """

    def __init__(
        self, store: Store, rank: int, world: int, timeout_seconds: float, directory: str
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._heartbeats = Heartbeats(store, rank, world)
        self._timeout, self._directory = timeout_seconds, directory
        self._step, self._moved = 0, time.monotonic()
        self._long_operations = 0  # nesting depth of long_operation()
        self._longest = 0.0  # most seconds between two beats
        self._signalled: float | None = None
        self._told_at = time.monotonic()  # when no rank had reported a cause yet
        self._reported = False
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._cause = f"watchdog/cause of {directory}"  # an earlier run may have used the store

    def beat(self, step: int) -> None:
        """Tell the watchdog that the loop moves and is in `step`."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._moved)
        self._step, self._moved, self._reported = step, now, False

    @contextlib.contextmanager
    def long_operation(self) -> Iterator[None]:
        """Allow the body ten times the time-out, to write a checkpoint for example."""
        self._long_operations += 1
        self._moved = time.monotonic()
        try:
            self._told_at = self._moved
            yield
        finally:
            self._long_operations -= 1
            self._moved, self._reported = time.monotonic(), False

    def signalled(self) -> None:
        """Note that a signal asked the process to end: from now on a stalled loop is ended soon."""
        self._signalled = self._signalled or time.monotonic()

    def __enter__(self) -> Watchdog:
        self._send(0.0)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        # If the thread is in a store call when the interpreter ends, the process aborts.
        self._thread.join(_JOIN_SECONDS)
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return
        cause = None
        if self._world > 1 and (lost_contact(error) or _may_be_gloos(error)):
            cause = self._first_cause()
        if cause is None and not lost_contact(error):
            text = str(error).strip().splitlines() or [""]
            self.tell_cause(f"rank {self._rank}: {type(error).__name__}: {text[0]}")
            return
        if self._world > 1:
            why = cause or self._slowest()
            raise ConnectionError(
                f"lost contact with the other ranks in step {self._step}. {why}"
            ) from error

    def tell_cause(self, cause: str) -> None:
        """Tell the other ranks why the run fails: they only lose contact. The first cause stays."""
        with contextlib.suppress(RuntimeError, DistError):
            self._store.compare_set(self._cause, "", cause)

    def first_cause(self) -> str:
        """The cause that the first failing rank reported, or which ranks have disappeared."""
        return self._first_cause() or self._slowest()

    def _first_cause(self) -> str | None:
        """As first_cause(); None if all other ranks are alive and none reported a cause."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        self._send(0.0)  # so that no heartbeat at all means that the store is gone
        statuses = self._heartbeats.read()
        # A killed rank reports nothing; its launcher notices first and should report first.
        while time.monotonic() < deadline and statuses:
            if (told := self._told()) is not None:
                return f"The first cause: {told}"
            time.sleep(0.1)
            self._send(0.0)  # the thread that sends them has ended, but this rank lives
            statuses = self._heartbeats.read()
        if not statuses:
            return "The rank that holds the store, rank 0 or its torchrun, has ended"
        silent = [p for p in statuses if p.rank != self._rank and p.age > SILENT]
        if not silent:
            return None
        if self._rank == min(p.rank for p in statuses if p not in silent):
            for status in silent:
                line = f"rank {status.rank} on {status.host} was killed or is frozen"
                _say(f"\n{'=' * 20} {line} {'=' * 20}\n")  # stands out from torchrun's report
        return (
            f"Killed or frozen, without a report: {'; '.join(map(str, silent))}. The kernel's log "
            "of that machine shows whether it ran out of memory"
        )

    def _slowest(self) -> str:
        """What is known if no rank is silent and none has reported a cause."""
        first = [
            status for status in suspects(self._heartbeats.read())[0] if status.rank != self._rank
        ]
        behind = f"Blocked by {'; '.join(map(str, first))}. " if first else ""
        return (
            f"{behind}No rank is silent: one has ended, or needs longer than collective_timeout="
            f"{self._timeout:g}"
        )

    def _told(self) -> str | None:
        """The cause that a rank has left in the store, if any."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([self._cause]):
                return self._store.get(self._cause).decode()
        return None

    def _watch(self) -> None:
        while not self._ended.wait(min(_EVERY, self._timeout / 20)):
            still = time.monotonic() - self._moved
            self._send(still)
            limit = self._timeout * (LONG_OPERATION_FACTOR if self._long_operations else 1)
            # A first reading, from which ages are counted: soon enough to know by the time of the
            # report which ranks are silent.
            if still > min(self._timeout / 4, self._timeout / 2 - SILENT - 2 * _EVERY):
                self._heartbeats.read()
            if still > self._timeout / 2 and not self._reported:
                self._reported = True
                self._report(still, limit)
            if still > limit:
                self._end(f"has not moved for {still:.0f} s")
            if self._long_operations:
                self._check_next_rank()
            elif self._signalled:
                stop_limit = max(_STOP_SECONDS, 3 * self._longest)
                if min(still, time.monotonic() - self._signalled) > stop_limit:
                    self._end(f"was asked to end and has not moved for {still:.0f} s")

    def _check_next_rank(self) -> None:
        """Check that the next rank is alive. A long operation waits for the other ranks without a
        collective, so nothing else would notice that one of them is gone."""
        if self._world == 1:
            return
        if (told := self._told()) is None:
            self._told_at = time.monotonic()
        elif time.monotonic() - self._told_at > _CAUSE_SECONDS:  # and this rank still waits
            self._end(f"waits for ranks that have ended. The first cause: {told}")
        for status in self._heartbeats.read([(self._rank + 1) % self._world]):
            if status.age > self._timeout:
                self.tell_cause(f"{status}: killed or frozen")
                self._end(f"waits for a rank that was killed or is frozen: {status}")

    def _send(self, still: float) -> None:
        self._heartbeats.send(self._step, describe_frame(_frame_of(self._main)), still)

    def _report(self, still: float, limit: float) -> None:
        path = os.path.join(self._directory, f"stacks-rank-{self._rank}.txt")
        try:
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            path = "stderr"
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        statuses = self._heartbeats.read()
        _say(
            f"warning: rank {self._rank} has not moved for {still:.0f} s and ends at "
            f"{limit:.0f} s: it {describe_frame(_frame_of(self._main))}. Stacks: {path}"
        )
        if statuses and self._rank == min(
            status.rank for status in statuses if status.age <= SILENT
        ):
            first, others = suspects(statuses)
            named = f"blocked by {'; '.join(map(str, first))}" if first else "all ranks are alike"
            _say(f"warning: {named}" + (f". Of the others, {others[0]}" if others else ""))

    def _end(self, why: str) -> None:
        """Report why and which ranks block this one, and end the process."""
        first, _ = suspects(self._heartbeats.read())
        message = f"error (rank {self._rank}): {why}: it {describe_frame(_frame_of(self._main))}"
        blocking = [status for status in first if status.rank != self._rank]
        _say(message + (f". Blocked by {'; '.join(map(str, blocking))}" if blocking else ""))
        sys.stdout.flush()
        os._exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether the type of an error says that other ranks cannot be reached, and nothing else."""
    return isinstance(error, LostContact | DistError)


def _may_be_gloos(error: BaseException) -> bool:
    """Whether the error is a bare RuntimeError of torch's backward or DistributedDataParallel.

    DistributedDataParallel's gradient all-reduce, the one collective that collectives.py does not
    call, raises it when gloo fails. Other errors of a backward look the same, so the caller must
    also find out whether the other ranks are gone.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return type(error) is RuntimeError and bool(frames) and frames[-1].filename in _OF_DDP


def _frame_of(thread: int) -> FrameType | None:
    """The thread's innermost frame outside this file, as the main thread sends heartbeats too."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
