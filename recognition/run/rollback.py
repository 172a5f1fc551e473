"""What follows a spike: a warning, the end of the run, or a rollback that skips its samples."""

from __future__ import annotations

import json
import os

from data_tools.common import files
from recognition import checkpoint
from recognition.distributed import collectives
from recognition.run import resume
from recognition.run.logger import Logger
from recognition.run.nonfinite import FiniteGuard
from recognition.run.spikes import SKIPPED_FILE, Window, make_guard
from recognition.run.state import TrainState


def handle_spike(state: TrainState, logger: Logger) -> None:
    """Act on a spike since the last call as on_spike says. All ranks must call it.

    Raises:
        FloatingPointError: there was a spike and on_spike is not "warn".
    """
    found = None if state.spikes is None else state.spikes.found()
    if found is None:
        return
    if state.cfg.on_spike != "warn":
        raise FloatingPointError(found)
    logger.record({"step": state.step, "spike": found}, f"warning: {found}")


def skip_samples(state: TrainState) -> bool:
    """If the next sample lies in a skipped window, move to its end; returns whether it moved."""
    before = state.samples_seen
    for window in state.skipped:
        if window.start <= state.samples_seen < window.stop:
            state.samples_seen = window.stop
    return state.samples_seen != before


def roll_back(state: TrainState, why: str) -> str:
    """Return to the newest checkpoint and skip the samples between it and the present step.

    All ranks must call it. Returns the message for the log.

    Raises:
        FloatingPointError: there is no checkpoint, or max_rollbacks is reached.
    """
    cfg, runtime = state.cfg, state.runtime
    collectives.check_same(
        runtime.group, step=state.step
    )  # by then all ranks have ended their saves
    done = len(state.skipped)
    if done >= cfg.max_rollbacks:
        raise FloatingPointError(
            f"{why}; {done} times the run went back already (max_rollbacks): lower lr, lengthen "
            "warmup_epochs, or look at the data"
        )
    path, damaged = resume.newest_intact(cfg, runtime)
    if path is None:
        raise FloatingPointError(f"{why}; there is no checkpoint yet to go back to")
    stop, spiked = state.samples_seen, state.step
    manifest = checkpoint.load(path, state.parts)
    state.step, state.samples_seen = manifest["step"], manifest["samples_seen"]
    state.loaded_step = state.step
    window = Window(state.samples_seen, stop, why)
    state.skipped = sorted({*state.skipped, window})
    state.damaged = damaged
    state.owes_verification = False
    if state.spikes is not None:
        state.spikes = make_guard(cfg, runtime.group, runtime.device)
        if state.spikes is not None and manifest.get("spikes"):
            state.spikes.load(manifest["spikes"])
    state.guard = FiniteGuard(runtime.group, runtime.device)
    collectives.run_on_all_ranks(
        runtime.group,
        "note the skipped samples",
        lambda: _note(cfg.output, state.skipped) if runtime.rank == 0 else None,
    )
    return (
        f"{why}: back from step {spiked} to {state.step}, the samples {window.start} to "
        f"{window.stop - 1} are left out ({done + 1} of {cfg.max_rollbacks} times)"
    )


def _note(run_dir: str, windows: list[Window]) -> None:
    path = os.path.join(run_dir, SKIPPED_FILE)
    files.write_text(path, json.dumps(windows))
