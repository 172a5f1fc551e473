"""Signals end all ranks after one step, which is saved; torchrun's ways with them are real here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.processes import ROOT, TINY, Run, _command, last_step, wait

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
    alone, keys = [*LOCAL[:-1], 1], [*keys_for(shards_dir), f"max_steps={last + 2}"]
    with Run(tmp_path / "log", output, alone, keys) as on:
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


@pytest.mark.parametrize(
    "number",
    [
        # Also in test_one_run.py.
        pytest.param(signal.SIGTERM, marks=pytest.mark.long, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, id="SIGUSR1"),
    ],
)
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


def test_ctrl_c_under_torchrun_saves_on_all_ranks(shards_dir, tmp_path):
    """As a terminal does it: SIGINT to torchrun's process group; torchrun passes it on."""
    output = tmp_path / "r"
    with Run(tmp_path / "log", output, LOCAL, keys_for(shards_dir)) as run:
        run.wait_for_step(3)
        os.killpg(run.agent.pid, signal.SIGINT)
        assert run.agent.wait(60) != 0
        assert saved(output) == run.step()
        text = run.text()
    assert text.count("stopped by SIGINT after step") == 1 and "the same command goes on" in text
    assert "KeyboardInterrupt" not in text and "SIGKILL" not in text
    assert 'File "' not in text[: text.index("stopped by SIGINT")]  # no traceback of ours


@pytest.mark.parametrize("presses", [1, 2], ids=["saves", "ends at once"])
def test_ctrl_c_without_torchrun(shards_dir, tmp_path, presses):
    """The second one comes while the first is being answered: the process is asleep until then."""
    output = tmp_path / "r"
    keys = [*keys_for(shards_dir), f"output={output}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "launch/train.py", *TINY, *keys], cwd=ROOT, stdout=log, stderr=log
        )
    said = (tmp_path / "log").read_text
    wait(lambda: process.poll() is not None or last_step(output) >= 2, 90, said)
    before = last_step(output)
    if presses == 2:  # the directory is taken away, so that the save is tried again for a while
        (output / "checkpoints").write_text("in the way")
    process.send_signal(signal.SIGINT)
    if presses == 2:
        wait(lambda: "interrupted" in said(), 30, said)
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == (75 if presses == 1 else 130)
    assert "Traceback" not in said() and "KeyboardInterrupt" not in said()
    if presses == 1:
        assert "stopped by SIGINT" in said() and saved(output) >= before
    else:
        assert "interrupted twice" in said()


@pytest.mark.long
def test_a_second_ctrl_c_under_torchrun_ends_at_once(shards_dir, tmp_path):
    """While the first waits for a disk that takes nothing."""
    output = tmp_path / "r"
    with Run(tmp_path / "log", output, LOCAL, keys_for(shards_dir)) as run:
        run.wait_for_step(3)
        (output / "checkpoints").write_text("in the way")
        os.killpg(run.agent.pid, signal.SIGINT)
        wait(lambda: run.text().count("saves its next step") == 2, 30, run.text)
        os.killpg(run.agent.pid, signal.SIGINT)
        assert run.agent.wait(60) != 0
        assert run.text().count("interrupted twice") == 2 and "SIGKILL" not in run.text()


def test_ctrl_c_before_the_training_is_one_line(shards_dir, tmp_path):
    """While the recipe runs."""
    recipe = tmp_path / "slow.py"
    begun = tmp_path / "begun"
    recipe.write_text(f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(60)")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "launch/train.py", str(recipe)], cwd=ROOT, stdout=log, stderr=log
        )
    wait(begun.exists, 60, (tmp_path / "log").read_text)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    said = (tmp_path / "log").read_text()
    assert said.startswith("interrupted") and len(said.splitlines()) == 1


def test_a_parent_that_is_no_torchrun_is_left_alone(shards_dir, tmp_path):
    """torchrun starts a script that starts the rank: SIGUSR1 ends torchrun, not the script."""
    output = tmp_path / "r"
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(
        "#!/bin/bash\n"
        "trap 'echo the script was hurt; exit 3' TERM\n"
        f'{sys.executable} launch/train.py "$@" & wait $!; echo the script ends by itself\n'
    )
    wrapper.chmod(0o755)
    keys = [*TINY, *keys_for(shards_dir), f"output={output}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", *LOCAL[:-1], 1]
    with open(tmp_path / "log", "w") as log:
        agent = subprocess.Popen(
            [*map(str, torchrun), str(wrapper), *keys], cwd=ROOT, stdout=log, stderr=log
        )
    said = (tmp_path / "log").read_text
    wait(lambda: agent.poll() is not None or last_step(output) >= 2, 90, said)
    found = subprocess.run(["pgrep", "-f", f"output={output}"], capture_output=True, text=True)
    [rank] = [
        int(pid)
        for pid in found.stdout.split()
        if "launch/train.py" in _command(int(pid)) and "torch.distributed" not in _command(int(pid))
    ]
    os.kill(rank, signal.SIGUSR1)
    assert agent.wait(60) != 0
    assert "stopped by SIGUSR1" in said() and "got signal: 15" in said()
