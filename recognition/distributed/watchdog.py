"""A thread beside the training loop that says which rank holds up the others, and where.

Every second each rank sends a heartbeat through the store in which the ranks met: the step it is
in, the line of code, since when. A rank that has not moved for half of the time-out writes the
stacks of its threads and says what all ranks do; at the time-out it ends its process. A rank that
fails leaves the cause in the store first, and the others, which only lose contact, name it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
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

_EVERY = 1.0  # seconds between two heartbeats
_CAUSE_SECONDS = SILENT + _EVERY  # how long a rank that lost contact waits for the cause
_LONG_OPERATION_FACTOR = 10  # the time-out, for what may take long
_STOP_SECONDS = 10.0  # how long after a signal the loop may stand still
_JOIN_SECONDS = 5.0  # more than the store takes to give up
# Where DistributedDataParallel's exchange of the gradients fails.
_OF_DDP = (torch.autograd.graph.__file__, torch.nn.parallel.distributed.__file__)
_INTERRUPTED = 130  # the exit code of a process that SIGINT ends
# torchrun passes the first Ctrl-C on as SIGINT (to ranks in its own session a second time), and
# sends SIGTERM at the second one.
_SECOND_PRESS = signal.SIGTERM if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIGINT


class Watchdog:
    """Use it as a context manager around the loop, and call beat() whenever the loop moves.

    store: one that the ranks share, and none that the loop uses. timeout_seconds: how long a rank
    may stand still. directory: for the stacks, stacks-rank-<r>.txt.
    """

    def __init__(
        self, store: Store, rank: int, world: int, timeout_seconds: float, directory: str
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._heartbeats = Heartbeats(store, rank, world)
        self._timeout, self._directory = timeout_seconds, directory
        self._step, self._moved = 0, time.monotonic()
        self._long_operations = 0  # bodies of long_operation() entered
        self._longest = 0.0  # seconds between two beats
        self._signalled: float | None = None
        self._told_at = time.monotonic()  # no rank had told a cause by then
        self._reported = False
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._cause = f"watchdog/cause of {directory}"  # not that of a run before in this group

    def beat(self, step: int) -> None:
        """The loop moves: it is in `step`."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._moved)
        self._step, self._moved, self._reported = step, now, False

    @contextlib.contextmanager
    def long_operation(self) -> Iterator[None]:
        """What the body does may take ten times the time-out: writing a checkpoint, for one."""
        self._long_operations += 1
        self._moved = time.monotonic()
        try:
            self._told_at = self._moved
            yield
        finally:
            self._long_operations -= 1
            self._moved, self._reported = time.monotonic(), False

    def signalled(self) -> None:
        """A signal asks the process to end: a loop that then stands still is not waited for."""
        self._signalled = self._signalled or time.monotonic()

    def __enter__(self) -> Watchdog:
        self._send(0.0)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        # A thread that is inside of the store when the interpreter ends aborts the process.
        self._thread.join(_JOIN_SECONDS)
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return
        cause = None
        if self._world > 1 and (lost_contact(error) or _may_be_gloos(error)):
            cause = self._first_cause()
        if cause is None and not lost_contact(error):
            self.tell_cause(f"rank {self._rank}: {_first_line(error)}")
            return
        if self._world > 1:
            why = cause or self._slowest()
            raise ConnectionError(
                f"lost contact with the other ranks in step {self._step}. {why}"
            ) from error

    def tell_cause(self, cause: str) -> None:
        """Why the run fails, for those that will only lose contact; the first cause stays."""
        with contextlib.suppress(RuntimeError, DistError):
            self._store.compare_set(self._cause, "", cause)

    def first_cause(self) -> str:
        """What the rank that failed first said, or who is not there any more."""
        return self._first_cause() or self._slowest()

    def _first_cause(self) -> str | None:
        """As first_cause(); None if the other ranks are there and have said nothing."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        self._send(0.0)  # so that only a store that is gone holds no heartbeat
        places = self._heartbeats.read()
        # A killed rank says nothing, and its launcher, which sees it first, is to report it first.
        while time.monotonic() < deadline and places:
            if (told := self._told()) is not None:
                return f"The first cause: {told}"
            time.sleep(0.1)
            self._send(0.0)  # the thread that did so has ended, this rank has not
            places = self._heartbeats.read()
        if not places:
            return "The rank that holds the store, rank 0 or its torchrun, has ended"
        silent = [p for p in places if p.rank != self._rank and p.age > SILENT]
        if not silent:
            return None
        if self._rank == min(p.rank for p in places if p not in silent):
            for place in silent:
                _say(_banner(f"rank {place.rank} on {place.host} was killed or is frozen"))
        return (
            f"Killed or frozen, without a word: {'; '.join(map(str, silent))}. The kernel's log of "
            "that machine says whether it ran out of memory"
        )

    def _slowest(self) -> str:
        """What is known where no rank is silent and none has said a cause."""
        first = [
            place for place in suspects(self._heartbeats.read())[0] if place.rank != self._rank
        ]
        behind = f"Held up by {'; '.join(map(str, first))}. " if first else ""
        return (
            f"{behind}No rank is silent: one has ended, or needs longer than collective_timeout="
            f"{self._timeout:g}"
        )

    def _told(self) -> str | None:
        """The cause that a rank has left in the store."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([self._cause]):
                return self._store.get(self._cause).decode()
        return None

    def _watch(self) -> None:
        while not self._ended.wait(min(_EVERY, self._timeout / 20)):
            still = time.monotonic() - self._moved
            self._send(still)
            limit = self._timeout * (_LONG_OPERATION_FACTOR if self._long_operations else 1)
            if still > self._timeout / 4:
                self._heartbeats.read()  # so that their ages are known when they are reported
            if still > self._timeout / 2 and not self._reported:
                self._reported = True
                self._report(still, limit)
            if still > limit:
                self._end(f"has not moved for {still:.0f} s")
            if self._long_operations:
                self._look_after_the_next()
                continue
            if not self._signalled:
                continue
            patience = max(_STOP_SECONDS, 3 * self._longest)
            if min(still, time.monotonic() - self._signalled) > patience:
                self._end(f"was asked to end and has not moved for {still:.0f} s")

    def _look_after_the_next(self) -> None:
        """What may take long waits for the other ranks without a collective, which would notice
        that one of them is gone: each rank looks after the next one."""
        if self._world == 1:
            return
        if (told := self._told()) is None:
            self._told_at = time.monotonic()
        elif time.monotonic() - self._told_at > _CAUSE_SECONDS:  # this rank is not ending either
            self._end(f"waits for ranks that have ended. The first cause: {told}")
        for place in self._heartbeats.read([(self._rank + 1) % self._world]):
            if place.age > self._timeout:
                self.tell_cause(f"{place}: killed or frozen")
                self._end(f"waits for a rank that was killed or is frozen: {place}")

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
        places = self._heartbeats.read()
        _say(
            f"warning: rank {self._rank} has not moved for {still:.0f} s and ends at "
            f"{limit:.0f} s: it {describe_frame(_frame_of(self._main))}. Stacks: {path}"
        )
        if places and self._rank == min(place.rank for place in places if place.age <= SILENT):
            first, others = suspects(places)
            named = f"held up by {'; '.join(map(str, first))}" if first else "all ranks are alike"
            _say(f"warning: {named}" + (f". Of the others, {others[0]}" if others else ""))

    def _end(self, why: str) -> None:
        """End this process, with the first cause as its last word."""
        first, _ = suspects(self._heartbeats.read())
        said = f"error (rank {self._rank}): {why}: it {describe_frame(_frame_of(self._main))}"
        held_up = [place for place in first if place.rank != self._rank]
        _say(said + (f". Held up by {'; '.join(map(str, held_up))}" if held_up else ""))
        sys.stdout.flush()
        os._exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that other ranks cannot be reached: by its type alone."""
    return isinstance(error, LostContact | DistError)


def _may_be_gloos(error: BaseException) -> bool:
    """Whether it is a bare RuntimeError out of torch's backward or DistributedDataParallel.

    The one collective that collectives.py does not call itself, DistributedDataParallel's average
    of the gradients, fails so where gloo does. Errors of a backward do too, so whether the other
    ranks are gone decides.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return type(error) is RuntimeError and bool(frames) and frames[-1].filename in _OF_DDP


def _frame_of(thread: int) -> FrameType | None:
    return sys._current_frames().get(thread)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


def _banner(text: str) -> str:
    """A line that stands out from torchrun's report, which follows it."""
    return f"\n{'=' * 20} {text} {'=' * 20}\n"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def listen_for_signals(watchdog: Watchdog, signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Tell the watchdog of a signal at once, even while the main thread is inside of a collective,
    where Python's own handlers wait for it to come back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        interrupted = False
        while heard := os.read(reader, 1):
            if heard[0] in signals:
                watchdog.signalled()
            if interrupted and heard[0] == _SECOND_PRESS:
                _say("interrupted twice: this process ends at once; what is not saved yet is lost")
                os._exit(_INTERRUPTED)
            if heard[0] == signal.SIGINT:
                interrupted = True
                _say("interrupted: the run saves its next step and ends; once more ends it at once")

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        listener.join()
        os.close(reader)
