"""Checkpoints of a run: when one is written, and what its manifest records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recognition import checkpoint
from recognition.run.logger import Logger
from recognition.run.state import TrainState

_LAST_WAITS = (5.0, 20.0)  # seconds before the last checkpoint is retried


def make_saver(state: TrainState, logger: Logger) -> checkpoint.Saver:
    """The run's saver. A save that fails is logged, and the run continues."""
    cfg = state.cfg

    def report(step: int, why: str) -> None:
        record = {"step": state.step, "checkpoint_failed": step, "reason": why}
        line = f"warning: step {state.step}  the checkpoint of step {step} was not written: {why}; "
        logger.record(record, line + "the run goes on, and the next save tries again")

    keep = checkpoint.Keep(cfg.keep_checkpoints, cfg.keep_every, cfg.keep_best)
    group = state.runtime.group
    return checkpoint.Saver(cfg.output, group, keep, cfg.save_async, report, state.loaded_step)


def save(saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any]) -> None:
    """Start saving the present step; at the last step, wait until it is saved.

    results: of this step's verification, by set.

    Raises:
        OSError: the last checkpoint could not be written, after all retries.
    """
    if state.step < state.schedule.total_steps:
        saver.save(state.parts, facts(state, results))
    else:
        save_now(saver, state, results)


def save_now(
    saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any] | None = None
) -> str:
    """Write a checkpoint of the present step before the run ends; returns its path."""
    return saver.save_now(state.parts, facts(state, results or {}), _LAST_WAITS)


def note_verified(saver: checkpoint.Saver, state: TrainState, results: Mapping[str, Any]) -> None:
    """Add a verification's results to the checkpoint that the run resumed from, if they belong to
    its step."""
    if state.step == state.loaded_step:
        saver.note_metrics(state.step, accuracies(results))
        state.owes_verification = False


def accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies that a manifest records, by set."""
    return {name: result["accuracy_mean"] for name, result in results.items()}


def facts(state: TrainState, results: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the manifest records beside the list of files."""
    unverified = bool(state.val_sets) and state.is_due(state.cfg.verify_every) and not results
    return {
        "step": state.step,
        "samples_seen": state.samples_seen,
        "global_batch": state.cfg.global_batch(state.runtime.world),
        "epoch": state.samples_seen / len(state.data),
        "metrics": accuracies(results),
        # The run stops before it verifies this step, which may be the best: keep it until then.
        **({checkpoint.PENDING: True} if unverified else {}),
        "skipped": [list(window) for window in state.skipped],
        "spikes": None if state.spikes is None else state.spikes.state(),
        "config": state.cfg.recorded() | state.facts,
    }
