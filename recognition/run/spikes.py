"""Detection of loss and gradient spikes: measured on the device, agreed on by all ranks.

on_spike="warn" logs a spike, "stop" ends the run, "rollback" returns to the newest checkpoint and
skips the samples between it and the spike (as PaLM's training did, arXiv:2204.02311 section 5.1).
skipped.json and every later checkpoint list the skipped windows, so that every resume skips the
same samples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data_tools.common import files, text
from data_tools.common.errors import UserError
from recognition import checkpoint
from recognition.config import Config
from recognition.distributed import collectives
from recognition.distributed.store_exchange import check_same, run_on_all_ranks
from recognition.run import resume
from recognition.run.logger import Logger
from recognition.run.nonfinite import FiniteGuard

if TYPE_CHECKING:
    from recognition.run.state import TrainState

_MOMENTUM = 0.98  # of the running means: the last 50 steps weigh 64 %
_LEAST_STEPS = 20  # before the means are trusted
SKIPPED_FILE = "skipped.json"


class Window(NamedTuple):
    """Samples that the run skips: positions [start, stop) in its sample order."""

    start: int
    stop: int
    why: str


class SpikeGuard:
    """Compares the loss and gradient norm of each step with their running means.

    Steps that spike do not enter the means. loss_factor, norm_factor: a value above this multiple
    of its mean is a spike; None turns the check off.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        loss_factor: float | None,
        norm_factor: float | None,
    ) -> None:
        self._group = group
        factors = [math.inf if x is None else x for x in (loss_factor, norm_factor)]
        zeros = torch.zeros(5, dtype=torch.float64, device=device)
        self._factors = zeros.new_tensor(factors)  # [2]: loss, norm
        self._sums = zeros[:2]  # exponential sums of loss and norm
        self._count = zeros[0]  # number of steps in the sums
        self._first = zeros[:5]  # first spike: step, loss, norm, their means

    @torch.no_grad()
    def observe(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Record the loss [] and gradient norm [] of a step, without a host synchronisation."""
        now = torch.stack([loss.double(), grad_norm.double()])
        means = self._sums / (1 - _MOMENTUM**self._count).clamp_min(1e-12)
        above = (now > self._factors * means) & now.isfinite()  # nonfinite.py handles inf and nan
        spike = above.any() & (self._count >= _LEAST_STEPS)
        seen = torch.cat([torch.full_like(now[:1], step), now, means])
        self._first = torch.where(spike & (self._first[0] == 0), seen, self._first)
        good = ~spike & now.isfinite().all()
        self._sums = torch.where(good, self._sums.lerp(now, 1 - _MOMENTUM), self._sums)
        self._count = self._count + good

    def found(self) -> str | None:
        """A description of the first spike since the last call, the same on all ranks; None if
        there was none. One host synchronisation and one all-reduce of five numbers."""
        step, loss, norm, mean_loss, mean_norm = collectives.largest_over_ranks(
            self._first, self._group
        ).tolist()
        self._first = torch.zeros_like(self._first)
        if not step:
            return None
        return (
            f"spike in step {int(step)}: loss {loss:.4g} where {mean_loss:.4g} was usual, gradient "
            f"norm {norm:.4g} where {mean_norm:.4g} was"
        )

    def state(self) -> list[float]:
        return [*self._sums.tolist(), self._count.item()]

    def load(self, state: list[float]) -> None:
        values = torch.tensor(state, dtype=torch.float64, device=self._sums.device)
        self._sums, self._count = values[:2].clone(), values[2].clone()


def make_guard(cfg: Config, group: ProcessGroup, device: torch.device) -> SpikeGuard | None:
    """The guard, or None if `cfg` sets no factor."""
    if cfg.loss_spike_factor is None and cfg.norm_spike_factor is None:
        return None
    return SpikeGuard(group, device, cfg.loss_spike_factor, cfg.norm_spike_factor)


def skipped(run_dir: str, manifest: Mapping[str, Any] | None) -> list[Window]:
    """The windows that a run skips: those in its checkpoint's manifest and those in skipped.json.

    Raises:
        ValueError: skipped.json is damaged.
    """
    found = {Window(*entry) for entry in (manifest or {}).get("skipped", [])}
    path = os.path.join(run_dir, SKIPPED_FILE)
    if files.is_file(path):
        try:
            entries = text.read_json(path)
            found |= {Window(int(a), int(b), str(why)) for a, b, why in entries}
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{path} is damaged: it lists the samples that the run leaves out after a spike, "
                "[[start, stop, why]]. Set it right, or remove it to train on all"
            ) from error
    return sorted(found)


# --- What follows a spike -------------------------------------------------------------------------


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
    check_same(runtime.group, step=state.step)  # also waits until all ranks have ended their saves
    done = len(state.skipped)
    if done >= cfg.max_rollbacks:
        raise FloatingPointError(
            f"{why}; the run has rolled back {done} times already (max_rollbacks): lower lr, "
            "lengthen warmup_epochs, or look at the data"
        )
    path, damaged = resume.newest_intact(cfg, runtime)
    if path is None:
        raise FloatingPointError(f"{why}; there is no checkpoint yet to return to")
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
    path = os.path.join(cfg.output, SKIPPED_FILE)

    def note() -> None:
        if runtime.rank == 0:
            files.write_text(path, json.dumps(state.skipped))

    run_on_all_ranks(runtime.group, "record the skipped samples", note)
    return (
        f"{why}: back from step {spiked} to {state.step}, skipping the samples {window.start} to "
        f"{window.stop - 1} (rollback {done + 1} of {cfg.max_rollbacks})"
    )
