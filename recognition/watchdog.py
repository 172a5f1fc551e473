"""A thread beside the training loop that says which rank holds up the others, and where.

Every second each rank leaves a line about itself in the store through which the ranks met: the step
it is in, the line of code, since when. A rank that has not moved for half of the time-out writes
the stacks of its threads and says what all ranks do; at the time-out it ends its process. A rank
that fails leaves the cause in the store first, and the others, which only lose contact, name it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import DistError, Store

from recognition.places import SILENT, Place, suspects, what_it_does

_EVERY = 1.0  # seconds between two lines in the store
_CAUSE_SECONDS = 3.0  # how long a rank that lost contact waits for the cause
_PATIENT_TIMES = 10  # the time-out, for what may take long
_STOP_SECONDS = 10.0  # how long after a signal the loop may stand still
_JOIN_SECONDS = 5.0  # more than the store takes to give up
_PLACE = "watchdog/rank-{}"


class Watchdog:
    """Use it as a context manager around the loop, and call beat() whenever the loop moves.

    store: one that the ranks share, and none that the loop uses. timeout_seconds: how long a rank
    may stand still. directory: for the stacks, stacks-rank-<r>.txt.
    """

    def __init__(
        self, store: Store, rank: int, world: int, timeout_seconds: float, directory: str
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._timeout, self._directory = timeout_seconds, directory
        self._step, self._moved = 0, time.monotonic()
        self._patient = 0  # bodies of patience() entered
        self._longest = 0.0  # seconds between two beats
        self._signalled: float | None = None
        self._reported = False
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._cause = f"watchdog/cause of {directory}"  # not that of a run before in this group
        self._store.set_timeout(timedelta(seconds=2))

    def beat(self, step: int) -> None:
        """The loop moves: it is in `step`."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._moved)
        self._step, self._moved, self._reported = step, now, False

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """What the body does may take ten times the time-out: writing a checkpoint, for one."""
        self._patient += 1
        self._moved = time.monotonic()
        try:
            yield
        finally:
            self._patient -= 1
            self._moved, self._reported = time.monotonic(), False

    def signalled(self) -> None:
        """A signal asks the process to end: a loop that then stands still is not waited for."""
        self._signalled = self._signalled or time.monotonic()

    def __enter__(self) -> Watchdog:
        self._tell_place(0.0)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        # A thread that is inside of the store when the interpreter ends aborts the process.
        self._thread.join(_JOIN_SECONDS)
        if error is None or not isinstance(error, Exception):
            return
        if not lost_contact(error):
            self.tell_cause(f"rank {self._rank}: {_first_line(error)}")
            return
        raise ConnectionError(
            f"lost contact with the other ranks in step {self._step}. {self.first_cause()}"
        ) from error

    def tell_cause(self, cause: str) -> None:
        """Why the run fails, for those that will only lose contact; the first cause stays."""
        with contextlib.suppress(RuntimeError, DistError):
            self._store.compare_set(self._cause, "", cause)

    def first_cause(self) -> str:
        """What the rank that failed first said, or who is not there any more."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        # A killed rank says nothing, and its launcher, which sees it first, is to report it first.
        while time.monotonic() < deadline:
            try:
                if self._store.check([self._cause]):
                    return f"The first cause: {self._store.get(self._cause).decode()}"
            except (RuntimeError, DistError):
                break
            time.sleep(0.1)
        places = self._places()
        if not places:
            return "The rank that holds the store, rank 0 or its torchrun, has ended"
        others = [place for place in places if place.rank != self._rank]
        silent = [place for place in others if place.age > _CAUSE_SECONDS - _EVERY]
        if not silent:
            return "Another rank has ended; the log of its machine says why"
        return (
            f"Killed or frozen, without a word: {'; '.join(map(str, silent))}. The kernel's log of "
            "that machine says whether it ran out of memory"
        )

    def _watch(self) -> None:
        while not self._ended.wait(min(_EVERY, self._timeout / 20)):
            still = time.monotonic() - self._moved
            self._tell_place(still)
            limit = self._timeout * (_PATIENT_TIMES if self._patient else 1)
            if still > self._timeout / 2 and not self._reported:
                self._reported = True
                self._report(still, limit)
            if still > limit:
                self._end(f"has not moved for {still:.0f} s")
            if self._patient or not self._signalled:
                continue
            patience = max(_STOP_SECONDS, 3 * self._longest)
            if min(still, time.monotonic() - self._signalled) > patience:
                self._end(f"was asked to end and has not moved for {still:.0f} s")

    def _tell_place(self, still: float) -> None:
        line = json.dumps([self._step, self._does(), still, time.time(), socket.gethostname()])
        with contextlib.suppress(RuntimeError, DistError):
            self._store.set(_PLACE.format(self._rank), line)

    def _places(self) -> list[Place]:
        """Of all ranks that have told theirs; nothing where the store is gone.

        Their ages are by this machine's clock: clocks that differ by seconds shift them.
        """
        places = []
        try:
            for rank in range(self._world):
                if self._store.check([_PLACE.format(rank)]):
                    said = json.loads(self._store.get(_PLACE.format(rank)))
                    step, does, since, told, host = said
                    age = max(time.time() - told, 0.0)
                    places.append(Place(rank, step, does, since, age, host))
        except (RuntimeError, DistError):
            return []
        return places

    def _does(self) -> str:
        return what_it_does(sys._current_frames().get(self._main))

    def _report(self, still: float, limit: float) -> None:
        path = os.path.join(self._directory, f"stacks-rank-{self._rank}.txt")
        try:
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            path = "stderr"
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        places = self._places()
        _say(
            f"warning: rank {self._rank} has not moved for {still:.0f} s and ends at "
            f"{limit:.0f} s: it {self._does()}. Stacks: {path}"
        )
        if places and self._rank == min(place.rank for place in places if place.age <= SILENT):
            first, others = suspects(places)
            named = f"held up by {'; '.join(map(str, first))}" if first else "all ranks are alike"
            _say(f"warning: {named}" + (f". Of the others, {others[0]}" if others else ""))

    def _end(self, why: str) -> None:
        """End this process, with the first cause as its last word."""
        first, _ = suspects(self._places())
        said = f"error (rank {self._rank}): {why}: it {self._does()}"
        held_up = [place for place in first if place.rank != self._rank]
        _say(said + (f". Held up by {'; '.join(map(str, held_up))}" if held_up else ""))
        sys.stdout.flush()
        os._exit(1)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that other ranks cannot be reached."""
    return isinstance(error, DistError | ConnectionError) or (
        isinstance(error, RuntimeError)
        and bool(re.search(r"gloo|nccl|connection (closed|reset|refused)", str(error), re.I))
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def hearing(watchdog: Watchdog, signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Tell the watchdog of a signal at once, even while the main thread is inside of a collective,
    where Python's own handlers wait for it to come back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while heard := os.read(reader, 1):
            if heard[0] in signals:
                watchdog.signalled()

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        listener.join()
        os.close(reader)
