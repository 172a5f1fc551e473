"""The training loop: train(state) takes the state that build() made to its last step.

train() is the whole loop. Below it stand what it opens, how it ends, and one optimiser step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from data_tools.common.draws import Purpose, hash_words
from data_tools.load.loader import Batch, normalise
from recognition import checkpoint
from recognition.distributed import collectives, preemption
from recognition.distributed.store_exchange import run_on_all_ranks
from recognition.head import multi_head
from recognition.precision import autocast, dtype_of
from recognition.run import log_lines, saving, spikes
from recognition.run.data import make_loader
from recognition.run.logger import Logger, as_numbers, histograms
from recognition.run.run_dir import OWNED_SECONDS, lock_run_dir, write_config
from recognition.run.state import TrainState
from recognition.run.supervise import Supervisor
from recognition.run.validate import verify
from recognition.weights import distill


def train(state: TrainState) -> dict[str, Any]:
    """Train to the last step; returns the results of the last verification by set.

    Raises:
        FloatingPointError: the loss or a gradient is not finite, or a spike is to stop the run.
        OSError: another run holds the output, a file of it cannot be written, or the other ranks
            are gone.
        Stopped: a signal asked the run to end early; its last step is saved.
    """
    cfg, total = state.cfg, state.schedule.total_steps
    on_cpu = state.runtime.device.type == "cpu"
    rolled_back = None
    while True:
        with _open(state, rolled_back) as run:
            samples_before = state.samples_seen
            if spikes.skip_samples(state):
                _end_epochs(state, run.logger, samples_before)
            results = _verify(state, run) if state.step == 0 or state.owes_verification else {}
            while state.step < total:  # once for each stretch of samples between skipped ones
                with make_loader(state) as loader:
                    batches = run.supervisor.batches(iter(loader))
                    stopwatch = log_lines.Stopwatch(loader, state.step, state.phases)
                    skipped = False
                    while state.step < total and not skipped:
                        samples_before = state.samples_seen
                        run.supervisor.before_step()
                        loss, grad_norm = take_step(state, batches)
                        run.step_traced()
                        skipped = spikes.skip_samples(state)
                        heard = run.supervisor.after_step()
                        stop = heard if state.step < total else None
                        _end_epochs(state, run.logger, samples_before)

                        log = state.is_due(cfg.log_every)
                        validate = state.is_due(cfg.verify_every)
                        save = state.is_due(cfg.checkpoint_every)
                        if on_cpu or log or validate or save or stop is not None:
                            state.guard.raise_if_found()
                            spikes.handle_spike(state, run.logger)
                        if log:
                            log_lines.log_step(state, run.logger, loss, grad_norm, stopwatch)
                        with stopwatch.paused():
                            if stop is not None:
                                _save_and_stop(state, run, stop)
                            # In this order: a run that is killed in between repeats both.
                            if validate:
                                results = _verify(state, run)
                            if save:
                                with run.supervisor.long_operation():
                                    saving.save(run.saver, state, results if validate else {})
            run.saver.finish()
            log_lines.log_next_commands(state, run.logger)
            return results
        # Only a FloatingPointError under on_spike=rollback leaves the block without a return.
        rolled_back = spikes.roll_back(state, run.failure)


# --- What the loop opens, and how it ends ---------------------------------------------------------


@dataclass
class _Run:
    """What stays open while the loop runs."""

    logger: Logger
    saver: checkpoint.Saver
    supervisor: Supervisor
    step_traced: Callable[[], None]  # to be called after each step
    failure: str = ""  # the error to roll back from


@contextlib.contextmanager
def _open(state: TrainState, rolled_back: str | None) -> Iterator[_Run]:
    """Lock the output directory and open the supervisor, the log, the saver and the trace.

    With on_spike=rollback a FloatingPointError of the body, which all ranks raise alike, ends the
    block without an exception and is noted as `failure`: the supervisor must not report it to the
    other ranks as the cause of a failed run. All is closed by then, so that the rollback may read
    and rename checkpoints.
    """
    cfg, runtime = state.cfg, state.runtime
    with contextlib.ExitStack() as outer:

        def take_output() -> None:
            if runtime.rank == 0:
                outer.enter_context(lock_run_dir(cfg.output))
                write_config(cfg, state.facts)
                preemption.remove_note(cfg.output)

        run_on_all_ranks(runtime.group, "start the run", take_output, OWNED_SECONDS)
        supervisor = outer.enter_context(Supervisor(state).watching())
        try:
            with contextlib.ExitStack() as inner:
                logger = inner.enter_context(Logger(cfg.output, runtime.rank, state.step))
                saver = inner.enter_context(saving.make_saver(state, logger))
                log_lines.log_start(state, logger)
                inner.enter_context(state.phases.running())
                trace = log_lines.trace_steps(cfg.profile, cfg.output, runtime.rank, logger.say)
                run = _Run(logger, saver, supervisor, inner.enter_context(trace))
                if rolled_back:
                    record = {"step": state.step, "rollback": rolled_back}
                    logger.record(record, f"warning: {rolled_back}")
                yield run
        except FloatingPointError as error:
            if cfg.on_spike != "rollback":
                raise
            run.failure = str(error)


def _verify(state: TrainState, run: _Run) -> dict[str, Any]:
    """The results of a verification by set.

    A signal aborts it: the present step is then saved as not yet verified, and the run that resumes
    from it verifies it first.

    Raises:
        Stopped, OSError: as _save_and_stop().
        ValueError: as verify().
    """
    try:
        results = verify(state, run.logger, run.supervisor.between_batches)
    except preemption.Interrupted as interrupted:
        _save_and_stop(state, run, interrupted.heard)
    saving.note_verified(run.saver, state, results)
    return results


def _save_and_stop(state: TrainState, run: _Run, heard: signal.Signals) -> NoReturn:
    """Save the present step and end the run.

    Raises:
        Stopped: it is saved.
        OSError: it cannot be saved.
    """
    with run.supervisor.long_operation():
        saving.save_now(run.saver, state)
    raise preemption.stopped(state.cfg.output, state.runtime.rank, heard, state.step)


# --- One step -------------------------------------------------------------------------------------


def take_step(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One optimiser step: (loss [], gradient norm of the backbone []), both on the device."""
    cfg, parts, runtime = state.cfg, state.parts, state.runtime
    global_batch = cfg.global_batch(runtime.world)
    lr = state.schedule.lr_at(state.step)
    parts.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=runtime.device)
    by_head = torch.zeros(len(parts.heads), device=runtime.device)
    checked: dict[str, Tensor] = {}
    for part in parts.heads if cfg.update_in_backward else []:
        part.row_optimizer.begin(lr)
    for micro in range(cfg.accumulation):
        rows = state.order.rows(
            state.samples_seen, global_batch, cfg.accumulation, micro, runtime.world
        )
        share = sum(map(sum, rows)) / global_batch
        synchronise = micro == cfg.accumulation - 1
        with contextlib.nullcontext() if synchronise else state.model.no_sync():
            state.phases.enter("data")
            batch = next(batches)
            state.phases.enter("backbone")
            head_loss, seen = _forward(state, batch, micro, rows)
            scaled = head_loss.total * share
            if parts.scaler is not None:
                scaled = scaled * parts.scaler.scale
            scaled.backward()
        state.phases.enter("optimizer")
        loss = loss + head_loss.total.detach() * share
        by_head = by_head + head_loss.by_head * share
        checked |= {f"{name} of micro-step {micro}": x for name, x in seen.items()}
    grad_norm = _update(state, lr, checked | {"loss": loss})
    if state.spikes is not None:
        state.spikes.observe(loss, grad_norm, state.step + 1)
    state.head_losses = by_head
    state.step += 1
    state.samples_seen += global_batch
    state.phases.enter("other")
    return loss, grad_norm


