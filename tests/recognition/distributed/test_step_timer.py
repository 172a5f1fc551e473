"""Where the time of the steps went: the parts add up, and a delay shows where it is."""

from __future__ import annotations

import json
import time

import pytest
import torch

from recognition import config
from recognition.distributed import collectives, step_timer
from recognition.head import PartialFC
from recognition.head.chunked_softmax import ExpSums
from recognition.optim import RowSGD
from recognition.run import build, trainer
from tests import ranks
from tests.recognition import runs

DELAY = 1.0  # s, of a clock that stands still otherwise


def test_the_parts_add_up_to_the_step(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "output": str(tmp_path), "max_steps": 6, "log_every": 2,
            "verify_every": 3, "checkpoint_every": 3}  # fmt: skip
    ranks.run(2, runs.run, keys)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "seconds" in line]
    assert len(logged) == 3
    for line in logged:
        seconds = line["seconds"]
        assert tuple(seconds) == step_timer.NAMES and min(seconds.values()) >= 0
        step = 12 / line["images_per_second"]
        assert sum(seconds.values()) == pytest.approx(step, rel=0.05)
        assert min(seconds[name] for name in ("backbone", "head", "communication")) > 0


class Clock:
    now = 1.0

    def __call__(self):
        return self.now

    def late(self, function):
        def delayed(*arguments, **options):
            self.now += DELAY
            return function(*arguments, **options)

        return delayed


class Late:
    """Batches that come late."""

    def __init__(self, batches, clock):
        self.batches, self.clock = batches, clock

    def __next__(self):
        return self.clock.late(next)(self.batches)


def delayed(keys, phase):
    """Seconds of a step by phase, one of them delayed."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timer.time, "perf_counter", clock)
        state = build.build(config.make(runs.BASE | keys), runs.here())
        with trainer.make_loader(state) as loader:
            batches = Late(iter(loader), clock) if phase == "data" else iter(loader)
            if phase == "backbone":
                patch.setattr(state.backbone, "forward", clock.late(state.backbone.forward))
            elif phase == "head":
                patch.setattr(PartialFC, "_loss", clock.late(PartialFC._loss))
            elif phase == "head, backward":
                patch.setattr(ExpSums, "gradients", clock.late(ExpSums.gradients))
            elif phase == "optimizer":
                patch.setattr(RowSGD, "step", clock.late(RowSGD.step))
            elif phase == "communication":
                scatter = collectives._reduce_scatter
                patch.setattr(collectives, "_reduce_scatter", clock.late(scatter))
            elif phase == "other":
                clock.now += DELAY
            with state.phases.running():
                trainer.take_step(state, batches)
                return state.phases.read()


@pytest.mark.parametrize("phase", [*step_timer.NAMES, "head, backward"])
def test_a_delay_shows_where_it_is(shards_dir, tmp_path, phase):
    keys = {"rec": str(shards_dir), "output": str(tmp_path)}
    for seconds in ranks.run(2, delayed, keys, phase):
        name = phase.partition(",")[0]
        assert seconds == dict.fromkeys(step_timer.NAMES, 0.0) | {name: DELAY}


def test_a_pause_is_not_counted():
    clock = step_timer.Phases(torch.device("cpu"))
    clock.read()
    with clock.pause():
        time.sleep(0.05)
    assert sum(clock.read().values()) < 0.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_time_is_told_without_waiting_for_it():
    clock = step_timer.Phases(torch.device("cuda"))
    torch.cuda.synchronize()
    clock.read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock.enter("head")
        torch.cuda._sleep(100_000_000)
        clock.enter("other")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    seconds = clock.read()
    assert seconds["head"] > 0.02 and max(seconds, key=seconds.__getitem__) == "head"
