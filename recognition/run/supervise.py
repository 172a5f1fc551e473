"""Supervision of the loop: stop requests, the watchdog, and the replica checks of debug=true."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from torch import Tensor

from data_tools.load.loader import Batch
from recognition import checkpoint
from recognition.distributed import replica_check, runtime
from recognition.distributed.preemption import Interrupted, StopRequest, listen_for_signals
from recognition.distributed.watchdog import Watchdog
from recognition.run.state import TrainState


class Supervisor:
    """Call before_step() and after_step() around each step."""

    def __init__(self, state: TrainState) -> None:
        cfg, place = state.cfg, state.runtime
        self._state = state
        self._stop = StopRequest(place.group)
        self._watchdog = Watchdog(
            runtime.store(), place.rank, place.world, cfg.collective_timeout, cfg.output
        )
        self._record: replica_check.SampleRecord | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Supervisor]:
        """Supervise the body.

        Raises:
            ConnectionError: the body failed because other ranks are gone; the message says what is
                known of the first cause.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watchdog)
            stack.enter_context(self._stop.listening())
            stack.enter_context(listen_for_signals(self._watchdog.signalled))
            if self._state.cfg.debug:
                self._record = replica_check.SampleRecord(self._state.cfg.output, self._stop.group)
                stack.callback(self._record.close)
            yield self

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; with debug=true their image ids are recorded."""
        if self._record is None:
            return batches
        return self._record.of(batches, lambda: self._state.step)

    def before_step(self) -> None:
        self._stop.ask()

    def after_step(self) -> signal.Signals | None:
        """The signal on which all ranks stop now, the same on all; usually None."""
        state = self._state
        self._watchdog.beat(state.step)
        if state.cfg.debug and state.step % state.cfg.debug_every == 0:
            replica_check.check_equal(_replicated(state), self._stop.group, state.step)
        return self._stop.answer()

    def between_batches(self) -> None:
        """Send a heartbeat and check for a stop request between two verification batches.

        Every rank must call it equally often.

        Raises:
            Interrupted: on all ranks; a signal asked the run to stop.
        """
        self._watchdog.beat(self._state.step)
        self._stop.ask()
        if (heard := self._stop.answer()) is not None:
            raise Interrupted(heard)

    def long_operation(self) -> contextlib.AbstractContextManager[None]:
        """Surround an operation that may take long and sends no heartbeat."""
        return self._watchdog.long_operation()


def _replicated(state: TrainState) -> dict[str, Tensor]:
    """The tensors that are equal on all ranks, by their names in the checkpoint."""
    parts = state.parts
    tensors = dict(parts.backbone.state_dict())
    tensors |= checkpoint.optimizer_tensors(parts.backbone, parts.optimizer, parts.scaler)
    for prefix, head in parts.named_heads():
        tensors |= {f"{prefix}{name}": tensor for name, tensor in head.margin().items()}
    if parts.encoder is not None:
        tensors |= {f"encoder.{name}": x for name, x in parts.encoder.state_dict().items()}
    return tensors
