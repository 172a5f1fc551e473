"""Pre-emption: a signal that one process hears ends all of them after one and the same step.

SIGUSR1 asks the run to end: schedulers send it before a time limit or a pre-emption. SIGTERM says
that whoever started this process is about to end it; torchrun sends it before it starts its
processes anew, too. SIGINT is a person's Ctrl-C. All lead to the same last step and a checkpoint of
it. What differs is what torchrun is told: after SIGUSR1 it must not start the processes once more.
A second Ctrl-C ends a process at once (watchdog.listen_for_signals).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from torch.distributed import ProcessGroup

from data_tools.common import files
from recognition.distributed.collectives import start_largest
from recognition.distributed.runtime import torchrun

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again
_NOTE = "stopped.json"  # in the run directory, from a stop to the next start
# The later one wins where ranks heard different ones.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AGENT_SECONDS = 30.0  # torchrun's own --shutdown-timeout


class Stopped(Exception):
    """The run has ended early because it was asked to; its checkpoint is written."""

    def __init__(self, heard: signal.Signals, step: int) -> None:
        super().__init__(
            f"stopped by {heard.name} after step {step}, which is saved: the same command goes on"
        )
        self.heard, self.step = heard, step


class Interrupted(Exception):
    """All ranks leave what they are in, before the same batch: one of them heard a signal."""

    def __init__(self, heard: signal.Signals) -> None:
        super().__init__(f"interrupted by {heard.name}")
        self.heard = heard


class StopRequest:
    """What this process has heard, and what all have agreed on. One small all-reduce a step in the
    host's memory, begun before the step and read after it: nobody waits for it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._heard = 0  # place in SIGNALS, from 1
        self._agreed: Callable[[], int] | None = None

    def ask(self) -> None:
        """Tell the others, at the start of a step, what this rank has heard."""
        self._agreed = start_largest(self._heard, self.group)

    def answer(self) -> signal.Signals | None:
        """The signal on which all ranks end after this step, the same on all; usually none."""
        assert self._agreed is not None, "ask() comes first"
        place = self._agreed()
        return SIGNALS[place - 1] if place else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals while the body runs, then do with them what was done before.

        Only a main thread can: in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(number: int, _: FrameType | None) -> None:
            self._heard = max(self._heard, SIGNALS.index(signal.Signals(number)) + 1)

        before = {number: signal.signal(number, hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_code_of(stopped: Stopped) -> int:
    """The exit code of a stopped process, once nobody will start it again unasked.

    torchrun takes any exit code but 0 for a failure and starts the processes anew while it has
    restarts left. So after SIGUSR1 the first process of each machine ends its torchrun by SIGTERM,
    which torchrun sends back to all of its processes. A parent that is no torchrun (numactl, a
    script) is left alone.
    """
    if stopped.heard == signal.SIGUSR1 and "TORCHELASTIC_RUN_ID" in os.environ:
        for number in SIGNALS:
            signal.signal(number, _exit)
        agent = torchrun()
        if agent is None:
            print("warning: no torchrun among the parents of this process", file=sys.stderr)
            return EXIT_CODE
        if os.environ.get("LOCAL_RANK") == "0":
            os.kill(agent, signal.SIGTERM)
        time.sleep(_AGENT_SECONDS)
    return EXIT_CODE


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_CODE)


def end_now_on_request() -> None:
    """Before training begins there is nothing to save: SIGTERM ends the process as it always does,
    SIGUSR1 as exit_code_of() says."""
    signal.signal(signal.SIGUSR1, _leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    raise SystemExit(exit_code_of(Stopped(signal.Signals(number), 0)))


def stopped(run_dir: str, rank: int, heard: signal.Signals, step: int) -> Stopped:
    """What to raise when `step` is saved; rank 0 leaves stopped.json, by which a batch script knows
    a run to be continued from one that failed.

    Without it the exit code still says so: an error is said, and is none of the run's.
    """
    if rank == 0:
        path = os.path.join(run_dir, _NOTE)
        try:
            files.write_text(path, json.dumps({"step": step, "signal": heard.name}))
        except OSError as error:
            print(f"warning: {path} is not written: {error}", file=sys.stderr, flush=True)
    return Stopped(heard, step)


def remove_note(run_dir: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(run_dir, _NOTE))
