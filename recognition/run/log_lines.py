"""The log lines of a run: at its start, at each log step and at its end; speed and traces."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from data_tools.load.loader import BatchSource
from recognition import config
from recognition.checkpoint import directory_of
from recognition.distributed.step_timer import Phases
from recognition.head import multi_head
from recognition.run import sanity
from recognition.run.logger import Logger, as_numbers, histograms
from recognition.run.state import TrainState

_WAIT, _WARMUP, _ACTIVE = 3, 1, 3  # steps that a trace leaves out, drops and keeps
_LEAST_SCALE = 2.0**-14  # fp16: below it gradients underflow to zero


def log_start(state: TrainState, logger: Logger) -> None:
    cfg, runtime = state.cfg, state.runtime
    losses = " + ".join(config.of_head(cfg, k).margin for k in range(len(cfg.rec_heads)))
    logger.say(
        f"{cfg.network} + {losses or cfg.margin} on {state.data.path}: {len(state.data)} images, "
        f"{state.data.num_classes} classes; {runtime.world} x {runtime.device.type}, "
        f"{state.precision}, batch {cfg.global_batch(runtime.world)}, "
        f"{state.schedule.total_steps} steps -> {cfg.output}"
    )
    if state.precision == "fp16" and runtime.device.type == "cpu":
        logger.say("warning: fp16 takes a CPU many times fp32's time: use precision=bf16 or fp32")
    for line in [*state.messages, *(sanity.lines(state) if runtime.rank == 0 else [])]:
        logger.say(line)
    for damage in state.damaged:
        record = {"step": state.step, "damaged_checkpoint": damage}
        logger.record(record, f"warning: {damage}; going on from step {state.step}")
    if state.step >= state.schedule.total_steps:
        changes = f"; with changes: {', '.join(state.changes)}" if state.changes else ""
        total = state.schedule.total_steps
        logger.say(f"already complete: {state.step} of {total} steps{changes}")
    elif state.saved_by is not None:
        if state.elastic_message:
            logger.say(state.elastic_message)
        logger.say(f"continues after step {state.step}: {_continuation(state)}")


def log_next_commands(state: TrainState, logger: Logger) -> None:
    """Log where the trained model is, and the two commands that most users run next."""
    output = state.cfg.output
    found = []
    for name in state.cfg.val_targets:
        with contextlib.suppress(OSError):  # it existed when the run started
            found.append(state.data.bin_path(name.removesuffix(".bin")))
    bins = " ".join(shlex.quote(str(path)) for path in found) or "PAIRS.bin"
    logger.say(
        f"the model is in {directory_of(output, state.step)}; next:\n"
        f"  python -m eval lfw {shlex.quote(output)} {bins}\n"
        f"  python launch/export.py {shlex.quote(output)} "
        f"{shlex.quote(os.path.join(output, 'model.onnx'))}"
    )


def _continuation(state: TrainState) -> str:
    """How closely the resumed run reproduces the run that saved the checkpoint."""
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


def log_step(
    state: TrainState, logger: Logger, loss: Tensor, grad_norm: Tensor, stopwatch: Stopwatch
) -> None:
    cfg = state.cfg
    global_batch = cfg.global_batch(state.runtime.world)
    of_head = {
        name: part.head.statistics()
        for name, part in zip(multi_head.head_names(cfg), state.parts.heads, strict=True)
    }
    steps, seconds, waited = stopwatch.read(state.step)
    record: dict[str, Any] = {
        "step": state.step,
        "epoch": state.samples_seen / len(state.data),
        "loss": loss.item(),
        "lr": state.schedule.lr_at(state.step - 1),
        "images_per_second": steps * global_batch / max(seconds, 1e-9),
        "data_wait": waited / max(seconds, 1e-9),
        "seconds": {name: x / max(steps, 1) for name, x in state.phases.read().items()},
        "grad_norm": grad_norm.item(),
    }
    if cfg.rec_heads:
        assert state.head_losses is not None
        losses = dict(zip(of_head, state.head_losses.tolist(), strict=True))
        record["heads"] = {n: {"loss": losses[n], **as_numbers(x)} for n, x in of_head.items()}
    else:
        record["head"] = as_numbers(of_head[""])
    if cfg.rec_shares or cfg.rec_heads:  # epochs seen of each set
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
    line = _step_line(record, state.schedule.total_steps, global_batch)
    pictures = {
        f"{head and f'{head}/'}{name}": histogram
        for head, statistics in of_head.items()
        for name, histogram in histograms(statistics).items()
    }
    logger.record(record, line, pictures)


class Stopwatch:
    """Steps, seconds and seconds of waiting for data since the last reading, without pauses."""

    def __init__(self, source: BatchSource, step: int, phases: Phases) -> None:
        self._source, self._phases = source, phases
        phases.read()
        self._last = (step, time.perf_counter(), source.wait_seconds)

    def read(self, step: int) -> tuple[int, float, float]:
        now = (step, time.perf_counter(), self._source.wait_seconds)
        before, self._last = self._last, now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._phases.pause():
            yield
        step, then, waited = self._last
        self._last = (step, then + time.perf_counter() - began, waited)


def _step_line(record: dict[str, Any], total_steps: int, global_batch: int) -> str:
    """The console line of a step's record."""
    spent = record["seconds"]
    whole = max(sum(spent.values()), 1e-9)
    shares = " ".join(f"{name} {100 * part / whole:.0f} %" for name, part in spent.items())
    left = int((total_steps - record["step"]) * global_batch / record["images_per_second"])
    return (
        f"step {record['step']}/{total_steps}  epoch {record['epoch']:.2f}  "
        f"loss {record['loss']:.4f}  lr {record['lr']:.5f}  "
        f"{record['images_per_second']:.0f} images/s  {shares}  "
        f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )


@contextlib.contextmanager
def trace_steps(
    wanted: bool, output: str, rank: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Trace a few steps for chrome://tracing or Perfetto; yields what to call after each step.

    CPU and GPU activity of the steps that follow the first few goes to <output>/trace-<rank>.json.
    `say` receives the path, or a warning that the run ended before the trace began."""
    if not wanted:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path = os.path.join(output, f"trace-{rank}.json")
    written = False

    def write(trace: profile) -> None:
        nonlocal written
        last = min(trace.step_num, first + _ACTIVE - 1)
        if last < first:  # the run ended just as the trace began
            return
        trace.export_chrome_trace(path)
        written = True
        say(
            f"profile: steps {first} to {last} of this start are in {path}, for ui.perfetto.dev "
            "or chrome://tracing"
        )

    first = _WAIT + _WARMUP + 1
    with profile(
        activities=activities,
        schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1),
        on_trace_ready=write,
    ) as trace:
        yield trace.step
    if not written:
        say(f"warning: profile=true wrote no trace: a start of {first} steps or more does")
