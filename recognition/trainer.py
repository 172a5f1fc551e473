"""The training loop: train(state) runs a state that build.py made to its last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.augment import Probabilities
from data_tools.dali import Dali
from data_tools.loader import Batch, BatchSource, Loader, normalise
from data_tools.order import rank_slice
from eval import lfw
from recognition import checkpoint, collectives, progress, saving
from recognition.build import TrainState
from recognition.logger import Logger, as_numbers, histograms
from recognition.run_dir import owned, write_config
from recognition.sampling import hash_words

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_VERIFY_BATCH = 64  # images
_DROPOUT_KEY = 4  # the purpose of this draw, as in sampling.py
_LEAST_SCALE = 2.0**-14  # of fp16; below it nothing is left of the gradient


def train(state: TrainState) -> dict[str, Any]:
    """Run to the last step; the last verification's results by set.

    Raises:
        FloatingPointError: a non-finite loss or gradient, named.
        OSError: another run holds the output, or a file of it cannot be written.
    """
    cfg, runtime = state.cfg, state.runtime
    with contextlib.ExitStack() as stack:

        def take_output() -> None:
            if runtime.rank == 0:
                stack.enter_context(owned(cfg.output))
                write_config(cfg, state.facts)

        collectives.together(runtime.group, "start the run", take_output)
        logger = stack.enter_context(Logger(cfg.output, runtime.rank, state.step))
        loader = stack.enter_context(make_loader(state))
        saver = stack.enter_context(saving.make_saver(state, logger))
        _announce(state, logger)
        return _run(state, logger, loader, saver)


def _run(
    state: TrainState, logger: Logger, loader: BatchSource, saver: checkpoint.Saver
) -> dict[str, Any]:
    cfg, runtime, total = state.cfg, state.runtime, state.schedule.total_steps
    results = verify(state, logger) if state.step == 0 else {}
    batches = iter(loader)
    watch = progress.Stopwatch(loader, state.step)
    while state.step < total:
        epoch = state.samples_seen // len(state.data)
        loss, grad_norm = take_step(state, batches)
        if state.samples_seen // len(state.data) > epoch:
            _end_epoch(state, logger)
        logging = _due(state.step, cfg.log_every, total)
        verifying = _due(state.step, cfg.verify_every, total)
        due = _due(state.step, cfg.checkpoint_every, total)
        if runtime.device.type == "cpu" or logging or verifying or due:
            state.guard.raise_if_found()
        if logging:
            _log(state, logger, loss, grad_norm, watch)
        with watch.paused():
            # In this order: a run killed in between does both again.
            if verifying:
                results = verify(state, logger)
            if due:
                saving.save(saver, state, results if verifying else {})
    return results


@torch.no_grad()
def verify(state: TrainState, logger: Logger) -> dict[str, Any]:
    """Ten-fold accuracy on every val_target, the images spread over the ranks."""
    rank, world, group = state.runtime.rank, state.runtime.world, state.runtime.group
    state.backbone.eval()
    results = {}
    for pairs in state.val_sets:
        counts = [stop - start for start, stop in _shares(len(pairs.encoded), world)]
        start, stop = rank_slice(len(pairs.encoded), world, rank)
        local = lfw.embed(
            lambda images: embed(state, images),
            pairs.encoded[start:stop],
            _VERIFY_BATCH,
            f"{pairs.name}.bin, counted from image {start}:",
        )
        sums, norms = (
            collectives.gather_parts(torch.from_numpy(part), counts, group) for part in local
        )
        results[pairs.name] = lfw.score(sums.numpy(), norms.numpy(), pairs.issame)
    state.backbone.train()
    if results:
        short = {
            name: {key: score[key] for key in ("accuracy_mean", "accuracy_std", "xnorm")}
            for name, score in results.items()
        }
        line = "  ".join(
            f"{name} {100 * score['accuracy_mean']:.2f} +- {100 * score['accuracy_std']:.2f} %"
            for name, score in short.items()
        )
        record = {"step": state.step, "verification": short}
        logger.record(record, f"step {state.step}  verification  {line}")
    return results


def embed(state: TrainState, images: np.ndarray) -> np.ndarray:  # uint8 [n, 112, 112, 3] -> [n, D]
    """Embeddings of the network as it stands, float32."""
    device = state.runtime.device
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, non_blocking=True)
    unflipped = torch.zeros(len(pixels), dtype=torch.bool, device=device)
    with _autocast(state):
        embeddings = state.backbone(normalise(pixels, unflipped, _dtype(state)))
    return embeddings.float().cpu().numpy()


# --- One step -------------------------------------------------------------------------------------


def take_step(state: TrainState, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """One optimiser step: (loss [], gradient norm of the backbone []), both on the device."""
    cfg, parts, runtime = state.cfg, state.parts, state.runtime
    global_batch = cfg.global_batch(runtime.world)
    lr = state.schedule.lr_at(state.step)
    parts.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=runtime.device)
    looked_at: dict[str, Tensor] = {}
    for micro in range(cfg.accumulation):
        counts = state.order.rows_per_rank(
            state.samples_seen, global_batch, cfg.accumulation, micro, runtime.world
        )
        share = sum(counts) / global_batch
        synchronise = micro == cfg.accumulation - 1
        with contextlib.nullcontext() if synchronise else state.model.no_sync():
            micro_loss, seen = _forward(state, next(batches), micro, counts)
            scaled = micro_loss * share
            if parts.scaler is not None:
                scaled = scaled * parts.scaler.scale
            scaled.backward()
        loss = loss + micro_loss.detach() * share
        looked_at |= {f"{name} of micro-step {micro}": x for name, x in seen.items()}
    grad_norm = _update(state, lr, looked_at | {"loss": loss})
    state.step += 1
    state.samples_seen += global_batch
    return loss, grad_norm


def _forward(
    state: TrainState, batch: Batch, micro: int, counts: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, and what this rank's networks gave, by name."""
    cfg, runtime = state.cfg, state.runtime
    # Dropout's draw is a function of its place in the run, not of what was drawn before it.
    torch.manual_seed(hash_words(cfg.seed, _DROPOUT_KEY, state.step, micro, runtime.rank) >> 1)
    pixels = batch.images.to(runtime.device, non_blocking=True)
    flip = batch.flip.to(runtime.device, non_blocking=True)
    pixels = normalise(pixels, flip, _dtype(state))
    with _autocast(state):
        seen = {"embeddings": state.model(pixels)}
        if state.parts.encoder is not None:
            with torch.no_grad():
                seen["slow encoder's embeddings"] = state.parts.encoder(pixels)
    features = seen.get("slow encoder's embeddings")
    return state.head(seen["embeddings"], batch.labels, counts, features), seen


