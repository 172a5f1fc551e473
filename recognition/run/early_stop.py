"""How a run ends early: its last step is saved, and it says so."""

from __future__ import annotations

import signal
from typing import Any, NoReturn

from recognition import checkpoint
from recognition.distributed import preemption
from recognition.run import saving
from recognition.run.build import TrainState
from recognition.run.logger import Logger
from recognition.run.supervise import Overseer
from recognition.run.validate import verify


def end_early(
    state: TrainState, saver: checkpoint.Saver, overseer: Overseer, heard: signal.Signals
) -> NoReturn:
    """Save the present step.

    Raises:
        Stopped: it is saved.
        OSError: it cannot be.
    """
    with overseer.patience():
        saving.save_now(saver, state)
    raise preemption.stopped(state.cfg.output, state.runtime.rank, heard, state.step)


def verify_or_end(
    state: TrainState, logger: Logger, saver: checkpoint.Saver, overseer: Overseer
) -> dict[str, Any]:
    """The verification's results by set, unless a signal asks the run to end meanwhile: then the
    present step is saved, marked as not yet verified, and whoever continues from it verifies it.

    Raises:
        Stopped, OSError: as end_early().
        ValueError: as verify().
    """
    try:
        results = verify(state, logger, overseer.turn)
    except preemption.Interrupted as interrupted:
        end_early(state, saver, overseer, interrupted.heard)
    saving.note_verified(saver, state, results)
    return results
