"""Verification while training: it ends with the run's other ranks, early or late."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time

import pytest

from recognition import config
from recognition.distributed.preemption import Interrupted
from recognition.run import build, trainer, validate
from tests import ranks
from tests.conftest import command
from tests.launch.processes import TINY, Run, wait
from tests.recognition import runs

LOCAL = ["--standalone", "--nproc-per-node", 2]


@pytest.fixture
def many_pairs(shards_dir, tmp_path):
    """The shards beside many.bin, whose verification takes long, and a function that writes it."""
    rec = tmp_path / "shards"
    shutil.copytree(shards_dir, rec)
    images, same = pickle.loads((rec / "heldout.bin").read_bytes())

    def write(times, damaged=None):
        held = list(images) * times
        if damaged is not None:
            held[damaged] = b"no image"
        (rec / "many.bin").write_bytes(pickle.dumps((held, list(same) * times)))

    write(1)
    return rec, write


def test_an_image_that_one_rank_cannot_read_ends_all_alike(many_pairs, tmp_path):
    rec, write = many_pairs
    write(4, damaged=300)  # of 320 images on 3 ranks: the last one's
    keys = {"rec": str(rec), "val_targets": ["many"], "output": str(tmp_path / "r")}
    messages = ranks.run(3, failing, keys)
    assert messages[0] == messages[1] == messages[2]
    assert "cannot verify: rank 2: many.bin, counted from image 214:" in messages[0]


def failing(keys):
    state = build.build(config.make(runs.BASE | keys), runs.here())
    with (
        trainer.Logger(state.cfg.output, state.runtime.rank, 0) as logger,
        pytest.raises(ValueError) as raised,
    ):
        validate.verify(state, logger)
    assert state.backbone.training
    return str(raised.value)


@pytest.mark.parametrize("world", [1, 3])
def test_every_rank_has_as_many_turns(many_pairs, tmp_path, world):
    """130 images on 1 and 3 ranks; on the last turn all leave."""
    rec, write = many_pairs
    images, same = pickle.loads((rec / "heldout.bin").read_bytes())
    content = (list(images[:65]) * 2, list(same) + list(same)[:25])
    (rec / "many.bin").write_bytes(pickle.dumps(content))
    keys = {"rec": str(rec), "val_targets": ["many"], "output": str(tmp_path / "r")}
    assert ranks.run(world, turns, keys) == [{1: 6, 3: 2}[world]] * world


def turns(keys):
    """How many turns a verification takes, once it has been left on its last one."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    taken = 0

    def turn(last=None):
        nonlocal taken
        taken += 1
        if taken == last:
            raise Interrupted(signal.SIGUSR1)

    with trainer.Logger(state.cfg.output, state.runtime.rank, 0) as logger:
        validate.verify(state, logger, turn)
        count, taken = taken, 0
        with pytest.raises(Interrupted):
            validate.verify(state, logger, lambda: turn(count))
    assert state.backbone.training
    return count


def keys_for(rec, *more):
    return [
        f"rec={rec}", "val_targets=many", "global_batch_size=12", "max_steps=4", *more
    ]  # fmt: skip


def test_a_signal_ends_a_verification_which_is_done_later(many_pairs, tmp_path):
    """Before the first step: what is saved is the run as it begins."""
    rec, write = many_pairs
    write(100)  # some ten seconds
    output = tmp_path / "r"
    with Run(tmp_path / "log", output, LOCAL, keys_for(rec)) as run:
        wait(lambda: "4 steps ->" in run.text(), 60, run.text)
        time.sleep(0.5)
        os.kill(run.workers()[1], signal.SIGUSR1)
        assert run.agent.wait(60) != 0
        assert "stopped by SIGUSR1 after step 0, which is saved" in run.text()
    assert (output / "checkpoints" / "step-0" / "manifest.json").exists()
    assert verified(output) == []
    write(1)
    command("launch/train.py", *TINY, f"output={output}", *keys_for(rec))  # in one process
    assert verified(output) == [0, 4]


def verified(output):
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in lines if "verification" in record]


@pytest.mark.long
def test_a_rank_that_hangs_in_a_verification_is_named(many_pairs, tmp_path):
    rec, write = many_pairs
    write(400)
    keys = keys_for(rec, "collective_timeout=12")
    with Run(tmp_path / "log", tmp_path / "r", LOCAL, keys) as run:
        wait(lambda: "4 steps ->" in run.text(), 60, run.text)
        time.sleep(0.5)
        worker = run.workers()[1]
        os.kill(worker, signal.SIGSTOP)
        wait(lambda: "error (rank 0)" in run.text(), 60, run.text)
        text = run.text()
        os.kill(worker, signal.SIGCONT)
        assert run.agent.wait(40) != 0
        blocked = next(line for line in text.splitlines() if "blocked by" in line)
        assert "rank 1 on" in blocked and "silent for" in blocked