def _update(state: TrainState, lr: float, looked_at: dict[str, Tensor]) -> Tensor:
    """Clip, step both optimisers unless something is not finite, average BatchNorm's statistics."""
    cfg, parts = state.cfg, state.parts
    scale = None if parts.scaler is None else parts.scaler.scale
    named = [(name, p) for name, p in parts.backbone.named_parameters() if p.grad is not None]
    grads = [p.grad for _, p in named if p.grad is not None]
    if scale is not None:
        torch._foreach_mul_(grads, scale.reciprocal())
    gradients = {"gradient of the class rows": parts.head.sampled_grad}
    gradients |= {f"gradient of {name}": grad for (name, _), grad in zip(named, grads, strict=True)}
    for name, parameter in parts.head.margin.named_parameters():
        if parameter.grad is not None:
            gradients[f"gradient of the margin's {name}"] = parameter.grad
    if parts.scaler is None:
        found = state.guard.look(looked_at | gradients, state.step + 1, {})
    else:
        found = state.guard.look(looked_at, state.step + 1, gradients)

    grad_norm = nn.utils.get_total_norm(grads)
    if cfg.clip_norm is not None:
        nn.utils.clip_grads_with_norm_([p for _, p in named], cfg.clip_norm, grad_norm)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    # The fused step reads the attribute and changes nothing where it is 1.
    setattr(parts.optimizer, "found_inf", found)  # noqa: B010
    parts.optimizer.step()
    parts.row_optimizer.step(lr, scale, found)
    if parts.scaler is not None:
        parts.scaler.update(found)
    if not cfg.sync_bn:
        statistics = [b for b in parts.backbone.buffers() if b.is_floating_point()]
        collectives.average_(statistics, state.runtime.group)
    if parts.encoder is not None:
        _follow(parts.encoder, parts.backbone, parts.head.margin.encoder_momentum, found)
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


