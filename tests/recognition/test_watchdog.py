"""Who holds up whom is named before the time-out; who fails first is named last."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recognition import build, config, places, replicas, runtime, trainer, watchdog
from recognition.places import Place
from tests import ranks
from tests.conftest import run
from tests.launch.processes import Run, wait
from tests.recognition import runs

TINY = ["global_batch_size=12", "max_steps=100000", "collective_timeout=12"]


def start(tmp_path, shards_dir, *keys):
    torchrun = ["--standalone", "--nproc-per-node", 2]
    return Run(tmp_path / "log", tmp_path / "r", torchrun, [f"rec={shards_dir}", *TINY, *keys])


@pytest.mark.long
def test_a_frozen_rank_is_named_and_everybody_ends_within_the_time_out(shards_dir, tmp_path):
    """SIGSTOP: a process that is there and does nothing, as in a hung driver or file system."""
    with start(tmp_path, shards_dir) as run:
        run.wait_for_step(3)
        worker = run.workers()[1]
        os.kill(worker, signal.SIGSTOP)
        wait(lambda: "ends at 12 s" in run.text(), 30, run.text)
        wait(lambda: "error (rank 0)" in run.text(), 60, run.text)
        lines = run.text().splitlines()
        os.kill(worker, signal.SIGCONT)  # its torchrun cannot end a stopped process by SIGTERM
        assert run.agent.wait(60) != 0
        found = [line for line in lines if line.startswith("warning: held up by")]
        assert found, run.text()
        warned = found[-1]
        assert "rank 1 on" in warned and "not heard of for" in warned
        assert "rank 0 on" in warned and any(
            words in warned for words in ("waits for the other", "averages")
        )
        ended = next(line for line in lines if line.startswith("error (rank 0)"))
        assert "rank 1 on" in ended  # the watchdog's word, or the first after the collective's
        assert "Thread 0x" in (tmp_path / "r" / "stacks-rank-0.txt").read_text()


def test_a_killed_rank_is_reported_first_and_last(shards_dir, tmp_path):
    with start(tmp_path, shards_dir) as run:
        run.wait_for_step(3)
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.agent.wait(60) != 0
        text = run.text()
        root_cause = text[text.rindex("Root Cause") :]
        assert "Signal 9 (SIGKILL)" in root_cause and "rank      : 1" in root_cause
        ours = text[: text.index("Traceback")]  # torchrun's own, at its end
        assert "ChildFailedError" not in ours and ".cc:" not in ours


def test_the_others_name_the_first_cause(tmp_path):
    store_told = ranks.run(2, told, str(tmp_path / "d"))
    assert store_told == ["The first cause: rank 1: ValueError: a bad image"] * 2


def told(directory):
    """Rank 1 fails; both ask the store."""
    dog = watchdog.Watchdog(runtime.store(), dist.get_rank(), 2, 60.0, directory)
    if dist.get_rank() == 1:
        with pytest.raises(ValueError), dog:
            raise ValueError("a bad image\nand more of it")
        dog.tell_cause("rank 1: a later one")
    return dog.first_cause()


def test_lost_contact_is_known_from_errors_of_ones_own():
    assert watchdog.lost_contact(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error"))
    assert watchdog.lost_contact(dist.DistBackendError("NCCL communicator was aborted"))
    assert not watchdog.lost_contact(RuntimeError("shape mismatch"))
    assert not watchdog.lost_contact(ValueError("Connection closed"))


WAITS = "waits for the other ranks (recognition/collectives.py:1, f: x)"


@pytest.mark.parametrize(
    "told, first",
    [
        ([(0, 7, WAITS, 5, 0), (1, 7, "waits for data (..)", 5, 0), (2, 7, WAITS, 5, 0)], [1]),
        ([(0, 7, WAITS, 5, 0), (1, 6, WAITS, 9, 0)], [1]),
        ([(0, 7, WAITS, 5, 0), (1, 7, WAITS, 5, 9)], [1]),
        ([(0, 7, WAITS, 5, 0), (1, 7, WAITS, 5, 0)], []),
    ],
    ids=["data wait", "a step behind", "silent", "all alike"],
)
def test_who_holds_up_whom(told, first):
    suspects, others = places.suspects([Place(*place) for place in told])
    assert [place.rank for place in suspects] == first
    assert len(suspects) + len(others) == len(told)


def test_debug_names_the_parameter_and_the_rank(shards_dir, tmp_path):
    keys = {"rec": str(shards_dir), "debug": True, "debug_every": 2, "max_steps": 4}
    messages = ranks.run(3, flipped, keys | {"output": str(tmp_path / "r")})
    assert messages[0] == messages[1] == messages[2]
    assert "after step 2" in messages[0] and " on rank 2" in messages[0]


def flipped(keys):
    """One bit of one parameter changes on rank 2."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    weight = dict(state.backbone.named_parameters())
    name = list(weight)[-3]
    if dist.get_rank() == 2:
        bits = weight[name].data.view(torch.int32)
        bits.view(-1)[0] ^= 1
    try:
        trainer.train(state)
    except RuntimeError as error:
        return str(error)


def test_debug_notes_every_image_once_an_epoch(shards_dir, tmp_path):
    keys = {
        "rec": str(shards_dir), "debug": True, "max_steps": 12, "global_batch_size": 32,
        "output": str(tmp_path / "r"),
    }  # fmt: skip
    ranks.run(2, runs.run, keys)
    steps = replicas.samples_of(str(tmp_path / "r"))
    assert list(steps) == list(range(1, 13))
    for epoch in range(3):  # 128 images, 4 steps
        ids = sum((steps[4 * epoch + k] for k in range(1, 5)), [])
        assert sorted(ids) == list(range(128))


def test_a_clock_that_was_set_back_mixes_no_starts(tmp_path):
    """Step 2 is done twice; the second start's clock is behind the first's."""
    (tmp_path / "samples").mkdir()
    first = tmp_path / "samples" / f"{2**62:020d}-rank-0.jsonl"
    first.write_text("[1, [5]]\n[2, [6]]\n")
    ranks.run(1, noted, str(tmp_path))
    assert replicas.samples_of(str(tmp_path)) == {1: [5], 2: [7]}


def noted(run_dir):
    record = replicas.SampleRecord(run_dir, dist.group.WORLD)
    record.note(1, np.array([7]))
    record.close()


_PATIENT = """
import time, torch.distributed as dist
from recognition import watchdog
with watchdog.Watchdog(dist.HashStore(), 0, 1, 0.5, {directory!r}) as dog:
    with dog.patience():
        time.sleep({seconds})
    print("patient")
"""


@pytest.mark.parametrize("seconds, code", [(2, 0), (60, 1)])
def test_patience_has_a_limit_too(tmp_path, seconds, code):
    """Ten times the time-out of half a second, of which the half brings a word already."""
    ended = run("-c", _PATIENT.format(directory=str(tmp_path), seconds=seconds), timeout=40)
    assert ended.returncode == code, ended.stderr
    assert ("patient" in ended.stdout) == (code == 0)
    assert "ends at 5 s" in ended.stderr
    assert ("error (rank 0): has not moved for 5 s" in ended.stderr) == (code == 1)