def _forward(
    state: TrainState, batch: Batch, micro: int, rows: list[list[int]]
) -> tuple[multi_head.MultiHeadLoss, dict[str, Tensor]]:
    """The loss of a micro-batch, and the embeddings of this rank's networks by name.

    rows: [world][sets] of the micro-batch.
    """
    cfg, runtime = state.cfg, state.runtime
    # Dropout's seed depends on the position in the run only, not on earlier draws.
    torch.manual_seed(hash_words(cfg.seed, Purpose.DROPOUT, state.step, micro, runtime.rank) >> 1)
    pixels = batch.images.to(runtime.device, non_blocking=True)
    flip = batch.flip.to(runtime.device, non_blocking=True)
    pixels = normalise(pixels, flip, dtype_of(state.precision))
    with autocast(state.precision, runtime.device):
        seen = {"embeddings": state.model(pixels)}
        if state.parts.encoder is not None:
            with torch.no_grad():
                seen["slow encoder's embeddings"] = state.parts.encoder(pixels)
    state.phases.enter("head")
    if seen["embeddings"].requires_grad:  # the head's backward ends with this gradient
        seen["embeddings"].register_hook(lambda _: state.phases.enter("backbone"))
    features = seen.get("slow encoder's embeddings")
    heads = [part.head for part in state.parts.heads]
    loss = multi_head.multi_head_loss(cfg, heads, seen["embeddings"], batch.labels, rows, features)
    if state.teacher is not None:
        taught = state.teacher(pixels, batch.ids)
        counts = [sum(sets) for sets in rows]
        embeddings, kind = seen["embeddings"], cfg.teacher_loss
        distillation = distill.distillation_loss(embeddings, taught, kind, counts, runtime.group)
        loss = loss._replace(total=loss.total + cfg.teacher_weight * distillation)
    return loss, seen


