"""The training loop: train(state) runs a state that build.py made to its last step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.common.draws import Purpose, hash_words
from data_tools.load.augment import Probabilities
from data_tools.load.dali import Dali
from data_tools.load.loader import Batch, BatchSource, Loader, normalise
from recognition import checkpoint
from recognition.distributed import collectives, preemption
from recognition.head import multi_head
from recognition.precision import autocast, dtype_of
from recognition.run import log_lines, progress, saving, spikes
from recognition.run.build import TrainState
from recognition.run.early_stop import end_early, verify_or_end
from recognition.run.logger import Logger, as_numbers, histograms
from recognition.run.profiling import traced
from recognition.run.run_dir import OWNED_SECONDS, owned, write_config
from recognition.run.supervise import Overseer
from recognition.weights import distill


def train(state: TrainState) -> dict[str, Any]:
    """Run to the last step; the last verification's results by set.

    Raises:
        FloatingPointError: a non-finite loss or gradient, named; a spike that is to stop the run.
        OSError: another run holds the output, or a file of it cannot be written; or the other
            ranks are gone.
        Stopped: a signal asked the run to end early; its last step is saved.
    """
    rolled_back = None
    while True:
        outcome = _attempt(state, rolled_back)
        if not isinstance(outcome, FloatingPointError):
            return outcome
        rolled_back = spikes.roll_back(state, str(outcome))


def _attempt(state: TrainState, rolled_back: str | None) -> dict[str, Any] | FloatingPointError:
    """The last verification's results; or, with on_spike=rollback, what to go back from."""
    cfg, runtime = state.cfg, state.runtime
    with contextlib.ExitStack() as stack:

        def take_output() -> None:
            if runtime.rank == 0:
                stack.enter_context(owned(cfg.output))
                write_config(cfg, state.facts)
                preemption.remove_note(cfg.output)

        collectives.together(runtime.group, "start the run", take_output, OWNED_SECONDS)
        overseer = stack.enter_context(Overseer(state).watching())
        try:
            return _to_the_end(state, overseer, rolled_back)
        except FloatingPointError as error:  # on all ranks alike
            if cfg.on_spike != "rollback":
                raise
            return error