def _end_epoch(state: TrainState, logger: Logger) -> None:
    """The classes' own margins are computed anew; what the log says of them."""
    statistics = state.head.end_epoch()
    if statistics:
        epoch = state.samples_seen // len(state.data)
        record = {"step": state.step, "epoch": epoch, "epoch_end": as_numbers(statistics)}
        logger.record(record, f"step {state.step}  epoch {epoch} is over", histograms(statistics))


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
        blocks=state.order.blocks,
        shares=cfg.rec_shares,
        chances=Probabilities(
            cfg.crop_augmentation_prob,
            cfg.low_res_augmentation_prob,
            cfg.photometric_augmentation_prob,
        ),
    )
    if cfg.loader == "dali":
        return Dali(state.data, device=runtime.device, **stream)
    return Loader(state.data, pin_memory=runtime.device.type == "cuda", **stream)


def _shares(count: int, world: int) -> list[tuple[int, int]]:
    return [rank_slice(count, world, rank) for rank in range(world)]


def _dtype(state: TrainState) -> torch.dtype:
    return torch.float64 if state.precision == "fp64" else torch.float32


def _autocast(state: TrainState) -> torch.autocast:
    dtype = _AUTOCAST.get(state.precision)
    return torch.autocast(state.runtime.device.type, dtype, enabled=dtype is not None)


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def _announce(state: TrainState, logger: Logger) -> None:
    cfg, runtime = state.cfg, state.runtime
    logger.say(
        f"{cfg.network} + {cfg.margin} on {state.data.path}: {len(state.data)} images, "
        f"{state.data.num_classes} classes; {runtime.world} x {runtime.device.type}, "
        f"{state.precision}, batch {cfg.global_batch(runtime.world)}, "
        f"{state.schedule.total_steps} steps -> {cfg.output}"
    )
    if state.precision == "fp16" and runtime.device.type == "cpu":
        logger.say("warning: fp16 takes a CPU many times fp32's time: use precision=bf16 or fp32")
    for damage in state.set_aside:
        record = {"step": state.step, "damaged_checkpoint": damage}
        logger.record(record, f"warning: {damage}; going on from step {state.step}")
    if state.step >= state.schedule.total_steps:
        logger.say(f"already complete: {state.step} of {state.schedule.total_steps} steps")
    elif state.saved_by is not None:
        logger.say(f"continues after step {state.step}: {_continuation(state)}")


def _continuation(state: TrainState) -> str:
    """In what sense a resumed run is the one that was saved."""
    processes = f"saved by {state.saved_by} processes"
    if state.changes:
        return f"{processes}, with changes: {', '.join(state.changes)}"
    if state.saved_by == state.runtime.world:
        return f"{processes}, on the CPU bit for bit as if it had not stopped"
    if state.cfg.sync_bn:
        return f"{processes}, the same samples, classes and statistics: the same curve to rounding"
    return (
        f"{processes}, the same samples and classes; BatchNorm takes its statistics per process, "
        "so the curve is another one of the same kind (sync_bn=true makes them one)"
    )


def _log(
    state: TrainState, logger: Logger, loss: Tensor, grad_norm: Tensor, watch: progress.Stopwatch
) -> None:
    cfg = state.cfg
    global_batch = cfg.global_batch(state.runtime.world)
    statistics = state.head.statistics()
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": state.samples_seen / len(state.data),
        "loss": loss.item(),
        "lr": state.schedule.lr_at(state.step - 1),
        **progress.speed(watch.read(state.step), global_batch),
        "grad_norm": grad_norm.item(),
        "head": as_numbers(statistics),
    }
    if cfg.rec_shares:  # how often each set has been seen by now
        seen = zip(cfg.recs, state.order.count(state.samples_seen), state.order.sizes, strict=True)
        record["set_epoch"] = {rec: count / size for rec, count, size in seen}
    if state.parts.scaler is not None:
        record["loss_scale"] = state.parts.scaler.scale.item()
        record["skipped_steps"] = int(state.parts.scaler.skipped.item())
        if record["loss_scale"] < _LEAST_SCALE:
            raise FloatingPointError(
                f"the fp16 loss scale fell to {record['loss_scale']:.1e} by step {state.step}: "
                "every step overflows. Use precision=bf16 or fp32, or lower lr"
            )
    line = progress.line(record, state.schedule.total_steps, global_batch)
    logger.record(record, line, histograms(statistics))