def _update(state: TrainState, lr: float, checked: dict[str, Tensor]) -> Tensor:
    """Clip the gradients, step all optimisers unless a tensor is not finite, and average the
    statistics of BatchNorm; returns the gradient norm of the backbone."""
    cfg, parts = state.cfg, state.parts
    scale = None if parts.scaler is None else parts.scaler.scale
    named = [(name, p) for name, p in parts.backbone.named_parameters() if p.grad is not None]
    grads = [p.grad for _, p in named if p.grad is not None]
    if scale is not None:
        torch._foreach_mul_(grads, scale.reciprocal())
    gradients = {f"gradient of {name}": grad for (name, _), grad in zip(named, grads, strict=True)}
    for name, part in parts.named_heads():
        if (rows := part.head.gradient_in_passing()) is not None:
            gradients[f"gradient of the {name}class rows"] = rows
        for parameter_name, parameter in part.head.margin.named_parameters():
            if parameter.grad is not None:
                gradients[f"gradient of the {name}margin's {parameter_name}"] = parameter.grad
    if parts.scaler is None:
        found = state.guard.check(checked | gradients, state.step + 1, {})
    else:
        found = state.guard.check(checked, state.step + 1, gradients)

    grad_norm = nn.utils.get_total_norm(grads)
    if cfg.clip_norm is not None:
        nn.utils.clip_grads_with_norm_([p for _, p in named], cfg.clip_norm, grad_norm)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    state.step_backbone(found)
    for part in parts.heads:
        skip = None if cfg.update_in_backward else found
        part.row_optimizer.step(lr, scale, skip)
    if parts.scaler is not None:
        parts.scaler.update(found)
    if not cfg.sync_bn:
        statistics = [b for b in parts.backbone.buffers() if b.is_floating_point()]
        collectives.average_(statistics, state.runtime.group)
    if parts.encoder is not None:
        momentum = multi_head.encoder_momentum([part.head for part in parts.heads])
        _follow(parts.encoder, parts.backbone, momentum, found)
    return grad_norm


@torch.no_grad()
def _follow(
    encoder: nn.Module, backbone: nn.Module, momentum: float | None, found_inf: Tensor
) -> None:
    """Update the slow encoder: parameters += (1 - momentum) * (backbone's - parameters), unless the
    step was skipped. Buffers, BatchNorm's statistics among them, are copied."""
    assert momentum is not None
    taken = found_inf == 0
    for parameter, target in zip(encoder.parameters(), backbone.parameters(), strict=True):
        parameter.lerp_(target, taken.to(parameter.dtype) * (1 - momentum))
    for buffer, source in zip(encoder.buffers(), backbone.buffers(), strict=True):
        buffer.copy_(source)


def _end_epochs(state: TrainState, logger: Logger, seen_before: int) -> None:
    """Let each head whose epoch has just ended recompute its per-class margins, and log them."""
    parts = state.parts.heads
    over = multi_head.epochs_over(state.order, len(parts), seen_before, state.samples_seen)
    for name, part, epoch in zip(multi_head.head_names(state.cfg), parts, over, strict=True):
        statistics = {} if epoch is None else part.head.end_epoch()
        if statistics:
            record = {"step": state.step, "epoch": epoch, "epoch_end": as_numbers(statistics)}
            line = f"step {state.step}  epoch {epoch}{name and f' of {name}'} is over"
            logger.record(record, line, histograms(statistics))