def _to_the_end(state: TrainState, overseer: Overseer, rolled_back: str | None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        logger = stack.enter_context(Logger(state.cfg.output, state.runtime.rank, state.step))
        saver = stack.enter_context(saving.make_saver(state, logger))
        log_lines.announce(state, logger)
        stack.enter_context(state.phases.running())
        trace = traced(state.cfg.profile, state.cfg.output, state.runtime.rank, logger.say)
        stepped = stack.enter_context(trace)
        if rolled_back:
            record = {"step": state.step, "rollback": rolled_back}
            logger.record(record, f"warning: {rolled_back}")
        seen_before = state.samples_seen
        if spikes.jump(state):
            _end_epochs(state, logger, seen_before)
        owes = state.step == 0 or state.owes_verification
        results = verify_or_end(state, logger, saver, overseer) if owes else {}
        while state.step < state.schedule.total_steps:
            with make_loader(state) as loader:
                results = _run(state, logger, loader, saver, overseer, stepped, results)
        saver.finish()
        log_lines.what_comes_next(state, logger)
        return results


def _run(
    state: TrainState,
    logger: Logger,
    loader: BatchSource,
    saver: checkpoint.Saver,
    overseer: Overseer,
    stepped: Callable[[], None],
    results: dict[str, Any],
) -> dict[str, Any]:
    """To the last step, or to samples that are left out; the last verification's results."""
    cfg, runtime, total = state.cfg, state.runtime, state.schedule.total_steps
    batches = overseer.batches(iter(loader))
    watch = progress.Stopwatch(loader, state.step, state.phases)
    jumped = False
    while state.step < total and not jumped:
        seen_before = state.samples_seen
        overseer.before_step()
        loss, grad_norm = take_step(state, batches)
        stepped()
        jumped = spikes.jump(state)
        heard = overseer.after_step()
        _end_epochs(state, logger, seen_before)
        logging = saving.is_due(state, cfg.log_every)
        verifying = saving.is_due(state, cfg.verify_every)
        due = saving.is_due(state, cfg.checkpoint_every)
        stopping = heard is not None and state.step < total
        if runtime.device.type == "cpu" or logging or verifying or due or stopping:
            state.guard.raise_if_found()
            spikes.heed(state, logger)
        if logging:
            log_lines.log_step(state, logger, loss, grad_norm, watch)
        with watch.paused():
            if heard is not None and stopping:
                end_early(state, saver, overseer, heard)
            # In this order: a run killed in between does both again.
            if verifying:
                results = verify_or_end(state, logger, saver, overseer)
            if due:
                with overseer.patience():
                    saving.save(saver, state, results if verifying else {})
    return results


# --- One step -------------------------------------------------------------------------------------


def take_step(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One optimiser step: (loss [], gradient norm of the backbone []), both on the device."""
    cfg, parts, runtime = state.cfg, state.parts, state.runtime
    global_batch = cfg.global_batch(runtime.world)
    lr = state.schedule.lr_at(state.step)
    parts.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=runtime.device)
    by_head = torch.zeros(len(parts.heads), device=runtime.device)
    looked_at: dict[str, Tensor] = {}
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
            joint, seen = _forward(state, batch, micro, rows)
            scaled = joint.total * share
            if parts.scaler is not None:
                scaled = scaled * parts.scaler.scale
            scaled.backward()
        state.phases.enter("optimizer")
        loss = loss + joint.total.detach() * share
        by_head = by_head + joint.by_head * share
        looked_at |= {f"{name} of micro-step {micro}": x for name, x in seen.items()}
    grad_norm = _update(state, lr, looked_at | {"loss": loss})
    if state.spikes is not None:
        state.spikes.look(loss, grad_norm, state.step + 1)
    state.head_losses = by_head
    state.step += 1
    state.samples_seen += global_batch
    state.phases.enter("other")
    return loss, grad_norm


def _forward(
    state: TrainState, batch: Batch, micro: int, rows: list[list[int]]
) -> tuple[multi_head.Joint, dict[str, Tensor]]:
    """The loss of a micro-batch, and what this rank's networks gave, by name.

    rows: [world][sets] of the micro-batch.
    """
    cfg, runtime = state.cfg, state.runtime
    # Dropout's draw is a function of its place in the run, not of what was drawn before it.
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
    if seen["embeddings"].requires_grad:  # its gradient ends the head's backward
        seen["embeddings"].register_hook(lambda _: state.phases.enter("backbone"))
    features = seen.get("slow encoder's embeddings")
    own = [part.head for part in state.parts.heads]
    loss = multi_head.joint_loss(cfg, own, seen["embeddings"], batch.labels, rows, features)
    if state.teacher is not None:
        taught = state.teacher(pixels, batch.ids)
        counts = [sum(sets) for sets in rows]
        lesson = distill.lesson(
            seen["embeddings"], taught, cfg.teacher_loss, counts, runtime.group
        )  # fmt: skip
        loss = loss._replace(total=loss.total + cfg.teacher_weight * lesson)
    return loss, seen


def _update(state: TrainState, lr: float, looked_at: dict[str, Tensor]) -> Tensor:
    """Clip, step both optimisers unless something is not finite, average BatchNorm's statistics."""
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
        for own, parameter in part.head.margin.named_parameters():
            if parameter.grad is not None:
                gradients[f"gradient of the {name}margin's {own}"] = parameter.grad
    if parts.scaler is None:
        found = state.guard.look(looked_at | gradients, state.step + 1, {})
    else:
        found = state.guard.look(looked_at, state.step + 1, gradients)

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
    """Move the slow copy's parameters by 1 - momentum towards the backbone's, unless the step was
    skipped; copy the buffers, BatchNorm's statistics among them."""
    assert momentum is not None
    taken = found_inf == 0
    for parameter, target in zip(encoder.parameters(), backbone.parameters(), strict=True):
        parameter.lerp_(target, taken.to(parameter.dtype) * (1 - momentum))
    for buffer, source in zip(encoder.buffers(), backbone.buffers(), strict=True):
        buffer.copy_(source)


def _end_epochs(state: TrainState, logger: Logger, seen_before: int) -> None:
    """Where an epoch of a head's images is over, the classes' own margins are computed anew; what
    the log says of them."""
    parts = state.parts.heads
    over = multi_head.epochs_over(state.order, len(parts), seen_before, state.samples_seen)
    for name, part, epoch in zip(multi_head.head_names(state.cfg), parts, over, strict=True):
        statistics = {} if epoch is None else part.head.end_epoch()
        if statistics:
            record = {"step": state.step, "epoch": epoch, "epoch_end": as_numbers(statistics)}
            said = f"step {state.step}  epoch {epoch}{name and f' of {name}'} is over"
            logger.record(record, said, histograms(statistics))


# --- Small parts ----------------------------------------------------------------------------------


def make_loader(state: TrainState) -> BatchSource:
    cfg, runtime = state.cfg, state.runtime
    stream: dict[str, Any] = dict(
        seed=cfg.seed,
        global_batch=cfg.global_batch(runtime.world),
        world=runtime.world,
        rank=runtime.rank,
        accumulation=cfg.accumulation,
        samples_seen=state.samples_seen,
        workers=cfg.num_workers,
        resize=cfg.resize,
        blocks=state.order.blocks,
        shares=multi_head.shares(cfg, state.data),
        chances=Probabilities(
            cfg.crop_augmentation_prob,
            cfg.low_res_augmentation_prob,
            cfg.photometric_augmentation_prob,
        ),
    )
    if cfg.loader == "dali":
        return Dali(state.data, device=runtime.device, **stream)
    return Loader(state.data, pin_memory=runtime.device.type == "cuda", **stream)
