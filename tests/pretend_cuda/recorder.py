"""What the pretend device sees a program do: observations, and the order of streams and threads.

An actor is a thread of the host or a stream. Work of one actor happens in the order in which it was
given; between actors there is an order only where an event, a synchronisation or the hand-over of a
task to a thread makes one. Each actor has a vector clock: how much of every actor's work certainly
happened before what it does next. Two accesses to one memory, one of them a write, are a race if
neither certainly happened before the other, whether or not the numbers came out right this time.

This file knows nothing of torch.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

SYNCHRONISATION = "host synchronisation"
PAGEABLE = "pageable copy"
MIX = "device mix"
RACE = "race"
FOREIGN = "foreign device"
FREED = "freed while in use"
NON_DETERMINISTIC = "non-deterministic operator"

PACKAGES = ("recognition", "data_tools", "launch", "eval")


class Observation(NamedTuple):
    kind: str
    what: str
    place: str  # file:line of the project, the innermost

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at {self.place}"


class DeviceMix(RuntimeError):
    """What CUDA builds of torch raise where tensors of two devices meet."""


Actor = tuple  # ("host", name) or ("stream", device index, number)
Clock = dict[Actor, int]


class Access(NamedTuple):
    actor: Actor
    count: int  # the actor's own clock then
    what: str


class Memory:
    """One allocation: who has written and read it since."""

    __slots__ = ("_recorder", "reads", "recorded", "stream", "write")

    def __init__(self, recorder: Recorder, stream: Actor | None) -> None:
        self._recorder = recorder
        self.stream = stream  # that it was allocated for; None: memory of the host
        self.write: Access | None = None
        self.reads: dict[Actor, Access] = {}
        self.recorded = False  # by Tensor.record_stream

    def __del__(self) -> None:
        # The allocator gives it to the next allocation of its stream, without a wait.
        if self.stream is not None and not self.recorded:
            self._recorder.freed(self)


class Recorder:
    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.launched = 0  # kernels and copies, while it is on
        self.is_on = False
        self._clocks: dict[Actor, Clock] = {}
        self._threads = threading.local()

    # --- Observations ---

    def note(self, kind: str, what: object) -> None:
        if self.is_on:
            self.observations.append(Observation(kind, str(what), place()))

    @contextmanager
    def watching(self) -> Iterator[list[Observation]]:
        """The observations of the body; outside of it nothing is noted.

        The garbage of earlier bodies, which may have copies under way, is not collected in it.
        """
        before, self.observations, self.launched, self.is_on = self.observations, [], 0, True
        seen, collects = self.observations, gc.isenabled()
        gc.disable()
        try:
            yield seen
        finally:
            if collects:
                gc.enable()
            self.observations, self.is_on = before, False

    # --- Actors ---

    @property
    def host(self) -> Actor:
        """The actor of this thread. The threads of autograd's engine count as the main one, which
        waits for them."""
        return getattr(self._threads, "actor", ("host", "main"))

    def become(self, name: str) -> None:
        self._threads.actor = ("host", name)

    def clock(self, actor: Actor) -> Clock:
        return self._clocks.setdefault(actor, {actor: 0})

    def join(self, actor: Actor, clock: Clock) -> None:
        """All that `clock` knows happened before what the actor does next."""
        own = self.clock(actor)
        for other, count in clock.items():
            if own.get(other, -1) < count:
                own[other] = count

    def launch(self, stream: Actor) -> None:
        """The host gives work to a stream: it begins after what the host has seen so far."""
        self.join(stream, self.clock(self.host))

    # --- Memory ---

    def read(self, actor: Actor, memory: Memory, what: str) -> None:
        if memory.write is not None and not self._is_before(memory.write, actor):
            self._race(memory.write, "read", what)
        memory.reads[actor] = Access(actor, self._tick(actor), what)

    def written(self, actor: Actor, memory: Memory, what: str) -> None:
        earlier = [*memory.reads.values()] if memory.write is None else [
            memory.write, *memory.reads.values()
        ]  # fmt: skip
        for access in earlier:
            if not self._is_before(access, actor):
                self._race(access, "written", what)
                break
        memory.write, memory.reads = Access(actor, self._tick(actor), what), {}

    def freed(self, memory: Memory) -> None:
        assert memory.stream is not None
        known = self.clock(memory.stream) | {}
        for other, count in self.clock(self.host).items():
            known[other] = max(known.get(other, -1), count)
        accesses = [*memory.reads.values(), *([memory.write] if memory.write else [])]
        for access in accesses:
            if access.actor != memory.stream and known.get(access.actor, -1) < access.count:
                self.note(FREED, f"memory in use by {access.what} on {_name(access.actor)}")
                return

    def _tick(self, actor: Actor) -> int:
        clock = self.clock(actor)
        clock[actor] += 1
        return clock[actor]

    def _is_before(self, access: Access, actor: Actor) -> bool:
        return access.actor == actor or self.clock(actor).get(access.actor, -1) >= access.count

    def _race(self, earlier: Access, how: str, what: str) -> None:
        self.note(
            RACE,
            f"{how} by {what}, which need not come after {earlier.what} on {_name(earlier.actor)}",
        )


def _name(actor: Actor) -> str:
    return f"thread {actor[1]}" if actor[0] == "host" else f"stream {actor[2]} of cuda:{actor[1]}"


def place() -> str:
    """file:line of the innermost frame in the project's packages, else in its tests."""
    frame, of_tests = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        room = name.partition(".")[0]
        if room in PACKAGES:
            return f"{name.replace('.', '/')}.py:{frame.f_lineno}"
        if room == "tests" and not of_tests and ".pretend_cuda.test" not in name:
            if not name.endswith((".recorder", ".tensor", ".device")):
                of_tests = f"{name.replace('.', '/')}.py:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return of_tests or "?"
