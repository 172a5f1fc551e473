"""When and with what a run saves: the facts of its checkpoints, and what the log says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recognition import checkpoint
from recognition.run.logger import Logger
from recognition.run.state import TrainState

_LAST_WAITS = (5.0, 20.0)  # seconds before the run's last checkpoint is tried again


def make_saver(state: TrainState, logger: Logger) -> checkpoint.Saver:
    """The run's saver; the log gets what fails, and the run goes on."""
    cfg = state.cfg

    def report(step: int, why: str) -> None:
        record = {"step": state.step, "checkpoint_failed": step, "reason": why}
        logger.record(
            record,
            f"warning: step {state.step}  the checkpoint of step {step} is not there: {why}; "
            "older ones are, and the next save tries again",
        )

    return checkpoint.Saver(
        cfg.output, state.runtime.group, _keep(state), cfg.save_async, report, state.loaded_step
    )


def save(saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any]) -> None:
    """Begin a checkpoint of the present step; of the last step, end it.

    results: of the verification of this step, by set.

    Raises:
        OSError: the last checkpoint cannot be written, again and again.
    """
    if state.step < state.schedule.total_steps:
        saver.save(state.parts, facts(state, results))
    else:
        save_now(saver, state, results)


def save_now(
    saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any] | None = None
) -> str:
    """Write a checkpoint of the present step before the run ends here; its path."""
    return saver.save_now(state.parts, facts(state, results or {}), _LAST_WAITS)


def save_here(state: TrainState) -> str:
    """A checkpoint of the present step for those who write a loop of their own; its path.

    Raises:
        OSError: some rank could not write. No trace of the attempt stays, older checkpoints do.
    """
    saver = checkpoint.Saver(
        state.cfg.output, state.runtime.group, _keep(state), False, loaded=state.loaded_step
    )
    return saver.save_now(state.parts, facts(state, {}))


def note_verified(saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any]) -> None:
    """Add the results of a verification to the checkpoint that the run has continued from, if that
    is the step that was verified."""
    if state.step == state.loaded_step:
        saver.note_metrics(state.step, accuracies(results))
        state.owes_verification = False


def accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """What a manifest says of a verification, by set."""
    return {name: result["accuracy_mean"] for name, result in results.items()}


def is_verification_due(state: TrainState) -> bool:
    """Whether the present step is one that is verified."""
    total, every = state.schedule.total_steps, state.cfg.verify_every
    return bool(state.val_sets) and (state.step % every == 0 or state.step == total)


def facts(state: TrainState, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the files."""
    return {
        "step": state.step,
        "samples_seen": state.samples_seen,
        "global_batch": state.cfg.global_batch(state.runtime.world),
        "epoch": state.samples_seen / len(state.data),
        "metrics": accuracies(results),
        # Of a run that stops first: the step may be the best, so nobody removes it before.
        **({checkpoint.PENDING: True} if is_verification_due(state) and not results else {}),
        "skipped": [list(window) for window in state.skipped],
        "spikes": None if state.spikes is None else state.spikes.state(),
        "config": dataclasses.asdict(state.cfg) | state.facts,
    }


def _keep(state: TrainState) -> checkpoint.Keep:
    cfg = state.cfg
    return checkpoint.Keep(cfg.keep_checkpoints, cfg.keep_every, cfg.keep_best)
