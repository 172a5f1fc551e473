"""Saving beside the training: what a save in flight comes to, and one that fails."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from recognition import checkpoint, config
from recognition.checkpoint import tensors, writing
from recognition.run import build, saving, trainer
from recognition.run.logger import Logger
from tests import ranks
from tests.recognition import runs


@pytest.fixture
def keys(shards_dir, tmp_path):
    return {"rec": str(shards_dir), "precision": "fp32", "output": str(tmp_path / "run")}


@contextlib.contextmanager
def slow_disk(gate=None, seconds=0.0):
    """Every file takes so long to be written, or until the gate opens."""
    plain = tensors.write

    def write(path, held):
        time.sleep(seconds)
        if gate is not None:
            assert gate.wait(60)
        return plain(path, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "write", write)
        yield


def checkpoints(keys):
    root = os.path.join(keys["output"], "checkpoints")
    return sorted(os.listdir(root)) if os.path.isdir(root) else []


@contextlib.contextmanager
def stepping(keys):
    """A run in the making: (state, its saver, a function that takes a step)."""
    state = build.build(config.make(runs.BASE | keys), runs.here())
    with (
        trainer.make_loader(state) as loader,
        Logger(state.cfg.output, state.runtime.rank, 0) as log,
    ):
        batches = iter(loader)
        with saving.make_saver(state, log) as saver:
            yield state, saver, lambda: trainer.take_step(state, batches)


def test_a_file_is_what_safetensors_reads(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
    held = {
        f"{i} {dtype}": torch.arange(35).reshape(5, 7).to(dtype) for i, dtype in enumerate(dtypes)
    }
    held |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5), "columns": torch.rand(6, 4).T,
             "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
             "large": torch.rand(5 << 20)}  # fmt: skip
    path = str(tmp_path / "x.safetensors")
    entry = tensors.write(path, held)
    read = load_file(path)
    assert read.keys() == held.keys()
    for name, tensor in held.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    manifest = {"files": {"x.safetensors": entry}}
    assert entry["bytes"] == os.path.getsize(path)
    assert tensors.problems(str(tmp_path), manifest) == []


def test_a_checkpoint_holds_the_step_it_was_asked_in(keys):
    """The training goes on before the files are written, and does not reach into them."""
    assert ranks.run(2, saved_while_stepping, keys) == [(True, False)] * 2
    at_step_1 = ranks.run(2, runs.run, keys | {"output": keys["output"] + "-alone"}, 1)[0]
    loaded = ranks.run(2, built, keys)[0]
    assert all(torch.equal(at_step_1[name], loaded[name]) for name in at_step_1)


def saved_while_stepping(keys):
    """Whether there was no checkpoint when two further steps had been taken; and at the end."""
    gate = threading.Event()
    with slow_disk(gate), stepping(keys) as (state, saver, step):
        step()
        saving.save(saver, state, {})
        step()
        step()
        absent = checkpoint.newest(keys["output"]) is None
        gate.set()
        assert saver.finish() is None
    return absent, checkpoint.newest(keys["output"]) is None


def built(keys):
    return runs.tensors(build.build(config.make(runs.BASE | keys), runs.here()))


def test_the_next_save_waits_for_the_one_in_flight(keys):
    ranks.run(2, save_every_step_on_a_slow_disk, keys)
    assert checkpoints(keys) == ["step-1", "step-2", "step-3"]


def save_every_step_on_a_slow_disk(keys):
    with slow_disk(seconds=0.2), stepping(keys) as (state, saver, step):
        for _ in range(3):
            step()
            saving.save(saver, state, {})


def test_saved_in_the_background_or_not_is_the_same_run(keys):
    both = [
        ranks.run(2, runs.run, keys | {"save_async": background, "checkpoint_every": 2,
                                       "output": f"{keys['output']}-{background}"})[0]
        for background in (True, False)
    ]  # fmt: skip
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    hashes = []
    for background in (True, False):
        path = checkpoint.newest(f"{keys['output']}-{background}")
        files = checkpoint.read_manifest(path)["files"]
        hashes.append({name: entry["sha256"] for name, entry in files.items()})
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_on_one_rank_is_said_and_the_next_save_tries_again(keys, background):
    """Every rank gets the words of the rank that could not write; the former checkpoint stays."""
    keys |= {"save_async": background}
    ranks.run(2, runs.run, keys, 1)
    failures = ranks.run(2, save_on_a_full_disk_and_again, keys)
    assert failures[0] == failures[1]
    assert "rank 1: " in failures[0] and "rank 0: " not in failures[0]
    assert checkpoints(keys) == ["step-1", "step-3"]
    with open(f"{keys['output']}/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    (record,) = [r for r in records if "checkpoint_failed" in r]
    assert record["checkpoint_failed"] == 2 and record["reason"] == failures[0]


def save_on_a_full_disk_and_again(keys):
    with stepping(keys) as (state, saver, step):
        step()
        with runs.full_disk() if state.runtime.rank == 1 else contextlib.nullcontext():
            saving.save(saver, state, {})
            failure = saver.finish()
        if state.runtime.rank == 0:  # who removes what was written
            assert checkpoints(keys) == ["step-1"]
        step()
        saving.save(saver, state, {})
        assert saver.finish() is None
    return failure


def test_the_last_checkpoint_is_tried_again_and_then_an_error(keys, monkeypatch):
    ranks.run(2, runs.run, keys, 1)
    messages = ranks.run(2, end_on_a_full_disk, keys)
    assert messages[0] == messages[1] and "rank 1: " in messages[0]
    assert checkpoints(keys) == ["step-1"]
    with open(f"{keys['output']}/metrics.jsonl") as file:
        failed = [r for line in file if "checkpoint_failed" in (r := json.loads(line))]
    assert len(failed) == 3


def end_on_a_full_disk(keys):
    with pytest.MonkeyPatch.context() as patch, stepping(keys) as (state, saver, step):
        patch.setattr(saving, "_LAST_WAITS", (0.0, 0.0))
        step()
        with runs.full_disk() if state.runtime.rank == 1 else contextlib.nullcontext():
            try:
                saving.save_now(saver, state)
            except OSError as error:
                return str(error)


def test_a_run_that_fails_ends_its_save_first(keys):
    """Without a word between the ranks, of which some may be gone."""
    assert ranks.run(2, fail_with_a_save_in_flight, keys) == ["not finite"] * 2
    assert checkpoints(keys) == ["step-1"]


def fail_with_a_save_in_flight(keys):
    try:
        with slow_disk(seconds=0.3), stepping(keys) as (state, saver, step):
            step()
            saving.save(saver, state, {})
            raise FloatingPointError("not finite")
    except FloatingPointError as error:
        return str(error)


def test_a_run_that_fails_does_not_wait_for_ranks_that_are_gone(keys):
    """Rank 1 never ends its part: rank 0 gives the save up, or the pool's time runs out."""
    ranks.run(2, fail_alone, keys)
    assert checkpoints(keys) == []


