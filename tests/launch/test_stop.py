"""Signals end all ranks after one step, which is saved; torchrun's ways with them are real here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.processes import ROOT, TINY, Run, wait

LOCAL = ["--standalone", "--nproc-per-node", 2]


def keys_for(shards_dir):
    return [f"rec={shards_dir}", "global_batch_size=12", "max_steps=100000"]


def saved(output):
    return max(int(p.parent.name[5:]) for p in output.glob("checkpoints/step-*/manifest.json"))


def test_sigusr1_to_one_rank_saves_on_all_and_ends_torchrun(shards_dir, tmp_path):
    """With restarts left, torchrun starts nothing again; the run goes on where it stopped."""
    output = tmp_path / "r"
    torchrun = [*LOCAL, "--max-restarts", 3]
    with Run(tmp_path / "log", output, torchrun, keys_for(shards_dir)) as run:
        run.wait_for_step(3)
        os.kill(run.workers()[1], signal.SIGUSR1)
        assert run.agent.wait(60) != 0
        note = json.loads((output / "stopped.json").read_text())
        assert note == {"step": run.step(), "signal": "SIGUSR1"} and saved(output) == run.step()
        assert run.text().count("stopped by SIGUSR1") == 1
    last = note["step"]
    with Run(
        tmp_path / "log", output, LOCAL, [*keys_for(shards_dir), f"max_steps={last + 2}"]
    ) as on:
        assert on.agent.wait(60) == 0
        assert f"continues after step {last}" in on.text() and f"step {last}/" not in on.text()
    assert not (output / "stopped.json").exists()


@pytest.mark.long
def test_sigterm_to_torchrun_saves_the_last_step(shards_dir, tmp_path):
    output = tmp_path / "r"
    with Run(tmp_path / "log", output, LOCAL, keys_for(shards_dir)) as run:
        run.wait_for_step(3)
        run.agent.terminate()
        assert run.agent.wait(60) != 0
        assert saved(output) == run.step() and "SIGKILL" not in run.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_without_torchrun_the_exit_code_says_try_again(shards_dir, tmp_path, number):
    output = tmp_path / "r"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "launch/train.py", *TINY, f"output={output}", *keys_for(shards_dir)],
            cwd=ROOT, stdout=log, stderr=log,
        )  # fmt: skip
    wait(lambda: process.poll() is not None or (output / "metrics.jsonl").exists(), 60)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(60) == 75
    assert "which is saved" in (tmp_path / "log").read_text() and saved(output) > 0
