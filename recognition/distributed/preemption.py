"""Pre-emption: a signal to any process stops all of them after the same step.

SIGUSR1 asks the run to end: schedulers send it before a time limit or a pre-emption. SIGTERM says
that the parent is about to end this process; torchrun also sends it before it restarts its
processes. SIGINT is a person's Ctrl-C. After each of them all ranks finish the same step and save
it. They differ in what torchrun must do: after SIGUSR1 it must not restart the processes. A second
Ctrl-C ends a process at once.
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

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: no error; run the same command again
_NOTE = "stopped.json"  # in the run directory, from a stop to the next start
# If ranks received different signals, the later one in this order counts.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AGENT_SECONDS = 30.0  # torchrun's own --shutdown-timeout
_INTERRUPTED = 130  # exit code of a process that SIGINT ended
# torchrun forwards the first Ctrl-C as SIGINT (ranks in its session receive it twice), and sends
# SIGTERM at the second one.
_SECOND_PRESS = signal.SIGTERM if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIGINT


class Stopped(Exception):
    """The run has ended early, as requested, and its checkpoint is written."""

    def __init__(self, heard: signal.Signals, step: int) -> None:
        super().__init__(
            f"stopped by {heard.name} after step {step}, which is saved: the same command goes on"
        )
        self.heard, self.step = heard, step


class Interrupted(Exception):
    """A rank received a signal, and all ranks abort their verification before the same batch."""

    def __init__(self, heard: signal.Signals) -> None:
        super().__init__(f"interrupted by {heard.name}")
        self.heard = heard


class StopRequest:
    """The signals that this process received, and the one that all ranks agreed on.

    One small all-reduce per step in host memory, started before the step and read after it, so no
    rank waits for it.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._heard = 0  # 1 + index in SIGNALS; 0: none
        self._agreed: Callable[[], int] | None = None

    def ask(self) -> None:
        """Send this rank's signal to the others at the start of a step."""
        self._agreed = start_largest(self._heard, self.group)

    def answer(self) -> signal.Signals | None:
        """The signal on which all ranks stop after this step, the same on all; usually None."""
        assert self._agreed is not None, "ask() comes first"
        agreed = self._agreed()
        return SIGNALS[agreed - 1] if agreed else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals while the body runs, then restore the earlier handlers.

        Only the main thread can set handlers; in any other thread this does nothing.
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


@contextlib.contextmanager
def listen_for_signals(report: Callable[[], None]) -> Iterator[None]:
    """Call `report` at once when a signal arrives, even while the main thread is in a collective:
    Python runs its handlers only after the collective returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        interrupted = False
        while heard := os.read(reader, 1):
            if heard[0] in SIGNALS:
                report()
            if interrupted and heard[0] == _SECOND_PRESS:
                _say("interrupted twice: this process ends at once; unsaved steps are lost")
                os._exit(_INTERRUPTED)
            if heard[0] == signal.SIGINT:
                interrupted = True
                _say("interrupted: the run saves its next step and ends; again ends it at once")

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        listener.join()
        os.close(reader)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exit_code_of(stopped: Stopped) -> int:
    """The exit code of a stopped process; returns only once torchrun will not restart it.

    torchrun treats any exit code but 0 as a failure and restarts the processes while it has
    restarts left. So after SIGUSR1 the first process of each machine ends its torchrun by SIGTERM,
    which torchrun forwards to all of its processes. A parent that is not torchrun (numactl, a
    script) receives no signal.
    """
    if stopped.heard == signal.SIGUSR1 and "TORCHELASTIC_RUN_ID" in os.environ:
        for number in SIGNALS:
            signal.signal(number, lambda *_: sys.exit(EXIT_CODE))
        agent = torchrun()
        if agent is None:
            _say("warning: no torchrun among the parents of this process")
            return EXIT_CODE
        if os.environ.get("LOCAL_RANK") == "0":
            os.kill(agent, signal.SIGTERM)
        time.sleep(_AGENT_SECONDS)
    return EXIT_CODE


def end_now_on_request() -> None:
    """Until training begins, when there is nothing to save, let SIGUSR1 end the process with
    exit_code_of(). SIGTERM keeps its default action."""

    def leave(*_: object) -> None:
        raise SystemExit(exit_code_of(Stopped(signal.SIGUSR1, 0)))

    signal.signal(signal.SIGUSR1, leave)


def stopped(run_dir: str, rank: int, heard: signal.Signals, step: int) -> Stopped:
    """The exception to raise once `step` is saved. Rank 0 writes stopped.json, by which a batch
    script tells a run to be continued from one that failed.

    If the file cannot be written, the run only warns: the exit code says the same.
    """
    if rank == 0:
        path = os.path.join(run_dir, _NOTE)
        try:
            files.write_text(path, json.dumps({"step": step, "signal": heard.name}))
        except OSError as error:
            _say(f"warning: {path} was not written: {error}")
    return Stopped(heard, step)


def remove_note(run_dir: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(run_dir, _NOTE))