def fail_alone(keys):
    gate = threading.Event()
    hangs = runs.here().rank == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.saver, "_LEAVE_SECONDS", 1.0)
        with slow_disk(gate) if hangs else contextlib.nullcontext():
            with pytest.raises(FloatingPointError), stepping(keys) as (state, saver, step):
                step()
                saving.save(saver, state, {})
                raise FloatingPointError
    gate.set()


def test_a_save_that_cannot_begin_is_a_failed_save(keys):
    assert all("cannot prepare" in failure for failure in ranks.run(2, no_directory, keys))


def no_directory(keys):
    with stepping(keys) as (state, saver, step):
        step()
        if state.runtime.rank == 0:
            pathlib.Path(keys["output"], "checkpoints").write_text("a file in the way")
        saving.save(saver, state, {})
        return saver.finish()


_KILLED = """
import os, sys
from recognition.run import build
from recognition.distributed import collectives
from recognition import config
from recognition.checkpoint import writing
from recognition.distributed.runtime import Runtime
from tests.recognition import runs
import torch
for moment, keys in eval(sys.argv[1]).items():
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    sys.exit()
alone = Runtime(torch.device("cpu"), collectives.world_group(), 0, 1)
state = build.build(config.make(keys), alone)
state.step += 1
plain = getattr(writing, moment)
def killed(*arguments):
    if moment == "sync_directory":
        plain(*arguments)
    os.kill(os.getpid(), 9)
setattr(writing, moment, killed)
runs.save_here(state)
"""


def test_a_killed_save_leaves_the_former_one(keys):
    """Killed when the files are written; and when the manifest is too but the name is not: then all
    of the new one is there, and it is taken."""
    moments = {
        moment: runs.BASE | keys | {"output": f"{keys['output']}-{moment}"}
        for moment in ("write_manifest", "sync_directory")
    }
    for of_moment in moments.values():
        ranks.run(1, runs.run, of_moment, 1)
    code = [sys.executable, "-c", _KILLED, repr(moments)]
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(code, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    for moment, of_moment in moments.items():
        assert checkpoints(of_moment) == ["step-1", "step-2.partial"]
        assert checkpoint.newest(of_moment["output"]).endswith("step-1")
        ranks.run(1, runs.run, of_moment, 3)
        taken = ["step-2"] if moment == "sync_directory" else []
        assert checkpoints(of_moment) == ["step-1", *taken, "step-3"]


def test_a_save_that_fails_after_its_manifest_is_not_removed(keys, monkeypatch):
    """The next save gives it its name, and writes it no second time."""
    failures = ranks.run(2, fail_at_the_name, keys)
    assert failures[0] == failures[1] and "cannot be renamed" in failures[0]
    assert checkpoints(keys) == ["step-1", "step-2"]


def fail_at_the_name(keys):
    with pytest.MonkeyPatch.context() as patch, stepping(keys) as (state, saver, step):

        def give_final_name(path):
            raise OSError("it cannot be renamed")

        step()
        with patch.context() as broken:
            broken.setattr(writing, "give_final_name", give_final_name)
            saving.save(saver, state, {})
            failure = saver.finish()
        if state.runtime.rank == 0:
            assert checkpoints(keys) == ["step-1.partial"]
            written = os.stat(f"{keys['output']}/checkpoints/step-1.partial/model.safetensors")
        saving.save(saver, state, {})
        assert saver.finish() is None
        if state.runtime.rank == 0:
            again = os.stat(f"{keys['output']}/checkpoints/step-1/model.safetensors")
            assert again.st_ino == written.st_ino
        step()
        saving.save(saver, state, {})
        assert saver.finish() is None
    return failure


def test_reports_are_whole_or_absent(tmp_path):
    partial = str(tmp_path)
    entries = writing.write_files(partial, 1, {"x.safetensors": {"x": torch.ones(3)}})
    assert writing.reports(partial, 2) is None
    entries |= writing.write_files(partial, 0, {"y.safetensors": {"y": torch.ones(3)}})
    assert writing.reports(partial, 2) == entries
