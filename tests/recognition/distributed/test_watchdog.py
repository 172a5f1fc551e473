"""Who holds up whom is named before the time-out; who fails first is named last."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recognition import config
from recognition.distributed import collectives, runtime, store_exchange, watchdog
from recognition.distributed.heartbeats import Heartbeats, RankStatus, suspects
from recognition.distributed.replica_check import SampleRecord
from recognition.run import build, trainer
from tests import ranks
from tests.conftest import run
from tests.launch.ends import samples_of
from tests.launch.processes import ROOT, Run, wait
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
        found = [line for line in lines if line.startswith("warning: blocked by")]
        assert found, run.text()
        warned = found[-1]
        assert "rank 1 on" in warned and "silent for" in warned
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


def test_lost_contact_is_known_by_the_errors_type_alone():
    assert watchdog.lost_contact(collectives.LostContact("Read error"))
    assert watchdog.lost_contact(dist.DistBackendError("NCCL communicator was aborted"))
    assert not watchdog.lost_contact(RuntimeError("/data/igloo/nccl: connection closed"))
    assert not watchdog.lost_contact(ConnectionResetError("of a data server"))


def test_an_error_at_world_size_1_is_never_lost_contact(tmp_path):
    store = dist.HashStore()
    for error in (RuntimeError("[gloo] Read error"), dist.DistBackendError("NCCL")):
        with (
            pytest.raises(type(error)) as raised,
            watchdog.Watchdog(store, 0, 1, 60.0, str(tmp_path)),
        ):
            raise error
        assert raised.value is error


def test_a_collective_without_its_peer_is_lost_contact(tmp_path):
    """By one of each kind: a collective of ours, the average of DistributedDataParallel."""
    kinds = ("object", "reduce", "gradients")
    done = run("-c", _LOSES.format(root=str(ROOT)), str(tmp_path), *kinds, timeout=120)
    said = {kind: (tmp_path / kind / "said.txt").read_text() for kind in kinds}
    assert done.returncode == 0, (done.stderr, said)
    for text in said.values():
        assert "ConnectionError: lost contact" in text
        assert "Killed or frozen" in text
        assert "rank 1 on" in text and "was killed or is frozen ====" in text


_LOSES = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from datetime import timedelta
sys.path.insert(0, {root!r})
from recognition.distributed import collectives, watchdog
for kind in sys.argv[2:]:  # each kind in two processes of its own, at the same time
    directory = os.path.join(sys.argv[1], kind)
    if os.fork() == 0:
        os.makedirs(directory)
        said = os.open(directory + "/said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        break
else:
    ended = [os.wait()[1] for _ in sys.argv[2:]]
    sys.exit(any(ended))
rank = 1 if os.fork() == 0 else 0
store = dist.FileStore(directory + "/store", 2)
dist.init_process_group(
    "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
step = {{
    "object": lambda: collectives.gather_objects(rank, dist.group.WORLD),
    "reduce": lambda: collectives.sum_over_ranks(torch.ones(2), dist.group.WORLD),
    "gradients": lambda: model(torch.ones(2, 2)).sum().backward(),
}}[kind]
try:
    with watchdog.Watchdog(store.clone(), rank, 2, 60.0, directory):
        step()
        if rank == 1:
            os._exit(1)
        step()
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
    assert "Connection" in str(error.__cause__), error.__cause__
os._exit(0)
"""


def test_an_error_of_a_backward_is_its_own_while_the_others_are_there(tmp_path):
    """A bare RuntimeError out of torch's engine, which is what gloo's becomes there, too."""
    assert ranks.run(2, own_error, str(tmp_path)) == ["RuntimeError", "no error"]


def own_error(directory):
    try:
        with watchdog.Watchdog(runtime.store(), dist.get_rank(), 2, 60.0, directory):
            collectives.gather_objects(None, dist.group.WORLD)
            if dist.get_rank() == 0:
                x = torch.ones(2, requires_grad=True).exp()
                loss = x.square().sum()
                with torch.no_grad():
                    x.add_(1)  # the backward needs what it was
                loss.backward()
            else:
                store_exchange.gather_through_store(lambda: time.sleep(8), dist.group.WORLD)
    except RuntimeError as error:
        assert "inplace operation" in str(error)
        store_exchange.gather_through_store(lambda: None, dist.group.WORLD)
        return type(error).__name__
    return "no error"


def test_the_age_of_a_heartbeat_is_by_the_readers_clock(monkeypatch):
    """The sender's wall clock is an hour off; what counts is when its number changed here."""
    store = dist.HashStore()
    sender, reader = (Heartbeats(store, rank, 2) for rank in (1, 0))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    sender.send(3, "computes", 0.0)
    assert reader.read()[0].age == 0.0
    time.sleep(0.2)
    assert reader.read()[0].age >= 0.2  # no new one
    sender.send(3, "computes", 0.2)
    assert reader.read([1])[0].age == 0.0
    assert reader.read([0]) == []  # it has sent none


WAITS = "waits for the other ranks (recognition/distributed/collectives.py:1, f: x)"


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
    holding_up, others = suspects([RankStatus(*place) for place in told])
    assert [place.rank for place in holding_up] == first
    assert len(holding_up) + len(others) == len(told)


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
    steps = samples_of(str(tmp_path / "r"))
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
    assert samples_of(str(tmp_path)) == {1: [5], 2: [7]}


def noted(run_dir):
    record = SampleRecord(run_dir, dist.group.WORLD)
    record.note(1, np.array([7]))
    record.close()


_PATIENT = """
import time, torch.distributed as dist
from recognition.distributed import watchdog
with watchdog.Watchdog(dist.HashStore(), 0, 1, 0.5, {directory!r}) as dog:
    with dog.long_operation():
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
